"""Which heads say something else because of the image, and which words were written from habit.

A caption is read twice behind its prompt, with the image and without it, and at every token that
predicts one of its tokens each head's output is compared: VHD, and over the heads of a token T-VHD
(`interp.analysis.divergence` has the formulas). Causality makes one pass over a whole caption the
same as writing it token by token, so T tokens cost two passes.

*Without* is the prompt with its image deleted, as in the paper; text behind the image then stands
nearer to text before it, and the prompt is a request with nothing to look at. Part of VHD is that.
The control is `reference="masked"`, where positions stay and the image cannot be looked at. (Where
nothing stands before the image and positions are relative, the two are one and the same.)

The paper gives no k for T-VHD (it is recorded with every result), and does not say how the tokens
of a word become one number: `VisionHeads.of_words` has the first, the largest and the mean.

Source: He et al. 2024, "Cracking the Code of Hallucination in LVLMs with Vision-aware Head
Divergence" (arXiv 2412.13949).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from interp.analysis.divergence import (
    Divergence,
    divergence,
    outliers,
    token_divergence,
    upper_half,
)
from interp.analysis.shards import in_shards
from interp.errors import UserError
from interp.evaluation import written_by
from interp.heads import HeadScores
from interp.model.hooked import HookedModel
from interp.model.image_free import hiding_images, spans_without_images, without_images
from interp.model.images import ImageError, image_token, images_of, listed
from interp.tasks.prompts import SpanError, as_prompts, describe, spans_of

if TYPE_CHECKING:
    from interp.metrics.chair import Chair

How = Literal["generate", "forced"]
Reference = Literal["deleted", "masked"]
MEASURES = ("distance", "relative", "outlier", "chosen")


class DivergenceError(UserError):
    """A comparison with and without images that can't be made as asked."""


@dataclass(frozen=True, eq=False)
class VisionHeads:
    """What `vision_head_divergence` found.

    `heads`: VHD of each head, the mean over a prompt's tokens and then over prompts, samples kept;
    beside it `relative`, and the shares `outlier` (of tokens) and `chosen` (of prompts in whose
    first step the head is in its layer's upper half).
    `tokens`: a row a written token, `prompt, step, token, start, end` (characters of the caption),
    `t_vhd, t_vhd_relative` (for `k`) and `by_k, by_k_relative` (a list: for k = 1, 2, ...).
    `captions`: what was written to each prompt.
    """

    heads: HeadScores
    tokens: pd.DataFrame
    captions: list[str]
    k: int

    def t_vhd(self, k: int, relative: bool = False) -> Float[np.ndarray, " token"]:
        """T-VHD of each row of `tokens` with another k."""
        self._check_k(k)
        lists = self.tokens["by_k_relative" if relative else "by_k"]
        return np.array([values[k - 1] for values in lists], dtype=float)

    def of_words(
        self, chair: "Chair", k: int | None = None, relative: bool = False
    ) -> pd.DataFrame:
        """T-VHD of the words by which captions name objects: right ones and hallucinated ones.

        `chair`: of these captions, in their order. Columns: those of `chair.mentions`, `prompt`,
        `step` (of the word's first token), `n_tokens`, and T-VHD of its tokens: `first`, `largest`,
        `mean`. Raises `DivergenceError` where the captions are others.
        """
        if list(chair.table["caption"]) != self.captions:
            raise DivergenceError("chair: of other captions; measure it on `captions`, uncut.")
        table = self.tokens.assign(value=self.t_vhd(self.k if k is None else k, relative))
        by_prompt = dict(tuple(table.groupby("prompt")))
        rows = []
        for mention in chair.mentions.itertuples():
            own = by_prompt[mention.row]
            own = own[(own["start"] < mention.end) & (own["end"] > mention.start)]
            values = own["value"].to_numpy()
            rows.append(
                {
                    "prompt": mention.row,
                    "step": int(own["step"].iloc[0]),
                    "n_tokens": len(own),
                    "first": values[0],
                    "largest": values.max(),
                    "mean": values.mean(),
                }
            )
        added = pd.DataFrame(
            rows, columns=["prompt", "step", "n_tokens", "first", "largest", "mean"]
        )
        return pd.concat([chair.mentions.drop(columns="row"), added], axis=1)

    def _check_k(self, k: int) -> None:
        n = self.heads.matrix.shape[1]
        if not 1 <= k <= n:
            raise DivergenceError(f"k={k}: how many heads of each layer, from 1 to {n}.")

    def __repr__(self) -> str:
        best = ", ".join(map(str, self.heads.top(min(5, len(self.heads)))))
        return (
            f"VisionHeads({len(self.heads)} heads; top: {best}; {len(self.tokens)} tokens of "
            f"{len(self.captions)} captions, T-VHD with k={self.k})"
        )


