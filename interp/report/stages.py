"""The stages of a report: each says when it begins, and keeps its results in its own folder."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp.report.page import Section


@dataclass(frozen=True, eq=False)
class Part:
    """What some stages hand over: sections, what their prompts were, and what to note."""

    sections: list[Section]
    prompts: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Stages:
    """The names of all stages in their order, and where and how they run."""

    folder: Path
    names: Sequence[str]
    resume: bool
    progress: bool

    @property
    def options(self) -> dict[str, bool]:
        """What every pass wants to know."""
        return {"resume": self.resume, "progress": self.progress}

    def begin(self, name: str, what: str) -> Path:
        """Says on stderr that a stage begins; returns its folder."""
        if self.progress:
            at = f"[{self.names.index(name) + 1}/{len(self.names)}]"
            print(f"{at} {name}: {what}", file=sys.stderr, flush=True)
        return self.folder / name.replace(" and ", "-").replace(" ", "-")
