"""Reading a question twice: the prompt with a second copy of it, behind a cue.

    Q: The lamp is red. What color is the lamp?
    Read the question again: The lamp is red. What color is the lamp?
    A:

In a causal model no token of the first copy sees what follows it; those of the second see the whole
first copy, so what they hold is about all of the question. The input grows by that copy, which a
control must grow by, too.

Source: Xu et al. 2023, "Re-Reading Improves Reasoning in Large Language Models" (RE2, arXiv
2309.06275) and its code, whose cue this is. Gains are small, and many answers change both ways:
compare prompts in pairs.
"""

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from interp.tasks.prompts import (
    Encoded,
    PromptError,
    about_of,
    as_prompts,
    encode,
    from_examples,
    spans_of,
    token_span,
    tokenizer_of,
)

CUE = "\nRead the question again: "
AGAIN = "again_"


def reread(model, prompts, *, question: str | None = None, cue: str = CUE) -> Dataset:
    """The prompts with their question twice; `model` is a `HookedModel` or a tokenizer.

    Args:
        question: The span that is read again. None: the whole text, all but special tokens.
        cue: What stands between the copies.

    Spans are where they were, in the first copy; those within the question are in the second one
    under their name with `again_` before it. New ones: `question_1`, `cue` and `question_2`.

    Raises `PromptError` where a prompt lacks the span, or its text is not that of its tokens.
    """
    prompts = as_prompts(model, prompts)
    rows: list[dict] = prompts.to_list()
    for row, own in zip(rows, spans_of(prompts) or [{}] * len(rows), strict=True):
        row["spans"] = own
    rows = [read_again(model, row, question, cue, n) for n, row in enumerate(rows)]
    about = about_of(prompts.info.description)
    parameters = {**about["parameters"], "question": question, "cue": cue}
    return from_examples(model, rows, task=f"{about['task']}, read twice", parameters=parameters)


def read_again(
    model, row: dict[str, Any], question: str | None = None, cue: str = CUE, n: int = 0
) -> dict[str, Any]:
    """One prompt (a row as in `interp.tasks`) with its question twice, as `reread` has it."""
    tokenizer, spans = tokenizer_of(model), row.get("spans") or {}
    encoded, special = _encoded(tokenizer, row, n)
    first = _characters(tokenizer, row, encoded, n)
    if question is None:
        start, end = first([encoded.before, encoded.stop])
    elif spans.get(question) is None:
        has = ", ".join(name for name, place in spans.items() if place) or "none"
        raise PromptError(f"prompt {n}: no span {question!r} to read again; it has {has}.")
    else:
        start, end = first(spans[question])
    copied = row["text"][start:end].lstrip()  # the cue ends with the space
    skipped = end - start - len(copied)
    text = row["text"][:end] + cue + copied + row["text"][end:]
    again = end + len(cue) - start - skipped
    grown = len(cue) + len(copied)
    # the space at its end is the next word's
    told = len(cue.rstrip()) or len(cue)
    places = {"question_1": (start, end), "cue": (end, end + told)}
    places["question_2"] = (end + len(cue), end + grown)
    for name, span in spans.items():
        if span is None:
            continue
        a, b = first(span)
        places[name] = (a + grown, b + grown) if a >= end else (a, b + grown if b > end else b)
        if start <= a and b <= end:
            places[AGAIN + name] = (max(a, start + skipped) + again, b + again)
    new = encode(tokenizer, text, special=special)
    found = {name: list(token_span(tokenizer, new, *place)) for name, place in places.items()}
    ids = new.ids[: new.stop] if row.get("answer") else new.ids
    return {**row, "text": text, "input_ids": ids, "spans": found}


def _encoded(tokenizer, row: dict[str, Any], n: int) -> tuple[Encoded, bool]:
    """The prompt's text as its tokens have it, and whether special ones were put around it."""
    for special in (True, False):  # a chat's text has its special tokens already
        encoded = encode(tokenizer, row["text"], special=special)
        if list(row["input_ids"]) in (encoded.ids, encoded.ids[: encoded.stop]):
            return encoded, special
    raise PromptError(
        f"prompt {n}: its tokens are not those of its text {row['text'][:30]!r}, so what is read "
        "again can't be put into it; make it from text."
    )


def _characters(
    tokenizer, row: dict[str, Any], encoded: Encoded, n: int
) -> Callable[[list[int]], tuple[int, int]]:
    """From a span of tokens to its characters."""
    if encoded.offsets is None:
        raise PromptError(
            f"prompt {n}: {type(tokenizer).__name__} does not tell where its tokens stand in the "
            "text; a fast tokenizer (tokenizer.is_fast) does."
        )
    offsets = encoded.offsets
    return lambda span: (offsets[span[0]][0], offsets[span[1] - 1][1])
