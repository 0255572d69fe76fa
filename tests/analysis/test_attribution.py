"""Attribution patching against TransformerLens, exact patches, autograd, and its definition."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.tools.analysis import attribution_patching as tl

from interp.analysis.paired import PairError, metric_of, pair_batch
from interp.analysis.patching.activation import Patching, activation_patching
from interp.analysis.patching.attribution import attribution_patching, compare_estimate
from interp.errors import UserError
from interp.model.gradients import ENTRY, GradientError, trace
from interp.model.transparent import put_in
from tests.analysis.random_pairs import random_pairs
from tests.tiny import fresh, tiny, unchecked

QUIET = {"progress": False}
BOTH = pytest.mark.parametrize("direction", ["denoise", "noise"])


def changes(patching: Patching) -> np.ndarray:
    """[pair cell], from the base run."""
    denoised = patching.metadata["direction"] == "denoise"
    return patching.values - (patching.corrupted if denoised else patching.clean)[:, None]


def by_name(patching: Patching) -> dict:
    """Mean change of each cell."""
    return dict(zip(patching.cells.itertuples(index=False, name=None), changes(patching).mean(0)))


def of_pair(pairs, metric="logit_diff"):
    """TransformerLens wants a function of one prompt's logits; all pairs must have one answer."""
    right, wrong = pairs["answers"][0]
    return lambda logits: logits[0, -1, right] - logits[0, -1, wrong]


def same_answers(pairs):
    return pairs.map(lambda row: {"answers": [7, 12]})


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_heads_mlps_and_embedding_have_the_scores_that_transformerlens_gives(family):
    model, pairs = tiny(family), same_answers(random_pairs(8, 8, 8))
    clean = torch.tensor(list(pairs["clean_input_ids"]))
    corrupted = torch.tensor(list(pairs["corrupted_input_ids"]))
    theirs = tl.attribution_patch(model, clean, corrupted, of_pair(pairs)).node_scores
    ours = {
        site: by_name(attribution_patching(model, pairs, site, by, batch_size=2, **QUIET))
        for site, by in (
            ("z", ("layer", "head", "position")),
            ("mlp_out", ("layer", "position")),
            ("resid_pre", ("layer", "position")),
        )
    }
    for node, score in theirs.items():
        where = {
            "attn_head_out": ("z", (node.layer, node.head, node.position)),
            "mlp_out": ("mlp_out", (node.layer, node.position)),
            "embed": ("resid_pre", (0, node.position)),
        }[node.kind]
        assert ours[where[0]][where[1]] == pytest.approx(score, abs=1e-5), node


# Where the metric is affine in what is patched, the estimate is exact.


def linear_after_attention(family):
    """Behind the last attention there is only the unembedding: no norm, and an MLP that adds 0."""
    model = fresh(family)
    put_in(model.ln_final, lambda x: x)
    if family == "gemma2":
        after = model.blocks[-1].ln1_post
        put_in(after, after.hook_out)
        model.original_model.config.final_logit_softcapping = None
    with torch.no_grad():
        for parameter in model.blocks[-1].mlp.out.original_component.parameters():
            parameter.zero_()
    return model


EXACT = [
    ("z", {}), ("v", {}), ("pattern", {}), ("attn_out", {"by": ["layer"]}),
    ("resid_post", {"by": ["layer"]}), ("q", {"qk_fix": True}), ("k", {"qk_fix": True}),
    ("q", {"qk_fix": True, "by": ["head", "position"]}), ("z", {"by": ["position", "layer"]}),
    ("v", {"by": ["head", "position"]}), ("resid_mid", {"by": ["position"]}),
]  # fmt: skip


@BOTH
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2"])
def test_the_estimate_is_exact_where_the_metric_is_affine(family, direction):
    model, pairs = linear_after_attention(family), random_pairs(7, 7)
    for site, options in EXACT:
        options = {"direction": direction, "layers": [1], **options, **QUIET}
        estimate = attribution_patching(model, pairs, site, **options)
        options.pop("qk_fix", None)
        exact = activation_patching(model, pairs, site, **options)
        assert np.abs(changes(exact)).max() > 1e-3, site
        np.testing.assert_allclose(estimate.values, exact.values, atol=4e-5, err_msg=site)
        pd.testing.assert_frame_equal(estimate.cells, exact.cells)


