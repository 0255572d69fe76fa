"""Edges: scores, single patches, searches and curves, against TransformerLens and slow runs."""

from collections import defaultdict
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.tools.analysis import attribution_patching as tl

from interp.analysis.circuits.edge_curve import EdgeCurve, edge_curve
from interp.analysis.circuits.edge_scores import EdgeScores
from interp.analysis.circuits.edge_search import greedy_edges
from interp.analysis.circuits.edges import edge_attribution, edge_patching
from interp.analysis.paired import metric_of, pair_batch
from interp.analysis.patching.attribution import attribution_patching
from interp.errors import UserError
from interp.heads import Head
from interp.model.gradients import GradientError
from interp.model.graph import Graph, GraphError
from interp.model.replay import ReplayError
from tests.analysis.random_pairs import random_pairs
from tests.model.rebuilt import Rebuilt, everything, with_ablated
from tests.tiny import fresh, tiny, unchecked

QUIET = {"progress": False}
BOTH = pytest.mark.parametrize("direction", ["denoise", "noise"])
FAMILIES = ["gpt2", "llama", "gpt_neox", "qwen3"]
TL_KINDS = {"q_input": ".q", "k_input": ".k", "v_input": ".v", "attn_head_out": ""}


def scores_of(found: EdgeScores) -> dict:
    return dict(zip(found.edges, found.table["score"]))


def ours(node) -> str:
    """TransformerLens' node by our name; positions are summed over."""
    if node.kind in ("embed", "logits"):
        return node.kind
    if node.kind in ("mlp_out", "mlp_in"):
        return f"MLP{node.layer}"
    return f"L{node.layer}H{node.head}{TL_KINDS[node.kind]}"


def tokens(pairs) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(list(pairs[f"{side}_input_ids"])) for side in ("clean", "corrupted"))


def of_one(pairs):
    """The metric of TransformerLens: of one prompt's logits; the first pair's answers."""
    right, wrong = pairs["answers"][0]
    return lambda logits: logits[0, -1, right] - logits[0, -1, wrong]


class Slow:
    """The metric of each pair under any ablated edges, from the rebuilt forward pass."""

    def __init__(self, family, pairs, metric="logit_diff", direction="noise"):
        batch = pair_batch(tiny(family), pairs)
        sides = [
            Rebuilt(family, side.input_ids, batch.attention_mask)
            for side in (batch.clean, batch.corrupted)
        ]
        base, source = sides if direction == "noise" else sides[::-1]
        with torch.no_grad():
            self.source = source.run(everything)[1]
            clean = sides[0].run(everything)[0]
        self.base, self.answers = base, batch.answers(clean)
        self.metric = metric_of(metric)[1]

    @torch.no_grad()
    def under(self, edges) -> np.ndarray:
        logits, _ = self.base.run(with_ablated(set(edges), self.source))
        return self.metric(logits, self.answers).numpy()


# Scores of all edges at once.


def test_edges_have_the_scores_that_transformerlens_gives():
    model, pairs = tiny("gpt2"), random_pairs(7, 7).map(lambda row: {"answers": [7, 12]})
    config = tl.EdgeAttributionConfig(granularity="edge")
    theirs = tl.attribution_patch(model, *tokens(pairs), of_one(pairs), config).edge_scores
    expected = defaultdict(float)
    for (writer, reader), score in theirs.items():
        expected[ours(writer), ours(reader)] += score
    found = edge_attribution(model, pairs, ig_steps=1, direction="denoise", **QUIET)
    assert set(found.edges) == set(expected)
    for edge, score in scores_of(found).items():
        assert score == pytest.approx(expected[edge], abs=1e-5), edge


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_writers_edges_score_is_what_the_writer_scores(family, direction):
    model, pairs = tiny(family), random_pairs(8, 5)
    edges = edge_attribution(model, pairs, ig_steps=1, direction=direction, **QUIET)
    sums = edges.table.groupby("writer")["score"].sum()
    sites = {"z": ("layer", "head"), "mlp_out": ("layer",), "resid_pre": ("layer",)}
    for site, by in sites.items():
        nodes = attribution_patching(model, pairs, site, by, direction=direction, **QUIET)
        base = nodes.corrupted if direction == "denoise" else nodes.clean
        change = (nodes.values - base[:, None]).mean(0) * (1 if direction == "denoise" else -1)
        for cell, score in zip(nodes.cells.itertuples(index=False, name=None), change):
            if site == "resid_pre" and cell != (0,):
                continue
            writer = {"z": "L{}H{}", "mlp_out": "MLP{}", "resid_pre": "embed"}[site].format(*cell)
            assert sums[writer] == pytest.approx(score, abs=1e-5), writer
    assert sums.abs().min() > 1e-4


