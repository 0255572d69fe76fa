"""Rotation undone and done anew, and positions given to queries by groups of keys."""

from copy import deepcopy
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import DynamicCache

from interp.model import attention as attention_module
from interp.model.edits import EditError
from interp.model.hooked import load
from interp.model.places import Groups
from interp.model.rotary import RotaryError, rotary_function
from tests.intervention.roped import FAMILIES, before_rotation, roped, turned
from tests.model.families import GROUPED
from tests.tiny import fresh, random_ids, tiny

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
PROMPTS = random_ids(9, 6, seed=4)


@torch.no_grad()
def attentions(model, prompts=PROMPTS, names=(), layer=1):
    """The layer's `Attention` on a left-padded batch, and the values of hooks."""
    batch, kept = model.batch(prompts), {}
    hooks = [
        (f"blocks.{layer}.attn.{name}", lambda value, hook, n=name: kept.__setitem__(n, value))
        for name in ("hook_attention", *names)
    ]
    with model.hooks(fwd_hooks=hooks):
        model(batch.input_ids, attention_mask=batch.attention_mask)
    return kept["hook_attention"], *(kept[name] for name in names)


def heads_first(value, n_queries):
    return value if value.shape[2] == n_queries else value.transpose(1, 2)


ROTATING = [*FAMILIES, "mistral", "gemma3", "gpt_oss", "phi3", "olmo2"]


