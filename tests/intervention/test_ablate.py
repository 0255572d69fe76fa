"""Ablation against the same edit made by hand in plain transformers, on what enters W_O."""

import pytest
import torch
from torch.testing import assert_close

import interp
from interp.intervention.ablate import Ablate
from interp.intervention.base import InterventionError
from tests.tiny import eager, one_by_one, random_ids, tiny, unchecked, words

FAMILIES = ["gpt2", "gpt_neox", "llama", "mistral", "qwen3"]
PROMPTS = random_ids(8, 5, 11, seed=2)
OTHERS = random_ids(9, 6, seed=9)
HEADS = ["L0H1", "L0H2", "L1H3"]
CHOSEN = {0: [1, 2], 1: [3]}
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def projection(model, layer: int):
    """The module that applies W_O."""
    kind = type(model).__name__
    if kind == "GPT2LMHeadModel":
        return model.transformer.h[layer].attn.c_proj
    if kind == "GPTNeoXForCausalLM":
        return model.gpt_neox.layers[layer].attention.dense
    return model.model.layers[layer].self_attn.o_proj


def by_hand(family: str, edit, prompts=PROMPTS) -> list[torch.Tensor]:
    """Logits of each prompt's tokens in plain transformers (left-padded), z passed through `edit`.

    `edit(layer, z, real)` changes `z[batch, token, head, width]` in place.
    """
    model, handles = eager(family), []
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(tokens)) + tokens for tokens in prompts])
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in prompts])

    def hook(layer):
        def change(module, args):
            z = args[0].clone().reshape(*args[0].shape[:2], 4, 8)
            edit(layer, z, mask.bool())
            return (z.flatten(2),)

        return projection(model, layer).register_forward_pre_hook(change)

    handles = [hook(layer) for layer in (0, 1)]
    try:
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            out = model(ids, attention_mask=mask, position_ids=positions).logits
    finally:
        for handle in handles:
            handle.remove()
    return [out[row, width - len(tokens) :] for row, tokens in enumerate(prompts)]


def ours(family: str, edit: Ablate, prompts=PROMPTS) -> list[torch.Tensor]:
    model = tiny(family)
    batch = model.batch(prompts)
    with torch.no_grad(), model.intervene(edit):
        out = model(batch.input_ids, attention_mask=batch.attention_mask)
    return [out[row, first:] for row, first in enumerate(batch.first.tolist())]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, **TOLERANCE)


