"""What all studies do with what they find: print it, and keep it in the folder of the run."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd


def show(title: str) -> None:
    """Print the title of what comes next."""
    print(f"\n{title}\n", flush=True)


def shown(table: pd.DataFrame) -> str:
    """A table as text."""
    return table.to_string(index=False, float_format=lambda x: f"{x:.3f}")


def keep(table: pd.DataFrame, path: Path, most: int | None = None) -> None:
    """Print a table, its first `most` rows, and save all of it."""
    print(shown(table.head(len(table) if most is None else most)), flush=True)
    table.to_parquet(path, index=False)


def finish(said: Sequence[str], out: Path) -> None:
    """Print what the numbers say, sentence by sentence, and keep it as `findings.txt`."""
    show("What the numbers say")
    print("\n".join(f"- {sentence}" for sentence in said))
    (out / "findings.txt").write_text("\n".join(said) + "\n", encoding="utf-8")
    print(f"\ntables and figures: {out}")
