"""What a model writes about images, and how captions are made comparable.

A method that makes captions shorter names fewer objects, wrong ones among them, so its CHAIR falls
whatever else it does. `cut_alike` is the control: each plain caption cut to as many words as the
method's caption of the same image has.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from datasets import Dataset

from interp.analysis.shards import in_shards
from interp.evaluation import prepared, written_by
from interp.metrics.chair import first_words
from interp.metrics.measured import MetricError
from interp.metrics.vocabulary import WORD
from interp.model.hooked import HookedModel
from interp.model.images import images_of
from interp.tasks.prompts import as_prompts, describe, spans_of


def write_captions(
    model: HookedModel,
    prompts,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> pd.DataFrame:
    """What the model (as it is now, interventions and all) writes to each prompt, greedily.

    A row a prompt: `caption`, `tokens` (ids), and whether it `ended` by itself. Answers to
    questions are written the same way, with a small `max_new_tokens`. `out`: folder to keep shards
    in; a killed run continues there.
    """
    if max_new_tokens < 1:
        raise MetricError(f"max_new_tokens={max_new_tokens}: at least 1.")
    prompts = as_prompts(model, prompts)
    settings = {
        "analysis": "captions",
        "max_new_tokens": max_new_tokens,
        "task": describe(prompts),
        **model.provenance(),
    }

    def write(rows: Dataset) -> pd.DataFrame:
        return _written(model, prepared(model, rows), max_new_tokens)

    desc = "captions" if progress else None
    return in_shards(write, prompts, batch_size, settings, out, resume, desc)


def _written(model: HookedModel, prompts: Dataset, limit: int) -> pd.DataFrame:
    lists = prompts["input_ids"]
    batch = model.batch(lists, images=images_of(prompts))
    with model.spans(spans_of(prompts), [len(ids) for ids in lists]):
        new = model.continue_greedily(batch.input_ids, batch.attention_mask, limit, **batch.inputs)
    own = written_by(model, new)
    tokens = [row[real].tolist() for row, real in zip(new, own, strict=True)]
    captions = model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return pd.DataFrame({"caption": captions, "tokens": tokens, "ended": (~own.all(1)).tolist()})


def n_words(caption: str) -> int:
    """Words as `first_words` counts them."""
    return sum(1 for _ in WORD.finditer(caption))


def cut_alike(captions: Sequence[str], others: Sequence[str]) -> list[str]:
    """Each caption's first words, as many as the other of the same image has.

    Raises `MetricError` where there are not as many captions as others.
    """
    if len(captions) != len(others):
        raise MetricError(f"others: {len(others)} for {len(captions)} captions; one for each.")
    return [first_words(text, n_words(other)) for text, other in zip(captions, others)]