@pytest.mark.parametrize("family", ROTATING)
def test_rotating_what_was_undone_gives_q_and_k(family):
    attention, *_ = attentions(roped(family) if family in FAMILIES else tiny(family))
    real = attention.real_keys[:, None].expand(-1, attention.k.shape[1], -1)
    again = attention.rotate(attention.k_unrotated, attention.key_positions)
    assert_close(again[real], attention.k[real], **TOLERANCE)
    assert_close(
        attention.rotate(attention.q_unrotated, attention.positions), attention.q, **TOLERANCE
    )
    # each vector at a position of its own, and all heads at the same
    per_head = attention.positions[:, None].expand(attention.q.shape[:3])
    assert_close(attention.rotate(attention.q_unrotated, per_head), attention.q, **TOLERANCE)
    assert (attention.q_unrotated - attention.q).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_before_rotation_it_is_what_the_projections_gave(family):
    attention, q, k = attentions(roped(family), names=before_rotation(family))
    real = attention.real_queries
    for ours, theirs in ((attention.q_unrotated, q), (attention.k_unrotated, k)):
        theirs = heads_first(theirs, len(PROMPTS[0]))
        assert_close(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_turns_as_the_definition_says(family):
    attention, *_ = attentions(roped(family))
    x = torch.randn(2, 3, 5, 8)
    positions = torch.randint(-20, 40, (2, 3, 5))
    expected = torch.stack([
        turned(vector, int(at), family) for vector, at in zip(x.view(-1, 8), positions.flatten())
    ])  # fmt: skip
    assert_close(attention.rotate(x, positions).view(-1, 8), expected, **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_out_of_the_cache_are_turned_back_too(family):
    model, k_name = roped(family), before_rotation(family)[1]
    batch = model.batch(PROMPTS)
    ids, mask = batch.input_ids, batch.attention_mask
    seen, steps = [], []
    hooks = [(f"blocks.1.attn.{k_name}", lambda k, hook: seen.append(k)),
             ("blocks.1.attn.hook_attention", lambda a, hook: steps.append(a))]  # fmt: skip
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model.original_model.generate(
            ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
    known = torch.cat([heads_first(k, 9 if n == 0 else 1) for n, k in enumerate(seen)], dim=2)
    last = steps[-1]
    real = last.real_keys[:, None].expand(-1, known.shape[1], -1)
    assert last.n_queries == 1 and last.n_keys == 12
    assert_close(last.k_unrotated[real], known[real], **TOLERANCE)


def test_positions_that_count_padding_are_known():
    """Called without position_ids, models count the padding, too: the same q and k come back."""
    model = roped("llama")
    batch, kept = model.batch(PROMPTS), {}
    hooks = [(f"blocks.0.attn.{name}", lambda v, hook, n=name: kept.__setitem__(n, v))
             for name in ("hook_attention", "hook_q")]  # fmt: skip
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model.original_model(batch.input_ids, attention_mask=batch.attention_mask)
    attention = kept["hook_attention"]
    assert attention.rotary.offset.tolist() == [[0], [3]]
    assert attention.positions[1].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5]
    real = batch.attention_mask.bool()
    assert_close(attention.q_unrotated.transpose(1, 2)[real], kept["hook_q"][real], **TOLERANCE)
    assert_close(
        attention.rotate(attention.q_unrotated, attention.positions).transpose(1, 2)[real],
        attention.q.transpose(1, 2)[real], **TOLERANCE,
    )  # fmt: skip


def test_scaled_angles_are_undone():
    """YaRN makes cos and sin larger than a rotation has them."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 16}  # fmt: skip
    torch.manual_seed(0)
    config = hf.LlamaConfig(**GROUPED, rope_parameters=rope)
    model = load(hf.LlamaForCausalLM(config).eval())
    kept = {}
    hooks = [(f"blocks.0.attn.{name}", lambda v, hook, n=name: kept.__setitem__(n, v))
             for name in ("hook_attention", "hook_q")]  # fmt: skip
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(torch.tensor([PROMPTS[0]]))
    attention = kept["hook_attention"]
    assert attention.q.norm() > 1.05 * attention.q_unrotated.norm()
    assert_close(attention.q_unrotated.transpose(1, 2), kept["hook_q"], **TOLERANCE)
    again = attention.rotate(attention.q_unrotated, attention.positions)
    assert_close(again, attention.q, **TOLERANCE)


def test_bf16_is_undone_to_its_own_rounding():
    attention, q = attentions(roped("llama", torch.bfloat16), names=["hook_q"])
    assert attention.q_unrotated.dtype == torch.float32
    real = attention.real_queries
    ours, theirs = attention.q_unrotated.transpose(1, 2)[real], q[real].float()
    assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "gptj"])
def test_models_without_rotation_say_so(family):
    attention, *_ = attentions(tiny(family))
    assert attention.rotary is attention.q_unrotated is attention.k_unrotated is None
    with pytest.raises(RotaryError, match="not known to turn.*learned positions"):
        attention.rotate(attention.q, attention.positions)
    with pytest.raises(RotaryError, match="not known to turn"):
        attention.reposition(attention.key_positions * 0, torch.zeros(2, 1, 9, 1).long())


@pytest.mark.parametrize(
    "module, kind",
    [
        ("smollm3", "SmolLM3Attention"),  # in some layers only
        ("hunyuan_v1_dense", "HunYuanDenseV1Attention"),  # a norm with gains follows
        ("ministral3", "Ministral3Attention"),  # a scale by position follows
        ("gptj", "GPTJAttention"),  # by itself, parts of q and k
        ("phi", "PhiAttention"),
    ],
)
def test_classes_that_do_more_than_rotate_have_none(module, kind):
    found = import_module(f"transformers.models.{module}.modeling_{module}")
    assert rotary_function(getattr(found, kind)) is None


def test_angles_that_change_with_length_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = hf.LlamaConfig(**GROUPED, rope_parameters=rope)
    attention, *_ = attentions(load(hf.LlamaForCausalLM(config).eval()))
    with pytest.raises(RotaryError, match="'dynamic'.*how long the text is"):
        attention.rotate(attention.q, attention.positions)


def test_angles_that_a_hook_changed_are_refused():
    model = roped("llama")
    change = model.hooks(fwd_hooks=[("blocks.1.attn.hook_cos", lambda cos, hook: cos * 0.9)])
    with change:
        attention, *_ = attentions(model)
    with pytest.raises(RotaryError, match="none that a rotary module"):
        attention.q_unrotated  # noqa: B018


def test_position_ids_with_a_jump_are_refused():
    model = roped("llama")
    kept = []
    look = model.hooks(fwd_hooks=[("blocks.0.attn.hook_attention", lambda a, hook: kept.append(a))])
    with torch.no_grad(), look:
        model(torch.tensor([PROMPTS[1]]), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
        model(torch.tensor([PROMPTS[1]]), position_ids=torch.tensor([[4, 5, 6, 7, 8, 9]]))
    with pytest.raises(RotaryError, match="position_ids"):
        kept[0].q_unrotated  # noqa: B018
    assert kept[1].rotary.offset.item() == 4


def test_nothing_is_computed_before_somebody_asks(monkeypatch):
    model = fresh("llama")
    rotary = model.original_model.model.rotary_emb.original_component
    calls, forward = [], rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    attention, *_ = attentions(model)
    assert len(calls) == 1  # the model's own
    attention.output(), attention.pattern(), attention.mass_received()
    assert len(calls) == 1
    attention.q_unrotated  # noqa: B018
    assert len(calls) == 2


def test_a_copy_of_a_model_has_rotations_of_its_own():
    model = fresh("llama")
    attentions(model)
    copied = deepcopy(model)
    copied.original_model.model.rotary_emb.original_component.inv_freq.mul_(0.5)
    attention, q = attentions(copied, names=["hook_q"])
    real = attention.real_queries
    assert_close(attention.q_unrotated.transpose(1, 2)[real], q[real], **TOLERANCE)
    plain, q = attentions(model, names=["hook_q"])
    assert_close(plain.q_unrotated.transpose(1, 2)[real], q[real], **TOLERANCE)
    assert (plain.q - attention.q).abs().max() > 1e-2


# Positions by groups of keys


@given(group=st.lists(st.lists(st.integers(-1, 3), min_size=7, max_size=7), min_size=1, max_size=3))
def test_groups_hold_each_key_once(group):
    group = torch.tensor(group)
    groups = Groups.of(group, 4)
    x = torch.arange(7.0).expand(len(group), 2, 7)[..., None] + 0.0
    gathered = groups.gather(x)
    for row in range(len(group)):
        for g in range(4):
            keys = (group[row] == g).nonzero().flatten().tolist()
            assert groups.columns[row, g][groups.real[row, g]].tolist() == keys
            assert gathered[row, 1, g, :, 0][groups.real[row, g]].tolist() == keys
        for key, slot in enumerate(groups.slot[row].tolist()):
            assert (slot == -1) == (group[row, key] == -1)
            if slot >= 0:
                assert groups.columns[row].flatten()[slot] == key


def placed_by_hand(attention, family, group, at, base, seen):
    """Pattern, weight by weight, with each key turned back and every query turned to its place."""
    batch, heads, queries = attention.q.shape[:3]
    share = heads // attention.k.shape[1]
    pattern = torch.zeros(batch, heads, queries, attention.n_keys)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (batch, heads, queries))).tolist():
        if not attention.real_queries[b, i]:
            continue
        logits = {}
        for j in range(attention.n_keys):
            g = int(group[b, j])
            hidden = not attention.real_keys[b, j] or j > i + attention.n_keys - queries
            if hidden or (g >= 0 and seen is not None and not seen[b, h, i, g]):
                continue
            place = at[b, h, i, g] if g >= 0 else base[b, h, i]
            query = turned(attention.q_unrotated[b, h, i], int(place), family)
            s = attention.scale * (query @ attention.k[b, h // share, j].float())
            cap = attention.softcap
            logits[j] = s if cap is None else torch.tanh(s / cap) * cap
        if logits:
            pattern[b, h, i, list(logits)] = torch.stack(list(logits.values())).softmax(0)
    return pattern


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@given(seed=st.integers(0, 999))
@settings(max_examples=4)
def test_new_places_are_the_definition(family, hides, seed):
    torch.manual_seed(seed)
    attention, *_ = attentions(roped(family))
    group = torch.randint(-1, 3, (2, 9))
    at = torch.randint(-5, 20, (2, 4, 9, 3))
    base = torch.randint(-5, 20, (2, 4, 9))
    seen = torch.rand(2, 4, 9, 3) > 0.4 if hides else None
    placed = attention.reposition(group, at, base, seen)
    expected = placed_by_hand(attention, family, group, at, base, seen)
    real = attention.real_queries
    before = attention_module.BLOCK_ELEMENTS
    try:
        for attention_module.BLOCK_ELEMENTS in (1, before):
            ours = replace(placed)  # without what was kept
            found = ours.pattern()
            assert_close(found.transpose(1, 2)[real], expected.transpose(1, 2)[real], **TOLERANCE)
            z = (expected @ ours.per_query_head(ours.v).float()).transpose(1, 2)
            assert_close(ours.output().transpose(1, 2)[real], z[real], **TOLERANCE)
            assert_close(ours.pattern(heads=[2]), found[:, 2:3])
            assert_close(ours.pattern_of(ours.scores()), found, **TOLERANCE)
    finally:
        attention_module.BLOCK_ELEMENTS = before


def test_one_place_for_all_heads_and_none_for_the_rest():
    attention, *_ = attentions(roped("llama"))
    group = torch.zeros(2, 9).long()
    at = torch.randint(0, 9, (2, 1, 9, 1))
    same = attention.reposition(group, at)
    each = attention.reposition(group, at.expand(-1, 4, -1, -1))
    assert_close(same.pattern(), each.pattern(), **TOLERANCE)
    own = attention.reposition(group, attention.positions[:, None, :, None])
    assert_close(own.pattern(), attention.pattern(), **TOLERANCE)
    assert_close(own.output(), attention.output(), **TOLERANCE)
    assert (same.pattern() - attention.pattern()).abs().max() > 0.05


def test_edits_follow_new_places():
    attention, *_ = attentions(roped("llama"))
    group, at = torch.zeros(2, 9).long(), torch.randint(0, 9, (2, 4, 9, 1))
    placed = attention.reposition(group, at)
    edited = placed.temperature(2.0, heads=[1]).rescale(torch.arange(9) == 3, 0.5, heads=[2])
    flat = (placed.scores()[:, 1] / 2).softmax(-1)
    real = attention.real_queries
    assert_close(edited.pattern(heads=[1])[:, 0][real], flat[real], **TOLERANCE)
    assert_close(edited.pattern(heads=[0, 3]), placed.pattern(heads=[0, 3]), **TOLERANCE)
    assert_close(
        edited.output()[:, [0, 3]].transpose(1, 2)[real],
        placed.output()[:, [0, 3]].transpose(1, 2)[real], **TOLERANCE,
    )  # fmt: skip
    with pytest.raises(EditError, match="do it first"):
        edited.reposition(group, at)
    with pytest.raises(EditError, match="do it first"):
        placed.reposition(group, at)


def test_gradients_pass_through_new_places():
    attention, *_ = attentions(roped("llama"), PROMPTS[:1])
    q = attention.q.clone().requires_grad_()
    group, at = torch.zeros(1, 9).long(), torch.randint(0, 9, (1, 4, 9, 1))
    placed = replace(attention, q=q).reposition(group, at)
    weight = torch.randn(1, 4, 9, 8)
    (placed.output() * weight).sum().backward()
    step = torch.randn_like(q)

    def loss(x):
        with torch.no_grad():
            return float((replace(placed, q=x).output().double() * weight).sum())

    numeric = (loss(q.detach() + 1e-2 * step) - loss(q.detach() - 1e-2 * step)) / 2e-2
    assert float((q.grad * step).sum()) == pytest.approx(numeric, rel=2e-2)


def test_a_cache_is_left_as_it_is():
    """Keys keep their own positions, so what is cached is what the plain model caches."""
    model = roped("llama")
    ids = torch.tensor([PROMPTS[0]])

    def place(attention, hook):
        group = torch.zeros_like(attention.key_positions)
        return attention.reposition(group, attention.positions[:, None, :, None] * 0)

    plain, placed = DynamicCache(), DynamicCache()
    with torch.no_grad():
        model.original_model(ids, cache=plain)
        with model.hooks(fwd_hooks=[("blocks.0.attn.hook_attention", place)]):
            model.original_model(ids, cache=placed)
    assert torch.equal(plain.layers[0].keys, placed.layers[0].keys)
