"""Questions about images: the user's own, from a file or a dataset."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from interp.model.images import image_mark
from interp.tasks.prompts import PromptError, from_examples, tokenizer_of


def pictured(
    model,
    data: str | Path | Iterable[Mapping[str, Any]],
    *,
    chat: bool | None = None,
    template: str | None = None,
    task: str = "pictured",
    parameters: dict | None = None,
) -> Dataset:
    """Prompts with images from rows that have an `image` and a `question`.

    Args:
        data: Rows, a `datasets.Dataset`, or a .jsonl file of them, in which images are files
            (relative to its folder). Other columns are kept: `answer`, `choices`, `objects`, ...;
            these begin with a space where what stands before them does not end in one.
        chat: Whether the question goes into the chat template; default: where there is one.
        template: How image and question stand together; default "{image}\\n{question}" in a chat
            and "{image} {question}" else.

    Raises:
        PromptError: No rows, a row without an image or a question, a line that is no JSON.
        ImageError: An image that is missing or can't be read; a text-only model.
    """
    if isinstance(data, (str, Path)):
        parameters = {"data": Path(data).name, **(parameters or {})}
        data = _rows_of(Path(data))
    tokenizer = tokenizer_of(model)
    chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    if template is None:
        template = "{image}\n{question}" if chat else "{image} {question}"
    mark = image_mark(model)
    examples = []
    for n, row in enumerate(data):
        missing = [name for name in ("image", "question") if row.get(name) in (None, "")]
        if missing:
            raise PromptError(f"prompt {n}: it has no {' and no '.join(missing)}.")
        rest = {name: value for name, value in row.items() if name != "question"}
        examples.append({"text": template.format(image=mark, question=row["question"]), **rest})
    about = {**(parameters or {}), "template": template}
    return from_examples(model, examples, task=task, parameters=about, chat=chat)


def _rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, images as paths that can be opened from anywhere."""
    if not path.is_file():
        raise PromptError(f"data={str(path)!r}: no such file.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{path}: line {number} is no JSON ({error}).") from error
        if not isinstance(row, dict):
            raise PromptError(f"{path}: line {number} is no object with an image and a question.")
        if isinstance(row.get("image"), str) and row["image"]:
            row["image"] = str(path.parent / row["image"])
        rows.append(row)
    return rows
