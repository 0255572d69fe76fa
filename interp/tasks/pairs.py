"""Pairs of prompts that line up token by token and differ in one respect: what patching works on.

    clean      After lunch Emma and David visited the market. David gave a lamp to   -> " Emma"
    corrupted  After lunch Emma and David visited the market. Emma gave a lamp to    -> " David"

| column                                      | what it holds                                   |
|---------------------------------------------|-------------------------------------------------|
| `text` ... `spans`, `choices`               | the clean prompt: pairs can be evaluated as such |
| `clean_text`, `clean_input_ids`             | the same, under the name of its side            |
| `corrupted_text`, `corrupted_input_ids`     | the other prompt, of as many tokens             |
| `corrupted_answer`, `corrupted_answer_ids`  | what is right there; None, `[]`: nothing known  |
| `answers`                                   | `[right, wrong]`: tokens that a metric compares |
| `positions`                                 | name -> index into the tokens of either prompt  |

Words put in the place of others of their kind and length are the symmetric token replacement of
Zhang & Nanda 2024 (arXiv 2309.16042), who advise it over noise. It needs prompts of as many tokens
and answers of one token. A pair of yours that has not is an error; `ioi`, `colored_objects` and
`multiple_choice` skip such draws and say how many in `describe(pairs)["skipped"]`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from interp.tasks.aligned import (
    END,
    Pair,
    Side,
    UnfitPair,
    answer_after,
    as_dataset,
    line_up,
    reads_back,
    stored,
    text_side,
    tokenizer_if_any,
)
from interp.tasks.prompts import (
    PromptError,
    SpanError,
    about_of,
    token_span,
    tokenizer_of,
)


def pairs(
    model,
    clean,
    corrupted=None,
    *,
    answers,
    positions: Mapping[str, Any] | None = None,
    choices: Sequence | None = None,
    corrupted_answers: Any = None,
    task: str = "pairs",
    parameters: dict | None = None,
) -> Dataset:
    """Pairs of your own, from texts or from token ids.

    Args:
        model: A `HookedModel` or a tokenizer. A model without tokenizer takes token ids only.
        clean: Texts, or token ids: lists, or a tensor [n, token] without padding. Ids are taken as
            they are, nothing is put around them; their text is for reading only.
        corrupted: As many prompts, each of as many tokens as its clean one. None: the same again
            (for corruption by noise, or for an ablation).
        answers: (right, wrong) for each pair or one for all: texts (" Emma", with its space) or
            token ids; or a tensor [n, 2].
        positions: Name -> place in the clean prompt, one for all pairs or a list with one for each:
            a token's index (negative: from the end), a text that occurs once, or [start, end) in
            characters; of those the last token is meant. `end`, the last token, is always there.
        choices: Texts to choose from, for all pairs or a list for each. Default: right and wrong
            (none where token ids were given that are not what the tokenizer makes of their text).
        corrupted_answers: What is right after each corrupted prompt, where that is known: often
            the wrong answer. Text or token id, for all pairs or one for each.

    Raises `PromptError` that names the pair, what is wrong with it and what to do.
    """
    words = _vocabulary(model)
    sides = _sides(model, "clean", clean, words)
    others = sides if corrupted is None else _sides(model, "corrupted", corrupted, words)
    n = len(sides)
    _same_number(n, "corrupted", others)
    asked = _two_each(answers, n, words)
    if corrupted is None and corrupted_answers is None:
        turned = [right for right, _ in asked]
    else:
        turned = _each("corrupted_answers", _plain(corrupted_answers), n)
        _check_ids("corrupted_answers", turned, words)
    offered = _choices(choices, n)
    if END in (positions or {}):
        raise PromptError(f"positions: {END!r} is always the last token; choose another name.")
    places = {
        name: _each(f"positions[{name!r}]", _plain(place), n)
        for name, place in (positions or {}).items()
    }
    tokenizer, rows = tokenizer_if_any(model), []
    for i, two in enumerate(zip(sides, others, strict=True)):
        here = {name: places[name][i] for name in places}
        try:
            rows.append(_row(tokenizer, *two, *asked[i], turned[i], here, offered[i]))
        except UnfitPair as error:
            raise UnfitPair(error.reason, f"pair {i}: {error}") from None
        except SpanError as error:
            raise SpanError(f"pair {i}: {error}") from None
        except PromptError as error:
            raise PromptError(f"pair {i}: {error}") from None
    return stored(model, rows, {"task": task, "parameters": parameters or {}})


def corrupted(pairs: Dataset) -> Dataset:
    """The corrupted prompts alone, as prompts: does the model answer what is right there?

    Spans are the clean prompt's, for the two line up. Where nothing is known to be right (IOI with
    new names) answers are empty, and evaluating gives the loss on the text.
    """
    missing = {"corrupted_text", "corrupted_input_ids", "corrupted_answer"} - {*pairs.column_names}
    if missing:
        raise PromptError(
            f"pairs: no column {sorted(missing)[0]!r}; make them with interp.tasks.pairs(model, "
            "clean=..., corrupted=..., answers=...) or a task such as interp.tasks.ioi(model)."
        )
    rows = [
        {
            "text": row["corrupted_text"],
            "input_ids": row["corrupted_input_ids"],
            "answer": row["corrupted_answer"] or "",
            "answer_ids": row["corrupted_answer_ids"],
            "spans": row["spans"],
            "choices": row["choices"],
        }
        for row in pairs
    ]
    about = about_of(pairs.info.description)
    return as_dataset(rows, {**about, "task": f"{about['task']}, corrupted"})


# One pair


def _row(tokenizer, clean: Side, other: Side, right, wrong, turned, places, choices) -> dict:
    line_up(tokenizer, clean, other)
    right, wrong = (answer_after(tokenizer, clean, answer) for answer in (right, wrong))
    back = None if turned is None else answer_after(tokenizer, other, turned)
    spans = {name: _place(tokenizer, clean, name, place) for name, place in places.items()}
    positions = {name: end - 1 for name, (_, end) in spans.items()}
    if choices is None:
        two = (right, wrong)
        # `evaluate` reads choices off the text, which ids need not be the tokens of
        readable = all(reads_back(tokenizer, clean, answer) for answer in two)
        choices = [answer.text for answer in two] if readable else []
    elif right.text not in choices:
        raise PromptError(f"choices={choices}: without the right answer {right.text!r}; add it.")
    return Pair(
        clean, other, right, wrong, back, spans or {"text": clean.own}, positions, list(choices)
    ).row()


def _place(tokenizer, prompt: Side, name: str, place) -> list[int]:
    """The tokens [start, end) of a place given as an index, a text or characters."""
    n = len(prompt.ids)
    if isinstance(place, int):
        index = place if place >= 0 else n + place
        if not 0 <= index < n:
            raise PromptError(
                f"positions[{name!r}]: {place} is outside the prompt, which has {n} tokens; give "
                f"{-n} to {n - 1}."
            )
        return [index, index + 1]
    if prompt.encoded is None:
        raise PromptError(
            f"positions[{name!r}]: {place!r}, but the prompt was given as token ids; give the "
            "index of a token."
        )
    if isinstance(place, str):
        count = prompt.text.count(place) if place else 0
        if count != 1:
            raise SpanError(
                f"positions[{name!r}]: {place!r} occurs {count} times in the clean prompt; give "
                "[start, end) in characters, or the index of a token."
            )
        start = prompt.text.index(place)
        place = [start, start + len(place)]
    if not isinstance(place, list) or len(place) != 2:
        raise PromptError(
            f"positions[{name!r}]: {place!r}; give the index of a token, a text that occurs once, "
            "or [start, end) in characters."
        )
    try:
        return list(token_span(tokenizer, prompt.encoded, *place))
    except SpanError as error:
        raise SpanError(f"positions[{name!r}]: {error}.") from None


# What a user passes


def _vocabulary(model) -> int:
    """How many tokens the model (or a tokenizer) has."""
    size = getattr(getattr(model, "cfg", None), "d_vocab", None)
    return size or max(tokenizer_of(model).get_vocab().values()) + 1


def _check_ids(name: str, ids: list, words: int) -> None:
    outside = [token for token in ids if isinstance(token, int) and not 0 <= token < words]
    if outside:
        raise PromptError(
            f"{name}: token {outside[0]} is not among the model's {words}; give ids from 0 to "
            f"{words - 1}, of this model's own tokenizer."
        )


def _sides(model, name: str, prompts, words: int) -> list[Side]:
    given = _plain(prompts)
    if isinstance(given, str) or (given and _is_ids(given)):
        given = [given]
    if not isinstance(given, list):
        raise PromptError(
            f"{name}: {type(prompts).__name__} is neither texts nor token ids; give a list of "
            "str, lists of ids, or a tensor [n, token]."
        )
    if not given:
        raise PromptError(f"{name}: the list is empty; give at least one prompt.")
    return [_side(model, f"{name}, pair {n}", prompt, words) for n, prompt in enumerate(given)]


def _side(model, name: str, prompt, words: int) -> Side:
    if not isinstance(prompt, str) and not _is_ids(prompt):
        raise PromptError(
            f"{name}: {str(prompt)[:40]!r} is neither text nor a list of whole token ids; give "
            "one of them."
        )
    if not (prompt.strip() if isinstance(prompt, str) else prompt):
        raise PromptError(f"{name}: nothing in it; leave the pair out or fill it.")
    if isinstance(prompt, str):
        return text_side(tokenizer_of(model), prompt)
    _check_ids(name, prompt, words)
    tokenizer = tokenizer_if_any(model)
    return Side("" if tokenizer is None else tokenizer.decode(prompt), prompt, None)


def _plain(value):
    """Tensors, arrays and tuples as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _is_ids(value) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) for token in value)


