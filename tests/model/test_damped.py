"""Damped keys by the closed form are the edited softmax, whatever the shapes, masks and sets."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from interp.model.attention import Attention
from interp.model.damped import Damped, damped

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def attention_of(
    seed: int,
    batch=2,
    n_heads=4,
    group=2,
    n_queries=7,
    n_keys=7,
    padding=0,
    kind="causal",
    scale=1.0,
) -> Attention:
    """Random queries, keys and values; the last prompt is padded on the left."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    q = draw(batch, n_heads, n_queries, 5)
    k, v = (draw(batch, n_heads // group, n_keys, 5) for _ in "kv")
    real_keys = torch.ones(batch, n_keys, dtype=torch.bool)
    real_keys[-1, :padding] = False
    places = (real_keys.cumsum(1) - 1).clamp_min(0)
    rows = torch.arange(n_keys - n_queries, n_keys)
    seen = (torch.arange(n_keys) <= rows[:, None]) & real_keys[:, None, None]
    if kind == "window":
        seen = seen & (torch.arange(n_keys) > rows[:, None] - 3)
    mask = None
    if kind == "float":
        noise = draw(batch, 1, n_queries, n_keys)
        mask = noise.masked_fill(~seen, torch.finfo(torch.float32).min)
    elif padding or kind != "causal" or n_queries < n_keys:
        mask = seen
    return Attention(
        q, k, v, scale=scale, mask=mask, causal=mask is None,
        positions=places[:, rows], key_positions=places,
        real_queries=real_keys[:, rows], real_keys=real_keys,
    )  # fmt: skip


def by_hand(attention: Attention, heads, keys, factor, rows) -> torch.Tensor:
    """Scale, give the others their share, multiply by v: one row at a time."""
    pattern = attention.pattern().double()
    for b in range(len(pattern)):
        for index, head in enumerate(heads.tolist()):
            for i in range(attention.n_queries):
                row, own = pattern[b, head, i], keys[b, index, min(i, keys.shape[2] - 1)]
                mass, held = float(row[own].sum()), float(row[~own].sum())
                if bool(rows[b, i]) and held >= 1e-6:
                    f = float(factor[min(b, len(factor) - 1), min(index, factor.shape[1] - 1), 0])
                    row[own] *= f
                    row[~own] *= 1 + (1 - f) * mass / held
    return (pattern @ attention.per_query_head(attention.v).double()).float()


SHAPES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "group": st.sampled_from([1, 2, 4]),
        "n_queries": st.sampled_from([1, 3, 7]),
        "n_keys": st.sampled_from([7]),
        "padding": st.integers(0, 2),
        "kind": st.sampled_from(["causal", "window", "float"]),
        "scale": st.sampled_from([0.3, 1.0, 3.0]),
    }
)


@given(
    seed=st.integers(0, 9999), shape=SHAPES, share=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    heads=st.lists(st.integers(0, 3), min_size=1, unique=True), factor=st.floats(0, 1),
    own_factors=st.booleans(), own_keys=st.booleans(),
)  # fmt: skip
def test_it_is_the_edited_softmax(seed, shape, share, heads, factor, own_factors, own_keys):
    attention = attention_of(seed, **shape)
    random = partial(torch.rand, generator=torch.Generator().manual_seed(seed))
    batch, n_queries, n_heads = len(attention.q), attention.n_queries, len(heads)
    keys = random(batch, n_heads, n_queries if own_keys else 1, 7) < share
    factors = torch.full((batch, n_heads, 1), factor)
    factors = factors * random(batch, n_heads, 1) if own_factors else factors[:1, :1]
    rows = attention.real_queries & (random(batch, n_queries) < 0.8)
    case = attention, torch.tensor(heads), keys, factors, rows
    fast, expected = damped(*case), by_hand(*case)
    real = attention.real_queries[:, None, :, None].expand_as(expected)
    assert_close(fast.output()[real], expected[real], **CLOSE)
    weights = fast.pattern() @ attention.per_query_head(attention.v)
    assert_close(weights[real], expected[real], **CLOSE)


