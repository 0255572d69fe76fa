"""Every family: the lazy bridge says what Hugging Face's eager attention and the eager bridge say.

A sample of families runs with the quick tests, all of them with the slow ones.
"""

import warnings
from contextlib import contextmanager
from copy import deepcopy
from functools import cache

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from interp.model import attention as attention_module
from interp.model import hooked
from interp.model.edits import EditError
from interp.model.hooked import load
from tests.model.families import (
    DECODERS,
    EAGER_ONLY,
    FAMILIES,
    build,
    inputs,
    small_tokenizer,
)

QUICK = ("gpt2", "llama", "gpt_neox", "gemma2")
WINDOWED = ("mistral", "gemma2", "gemma3", "gpt_oss")
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def families(names, quick=QUICK):
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in names]


@pytest.fixture(params=families(FAMILIES))
def name(request):
    return request.param


@pytest.fixture(params=families(DECODERS))
def decoder(request):
    return request.param


@cache
def ours(name):
    return load(build(name))


@cache
def eager_bridge(name):
    model = build(name)
    return build_bridge_from_module(
        model, type(model).__name__, hf_config=deepcopy(model.config), tokenizer=None,
        model_name=name,
    )  # fmt: skip


@cache
def eager(name):
    """Hugging Face's own logits and attentions."""
    with torch.no_grad():
        return build(name)(**inputs(name), output_attentions=True)


def run(model, x, **kwargs):
    """A bridge's forward pass, whose first argument goes by position."""
    x = dict(x)
    first = x.pop("input_ids") if "input_ids" in x else x.pop("pixel_values")
    with torch.no_grad():
        return model(first, **x, **kwargs)


def real_tokens(name, n_rows):
    """Flags of the rows of a batch that are no padding."""
    mask = inputs(name).get("attention_mask")
    if mask is None or mask.shape[1] != n_rows:
        return torch.ones(2, n_rows, dtype=torch.bool)
    return mask.bool()


def of_real_tokens(name, logits):
    return logits[real_tokens(name, logits.shape[1])] if logits.dim() == 3 else logits


def of_real_rows(name, pattern):
    return pattern.transpose(1, 2)[real_tokens(name, pattern.shape[2])]


def attn_hooks(model, point):
    return [f"blocks.{layer}.attn.{point}" for layer in model.attention_layers]


def patterns(model, x, point, read=lambda value: value):
    """What `read` says of a hook's value in each layer."""
    found = {}
    hooks = [
        (hook, lambda value, hook: found.__setitem__(hook.name, read(value)))
        for hook in attn_hooks(model, point)
    ]
    with model.hooks(fwd_hooks=hooks):
        run(model, x)
    return list(found.values())


def test_it_is_lazy(name):
    assert ours(name).lazy


def test_logits_are_hugging_face_s(name):
    logits = run(ours(name), inputs(name))
    assert_close(
        of_real_tokens(name, logits), of_real_tokens(name, eager(name).logits), **TOLERANCE
    )


def test_logits_are_hugging_face_s_while_somebody_looks(name):
    model = ours(name)
    for point in ("hook_attention", "hook_pattern", "hook_attn_scores", "hook_z"):
        hooks = [(hook, lambda value, hook: None) for hook in attn_hooks(model, point)]
        with model.hooks(fwd_hooks=hooks):
            logits = run(model, inputs(name))
        theirs = of_real_tokens(name, eager(name).logits)
        assert_close(of_real_tokens(name, logits), theirs, **TOLERANCE, msg=point)


