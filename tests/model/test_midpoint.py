"""hook_resid_mid edits the residual stream: what follows sees nothing but the new value."""

import pytest
import torch
from torch.testing import assert_close

from tests.model.families import DECODERS
from tests.tiny import random_ids, tiny

ONE, OTHER = (torch.tensor([ids]) for ids in random_ids(8, 8))
SIDE_BY_SIDE = ("gpt_neox", "gptj")  # attention and MLP: there is no middle
SEQUENTIAL = [name for name in DECODERS if name not in SIDE_BY_SIDE]


def logits_with(model, ids, fn=None):
    hooks = [] if fn is None else [("blocks.1.hook_resid_mid", fn)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return model(ids)


@pytest.mark.parametrize("family", [*SEQUENTIAL, "bert"])
def test_its_value_decides_all_that_follows(family):
    model, kept = tiny(family), {}
    wanted = logits_with(model, ONE, lambda value, hook: kept.update(mid=value))
    found = logits_with(model, OTHER, lambda value, hook: kept["mid"])
    # attention is over by then: each position's logits follow from its own value
    assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "olmo2"])
def test_a_small_edit_is_carried_on_and_forgotten(family):
    model = tiny(family)
    before = logits_with(model, ONE)
    posts = []

    def add(value, hook):
        return value + 1

    hooks = [
        ("blocks.1.hook_resid_mid", add),
        ("blocks.1.hook_mlp_out", lambda value, hook: torch.zeros_like(value)),
        ("blocks.1.hook_resid_post", lambda value, hook: posts.append(value)),
    ]
    for chosen in (hooks[1:], hooks):
        with torch.no_grad(), model.hooks(fwd_hooks=chosen):
            model(ONE)
    if family != "olmo2":  # its norm after the MLP makes something of nothing
        assert_close(posts[1], posts[0] + 1)
    assert torch.equal(logits_with(model, ONE), before)


def test_gradients_pass_through_the_edit():
    model = tiny("llama")
    factor = torch.ones((), requires_grad=True)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_mid", lambda value, hook: value * factor)]):
        scaled = model(ONE)[0, -1, 5]
    (gradient,) = torch.autograd.grad(scaled, factor)
    step = 1e-2

    def at(f):
        return logits_with(model, ONE, lambda value, hook: value * f)[0, -1, 5]

    assert_close(gradient, (at(1 + step) - at(1 - step)) / (2 * step), atol=1e-3, rtol=1e-2)
