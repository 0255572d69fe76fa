"""Prompts: a `datasets.Dataset` whose rows hold token ids, what should follow, and named spans.

| column       | what it holds                                                                    |
|--------------|----------------------------------------------------------------------------------|
| `text`       | the prompt as the model gets it (with `chat=True` the rendered template)         |
| `input_ids`  | its tokens                                                                       |
| `answer`     | the text that continues it, leading space included; `""` where there is none     |
| `answer_ids` | the tokens of the answer                                                         |
| `spans`      | name -> `[start, end)`, indices into `input_ids`                                 |
| `image`      | where there is one: the image, or several (`datasets.Image`); see below          |

Tokens follow the tokenizer's own policy, `tokenizer(text).input_ids`, with one exception: where an
answer is to follow, special tokens that the tokenizer puts at the *end* ([SEP], </s>) are left out.
A span has every token that shares a character with it, so a token that straddles an edge is in.

The text of a prompt with images has the model's own image token once for each
(`interp.model.images.image_mark`); `input_ids` have it as often as the image takes, and `spans` say
where: `image`, or `image_1`, `image_2`, ... where there are several.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, DatasetDict, DatasetInfo, Features, Image, List, Value
from transformers import PreTrainedTokenizerBase

from interp.errors import UserError
from interp.model.images import listed, with_images


class PromptError(UserError):
    """A text, file or data set that cannot become prompts for this model."""


class SpanError(PromptError):
    """A named part of a prompt that is not in its tokens."""


def as_prompts(model, prompts, *, max_tokens: int | None = None) -> Dataset:
    """Prompts from a str, a list of str, a data set with a `text` column, or prompts (checked).

    `model` is a `HookedModel` or a tokenizer. `max_tokens` cuts longer texts at their end. Raises
    `PromptError` naming the prompt that is empty, not text, or longer than the context window.
    """
    if isinstance(prompts, Dataset) and "input_ids" in prompts.column_names:
        return checked(model, prompts, max_tokens)
    examples = _examples(prompts)
    if max_tokens is not None:
        examples = [_cut(tokenizer_of(model), n, e, max_tokens) for n, e in enumerate(examples)]
    return from_examples(model, examples, task="text", parameters={"max_tokens": max_tokens})


def from_examples(
    model,
    examples: Iterable[dict],
    *,
    task: str = "examples",
    parameters: dict | None = None,
    chat: bool = False,
) -> Dataset:
    """Prompts from examples at the level of text. `model` is a `HookedModel` or a tokenizer.

    An example has `text`, and where they apply `answer`, `char_spans` (name -> `(start, end)` in
    characters, or a str that occurs once), `char_span_lists` (name -> several places, which become
    a column of that name) and `reply`; what else it has (`choices`, `target`, ...) is carried along
    as columns. Without spans it gets one named `text`: all but the special tokens. An example made
    from tokens has `input_ids`, `answer_ids` and `spans` instead; its text is only for reading.
    Examples with an `image` (or a list of them) want the model itself, not its tokenizer.

    `chat=True` puts the text in the user's turn of the tokenizer's chat template; a `reply`, which
    is the end of `text`, opens the assistant's turn instead.
    """
    tokenizer, examples = tokenizer_of(model), list(examples)
    if not examples:
        raise PromptError("prompts: the list is empty; give at least one text.")
    if chat:
        opening = _chat_opening(tokenizer)
        examples = [_in_chat(tokenizer, n, e, opening) for n, e in enumerate(examples)]
    rows = [_row(tokenizer, n, example, special=not chat) for n, example in enumerate(examples)]
    for n, example in enumerate(examples):
        if listed(example.get("image")):
            rows[n] = with_images(model, n, rows[n], example.get("char_span_lists") or ())
    about = {
        "task": task,
        "parameters": parameters or {},
        "tokens": token_policy(tokenizer, chat),
    }
    return checked(model, _dataset(rows, about))


def texts_of(prompts) -> list[str]:
    """The texts of whatever `as_prompts` takes, checked but not tokenised."""
    return [_text(n, example["text"]) for n, example in enumerate(_examples(prompts))]


def describe(prompts: Dataset) -> dict:
    """What these prompts are, for provenance: `task`, `parameters`, `tokens`, `n`, `sha256`."""
    about = about_of(prompts.info.description)
    digest = hashlib.sha256()
    for row in prompts:
        line = json.dumps(row, sort_keys=True, ensure_ascii=True, default=_digest)
        digest.update(line.encode() + b"\n")
    return {**about, "n": len(prompts), "sha256": digest.hexdigest()}


def spans_of(prompts: Dataset) -> list[dict] | None:
    """Each prompt's spans, name -> [start, end), for `model.spans`; None where there are none."""
    if "spans" not in prompts.column_names:
        return None
    return [{name: s for name, s in row.items() if s is not None} for row in prompts["spans"]]


