"""`Attention` alone, against attention written from its definition (tests/model/by_hand.py)."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from interp.model import attention as attention_module
from tests.model.by_hand import BATCH, CASES, HEADS, TOKENS, by_hand, causally, random_attention

TOLERANCE = {"atol": 2e-6, "rtol": 1e-5}


@pytest.fixture(params=["one row a block", "one block"])
def block_size(request, monkeypatch):
    if request.param == "one row a block":
        monkeypatch.setattr(attention_module, "BLOCK_ELEMENTS", 1)
        monkeypatch.setattr(attention_module, "TILE_ELEMENTS", 1)


@pytest.fixture(params=CASES)
def a(request, block_size):
    """Each kind of attention, in blocks of one row and all at once."""
    return CASES[request.param]()


def real_rows(a, values):
    """Rows of padding mean nothing: compare without them."""
    return values.transpose(1, 2)[a.real_queries]


def test_pattern_and_lse_and_z_are_the_definition(a):
    expected = by_hand(a)
    assert_close(real_rows(a, a.pattern()), real_rows(a, expected.pattern), **TOLERANCE)
    assert_close(real_rows(a, a.lse), real_rows(a, expected.lse), **TOLERANCE)
    assert_close(real_rows(a, a.output()), real_rows(a, expected.z), **TOLERANCE)


def test_rows_of_padding_have_no_weights_and_no_numbers_that_spread():
    a = CASES["left padding"]()
    assert not a.pattern()[1, :, :2].any()
    assert a.output().isfinite().all() and a.lse.isfinite().all()


@pytest.mark.parametrize(
    "chosen",
    [
        {"heads": [2]},
        {"heads": [3, 0]},
        {"keys": [5, 1, 1]},
        {"keys": slice(1, 3)},
        {"queries": [-1]},
        {"heads": torch.tensor([1, 2]), "queries": slice(0, 1), "keys": [0]},
    ],
    ids=str,
)
def test_a_block_of_the_pattern_is_that_part_of_the_whole(a, chosen):
    part = by_hand(a).pattern
    for axis, name in ((1, "heads"), (2, "queries"), (3, "keys")):
        index = torch.arange(part.shape[axis])[chosen.get(name, slice(None))]
        part = part.index_select(axis, index)
    ours = a.pattern(**chosen)
    rows = a.real_queries[:, torch.arange(a.n_queries)[chosen.get("queries", slice(None))]]
    assert_close(ours.transpose(1, 2)[rows], part.transpose(1, 2)[rows], **TOLERANCE)


@pytest.mark.parametrize("name", ["causal", "left padding", "soft-capped", "sink logits"])
def test_queries_in_any_order(name, block_size):
    a = CASES[name]()
    order = [6, 2, 4]
    assert_close(a.pattern(queries=order), by_hand(a).pattern[:, :, order], **TOLERANCE)
    assert a.pattern(queries=[]).shape == (BATCH, HEADS, 0, TOKENS)
    assert a.pattern(heads=[]).shape == (BATCH, 0, TOKENS, TOKENS)


def test_a_selection_of_flags_means_the_flagged():
    a = random_attention()
    flags = torch.tensor([False, True, False, True])
    assert_close(a.pattern(heads=flags), a.pattern(heads=[1, 3]))


@pytest.mark.parametrize("axis, size", [("heads", 4), ("queries", 7), ("keys", 7)])
def test_an_index_out_of_range_is_named(axis, size):
    with pytest.raises(IndexError, match=f"{axis}.*0-{size - 1}"):
        random_attention().pattern(**{axis: [size]})


def test_mass_received_is_the_mean_over_the_real_queries_that_may_see_the_key(a):
    pattern = by_hand(a).pattern
    seen = [
        [[may for i in range(a.n_queries) if (may := visible(a, b, i, j))] for j in range(TOKENS)]
        for b in range(BATCH)
    ]
    counts = torch.tensor([[len(key) for key in prompt] for prompt in seen])
    assert_close(a.queries_per_key(), counts)
    total = (pattern * a.real_queries[:, None, :, None]).sum(2)
    received = a.mass_received()
    for b in range(BATCH):
        for j in range(TOKENS):
            if counts[b, j]:
                assert_close(received[b, :, j], total[b, :, j] / counts[b, j], **TOLERANCE)
            else:
                assert received[b, :, j].isnan().all()


def visible(a, b, i, j):
    from tests.model.by_hand import may_see

    return bool(a.real_queries[b, i]) and bool(a.real_keys[b, j]) and may_see(a, b, i, j)


def test_row_statistics_are_those_of_the_pattern(a):
    pattern = by_hand(a).pattern
    real = a.real_queries[:, None, :, None]
    assert_close(a.largest_received(), (pattern * real).amax(2), **TOLERANCE)

    entropy = -(pattern * pattern.clamp_min(1e-30).log()).sum(-1)
    assert_close(real_rows(a, a.entropy()), real_rows(a, entropy), **TOLERANCE)
    assert a.entropy().transpose(1, 2)[~a.real_queries].isnan().all()

    weights, keys = a.top_keys(3)
    assert_close(real_rows(a, weights), real_rows(a, pattern.topk(3).values), **TOLERANCE)
    at_keys = real_rows(a, pattern.gather(-1, keys))
    assert_close(at_keys, real_rows(a, weights), **TOLERANCE)

    chosen = torch.rand(BATCH, TOKENS) > 0.5
    on_chosen = (pattern * chosen[:, None, None]).sum(-1)
    assert_close(real_rows(a, a.mass_on(chosen)), real_rows(a, on_chosen), **TOLERANCE)
    assert_close(a.mass_on(chosen, heads=[3, 1]), a.mass_on(chosen)[:, [3, 1]])


def test_statistics_of_some_heads_are_those_of_all(a):
    heads = [3, 1]
    for name in ("mass_received", "largest_received", "entropy"):
        whole = getattr(a, name)()[:, heads]
        assert_close(getattr(a, name)(heads), whole, equal_nan=True, msg=name)


def test_top_keys_cannot_be_more_than_there_are():
    with pytest.raises(IndexError, match="k=8.*1-7"):
        random_attention().top_keys(8)


def test_mass_on_may_differ_by_row():
    a = random_attention()
    keys = torch.rand(BATCH, HEADS, TOKENS, TOKENS) > 0.5
    assert_close(a.mass_on(keys, heads=[2, 0]), (by_hand(a).pattern * keys).sum(-1)[:, [2, 0]])


def with_gradients(a):
    leaves = {name: getattr(a, name).clone().requires_grad_() for name in "qkv"}
    return replace(a, **leaves), leaves


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("looked_first", [False, True])
def test_gradients_are_those_of_the_dense_pattern(name, looked_first):
    """Also where somebody read a statistic without gradients before."""
    ours, our_leaves = with_gradients(CASES[name]())
    dense, leaves = with_gradients(CASES[name]())
    weight = torch.randn(ours.n_queries, TOKENS) * ours.real_queries[:, None, :, None]
    if looked_first:
        with torch.no_grad():
            ours.mass_received(), ours.lse, ours.output(), ours.pattern()
    expected = by_hand(dense)
    z_weight = torch.randn_like(expected.z) * ours.real_queries[:, None, :, None]
    lse_weight = weight.sum(-1).expand_as(expected.lse)

    def loss(pattern, z, lse):
        seen = torch.where(lse_weight != 0, lse, 0.0)
        return (pattern * weight).sum() + (z * z_weight).sum() + (seen * lse_weight).sum()

    loss(expected.pattern, expected.z, expected.lse).backward()
    loss(ours.pattern(), ours.output(), ours.lse).backward()
    for leaf in "qkv":
        assert_close(our_leaves[leaf].grad, leaves[leaf].grad, atol=1e-5, rtol=1e-4, msg=leaf)


def test_the_fused_kernel_is_refused_where_its_lse_would_need_a_gradient():
    ours, _ = with_gradients(random_attention())
    assert ours._fused is None
    with torch.no_grad():
        assert replace(random_attention())._fused is not None


def test_bfloat16_is_as_near_as_its_own_rounding(block_size):
    for name in ("causal", "left padding", "sink logits", "decoding"):
        a = CASES[name](dtype=torch.bfloat16)
        expected = by_hand(a)
        assert a.pattern().dtype == torch.float32 and a.output().dtype == torch.bfloat16
        assert_close(
            real_rows(a, a.pattern()), real_rows(a, expected.pattern), atol=1e-4, rtol=1e-3
        )
        z = real_rows(a, a.output()).float()
        assert_close(z, real_rows(a, expected.z), atol=2e-2, rtol=2e-2)


def test_scores_and_the_pattern_of_scores(a):
    assert_close(a.pattern_of(a.scores()), a.pattern(), **TOLERANCE)
    lowest = torch.finfo(torch.float32).min
    for b in range(BATCH):
        hidden = [(i, j) for i in range(a.n_queries) for j in range(TOKENS) if a.mask is not None]
        for i, j in hidden:
            if a.mask.dtype == torch.bool and not a.mask[b, 0, i, j]:
                assert (a.scores()[b, :, i, j] == lowest).all()


def test_values_may_be_wider_than_keys():
    a = random_attention()
    wide = replace(a, v=torch.randn(BATCH, 2, TOKENS, 11))
    assert_close(wide.output(), by_hand(wide).z, **TOLERANCE)


def test_a_mask_may_be_the_same_for_all_queries():
    a = CASES["both ways, padded"]()
    narrow = replace(a, mask=a.mask[:, :, :1])
    assert_close(narrow.pattern(), a.pattern())
    assert_close(narrow.mass_received(), a.mass_received(), equal_nan=True)


def test_no_query_is_said_to_see_padding():
    a = random_attention(padding=2)  # its mask hides none: slots of a cache that are not filled
    assert a.queries_per_key().tolist() == [[7, 6, 5, 4, 3, 2, 1], [0, 0, 5, 4, 3, 2, 1]]


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that anything makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            # an expanded view takes no memory
            if torch.is_tensor(value) and value.untyped_storage().nbytes() > 0:
                size = min(value.numel(), value.untyped_storage().nbytes() // value.itemsize)
                self.elements = max(self.elements, size)
        return out


def test_no_statistic_holds_the_matrix(monkeypatch):
    n = 3000
    monkeypatch.setattr(attention_module, "BLOCK_ELEMENTS", 1 << 18)
    monkeypatch.setattr(attention_module, "TILE_ELEMENTS", 1 << 16)
    q, k = torch.randn(1, 2, n, 4), torch.randn(1, 1, n, 4)
    where, real = torch.arange(n)[None], torch.ones(1, n, dtype=torch.bool)
    a = attention_module.Attention(q, k, k, 0.5, where, where, real, real)
    for name in ("mass_received", "largest_received", "entropy", "output", "queries_per_key"):
        with Largest() as largest:
            getattr(a, name)()
        assert largest.elements < n * n / 20, name
    with Largest() as largest:
        a.top_keys(2), a.mass_on(torch.arange(n) < 3), a.pattern(queries=[n - 1])
        a.temperature(2.0, heads=[1]).rescale(torch.arange(n) < 3, 0.5, heads=[0]).output()
    assert largest.elements < n * n / 20


shapes = st.tuples(
    st.integers(1, 2), st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]), st.integers(1, 9)
)


@given(shapes, st.integers(0, 8), st.sampled_from([None, 1.0, 30.0]), st.booleans(), st.integers(1))
def test_invariants(shape, padding, softcap, sinks, seed):
    batch, (heads, kv_heads), n = shape
    padding = min(padding, n - 1)
    generator = torch.Generator().manual_seed(seed % 1000)
    q = torch.randn(batch, heads, n, 4, generator=generator) * 3
    k = torch.randn(batch, kv_heads, n, 4, generator=generator) * 3
    real = torch.ones(batch, n, dtype=torch.bool)
    real[-1, :padding] = False
    positions = (real.cumsum(1) - 1).clamp_min(0)
    mask = None
    if padding:
        mask = torch.ones(n, n, dtype=torch.bool).tril() & real[:, None, None]
    sink_logits = torch.zeros(1, heads, 1) if sinks else None
    a = attention_module.Attention(
        q, k, k, 0.5, positions, positions, real, real, mask,
        softcap=softcap, sink_logits=sink_logits,
    )  # fmt: skip
    sums = a.pattern().sum(-1)
    rows = real[:, None].expand_as(sums)
    if sinks:
        assert (sums[rows] <= 1 + 1e-4).all()
    else:
        assert_close(sums[rows], torch.ones_like(sums[rows]))
        # what keys receive is what rows give
        given_away = (a.queries_per_key()[:, None] * a.mass_received()).nansum(-1)
        assert_close(given_away, real.sum(1)[:, None].expand_as(given_away).float())
    received = a.mass_received()
    assert (received.isnan() == ~real[:, None]).all()  # each real key sees itself
    assert ((received >= 0) & (received <= 1 + 1e-4))[real[:, None].expand_as(received)].all()
    entropy = a.entropy()
    assert (entropy.isnan() == ~rows).all()
    most = (positions + 1).clamp_min(1).log()[:, None].expand_as(entropy)
    bound = math.log(math.e) if sinks else 0  # the sink's share of mass leaves up to 1/e a key out
    assert (entropy[rows] >= -1e-5).all() and (entropy[rows] <= most[rows] + bound + 1e-5).all()


def test_the_last_row_is_decoding_s_row():
    """A step with a cache sees what the same row of a full pass sees."""
    full = random_attention(mask=causally)
    step = replace(
        full, q=full.q[:, :, -1:], mask=None, causal=False,
        positions=full.positions[:, -1:], real_queries=full.real_queries[:, -1:],
    )  # fmt: skip
    assert_close(step.pattern(), full.pattern(queries=[-1]), **TOLERANCE)
    assert_close(step.output(), full.output()[:, :, -1:], **TOLERANCE)
