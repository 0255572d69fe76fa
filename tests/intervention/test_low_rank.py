"""Low-rank q, k and v: against loops over single prompts, its closed form, and its two ends."""

from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close

import interp
from interp.intervention.base import InterventionError
from interp.intervention.low_rank import LowRank
from interp.intervention.subspaces import LABELS
from tests.lettered import lettered
from tests.tiny import random_ids, tiny, unchecked, words

FAMILIES = ["gpt2", "llama", "gpt_neox", "qwen3", "gemma2"]
HEADS = ["L1H3", "L0H1", "L1H2", "L0H0"]  # of grouped-query models both heads of a group
FIT, TEST = lettered(12, seed=0), lettered(5, seed=1)
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
SHARED = {"gpt2": 1, "gpt_neox": 1, "llama": 2, "qwen3": 2, "gemma2": 2}

each_family = pytest.mark.parametrize("family", FAMILIES)


def labels_of(pair) -> list[int]:
    return [pair["positions"][name] for name in LABELS]


def seen(model, ids, names, hooks=()) -> tuple[torch.Tensor, dict]:
    """The last token's logits of one prompt alone, and what some hooks showed."""
    found = {}

    def keep(value, hook, name):
        found[name] = value

    reading = [(name, partial(keep, name=name)) for name in names]
    with torch.no_grad(), model.hooks(fwd_hooks=[*hooks, *reading]):
        logits = model(torch.tensor([list(ids)]))[0, -1]
    return logits, found


def together(model, pairs) -> torch.Tensor:
    """The last logits of a left-padded batch whose spans are told."""
    batch = model.batch(list(pairs["input_ids"]))
    assert (batch.attention_mask == 0).any()
    with torch.no_grad(), model.spans(list(pairs["spans"])):
        return model(batch.input_ids, attention_mask=batch.attention_mask)[:, -1]


def project_by_hand(x, mean, basis):
    """One vector: the mean, and the part along each row of the basis."""
    new = mean.clone()
    for row in basis:
        new = new + (row @ (x - mean)) * row
    return new


def by_hand(model, edit: LowRank, pair, group: int) -> torch.Tensor:
    """One prompt without padding, one head and one label after the other."""
    labels = labels_of(pair)

    def q_hook(q, hook, layer):
        q = q.clone()
        for i, head in enumerate(edit.heads):
            if head.layer == layer:
                new = project_by_hand(q[0, -1, head.head], edit.q_mean[i], edit.q_basis[i])
                q[0, -1, head.head] = new
        return q

    def kv_hook(x, hook, layer, bases):
        new = x.clone()
        for i, head in enumerate(edit.heads):
            if head.layer == layer:
                kv = head.head // group
                mean = sum(x[0, p, kv] for p in labels) / len(labels)
                for p in labels:
                    new[0, p, kv] = project_by_hand(x[0, p, kv], mean, bases[i])
        return new

    hooks = []
    for layer in range(2):
        name = f"blocks.{layer}.attn.hook_"
        hooks.append((name + "q", partial(q_hook, layer=layer)))
        hooks.append((name + "k", partial(kv_hook, layer=layer, bases=edit.k_basis)))
        hooks.append((name + "v", partial(kv_hook, layer=layer, bases=edit.v_basis)))
    return seen(model, pair["input_ids"], [], hooks)[0]


@each_family
@pytest.mark.parametrize("rank", [0, 2])
def test_a_padded_batch_is_each_prompt_s_vectors_projected_by_hand(family, rank):
    model = tiny(family)
    edit = LowRank.fit(model, FIT, HEADS, rank=2).of_rank(rank)
    with model.intervene(edit):
        found = together(model, TEST)
    expected = torch.stack([by_hand(model, edit, pair, SHARED[family]) for pair in TEST])
    assert_close(found, expected, **TOLERANCE)
    assert (found - together(model, TEST)).abs().max() > 1e-3


@each_family
def test_all_dimensions_are_the_clean_run_and_so_is_the_complement_of_none(family):
    model = tiny(family)
    clean = together(model, TEST)
    whole = LowRank.fit(model, FIT, HEADS, rank=8)
    for edit in (whole, whole.of_rank(0).others(), whole.only("")):
        with model.intervene(edit):
            assert_close(together(model, TEST), clean, **TOLERANCE)
    with model.intervene(whole.others()):
        nothing_kept = together(model, TEST)
    with model.intervene(whole.of_rank(0)):
        assert_close(together(model, TEST), nothing_kept, **TOLERANCE)


