"""Heads and tables of their scores: reading, merging, choosing, comparing, saving."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.errors import UserError
from interp.heads import Head, HeadError, HeadScores, ScoresError, heads_of
from interp.provenance import ProvenanceError, digest_file, digest_rows, versions


def some_scores(n_layers=4, n_heads=5, n=6, seed=0, **options) -> HeadScores:
    samples = np.random.default_rng(seed).random((n, n_layers, n_heads))
    return HeadScores.from_samples(samples, analysis="test", model="toy", **options)


def assert_same(left: HeadScores, right: HeadScores):
    pd.testing.assert_frame_equal(left.table, right.table, rtol=1e-9, atol=1e-9)
    assert left.metadata == right.metadata


@pytest.mark.parametrize(
    "written", ["L3H5", "l3h5", " 3.5 ", "3-5", (3, 5), [3, 5], (np.int64(3), 5), Head(3, 5)]
)
def test_a_head_is_read_in_every_form_that_people_write(written):
    assert Head.parse(written) == Head(3, 5)


def test_a_head_of_another_tower_is_read_as_it_is_printed():
    head = Head(3, 10, "vision")
    assert str(head) == "vision:L3H10"
    assert Head.parse(str(head)) == head == Head.parse((3, 10, "vision"))
    assert str(Head(3, 10)) == "L3H10"


@pytest.mark.parametrize("written", ["3", "L3", "3.5.1", "H5L3", "-1.2", "", 3.5, 3, None, (1,)])
def test_what_is_no_head_is_refused_with_the_ways_to_write_one(written):
    with pytest.raises(HeadError, match="L3H5"):
        Head.parse(written)


def test_negative_and_fractional_indices_are_refused():
    for layer, head in [(-1, 0), (0, 1.5), (True, 0), (0, "2")]:
        with pytest.raises(HeadError, match="whole number"):
            Head.parse((layer, head))
    with pytest.raises(HeadError, match="layer=-1"):
        Head(-1, 0)


def test_heads_sort_by_layer_then_head():
    assert sorted([Head(1, 0), Head(0, 9), Head(0, 2)]) == [Head(0, 2), Head(0, 9), Head(1, 0)]


def test_lists_of_heads_are_read_in_order_and_without_doubles():
    expected = (Head(3, 5), Head(0, 1))
    assert heads_of(["3.5", (0, 1), Head(3, 5)]) == expected
    assert heads_of("3.5, L0H1") == expected
    assert heads_of(((3, 5), (0, 1))) == expected
    assert heads_of((3, 5)) == heads_of(Head(3, 5)) == (Head(3, 5),)
    assert heads_of([]) == ()
    assert len(heads_of(some_scores())) == 20
    with pytest.raises(HeadError, match="list of heads"):
        heads_of(3)


def test_samples_become_mean_std_and_count():
    samples = np.array([[[0.0, 1.0, np.nan]], [[1.0, 1.0, np.nan]], [[2.0, np.nan, np.nan]]])
    table = HeadScores.from_samples(samples).table
    assert table.columns.tolist() == ["layer", "head", "score", "std", "n", "tower"]
    np.testing.assert_allclose(table["score"], [1.0, 1.0, np.nan])
    np.testing.assert_allclose(table["std"], [1.0, 0.0, np.nan])
    assert table["n"].tolist() == [3, 2, 0]


def test_the_spread_of_a_single_sample_is_unknown():
    assert np.isnan(HeadScores.from_samples(np.ones((1, 1, 1))).table["std"][0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.int64])
def test_tensors_of_any_type_are_samples(dtype):
    scores = HeadScores.from_samples(torch.tensor([[[1, 0]], [[0, 0]]]).to(dtype))
    assert scores.table["score"].tolist() == [0.5, 0.0]


def test_infinite_samples_are_refused_by_head():
    with pytest.raises(ScoresError, match=r"infinite.*L0H1"):
        HeadScores.from_samples(np.array([[[0.0, np.inf]]]))


def test_matrix_is_nan_where_no_head_was_scored():
    scores = HeadScores(pd.DataFrame({"layer": [0, 2], "head": [1, 0], "score": [0.5, 0.25]}))
    expected = [[np.nan, 0.5], [np.nan, np.nan], [0.25, np.nan]]
    np.testing.assert_array_equal(scores.matrix, expected)
    assert scores.counts.tolist() == [[0, 1], [0, 0], [1, 0]]


def test_a_row_is_found_by_its_head_in_any_form():
    scores = some_scores()
    assert scores["L3H4"]["score"] == scores[Head(3, 4)]["score"] == scores.matrix[3, 4]
    assert len(scores) == 20
    with pytest.raises(HeadError, match=r"L9H9.*layers 0-3, heads 0-4"):
        scores["9.9"]
    with pytest.raises(TypeError):
        iter(scores)


@pytest.mark.parametrize(
    "table, words",
    [
        ({"layer": [0], "head": [0]}, "lacks the columns score"),
        ({"layer": [0, 0], "head": [1, 1], "score": [0.1, 0.2]}, "twice.*L0H1"),
        ({"layer": [-1], "head": [1], "score": [0.1]}, "'layer' must hold whole numbers"),
        ({"layer": [0], "head": [0.5], "score": [0.1]}, "'head' must hold whole numbers"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(table, words):
    with pytest.raises(ScoresError, match=words):
        HeadScores(pd.DataFrame(table))


def test_scores_cannot_be_changed_through_what_they_hand_out():
    scores = some_scores(keep_samples=True)
    table = scores.table
    table.loc[0, "score"] = 99.0
    scores.metadata["model"] = "another"
    scores.samples[:] = 99.0
    assert_same(scores, some_scores())
    assert scores.samples.max() < 1


def test_metadata_become_json_and_what_cannot_is_refused_by_its_key():
    table = pd.DataFrame({"layer": [0], "head": [0], "score": [0.5]})
    metadata = {"k": np.int64(3), "lengths": (1, 2), "head": Head(1, 2), "x": np.nan}
    metadata |= {"dtype": torch.bfloat16, "deep": {"a": np.arange(2)}}
    assert HeadScores(table, metadata).metadata == {
        "k": 3,
        "lengths": [1, 2],
        "head": {"layer": 1, "head": 2, "tower": "text"},
        "x": None,
        "dtype": "bfloat16",
        "deep": {"a": [0, 1]},
    }
    with pytest.raises(ProvenanceError, match=r"deep.model"):
        HeadScores(table, {"deep": {"model": object()}})


def test_top_goes_by_score_then_layer_then_head():
    table = pd.DataFrame(
        {"layer": [1, 0, 0, 2], "head": [0, 1, 0, 0], "score": [0.5, 0.5, np.nan, 0.9]}
    )
    scores = HeadScores(table)
    assert scores.top(3) == [Head(2, 0), Head(0, 1), Head(1, 0)]
    assert scores.top(threshold=0.5) == [Head(2, 0)]
    assert scores.top(fraction=0.34) == [Head(2, 0)]
    assert scores.top(fraction=1.0) == scores.top(3)
    assert scores.top(0) == []
    with pytest.raises(ScoresError, match=r"k=4.*0 to 3"):
        scores.top(4)


def test_top_wants_exactly_one_way_to_choose():
    for choice in ({}, {"k": 1, "threshold": 0.5}):
        with pytest.raises(ScoresError, match="exactly one"):
            some_scores().top(**choice)
    with pytest.raises(ScoresError, match="fraction=2"):
        some_scores().top(fraction=2)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), k=st.integers(0, 10), data=st.integers(0, 50))
def test_random_heads_are_as_many_others_and_the_seed_decides(seed, k, data):
    scores = some_scores(seed=data)
    drawn = scores.random(k, seed=seed)
    assert len(set(drawn)) == k
    assert not set(drawn) & set(scores.top(k))
    assert drawn == scores.random(k, seed=seed)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), k=st.integers(1, 6), data=st.integers(0, 50))
def test_random_heads_can_match_the_layers_of_the_top(seed, k, data):
    scores = some_scores(n_heads=12, seed=data)
    drawn = scores.random(k, seed=seed, match="layer")
    assert sorted(h.layer for h in drawn) == sorted(h.layer for h in scores.top(k))
    assert not set(drawn) & set(scores.top(k))


def test_random_heads_differ_between_seeds_and_cover_all_others():
    scores = some_scores()
    drawn = {head for seed in range(60) for head in scores.random(5, seed=seed)}
    assert drawn == set(scores.heads) - set(scores.top(5))


def test_random_heads_keep_clear_of_the_excluded_and_of_heads_without_score():
    samples = np.random.default_rng(0).random((3, 2, 4))
    samples[:, 0, 0] = np.nan
    scores = HeadScores.from_samples(samples)
    left = set(scores.top(7)) - set(scores.top(2)) - {Head(1, 1)}
    drawn = {h for seed in range(40) for h in scores.random(2, seed=seed, exclude=["1.1"])}
    assert drawn == left


def test_random_says_where_the_pool_is_too_small():
    with pytest.raises(ScoresError, match="11 heads are wanted, and 9 are left"):
        some_scores().random(11, seed=0)
    table = pd.DataFrame({"layer": [0, 0, 1], "head": [0, 1, 0], "score": [0.1, 0.2, 0.9]})
    with pytest.raises(ScoresError, match="1 heads are wanted from layer 1, and 0 are left"):
        HeadScores(table).random(1, seed=0, match="layer")
    with pytest.raises(ScoresError, match="match='layers'"):
        some_scores().random(1, seed=0, match="layers")


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    offset=st.sampled_from([0.0, 1e6]),
)
def test_merged_shards_equal_one_run(sizes, seed, offset):
    generator = np.random.default_rng(seed)
    samples = offset + generator.random((sum(sizes), 2, 3))
    samples[generator.random(samples.shape) < 0.3] = np.nan
    shards = np.split(samples, np.cumsum(sizes)[:-1])
    merged = HeadScores.merge(HeadScores.from_samples(s, keep_samples=True) for s in shards)
    whole = HeadScores.from_samples(samples, keep_samples=True)
    assert_same(merged, whole)
    np.testing.assert_array_equal(merged.samples, whole.samples)


@settings(max_examples=25)
@given(seeds=st.lists(st.integers(0, 9), min_size=3, max_size=3), n=st.integers(1, 4))
def test_merging_is_associative_in_numbers_and_metadata(seeds, n):
    a, b, c = (
        some_scores(n=n, seed=seed).with_metadata(shard=i, prompts={"sha256": str(seed)})
        for i, seed in enumerate(seeds)
    )
    left = HeadScores.merge([HeadScores.merge([a, b]), c])
    right = HeadScores.merge([a, HeadScores.merge([b, c])])
    assert_same(left, right)
    assert_same(left, HeadScores.merge([a, b, c]))
    assert [part["shard"] for part in left.metadata["parts"]] == [0, 1, 2]


def test_shards_may_score_different_heads():
    tables = [
        pd.DataFrame({"layer": [layer], "head": [0], "score": [layer / 2]}) for layer in (0, 1)
    ]
    merged = HeadScores.merge(HeadScores(table) for table in tables)
    assert merged.heads == [Head(0, 0), Head(1, 0)]


def test_runs_of_different_parameters_do_not_merge():
    with pytest.raises(ScoresError, match=r"'model' differs.*toy.*another"):
        HeadScores.merge([some_scores(), some_scores().with_metadata(model="another")])
    with pytest.raises(ScoresError, match="'threshold' differs"):
        HeadScores.merge([some_scores(), some_scores().with_metadata(threshold=0.5)])
    with pytest.raises(ScoresError, match="nothing to merge"):
        HeadScores.merge([])


def test_other_columns_are_averaged_or_must_agree():
    def part(n, mass, kind):
        return HeadScores(
            pd.DataFrame(
                {"layer": [0], "head": [0], "score": [1.0], "std": [0.0], "n": [n], "mass": [mass]}
            ).assign(kind=kind)
        )

    merged = HeadScores.merge([part(1, 0.0, "a"), part(3, 1.0, "a")])
    assert merged["0.0"]["mass"] == 0.75 and merged["0.0"]["kind"] == "a"
    with pytest.raises(ScoresError, match="'kind' differs at L0H0"):
        HeadScores.merge([part(1, 0.0, "a"), part(3, 1.0, "b")])


def test_counts_without_spread_do_not_merge():
    table = pd.DataFrame({"layer": [0], "head": [0], "score": [1.0], "n": [5]})
    with pytest.raises(ScoresError, match="n=5 but no std"):
        HeadScores.merge([HeadScores(table), HeadScores(table)])


def test_halves_and_splits_are_the_scores_of_their_samples():
    samples = np.random.default_rng(3).random((5, 2, 3))
    scores = HeadScores.from_samples(samples, keep_samples=True, analysis="test")
    even, odd = scores.halves()
    assert_same(even, HeadScores.from_samples(samples[::2], analysis="test"))
    assert_same(odd, HeadScores.from_samples(samples[1::2], analysis="test"))
    short = scores.split([256, 256, 512, 512, 512])[256]
    assert_same(short, HeadScores.from_samples(samples[:2], analysis="test"))
    assert_same(HeadScores.merge(scores.halves(seed=1)), scores)


def test_splitting_needs_the_samples_and_a_label_for_each():
    with pytest.raises(ScoresError, match="keep_samples=True"):
        some_scores().halves()
    with pytest.raises(ScoresError, match="2 for 6 samples"):
        some_scores(keep_samples=True).split([1, 2])
    with pytest.raises(ScoresError, match="1 samples cannot be halved"):
        some_scores(n=1, keep_samples=True).halves()


def test_interval_is_the_t_interval_of_the_mean():
    table = HeadScores.from_samples(np.array([[[1.0]], [[2.0]], [[3.0]]])).interval(0.95)
    assert table["high"][0] == pytest.approx(2 + 4.302653 / np.sqrt(3), abs=1e-5)
    assert table["low"][0] == pytest.approx(4 - table["high"][0])


def test_correlation_is_over_the_heads_that_both_score():
    scores = some_scores()
    assert scores.correlation(scores) == pytest.approx(1)
    squared = HeadScores(scores.table.assign(score=scores.table["score"] ** 3).iloc[3:])
    assert scores.correlation(squared) == pytest.approx(1)
    assert scores.correlation(squared, method="pearson") < 1
    with pytest.raises(ScoresError, match="spearman, pearson"):
        scores.correlation(scores, method="kendall")
    with pytest.raises(ScoresError, match="only 2 heads"):
        scores.correlation(HeadScores(scores.table.iloc[:2]))


def test_overlap_counts_shared_heads_against_chance():
    scores = some_scores()
    same = scores.overlap(scores, k=5)
    assert same.jaccard == 1 and same.shared == tuple(sorted(scores.top(5)))
    assert same.expected == pytest.approx(25 / 20)
    assert same.p_value == pytest.approx(1 / 15504)  # 20 choose 5
    reversed_scores = HeadScores(scores.table.assign(score=-scores.table["score"]))
    apart = scores.overlap(reversed_scores, k=5)
    assert apart.shared == () and apart.jaccard == 0 and apart.p_value == 1


@pytest.mark.parametrize("match", [None, "layer"])
def test_overlap_by_chance_is_what_shuffling_heads_finds(match):
    left, right = some_scores(3, 4, seed=1), some_scores(3, 4, seed=2)
    exact = left.overlap(right, k=5, match=match)
    generator = np.random.default_rng(0)
    ours, theirs = np.zeros((2, 3, 4), dtype=bool)
    for mask, scores in ((ours, left), (theirs, right)):
        for head in scores.top(5):
            mask[head.layer, head.head] = True
    theirs = theirs if match else theirs.reshape(1, -1)
    shuffled = (generator.permuted(theirs, axis=1).reshape(3, 4) for _ in range(4000))
    found = [(ours & mask).sum() for mask in shuffled]
    assert np.mean(found) == pytest.approx(exact.expected, abs=0.06)
    share = np.mean(np.array(found) >= len(exact.shared))
    assert share == pytest.approx(exact.p_value, abs=0.03)


def test_two_towers_stay_apart():
    table = some_scores().table
    scores = HeadScores(pd.concat([table, table.assign(tower="vision")]))
    assert scores.towers == ["text", "vision"]
    assert scores.tower("vision").heads[0] == Head(0, 0, "vision")
    with pytest.raises(ScoresError, match="one tower"):
        _ = scores.matrix
    with pytest.raises(ScoresError, match=r"tower='audio'.*text, vision"):
        scores.tower("audio")
    drawn = scores.random(4, seed=0, match="layer")
    assert sorted((h.tower, h.layer) for h in drawn) == sorted(
        (h.tower, h.layer) for h in scores.top(4)
    )


@pytest.mark.parametrize("keep_samples", [False, True])
def test_parquet_brings_back_table_metadata_and_samples(tmp_path, keep_samples):
    scores = some_scores(keep_samples=keep_samples)
    table = scores.table.assign(entropy=0.5, kind="copy", rank=range(20))
    scores = HeadScores(table, {"deep": {"a": [1, None]}}, samples=scores.samples)
    path = scores.save(tmp_path / "new folder" / "heads.parquet")
    loaded = HeadScores.load(path)
    assert_same(loaded, scores)
    assert (loaded.samples is None) == (not keep_samples)
    if keep_samples:
        np.testing.assert_array_equal(loaded.samples, scores.samples)
    assert pd.read_parquet(path)["score"].tolist() == table["score"].tolist()
    assert [file.name for file in path.parent.iterdir()] == ["heads.parquet"]


def test_a_newer_version_of_the_format_is_refused(tmp_path):
    path = some_scores().save(tmp_path / "heads.parquet")
    table = pq.read_table(path)
    about = {**json.loads(table.schema.metadata[b"interp"]), "version": 2}
    pq.write_table(table.replace_schema_metadata({b"interp": json.dumps(about)}), path)
    with pytest.raises(ScoresError, match=r"version 2.*up to 1.*Upgrade"):
        HeadScores.load(path)


def test_files_of_other_kinds_are_refused(tmp_path):
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": [1]}), other)
    with pytest.raises(ScoresError, match="not one of head scores"):
        HeadScores.load(other)
    other.write_bytes(b"cut off")
    with pytest.raises(ScoresError, match="not a readable parquet"):
        HeadScores.load(other)
    with pytest.raises(ScoresError, match="no such file"):
        HeadScores.load(tmp_path / "nowhere.parquet")
    with pytest.raises(ScoresError, match=r"\.parquet or \.json"):
        some_scores().save(tmp_path / "heads.csv")


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        some_scores().save(tmp_path / "file" / "heads.parquet")


def test_a_failed_save_leaves_the_old_file_as_it_was(tmp_path, monkeypatch):
    path = some_scores().save(tmp_path / "heads.parquet")
    before = path.read_bytes()
    monkeypatch.setattr(pq, "write_table", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        some_scores(seed=1).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["heads.parquet"]


def test_published_json_is_read_with_ints_floats_and_bare_numbers(tmp_path):
    path = tmp_path / "llama.json"
    path.write_text('{"0-0": [0, 0.5, 1], "0-1": 0.25, "1-1": [0, 0], "1-0": []}\n')
    scores = HeadScores.load(path, keep_samples=True)
    np.testing.assert_allclose(scores.matrix, [[0.5, 0.25], [np.nan, 0]])
    assert scores.counts.tolist() == [[3, 1], [0, 2]]
    assert scores["0.0"]["std"] == 0.5 and np.isnan(scores["0.1"]["std"])
    assert scores.metadata == {"analysis": "retrieval_heads", "source": "llama.json"}
    assert HeadScores.load(path).samples is None


def test_published_json_is_one_line_with_samples_or_the_mean(tmp_path):
    scores = some_scores(2, 2, n=3, keep_samples=True)
    path = scores.save(tmp_path / "kept.json")
    with open(path) as file:
        first = json.loads(file.readline())
        assert file.read() == ""
    assert list(first) == ["0-0", "0-1", "1-0", "1-1"]
    assert first["1-0"] == scores.samples[:, 2].tolist()
    again = HeadScores.load(path, keep_samples=True)
    pd.testing.assert_frame_equal(again.table, scores.table)

    means = json.loads(HeadScores(scores.table).save(tmp_path / "mean.json").read_text())
    assert means["1-0"] == [scores["1.0"]["score"]]
    vision = HeadScores(scores.table.assign(tower="vision"))
    with pytest.raises(ScoresError, match=r"tower.*vision.*parquet"):
        vision.save(tmp_path / "vision.json")


@pytest.mark.parametrize(
    "text, words",
    [
        ("not json", "is not JSON"),
        ("{}", "not empty"),
        ("[1, 2]", "one JSON object"),
        ('{"L3H5": [0.1]}', "'L3H5' must be 'LAYER-HEAD'"),
        ('{"3-5": ["high"]}', "'3-5' must be numbers"),
        ('{"3-5": true}', "'3-5' must be numbers"),
        ('{"3-5": [0.1], "03-5": [0.1]}', "twice"),
    ],
)
def test_a_malformed_published_json_says_what_is_wrong(tmp_path, text, words):
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(ScoresError, match=words):
        HeadScores.load(path)


def test_scores_print_shortly():
    scores = some_scores()
    assert repr(scores).startswith("HeadScores(test of toy, 20 heads; top: ")
    assert repr(scores).count("L") == 5
    html = HeadScores(scores.table, {"model": "<b>"})._repr_html_()
    assert "scores of &lt;b&gt;" in html and html.count("<tr>") == 6


def test_digests_follow_content_and_row_order_but_not_column_order(tmp_path):
    rows = [{"text": "ä", "ids": [1, 2]}, {"text": "b", "ids": np.array([3])}]
    digest = digest_rows(rows)
    assert digest == digest_rows([dict(reversed(row.items())) for row in rows])
    assert digest != digest_rows(rows[::-1])
    path = tmp_path / "rows.jsonl"
    path.write_text('{"ids":[1,2],"text":"ä"}\n{"ids":[3],"text":"b"}\n', encoding="utf-8")
    assert digest_file(path) == digest


def test_versions_name_what_runs_and_what_is_missing():
    found = versions(("torch", "transformer_lens", "no_such_package"))
    assert found["torch"].startswith(torch.__version__.split("+")[0])
    assert found["transformer_lens"] and found["no_such_package"] is None
    assert found["python"].startswith("3.")
