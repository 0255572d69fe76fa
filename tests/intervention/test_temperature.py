"""Temperature against logits that are multiplied by hand, and what is learned of it."""

from dataclasses import replace
from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import gelu
from torch.testing import assert_close

import interp
from interp.heads import heads_of
from interp.intervention.base import InterventionError
from interp.intervention.descent import Tuning
from interp.intervention.temperature import Temperature, keys_seen, sharpness
from tests.intervention.roped import FAMILIES, logits_by_hand, roped, turned
from tests.model.by_hand import CASES, may_see, random_attention
from tests.tiny import random_ids, tiny, unchecked, with_answers

PROMPTS = random_ids(9, 5, 12, seed=3)
HEADS = ["L1H3", "L0H1", "L0H2"]
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


def numbers(seed=0):
    generator = torch.Generator().manual_seed(seed)
    temperature = torch.rand(3, generator=generator) + 0.5
    slope = torch.rand(3, generator=generator)
    return temperature, slope, torch.randn(3, 8, generator=generator)


def edit(parts="all", when="both", seed=0) -> Temperature:
    temperature, slope, token = numbers(seed)
    given = {"temperature": temperature, "slope": slope, "token": token, "when": when}
    kept = {"all": ("temperature", "slope", "token")}.get(parts, (parts,))
    return Temperature(HEADS, **{k: v for k, v in given.items() if k in (*kept, "when")})


@torch.no_grad()
def logits(model, *edits, prompts=PROMPTS):
    batch = model.batch(prompts)
    with model.intervene(*edits):
        out = model(batch.input_ids, attention_mask=batch.attention_mask)
    return [out[row, first:] for row, first in enumerate(batch.first.tolist())]


def tau_by_hand(found: Temperature, layer, h, q, i) -> float:
    """The formula; i counts from 0."""
    heads = [str(head) for head in heads_of(found.heads or ())]
    if f"L{layer}H{h}" not in heads:
        return 1.0
    row = heads.index(f"L{layer}H{h}")
    t, a, w = (
        value[row] if isinstance(value, torch.Tensor) else value
        for value in (found.temperature, found.slope, found.token)
    )
    token = 0.0 if w is None else float(torch.tanh(sum(w * gelu(q))))
    return (1 + token + float(a) * log(i + 1)) / float(t)


