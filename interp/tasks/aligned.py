"""Two prompts whose tokens line up, so that an activation of one has its place in the other.

A pair fits where both prompts have as many tokens, each word that is named stands at the same
tokens of both, and every answer is one token of its own. A user's pair that does not fit is refused
(`UnfitPair`); of drawn pairs those that do not fit are skipped and counted.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

import pyarrow
from datasets import Dataset, DatasetInfo, Features, List, Value
from transformers import PreTrainedTokenizerBase

from interp.tasks.prompts import (
    Encoded,
    PromptError,
    checked,
    encode,
    token_policy,
    token_span,
    tokenizer_of,
)

PATIENCE = 50  # draws that may fail for each pair wanted
TYPES = {
    "answer_ids": List(Value("int64")),
    "choices": List(Value("string")),
    "corrupted_answer": Value("string"),
    "corrupted_answer_ids": List(Value("int64")),
}
END = "end"


class UnfitPair(PromptError):
    """A pair that does not line up in this tokenizer's tokens; `reason` is the kind, for counts."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def from_paired_examples(
    model,
    draw: Iterable[dict],
    n: int,
    *,
    task: str,
    parameters: dict,
    skipped: Counter | None = None,
) -> Dataset:
    """The first `n` examples of `draw` whose two sides line up with this tokenizer.

    An example has `text`, `answer`, `wrong`, `corrupted_text`, `corrupted_answer` (or None) and
    `choices`; `char_spans` and `corrupted_char_spans`, name -> [start, end) in characters, for the
    same words of both sides, whose last tokens become positions; and `followed`, names whose next
    token is a position as well (`S1+1`). What else it has becomes a column. What does not line up
    is counted by reason, on top of what `skipped` holds; the counts stay in the description.

    Raises `PromptError` with the counts where over 50 draws a pair fail, or `draw` ends too soon.
    """
    if n < 1:
        raise PromptError(f"n={n}: give the number of pairs, at least 1.")
    tokenizer, skipped = tokenizer_of(model), Counter() if skipped is None else skipped
    rows, failures = [], []
    for example in draw:
        try:
            rows.append(_example_row(tokenizer, example))
        except UnfitPair as error:
            failures.append(error)
            skipped[error.reason] += 1
        if len(rows) == n or len(failures) > PATIENCE * n:
            break
    if len(rows) < n:
        counts = ", ".join(f"{reason} ({k})" for reason, k in skipped.most_common()) or "none"
        first = f" The first that was: {failures[0]}" if failures else ""
        fewer = f"Give n={len(rows)} or less, or" if rows else "Choose"
        raise PromptError(
            f"{task}: only {len(rows)} of n={n} pairs line up in this tokenizer's tokens. Skipped: "
            f"{counts}.{first} {fewer} another wording, or a model that knows these words."
        )
    about = {"task": task, "parameters": parameters, "skipped": dict(sorted(skipped.items()))}
    return stored(model, rows, about)


def fill(template: str, words: Mapping[str, str]) -> tuple[str, dict[str, list[int]]]:
    """The template with its fields written out, and each field's [start, end) in characters."""
    text, places = "", {}
    for literal, field, _, _ in Formatter().parse(template):
        text += literal
        if field is not None:
            places[field] = [len(text), len(text) + len(words[field])]
            text += words[field]
    return text, places


# One pair


@dataclass(frozen=True)
class Side:
    """One prompt's tokens, up to where its answer follows."""

    text: str
    ids: list[int]
    encoded: Encoded | None  # None: made from token ids

    @property
    def own(self) -> list[int]:
        """Where the tokens are that the text has, without the tokenizer's special ones."""
        return [self.encoded.before if self.encoded else 0, len(self.ids)]


@dataclass(frozen=True)
class Answer:
    """A continuation of one token."""

    text: str
    token: int