def test_without_the_fix_a_moved_query_is_not_exact():
    model, pairs = linear_after_attention("llama"), random_pairs(7, 7, 7)
    exact = activation_patching(model, pairs, "q", layers=[1], **QUIET)
    plain = attribution_patching(model, pairs, "q", layers=[1], **QUIET)
    assert np.abs(plain.values - exact.values).max() > 1e-3


# The definition, by other ways.


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mistral"])
@pytest.mark.parametrize("site", ["q", "k"])
def test_the_fix_is_the_change_of_the_pattern_times_its_gradient(family, site):
    model, pairs = tiny(family), random_pairs(8, 5)
    batch = pair_batch(model, pairs)
    seen = {}

    def looks(side, kept):
        def look(value, hook):
            kept[hook.name] = value

        names = [f"blocks.{layer}.attn.hook_attention" for layer in (0, 1)]
        with model.hooks(fwd_hooks=[(name, look) for name in names]):
            model.run(side.input_ids, side.attention_mask)

    looks(batch.corrupted, seen)
    looks(batch.clean, source := {})
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in (0, 1)]
    metric = metric_of("logit_diff")[1]
    clean_logits = model.last_logits(batch.clean.input_ids, batch.attention_mask, 1)[:, -1]
    traced = trace(
        model,
        batch.corrupted.input_ids,
        batch.attention_mask,
        names,
        lambda logits: metric(logits, batch.answers(clean_logits)),
    )
    found = by_name(attribution_patching(model, pairs, site, qk_fix=True, **QUIET))
    real = batch.attention_mask.bool()
    for layer in (0, 1):
        name = f"blocks.{layer}.attn.hook_attention"
        base, other = seen[name], source[name]
        n_kv, group = base.k.shape[1], base.n_heads // base.k.shape[1]
        for cell in range(n_kv if site == "k" else base.n_heads):
            patched = getattr(base, site).clone()
            patched[:, cell] = getattr(other, site)[:, cell]
            change = replace(base, **{site: patched}).pattern() - base.pattern()
            change = change * real[:, None, :, None]
            expected = (change * traced.gradients[names[layer]]).sum((1, 2, 3)).mean()
            own = range(cell * group, (cell + 1) * group) if site == "k" else [cell]
            assert change[:, [h for h in range(base.n_heads) if h not in own]].abs().max() == 0
            assert found[layer, cell] == pytest.approx(float(expected), abs=1e-5)
    assert max(abs(value) for value in found.values()) > 1e-3


@BOTH
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("site", ["k", "v", "q"])
def test_grouped_heads_are_those_of_autograd(family, site, direction):
    model, pairs = tiny(family), random_pairs(6)
    batch = pair_batch(model, pairs)
    sides = {"clean": batch.clean.input_ids, "corrupted": batch.corrupted.input_ids}
    base, source = ("corrupted", "clean") if direction == "denoise" else ("clean", "corrupted")
    name = f"blocks.0.attn.hook_{site}"
    values = {}
    for side, ids in sides.items():
        _, cache = model.run_with_cache(ids, names_filter=[name])
        values[side] = cache[name].detach()
    change = values[source] - values[base]
    size = torch.zeros(change.shape[2], requires_grad=True)  # one number for each head

    def shift(value, hook):
        return value + size[None, None, :, None] * change

    with model.hooks(fwd_hooks=[(name, shift)]):
        logits = model(sides[base])[0, -1]
    right, wrong = pairs["answers"][0]
    (expected,) = torch.autograd.grad(logits[right] - logits[wrong], size)
    found = attribution_patching(model, pairs, site, direction=direction, layers=[0], **QUIET)
    np.testing.assert_allclose(changes(found)[0], expected.numpy(), atol=1e-5)


@BOTH
def test_steps_are_midpoints_of_the_path_between_both_prompts(direction):
    model, pairs = tiny("llama"), random_pairs(7, 7)
    batch = pair_batch(model, pairs)
    base, source = batch.corrupted, batch.clean
    if direction == "noise":
        base, source = source, base
    names = [ENTRY, "blocks.1.attn.hook_z"]
    _, first = model.run_with_cache(base.input_ids, names_filter=names)
    _, last = model.run_with_cache(source.input_ids, names_filter=names)
    right, wrong = torch.tensor(list(pairs["answers"])).unbind(1)
    rows, gradient = torch.arange(2), 0
    for share in (1 / 6, 3 / 6, 5 / 6):
        z = {}

        def enter(value, hook, share=share):
            return (1 - share) * first[ENTRY] + share * last[ENTRY]

        def hold(value, hook, z=z):
            z["z"] = value.detach().requires_grad_()
            return z["z"]

        with model.hooks(fwd_hooks=[(ENTRY, enter), (names[1], hold)]):
            logits = model(base.input_ids)[:, -1]
        metric = (logits[rows, right] - logits[rows, wrong]).sum()
        gradient = gradient + torch.autograd.grad(metric, z["z"])[0] / 3
    expected = ((last[names[1]] - first[names[1]]) * gradient).sum((1, 3))
    found = attribution_patching(
        model, pairs, "z", direction=direction, ig_steps=3, layers=[1], **QUIET
    )
    np.testing.assert_allclose(changes(found), expected.detach().numpy(), atol=1e-5)


