"""Every cell of a sweep is what a run of the whole model says, by TransformerLens or by hand."""

from itertools import product

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_lens import patching as tl

import interp
from interp.analysis.paired import METRICS, Answers, PairError, pair_batch
from interp.analysis.patching.activation import activation_patching
from interp.analysis.patching.noise import Noise, noisy_columns
from interp.model.hooked import HookError
from interp.model.replay import ReplayError
from tests.tiny import fresh, random_ids, tiny, unchecked, words

FAMILIES = ["gpt2", "llama", "gpt_neox", "qwen3", "gemma2"]


def pairs_of(*lengths: int, seed: int = 0, shared: int = 0) -> Dataset:
    """Random pairs; the first `shared` tokens of a pair are the same in both."""
    clean, corrupted = random_ids(*lengths, seed=seed), random_ids(*lengths, seed=seed + 100)
    corrupted = [c[:shared] + d[shared:] for c, d in zip(clean, corrupted)]
    n = len(lengths)
    return Dataset.from_dict(
        {
            "text": [words(ids) for ids in clean],
            "clean_input_ids": clean,
            "corrupted_input_ids": corrupted,
            "answers": [[5 + i, 20 + i] for i in range(n)],
            "positions": [{"middle": k // 2, "end": k - 1} for k in lengths],
        }
    )


def sweep(model, pairs, *args, **options):
    return activation_patching(model, pairs, *args, progress=False, **options)


def values(patching, *shape) -> torch.Tensor:
    return torch.tensor(patching.table["value"].to_numpy(), dtype=torch.float32).reshape(shape)


# Against TransformerLens


def by_transformer_lens(name: str, model, pairs: Dataset) -> torch.Tensor:
    answers = torch.tensor(list(pairs["answers"]))

    def metric(logits):
        right, wrong = logits[:, -1].gather(1, answers).unbind(1)
        return (right - wrong).mean()

    _, cache = model.run_with_cache(torch.tensor(list(pairs["clean_input_ids"])))
    corrupted = torch.tensor(list(pairs["corrupted_input_ids"]))
    return getattr(tl, f"get_act_patch_{name}")(model, corrupted, cache, metric)


CASES = {
    "resid_pre": ("resid_pre", ("layer", "position")),
    "resid_mid": ("resid_mid", ("layer", "position")),
    "attn_out": ("attn_out", ("layer", "position")),
    "mlp_out": ("mlp_out", ("layer", "position")),
    **{
        f"attn_head_{name}_{kind}": (site, by)
        for (name, site), (kind, by) in product(
            {"out": "z", "q": "q", "k": "k", "v": "v"}.items(),
            {"all_pos": ("layer", "head"), "by_pos": ("layer", "position", "head")}.items(),
        )
    },
    "attn_head_pattern_all_pos": ("pattern", ("layer", "head")),
    "attn_head_pattern_by_pos": ("pattern", ("layer", "head", "position")),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_a_sweep_is_transformer_lens_sweep(family, name):
    if family == "gpt_neox" and name == "resid_mid":
        pytest.skip("its blocks have no middle")
    site, by = CASES[name]
    for shared in (0, 4):
        pairs = pairs_of(8, 8, 8, shared=shared)
        expected = by_transformer_lens(name, tiny(family), pairs)
        found = values(sweep(tiny(family), pairs, site, by), *expected.shape)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert expected.max() - expected.min() > 0.02  # the effects are of a size to see


# Against the whole model run by hand, once a cell


def by_hand(model, pairs: Dataset, name: str, change, base: str) -> torch.Tensor:
    """The metric of each pair, alone and unpadded, with `change(value, source)` at one hook."""
    found = []
    for row in pairs:
        sides = {s: torch.tensor([row[f"{s}_input_ids"]]) for s in ("clean", "corrupted")}
        other = "clean" if base == "corrupted" else "corrupted"
        _, cache = model.run_with_cache(sides[other])
        source = cache[name]

        def hook_fn(value, hook, source=source):
            return change(value.clone(), source)

        with torch.no_grad(), model.hooks(fwd_hooks=[(name, hook_fn)]):
            logits = model(sides[base])[0, -1]
        right, wrong = row["answers"]
        found.append(logits[right] - logits[wrong])
    return torch.stack(found)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6)
@given(
    lengths=st.lists(st.integers(4, 9), min_size=1, max_size=3),
    site=st.sampled_from(["z", "q", "k", "v"]),
    layer=st.integers(0, 1), head=st.integers(0, 1), shared=st.integers(0, 3),
    position=st.sampled_from(["middle", "end", None]), seed=st.integers(0, 9),
)  # fmt: skip
def test_a_cell_of_mixed_prompts_is_a_run_by_hand(
    family, direction, lengths, site, layer, head, shared, position, seed
):
    model, pairs = tiny(family), pairs_of(*lengths, seed=seed, shared=shared)
    by = ("layer", "head") if position is None else ("layer", "head", "position")
    options = {} if position is None else {"positions": [position]}
    found = sweep(model, pairs, site, by, direction=direction, **options)
    cells = found.cells
    cell = cells.index[(cells["layer"] == layer) & (cells["head"] == head)][0]
    base = "corrupted" if direction == "denoise" else "clean"

    def change(value, source):
        n = value.shape[1]
        where = {"middle": n // 2, "end": n - 1, None: slice(None)}[position]
        value[:, where, head] = source[:, where, head]
        return value

    expected = by_hand(model, pairs, f"blocks.{layer}.attn.hook_{site}", change, base)
    np.testing.assert_allclose(found.values[:, cell], expected.numpy(), atol=2e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_window_patches_adjacent_layers_together(family):
    model, pairs = tiny(family), pairs_of(7, 7)
    wide = sweep(model, pairs, "mlp_out", "layer", window=2).table
    # both layers from the first cell; the second one's window is cut at the end
    alone = sweep(model, pairs, "mlp_out", ("layer",)).table
    together = sweep(model, pairs, "mlp_out", "position").table  # all layers, each position
    assert wide["value"][1] == pytest.approx(alone["value"][1], abs=1e-5)
    assert abs(wide["value"][0] - alone["value"][0]) > 1e-3
    assert len(together) == 7


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_ablations_are_special_cases(how):
    model, pairs = tiny("llama"), pairs_of(7, 7, 7)
    found = sweep(model, pairs, "z", direction="noise", source=how)
    clean = [torch.tensor([ids]) for ids in pairs["clean_input_ids"]]
    caches = [model.run_with_cache(ids)[1]["blocks.1.attn.hook_z"] for ids in clean]
    mean = torch.cat(caches, dim=1).mean(1)[0, 2]
    for row in range(3):
        new = {"zero": torch.zeros(8), "mean": mean, "resample": caches[row - 1][0, :, 2]}[how]

        def replace(z, hook, new=new):
            z = z.clone()
            z[:, :, 2] = new
            return z

        with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", replace)]):
            logits = model(clean[row])[0, -1]
        expected = float(logits[5 + row] - logits[20 + row])
        assert found.values[row, 6] == pytest.approx(expected, abs=2e-5)


def test_noise_corrupts_the_embedding_of_the_named_tokens_alone():
    model, pairs = tiny("gpt2"), pairs_of(8, 6)
    noise = Noise("middle", scale=2.0, seed=3)
    found = sweep(model, pairs, "resid_pre", ("layer", "position"), corruption=noise,
                  positions=["middle", "end"])  # fmt: skip
    again = sweep(model, pairs.select([1]), "resid_pre", ("layer", "position"), corruption=noise,
                  positions=["middle", "end"])  # fmt: skip
    np.testing.assert_allclose(found.values[1:], again.values, atol=1e-5)  # whatever the batch
    assert np.abs(found.clean - found.corrupted).max() > 0.01
    # the clean embedding at that token is all it takes
    np.testing.assert_allclose(found.values[:, 0], found.clean, atol=1e-5)
    np.testing.assert_allclose(found.values[:, 1], found.corrupted, atol=1e-5)
    where = noisy_columns(pair_batch(model, pairs), noise)
    assert where.tolist() == [[c == 4 for c in range(8)], [c == 2 + 3 for c in range(8)]]


# What must hold


@pytest.mark.parametrize("family", FAMILIES)
def test_invariants(family):
    model, pairs = tiny(family), pairs_of(8, 8, 8)
    same = pairs.remove_columns("corrupted_input_ids")
    same = same.add_column("corrupted_input_ids", list(pairs["clean_input_ids"]))
    nothing = sweep(model, same, "z")
    np.testing.assert_array_equal(nothing.values, np.repeat(nothing.corrupted[:, None], 8, axis=1))
    first = sweep(model, pairs, "resid_pre", "layer", layers=[0])
    np.testing.assert_allclose(first.values[:, 0], first.clean, atol=2e-5)
    last = sweep(model, pairs, "resid_post", ("layer", "position"), layers=[1], positions=[-1])
    np.testing.assert_allclose(last.values[:, 0], last.clean, atol=2e-5)
    if family != "gpt_neox":
        middle = sweep(model, pairs, "resid_mid", ("layer", "position"), layers=[1], positions=[-1])
        np.testing.assert_allclose(middle.values[:, 0], middle.clean, atol=2e-5)
    swapped = pairs.rename_columns(
        {"clean_input_ids": "corrupted_input_ids", "corrupted_input_ids": "clean_input_ids"}
    )
    there, back = sweep(model, pairs, "z"), sweep(model, swapped, "z", direction="noise")
    np.testing.assert_allclose(there.values, back.values, atol=1e-6)


def test_all_heads_of_a_layer_are_its_attention_output():
    model, pairs = tiny("llama"), pairs_of(8, 8)
    z, out = (sweep(model, pairs, site, "layer").values for site in ("z", "attn_out"))
    np.testing.assert_allclose(z, out, atol=1e-5)


def test_the_size_of_the_batch_is_no_matter():
    model, pairs = tiny("llama"), pairs_of(8, 5, 7, 8)
    whole = sweep(model, pairs, "z", ("layer", "head"))
    for size in (1, 3, 9):
        part = sweep(model, pairs, "z", ("layer", "head"), batch_size=size)
        np.testing.assert_allclose(part.values, whole.values, atol=1e-5)


def test_encoders_are_patched_from_the_first_position_on():
    model, pairs = tiny("bert"), pairs_of(8, 8)
    found = sweep(model, pairs, "resid_pre", ("layer", "position"), layers=[1])
    assert (np.abs(found.values - found.corrupted[:, None]) > 1e-4).all()


# The result


def test_the_table_says_what_was_measured():
    model, pairs = tiny("gpt2"), pairs_of(8, 8, 8, 8)
    found = sweep(model, pairs)
    table = found.table
    assert list(table) == ["layer", "head", "value", "effect", "moved", "low", "high", "n"]
    effect = (found.values.mean(0) - found.corrupted.mean()) / found.gap
    np.testing.assert_allclose(table["effect"], effect)
    np.testing.assert_allclose(table["moved"], effect)
    assert (table["low"] <= table["effect"]).all() and (table["effect"] <= table["high"]).all()
    assert (table["n"] == 4).all() and len(found.per_prompt) == 32
    scores = found.heads
    np.testing.assert_allclose(scores.matrix.reshape(-1), effect)
    assert scores.metadata["site"] == "z" and scores.samples.shape == (4, 8)
    noised = sweep(model, pairs, direction="noise")
    np.testing.assert_allclose(noised.table["moved"], 1 - noised.table["effect"])
    np.testing.assert_allclose(noised.heads.matrix.reshape(-1), noised.table["moved"])
    assert "z, noise, logit_diff" in repr(noised)


def test_metrics_by_definition():
    logits = torch.randn(3, 9)
    answers = Answers(torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]), torch.randn(3, 9))
    p, q = logits.softmax(-1), answers.clean_logits.softmax(-1)
    for row in range(3):
        right, wrong = row + 1, row + 4
        expected = {
            "logit_diff": logits[row, right] - logits[row, wrong],
            "prob": p[row, right],
            "log_prob": p[row, right].log(),
            "kl": -(q[row] * (q[row].log() - p[row].log())).sum(),
        }
        for name, value in expected.items():
            assert float(METRICS[name](logits, answers)[row]) == pytest.approx(
                float(value), rel=1e-4
            )


def test_any_function_of_the_logits_is_a_metric():
    model, pairs = tiny("gpt2"), pairs_of(8, 8)

    def spread(logits, answers):
        return logits.std(-1)

    found = sweep(model, pairs, "z", metric=spread)
    assert found.metadata["metric"] == "spread" and np.ptp(found.values) > 1e-3
    kl = sweep(model, pairs, "z", metric="kl")
    np.testing.assert_allclose(kl.clean, 0, atol=1e-6)
    assert (kl.values < 0).all()


def test_a_killed_sweep_goes_on(tmp_path, monkeypatch):
    from interp.analysis.patching import activation

    monkeypatch.setattr(activation, "PAIRS_AT_ONCE", 2)
    model, pairs = tiny("gpt2"), pairs_of(8, 7, 8, 6, 8)
    whole = sweep(model, pairs)
    calls = []

    def metric(logits, answers):
        calls.append(len(logits))
        if len(calls) == 25:
            raise KeyboardInterrupt
        return METRICS["logit_diff"](logits, answers)

    metric.__name__ = "logit_diff"
    with pytest.raises(KeyboardInterrupt):
        sweep(model, pairs, metric=metric, out=tmp_path)
    found = sweep(model, pairs, out=tmp_path)
    np.testing.assert_allclose(found.values, whole.values)
    with pytest.raises(interp.runs.RunError, match="metric"):
        sweep(model, pairs, metric="prob", out=tmp_path)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "zz"}, "site='zz': one of resid_pre"),
        ({"by": ("layer", "token")}, "by=.*one or more of layer, head, position"),
        ({"site": "resid_pre"}, "resid_pre has no heads; z, q, k, v and pattern do"),
        ({"metric": "logitdiff"}, "metric='logitdiff'.*Did you mean logit_diff"),
        ({"direction": "forwards"}, "direction='forwards': one of denoise, noise"),
        ({"source": "zero"}, "source='zero': ablates the clean run; give direction='noise'"),
        ({"layers": [7]}, "layers: 7 is not among 0-1"),
        ({"heads": [4]}, "heads: 4 is not among the heads 0-3"),
        ({"site": "k", "heads": [2]}, "heads: 2 is not among the key-value heads 0-1"),
        ({"by": "position", "positions": [8]}, "positions: 8 is outside the prompts' 8 tokens"),
        ({"by": "position", "positions": ["S2"]}, "'S2' is none of middle, end"),
        ({"window": 0}, "window=0: at least 1"),
        ({"batch_size": 0}, "batch_size=0: at least 1"),
        ({"metric": lambda logits, answers: logits.mean()}, "a metric takes logits"),
        ({"metric": lambda logits, answers: logits[:, 0] / 0}, "not a finite number on 2 of 2"),
    ],
)
def test_mistakes_are_told(options, message):
    with unchecked(), pytest.raises(PairError, match=message):
        sweep(tiny("llama"), pairs_of(8, 8), **options)