def z_of(family: str, prompts=OTHERS) -> dict[tuple[int, int], torch.Tensor]:
    """z of each head at every token of the prompts, one prompt at a time."""
    found: dict[tuple[int, int], list] = {
        (layer, head): [] for layer in (0, 1) for head in range(4)
    }

    def keep(layer, z, real):
        for head in range(4):
            found[layer, head] += list(z[0, :, head].clone())

    for tokens in prompts:
        by_hand(family, keep, [tokens])
    return {key: torch.stack(rows) for key, rows in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_is_z_without_these_heads(family):
    def edit(layer, z, real):
        for head in CHOSEN[layer]:
            z[:, :, head] = 0

    assert_same(ours(family, Ablate(HEADS)), by_hand(family, edit))


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_is_exactly_zero(family):
    model, seen = tiny(family), {}
    keep = [(f"blocks.{i}.attn.hook_z", lambda z, hook, i=i: seen.update({i: z})) for i in (0, 1)]
    with model.intervene(Ablate(HEADS)), model.hooks(fwd_hooks=keep):
        model.run(torch.tensor(PROMPTS[:1]))
    for layer, heads in CHOSEN.items():
        for head in range(4):
            assert bool((seen[layer][:, :, head] == 0).all()) == (head in heads)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fitted_mean_is_the_mean_of_z_over_tokens(family):
    fitted = Ablate.fit(tiny(family), [words(ids) for ids in OTHERS], HEADS)
    z = z_of(family)
    expected = torch.stack([z[h.layer, h.head].mean(0, keepdim=True) for h in fitted.heads])
    assert_close(fitted.bank, expected, **TOLERANCE)

    def edit(layer, z, real):
        for head in CHOSEN[layer]:
            z[:, :, head] = expected[HEADS.index(f"L{layer}H{head}")]

    assert_same(ours(family, fitted), by_hand(family, edit))


@pytest.mark.parametrize("family", FAMILIES)
def test_resampling_puts_in_z_of_other_tokens(family):
    fitted = Ablate.fit(
        tiny(family), [words(ids) for ids in OTHERS], HEADS, "resample", samples=6, seed=4
    )
    assert fitted.bank.shape == (3, 6, 8)
    z, bank = z_of(family), fitted.bank
    source = (bank[0][:, None] - z[0, 1]).abs().sum(-1).argmin(1)
    assert len(set(source.tolist())) == 6  # without replacement
    for row, head in enumerate(fitted.heads):  # the same tokens for each head
        assert_close(bank[row], z[head.layer, head.head][source], **TOLERANCE)

    def edit(layer, z, real):
        for row, own in enumerate(real):
            first = int(own.int().argmax())
            for column in range(first, len(own)):
                sample = ((column - first) * 7919 + 4 * 104729) % 6
                for head in CHOSEN[layer]:
                    z[row, column, head] = bank[HEADS.index(f"L{layer}H{head}"), sample]

    assert_same(ours(family, fitted), by_hand(family, edit))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_batch_s_mean_is_over_its_real_tokens(family):
    def edit(layer, z, real):
        for head in CHOSEN[layer]:
            z[:, :, head] = torch.stack(list(z[:, :, head][real])).mean(0)

    assert_same(ours(family, Ablate(HEADS, "mean")), by_hand(family, edit))


@pytest.mark.parametrize("family", FAMILIES)
def test_resampling_over_the_batch_takes_the_prompt_before(family):
    """The same column; where the prompt before has padding there, its first token."""

    def edit(layer, z, real):
        before = z.clone()
        for row in range(len(z)):
            first = int(real[row - 1].int().argmax())
            for column in range(z.shape[1]):
                for head in CHOSEN[layer]:
                    z[row, column, head] = before[row - 1, max(column, first), head]

    assert_same(ours(family, Ablate(HEADS, "resample")), by_hand(family, edit))


def test_resampling_over_a_batch_needs_two_prompts():
    with pytest.raises(InterventionError, match="2 or more prompts; use Ablate.fit"):
        ours("llama", Ablate(HEADS, "resample"), PROMPTS[:1])


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_is_the_mean_of_the_values_that_may_be_seen(family):
    model, seen = tiny(family), {}
    window = getattr(model.original_model.config, "sliding_window", None) or 99
    keep = [(f"blocks.{i}.attn.hook_z", lambda z, hook, i=i: seen.update({i: z})) for i in (0, 1)]
    for tokens in PROMPTS:
        with model.intervene(Ablate(HEADS, "uniform")), model.hooks(fwd_hooks=keep):
            cache = one_by_one(model.original_model, tokens, use_cache=True).past_key_values
        for layer, heads in CHOSEN.items():
            values = cache.layers[layer].values[0]
            values = values.repeat_interleave(4 // len(values), dim=0)
            if values.shape[1] < len(tokens):  # a sliding cache keeps the window only
                continue
            for head in heads:
                for i in range(len(tokens)):
                    mean = values[head, max(0, i - window + 1) : i + 1].mean(0)
                    assert_close(seen[layer][0, i, head], mean, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_in_the_logits(family):
    """By hand from the values that plain transformers caches; layer 0's do not depend on edits."""
    window = getattr(eager(family).config, "sliding_window", None) or 99
    tokens = PROMPTS[0]
    model = tiny(family)
    values = {}
    with model.hooks(
        fwd_hooks=[("blocks.0.attn.hook_attention", lambda a, hook: values.update(v=a.v))]
    ):
        model.run(torch.tensor([tokens]))
    v = values["v"][0].repeat_interleave(4 // values["v"].shape[1], dim=0)

    def edit(layer, z, real):
        if layer == 0:
            for i in range(len(tokens)):
                for head in (1, 2):
                    z[0, i, head] = v[head, max(0, i - window + 1) : i + 1].mean(0)

    uniform = Ablate(["L0H1", "L0H2"], "uniform")
    assert_same(ours(family, uniform, [tokens]), by_hand(family, edit, [tokens]))


@pytest.mark.parametrize("how", ["zero", "uniform", "mean"])
@pytest.mark.parametrize("when", ["prompt", "generated", "both"])
def test_when_says_at_which_tokens(how, when):
    """One prompt written on with the cache; compared token by token with the unedited z."""
    model, passes = tiny("llama"), []
    bank = torch.full((1, 1, 8), 7.0) if how == "mean" else None
    edit = Ablate(["L0H1"], how, when, bank)

    def look(z, hook):
        passes.append(z[0, :, 1].clone())

    def write():
        passes.clear()
        with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", look)]):
            ids = torch.tensor(PROMPTS[:1])
            out = model.continue_greedily(ids, torch.ones_like(ids), 4)
        return torch.cat(passes), out

    with model.intervene(edit):
        edited, out = write()
    # layer 0 sees embeddings only: what is written is passed again, unedited, in one go
    whole = torch.cat([torch.tensor(PROMPTS[0]), out[0, :-1]])
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: passes.append(z))]):
        passes.clear()
        model.run(whole[None])
    plain = passes[0][0, :, 1]
    changed = [(a - b).abs().max() > 1e-4 for a, b in zip(edited, plain, strict=True)]
    n = len(PROMPTS[0])
    if how == "uniform":
        changed[0] = changed[1] if when != "generated" else changed[0]  # it sees itself only
    assert changed == [when != "generated"] * n + [when != "prompt"] * (len(whole) - n)


def test_the_cache_of_the_prompt_is_left_as_it_was():
    model = tiny("llama")
    ids = torch.tensor(PROMPTS[:1])
    before = one_by_one(model.original_model, PROMPTS[0], use_cache=True).past_key_values
    for how in ("zero", "uniform"):
        with model.intervene(Ablate(HEADS, how, "generated")):
            after = one_by_one(model.original_model, ids[0], use_cache=True).past_key_values
        for one, other in zip(before.layers, after.layers, strict=True):
            assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


# Fitting, and what does not fit


def test_the_batch_size_of_fitting_is_no_matter():
    texts = [words(ids) for ids in PROMPTS]
    for how in ("mean", "resample"):
        one, other = (
            Ablate.fit(tiny("llama"), texts, HEADS, how, batch_size=n, seed=1) for n in (1, 3)
        )
        assert_close(one.bank, other.bank, atol=1e-5, rtol=1e-4)
    again = Ablate.fit(tiny("llama"), texts, HEADS, how, seed=1)
    assert again == Ablate.fit(tiny("llama"), texts, HEADS, how, seed=1)
    assert again != Ablate.fit(tiny("llama"), texts, HEADS, how, seed=2)


def test_a_bank_follows_its_heads():
    bank = torch.stack([torch.full((1, 8), 1.0), torch.full((1, 8), 2.0)])
    swapped = Ablate(["L1H0", "L0H1"], "mean", bank=bank)
    assert swapped == Ablate(["L0H1", "L1H0"], "mean", bank=bank.flip(0))
    assert list(map(str, swapped.heads)) == ["L0H1", "L1H0"]
    assert_close(swapped.bank[0], torch.full((1, 8), 2.0))


def test_heads_are_written_in_any_form():
    scores = interp.HeadScores.from_samples(torch.rand(3, 2, 4))
    assert Ablate("1.0, L0H1") == Ablate([(0, 1), "L1H0", "1-0"]) == Ablate(scores.heads[1:5:3])


@pytest.mark.parametrize(
    "options, said",
    [
        ({"how": "remove"}, "how='remove': one of zero, mean, resample, uniform"),
        ({"when": "always"}, "when='always': one of prompt, generated, both"),
        ({"bank": torch.zeros(3, 1, 8)}, "bank: how='zero' takes none"),
        ({"how": "mean", "bank": torch.zeros(2, 1, 8)}, r"bank: \[2, 1, 8\].*\[3 heads"),
        ({"how": "mean", "bank": torch.zeros(3, 8)}, r"bank: \[3, 8\]"),
        ({"how": "resample", "bank": torch.zeros(3, 0, 8)}, r"bank: \[3, 0, 8\]"),
        ({"how": "mean", "bank": torch.full((3, 1, 8), torch.nan)}, "bank: holds NaN"),
    ],
)
def test_what_has_no_meaning_is_refused(options, said):
    with unchecked(), pytest.raises(InterventionError, match=said):
        Ablate(HEADS, **options)


def test_a_bank_of_another_model_is_refused():
    bank = torch.zeros(3, 1, 9)
    with pytest.raises(InterventionError, match="width 9, and LlamaForCausalLM has 8"):
        ours("llama", Ablate(HEADS, "mean", bank=bank))


def test_only_mean_and_resample_are_fitted():
    with pytest.raises(InterventionError, match="how='zero': only mean and resample"):
        Ablate.fit(tiny("llama"), "w5", HEADS, "zero")


def test_repr_says_what_where_and_when():
    assert repr(Ablate(["L0H1", "L1H2"], when="generated")) == (
        "Ablate(2 heads: L0H1, L1H2; zero; at generated tokens)"
    )
    many = Ablate([(0, head) for head in range(6)], "mean")
    assert (
        repr(many)
        == "Ablate(6 heads: L0H0, L0H1, L0H2, L0H3, ...; mean over the batch; at all tokens)"
    )
    fitted = Ablate(["L0H1"], "mean", "prompt", torch.zeros(1, 1, 8))
    assert repr(fitted) == "Ablate(1 heads: L0H1; mean over given prompts; at the prompt's tokens)"
    assert repr(Ablate(())) == "Ablate(no heads; zero; at all tokens)"