def one_case(**changes):
    attention = attention_of(3, n_queries=9, n_keys=9, **changes)
    heads = torch.tensor([3, 1])
    keys = torch.zeros(2, 2, 1, 9, dtype=torch.bool)
    keys[0, 0, 0, [2, 4]] = keys[0, 1, 0, 3] = keys[1, 1, 0, 5] = True
    return attention, heads, keys, torch.full((1, 1, 1), 0.4), attention.real_queries


@pytest.mark.parametrize("kind", ["causal", "window", "float"])
def test_the_closed_form_takes_no_weights(kind, monkeypatch):
    case = one_case(kind=kind, scale=0.3)
    expected = by_hand(*case)
    fast = damped(*case)
    monkeypatch.setattr(Attention, "blocks", lambda *args: pytest.fail("weights were formed"))
    real = case[0].real_queries[:, None, :, None].expand_as(expected)
    assert_close(fast.output()[real], expected[real], **CLOSE)


def test_blocks_of_rows_are_put_together(monkeypatch):
    case = one_case()
    whole = damped(*case).output()
    monkeypatch.setattr("interp.model.attention.BLOCK_ELEMENTS", 20)
    assert_close(damped(*case).output(), whole)


def test_what_is_not_edited_is_the_same_to_the_bit():
    attention, heads, keys, factor, rows = one_case()
    z, before = damped(attention, heads, keys, factor, rows).output(), attention.output()
    assert torch.equal(z[:, [0, 2]], before[:, [0, 2]])
    assert torch.equal(z[0, 3, :2], before[0, 3, :2]) and torch.equal(z[1, 3], before[1, 3])
    assert not torch.isclose(z[0, 3, 2:], before[0, 3, 2:]).all(-1).any()
    half = rows & (torch.arange(9) % 2 == 0)
    z = damped(attention, heads, keys, factor, half).output()
    assert torch.equal(z[:, :, 1::2], before[:, :, 1::2])


def test_no_key_is_no_edit():
    attention, heads, keys, factor, rows = one_case()
    assert damped(attention, heads, keys & False, factor, rows) is attention
    assert torch.equal(damped(attention, heads, keys, factor * 0 + 1, rows).output()[0, 0],
                       attention.output()[0, 0])  # fmt: skip


def planted(strength: float):
    """One prompt of one head, whose keys 1 and 2 take nearly everything."""
    attention = attention_of(0, batch=1, n_heads=1, group=1, n_queries=6, n_keys=6)
    q = attention.q.clone()
    q[..., 0] = 1
    k = attention.k.clone() * 0
    k[..., 1:3, 0] = strength
    keys = torch.zeros(1, 1, 1, 6, dtype=torch.bool)
    keys[..., 1:3] = True
    rows = attention.real_queries
    return replace(attention, q=q, k=k), torch.tensor([0]), keys, torch.zeros(1, 1, 1), rows


@pytest.mark.parametrize("strength", [2.0, 4.0, 8.0, 12.0])
def test_others_that_hold_little_are_not_subtracted_out(strength):
    """At strength 12 the others hold 2e-5 of a row: the closed form would be right to 1e-2."""
    case = planted(strength)
    assert_close(damped(*case).output(), by_hand(*case), **CLOSE)


def test_a_row_without_others_is_left_alone():
    attention, *rest = planted(30.0)
    z = damped(attention, *rest).output()
    assert_close(z, attention.output())
    assert z.isfinite().all()


def test_all_but_the_first_at_factor_0_is_the_first():
    attention, heads, _, _, rows = one_case()
    keys = torch.ones(2, 2, 1, 9, dtype=torch.bool)
    keys[..., 0] = False
    z = damped(attention, heads, keys, torch.zeros(1, 1, 1), rows).output()
    first = attention.per_query_head(attention.v)[:, heads, :1].expand_as(z[:, heads])
    assert_close(z[:, heads], first, **CLOSE)


