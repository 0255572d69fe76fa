"""Edits of attention, against the same edit made weight by weight (tests/model/by_hand.py)."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from interp.model import attention as attention_module
from interp.model.edits import EditError
from tests.model.by_hand import BATCH, CASES, HEADS, TOKENS, by_hand, may_see, random_attention

TOLERANCE = {"atol": 3e-6, "rtol": 1e-5}


@pytest.fixture(params=["one row a block", "one block"])
def block_size(request, monkeypatch):
    if request.param == "one row a block":
        monkeypatch.setattr(attention_module, "BLOCK_ELEMENTS", 1)
        monkeypatch.setattr(attention_module, "TILE_ELEMENTS", 1)


@pytest.fixture(params=CASES)
def a(request, block_size):
    return CASES[request.param]()


def assert_same(edited, expected):
    """Pattern, z and what is read from them, on the rows of real queries."""
    real = edited.real_queries
    for ours, theirs in ((edited.pattern(), expected.pattern), (edited.output(), expected.z)):
        assert_close(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real], **TOLERANCE)
    total = (expected.pattern * real[:, None, :, None]).sum(2)
    counts = edited.queries_per_key()[:, None].clamp_min(1)
    received = edited.mass_received().nan_to_num()
    assert_close(
        received,
        torch.where(counts > 0, total / counts, 0) * (~edited.mass_received().isnan()),
        **TOLERANCE,
    )


# logits


def test_bias_by_a_number_at_some_heads_queries_and_keys(a):
    i_chosen = a.n_queries - 1
    edited = a.bias(1.5, heads=[1, 2], queries=[i_chosen], keys=[2, 5])
    expected = by_hand(
        a,
        lambda s, b, h, i, j: s + 1.5 if h in (1, 2) and i == i_chosen and j in (2, 5) else s,
    )
    assert_same(edited, expected)


def test_bias_by_a_tensor_for_the_whole_layer(a):
    delta = torch.randn(BATCH, HEADS, a.n_queries, TOKENS)
    assert_same(a.bias(delta), by_hand(a, lambda s, b, h, i, j: s + delta[b, h, i, j]))
    assert_same(a.bias(delta[0, 0, 0]), by_hand(a, lambda s, b, h, i, j: s + delta[0, 0, 0, j]))


def test_bias_by_a_function_of_the_logits(a):
    """Head modulation: s + c |s|."""
    edited = a.bias(lambda s: 0.5 * s.abs(), heads=[3])
    assert_same(edited, by_hand(a, lambda s, b, h, i, j: s + 0.5 * s.abs() if h == 3 else s))


def test_bias_of_minus_infinity_hides_a_key(a):
    """Also from the first query, that sees no other: it attends to nothing, least to later keys."""
    hide = lambda s, b, h, i, j: s - math.inf if h == 1 and j in (0, 3) else s  # noqa: E731
    assert_same(a.bias(-math.inf, heads=[1], keys=[0, 3]), by_hand(a, hide))


def test_hiding_every_key_leaves_nothing(block_size):
    for name in ("causal", "left padding", "decoding", "sink logits"):
        edited = CASES[name]().bias(-math.inf)
        assert not edited.pattern().any() and not edited.output().any(), name


def test_hiding_keys_does_not_spoil_gradients():
    a = random_attention()
    q = a.q.clone().requires_grad_()
    replace(a, q=q).bias(-math.inf, keys=[0]).output().sum().backward()
    assert q.grad.isfinite().all() and q.grad.any()


def test_temperature_of_some_heads(a):
    edited = a.temperature(2.5, heads=[0, 3])
    assert_same(edited, by_hand(a, lambda s, b, h, i, j: s / 2.5 if h in (0, 3) else s))


def test_temperature_per_batch_head_and_query(a):
    t = torch.rand(BATCH, HEADS, a.n_queries) + 0.5
    assert_same(a.temperature(t), by_hand(a, lambda s, b, h, i, j: s / t[b, h, i]))


@pytest.mark.parametrize("temperature", [0, -1.0, torch.tensor([1.0, 0.0])])
def test_temperature_must_be_above_zero(temperature):
    with pytest.raises(EditError, match="temperature=.*above 0"):
        random_attention().temperature(temperature)


# weights


def rescaled(row, keys, receivers, factor):
    """The definition, for one row: scale, then share the freed mass out in proportion."""
    given_up = (1 - factor) * row[keys].sum()
    held = row[receivers].sum()
    if held < 1e-6:
        return row
    row = row.clone()
    share = row[receivers] / held
    row[keys] = row[keys] * factor
    row[receivers] = row[receivers] + given_up * share
    return row


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.3])
def test_rescale_gives_the_freed_mass_to_all_others(a, factor):
    keys = torch.arange(TOKENS) == 3
    edited = a.rescale(keys, factor, heads=[0, 2])
    expected = by_hand(
        a,
        edit_row=lambda row, b, h, i: rescaled(row, keys, ~keys, factor) if h in (0, 2) else row,
    )
    assert_same(edited, expected)


def test_rescale_gives_the_freed_mass_to_chosen_receivers(a):
    keys = torch.arange(TOKENS) >= 4
    receivers = torch.arange(TOKENS) == 2
    edited = a.rescale(keys, 0.3, receivers=receivers)
    expected = by_hand(a, edit_row=lambda row, b, h, i: rescaled(row, keys, receivers, 0.3))
    assert_same(edited, expected)


def test_rescale_may_differ_by_prompt(a):
    keys = torch.rand(BATCH, TOKENS) > 0.5
    edited = a.rescale(keys, 0.2)
    assert_same(edited, by_hand(a, edit_row=lambda r, b, h, i: rescaled(r, keys[b], ~keys[b], 0.2)))


def test_rescale_may_differ_by_head_and_row(a):
    """VAR chooses keys, factors and rows per prompt, head and query."""
    shape = (BATCH, HEADS, a.n_queries)
    keys, rows = torch.rand(*shape, TOKENS) > 0.6, torch.rand(shape) > 0.4
    receivers, factor = (torch.rand(*shape, TOKENS) > 0.5) & ~keys, torch.rand(shape) * 2
    edited = a.rescale(keys, factor, receivers=receivers, rows=rows, heads=[1, 3, 0])
    expected = by_hand(
        a,
        edit_row=lambda row, b, h, i: (
            rescaled(row, keys[b, h, i], receivers[b, h, i], factor[b, h, i])
            if h != 2 and rows[b, h, i]
            else row
        ),
    )
    assert_same(edited, expected)


def test_rows_may_be_chosen_by_query_or_by_prompt_and_query(a):
    keys = torch.arange(TOKENS) == 1
    last = torch.arange(a.n_queries) == a.n_queries - 1
    by_prompt = torch.stack([last, ~last])
    edit = lambda row, b, h, i: rescaled(row, keys, ~keys, 0.5) if last[i] else row  # noqa: E731
    assert_same(a.rescale(keys, 0.5, rows=last), by_hand(a, edit_row=edit))
    edit = lambda r, b, h, i: rescaled(r, keys, ~keys, 0.5) if by_prompt[b, i] else r  # noqa: E731
    assert_same(a.rescale(keys, 0.5, rows=by_prompt), by_hand(a, edit_row=edit))


def test_a_row_whose_receivers_hold_nothing_stays_as_it_is():
    a = random_attention()
    edited = a.rescale(torch.arange(TOKENS) == 0, 0.0)  # the first query sees nothing else
    assert_close(edited.pattern(queries=[0]), a.pattern(queries=[0]))
    assert not edited.pattern(queries=slice(1, None), keys=[0]).any()
    nobody = torch.zeros(TOKENS, dtype=torch.bool)
    assert_close(a.rescale(torch.arange(TOKENS) == 0, 0.0, receivers=nobody).output(), a.output())


@given(st.floats(0, 2), st.integers(0, TOKENS - 1), st.integers(0, 99))
def test_rescale_keeps_each_row_s_sum(factor, key, seed):
    a = random_attention(seed=seed)
    sums = a.rescale(torch.arange(TOKENS) == key, factor).pattern().sum(-1)
    assert_close(sums, torch.ones_like(sums))


def test_a_key_cannot_give_and_receive():
    keys = torch.arange(TOKENS) < 2
    with pytest.raises(EditError, match="receivers.*keys"):
        random_attention().rescale(keys, 0.5, receivers=torch.arange(TOKENS) > 0)


def test_uniform_rows_are_equal_on_what_the_query_may_see(a):
    def uniform(row, b, h, i):
        seen = torch.tensor([float(may_see(a, b, i, j)) for j in range(TOKENS)])
        return seen / seen.sum().clamp_min(1) if h in (0, 1) else row

    assert_same(a.set_rows(heads=[0, 1]), by_hand(a, edit_row=uniform))


def test_given_rows_are_taken_as_they_are(a):
    """On hidden keys too, and however the rows fall into blocks."""
    weights = torch.rand(BATCH, HEADS, a.n_queries, TOKENS).softmax(-1)
    rows = torch.rand(BATCH, a.n_queries) > 0.5
    edited = a.set_rows(weights, heads=[2, 0], rows=rows)
    chosen = lambda b, h, i: h in (2, 0) and rows[b, i]  # noqa: E731
    expected = by_hand(
        a, edit_row=lambda row, b, h, i: weights[b, h, i] if chosen(b, h, i) else row
    )
    assert_same(edited, expected)
    all_on_the_first = torch.eye(TOKENS)[0]
    assert (a.set_rows(all_on_the_first).pattern(keys=[0]) == 1).all()


# how edits go together


def test_edits_are_made_in_order(a):
    keys, delta = torch.arange(TOKENS) == 2, torch.randn(TOKENS)
    edited = (
        a.bias(delta, heads=[0, 1])
        .temperature(0.5, heads=[1, 2])
        .rescale(keys, 0.5, heads=[1, 3])
        .rescale(~keys, 0.1, heads=[3])
    )

    def logit(s, b, h, i, j):
        s = s + delta[j] if h in (0, 1) else s
        return s / 0.5 if h in (1, 2) else s

    def row(row, b, h, i):
        row = rescaled(row, keys, ~keys, 0.5) if h in (1, 3) else row
        return rescaled(row, ~keys, keys, 0.1) if h == 3 else row

    assert_same(edited, by_hand(a, logit, row))


def test_logits_are_edited_before_weights():
    edited = random_attention().set_rows()
    for late in (lambda: edited.bias(1.0), lambda: edited.temperature(2.0)):
        with pytest.raises(EditError, match="logit edit.*weight edit"):
            late()


def test_an_edit_that_does_nothing_leaves_z(a):
    keys = torch.arange(TOKENS) == 1
    none = torch.zeros(a.n_queries, dtype=torch.bool)
    for edited in (
        a.bias(0.0),
        a.bias(7.0, heads=[]),
        a.bias(7.0, keys=[]),
        a.temperature(1.0),
        a.rescale(keys, 1.0),
        a.rescale(keys, 0.0, rows=none),
        a.rescale(keys & ~keys, 0.0),
        a.set_rows(rows=none),
    ):
        real = a.real_queries
        ours, before = edited.output().transpose(1, 2)[real], a.output().transpose(1, 2)[real]
        assert_close(ours, before, **TOLERANCE)


def test_only_edited_heads_leave_the_fused_kernel(a):
    edited = a.temperature(3.0, heads=[2])
    others = [0, 1, 3]
    assert torch.equal(edited.output()[:, others], a.output()[:, others])
    assert not torch.equal(edited.output()[:, 2], a.output()[:, 2])


def test_the_original_is_unchanged(a):
    before = a.pattern(), a.output().clone()
    a.bias(3.0).rescale(torch.arange(TOKENS) == 1, 0.0).output()
    assert a.edits == ()
    assert torch.equal(a.pattern(), before[0]) and torch.equal(a.output(), before[1])


def test_the_lse_is_that_of_edited_logits(a):
    expected = by_hand(a, lambda s, b, h, i, j: s / 2).lse
    real = a.real_queries
    ours = a.temperature(2.0).lse
    assert_close(ours.transpose(1, 2)[real], expected.transpose(1, 2)[real], **TOLERANCE)


@pytest.mark.parametrize("name", ["causal", "left padding", "sink logits", "decoding"])
def test_gradients_pass_through_edits(name):
    def leaves():
        made = CASES[name]()
        named = {key: getattr(made, key).clone().requires_grad_() for key in "qkv"}
        return replace(made, **named), named, torch.tensor(0.7, requires_grad=True)

    keys = torch.arange(TOKENS) == 2
    ours, our_leaves, factor = leaves()
    ours.temperature(1.5, heads=[1]).rescale(keys, factor, heads=[0, 1]).output().pow(
        2
    ).sum().backward()
    dense, dense_leaves, dense_factor = leaves()
    expected = by_hand(
        dense,
        lambda s, b, h, i, j: s / 1.5 if h == 1 else s,
        lambda row, b, h, i: rescaled(row, keys, ~keys, dense_factor) if h < 2 else row,
    )
    real = dense.real_queries[:, None, :, None]
    (expected.z * real).pow(2).sum().backward()
    assert_close(factor.grad, dense_factor.grad, atol=1e-5, rtol=1e-4)
    for key in "qkv":
        assert_close(our_leaves[key].grad, dense_leaves[key].grad, atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("axis", ["heads", "queries", "keys"])
def test_an_index_out_of_range_is_named(axis):
    with pytest.raises(IndexError, match=f"{axis}=\\[9\\]"):
        random_attention().bias(1.0, **{axis: [9]})
