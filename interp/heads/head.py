"""`Head`: one attention head, and the ways in which people write it."""

import re
from dataclasses import dataclass
from numbers import Integral

import pandas as pd

from interp.errors import UserError


class HeadError(UserError):
    """A head that cannot be read, or is not there."""


@dataclass(frozen=True, order=True)
class Head:
    """One attention head, counted from 0. Printed `L3H5`, in another tower `vision:L3H5`."""

    layer: int
    head: int
    tower: str = "text"

    def __post_init__(self):
        for name in ("layer", "head"):
            object.__setattr__(self, name, _index(getattr(self, name), name))

    def __str__(self) -> str:
        name = f"L{self.layer}H{self.head}"
        return name if self.tower == "text" else f"{self.tower}:{name}"

    @classmethod
    def parse(cls, value) -> "Head":
        """Read `Head(3, 5)`, "L3H5", "3.5", "3-5", "vision:L3H5", (3, 5) or (3, 5, "vision")."""
        if isinstance(value, Head):
            return value
        if isinstance(value, str):
            return cls._from_text(value)
        if isinstance(value, tuple | list) and len(value) in (2, 3):
            layer, head, *tower = value
            return cls(_index(layer, "layer"), _index(head, "head"), *tower)
        hint = " A number loses the last zero of 3.10: write it as text." * isinstance(value, float)
        raise HeadError(f"head {value!r}: write it as 'L3H5', '3.5', '3-5' or (3, 5).{hint}")

    @classmethod
    def _from_text(cls, text: str) -> "Head":
        found = re.fullmatch(
            r"(?:(?P<tower>[A-Za-z]\w*):)?(?:L(\d+)H(\d+)|(\d+)[.-](\d+))",
            text.strip(),
            flags=re.IGNORECASE | re.ASCII,
        )
        if not found:
            raise HeadError(f"head {text!r}: write it as 'L3H5', '3.5' or '3-5' (layer first).")
        layer, head = (int(number) for number in found.groups()[1:] if number is not None)
        return cls(layer, head, found["tower"] or "text")


def _index(value, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise HeadError(f"{name}={value!r}: a whole number from 0 on.")
    return int(value)  # numpy's integers print and save badly


def heads_in(table: pd.DataFrame) -> list[Head]:
    """The heads of a table's rows, in their order."""
    columns = (table[name] for name in ("layer", "head", "tower"))
    return [Head(int(layer), int(head), tower) for layer, head, tower in zip(*columns)]
