"""Something general asked about the same images, to compare a question with."""

from datasets import Dataset

from interp.analysis.image_attention import ImageAttentionError, image_prompts
from interp.model.hooked import HookedModel
from interp.model.images import image_mark, images_of
from interp.tasks.prompts import about_of, from_examples, spans_of

GENERAL = "Write a general description of the image."


def general_prompts(model: HookedModel, prompts: Dataset, general: str | Dataset) -> Dataset:
    """The same images with something else asked; see `relative_attention`."""
    if isinstance(general, Dataset):
        others = image_prompts(model, general)
        if len(others) != len(prompts):
            raise ImageAttentionError(f"general: {len(others)} prompts for {len(prompts)}.")
    else:
        if not general.strip():
            raise ImageAttentionError("general='': a question that is about the whole image.")
        rows = [_generally(model, n, row, general) for n, row in enumerate(_rows(prompts))]
        about = about_of(prompts.info.description)
        others = from_examples(model, rows, task=about["task"], parameters={"general": general})
    for n, (one, other) in enumerate(zip(prompts["spans"], others["spans"], strict=True)):
        counts = [span["image"][1] - span["image"][0] for span in (one, other)]
        if counts[0] != counts[1]:
            raise ImageAttentionError(
                f"general: prompt {n} has {counts[1]} image tokens there and {counts[0]} here."
            )
    return others


def _generally(model: HookedModel, n: int, row: dict, general: str) -> dict:
    start, end = row["spans"]["image"]
    until = (row["spans"].get("text") or [0, len(row["input_ids"])])[1]
    mark, words = image_mark(model), row["text"].partition(image_mark(model))[2]
    ids = list(row["input_ids"])
    closing = model.tokenizer(mark, add_special_tokens=False).input_ids
    token = ids[start]
    closing = closing[closing.index(token) + 1 :]  # what closes an image, in some models
    if ids[end : end + len(closing)] == closing:
        end += len(closing)
    if until <= end:
        raise ImageAttentionError(
            f"prompt {n}: nothing is asked behind its image, in whose place something general "
            "could stand; give such prompts themselves, general=..."
        )
    space = words[: len(words) - len(words.lstrip())]
    asked = model.tokenizer(space + general, add_special_tokens=False).input_ids
    new = [*ids[:end], *asked, *ids[until:]]
    spans = {"image": [start, row["spans"]["image"][1]]}
    return {"text": general, "input_ids": new, "spans": spans, "image": row["image"]}


def _rows(prompts: Dataset) -> list[dict]:
    spans = spans_of(prompts) or []
    shown = zip(prompts.remove_columns("image"), spans, images_of(prompts) or [], strict=True)
    return [dict(row) | {"spans": own, "image": image} for row, own, image in shown]