def vision_head_divergence(
    model: HookedModel,
    prompts,
    *,
    how: How = "generate",
    max_new_tokens: int = 64,
    reference: Reference = "deleted",
    k: int | None = None,
    batch_size: int = 4,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> VisionHeads:
    """VHD of every head and T-VHD of every token that is written about an image.

    Args:
        prompts: With images (`interp.tasks.scenes`, or any with a column `image`).
        how: "generate": what the model itself writes, greedily, up to `max_new_tokens`; "forced":
            the prompts' own answers.
        reference: What is compared with; see the module's docstring.
        k: How many heads of each layer T-VHD adds up; default a quarter of them.
        out: Folder to keep shards in: a killed run continues there and ends with the same tables.

    Raises:
        ImageError: A text-only model, a prompt without an image, or one that ends in its image.
        DivergenceError: Unknown `how` or `reference`, `k` out of range.
        SpanError: A prompt without an answer where `how="forced"`.
    """
    for name, value, allowed in (("how", how, How), ("reference", reference, Reference)):
        if value not in get_args(allowed):
            raise DivergenceError(f"{name}={value!r}: one of {', '.join(get_args(allowed))}.")
    image_token(model)
    prompts = as_prompts(model, prompts)
    _check_prompts(prompts, how)
    k = max(1, model.cfg.n_heads // 4) if k is None else k
    if not 1 <= k <= model.cfg.n_heads:
        raise DivergenceError(f"k={k}: heads of each layer, from 1 to {model.cfg.n_heads}.")
    settings = {
        "analysis": "vision_head_divergence",
        "how": how,
        "max_new_tokens": max_new_tokens if how == "generate" else None,
        "reference": reference,
        "task": describe(prompts),
        **model.provenance(),
    }

    def score(rows: Dataset) -> pd.DataFrame:
        written = _written(model, rows, max_new_tokens) if how == "generate" else rows["answer_ids"]
        return _compared(model, rows, list(written), reference)

    desc = "vision heads" if progress else None
    table = in_shards(score, prompts, batch_size, settings, out, resume, desc)
    found = _summarise(model, table, k, settings)
    if out is not None:
        found.heads.save(Path(out) / "heads.parquet")
        found.tokens.to_parquet(Path(out) / "tokens.parquet", index=False)
    return found


def _check_prompts(prompts: Dataset, how: How) -> None:
    shown = images_of(prompts)
    for n in range(len(prompts)):
        if shown is None or not listed(shown[n]):
            raise ImageError(f"prompt {n}: it has no image to compare with and without.")
    answers = prompts["answer_ids"] if "answer_ids" in prompts.column_names else [[]] * len(prompts)
    empty = [n for n, ids in enumerate(answers) if not ids]
    if how == "forced" and empty:
        raise SpanError(f"prompts: prompt {empty[0]} has no answer; use how='generate'.")


def _written(model: HookedModel, prompts: Dataset, limit: int) -> list[list[int]]:
    """What the model writes greedily, up to an end-of-sequence token."""
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    with model.spans(spans_of(prompts), [len(ids) for ids in prompts["input_ids"]]):
        new = model.continue_greedily(batch.input_ids, batch.attention_mask, limit, **batch.inputs)
    own = written_by(model, new)
    return [tokens[real].tolist() for tokens, real in zip(new, own, strict=True)]


def _compared(
    model: HookedModel, prompts: Dataset, written: list[list[int]], reference: Reference
) -> pd.DataFrame:
    """A row a prompt: the caption, its tokens, what heads and tokens score."""
    width = max(1, *map(len, written))
    found = compare_passes(model, prompts, written, reference, width)
    out = outliers(found.distance, found.activity)
    chosen = upper_half(found.distance, found.activity)
    sums = {"by_k": found.distance, "by_k_relative": found.relative}
    by_k = {name: token_divergence(values) for name, values in sums.items()}
    rows = []
    for row, tokens in enumerate(written):
        mine = slice(width - len(tokens), None)
        values = {"distance": found.distance, "relative": found.relative, "outlier": out.float()}
        heads = {name: value[row, mine].mean(0) for name, value in values.items()}
        heads["chosen"] = chosen[row, mine][:1].float().mean(0)  # NaN where nothing was written
        start, end = offsets(model.tokenizer, tokens)
        rows.append(
            {
                "caption": model.tokenizer.decode(tokens, skip_special_tokens=True),
                "tokens": tokens,
                "start": start,
                "end": end,
                **{name: value.flatten().tolist() for name, value in heads.items()},
                **{name: value[row, mine].flatten().tolist() for name, value in by_k.items()},
            }
        )
    return pd.DataFrame(rows)


def compare_passes(
    model: HookedModel,
    prompts: Dataset,
    written: Sequence[Sequence[int]],
    reference: Reference = "deleted",
    width: int | None = None,
) -> Divergence:
    """`[batch row layer head]` with and without images, at the tokens that predict `written`.

    The rows of a prompt are the last `len(written)` of `width`; what lies before is padding.
    """
    width = max(map(len, written)) if width is None else width
    ids = [list(prompt) for prompt in prompts["input_ids"]]
    spans, images = spans_of(prompts), images_of(prompts)
    rows = Rows(width)
    _read(model, ids, written, spans, images, rows.keep(model))
    if reference == "masked":
        _read(model, ids, written, spans, images, [*hiding_images(model), *rows.compare(model)])
    else:
        if spans is not None:
            spans = [spans_without_images(model, *pair) for pair in zip(ids, spans, strict=True)]
        _read(model, without_images(model, ids), written, spans, None, rows.compare(model))
    layers = [rows.found[layer] for layer in model.attention_layers]
    return Divergence(*(torch.stack(parts, dim=2) for parts in zip(*layers, strict=True)))


def _read(model: HookedModel, ids, written, spans, images, hooks) -> None:
    """One pass over prompts and what was written to them."""
    # the last token predicts nothing that was written
    texts = [[*prompt, *tokens[:-1]] for prompt, tokens in zip(ids, written, strict=True)]
    batch = model.batch(texts, images=images)
    with model.spans(spans, [len(prompt) for prompt in ids]), model.hooks(fwd_hooks=hooks):
        model.run(batch.input_ids, batch.attention_mask, **batch.inputs)


class Rows:
    """z of every head in the last `width` columns: of one pass, then compared with another's."""

    def __init__(self, width: int):
        self.width = width
        self.found: dict[int, Divergence] = {}
        self._z: dict[int, Float[Tensor, "batch row head d_head"]] = {}

    def keep(self, model: HookedModel) -> list[tuple[str, Callable]]:
        return [(f"blocks.{n}.attn.hook_z", partial(self._keep, n)) for n in model.attention_layers]

    def compare(self, model: HookedModel) -> list[tuple[str, Callable]]:
        return [
            (f"blocks.{n}.attn.hook_z", partial(self._compare, n)) for n in model.attention_layers
        ]

    def _last(self, z: Tensor) -> Float[Tensor, "batch row head d_head"]:
        """A prompt shorter than `width` has rows of nothing before it."""
        missing = max(0, self.width - z.shape[1])
        return pad(z[:, -self.width :], (0, 0, 0, 0, missing, 0))

    def _keep(self, layer: int, z: Tensor, hook) -> None:
        self._z[layer] = self._last(z).clone()

    def _compare(self, layer: int, z: Tensor, hook) -> None:
        compared = divergence(self._z.pop(layer), self._last(z))
        self.found[layer] = Divergence(*(value.cpu() for value in compared))


def offsets(tokenizer, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where each token's characters begin and end in the decoded text."""
    ends = [
        len(tokenizer.decode(tokens[: n + 1], skip_special_tokens=True)) for n in range(len(tokens))
    ]
    ends = np.maximum.accumulate(np.array(ends, dtype=int)).tolist() if ends else []
    return [0, *ends[:-1]][: len(ends)], ends


def _summarise(
    model: HookedModel, table: pd.DataFrame, k: int, settings: dict[str, Any]
) -> VisionHeads:
    layers, n_heads = model.attention_layers, model.cfg.n_heads
    shape = (len(table), len(layers), n_heads)
    samples = {name: np.stack(table[name].to_list()).reshape(shape) for name in MEASURES}
    scores = HeadScores.from_samples(
        samples["distance"], layers=layers, keep_samples=True, **settings
    )
    wrote = table["tokens"].map(len).to_numpy() > 0
    rest = {name: values[wrote].mean(0).reshape(-1) for name, values in samples.items()}
    del rest["distance"]
    heads = HeadScores(scores.table.assign(**rest), scores.metadata, samples=scores.samples)
    tokens = _token_rows(model, table, n_heads)
    for name in ("t_vhd", "t_vhd_relative"):
        lists = tokens[name.replace("t_vhd", "by_k")]
        tokens[name] = np.array([values[k - 1] for values in lists], dtype=float)
    return VisionHeads(heads.with_metadata(k=k), tokens, table["caption"].tolist(), k)


def _token_rows(model: HookedModel, table: pd.DataFrame, n_heads: int) -> pd.DataFrame:
    columns = ["prompt", "step", "token", "start", "end", "by_k", "by_k_relative"]
    rows = []
    for prompt, row in enumerate(table.to_dict("records")):
        for step, token in enumerate(row["tokens"]):
            mine = slice(step * n_heads, (step + 1) * n_heads)
            sums = [list(row[name][mine]) for name in ("by_k", "by_k_relative")]
            text = model.tokenizer.decode([token])
            rows.append((prompt, step, text, row["start"][step], row["end"][step], *sums))
    return pd.DataFrame(rows, columns=columns)