def _same_number(n: int, name: str, given: list) -> None:
    if len(given) != n:
        raise PromptError(f"{name}: {len(given)} for {n} clean prompts; give one for each.")


def _each(name: str, given, n: int) -> list:
    """One for each pair, from a list of as many, or from one for all."""
    if not isinstance(given, list):
        return [given] * n
    _same_number(n, name, given)
    return given


def _two_each(answers, n: int, words: int) -> list[list]:
    given = _plain(answers)
    if isinstance(given, list) and len(given) == 2 and not isinstance(given[0], list):
        given = [given] * n
    if not isinstance(given, list):
        raise PromptError(
            f"answers: {type(answers).__name__}; give (right, wrong) for each pair, or for all."
        )
    _same_number(n, "answers", given)
    for i, two in enumerate(given):
        if not (
            isinstance(two, list)
            and len(two) == 2
            and all(isinstance(answer, int | str) and answer != "" for answer in two)
        ):
            raise PromptError(
                f"answers: pair {i} has {two!r}; give (right, wrong), each a token id or a text "
                "that is not empty."
            )
        _check_ids(f"answers, pair {i}", two, words)
    return given


def _choices(choices, n: int) -> list:
    given = _plain(choices)
    if given is None or (given and all(isinstance(text, str) for text in given)):
        return [given] * n
    _same_number(n, "choices", given)
    for i, texts in enumerate(given):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise PromptError(f"choices: pair {i} has {texts!r}; give a list of texts.")
    return given