def by_split_inputs(family, pairs, direction, shares):
    """EAP by the definition: each reader has an input of its own, and a gradient there."""
    batch = pair_batch(tiny(family), pairs)
    sides = [
        Rebuilt(family, side.input_ids, batch.attention_mask)
        for side in (batch.clean, batch.corrupted)
    ]
    base, source = sides if direction == "noise" else sides[::-1]
    with torch.no_grad():
        written = [side.run(everything)[1] for side in (base, source)]
        answers = batch.answers(sides[0].run(everything)[0])
    graph = Graph.of(tiny(family))
    real = batch.attention_mask[..., None]
    change = {u: (written[1][u] - written[0][u]) * real for u in graph.writers}
    found = dict.fromkeys(graph.edges, 0.0)
    for share in shares:
        embed = (1 - share) * base.embedded + share * source.embedded
        extra = {v: torch.zeros_like(embed).requires_grad_() for v in graph.readers}
        logits, _ = base.run(lambda v, seen, extra=extra: everything(v, seen) + extra[v], embed)
        metric = metric_of("logit_diff")[1](logits, answers).sum()
        slopes = torch.autograd.grad(metric, list(extra.values()))
        for reader, slope in zip(graph.readers, slopes):
            for writer in graph.writers:
                if (writer, reader) in found:
                    score = (change[writer] * slope).sum() / len(pairs) / len(shares)
                    found[writer, reader] += float(score) * (1 if direction == "denoise" else -1)
    return found


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps, shares", [(1, [0.0]), (3, [1 / 6, 3 / 6, 5 / 6])])
def test_scores_are_those_of_split_inputs(family, steps, shares, direction):
    pairs = random_pairs(8, 5)
    found = edge_attribution(
        tiny(family), pairs, ig_steps=steps, direction=direction, batch_size=1, **QUIET
    )
    expected = by_split_inputs(family, pairs, direction, shares)
    assert found.edges == list(expected)
    table = found.table["score"].to_numpy()
    np.testing.assert_allclose(table, [*expected.values()], atol=2e-5)
    assert np.abs(table).max() > 0.01


def test_both_directions_agree_along_the_path_and_not_at_one_end():
    model, pairs = tiny("llama"), random_pairs(8, 5)
    path = [
        edge_attribution(model, pairs, direction=d, ig_steps=4, **QUIET).table["score"]
        for d in ("noise", "denoise")
    ]
    np.testing.assert_allclose(*path, atol=1e-5)
    ends = [
        edge_attribution(model, pairs, direction=d, ig_steps=1, **QUIET).table["score"]
        for d in ("noise", "denoise")
    ]
    assert np.abs(ends[0] - ends[1]).max() > 0.01


def test_spread_and_count_are_over_pairs():
    model, pairs = tiny("llama"), random_pairs(8, 5, 6)
    one = [edge_attribution(model, pairs.select([n]), **QUIET).table["score"] for n in range(3)]
    found = edge_attribution(model, pairs, batch_size=2, **QUIET).table
    np.testing.assert_allclose(found["score"], np.mean(one, 0), atol=1e-5)
    np.testing.assert_allclose(found["std"], np.std(one, 0, ddof=1), atol=1e-5)
    assert (found["n"] == 3).all()


# Single edges, patched.