@BOTH
def test_along_the_path_the_inputs_share_the_whole_effect(direction):
    model, pairs = tiny("gpt2"), random_pairs(7, 7)
    found = attribution_patching(
        model, pairs, "resid_pre", ["position"], layers=[0], direction=direction,
        ig_steps=40, **QUIET,
    )  # fmt: skip
    effect = found.clean - found.corrupted
    total = changes(found).sum(1) * (1 if direction == "denoise" else -1)
    np.testing.assert_allclose(total, effect, rtol=1e-3, atol=1e-4)


# What a user meets.


def test_prompts_of_several_lengths_in_one_batch_are_those_alone():
    model, pairs = tiny("llama"), random_pairs(9, 6, 4)
    for site, options in (("z", {}), ("k", {"qk_fix": True}), ("pattern", {"ig_steps": 2})):
        together = attribution_patching(model, pairs, site, batch_size=3, **options, **QUIET)
        alone = attribution_patching(model, pairs, site, batch_size=1, **options, **QUIET)
        np.testing.assert_allclose(together.values, alone.values, atol=1e-5)
        assert np.abs(changes(alone)).max() > 1e-3


def test_named_positions_are_found_under_padding():
    model, pairs = tiny("llama"), random_pairs(9, 6)
    by = ("position", "layer", "head")
    together = attribution_patching(model, pairs, "v", by, positions=["last", "first"], **QUIET)
    for n, size in enumerate((9, 6)):
        alone = attribution_patching(
            model, pairs.select([n]), "v", by, positions=[size - 1, 0], **QUIET
        )
        np.testing.assert_allclose(together.values[n], alone.values[0], atol=1e-5)
    assert together.cells["position"].tolist()[:8] == ["last"] * 4 + ["last"] * 0 + ["first"] * 4


def test_cells_of_many_places_are_sums_of_their_cells():
    model, pairs = tiny("qwen3"), random_pairs(6, 6)
    fine = attribution_patching(model, pairs, "z", ("layer", "position", "head"), **QUIET)
    table = fine.cells.assign(change=changes(fine)[1])
    for by in (["head"], ["position"], ["head", "layer"], ["position", "head"]):
        found = by_name(attribution_patching(model, pairs.select([1]), "z", by, **QUIET))
        expected = table.groupby(by)["change"].sum()
        for cell, value in expected.items():
            key = cell if isinstance(cell, tuple) else (cell,)
            assert found[key] == pytest.approx(value, abs=1e-5)


def test_the_result_is_that_of_a_sweep():
    model, pairs = tiny("llama"), random_pairs(7, 7, 7)
    found = attribution_patching(model, pairs, **QUIET)
    exact = activation_patching(model, pairs, **QUIET)
    np.testing.assert_allclose(found.clean, exact.clean, atol=1e-5)
    np.testing.assert_allclose(found.corrupted, exact.corrupted, atol=1e-5)
    assert list(found.table) == list(exact.table)
    assert len(found.heads) == 8
    about = found.metadata
    assert about["analysis"] == "attribution_patching"
    assert about["gradient"] == "in the corrupted run"
    assert about["head_kind"] == "query"


def test_a_prompt_paired_with_itself_moves_nothing():
    pairs = random_pairs(6, 6, changed=0)
    found = attribution_patching(tiny("llama"), pairs, "k", ("layer", "head", "position"), **QUIET)
    assert np.abs(changes(found)).max() < 1e-6


