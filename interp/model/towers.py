"""The towers of a model that have heads: its language model (`text`), its image encoder (`vision`).

A model that only sees (a ViT) has one tower, whose heads may be called by either name.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from interp.heads import Head, HeadError

ATTENTION = ".attn.hook_attention"


@dataclass(frozen=True)
class Tower:
    """Where a tower's layers are: layer 3 is the block `prefix.3`."""

    name: str
    prefix: str
    layers: tuple[int, ...]
    n_heads: int

    def has(self, head: Head) -> bool:
        return head.layer in self.layers and head.head < self.n_heads

    def hook(self, layer: int, point: str) -> str:
        """The name of a hook of a layer's attention, such as `hook_z`."""
        return f"{self.prefix}.{layer}.attn.{point}"


def towers(model) -> dict[str, Tower]:
    """The towers of a hooked model by name."""
    layers: dict[str, list[int]] = {}
    for name in model.hook_dict:
        if name.endswith(ATTENTION):
            prefix, _, layer = name.removesuffix(ATTENTION).rpartition(".")
            layers.setdefault(prefix, []).append(int(layer))
    found = {}
    for prefix, indices in layers.items():
        name = "text" if prefix == "blocks" else prefix.partition("_")[0]
        found[name] = Tower(name, prefix, tuple(sorted(indices)), _n_heads(model, prefix, indices))
    if sees_only(model):
        found["vision"] = found["text"]
    return found


def sees_only(model) -> bool:
    """Is this an image encoder, without a language model?"""
    return bool(getattr(model.cfg, "is_visual_model", False))


def _n_heads(model, prefix: str, indices: Sequence[int]) -> int:
    attention = model.get_submodule(f"{prefix}.{indices[0]}.attn")
    return int(attention.config.n_heads)


def check_heads(model, heads: Sequence[Head], tower: str | None = "text") -> None:
    """Raises `HeadError` where the model lacks one of the heads, or it is not of that tower.

    `tower=None`: of any.
    """
    known = towers(model)
    missing = [h for h in heads if h.tower not in known or not known[h.tower].has(h)]
    if missing:
        _raise_missing(model, known, missing, len(heads))
    other = [h for h in heads if tower is not None and known[h.tower] is not known.get(tower)]
    if other:
        raise HeadError(
            f"heads: {len(other)} of {len(heads)} are not of the tower {tower!r} (first: "
            f"{other[0]}), and what was called takes no others. For a hook of your own, "
            "model.hook_of(head, 'hook_z') names a head's in either tower."
        )


def _raise_missing(model, known: dict[str, Tower], missing: list[Head], n: int) -> None:
    first = missing[0]
    if first.tower not in known:
        has = f"no tower {first.tower!r} (it has {', '.join(known)})"
    else:
        one = known[first.tower]
        has = f"layers 0-{one.layers[-1]} and heads 0-{one.n_heads - 1}"
        has += f" in its tower {first.tower!r}" if len(known) > 1 else ""
    raise HeadError(
        f"heads: {len(missing)} of {n} are not in {model.name} (first: {first}), which has {has}. "
        "Were they scored on another model? See scores.metadata['model']."
    )