def test_pairs_that_are_none_are_told():
    model, pairs = tiny("llama"), pairs_of(8, 8)
    with pytest.raises(PairError, match="no rows"):
        sweep(model, pairs.select([]))
    with pytest.raises(PairError, match="no column corrupted_input_ids"):
        sweep(model, pairs.remove_columns("corrupted_input_ids"))
    uneven = pairs.remove_columns("corrupted_input_ids")
    uneven = uneven.add_column("corrupted_input_ids", random_ids(8, 7, seed=5))
    with pytest.raises(PairError, match="pair 1 has 8 clean and 7 corrupted tokens"):
        sweep(model, uneven)
    outside = pairs.remove_columns("positions").add_column("positions", [{"end": 8}] * 2)
    with pytest.raises(PairError, match="position 'end': 8 is outside pair 0, which has 8"):
        sweep(model, outside, by="position", positions=["end"])
    with pytest.raises(PairError, match="numbers mean the same token only in prompts of one"):
        sweep(model, pairs_of(8, 7), by="position", positions=[3])
    with pytest.raises(PairError, match="key-value heads"):
        _ = sweep(model, pairs, "k").heads
    with pytest.raises(PairError, match="not by layer and head"):
        _ = sweep(model, pairs, "z", "layer").heads


def test_models_that_cannot_be_patched_are_told():
    with pytest.raises(HookError, match="hook_resid_mid"):
        sweep(tiny("gpt_neox"), pairs_of(8, 8), "resid_mid", "layer")
    model = fresh("llama")
    model.train()
    with pytest.raises(ReplayError, match="training mode"):
        sweep(model, pairs_of(8, 8))
