"""Passes beside the one that is running, which leave it as it was."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from interp.model.hooked import HookedModel


@contextmanager
def aside(model: HookedModel) -> Iterator[None]:
    """In the block the model runs as it is without hooks, and `model.call` is that run's own.

    A hook may run the model so, and only then does what it was called in go on: with the hooks of
    that pass, its facts, and the angles that its layers turn by. Hooks attached in the block work.
    """
    running = model._running
    facts = dict(vars(running))
    vars(running).update(generating=None, interventions=(), prompts=None)
    turned = _angles_of(model)
    angles = None if turned is None else dict(turned)
    points = {id(point): point for point in model.hook_dict.values() if point.has_hooks()}
    attached = [(p, p._forward_hooks, p.fwd_hooks) for p in points.values()]
    for point in points.values():
        # others in their place, since the pass outside is going through the old ones
        point._forward_hooks, point.fwd_hooks = OrderedDict(), []
    try:
        yield
    finally:
        for point, hooks, handles in attached:
            point._forward_hooks, point.fwd_hooks = hooks, handles
        vars(running).update(facts)
        if turned is not None and angles is not None:
            turned.clear()
            turned.update(angles)


def _angles_of(model: HookedModel) -> dict | None:
    """What the rotary modules gave last, which later layers of the pass still ask for."""
    layers = model.attention_layers
    rotations = getattr(model.blocks[layers[0]].attn, "_rotations", None) if layers else None
    return None if rotations is None else rotations.made
