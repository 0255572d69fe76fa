"""Repeated random tokens: the input on which induction heads show.

    [BOS] t1 ... tL  t1 ... tL      with random t1 ... tL

The prompt stops before the very last token, which is the answer: only the earlier copies tell it.
Source: Olsson et al. 2022, "In-context Learning and Induction Heads" (arXiv 2209.11895).
"""

import random

from datasets import Dataset

from interp.tasks.prompts import PromptError, encode, from_examples, tokenizer_of

ORDINALS = ("first", "second", "third", "fourth", "fifth")


def repeats(model, n: int = 20, length: int = 50, repeats: int = 2, seed: int = 0) -> Dataset:
    """`n` prompts of `length` random tokens, all of them written `repeats` times.

    Tokens are drawn from the vocabulary without special and added tokens, none twice in a prompt
    where the vocabulary allows it. Spans `first`, `second`, ... are the copies; the last of them is
    one token short, its last token being the answer. `text` is for reading only: tokenising it
    again need not give the same tokens.
    """
    if n < 1 or length < 2:
        raise PromptError(f"n={n}, length={length}: give n >= 1 prompts of length >= 2 tokens.")
    if not 2 <= repeats <= len(ORDINALS):
        raise PromptError(f"repeats={repeats}: give 2 to {len(ORDINALS)}.")
    tokenizer, rng = tokenizer_of(model), random.Random(f"repeats {seed}")
    words = ordinary_tokens(tokenizer)
    probe = encode(tokenizer, "a")
    head = probe.ids[: probe.before]
    examples = []
    for _ in range(n):
        block = rng.sample(words, length) if length <= len(words) else rng.choices(words, k=length)
        ids = (block * repeats)[:-1]
        starts = [len(head) + length * i for i in range(repeats)]
        stops = [*starts[1:], len(head) + len(ids)]
        examples.append(
            {
                "text": tokenizer.decode(head + ids),
                "input_ids": head + ids,
                "answer": tokenizer.decode(block[-1:]),
                "answer_ids": block[-1:],
                "spans": {
                    name: [start, stop]
                    for name, start, stop in zip(ORDINALS, starts, stops, strict=False)
                },
            }
        )
    about = {"n": n, "length": length, "repeats": repeats, "seed": seed}
    return from_examples(model, examples, task="repeats", parameters=about)


def ordinary_tokens(tokenizer) -> list[int]:
    """The vocabulary without special and added tokens."""
    left_out = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [token for token in sorted(tokenizer.get_vocab().values()) if token not in left_out]