def test_it_works_inside_no_grad_and_says_where_it_does_not():
    model, pairs = tiny("llama"), random_pairs(5)
    with torch.no_grad():
        inside = attribution_patching(model, pairs, ig_steps=2, **QUIET)
    outside = attribution_patching(model, pairs, ig_steps=2, **QUIET)
    np.testing.assert_array_equal(inside.values, outside.values)
    with torch.inference_mode(), pytest.raises(GradientError, match="inference_mode"):
        attribution_patching(model, pairs, **QUIET)
    training = fresh("llama")
    training.original_model.train()
    with pytest.raises(GradientError, match=r"model\.eval"):
        attribution_patching(training, pairs, **QUIET)


def rank(logits, answers):
    return (logits > logits.gather(1, answers.right[:, None])).sum(1).float()


@pytest.mark.parametrize(
    "site, options, words",
    [
        ("z", {"qk_fix": True}, "site='q' or 'k'"),
        ("k", {"qk_fix": True, "by": ("layer", "position")}, "leave 'position' out"),
        ("z", {"ig_steps": 0}, "ig_steps=0: at least 1"),
        ("z", {"direction": "up"}, "denoise, noise"),
        ("z", {"metric": "kl", "direction": "noise"}, "vanishes in the clean run"),
        ("z", {"metric": rank}, "no gradient"),
        ("zz", {}, "site='zz'"),
    ],
)
def test_what_cannot_be_done_is_said(site, options, words):
    with unchecked(), pytest.raises(UserError, match=words):
        attribution_patching(tiny("llama"), random_pairs(5), site, **options, **QUIET)


def test_what_are_no_pairs_is_said():
    for pairs, words in (
        (random_pairs(5).select([]), "no rows"),
        (random_pairs(5).remove_columns("answers"), "no column answers"),
    ):
        with pytest.raises(PairError, match=words):
            attribution_patching(tiny("llama"), pairs, **QUIET)


def test_heads_that_are_normed_together_have_no_fix():
    with pytest.raises(PairError, match="norms all heads' q together"):
        attribution_patching(tiny("olmo2"), random_pairs(5), "q", qk_fix=True, **QUIET)


@BOTH
def test_kl_is_to_the_clean_run_and_has_a_gradient_along_the_path(direction):
    model, pairs = tiny("llama"), random_pairs(6, 6)
    options = {"metric": "kl", "direction": direction, **QUIET}
    found = attribution_patching(model, pairs, ig_steps=4, **options)
    exact = activation_patching(model, pairs, **options)
    np.testing.assert_allclose(found.clean, 0, atol=1e-5)
    np.testing.assert_allclose(found.corrupted, exact.corrupted, atol=1e-5)
    assert (found.corrupted < -1e-3).all()
    assert (np.abs(changes(found).mean(0)) > 1e-3).any()


# The estimate against the exact sweep.


def patching(cells, values, **about):
    about = {"site": "z", "metric": "logit_diff", "direction": "denoise", "task": 1} | about
    frame = pd.DataFrame(cells, columns=["layer", "head"])
    values = np.array(values, dtype=float)
    return Patching(frame, values, np.ones(len(values)), np.zeros(len(values)), about)


def test_a_comparison_ranks_and_recalls():
    cells = [(0, 0), (0, 1), (1, 0), (1, 1)]
    estimate = patching(cells, [[0.1, -0.6, 0.5, 0.2], [0.1, -0.6, 0.5, 0.4]])
    exact = patching(cells[::-1], [[0.4, -0.1, -0.9, 0.0], [0.4, -0.1, -0.9, 0.0]])
    found = compare_estimate(estimate, exact)
    assert found.table["estimate"].tolist() == pytest.approx([0.1, -0.6, 0.5, 0.3])
    assert found.table["exact"].tolist() == pytest.approx([0.0, -0.9, -0.1, 0.4])
    assert found.spearman == pytest.approx(0.4)  # ranks 2 1 4 3 and 3 1 2 4
    assert [found.top_recall(k) for k in (1, 2, 3, 4)] == [1, 0.5, 1, 1]
    assert found.plot(title="t").data[-1].text[1] == "L0H1"
    with pytest.raises(PairError, match="k=5: there are 4 cells"):
        found.top_recall(5)


def test_a_comparison_of_different_things_is_refused():
    one = patching([(0, 0), (0, 1)], [[0.1, 0.2]])
    with pytest.raises(PairError, match="direction: denoise in the estimate and noise"):
        compare_estimate(one, patching([(0, 0), (0, 1)], [[0.1, 0.2]], direction="noise"))
    with pytest.raises(PairError, match="only 1 are the same"):
        compare_estimate(one, patching([(0, 0), (1, 1)], [[0.1, 0.2]]))