def test_bfloat16_is_within_its_own_rounding(name):
    x = inputs(name)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in x.items()}
    exact = of_real_tokens(name, eager(name).logits)
    with torch.no_grad():
        theirs = of_real_tokens(name, build(name, dtype=torch.bfloat16)(**half).logits.float())
    model = load(build(name, dtype=torch.bfloat16))
    halves = of_real_tokens(name, run(model, half).float())
    # as far from float32 as Hugging Face's own bfloat16 is
    assert (halves - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean() + 1e-3
    for ours_, exact_ in zip(
        patterns(model, half, "hook_attention", lambda a: a.pattern()), eager(name).attentions
    ):
        error = (of_real_rows(name, ours_) - of_real_rows(name, exact_)).abs().mean()
        assert error < 0.03


@pytest.mark.parametrize("point", ["hook_pattern", "hook_attention"])
def test_patterns_are_hugging_face_s(name, point):
    read = (lambda a: a.pattern()) if point == "hook_attention" else (lambda pattern: pattern)
    found = patterns(ours(name), inputs(name), point, read)
    assert len(found) == len(eager(name).attentions[: len(found)])
    for pattern, theirs in zip(found, eager(name).attentions):
        assert_close(of_real_rows(name, pattern), of_real_rows(name, theirs), **TOLERANCE)


def test_padding_is_known_in_every_layer(name):
    x = inputs(name)
    for a in patterns(ours(name), x, "hook_attention"):
        real = real_tokens(name, a.n_queries)
        assert torch.equal(a.real_queries, real) and torch.equal(a.real_keys, real)
        if "position_ids" in x:
            assert torch.equal(a.positions, x["position_ids"])


def test_statistics_are_those_of_hugging_face_s_pattern(name):
    model, x = ours(name), inputs(name)
    found = patterns(model, x, "hook_attention", lambda a: (a.mass_received(), a.entropy()))
    for (received, entropy), theirs in zip(found, eager(name).attentions):
        real = real_tokens(name, theirs.shape[2])
        total = (theirs * real[:, None, :, None]).sum(2)
        some = ~received.isnan()
        counts = (total / received)[some & (total > 1e-4)]
        assert_close(counts, counts.round(), atol=1e-2, rtol=0)  # a whole number of queries
        if name in DECODERS and name not in WINDOWED:
            expected = dense_received(theirs, real)
            assert_close(received[some], expected[some], **TOLERANCE)
        assert_close(
            of_real_rows(name, entropy[..., None])[..., 0],
            of_real_rows(name, torch.special.entr(theirs).sum(-1)[..., None])[..., 0],
            atol=1e-4, rtol=1e-4,
        )  # fmt: skip


# What the eager bridge caches and we don't, or otherwise, and why.
GATED = ("hook_mlp_in", "hook_attn_in")  # fire in the eager bridge although their gate is shut
HEADS_BEHIND = ("q_norm.", "k_norm.")  # [batch pos head d] as the wrapped module has it


DELEGATED = ("bert", "vit", "opt", "gptj")


def delegates(name, hook):
    """Where the eager bridge shows Hugging Face's pattern as hook_attn_scores, too."""
    delegated = hook.startswith("vision_encoder") or name in DELEGATED
    return delegated and hook.endswith("hook_attn_scores")


def test_all_that_the_eager_bridge_caches_is_cached_and_equal(name):
    x = inputs(name)
    first = "input_ids" if "input_ids" in x else "pixel_values"
    caches = []
    for model in (ours(name), eager_bridge(name)):
        with torch.no_grad():
            caches.append(model.run_with_cache(x[first], **{k: x[k] for k in x if k != first})[1])
    for hook, theirs in caches[1].items():
        if hook.endswith(GATED) or delegates(name, hook):
            continue
        assert hook in caches[0], hook
        value = caches[0][hook]
        if any(part in hook for part in HEADS_BEHIND) and value.shape != theirs.shape:
            value = value.transpose(1, 2)
        assert value.shape == theirs.shape, hook
        if hook.endswith("hook_attn_scores"):
            seen = (theirs > -1e30) & (value > -1e30)
            value, theirs = value * seen, theirs.clamp_min(-1e30) * seen
        by_head = value.dim() == 4 and value.shape[2] == 12 and value.shape[1] in (2, 4)
        if by_head:
            value, theirs = value.transpose(1, 2), theirs.transpose(1, 2)
        if len(value) == 24:  # OPT flattens batch and positions
            value, theirs = value.view(2, 12, -1), theirs.view(2, 12, -1)
        if value.dim() > 1 and value.shape[:2] == (2, 12):
            value, theirs = (v[real_tokens(name, 12)] for v in (value, theirs))
        assert_close(value, theirs, atol=1e-4, rtol=1e-4, msg=lambda m, hook=hook: f"{hook}: {m}")


ZEROED = (
    "hook_q", "hook_k", "hook_v", "hook_z", "hook_pattern", "hook_rot_q", "hook_rot_k",
    "hook_q_normed", "hook_k_normed", "hook_in", "hook_out", "q.hook_in", "v.hook_in",
    "q.hook_out", "k.hook_out", "o.hook_in", "o.hook_out", "qkv.hook_out", "qkv.hook_in",
)  # fmt: skip
# halved, since zero would show hidden keys
EDITS = dict.fromkeys(ZEROED, torch.zeros_like) | {"hook_attn_scores": lambda scores: scores / 2}


def edited(model, name, hook, edit):
    """Logits under an edit, how often it fired, and whether the bridge said that it was in vain."""
    fired = []

    def hook_fn(value, hook):
        fired.append(hook.name)
        return edit(value)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with model.hooks(fwd_hooks=[(hook, hook_fn)]):
            logits = run(model, inputs(name))
    in_vain = any("discarded" in str(w.message) for w in caught)
    return of_real_tokens(name, logits), len(fired), in_vain


def test_an_edit_at_each_named_hook_changes_the_logits_as_in_the_eager_bridge(name):
    model, bridge = ours(name), eager_bridge(name)
    before = of_real_tokens(name, run(model, inputs(name)))
    tried = 0
    for point, edit in EDITS.items():
        hook = f"blocks.0.attn.{point}"
        if hook not in model.hook_dict:
            continue
        after, fired, _ = edited(model, name, hook, edit)
        theirs, theirs_fired, in_vain = None, 0, True
        if hook in bridge.hook_dict:
            theirs, theirs_fired, in_vain = edited(bridge, name, hook, edit)
        if not fired:  # a point that this family has no use for
            assert not theirs_fired, f"{hook} never fires"
            continue
        tried += 1
        assert (after - before).abs().max() > 1e-3, f"{hook} does nothing"
        if not in_vain and (theirs - before).abs().max() > 1e-3:
            assert_close(after, theirs, **TOLERANCE, msg=lambda m, hook=hook: f"{hook}: {m}")
    assert tried >= 10
    assert torch.equal(of_real_tokens(name, run(model, inputs(name))), before)


def test_an_edited_attention_is_the_edited_pattern(name):
    """The same edit by hook_attention and by hook_pattern."""
    model = ours(name)
    last = eager(name).attentions[0].shape[-1] - 1

    def by_hand(pattern, hook):
        pattern = pattern.clone()
        row = pattern[:, 1]
        given, held = row[..., [last - 1]], 1 - row[..., [last - 1]]
        if name == "gpt_oss":  # the sink's share is nobody's
            held = row.sum(-1, keepdim=True) - given
        keep = (torch.arange(last + 1) == last - 1).float()
        new = row * (1 - keep) * (1 + given / held.clamp_min(1e-6))
        return torch.stack(
            [new if h == 1 else pattern[:, h] for h in range(pattern.shape[1])], dim=1
        )

    keys = torch.arange(last + 1) == last - 1
    found = []
    for point, edit in (
        ("hook_attention", lambda a, hook: a.rescale(keys, 0.0, heads=[1])),
        ("hook_pattern", by_hand),
    ):
        with model.hooks(fwd_hooks=[(f"blocks.1.attn.{point}", edit)]):
            found.append(of_real_tokens(name, run(model, inputs(name))))
    before = of_real_tokens(name, run(model, inputs(name)))
    assert (found[0] - before).abs().max() > 1e-4
    assert_close(found[0], found[1], **TOLERANCE)


# gradients


def gradients(model, name, hooks=()):
    """Of a loss on real tokens, in each matrix of the model; its content is its name."""
    x = inputs(name)
    wrapped = getattr(model, "original_model", model)
    for weight in wrapped.parameters():
        weight.requires_grad_(True)
    wrapped.zero_grad()
    with model.hooks(fwd_hooks=list(hooks)) if hooks else contextmanager(lambda: (yield))():
        logits = wrapped(**x).logits
    of_real_tokens(name, logits).pow(2).sum().backward()
    return {
        (weight.shape, weight.double().sum().item()): weight.grad.clone()
        for weight in wrapped.parameters()
        if weight.grad is not None and weight.dim() == 2
    }


@pytest.mark.parametrize("point", [None, "hook_pattern", "hook_attn_scores", "hook_attention"])
def test_gradients_are_those_of_eager_attention(name, point):
    theirs = gradients(build(name), name)
    model = ours(name)
    hooks = [(hook, lambda value, hook: look(value)) for hook in attn_hooks(model, point or "-")]

    def look(value):
        if point == "hook_attention":
            with torch.no_grad():
                value.mass_received()
            return value.temperature(1.0, heads=[0, 2])
        return value * 1.0

    mine = gradients(model, name, hooks if point else ())
    missing = [key for key in theirs if key not in mine]
    assert not missing or name == "phi3"  # the bridge splits its MLP's fused projection in two
    for key, expected in theirs.items():
        if key in missing:
            continue
        least = 2e-4 * float(expected.abs().max() + 1)
        assert_close(mine[key], expected, atol=least, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores"])
def test_the_gradient_of_a_hook_s_own_parameter(decoder, point):
    if decoder in DELEGATED:
        pytest.skip("the eager bridge discards such an edit")
    found = []
    for model in (ours(decoder), eager_bridge(decoder)):
        gain = torch.ones(4, 1, 1, requires_grad=True)
        hook = f"blocks.0.attn.{point}"
        with model.hooks(fwd_hooks=[(hook, lambda value, hook, gain=gain: value * gain)]):
            logits = model.original_model(**inputs(decoder)).logits
        loss = of_real_tokens(decoder, logits).pow(2).sum()
        found.append(torch.autograd.grad(loss, gain)[0])
    assert found[0].abs().max() > 1e-3
    assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


# generation

NEW = 12  # past the sliding window of 5


def hf_generate(model, x, **kwargs):
    return model.generate(
        **{k: x[k] for k in x if k != "position_ids"},
        max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, **kwargs,
    )  # fmt: skip


def test_greedy_generation_is_hugging_face_s(decoder):
    x = inputs(decoder)
    expected = hf_generate(build(decoder), x)
    model = ours(decoder)
    assert torch.equal(hf_generate(model.original_model, x), expected)
    assert torch.equal(hf_generate(model.original_model, x, use_cache=False), expected)
    for point in ("hook_attention", "hook_pattern"):
        hooks = [(hook, lambda value, hook: None) for hook in attn_hooks(model, point)]
        with model.hooks(fwd_hooks=hooks):
            assert torch.equal(hf_generate(model.original_model, x), expected), point


@pytest.mark.parametrize("cached", [True, False])
def test_transformer_lens_generation_is_hugging_face_s(decoder, cached):
    ids = inputs(decoder)["input_ids"][:1]
    expected = hf_generate(build(decoder), {"input_ids": ids}, eos_token_id=None)
    model = ours(decoder)
    for hooks in ([], [(h, lambda a, hook: None) for h in attn_hooks(model, "hook_attention")]):
        with model.hooks(fwd_hooks=hooks):
            out = model.generate(
                ids, max_new_tokens=NEW, do_sample=False, stop_at_eos=False, verbose=False,
                use_past_kv_cache=cached,
            )  # fmt: skip
        # Hugging Face was kept from the end token (2) by min_new_tokens; the first is far enough
        both = min(out.shape[1], expected.shape[1])
        stop = [i for i in range(ids.shape[1], both) if out[0, i] == 2][:1] or [both]
        assert torch.equal(out[:, : stop[0]], expected[:, : stop[0]])


@pytest.mark.parametrize("edit", ["rescale", "bias", "rot_k"])
def test_an_edit_means_the_same_with_and_without_a_cache(decoder, edit):
    """Of keys that are named by their position, while a window slides over them."""

    def hook_fn(value, hook):
        if edit == "rot_k":
            return value * 1.5
        here = (value.key_positions >= 6) & (value.key_positions <= 9) & value.real_keys
        if edit == "rescale":
            return value.rescale(here, 0.2)
        return value.bias(torch.where(here, 2.0, 0.0)[:, None, None])

    point = "hook_rot_k" if edit == "rot_k" else "hook_attention"
    model, x = ours(decoder), inputs(decoder)
    hooks = [(h, hook_fn) for h in attn_hooks(model, point) if h in model.hook_dict]
    if not hooks:
        pytest.skip("no rotation")
    with model.hooks(fwd_hooks=hooks):
        cached = hf_generate(model.original_model, x)
        assert torch.equal(hf_generate(model.original_model, x, use_cache=False), cached)
        edited_logits = run(model, x)
    assert (run(model, x) - edited_logits).abs().max() > 1e-3


def test_statistics_while_decoding_are_rows_of_the_full_pattern(decoder):
    model, x = ours(decoder), inputs(decoder)
    rows = []

    def look(a, hook):
        if a.n_queries == 1:
            rows.append((hook.name, a.positions, a.key_positions, a.real_keys, a.pattern()))

    with model.hooks(fwd_hooks=[(h, look) for h in attn_hooks(model, "hook_attention")]):
        out = hf_generate(model.original_model, x)
    mask = torch.cat([x["attention_mask"], torch.ones(2, NEW, dtype=torch.long)], dim=1)
    with torch.no_grad():
        full = build(decoder)(
            input_ids=out, attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0), output_attentions=True,
        ).attentions  # fmt: skip
    padding = mask.shape[1] - mask.sum(1)
    assert len(rows) == (NEW - 1) * len(model.attention_layers)
    if decoder in WINDOWED:
        assert min(row[2].shape[1] for row in rows) == 5
    for hook, positions, key_positions, real_keys, pattern in rows:
        layer = int(hook.split(".")[1])
        for b in range(2):
            real = real_keys[b]
            keys = key_positions[b][real] + padding[b]
            row = full[layer][b, :, positions[b, 0] + padding[b]]
            assert_close(pattern[b, :, 0, real], row[:, keys], **TOLERANCE)
            assert_close(row[:, keys].sum(), row.sum(), **TOLERANCE)  # nothing elsewhere


# memory


class Matrices(TorchDispatchMode):
    """Counts the tensors of `[batch head n n]` numbers that anything makes."""

    def __init__(self, n):
        super().__init__()
        self.n, self.found = n, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(value) and value.is_floating_point():
                # not torch's float copy of a mask, which has no heads
                per_head = value.dim() == 4 and value.shape[1] > 1
                self.found += per_head and value.shape[-2:] == (self.n, self.n)
        return out


def test_nothing_is_materialised_unless_asked_for(decoder, monkeypatch):
    monkeypatch.setattr(attention_module, "BLOCK_ELEMENTS", 2000)
    monkeypatch.setattr(attention_module, "TILE_ELEMENTS", 200)
    model, x, n = ours(decoder), inputs(decoder, n_tokens=41), 41

    def matrices(points, layers=(0, 1), fn=lambda value, hook: None):
        hooks = [(f"blocks.{layer}.attn.{p}", fn) for layer in layers for p in points]
        with Matrices(n) as counted, model.hooks(fwd_hooks=hooks):
            run(model, x)
        return counted.found

    assert matrices([]) == 0
    assert matrices(["hook_q", "hook_k", "hook_v", "hook_z", "hook_in", "hook_out"]) == 0
    assert matrices(["hook_attention"], fn=read_statistics) == 0
    one, both = matrices(["hook_pattern"], layers=[1]), matrices(["hook_pattern"])
    assert one > 0 and both == 2 * one


def read_statistics(a, hook):
    a.mass_received(), a.entropy(), a.top_keys(), a.largest_received()


# the bridge's own path


@pytest.mark.parametrize("mode", ["attn_result", "split_qkv_input", "attn_in"])
def test_the_bridge_s_own_modes_work(decoder, mode):
    model = load(build(decoder))
    try:
        getattr(model, f"set_use_{mode}")(True)
    except (NotImplementedError, ValueError) as error:
        pytest.skip(str(error))
    logits = run(model, inputs(decoder))
    theirs = of_real_tokens(decoder, eager(decoder).logits)
    assert_close(of_real_tokens(decoder, logits), theirs, **TOLERANCE)
    seen = patterns(model, inputs(decoder), "hook_attention", lambda a: a.pattern())
    for pattern, expected in zip(seen, eager(decoder).attentions, strict=True):
        assert_close(of_real_rows(decoder, pattern), of_real_rows(decoder, expected), **TOLERANCE)
    if mode == "attn_result":
        cache = model.run_with_cache(inputs(decoder)["input_ids"])[1]
        summed = cache["blocks.0.attn.hook_result"].sum(2)
        bias = model.blocks[0].attn.b_O
        summed = summed if bias is None else summed + bias
        assert_close(summed, cache["blocks.0.attn.hook_out"], **TOLERANCE)
    getattr(model, f"set_use_{mode}")(False)
    logits = run(model, inputs(decoder))
    assert_close(of_real_tokens(decoder, logits), theirs, **TOLERANCE)


def dense_received(pattern, real):
    total = (pattern * real[:, None, :, None]).sum(2)
    seen = torch.ones(pattern.shape[-2:]).tril().bool() & real[:, None] & real[:, :, None]
    return total / seen.sum(1)[:, None]


@pytest.mark.parametrize("eager_only", families(EAGER_ONLY, quick=()))
def test_a_family_that_cannot_be_lazy_says_so_and_agrees(eager_only):
    with pytest.warns(UserWarning, match="eager path") as caught:
        model = load(build(eager_only))
    assert sum("eager path" in str(w.message) for w in caught) == 1
    assert not model.lazy and model.provenance()["attention"] == "eager"
    assert_eager_path_agrees(model, eager_only)


def test_a_forced_eager_path_agrees(monkeypatch):
    monkeypatch.setattr(hooked, "can_be_lazy", lambda component: False)
    for family in ("gpt2", "llama", "gpt_oss"):
        with pytest.warns(UserWarning, match="eager path"):
            model = load(build(family))
        assert_eager_path_agrees(model, family, window=5 if family == "gpt_oss" else None)


def assert_eager_path_agrees(model, family, window=None):
    x = inputs(family)
    theirs = eager(family)
    assert_close(
        of_real_tokens(family, run(model, x)), of_real_tokens(family, theirs.logits), **TOLERANCE
    )
    received = model.read_attention(
        x["input_ids"], lambda a: a.mass_received(),
        **{k: x[k] for k in x if k != "input_ids"},
    )  # fmt: skip
    real = real_tokens(family, 12)
    for layer, pattern in enumerate(theirs.attentions):
        if window is not None and layer == 0:
            continue
        expected = dense_received(pattern, real)
        mine = received[:, layer]
        some = real[:, None].expand_as(mine)
        assert_close(mine[some], expected[some], **TOLERANCE)
        assert mine[~some].isnan().all()
    assert_eager_path_edits(model, family)


def assert_eager_path_edits(model, family):
    x, keys = inputs(family), torch.arange(12) == 6
    before = of_real_tokens(family, run(model, x))
    edits = [("blocks.1.attn.hook_attention", lambda a, hook: a.rescale(keys, 0.0, heads=[1]))]
    with model.hooks(fwd_hooks=edits):
        if family == "gptj":  # its attention is closed: no silent edit
            with pytest.raises(EditError, match="only look.*hook_z"):
                run(model, x)
            return
        after = of_real_tokens(family, run(model, x))
    assert (after - before).abs().max() > 1e-4
    assert torch.equal(of_real_tokens(family, run(model, x)), before)


# towers


def test_llava_with_padding_and_two_images_in_a_prompt():
    x = inputs("llava", n_tokens=16)
    x["input_ids"][0, 10:14] = 59  # a second image in the first prompt
    x["pixel_values"] = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        theirs = build("llava")(**x, output_attentions=True)
    model = ours("llava")
    real = x["attention_mask"].bool()
    assert_close(run(model, x)[real], theirs.logits[real], **TOLERANCE)
    found = patterns(model, x, "hook_attention", lambda a: a.pattern())
    for pattern, expected in zip(found, theirs.attentions, strict=True):
        assert_close(pattern.transpose(1, 2)[real], expected.transpose(1, 2)[real], **TOLERANCE)


def test_an_image_tower_knows_nothing_of_the_text_s_padding():
    """Also where it has as many tokens as the text (5)."""
    x = inputs("llava", n_tokens=9)
    x["input_ids"][:] = torch.tensor([[59] * 4 + [3] * 5, [0, 0, 0] + [59] * 4 + [4, 5]])
    short = {k: v[:, -5:] for k, v in x.items() if k != "pixel_values"}
    short["input_ids"] = torch.tensor([[59, 59, 59, 59, 3], [0, 59, 59, 59, 59]])
    short["attention_mask"] = torch.tensor([[1] * 5, [0, 1, 1, 1, 1]])
    short["position_ids"] = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]])
    found = []
    tower = "vision_encoder.encoder_layers.0.attn.hook_attention"
    model = ours("llava")
    with model.hooks(fwd_hooks=[(tower, lambda a, hook: found.append(a))]):
        run(model, short | {"pixel_values": x["pixel_values"]})
    assert found[0].n_keys == 5 and found[0].real_keys.all() and not found[0].causal
    assert_close(found[0].mass_received().sum(-1), torch.ones(2, 4))


def test_device_map_on_the_cpu(tmp_path):
    build("llama").save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path, device_map={"": "cpu"})
    logits = of_real_tokens("llama", run(model, inputs("llama")))
    assert_close(logits, of_real_tokens("llama", eager("llama").logits), **TOLERANCE)