@pytest.mark.parametrize("direction, metric", [("noise", "logit_diff"), ("denoise", "kl")])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_patched_edge_is_the_slow_run(family, direction, metric):
    pairs = random_pairs(7, 5)
    found = edge_patching(tiny(family), pairs, metric, direction=direction, **QUIET)
    slow = Slow(family, pairs, metric, direction)
    base, sign = slow.under([]), 1 if direction == "noise" else -1
    expected = [sign * (base - slow.under([edge])).mean() for edge in found.edges]
    np.testing.assert_allclose(found.table["score"], expected, atol=1e-5)
    assert np.abs(expected).max() > 0.005
    assert found.edges == Graph.of(tiny(family)).edges


def test_chosen_edges_are_those_of_all_edges():
    model, pairs = tiny("llama"), random_pairs(7, 5)
    every = scores_of(edge_patching(model, pairs, batch_size=1, **QUIET))
    chosen = [("L0H1", "logits"), ("embed", "L1H1.k"), ("L0H3", "L1H0.q")]
    found = edge_patching(model, pairs, edges=chosen, **QUIET)
    assert set(found.edges) == set(chosen)
    for edge, score in scores_of(found).items():
        assert score == pytest.approx(every[edge], abs=1e-5)


@pytest.mark.parametrize("source", ["zero", "mean"])
def test_edges_can_carry_zeros_or_means(source):
    model, pairs = tiny("gpt2"), random_pairs(7, 5)
    chosen = [("L0H1", "logits"), ("embed", "L1H1.k"), ("MLP0", "MLP1")]
    found = edge_patching(model, pairs, edges=chosen, source=source, **QUIET)
    batch = pair_batch(model, pairs)
    real = batch.attention_mask.bool()
    slow = Slow("gpt2", pairs)
    with torch.no_grad():
        written = slow.base.run(everything)[1]
    slow.source = {
        name: torch.where(
            real[..., None], value[real].mean(0) if source == "mean" else torch.zeros(()), value
        )
        for name, value in written.items()
    }
    for edge, score in scores_of(found).items():
        expected = (slow.under([]) - slow.under([edge])).mean()
        assert score == pytest.approx(expected, abs=1e-5), edge
    assert found.table["score"].abs().min() > 1e-4


def test_first_order_scores_are_the_patches_where_the_change_is_small():
    """Prompts that differ by a little, in the embedding: the error falls with the square."""
    pairs, errors = random_pairs(6, changed=1), []
    ids = tokens(pairs)
    place = int((ids[0] != ids[1])[0].nonzero()[0])
    for size in (0.1, 0.05):
        model = fresh("llama")
        with torch.no_grad():
            table = model.embed.original_component.weight
            clean, other = table[ids[0][0, place]], table[ids[1][0, place]]
            table[ids[1][0, place]] = clean + size * (other - clean)
        estimate = edge_attribution(model, pairs, ig_steps=1, direction="noise", **QUIET)
        exact = edge_patching(model, pairs, **QUIET)
        errors.append((estimate.table["score"] - exact.table["score"]).abs().max())
    assert errors[1] < errors[0] / 3


# A search, one edge after the other.


def one_after_the_other(family, pairs, threshold, metric):
    """ACDC as the paper says it; nothing stacked, nothing skipped."""
    graph, slow = Graph.of(tiny(family)), Slow(family, pairs, metric)
    gone, tested = set(), {}
    value = slow.under([]).mean()
    for reader in graph.readers[::-1]:
        for writer in graph.writers[::-1]:
            if (writer, reader) not in set(graph.edges):
                continue
            new = slow.under(gone | {(writer, reader)}).mean()
            tested[writer, reader] = value - new
            if value - new < threshold:
                gone.add((writer, reader))
                value = new
    return gone, tested, value


@pytest.mark.parametrize(
    "family, threshold, metric",
    [("llama", 0.003, "kl"), ("gpt2", 0.01, "logit_diff"), ("gpt_neox", 0.0004, "kl")],
)
def test_the_search_is_one_edge_after_the_other(family, threshold, metric):
    pairs = random_pairs(6, 5)
    found = greedy_edges(tiny(family), pairs, threshold, metric, batch_size=1, **QUIET)
    gone, tested, value = one_after_the_other(family, pairs, threshold, metric)
    graph = found.graph
    assert set(found.edges) == set(graph.edges) - gone
    assert 3 < len(found) < graph.n_edges - 3
    assert found.value == pytest.approx(value, abs=1e-5)
    assert list(zip(found.table["writer"], found.table["reader"])) == list(tested)
    for row in found.table.dropna().itertuples():
        assert row.fall == pytest.approx(tested[row.writer, row.reader], abs=1e-5)
    # what was dropped untested changes nothing
    untested = found.table[found.table["fall"].isna()]
    assert not untested["kept"].any()
    assert all(abs(tested[edge]) < 1e-5 for edge in zip(untested["writer"], untested["reader"]))