def tokenizer_of(model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or `model` itself where it is one."""
    tokenizer = (
        model if isinstance(model, PreTrainedTokenizerBase) else getattr(model, "tokenizer", None)
    )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise PromptError(
            f"model: {type(model).__name__} has no Hugging Face tokenizer; pass one with "
            "interp.load(model, tokenizer=...), or the tokenizer itself."
        )
    return tokenizer


def context_window(model) -> int | None:
    """How many tokens the model takes; None where that is not known (a bare tokenizer)."""
    return getattr(getattr(model, "cfg", None), "n_ctx", None)


def token_policy(tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> dict:
    """How texts become tokens, in words that a provenance record can keep."""
    probe = encode(tokenizer, "a")
    names = tokenizer.convert_ids_to_tokens(probe.ids)
    return {
        "tokenizer": type(tokenizer).__name__,
        "vocabulary": len(tokenizer),
        "chat": chat,
        "before": [] if chat else names[: probe.before],
        "after": [] if chat else names[len(names) - probe.after :],
    }


# Text to tokens


@dataclass(frozen=True)
class Encoded:
    """A tokenised text: `before` and `after` count the special tokens put around it."""

    text: str
    ids: list[int]
    before: int
    after: int
    offsets: list[tuple[int, int]] | None  # None: the tokenizer has none

    @cached_property
    def stop(self) -> int:
        """Where the text's own tokens end."""
        return len(self.ids) - self.after


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> Encoded:
    """Tokenise; `special=False` where the text has its special tokens already (a chat)."""
    got = tokenizer(
        text,
        add_special_tokens=special,
        return_special_tokens_mask=True,
        return_offsets_mapping=bool(tokenizer.is_fast),
        verbose=False,  # a text longer than the window gets an error of ours
    )
    ids, mask = got["input_ids"], got["special_tokens_mask"] if special else []
    before = next((i for i, bit in enumerate(mask) if not bit), len(mask))
    after = next((i for i, bit in enumerate(reversed(mask)) if not bit), 0)
    offsets = [tuple(pair) for pair in got["offset_mapping"]] if tokenizer.is_fast else None
    return Encoded(text, ids, before, after, offsets)


def count(model, example: dict, *, chat: bool = False) -> int:
    """How many tokens an example's prompt and answer have together."""
    tokenizer = tokenizer_of(model)
    if chat:
        example = _in_chat(tokenizer, 0, example, _chat_opening(tokenizer))
    whole = encode(tokenizer, example["text"] + (example.get("answer") or ""), special=not chat)
    return whole.stop if example.get("answer") else len(whole.ids)


def token_span(
    tokenizer: PreTrainedTokenizerBase, encoded: Encoded, start: int, end: int
) -> tuple[int, int]:
    """The tokens `[first, last)` that share a character with `text[start:end]`."""
    if not 0 <= start < end <= len(encoded.text):
        raise SpanError(
            f"characters [{start}, {end}) are not in the text, which has {len(encoded.text)}"
        )
    if encoded.offsets is None:
        return _span_by_prefixes(tokenizer, encoded, start, end)
    inside = [i for i, (a, b) in enumerate(encoded.offsets) if a < end and b > start]
    if not inside:
        raise SpanError(f"no token covers {encoded.text[start:end]!r}")
    return inside[0], inside[-1] + 1


def _span_by_prefixes(tokenizer, encoded: Encoded, start: int, end: int) -> tuple[int, int]:
    """For tokenizers without offsets: where the tokens of a cut text leave those of the whole."""
    own = encoded.ids[encoded.before : encoded.stop]
    special = encoded.before + encoded.after > 0

    def agreeing(stop: int) -> tuple[int, bool]:
        part = encode(tokenizer, encoded.text[:stop], special=special)
        ids = part.ids[part.before : part.stop]
        same = next((i for i, (a, b) in enumerate(zip(ids, own, strict=False)) if a != b), None)
        return (min(len(ids), len(own)), True) if same is None else (same, False)

    first, (last, clean) = agreeing(start)[0], agreeing(end)
    first, last = encoded.before + first, encoded.before + last + (not clean)
    wanted = encoded.text[start:end]
    decoded = tokenizer.decode(encoded.ids[first:last])
    if "".join(wanted.split()).lower() not in "".join(decoded.split()).lower():
        raise SpanError(
            f"{wanted!r} was not found in the tokens of a tokenizer without offsets; "
            "a fast tokenizer (tokenizer.is_fast) finds it"
        )
    return first, last


# One example to one row


def _row(tokenizer, n: int, example: dict, *, special: bool) -> dict:
    answer = example.get("answer") or ""
    if "input_ids" in example:  # made from tokens: the text is only for reading
        ids, spans, lists = list(example["input_ids"]), dict(example["spans"]), {}
        answer_ids = list(example.get("answer_ids") or [])
    else:
        encoded = encode(tokenizer, _text(n, example["text"]), special=special)
        spans = _spans(tokenizer, n, encoded, example.get("char_spans") or {})
        lists = {
            name: [_span(tokenizer, n, encoded, name, place) for place in places]
            for name, places in (example.get("char_span_lists") or {}).items()
        }
        answer_ids = _continuation(tokenizer, n, encoded, answer, special=special)
        ids = encoded.ids[: encoded.stop] if answer else encoded.ids
    row = {
        "text": example["text"],
        "input_ids": ids,
        "answer": answer,
        "answer_ids": answer_ids,
        "spans": spans,
    }
    known = (*row, "reply", "char_spans", "char_span_lists")
    known += ("corrupted_char_spans", "followed", "wrong")  # of pairs, see interp.tasks.aligned
    return row | lists | {name: v for name, v in example.items() if name not in known}


def _text(n: int, text: Any) -> str:
    """The text, or the error that tells which prompt is none."""
    if not isinstance(text, str):
        raise PromptError(f"prompt {n}: {type(text).__name__} is not text; give a str.")
    if not text.strip():
        raise PromptError(f"prompt {n}: the text is empty; leave it out or fill it.")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise PromptError(f"prompt {n}: binary data ({text[:20]!r}...), not text; decode it first.")
    return text


def _spans(tokenizer, n: int, encoded: Encoded, wanted: dict) -> dict[str, list[int]]:
    if not wanted:
        if encoded.before >= encoded.stop:
            raise PromptError(f"prompt {n}: {encoded.text[:20]!r} has no tokens of its own.")
        return {"text": [encoded.before, encoded.stop]}
    return {name: _span(tokenizer, n, encoded, name, place) for name, place in wanted.items()}


def _span(tokenizer, n: int, encoded: Encoded, name: str, place) -> list[int]:
    try:
        start, end = _characters(encoded.text, place)
        return list(token_span(tokenizer, encoded, start, end))
    except SpanError as error:
        raise SpanError(f"prompt {n}, span {name!r}: {error}.") from None


def _characters(text: str, place: str | Sequence[int]) -> tuple[int, int]:
    if not isinstance(place, str):
        start, end = place
        return start, end
    found = text.count(place) if place else 0
    if found != 1:
        raise SpanError(f"{place!r} occurs {found} times in the text; give (start, end) characters")
    return text.index(place), text.index(place) + len(place)


def _continuation(tokenizer, n: int, prompt: Encoded, answer: str, *, special: bool) -> list[int]:
    """The answer's tokens, as they stand in the tokens of prompt and answer together."""
    if not answer:
        return []
    whole = encode(tokenizer, prompt.text + answer, special=special)
    head, ids = prompt.ids[: prompt.stop], whole.ids[: whole.stop]
    if ids[: len(head)] != head or len(ids) == len(head):
        raise PromptError(
            f"prompt {n}: its end {prompt.text[-20:]!r} and the answer {answer!r} merge into one "
            "token, so no token of its own begins the answer; end the prompt at a word and begin "
            "the answer with the space."
        )
    return ids[len(head) :]


# Chat


def _render(tokenizer, content: str) -> str:
    turn = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def _chat_opening(tokenizer) -> int:
    """How many characters the chat template writes before the user's text."""
    if not tokenizer.chat_template:
        raise PromptError(
            "chat=True: this tokenizer has no chat template; leave chat off, or set "
            "tokenizer.chat_template."
        )
    marker = "the text of the user"
    return len(_render(tokenizer, marker).partition(marker)[0])


def _in_chat(tokenizer, n: int, example: dict, opening: int) -> dict:
    """The example inside the chat template, its spans moved along."""
    text, reply = _text(n, example["text"]), example.get("reply", "")
    if not text.endswith(reply):
        raise PromptError(f"prompt {n}: the reply {reply!r} is not the end of its text.")
    asked = text[: len(text) - len(reply)]
    content, skipped = asked.strip(), len(asked) - len(asked.lstrip())
    shown = _render(tokenizer, content)
    if not shown.startswith(content, opening):
        raise SpanError(f"prompt {n}: the chat template changes the text; leave chat off.")

    def moved(name, place) -> tuple[int, int]:
        start, end = _characters(text, place)
        if end > len(asked):
            raise SpanError(
                f"prompt {n}, span {name!r}: it reaches into the reply, which chat=True takes "
                "apart from the user's text; end the span before it."
            )
        return start + opening - skipped, end + opening - skipped

    answer, spans = example.get("answer") or "", example.get("char_spans") or {}
    lists = example.get("char_span_lists") or {}
    return {
        **example,
        "text": shown + reply.lstrip(),
        "answer": answer if reply else answer.lstrip(),  # a turn does not begin with a space
        "char_spans": {name: moved(name, spans[name]) for name in spans}
        or {"text": (opening, opening + len(content))},
        "char_span_lists": {k: [moved(k, place) for place in lists[k]] for k in lists},
    }


# What a user passes as prompts


def _examples(prompts) -> list[dict]:
    """One example for each text in whatever was given."""
    if isinstance(prompts, DatasetDict):
        names = ", ".join(map(str, prompts))
        raise PromptError(f"prompts: a DatasetDict; choose one of its splits ({names}).")
    if isinstance(prompts, Dataset):
        _check_columns(prompts)
        return prompts.to_list()
    if isinstance(prompts, Path):
        raise PromptError(
            f"prompts: {prompts} is a path; read it with interp.tasks.text(model, path)."
        )
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise PromptError(
            f"prompts: {type(prompts).__name__} is none of str, list of str, datasets.Dataset "
            "with a column 'text', and what interp.tasks returns."
        )
    return [e if isinstance(e, dict) and "text" in e else {"text": e} for e in prompts]


def _check_columns(data: Dataset) -> None:
    columns = data.column_names
    if "text" in columns:
        return
    near = get_close_matches("text", columns, cutoff=0.4) or [
        name for name in columns if data.features[name] == Value("string")
    ]
    hint = f"; rename_column({near[0]!r}, 'text')" if near else ""
    raise PromptError(
        f"prompts: the data set has no column 'text' (it has {', '.join(columns) or 'none'}){hint}."
    )


def _cut(tokenizer, n: int, example: dict, max_tokens: int) -> dict:
    if example.get("answer"):
        raise PromptError(
            f"max_tokens={max_tokens}: prompt {n} has an answer, which a cut would part from its "
            "question; make the text shorter instead."
        )
    return {**example, **next(windows(tokenizer, _text(n, example["text"]), max_tokens))}


def windows(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> Iterator[dict]:
    """The text in pieces of `max_tokens` tokens, special tokens included.

    A text that fits is one piece; of a longer one the shorter rest is left out. Pieces are cut from
    the tokens of the whole text, so tokenising a piece again may differ at its edges.
    """
    encoded = encode(tokenizer, text)
    own = encoded.ids[encoded.before : encoded.stop]
    size = max_tokens - encoded.before - encoded.after
    if size < 1:
        raise PromptError(
            f"max_tokens={max_tokens}: the tokenizer adds {encoded.before + encoded.after} special "
            "tokens, which leaves no room for text."
        )
    if len(own) <= size:
        yield {"text": text}
        return
    head, tail = encoded.ids[: encoded.before], encoded.ids[encoded.stop :]
    for start in range(0, len(own) - size + 1, size):
        first, last = encoded.before + start, encoded.before + start + size
        piece = encoded.ids[first:last]
        if encoded.offsets is None:
            shown = tokenizer.decode(piece)
        else:
            shown = text[encoded.offsets[first][0] : encoded.offsets[last - 1][1]]
        spans = {"text": [len(head), len(head) + size]}
        yield {"text": shown, "input_ids": head + piece + tail, "spans": spans}


def checked(model, prompts: Dataset, max_tokens: int | None = None) -> Dataset:
    """The prompts, if every one of them has tokens that the model can take."""
    if not len(prompts):
        raise PromptError("prompts: the data set has no rows.")
    limits = [n for n in (context_window(model), max_tokens) if n is not None]
    answers = prompts["answer_ids"] if "answer_ids" in prompts.column_names else None
    words = getattr(getattr(model, "cfg", None), "d_vocab", None)
    for n, ids in enumerate(prompts["input_ids"]):
        if not ids:
            raise PromptError(f"prompt {n}: it has no tokens.")
        size = len(ids) + (len(answers[n] or []) if answers else 0)
        if limits and size > min(limits):
            raise PromptError(
                f"prompt {n}: {size} tokens (answer included), and the model's window has "
                f"{min(limits)}; pass max_tokens={min(limits)} with plain text, or make it shorter."
            )
        if words and max(ids) >= words:
            raise PromptError(
                f"prompt {n}: token {max(ids)} is not among the model's {words}; were these "
                "prompts made with another model's tokenizer?"
            )
    return prompts


# Storage


def _dataset(rows: list[dict], about: dict) -> Dataset:
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name) for name in names} for row in rows]
    pictures = [name for name in names if name == "image"]  # arrow has no type for them
    bare = [{name: row[name] for name in names if name not in pictures} for row in rows]
    features = Features.from_arrow_schema(pyarrow.Table.from_pylist(bare).schema)
    for name in pictures:
        several = any(isinstance(row[name], (list, tuple)) for row in rows)
        features[name] = List(Image()) if several else Image()
        rows = [{**row, name: listed(row[name])} for row in rows] if several else rows
    for name in ("input_ids", "answer_ids"):  # a column of empty lists would have no type
        features[name] = List(Value("int64"))
    info = DatasetInfo(description=json.dumps(about, sort_keys=True), features=features)
    return Dataset.from_list(rows, features=features, info=info)


def about_of(description: str) -> dict:
    """What `from_examples` noted; sets of several tasks were joined by an empty line."""
    try:
        parts = [json.loads(part) for part in description.split("\n\n")]
    except json.JSONDecodeError:
        parts = []
    if not parts:
        return {"task": "data set", "parameters": {}, "tokens": {}}
    if len(parts) == 1:
        return parts[0]
    return {
        "task": " + ".join(part["task"] for part in parts),
        "parameters": {"parts": [part["parameters"] for part in parts]},
        "tokens": parts[0]["tokens"],
    }


def _digest(value: Any) -> str:
    """Stands in for a value that JSON cannot hold (an image, a date)."""
    raw = value.tobytes() if hasattr(value, "tobytes") else str(value).encode()
    return hashlib.sha256(raw).hexdigest()
