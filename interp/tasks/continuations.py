"""What may follow a prompt, right or wrong, as tokens.

Prompts hold the right answer (`answer_ids`). A wrong one is, whichever column there is first:

| column         | the wrong continuation                                              |
|----------------|---------------------------------------------------------------------|
| `rejected_ids` | its tokens                                                          |
| `rejected`     | its text, with the space that it begins with                        |
| `answers`      | of pairs: `[right, wrong]`, the second token                        |
| `choices`      | texts to choose from: the first of them that is not the right answer |
"""

from dataclasses import dataclass

from datasets import Dataset

from interp.tasks.prompts import PromptError, encode, tokenizer_of

WRONG = ("rejected_ids", "rejected", "answers", "choices")


@dataclass(frozen=True, eq=False)
class Statements:
    """Prompts with one of their continuations each: is it the right one, and of which prompt?"""

    token_lists: list[list[int]]
    labels: list[int]
    groups: list[int]


def answers_of(prompts: Dataset) -> list[list[int]]:
    """The tokens of each prompt's right answer. Raises `PromptError` where one has none."""
    found = prompts["answer_ids"] if "answer_ids" in prompts.column_names else [[]] * len(prompts)
    missing = [n for n, ids in enumerate(found) if not ids]
    if missing:
        raise PromptError(
            f"prompts: prompt {missing[0]} has no answer; give a data set with the columns 'text' "
            "and 'answer' (what continues the text, with its leading space)."
        )
    return [list(ids) for ids in found]


def wrong_answers_of(model, prompts: Dataset) -> list[list[int]]:
    """The tokens of one wrong answer for each prompt, from the columns named above.

    Raises `PromptError` where there is no such column, or a prompt has none, or only the right one.
    """
    source = next((name for name in WRONG if name in prompts.column_names), None)
    if source is None:
        raise PromptError(
            f"prompts: nothing says what is wrong; give one of the columns {', '.join(WRONG)}."
        )
    right = answers_of(prompts)
    found = [_wrong(model, row, right[n], source) for n, row in enumerate(prompts)]
    for n, ids in enumerate(found):
        if not ids or ids == right[n]:
            raise PromptError(f"prompts: prompt {n} has no wrong answer in the column {source!r}.")
    return found


def statements(model, prompts: Dataset) -> Statements:
    """Every prompt with its right answer, and with each of its wrong ones.

    All of `choices` where the prompts have them, else the one wrong answer of `wrong_answers_of`.
    """
    right = answers_of(prompts)
    if "choices" in prompts.column_names and all(prompts["choices"]):
        wrong = [
            [ids for text in row["choices"] if (ids := tokens_after(model, row, text)) != right[n]]
            for n, row in enumerate(prompts)
        ]
    else:
        wrong = [[ids] for ids in wrong_answers_of(model, prompts)]
    rows = [
        ([*prompts_ids, *ids], int(ids is right[n]), n)
        for n, prompts_ids in enumerate(prompts["input_ids"])
        for ids in (right[n], *wrong[n])
    ]
    lists, labels, groups = (list(column) for column in zip(*rows, strict=True))
    return Statements(lists, labels, groups)


def tokens_after(model, row: dict, text: str) -> list[int]:
    """The tokens of `text` where it follows the prompt of `row`.

    Raises `PromptError` where it does not begin with a token of its own.
    """
    prompt, tokenizer = list(row["input_ids"]), tokenizer_of(model)
    for special in (True, False):  # a chat's text has its special tokens already
        whole = encode(tokenizer, row["text"] + text, special=special)
        ids = whole.ids[: whole.stop]
        if ids[: len(prompt)] == prompt and len(ids) > len(prompt):
            return ids[len(prompt) :]
    raise PromptError(
        f"{text!r} does not follow {row['text'][-20:]!r} as tokens of its own; begin it with the "
        "space."
    )


def _wrong(model, row: dict, right: list[int], source: str) -> list[int]:
    value = row[source]
    if not value:
        return []
    if source == "rejected_ids":
        return list(value)
    if source == "rejected":
        return tokens_after(model, row, value)
    if source == "answers":
        return [value[1]]
    offered = (tokens_after(model, row, text) for text in value)
    return next((ids for ids in offered if ids != right), [])