def test_nothing_stays_above_every_threshold_and_everything_below():
    model, pairs = tiny("llama"), random_pairs(6, 5)
    none = greedy_edges(model, pairs, np.inf, **QUIET)
    assert none.edges == none.heads == []
    assert none.value == pytest.approx(none.floor, abs=1e-5)
    assert none.faithfulness == pytest.approx(0, abs=1e-4)
    every = greedy_edges(model, pairs, -np.inf, **QUIET)
    assert every.edges == every.graph.edges
    assert every.heads == [Head(layer, head) for layer in (0, 1) for head in range(4)]
    assert every.faithfulness == 1
    assert every.whole == pytest.approx(0, abs=1e-6)  # KL to itself
    assert every.floor < -0.01


def test_a_search_says_what_it_did():
    found = greedy_edges(tiny("llama"), random_pairs(6, 5), 0.01, **QUIET)
    about = found.metadata
    assert about["order"].startswith("readers from the logits")
    tested = found.table["fall"].notna().sum()
    assert about["tests"] == tested
    assert about["passes"] < tested
    assert f"{len(found)} of 82 edges" in repr(found)
    with pytest.raises(UserError, match="threshold=nan"):
        greedy_edges(tiny("llama"), random_pairs(6), np.nan, **QUIET)


# Circuits of several sizes.


