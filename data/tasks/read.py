"""Where the tasks' rows come from: the files beside this one, whatever the working directory is."""

import json
from pathlib import Path

from datasets import Dataset


def letters(**_) -> dict[str, Dataset]:
    """The rows of `letters.jsonl`, as the harness takes them."""
    return rows("letters.jsonl")


def needles(**_) -> dict[str, Dataset]:
    """The rows of `needles.jsonl`."""
    return rows("needles.jsonl")


def rows(name: str) -> dict[str, Dataset]:
    """A file of JSON lines as the only split, `test`."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return {"test": Dataset.from_list([json.loads(line) for line in text.splitlines()])}
