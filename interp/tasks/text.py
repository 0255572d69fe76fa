"""Plain text as prompts: from strings, .txt files, a `datasets` data set, or filler of our own."""

import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from datasets import Dataset

from interp.tasks import filler
from interp.tasks.prompts import (
    PromptError,
    context_window,
    encode,
    from_examples,
    texts_of,
    tokenizer_of,
    windows,
)

FILLER_TOKENS, FILLER_PROMPTS = 256, 20


def text(
    model, source=None, max_tokens: int | None = None, n: int | None = None, seed: int = 0
) -> Dataset:
    """Plain-text prompts: each text of `source`, cut into windows of `max_tokens` tokens.

    `source` is a text or a list of them, a .txt file or a folder of them, a data set with a column
    `text`, or None: filler whose sentences do not repeat, a control on which "nothing else broke"
    (20 prompts of 256 tokens unless told). A rest shorter than a window is left out. `n` draws as
    many windows by `seed`. `model` is a `HookedModel` or a tokenizer.

    Raises `PromptError` for empty or binary text, naming the prompt or file, and where a text is
    longer than the context window and `max_tokens` is not given.
    """
    about = {"source": _name(source), "max_tokens": max_tokens, "n": n, "seed": seed}
    if source is None:
        size = max_tokens or min(FILLER_TOKENS, context_window(model) or FILLER_TOKENS)
        examples = _filler(model, size, FILLER_PROMPTS if n is None else n, seed)
        return from_examples(model, examples, task="text", parameters=about)
    found = read_texts(source).values() if is_path(source) else texts_of(source)
    examples = [{"text": t} for t in found]
    if max_tokens is not None:
        tokenizer = tokenizer_of(model)
        examples = [w for e in examples for w in windows(tokenizer, e["text"], max_tokens)]
    if n is not None:
        examples = _draw(examples, n, seed)
    return from_examples(model, examples, task="text", parameters=about)


def is_path(source) -> bool:
    """A `Path`, a str that names a file or folder, or one that can only be meant to."""
    if not isinstance(source, str):
        return isinstance(source, Path)
    if not source or any(letter.isspace() or letter == "\0" for letter in source):
        return False
    return source.endswith(".txt") or (len(source) < 256 and Path(source).exists())


def read_texts(path: str | Path) -> dict[str, str]:
    """The text of a file, or of every .txt file of a folder in the order of their names.

    Raises `PromptError` naming the file that is empty, binary or not UTF-8.
    """
    path = Path(path)
    if not path.exists():
        raise PromptError(f"{path}: no such file or folder.")
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise PromptError(f"{path}: no .txt file in this folder.")
    return {str(file): _read(file) for file in files}


def _read(file: Path) -> str:
    raw = file.read_bytes()
    if b"\0" in raw:
        raise PromptError(f"{file}: binary data (or UTF-16), not text; save it as UTF-8.")
    try:
        got = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{file}: not UTF-8 text (byte {raw[error.start]:#04x} at {error.start}); convert it."
        ) from None
    if not got.strip():
        raise PromptError(f"{file}: the file is empty.")
    return got


def _filler(model, size: int, n: int, seed: int) -> list[dict]:
    """`n` windows of filler, each from a text of its own."""
    tokenizer, rng = tokenizer_of(model), random.Random(f"filler {seed}")
    examples = []
    for _ in range(n):
        lines, own = filler.sentences(rng.getrandbits(32)), ""
        while len(encode(tokenizer, own).ids) < size:  # a sentence has several tokens
            own = " ".join([own, *islice(lines, size // 8 + 1)]).strip()
        examples.append(next(iter(windows(tokenizer, own, size))))
    return examples


def _draw(examples: Sequence[dict], n: int, seed: int) -> list[dict]:
    if not 1 <= n <= len(examples):
        raise PromptError(f"n={n}: the source has {len(examples)} windows; give 1 to as many.")
    chosen = sorted(random.Random(f"windows {seed}").sample(range(len(examples)), n))
    return [examples[i] for i in chosen]


def _name(source) -> str:
    """The source as provenance names it; which texts it had, the hash of the rows tells."""
    if source is None:
        return "filler"
    return str(source) if is_path(source) else type(source).__name__
