"""Which model an intervention was made on, so that it is not put to use on another kind."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from interp.model.hooked import HookedModel


@dataclass(frozen=True)
class MadeOn:
    """A model's name, and the shape that heads, layers and vectors are numbered by.

    `base_model` and `revision` are for people: weights of another name but the same architecture
    and shape (a fine-tuned model, a copy in another folder) take the same interventions.
    """

    base_model: str
    revision: str | None
    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int

    @classmethod
    def of(cls, model: HookedModel) -> "MadeOn":
        """What there is to remember of a model; of a local folder its own name, not where it is."""
        cfg, name = model.cfg, model.name
        return cls(
            base_model=Path(name).name if Path(name).exists() else name,
            revision=model.revision,
            architecture=str(cfg.architecture),
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_kv_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
            d_head=cfg.d_head,
            d_model=cfg.d_model,
        )

    @property
    def shape(self) -> dict[str, int]:
        """The numbers that must agree."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, int)}

    def differences(self, other: "MadeOn") -> list[str]:
        """In what `other` is another kind of model, in words; empty where it is none."""
        if self.architecture != other.architecture:
            return [f"the architecture {self.architecture}, not {other.architecture}"]
        theirs = other.shape
        return [f"{n}={v}, not {theirs[n]}" for n, v in self.shape.items() if v != theirs[n]]

    def record(self) -> dict[str, Any]:
        """As `intervention.json` keeps it."""
        about = {name: value for name, value in asdict(self).items() if name not in self.shape}
        return {**about, "shape": self.shape}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "MadeOn | None":
        """Out of an `intervention.json`; None where it does not say. Raises where it is damaged."""
        if record.get("architecture") is None:
            return None
        shape = {name: int(value) for name, value in record["shape"].items()}
        about = {name: record.get(name) for name in ("base_model", "revision", "architecture")}
        return cls(**about, **shape)

    def __str__(self) -> str:
        return (
            f"{self.base_model} ({self.architecture}, {self.n_layers} layers x {self.n_heads} "
            f"heads of width {self.d_head})"
        )