def test_z_is_affine_in_the_factor():
    attention, heads, keys, factor, rows = one_case()
    z = [damped(attention, heads, keys, factor * 0 + f, rows).output() for f in (0, 0.5, 1)]
    assert_close(z[1], (z[0] + z[2]) / 2, **CLOSE)


def test_it_is_a_bias_of_the_logits_that_differs_between_rows():
    attention, heads, keys, factor, rows = one_case()
    whole = torch.zeros(2, 4, 1, 9, dtype=torch.bool).index_copy(1, heads, keys)
    mass = attention.mass_on(whole)[..., None]
    bias = (factor[..., None] * (1 - mass) / (1 - factor[..., None] * mass)).log()
    other = attention.bias(torch.where(whole, bias, 0.0))
    assert_close(damped(attention, heads, keys, factor, rows).output(), other.output(), **CLOSE)


def test_rows_keep_their_sums_and_proportions():
    attention, heads, keys, factor, rows = one_case()
    before, after = attention.pattern(), damped(attention, heads, keys, factor, rows).pattern()
    assert_close(after.sum(-1), before.sum(-1))
    assert ((after == 0) == (before == 0)).all()
    a, b = before[0, 3], after[0, 3]
    damped_keys = keys[0, 0, 0]
    assert_close(b[:, damped_keys], 0.4 * a[:, damped_keys])
    others = ~damped_keys & (torch.arange(9) < 5)
    assert_close(b[5:, others] / b[5:, :1], a[5:, others] / a[5:, :1])


@pytest.mark.parametrize("kind", ["causal", "window"])
def test_gradients_are_those_of_the_weights(kind):
    attention, *rest = one_case(kind=kind)
    grads = []
    for by_weights in (False, True):
        q, k, v = (x.clone().requires_grad_() for x in (attention.q, attention.k, attention.v))
        edited = damped(replace(attention, q=q, k=k, v=v), *rest)
        z = edited.pattern() @ edited.per_query_head(v) if by_weights else edited.output()
        z[:, :, 3:].square().sum().backward()
        grads.append((q.grad, k.grad, v.grad))
    for ours, expected in zip(*grads, strict=True):
        assert_close(ours, expected, **CLOSE)


def test_half_precision_loses_no_more_than_its_rounding():
    attention, *rest = one_case()
    half = replace(attention, **{n: getattr(attention, n).bfloat16() for n in "qkv"})
    exact = replace(half, **{n: getattr(half, n).float() for n in "qkv"})
    z = damped(half, *rest).output()
    assert z.dtype == torch.bfloat16
    assert_close(z.float(), damped(exact, *rest).output(), atol=1e-2, rtol=1e-2)


def test_other_edits_before_and_after_are_honoured():
    attention, heads, keys, factor, rows = one_case()
    cooled = attention.temperature(0.5)
    edited = damped(cooled, heads, keys, factor, rows)
    assert_close(edited.output(), by_hand(cooled, heads, keys, factor, rows), **CLOSE)
    even = damped(attention, heads, keys, factor, rows).set_rows(heads=[1])
    assert_close(even.output()[:, 1], attention.set_rows().output()[:, 1], **CLOSE)
    assert_close(even.output()[:, 3], by_hand(*one_case())[:, 3], **CLOSE)
    other = replace(damped(attention, heads, keys, factor, rows), v=attention.v * 2)
    assert_close(other.output(), 2 * by_hand(*one_case()), **CLOSE)


@pytest.mark.parametrize("fact", [{"softcap": 2.0}, {"sink_logits": torch.ones(1, 4, 1)}])
def test_what_is_no_plain_softmax_is_computed_from_its_weights(fact):
    attention, *rest = one_case()
    attention = replace(attention, **fact)
    edited = damped(attention, *rest)
    assert not isinstance(edited, Damped)
    assert_close(edited.output(), by_hand(attention, *rest), **CLOSE)
    assert_close(edited.pattern().sum(-1), attention.pattern().sum(-1))