@dataclass(frozen=True)
class Pair:
    """Two prompts that line up; `right` and `wrong` follow the clean one."""

    clean: Side
    corrupted: Side
    right: Answer
    wrong: Answer
    corrupted_right: Answer | None
    spans: dict[str, list[int]]
    positions: dict[str, int]
    choices: list[str]

    def __post_init__(self):
        if self.right.token == self.wrong.token:
            raise UnfitPair(
                "right and wrong alike",
                f"right and wrong answer, {self.right.text!r} and {self.wrong.text!r}, are the "
                f"same token {self.right.token}; give two that differ.",
            )

    def row(self) -> dict[str, Any]:
        """The columns of `interp.tasks.pairs`."""
        clean, other, back = self.clean, self.corrupted, self.corrupted_right
        return {
            "text": clean.text,
            "input_ids": clean.ids,
            "answer": self.right.text,
            "answer_ids": [self.right.token],
            "spans": self.spans,
            "choices": self.choices,
            "clean_text": clean.text,
            "clean_input_ids": clean.ids,
            "corrupted_text": other.text,
            "corrupted_input_ids": other.ids,
            "corrupted_answer": back and back.text,
            "corrupted_answer_ids": [back.token] if back else [],
            "answers": [self.right.token, self.wrong.token],
            "positions": self.positions | {END: len(clean.ids) - 1},
        }


def text_side(tokenizer: PreTrainedTokenizerBase, text: str) -> Side:
    """The prompt's tokens without those (</s>, [SEP]) that the tokenizer puts at the end."""
    encoded = encode(tokenizer, text)
    return Side(text, encoded.ids[: encoded.stop], encoded)


def line_up(tokenizer: PreTrainedTokenizerBase | None, clean: Side, corrupted: Side) -> None:
    """Raises `UnfitPair` unless both prompts have as many tokens."""
    a, b = clean.ids, corrupted.ids
    if len(a) == len(b):
        return
    short = min(len(a), len(b))
    head = next((i for i in range(short) if a[i] != b[i]), short)
    tail = next((i for i in range(short - head) if a[-1 - i] != b[-1 - i]), short - head)
    apart = [ids[head : len(ids) - tail][:6] for ids in (a, b)]
    if tokenizer is not None:
        apart = [tokenizer.convert_ids_to_tokens(ids) for ids in apart]
    one, other = (ids or "nothing" for ids in apart)
    raise UnfitPair(
        "different numbers of tokens",
        f"{len(a)} clean and {len(b)} corrupted tokens: from token {head} on the clean prompt has "
        f"{one} where the corrupted one has {other}. Patching goes token by token; put words of "
        "as many tokens in each other's place.",
    )


def answer_after(
    tokenizer: PreTrainedTokenizerBase | None, prompt: Side, answer: str | int
) -> Answer:
    """An answer as it stands in the tokens of prompt and answer together; an id as it is."""
    if isinstance(answer, int):
        return Answer("" if tokenizer is None else _read_after(tokenizer, prompt, answer), answer)
    if tokenizer is None:
        raise PromptError(
            f"the answer {answer!r} is text, and the model has no tokenizer; give its token id."
        )
    head = prompt.ids if prompt.encoded else text_side(tokenizer, prompt.text).ids
    ids = text_side(tokenizer, prompt.text + answer).ids
    new = ids[len(head) :] if ids[: len(head)] == head else []
    if not new:
        raise UnfitPair(
            "an answer that merges with its prompt",
            f"no token of its own begins the answer {answer!r} after {prompt.text[-20:]!r}; end "
            "the prompt at a word, and begin the answer with the space.",
        )
    if len(new) > 1:
        raise UnfitPair(
            "an answer of several tokens",
            f"the answer {answer!r} is {len(new)} tokens, {tokenizer.convert_ids_to_tokens(new)}, "
            "and has to be one; choose another word, or give the id of one token.",
        )
    if new[0] in unknown_tokens(tokenizer):
        raise UnfitPair(
            "unknown words",
            f"the answer {answer!r} is no word of this tokenizer; choose one that is.",
        )
    return Answer(answer, new[0])