@pytest.mark.parametrize("parts", ["all", "temperature", "slope", "token"])
@pytest.mark.parametrize("family", ["gpt2", *FAMILIES])
def test_it_is_logits_multiplied_by_hand(family, parts):
    model, found, layers = roped(family), edit(parts), iter([0, 1] * len(PROMPTS))

    def z_of(row, q, k, v, scale, cap):
        layer, (n, heads) = next(layers), q.shape[:2]
        group, z = heads // k.shape[1], torch.zeros(n, heads, 8)
        for h in range(heads):
            for i in range(n):
                tau = tau_by_hand(found, layer, h, q[i, h], i)
                query = turned(q[i, h], i, family)
                keys = [turned(k[j, h // group], j, family) for j in range(i + 1)]
                s = tau * scale * (torch.stack(keys) @ query)
                s = s if cap is None else torch.tanh(s / cap) * cap
                z[i, h] = s.softmax(0) @ v[: i + 1, h // group]
        return z

    expected = logits_by_hand(model, family, PROMPTS, z_of)
    for ours, theirs, plain in zip(logits(model, found), expected, logits(model)):
        assert_close(ours, theirs, **TOLERANCE)
        assert (ours - plain).abs().max() > 1e-3


@torch.no_grad()
def written(model, *edits, prompts=PROMPTS, **options):
    batch = model.batch(prompts)
    with model.intervene(*edits):
        found = model.original_model.generate(
            batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=5,
            min_new_tokens=5, do_sample=False, output_scores=True, return_dict_in_generate=True,
            **options,
        )  # fmt: skip
    return torch.stack(found.scores)[..., 3:]  # the end tokens are forbidden


@pytest.mark.parametrize("family", ["gpt2", *FAMILIES])
def test_a_cached_step_is_the_last_row_of_the_whole(family):
    """The authors' code counts one row there, and its temperature is gone."""
    model = roped(family)
    cached, whole = (written(model, edit(), use_cache=cache) for cache in (True, False))
    assert_close(cached, whole, **TOLERANCE)
    assert (cached - written(model)).abs().max() > 1e-2


def test_the_first_row_has_one_key():
    model = roped("llama")
    for ours, plain in zip(logits(model, edit()), logits(model)):
        assert_close(ours[0], plain[0], **TOLERANCE)


@pytest.mark.parametrize("heads", [HEADS, None])
def test_at_1_nothing_changes(heads):
    model = tiny("llama")
    for ours, plain in zip(logits(model, Temperature(heads)), logits(model)):
        assert_close(ours, plain, atol=1e-6, rtol=1e-6)


def test_one_number_for_all_heads():
    model = roped("llama")
    every = [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
    named = Temperature(every, torch.full((8,), 0.7), torch.full((8,), 0.3))
    for ours, expected in zip(
        logits(model, Temperature(None, 0.7, 0.3)), logits(model, named), strict=True
    ):
        assert torch.equal(ours, expected)


def test_heads_and_their_numbers_are_sorted_together():
    temperature, slope, token = numbers()
    given = Temperature(HEADS, temperature, slope, token)
    other = Temperature(HEADS[::-1], temperature.flip(0), slope.flip(0), token.flip(0))
    assert given == other and [str(h) for h in heads_of(given.heads or ())] == sorted(HEADS)
    assert given.temperature.tolist() == [temperature[1], temperature[2], temperature[0]]


def test_only_its_heads_and_tokens_are_touched():
    model = roped("llama")
    batch = model.batch(PROMPTS)

    def patterns(*edits):
        kept = []
        look = [("blocks.0.attn.hook_pattern", lambda p, hook: kept.append(p))]
        look = model.hooks(fwd_hooks=look)
        with torch.no_grad(), model.intervene(*edits), look, model.spans(None, [6, 3, 8]):
            model(batch.input_ids, attention_mask=batch.attention_mask)
        return kept[0]

    late, early = (patterns(edit(when=when)) for when in ("generated", "prompt"))
    plain = patterns()
    assert torch.equal(late[:, [0, 3]], plain[:, [0, 3]])
    for row, n in enumerate([6, 3, 8]):
        start = batch.first[row] + n
        assert_close(late[row, :, :start], plain[row, :, :start])
        assert_close(early[row, :, start:], plain[row, :, start:])
        assert (late[row, [1, 2], start:] - plain[row, [1, 2], start:]).abs().max() > 1e-3
        assert (early[row, [1, 2], :start] - plain[row, [1, 2], :start]).abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_keys_are_counted_as_the_mask_has_them(name):
    attention = CASES[name]()
    counts = keys_seen(attention)
    for b in range(2):
        for i in range(attention.n_queries):
            if attention.real_queries[b, i]:
                seen = [may_see(attention, b, i, j) and bool(attention.real_keys[b, j])
                        for j in range(attention.n_keys)]  # fmt: skip
                assert counts[b, i] == sum(seen)


def test_a_window_bounds_the_sharpening():
    """In a window of five tokens no row sees more keys, cached or not."""
    model = tiny("mistral")
    sharp = Temperature(None, slope=1.0)
    cached, whole = (written(model, sharp, use_cache=cache) for cache in (True, False))
    assert_close(cached, whole, **TOLERANCE)


@given(seed=st.integers(0, 99), factor=st.floats(0.1, 4))
def test_rows_are_sharper_and_keep_their_order(seed, factor):
    attention = random_attention(seed=seed)
    sharp = replace(attention, q=attention.q * (1 + factor))
    before, after = attention.pattern(), sharp.pattern()
    assert (sharp.entropy() <= attention.entropy() + 1e-4).all()
    assert (after.max(-1).values >= before.max(-1).values - 1e-4).all()
    assert torch.equal(after.argmax(-1), before.argmax(-1))


def test_derivatives_are_those_of_the_docstring():
    attention = random_attention()
    attention = replace(attention, **{name: getattr(attention, name).double() for name in "qkv"})
    logits = attention.q @ attention.per_query_head(attention.k).transpose(2, 3) * attention.scale
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    tau = torch.full((2, 4, 7, 1), 1.3, dtype=torch.float64, requires_grad=True)
    weights = (tau * logits).masked_fill(~causal, -torch.inf).softmax(-1)
    values = attention.per_query_head(attention.v)
    z, entropy = weights @ values, -(weights * weights.clamp_min(1e-300).log()).sum(-1)
    mean = (weights * logits).sum(-1, keepdim=True)
    probe = torch.randn_like(z)
    found = torch.autograd.grad((z * probe).sum(), tau, retain_graph=True)[0]
    expected = (((weights * (logits - mean)) @ values) * probe).sum(-1, keepdim=True)
    assert_close(found, expected)
    found = torch.autograd.grad(entropy.sum(), tau)[0]
    assert_close(found[..., 0], -1.3 * (weights * (logits - mean) ** 2).sum(-1))


def test_after_pine_it_scales_what_pine_made():
    """Places first or temperature first; where places depend on importance, sharper queries may
    order segments otherwise, so this is with those of the text."""
    model, batch = roped("llama"), roped("llama").batch(PROMPTS)
    pine, sharp = interp.PINE(order="input"), Temperature(None, 0.5)
    told = model.spans([{"segment_1": [1, 3], "segment_2": [3, 5]}] * 3)

    def double(scores, hook):
        return (scores * 2).clamp_min(torch.finfo(scores.dtype).min)

    hooks = [(f"blocks.{n}.attn.hook_attn_scores", double) for n in range(2)]
    with told, torch.no_grad():
        with model.hooks(fwd_hooks=hooks), model.intervene(pine):
            expected = model(batch.input_ids, attention_mask=batch.attention_mask)
        for edits in ([pine, sharp], [sharp, pine]):
            for row, ours in enumerate(logits(model, *edits)):
                assert_close(ours, expected[row, batch.first[row] :], **TOLERANCE)


# What is learned


def test_what_is_learned_lowers_the_loss():
    """Answers that the model gives at twice its sharpness in three heads: found again."""
    model = roped("llama")
    prompts = random_ids(*[9] * 24, seed=11)
    target = Temperature(["L0H1", "L1H0", "L1H3"], 0.4)
    with torch.no_grad(), model.intervene(target):
        answers = [model(torch.tensor([ids]))[0, -1].argmax().item() for ids in prompts]
    data = with_answers(prompts, [[a] for a in answers], [(0, 1)] * 24)
    tuning = Tuning(lr=0.05, epochs=8, patience=None, batch_size=8)
    before = {name: value.clone() for name, value in model.original_model.state_dict().items()}
    plain = interp.evaluate(model, data, progress=False).loss
    for parts in (("head",), ("position", "token")):
        learned = Temperature.fit(
            model, data, target.heads, parts, validation=None, tuning=tuning, progress=False
        )
        with model.intervene(learned):
            assert interp.evaluate(model, data, progress=False).loss < plain - 0.02
    assert isinstance(learned.slope, torch.Tensor) and (learned.slope >= 0).all()
    assert learned.token.shape == (3, 8) and learned.made_on is not None
    for name, value in model.original_model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.requires_grad and p.grad is None for p in model.original_model.parameters())


def test_texts_without_answers_are_learned_from_too():
    model = tiny("gpt2")
    texts = ["w5 w6 w7 w8 w9 w5 w6 w7 w8 w9", "w9 w8 w7 w9 w8 w7 w9 w8"] * 4
    plain = interp.evaluate(model, texts, progress=False).loss
    tuning = Tuning(lr=0.05, epochs=6, patience=None, batch_size=4)
    learned = Temperature.fit(model, texts, validation=None, tuning=tuning, progress=False)
    assert len(learned.heads) == 8
    with model.intervene(learned):
        assert interp.evaluate(model, texts, progress=False).loss < plain - 0.01
    again = Temperature.fit(model, texts, validation=None, tuning=tuning, progress=False)
    assert again == learned


# What is said and refused


@pytest.mark.parametrize(
    "args, match",
    [
        ((HEADS, 0.0), "temperature=0.0: must be above 0"),
        ((HEADS, 1.0, -0.1), "slope=-0.1: from 0 on"),
        ((HEADS, torch.ones(2)), r"temperature: \[2\], and should be \[heads\] with 3"),
        ((HEADS, torch.tensor([1.0, 2.0, torch.nan])), "temperature: holds NaN"),
        ((None, torch.ones(8)), "temperature: one for each of `heads`"),
        ((HEADS, 1.0, 0.0, torch.ones(3)), r"token: \[3\], and should be \[heads, d_head\]"),
        ((HEADS, 1.0, 0.0, None, "never"), "when='never'"),
    ],
)
def test_what_has_no_meaning_is_refused(args, match):
    with pytest.raises(InterventionError, match=match), unchecked():
        Temperature(*args)


def test_another_width_is_refused():
    with pytest.raises(InterventionError, match="width 5.*Fit it"):
        list(Temperature(HEADS, token=torch.ones(3, 5)).hooks(tiny("llama")))
    with pytest.raises(InterventionError, match="parts=.*head, position, token"):
        Temperature.fit(tiny("llama"), "w5 w6", HEADS, ["value"])


def test_it_says_in_words_what_it_does():
    assert "all heads; logits divided by 0.5; at all tokens" in repr(Temperature(None, 0.5))
    assert "3 heads: L0H1, L0H2, L1H3" in repr(edit()) and "by what each query is" in repr(edit())
    assert "sharper by 0.25" in repr(Temperature(HEADS, slope=0.25, when="generated"))


def test_sharpness_is_float32_in_bf16():
    model, kept = roped("llama", torch.bfloat16), []
    look = model.hooks(fwd_hooks=[("blocks.0.attn.hook_attention", lambda a, hook: kept.append(a))])
    with torch.no_grad(), look:
        model(torch.tensor([PROMPTS[0]]))
    tau = sharpness(kept[0], [1], torch.ones(1), torch.full((1,), 1e-3), None)
    assert tau.dtype == torch.float32 and tau[0, 0, -1] == pytest.approx(1 + 1e-3 * log(9))
