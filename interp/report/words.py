"""How numbers are said in the report's sentences."""

from collections.abc import Sequence
from html import unescape

import numpy as np

from interp.figures import shown

Number = float | np.floating


def percent(share: Number) -> str:
    """A share as whole per cents; small ones do not become 0."""
    if 0 < share < 0.005:
        return "under 1 %"
    return f"{share:.0%}".replace("%", " %")


def number(value: Number, digits: int = 2) -> str:
    """Two decimals below ten, none from a hundred on, with separators."""
    size = abs(value)
    decimals = 0 if size >= 100 else 1 if size >= 10 else digits
    text = f"{value:,.{decimals}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def change(value: Number, digits: int = 2) -> str:
    """A difference with its sign; what rounds to nothing has none."""
    text = f"{value:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def interval(low: Number, high: Number, digits: int = 2) -> str:
    """A 95 % interval."""
    return f"[{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")


def listed(items: Sequence, most: int = 6) -> str:
    """`a, b and c`, or the first few `and n more`."""
    texts = [str(item) for item in items]
    if len(texts) > most:
        texts = [*texts[: most - 1], f"{len(texts) - most + 1} more"]
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else "".join(texts)


def counted(n: int, noun: str) -> str:
    """`1 head`, `3 heads`."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def quoted(token: str) -> str:
    """A token in quotation marks, its white space visible."""
    return f"“{unescape(shown(token))}”"
