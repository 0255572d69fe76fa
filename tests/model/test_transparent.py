"""Components that nobody listens to are stepped over, and nobody can tell."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from interp.model.hooked import HookedModel
from interp.model.transparent import Transparent, stands_in
from tests.model.families import FAMILIES, inputs
from tests.tiny import fresh, tiny


def run(model: HookedModel, family: str, hooks=()):
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return model.original_model(**inputs(family))[0]


def components_that_run(model: HookedModel, family: str, hooks=()) -> Counter:
    """How often each kind of component runs its own `forward` in one pass."""
    ran: Counter[str] = Counter()

    def note(module, args, output):
        if isinstance(module, Transparent):
            ran[type(module).__name__] += 1

    handle = nn.modules.module.register_module_forward_hook(note)
    try:
        run(model, family, hooks)
    finally:
        handle.remove()
    return ran


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_nothing_runs_for_nobody(family):
    assert not components_that_run(tiny(family), family)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llava", "vit"])
def test_nothing_runs_for_nobody_but_norms_with_a_formula_of_the_bridges_own(family):
    ran = components_that_run(tiny(family), family)
    assert all("Normalization" in kind for kind in ran)


def test_what_is_looked_at_runs_and_no_more():
    looks = [("blocks.1.attn.hook_z", lambda z, hook: None)]
    ran = components_that_run(tiny("llama"), "llama", looks)
    assert ran == {"TransparentLinearBridge": 1}


def test_a_hook_that_has_gone_leaves_nothing_behind():
    model, nothing = tiny("llama"), lambda value, hook: None
    assert components_that_run(model, "llama", [("blocks.1.hook_resid_pre", nothing)])
    assert not components_that_run(model, "llama")


def open_hooks(model: HookedModel) -> list[str]:
    return [
        n for n, point in model.hook_dict.items() if not model._gated_hook_reason(point.name or n)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_alone_sees_what_it_sees_among_all(family):
    model = tiny(family)
    seen: dict[str, list] = {}

    def look(name):
        return name, lambda value, hook: seen.setdefault(name, []).append(value)

    names = open_hooks(model)
    run(model, family, map(look, names))
    among_all, seen = seen, {}
    assert len(among_all) > 20
    for name in names:
        run(model, family, [look(name)])
    assert {name: len(values) for name, values in seen.items()} == {
        name: len(values) for name, values in among_all.items()
    }
    for name, values in seen.items():
        for value, other in zip(values, among_all[name], strict=True):
            if torch.is_tensor(value):
                size = max(1.0, float(value.abs().clamp_max(1e3).max()))
                assert_close(value, other, atol=5e-6 * size, rtol=1e-5, msg=name)


def test_a_hook_acts_from_the_moment_that_it_is_attached():
    model = tiny("llama")
    point, handles = model.hook_dict["blocks.1.mlp.out.hook_out"], []

    def attach(value, hook):
        handles.append(point.add_hook(lambda value, hook: torch.zeros_like(value)))

    before = run(model, "llama")
    try:
        during = run(model, "llama", [("blocks.0.hook_resid_pre", attach)])
    finally:
        point.remove_hooks()
    expected = run(model, "llama", [(point.name, lambda value, hook: torch.zeros_like(value))])
    assert torch.equal(during, expected) and not torch.equal(during, before)
    assert torch.equal(run(model, "llama"), before)


@pytest.mark.parametrize("by", ["a hook point", "torch"])
def test_a_hook_that_is_attached_while_its_block_runs_acts_too(by):
    model = tiny("llama")
    component, handles = model.blocks[1].mlp.out, []

    def attach(value, hook):
        if by == "torch":
            zero = component.register_forward_hook(lambda module, args, output: 0 * output)
        else:
            point = component.hook_out
            point.add_hook(lambda value, hook: 0 * value)
            zero = point.fwd_hooks[-1].hook
        handles.append(zero)

    before = run(model, "llama")
    try:
        during = run(model, "llama", [("blocks.1.attn.hook_z", attach)])
    finally:
        component.hook_out.remove_hooks()
        for handle in handles:
            handle.remove()
    nothing = [("blocks.1.mlp.out.hook_out", lambda value, hook: 0 * value)]
    assert torch.equal(during, run(model, "llama", nothing)) and not torch.equal(during, before)
    assert torch.equal(run(model, "llama"), before)


def test_a_pass_within_a_hook_leaves_the_pass_around_it_alone():
    model, inner, begun = tiny("llama"), [], []
    looks = [("blocks.1.mlp.hook_out", lambda value, hook: inner.append(value))]

    def again(value, hook):
        if not begun:
            begun.append(True)
            run(model, "llama", looks)

    outer = run(model, "llama", [("blocks.1.attn.hook_z", again)])
    assert torch.equal(outer, run(model, "llama")) and len(inner) == 1
    assert isinstance(model.blocks[1].original_component.mlp, Transparent)


@pytest.mark.parametrize("place", ["blocks.1", "blocks.1.attn", "blocks.1.ln2", "blocks.1.mlp.out"])
def test_torchs_own_hooks_on_a_component_fire(place):
    model, fired = tiny("llama"), []
    component = model.get_submodule(place)
    handle = component.register_forward_hook(lambda module, args, output: fired.append(output))
    try:
        run(model, "llama")
    finally:
        handle.remove()
    assert len(fired) == 1


def test_a_forward_of_ones_own_is_called():
    model = fresh("llama")
    expected = run(model, "llama", [("blocks.1.hook_mlp_out", lambda x, hook: torch.zeros_like(x))])
    before = run(model, "llama")
    with stands_in(model.blocks[1].mlp, torch.zeros_like):
        assert torch.equal(run(model, "llama"), expected)
    assert torch.equal(run(model, "llama"), before)


def test_what_stands_in_a_components_place_stays():
    model = fresh("llama")
    modules = model.blocks[1].original_component.mlp.original_component._modules
    before = modules["down_proj"]

    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * before(x)

    expected = run(model, "llama", [("blocks.1.hook_mlp_out", lambda x, hook: 2 * x)])
    modules["down_proj"] = doubled = Doubled()
    assert_close(run(model, "llama"), expected)
    assert modules["down_proj"] is doubled


def test_a_block_that_fails_is_as_it_was():
    model = fresh("llama")
    inner = model.blocks[1].original_component.mlp.original_component
    broken = inner.down_proj.original_component
    broken.__dict__["forward"] = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(model, "llama")
    assert isinstance(inner.down_proj, Transparent)


def test_a_copy_listens_for_itself():
    model = fresh("llama")
    twin = copy.deepcopy(model)
    before = run(model, "llama")
    twin.hook_dict["blocks.0.hook_mlp_out"].add_hook(lambda x, hook: torch.zeros_like(x))
    assert torch.equal(run(model, "llama"), before)
    assert not torch.equal(run(twin, "llama"), before)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_gradients_at_hooks_are_the_same_alone(family):
    model, found = tiny(family), []
    name = "blocks.0.mlp.hook_out"
    for others in ([], [n for n in open_hooks(model) if n != name]):
        values: list[torch.Tensor] = []
        hooks = [(name, lambda value, hook, values=values: values.append(value))]
        hooks += [(other, lambda value, hook: None) for other in others]
        with model.hooks(fwd_hooks=hooks):
            total = model.original_model(**inputs(family))[0].square().sum()
        found.append(torch.autograd.grad(total, values[0])[0])
    assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_processed_weights_are_the_ones_that_run(family):
    model, ids = fresh(family), inputs(family)["input_ids"][:1]
    with torch.no_grad():
        before = model(ids).log_softmax(-1)
        model.enable_compatibility_mode()
        norm = model.blocks[0].ln2.original_component
        assert_close(norm.weight, torch.ones_like(norm.weight))  # folded into what follows
        assert_close(model(ids).log_softmax(-1), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("part", ["attn", "q", "mlp"])
def test_inputs_that_are_forked_on_request_can_be_hooked(part):
    model, name = (
        fresh("llama"),
        {"attn": "hook_attn_in", "q": "hook_q_input", "mlp": "hook_mlp_in"}[part],
    )
    {"attn": model.set_use_attn_in, "q": model.set_use_split_qkv_input,
     "mlp": model.set_use_hook_mlp_in}[part](True)  # fmt: skip
    seen = []
    run(model, "llama", [(f"blocks.1.{name}", lambda value, hook: seen.append(value))])
    before = run(model, "llama")
    after = run(model, "llama", [(f"blocks.1.{name}", lambda value, hook: value * 0)])
    assert len(seen) == 1 and not torch.allclose(after, before)