def test_faithfulness_is_that_of_transformerlens():
    model, pairs = tiny("gpt2"), random_pairs(6)
    scores = edge_attribution(model, pairs, **QUIET)
    sizes = [5, 20, 60, 109]
    curve = edge_curve(model, pairs, scores, sizes, **QUIET).table
    clean, corrupted = tokens(pairs)
    config = tl.EdgeAttributionConfig(granularity="edge")
    every = tl.attribution_patch(model, clean, corrupted, of_one(pairs), config).edge_scores
    for size, row in zip(sizes, curve.itertuples()):
        top = set(scores.top(size))
        for kept, value in ((True, row.faithfulness), (False, row.without)):
            circuit = [edge for edge in every if ((ours(edge[0]), ours(edge[1])) in top) == kept]
            theirs = tl.faithfulness(model, clean, corrupted, of_one(pairs), circuit)
            assert value == pytest.approx(theirs.recovered, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_curve_is_the_slow_run_of_each_circuit(family):
    model, pairs = tiny(family), random_pairs(7, 5, 6)
    graph = Graph.of(model)
    generator = torch.Generator().manual_seed(3)
    ranking = [graph.edges[k] for k in torch.randperm(graph.n_edges, generator=generator)]
    curve = edge_curve(model, pairs, ranking, [4, 30, 70], batch_size=2, **QUIET)
    slow = [Slow(family, pairs.select([n])) for n in range(3)]
    for n, run in enumerate(slow):
        for column, size in enumerate((4, 30, 70)):
            kept = set(ranking[:size])
            outside = set(graph.edges) - kept
            assert curve.circuit[n, column] == pytest.approx(run.under(outside)[0], abs=2e-5)
            assert curve.complement[n, column] == pytest.approx(run.under(kept)[0], abs=2e-5)
        assert curve.floor[n] == pytest.approx(run.under(graph.edges)[0], abs=2e-5)
        assert curve.whole[n] == pytest.approx(run.under([])[0], abs=2e-5)


@pytest.mark.parametrize("source", ["pair", "zero", "mean"])
def test_the_whole_model_is_faithful_and_nothing_is_not(source):
    model, pairs = tiny("llama"), random_pairs(7, 5)
    curve = edge_curve(model, pairs, Graph.of(model).edges, [0, 0.5, 1.0], source=source, **QUIET)
    table = curve.table
    assert table["n_edges"].tolist() == [0, 41, 82]
    assert table["faithfulness"].iloc[[0, 2]].tolist() == pytest.approx([0, 1], abs=1e-5)
    assert table["without"].iloc[[0, 2]].tolist() == pytest.approx([1, 0], abs=1e-5)
    assert table["connected"].iloc[[0, 2]].tolist() == [0, 82]
    if source == "pair":
        batch = pair_batch(model, pairs)
        logits = model.last_logits(batch.corrupted.input_ids, batch.attention_mask, 1)[:, -1]
        corrupted = metric_of("logit_diff")[1](logits, batch.answers(logits))
        np.testing.assert_allclose(curve.floor, corrupted, atol=1e-5)


def made_curve(circuit, whole=(2.0, 4.0), floor=(0.0, 0.0), n_edges=(1, 10, 100)):
    sizes = pd.DataFrame({"n_edges": n_edges, "share": np.array(n_edges) / 100, "connected": 1})
    circuit = np.array(circuit, dtype=float)
    about = {"metric": "logit_diff"}
    return EdgeCurve(sizes, circuit, circuit[:, ::-1], np.array(whole), np.array(floor), about)


def test_faithfulness_is_a_ratio_of_means_and_areas_are_trapezoids():
    curve = made_curve([[0, 1, 2], [0, 5, 4]])
    assert curve.table["faithfulness"].tolist() == pytest.approx([0, 1, 1])
    assert curve.table["without"].tolist() == pytest.approx([1, 1, 0])
    linear = (0.5 * 0.09 + 1 * 0.9) / 0.99
    assert curve.area() == pytest.approx(linear)
    assert curve.area(log=True) == pytest.approx((0.5 + 1) / 2)
    assert curve.distance() == pytest.approx(0.5 * 0.09 / 0.99)
    over = made_curve([[0, 2, 2], [0, 7, 4]])  # more than the model's own
    assert over.table["faithfulness"].tolist() == pytest.approx([0, 1.5, 1])
    assert over.distance(log=True) == pytest.approx((0.75 + 0.25) / 2)


def test_intervals_hold_the_estimate_and_shrink_with_agreement():
    spread = made_curve([[0, 1, 2], [0, 5, 4]]).table
    assert (spread["low"] <= spread["faithfulness"] + 1e-9).all()
    assert (spread["high"] >= spread["faithfulness"] - 1e-9).all()
    assert spread["low"].iloc[1] < 1 < spread["high"].iloc[1]
    agreed = made_curve([[0, 1, 2], [0, 2, 4]]).table
    assert agreed["low"].iloc[1] == agreed["high"].iloc[1] == pytest.approx(0.5)


def test_a_curve_can_be_drawn():
    figure = made_curve([[0, 1, 2], [0, 5, 4]]).plot(title="t")
    assert figure.layout.xaxis.type == "log"
    assert {trace.name for trace in figure.data} >= {"circuit", "model without it"}


@pytest.mark.parametrize(
    "sizes, words",
    [([1.5], "neither"), ([-1], "neither"), ([83], "82 are ranked"), ([], "none given")],
)
def test_sizes_that_are_not_there_are_errors(sizes, words):
    model = tiny("llama")
    with pytest.raises(UserError, match=words):
        edge_curve(model, random_pairs(5), Graph.of(model).edges, sizes, **QUIET)


# What a user meets.


def small_scores(**more) -> EdgeScores:
    graph = Graph(1, 2, 1)
    samples = torch.zeros(2, graph.n_edges)
    for edge, score in {
        ("L0H0", "MLP0"): 0.5, ("L0H0", "logits"): -0.5, ("L0H1", "logits"): -0.8,
        ("embed", "L0H0.k"): 0.1,
    }.items():  # fmt: skip
        samples[:, graph.edges.index(edge)] = score
    return EdgeScores.from_samples(graph, samples, {"analysis": "edge_attribution", **more})


def test_scores_are_ranked_by_size_and_summed_by_head():
    scores = small_scores()
    assert scores.top(3) == [("L0H1", "logits"), ("L0H0", "MLP0"), ("L0H0", "logits")]
    assert scores["embed", "L0H0.k"] == pytest.approx(0.1)
    assert scores.heads.matrix.tolist() == [pytest.approx([1.0, 0.8])]
    assert scores.heads.top(k=1) == [Head(0, 0)]
    assert "L0H1 -> logits -0.8" in repr(scores)
    assert len(scores.top(0)) == 0
    with pytest.raises(GraphError, match="n=99: there are 11"):
        scores.top(99)
    with pytest.raises(GraphError, match="no writer is called 'L0H2'"):
        scores["L0H2", "logits"]


def test_scores_survive_a_file(tmp_path):
    scores = small_scores(parameters={"steps": (1, 2)})
    path = scores.save(tmp_path / "new" / "edges.parquet")
    again = EdgeScores.load(path)
    pd.testing.assert_frame_equal(again.table, scores.table)
    assert again.metadata == scores.metadata
    assert again.graph == Graph(1, 2, 1)
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    (tmp_path / "bad.parquet").write_text("no")
    for name, words in (
        ("other", "not one of edge scores"), ("bad", "no readable"), ("none", "no readable"),
    ):  # fmt: skip
        with pytest.raises(GraphError, match=words):
            EdgeScores.load(tmp_path / f"{name}.parquet")
    with pytest.raises(GraphError, match=r"\.parquet"):
        scores.save(tmp_path / "edges.csv")


def test_metadata_say_what_was_done():
    model, pairs = tiny("llama"), random_pairs(5)
    about = edge_attribution(model, pairs, **QUIET).metadata
    assert about["gradient"].startswith("mean of 5 midpoints")
    assert about["direction"] == "noise"
    assert about["graph"]["n_kv_heads"] == 2
    about = edge_patching(model, pairs, edges=[("embed", "logits")], **QUIET).metadata
    assert about["source"] == "pair"
    curve = edge_curve(model, pairs, Graph.of(model).edges, [3], **QUIET)
    assert curve.metadata["model"] == model.name
    assert "3-3 edges" in repr(curve)


RUNS = {
    "attribution": edge_attribution,
    "patching": edge_patching,
    "greedy": partial(greedy_edges, threshold=0.1),
    "curve": partial(edge_curve, scores=[("embed", "logits")], sizes=[1]),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_every_pass_refuses_what_it_cannot_do(run):
    pairs = random_pairs(5)
    with pytest.raises(GraphError, match="no graph of edges"):
        run(tiny("gemma2"), pairs, **QUIET)
    training = fresh("llama")
    training.original_model.train()
    with pytest.raises((ReplayError, GradientError), match=r"model\.eval"):
        run(training, pairs, **QUIET)
    with pytest.raises(UserError, match="no rows"):
        run(tiny("llama"), pairs.select([]), **QUIET)
    with unchecked(), pytest.raises(UserError, match="batch_size=0"):
        run(tiny("llama"), pairs, batch_size=0, **QUIET)
    with pytest.raises(UserError, match="Did you mean"):
        run(tiny("llama"), pairs, metric="logit_dif", **QUIET)


def test_edges_and_sources_that_are_none_are_errors():
    model, pairs = tiny("llama"), random_pairs(5)
    with unchecked(), pytest.raises(GraphError, match="no pair of a writer and a reader"):
        edge_patching(model, pairs, edges=["embed"], **QUIET)
    with pytest.raises(GraphError, match="the nearest"):
        edge_patching(model, pairs, edges=[("embed", "L9H0.q")], **QUIET)
    with pytest.raises(UserError, match="none given"):
        edge_patching(model, pairs, edges=[], **QUIET)
    with pytest.raises(UserError, match="direction='noise'"):
        edge_patching(model, pairs, direction="denoise", source="zero", **QUIET)
    with unchecked(), pytest.raises(UserError, match="pair, zero, mean"):
        edge_patching(model, pairs, source="median", **QUIET)
    with pytest.raises(UserError, match="vanishes"):
        edge_attribution(model, pairs, "kl", ig_steps=1, **QUIET)
