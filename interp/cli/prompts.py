"""From the words of a command to a hooked model and its prompts."""

import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from interp.errors import UserError

PROMPTS = ("needle", "repeats", "text")
QUESTIONS = ("ioi", "colored_objects", "multiple_choice")
ABOUT_IMAGES = ("scenes", "polls", "pictured")
PAIRS = (*QUESTIONS, "pairs")
NEED_DATA = ("pairs", "pictured")
WITH_DATA = ("needle", "text", "colored_objects", *NEED_DATA)


@dataclass(frozen=True)
class Wanted:
    """The prompts that were asked for; wrong ones are told before a model is loaded."""

    task: str
    data: Path | None
    lengths: tuple[int, ...] | None
    n: int
    seed: int
    allowed: tuple[str, ...]
    form: str | None = None

    def __post_init__(self):
        if self.task not in self.allowed:
            near = get_close_matches(self.task, self.allowed, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"task={self.task!r}: one of {', '.join(self.allowed)}.{hint}")
        if self.data is not None and self.task not in WITH_DATA:
            raise UserError(f"data={str(self.data)!r}: the task {self.task!r} takes no texts.")
        if self.data is None and self.task in NEED_DATA:
            raise UserError(f"task={self.task!r}: give them with --data, a .jsonl file.")
        if self.form is not None and self.task != "colored_objects":
            raise UserError(f"form={self.form!r}: only colored_objects has forms.")
        if self.data is not None and not self.data.exists():
            raise UserError(f"data={str(self.data)!r}: no such file or folder.")


def sizes(text: str | None) -> tuple[int, ...] | None:
    """`128,256` as numbers."""
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UserError(f"lengths={text!r}: numbers of tokens, such as 128,256.")
    return found


def load(model: str, dtype: str | None, device: str | None, revision: str | None):
    """The hooked model, without the progress bars of transformers."""
    import torch
    from transformers.utils import logging

    import interp

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        torch.device(device or "cpu")
    except RuntimeError:
        raise UserError(f"device={device!r}: cpu, cuda, cuda:0, mps, ...") from None
    return interp.load(model, dtype=dtype, device=device, revision=revision)


def prompts_of(model, wanted: Wanted):
    """The prompts of a task, for this model's tokens and context window."""
    import importlib

    from interp import tasks

    lengths, n, seed = wanted.lengths, wanted.n, wanted.seed
    if wanted.task == "needle":
        from interp.report.plan import lengths_for

        haystack = None if wanted.data is None else str(wanted.data)
        grid = list(lengths or lengths_for(model, seed))
        return tasks.needle(model, grid, n=n, seed=seed, haystack=haystack)
    if wanted.task == "repeats":
        return tasks.repeats(model, n=n, length=(lengths or (50,))[0], seed=seed)
    if wanted.task == "text":
        size = (lengths or (min(128, model.cfg.n_ctx),))[0]
        if wanted.data is None:
            return tasks.text(model, max_tokens=size, n=n, seed=seed)
        found = tasks.text(model, wanted.data, max_tokens=size)
        return found.select(range(min(n, len(found))))
    if wanted.task == "pictured":
        return tasks.pictured(model, wanted.data)
    if wanted.task in ABOUT_IMAGES:
        return getattr(tasks, wanted.task)(model, n, seed)
    examples = importlib.import_module(f"interp.tasks.{wanted.task}").examples
    options = {} if wanted.form is None else {"form": wanted.form}
    about = {"n": n, "seed": seed} | options
    return tasks.from_examples(model, examples(**about), task=wanted.task, parameters=about)


def pairs_of(model, wanted: Wanted):
    """Pairs of clean and corrupted prompts, with answers of one token each."""
    from interp import tasks

    about = {"n": wanted.n, "seed": wanted.seed}
    if wanted.task == "ioi":
        return tasks.ioi(model, **about)
    if wanted.task == "multiple_choice":
        return tasks.multiple_choice(model, **about)
    if wanted.task == "colored_objects":
        return tasks.colored_objects(model, **about, form=wanted.form or "plain", data=wanted.data)
    rows = read_pairs(Path(str(wanted.data)))
    sides = {name: [row[name] for row in rows] for name in ("clean", "corrupted", "answers")}
    return tasks.pairs(model, **sides, parameters={"data": str(wanted.data)})


def read_pairs(path: Path) -> list[dict]:
    """The rows of a .jsonl file: {"clean": ..., "corrupted": ..., "answers": [right, wrong]}."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append({name: row[name] for name in ("clean", "corrupted", "answers")})
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"data={str(path)!r}, line {number}: not a JSON object with clean, corrupted and "
                'answers, such as {"clean": "...", "corrupted": "...", "answers": [" A", " B"]}.'
            ) from None
    if not rows:
        raise UserError(f"data={str(path)!r}: holds no pairs.")
    return rows