def _read_after(tokenizer: PreTrainedTokenizerBase, prompt: Side, token: int) -> str:
    """The text that a token adds: decoded by itself it may lose its space."""
    before, whole = (str(tokenizer.decode([*prompt.ids, *more])) for more in ((), (token,)))
    return whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode([token]))


def reads_back(tokenizer: PreTrainedTokenizerBase | None, prompt: Side, answer: Answer) -> bool:
    """Does the text of prompt and answer give their tokens again?"""
    if tokenizer is None:
        return False
    return text_side(tokenizer, prompt.text + answer.text).ids == [*prompt.ids, answer.token]


def unknown_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that stand for whatever the vocabulary lacks."""
    core = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    word = getattr(getattr(core, "model", None), "unk_token", None)
    # a tokenizer made in memory may have one that transformers was not told of
    found: list[Any] = [tokenizer.unk_token_id, core.token_to_id(word) if core and word else None]
    return {token for token in found if token is not None}


def _example_row(tokenizer: PreTrainedTokenizerBase, example: dict) -> dict[str, Any]:
    clean, other = (text_side(tokenizer, example[k]) for k in ("text", "corrupted_text"))
    for side in (clean, other):
        _check_words(tokenizer, side)
    line_up(tokenizer, clean, other)
    right, wrong = (answer_after(tokenizer, clean, example[k]) for k in ("answer", "wrong"))
    turned = example["corrupted_answer"]
    back = None if turned is None else answer_after(tokenizer, other, turned)
    spans = _spans(tokenizer, clean, example["char_spans"])
    for name, place in _spans(tokenizer, other, example["corrupted_char_spans"]).items():
        if spans[name] != place:
            raise UnfitPair(
                "words at different tokens",
                f"{name!r} is tokens {spans[name]} of {clean.text!r}, and {place} of "
                f"{other.text!r}.",
            )
    positions = {name: end - 1 for name, (_, end) in spans.items()}
    positions |= {f"{name}+1": spans[name][1] for name in example.get("followed", ())}
    row = Pair(clean, other, right, wrong, back, spans, positions, example["choices"]).row()
    used = (*row, "wrong", "char_spans", "corrupted_char_spans", "followed")
    return row | {name: value for name, value in example.items() if name not in used}


def _check_words(tokenizer: PreTrainedTokenizerBase, side: Side) -> None:
    unknown = unknown_tokens(tokenizer)
    at = next((i for i in range(*side.own) if side.ids[i] in unknown), None)
    if at is not None:
        offsets = side.encoded and side.encoded.offsets
        word = repr(side.text[slice(*offsets[at])]) if offsets else "a word"
        raise UnfitPair("unknown words", f"{word} of {side.text!r} is no word of this tokenizer.")


def _spans(tokenizer, side: Side, places: Mapping[str, list[int]]) -> dict[str, list[int]]:
    return {
        name: list(token_span(tokenizer, side.encoded, *place)) for name, place in places.items()
    }


# Storage


def stored(model, rows: list[dict], about: dict) -> Dataset:
    """The pairs as a data set, if the model can take their tokens."""
    tokenizer = tokenizer_if_any(model)
    tokens = {} if tokenizer is None else token_policy(tokenizer)
    return checked(model, as_dataset(rows, {**about, "tokens": tokens}))


def as_dataset(rows: list[dict], about: dict) -> Dataset:
    """Rows with the same columns as a data set that is described by `about`."""
    features = Features.from_arrow_schema(pyarrow.Table.from_pylist(rows).schema)
    # a column of nothing but None, or of empty lists, would have no type
    features.update({name: kind for name, kind in TYPES.items() if name in features})
    info = DatasetInfo(description=json.dumps(about, sort_keys=True), features=features)
    return Dataset.from_list(rows, features=features, info=info)


def tokenizer_if_any(model) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model that has one, or `model` itself where it is one."""
    has = isinstance(model, PreTrainedTokenizerBase) or getattr(model, "tokenizer", None)
    return tokenizer_of(model) if has else None