@each_family
def test_with_no_dimension_all_labels_are_alike_until_they_are_rotated(family):
    model = tiny(family)
    edit = LowRank.fit(model, FIT, HEADS, rank=0)
    names = [f"blocks.1.attn.hook_{part}" for part in "kv"]
    for pair in TEST:
        with model.intervene(edit), model.spans([pair["spans"]]):
            _, found = seen(model, pair["input_ids"], names)
        kv = 3 // SHARED[family]
        for name in names:
            at = found[name][0, labels_of(pair), kv]
            assert_close(at, at[:1].expand_as(at), **TOLERANCE)


@each_family
def test_kept_and_left_over_parts_add_up(family):
    """x - mean is what a subspace keeps of it plus what its complement keeps."""
    model, pair = tiny(family), TEST[0]
    edit = LowRank.fit(model, FIT, HEADS, rank=3)
    for part, place in (("q", [-1]), ("k", labels_of(pair)), ("v", labels_of(pair))):
        name, head = f"blocks.0.attn.hook_{part}", 1 if part == "q" else 1 // SHARED[family]
        values = []
        for one in ([], edit, edit.others(), edit.of_rank(0)):
            with model.intervene(one), model.spans([pair["spans"]]):
                values.append(seen(model, pair["input_ids"], [name])[1][name][0, place, head])
        clean, kept, left, mean = values
        assert_close(kept + left - mean, clean, **TOLERANCE)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_projected_keys_follow_the_closed_form_at_the_last_row(family):
    """z' = (z - sum A_n v_n + sum A_n e^delta_n v_n) / D, from the clean row alone."""
    model, group = tiny(family), SHARED[family]
    edit = LowRank.fit(model, FIT, ["L1H2", "L1H3"], rank=1).only("k")
    for pair in TEST:
        held, labels = {}, labels_of(pair)

        def look(attention, hook, held=held):
            held["attention"] = attention

        name = "blocks.1.attn.hook_attention"
        clean_z, edited_z = [], []
        for one, z in (([], clean_z), (edit, edited_z)):
            with model.intervene(one), model.spans([pair["spans"]]):
                _, found = seen(model, pair["input_ids"], ["blocks.1.attn.hook_z"], [(name, look)])
            z.append(found["blocks.1.attn.hook_z"][0, -1])
            held["edited" if one else "clean"] = held["attention"]
        clean, edited = held["clean"], held["edited"]
        for head in (2, 3):
            q, k, new_k, v = (
                clean.q[0, head, -1], clean.k[0, head // group], edited.k[0, head // group],
                clean.v[0, head // group],
            )  # fmt: skip
            z, divisor = clean_z[0][head].clone(), 1.0
            for p in labels:
                weight = (clean.scale * q @ k[p] - clean.lse[0, head, -1]).exp()
                gain = (clean.scale * q @ (new_k[p] - k[p])).exp()
                z = z - weight * v[p] + weight * gain * v[p]
                divisor = divisor + weight * (gain - 1)
            assert divisor > 0
            assert_close(edited_z[0][head], z / divisor, **TOLERANCE)
        for head in (0, 1):  # of another key-value head, or of its own
            assert_close(edited_z[0][head], clean_z[0][head], **TOLERANCE)


def test_evaluate_tells_where_the_labels_are_and_a_batch_is_one_by_one():
    model = tiny("llama")
    edit = LowRank.fit(model, FIT, HEADS, rank=1)
    with model.intervene(edit):
        many = interp.evaluate(model, TEST, progress=False)
        one = interp.evaluate(model, TEST, batch_size=1, progress=False)
        expected = together(model, TEST).log_softmax(-1)
    assert np.allclose(many.table["loss"], one.table["loss"], atol=1e-4)
    right = torch.tensor([pair["answers"][0] for pair in TEST])[:, None]
    assert np.allclose(many.table["loss"], -expected.gather(1, right)[:, 0], atol=1e-4)


def test_right_padding_and_longer_answers_leave_the_prompt_s_last_token_where_it_is():
    model = tiny("llama")
    edit = LowRank.fit(model, FIT, HEADS, rank=1)
    lists, spans = list(TEST["input_ids"]), list(TEST["spans"])
    width = max(map(len, lists)) + 2
    ids = torch.tensor([[*tokens, 50, 51, *[0] * (width - len(tokens) - 2)] for tokens in lists])
    mask = torch.tensor([[1] * (len(t) + 2) + [0] * (width - len(t) - 2) for t in lists])
    with model.intervene(edit):
        with torch.no_grad(), model.spans(spans, [len(tokens) for tokens in lists]):
            logits = model(ids, attention_mask=mask)
        expected = together(model, TEST)
    found = torch.stack([logits[row, len(tokens) - 1] for row, tokens in enumerate(lists)])
    assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("when", ["prompt", "generated", "both"])
def test_generating_with_the_cache_is_as_without_it_where_the_prompt_is_known(when):
    model = tiny("gpt2")
    edit = LowRank.fit(
        model, [words(ids) for ids in random_ids(9, 8)], HEADS, 1, at=(1, 2, 4), when=when
    )
    written = []
    for cache in (True, False):
        with model.intervene(edit):
            out = model.generate(
                torch.tensor(random_ids(9, seed=4)), max_new_tokens=6, do_sample=False,
                verbose=False, use_past_kv_cache=cache, stop_at_eos=False, return_type="tokens",
            )  # fmt: skip
        written.append(out.tolist())
    assert written[0] == written[1]


# The fit


def vectors(model, part: str, layer: int, head: int) -> np.ndarray:
    """[prompt, d_head] of q at the end, [prompt, label, d_head] of k and v."""
    rows, name = [], f"blocks.{layer}.attn.hook_{part}"
    for pair in FIT:
        value = seen(model, pair["input_ids"], [name])[1][name][0, :, head]
        rows.append(value[-1] if part == "q" else value[labels_of(pair)])
    return torch.stack(rows).double().numpy()


def spread(x: np.ndarray, rank: int) -> np.ndarray:
    """Projection onto the first eigenvectors of the samples' second moment."""
    _, basis = np.linalg.eigh(x.T @ x)
    kept = basis[:, ::-1][:, :rank]
    return kept @ kept.T


@pytest.mark.parametrize("class_means", [False, True])
def test_the_subspaces_are_the_largest_spread_around_the_means(class_means):
    model = tiny("llama")
    # the last token is always the same one: in layer 0 its q has no spread
    heads = ["L1H1", "L1H3"]
    edit = LowRank.fit(model, FIT, heads, rank=3, class_means=class_means, batch_size=5)
    right = np.array([pair["choices"].index(pair["answer"]) for pair in FIT])
    for i, head in enumerate(edit.heads):
        q = vectors(model, "q", head.layer, head.head)
        assert np.allclose(edit.q_mean[i], q.mean(0), atol=1e-4)
        x = {"q": q - q.mean(0)}
        for part in "kv":
            value = vectors(model, part, head.layer, head.head // 2)
            x[part] = value - value.mean(1, keepdims=True)
        if class_means:
            x["q"] = np.stack([x["q"][right == c].mean(0) for c in range(4)])
            x |= {part: x[part].mean(0) for part in "kv"}
        for part in "qkv":
            basis = getattr(edit, f"{part}_basis")[i].double().numpy()
            expected = spread(x[part].reshape(-1, 8), 3)
            assert np.allclose(basis.T @ basis, expected, atol=1e-4), part


def test_class_means_span_three_dimensions_and_no_more():
    model = tiny("gpt2")
    with pytest.raises(InterventionError, match="rank=4: from 0 to 3"):
        LowRank.fit(model, FIT, HEADS, rank=4, class_means=True)


def test_shuffled_options_give_other_subspaces_and_the_seed_decides():
    model = tiny("gpt2")
    fit = partial(LowRank.fit, model, FIT, HEADS, class_means=True)
    assert fit(permute=1) == fit(permute=1)
    bases = [fit(), fit(permute=1), fit(permute=2)]
    for part in "qkv":
        a, b, c = (getattr(edit, f"{part}_basis") for edit in bases)
        overlap = [torch.linalg.matrix_norm(x @ y.transpose(1, 2)) for x, y in ((a, b), (b, c))]
        assert all((o < 2.99**0.5).all() for o in overlap), part


def test_random_subspaces_are_orthonormal_and_alike_where_keys_are_shared():
    model = tiny("llama")
    edit = LowRank.fit(model, FIT, HEADS, rank=3)
    drawn = edit.random(seed=1)
    assert drawn == edit.random(seed=1) != edit.random(seed=2)
    for basis in (drawn.q_basis, drawn.k_basis, drawn.v_basis):
        assert_close(basis @ basis.transpose(1, 2), torch.eye(3).expand(4, 3, 3), **TOLERANCE)
    first, second = drawn.heads.index(interp.Head(1, 2)), drawn.heads.index(interp.Head(1, 3))
    assert torch.equal(drawn.k_basis[first], drawn.k_basis[second])
    assert not torch.allclose(drawn.q_basis[first], drawn.q_basis[second])


def test_heads_bring_their_subspaces_along_when_they_are_sorted():
    model = tiny("llama")
    sorted_first = LowRank.fit(model, FIT, sorted(HEADS), rank=2)
    order = [list(sorted_first.heads).index(interp.Head.parse(h)) for h in HEADS]
    again = LowRank(
        HEADS, sorted_first.q_mean[order], sorted_first.q_basis[order],
        sorted_first.k_basis[order], sorted_first.v_basis[order],
    )  # fmt: skip
    assert again == sorted_first


def test_saving_keeps_every_variant(tmp_path):
    model = tiny("llama")
    edit = LowRank.fit(model, FIT, HEADS, rank=2)
    variants = [
        edit,
        edit.of_rank(0),
        edit.others(),
        edit.only("q"),
        edit.only("kv"),
        edit.random(3),
    ]
    for n, variant in enumerate(variants):
        variant.save_pretrained(tmp_path / str(n))
        loaded = interp.load_intervention(tmp_path / str(n))
        assert loaded == variant and isinstance(loaded, LowRank)
        with model.intervene(variant):
            expected = together(model, TEST)
        with model.intervene(loaded):
            assert torch.equal(together(model, TEST), expected)


def test_parts_are_edited_alone():
    model = tiny("llama")
    edit = LowRank.fit(model, FIT, HEADS, rank=1)
    for part in "qkv":
        names = [name for name, _ in edit.only(part).hooks(model)]
        assert names == [f"blocks.{layer}.attn.hook_{part}" for layer in range(2)]
        alone = LowRank.fit(model, FIT, HEADS, rank=1, parts=part)
        assert alone == edit.only(part)


def test_it_says_what_it_keeps():
    edit = LowRank.fit(tiny("llama"), FIT, HEADS, rank=2)
    assert "4 heads: L0H0" in repr(edit) and "q to 2, k to 2, v to 2 dimensions" in repr(edit)
    assert "all but these" in repr(edit.others()) and "4 places" in repr(edit)


# What users get wrong


def test_prompts_without_labels_are_named():
    model = tiny("llama")
    with pytest.raises(InterventionError, match="no span 'label_1'; it has text"):
        LowRank.fit(model, ["w3 w4 w5 w6 w7"], HEADS)
    edit = LowRank.fit(model, FIT, HEADS)
    ids = torch.tensor([FIT[0]["input_ids"]])
    with (
        pytest.raises(InterventionError, match="nobody told where 'label_1'"),
        model.intervene(edit),
    ):
        model(ids)


def test_a_prompt_that_is_shorter_than_its_labels_is_named():
    edit = LowRank.fit(tiny("llama"), FIT, HEADS, rank=1, at=(0, 1, 5, 7))
    model = tiny("llama")
    with pytest.raises(InterventionError, match="give prompts whole"), model.intervene(edit):
        model(torch.tensor(random_ids(6)))


def test_ranks_and_parts_that_cannot_be_are_named():
    model = tiny("llama")
    with pytest.raises(InterventionError, match="rank=9: from 0 to 8"):
        LowRank.fit(model, FIT, HEADS, rank=9)
    few = Dataset.from_list([FIT[0], FIT[1]])
    with pytest.raises(InterventionError, match="rank=2: from 0 to 1 for q.*more prompts"):
        LowRank.fit(model, few, HEADS, rank=2)
    with pytest.raises(InterventionError, match="parts='qz'"):
        LowRank.fit(model, FIT, HEADS, parts="qz")
    with pytest.raises(InterventionError, match="permute: shuffles options"):
        LowRank.fit(model, FIT, HEADS, permute=1)
    edit = LowRank.fit(model, FIT, HEADS, rank=2)
    with pytest.raises(InterventionError, match="rank=3: it holds 0 to 2"):
        edit.of_rank(3)


def test_numbers_that_are_no_subspaces_are_named():
    with unchecked():
        with pytest.raises(InterventionError, match="not orthonormal"):
            LowRank(["L0H0"], k_basis=torch.ones(1, 2, 8))
        with pytest.raises(InterventionError, match=r"k_basis: \[2, 2, 8\].*1 heads"):
            LowRank(["L0H0"], k_basis=torch.ones(2, 2, 8))
        with pytest.raises(InterventionError, match="NaN"):
            LowRank(["L0H0"], k_basis=torch.full((1, 2, 8), torch.nan))
        with pytest.raises(InterventionError, match="give both or neither"):
            LowRank(["L0H0"], q_basis=torch.eye(8)[None, :2])
        with pytest.raises(InterventionError, match="two or more"):
            LowRank(["L0H0"], at=("label_1",))
        with pytest.raises(InterventionError, match="when='never'"):
            LowRank(["L0H0"], when="never")
    narrow = LowRank(["L0H0"], k_basis=torch.eye(4)[None, :2])
    with (
        pytest.raises(InterventionError, match="heads of width 4.*has 8"),
        tiny("llama").intervene(narrow),
    ):
        raise AssertionError("the block was entered")
