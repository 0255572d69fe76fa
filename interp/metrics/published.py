"""The files in which captions, objects, questions and answers are published, read as they are.

Files that are called JSON hold one object a line, objects one after the other, or one array of
them: all three are read, whatever the suffix. What is missing is named by its row.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from interp.metrics.measured import MetricError
from interp.metrics.vocabulary import Vocabulary

IMAGE_KEYS = ("image", "image_id", "image_name", "question_image")
CAPTION_KEYS = ("caption", "text", "answer", "output")


def read_captions(path: str | Path) -> list[dict[str, str]]:
    """Rows with `image` and `caption`.

    Reads rows with an image (`image_id`, `image`) and a caption, the CHAIR code's input of 2018
    (`imgToEval`), and what either code writes (`sentences`).
    """
    rows = list(json_values(path))
    if len(rows) == 1 and isinstance(rows[0], dict):
        whole = rows[0]
        inner = whole.get("imgToEval", whole.get("sentences", [whole]))
        rows = list(inner.values()) if isinstance(inner, dict) else inner
    return [
        {"image": _image(row, n, path), "caption": _text(row, CAPTION_KEYS, n, path)}
        for n, row in enumerate(rows)
    ]


def read_objects(path: str | Path, folder: str | Path | None = None) -> dict[str, list[str]]:
    """Image -> the objects in it, from rows `{"image": ..., "objects": [...]}`.

    `folder`: where the images lie, if they shall be there. Raises `MetricError` for a row without
    an image or objects, an image that stands there twice or is not in `folder`.
    """
    found: dict[str, list[str]] = {}
    for n, row in enumerate(json_values(path)):
        image = _image(row, n, path)
        objects = row.get("objects")
        if not isinstance(objects, list) or not all(isinstance(name, str) for name in objects):
            raise MetricError(f"{path}: row {n} ({image}) needs `objects`, a list of names.")
        if image in found:
            raise MetricError(f"{path}: row {n} has {image} again; one row an image.")
        if folder is not None and not (Path(folder) / image).is_file():
            raise MetricError(f"{path}: row {n} has the image {image}, and {folder} has not.")
        found[image] = list(objects)
    return found


def read_questions(path: str | Path) -> pd.DataFrame:
    """POPE's questions: `question_id, image, text, label`, and `object` where the file names it.

    Reads the released files, POPEv2's (`query`, `image_name`, `target_object`), and conversations
    (a row an image, `text` and `label` lists).
    """
    rows = []
    for n, row in enumerate(json_values(path)):
        image = _image(row, n, path)
        texts = row.get("text", row.get("query"))
        labels, own = row.get("label"), row.get("question_id")
        several = isinstance(texts, list)
        if several and not (isinstance(labels, list) and len(labels) == len(texts) > 0):
            raise MetricError(f"{path}: row {n} ({image}) needs a label for each of its questions.")
        turns = list(zip(texts, labels, strict=True)) if several else []
        for turn, (text, label) in enumerate(turns or [(texts, labels)]):
            label = str(label).strip().lower()
            if not isinstance(text, str) or label not in ("yes", "no"):
                raise MetricError(f"{path}: row {n} ({image}) needs a question and yes or no.")
            number = len(rows) + 1 if own is None or several else own
            found = {"question_id": number, "image": image, "text": text, "label": label}
            if row.get("target_object"):
                found["object"] = row["target_object"]
            rows.append(found | ({"turn": turn} if several else {}))
    return pd.DataFrame(rows)


def read_answers(path: str | Path) -> pd.DataFrame:
    """Answers: `answer`, with `question_id` and `question` where the file has them.

    Reads POPE's (`question`, `answer`) and LLaVA's (`question_id`, `prompt`, `text`).
    """
    rows = []
    for n, row in enumerate(json_values(path)):
        if not isinstance(row, dict):
            raise MetricError(f"{path}: row {n} is no object.")
        found = {"answer": _text(row, ("answer", "text", "output", "response"), n, path)}
        for name, keys in (("question_id", ("question_id",)), ("question", ("question", "prompt"))):
            value = next((row[key] for key in keys if key in row), None)
            found |= {} if value is None else {name: value}
        rows.append(found)
    return pd.DataFrame(rows)


def coco_objects(
    instances: Iterable[str | Path],
    captions: Iterable[str | Path],
    vocabulary: Vocabulary,
    images: Iterable[Any] | None = None,
) -> dict[str, list[str]]:
    """Image id -> objects that MSCOCO's instances have, or any of its human captions names.

    Files as released (`instances_val2014.json`, `captions_val2014.json`, ...). `images`: only
    these. Raises `MetricError` where a file is none of them or an image is in no file.
    """
    wanted = None if images is None else {str(image) for image in images}
    found: dict[str, dict[str, None]] = {}

    def note(image: Any, names: Iterable[str]) -> None:
        if wanted is None or str(image) in wanted:
            found.setdefault(str(image), {}).update(dict.fromkeys(names))

    for path in instances:
        whole = _coco(path, "categories")
        names = {row["id"]: vocabulary.object_of(row["name"]) for row in whole["categories"]}
        for row in whole.get("images", []):
            note(row["id"], ())  # an image without any object is known too
        for row in whole["annotations"]:
            note(row["image_id"], [names[row["category_id"]]])
    for path in captions:
        for row in _coco(path)["annotations"]:
            note(row["image_id"], [m.object for m in vocabulary.mentions(row["caption"])])
    if wanted is not None and (missing := sorted(wanted - found.keys())):
        raise MetricError(
            f"images: {missing[0]} (of {len(missing)} such) is in none of the annotation files."
        )
    return {image: list(objects) for image, objects in found.items()}


def json_values(path: str | Path) -> Iterator[Any]:
    """The objects in a file: one a line, one after the other, or all in an array.

    Raises `MetricError` where there are none, or with the line at which JSON ends.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MetricError(f"{path}: cannot be read ({error}).") from error
    decoder, place, values = json.JSONDecoder(), 0, []
    while (place := _skip(text, place)) < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except ValueError as error:
            line = text.count("\n", 0, place) + 1
            raise MetricError(f"{path}: no JSON from line {line} on ({error}).") from error
        values.append(value)
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    if not values:
        raise MetricError(f"{path}: is empty.")
    yield from values


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n,":
        place += 1
    return place


def _image(row: Any, n: int, path: str | Path) -> str:
    found = next((row[key] for key in IMAGE_KEYS if key in row), None) if _is_row(row) else None
    if found is None or found == "":
        raise MetricError(f"{path}: row {n} has no image ({' or '.join(IMAGE_KEYS[:3])}).")
    return str(found)


def _text(row: Any, keys: tuple[str, ...], n: int, path: str | Path) -> str:
    found = next((row[key] for key in keys if key in row), None) if _is_row(row) else None
    if not isinstance(found, str):
        raise MetricError(f"{path}: row {n} has no text ({' or '.join(keys)}).")
    return found


def _is_row(row: Any) -> bool:
    return isinstance(row, Mapping)


def _coco(path: str | Path, *needed: str) -> dict[str, Any]:
    values = list(json_values(path))
    whole = values[0]
    if not _is_row(whole) or any(key not in whole for key in ("annotations", *needed)):
        need = " and ".join(["annotations", *needed])
        raise MetricError(f"{path}: is no file of MSCOCO with {need}.")
    return whole
