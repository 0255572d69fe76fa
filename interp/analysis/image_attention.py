"""How much of their attention do heads spend on the image, and at which step of the answer?

With I the tokens of a prompt's images and a_ij the weight of row i, a head's share on the image is

    M_i = sum over j in I of a_ij

in the rows that give the answer's tokens: *step* t is the row whose next token is the answer's t-th
(step 0 is the prompt's last token). The score of a head is the mean over a prompt's steps, then
over prompts; `prompt` is the same over the tokens of the prompt's text that follow an image, and
`uniform` what a head would give that looks at all it may see alike. Answers are those of the
prompts, read in one pass, or what the model writes greedily. Where a head looks *within* the image
is `interp.analysis.image_maps`.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Bool, Float
from torch import Tensor

from interp.analysis.shards import in_shards
from interp.errors import UserError
from interp.evaluation import answer_rows, written_by
from interp.heads import HeadScores
from interp.model.attention import Attention
from interp.model.call import at_places
from interp.model.hooked import HookedModel
from interp.model.images import ImageError, image_token, images_of, listed
from interp.tasks.prompts import as_prompts, describe, spans_of

How = Literal["forced", "generate"]


class ImageAttentionError(UserError):
    """Attention on images that can't be measured as asked."""


@dataclass(frozen=True, eq=False)
class ImageAttention:
    """What `image_attention` found: `heads`, and `steps`, a row a layer, head and step.

    `steps` has `layer, head, step, share` (mean over prompts), `uniform` and `n` (prompts whose
    answer is so long). `per_prompt[p]` is `[layer, head, step]` of prompt p.
    """

    heads: HeadScores
    steps: pd.DataFrame
    per_prompt: list[Float[np.ndarray, "layer head _step"]]

    def by_layer(self) -> pd.DataFrame:
        """`layer, step, share, uniform, n`, means over heads."""
        return self.steps.groupby(["layer", "step"], as_index=False)[
            ["share", "uniform", "n"]
        ].mean()

    def plot(self, step: int | None = None, **options):
        """The map over layers and heads; `step`: of one step of the answer alone."""
        if step is None:
            return self.heads.plot(title="Attention on the image", **options)
        rows = self.steps[self.steps["step"] == step]
        if not len(rows):
            raise ImageAttentionError(f"step={step}: there are 0-{self.steps['step'].max()}.")
        table = rows.rename(columns={"share": "score"})[["layer", "head", "score", "n"]]
        about = self.heads.metadata
        return HeadScores(table, about).plot(title=f"Attention on the image, step {step}")

    def __repr__(self) -> str:
        best = self.heads.top(1)[0]
        return (
            f"ImageAttention({self.heads.table['score'].mean():.2f} of attention on the image, "
            f"{self.heads[best]['score']:.2f} at {best}; {len(self.per_prompt)} prompts)"
        )


def image_attention(
    model: HookedModel,
    prompts,
    *,
    how: How = "forced",
    max_new_tokens: int = 24,
    batch_size: int = 8,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> ImageAttention:
    """The share of attention that each head spends on the image, step by step.

    Args:
        prompts: With an image each, and with answers where `how="forced"`.
        how: One pass over the prompts' answers, or greedy generation with the KV cache.
        out: Folder to keep shards in: a killed run continues there and ends with the same table.

    Raises:
        ImageError: A text-only model, a prompt without an image.
        ImageAttentionError: Unknown `how`, prompts without answers.
    """
    if how not in get_args(How):
        raise ImageAttentionError(f"how={how!r}: one of {', '.join(get_args(How))}.")
    if max_new_tokens < 1:
        raise ImageAttentionError(f"max_new_tokens={max_new_tokens}: at least 1.")
    prompts = image_prompts(model, prompts)
    if how == "forced" and not all(answers_of(prompts)):
        raise ImageAttentionError(
            f"prompts: {answers_of(prompts).index([])} has no answer; give prompts with answers, "
            "or how='generate'."
        )
    settings = {
        "analysis": "image_attention",
        "how": how,
        "max_new_tokens": max_new_tokens if how == "generate" else None,
        "task": describe(prompts),
        **model.provenance(),
    }
    score = partial(_forced, model) if how == "forced" else partial(_written, model, max_new_tokens)
    desc = "image attention" if progress else None
    table = in_shards(score, prompts, batch_size, settings, out, resume, desc)
    found = _summarise(table, model.attention_layers, settings)
    if out is not None:
        found.heads.save(Path(out) / "heads.parquet")
        found.steps.to_parquet(Path(out) / "steps.parquet", index=False)
    return found


def image_prompts(model: HookedModel, prompts) -> Dataset:
    """Prompts that have an image each. Raises `ImageError` for others, or a text-only model."""
    token = image_token(model)
    prompts = as_prompts(model, prompts)
    shown = images_of(prompts)
    for n, ids in enumerate(prompts["input_ids"]):
        if shown is None or not listed(shown[n]) or token not in ids:
            raise ImageError(
                f"prompt {n}: it has no image, and what was called looks at images; give it one, "
                "in a column 'image' (interp.tasks.scenes makes such prompts)."
            )
    return prompts


def answers_of(prompts: Dataset) -> list[list[int]]:
    """The tokens of each prompt's answer, none where there is none."""
    if "answer_ids" not in prompts.column_names:
        return [[] for _ in range(len(prompts))]
    return [list(ids or []) for ids in prompts["answer_ids"]]


def read_with_answers(prompts: Dataset) -> tuple[list[list[int]], list[int]]:
    """Prompts with their answers (but for the last token, which is only said), and their own
    lengths."""
    pairs = zip(prompts["input_ids"], answers_of(prompts), strict=True)
    lists = [[*ids, *answer[:-1]] for ids, answer in pairs]
    return lists, [len(ids) for ids in prompts["input_ids"]]


@torch.no_grad()
def _forced(model: HookedModel, prompts: Dataset) -> pd.DataFrame:
    lists, lengths = read_with_answers(prompts)
    batch = model.batch(lists, images=images_of(prompts))
    _, real = answer_rows(answers_of(prompts), batch.input_ids.device)
    look = _Look(model, prompts, real.shape[1])
    with model.spans(spans_of(prompts), lengths), model.hooks(fwd_hooks=look.hooks()):
        model.run(batch.input_ids, batch.attention_mask, **batch.inputs)
    return look.table(real)


@torch.no_grad()
def _written(model: HookedModel, limit: int, prompts: Dataset) -> pd.DataFrame:
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    look = _Look(model, prompts, 1)
    lengths = [len(ids) for ids in prompts["input_ids"]]
    with model.spans(spans_of(prompts), lengths), model.hooks(fwd_hooks=look.hooks()):
        new = model.continue_greedily(batch.input_ids, batch.attention_mask, limit, **batch.inputs)
    real = written_by(model, new)
    real[:, 0] = True  # a row of its own even where nothing is said
    return look.table(real)


class _Look:
    """The mass on images in the last rows of each pass, and in those of the prompt's text."""

    def __init__(self, model: HookedModel, prompts: Dataset, n_rows: int):
        self.model, self.n_rows = model, n_rows
        self.token = image_token(model)
        longest = max(map(len, prompts["input_ids"]))
        self.image = torch.zeros(len(prompts), longest, dtype=torch.bool)  # by place
        for row, ids in enumerate(prompts["input_ids"]):
            self.image[row, : len(ids)] = torch.tensor(ids) == self.token
        self.steps: dict[int, list[Tensor]] = defaultdict(list)
        self.uniform: list[Tensor] = []
        self.prompt: dict[int, Tensor] = {}

    def hooks(self) -> list[tuple[str, Callable]]:
        """One read-only hook a layer."""
        return [
            (f"blocks.{layer}.attn.hook_attention", partial(self._look, layer))
            for layer in self.model.attention_layers
        ]

    def _look(self, layer: int, attention: Attention, hook) -> None:
        image = self._at_keys(attention)
        last = attention.mass_on(image, queries=slice(-self.n_rows, None))
        self.steps[layer].append(last.cpu())
        if layer == self.model.attention_layers[0]:
            seen = attention.positions[:, -self.n_rows :] + 1
            self.uniform.append((image.sum(1, keepdim=True) / seen.clamp_min(1)).cpu())
        if layer not in self.prompt:
            self.prompt[layer] = self._in_prompt(attention, image).cpu()

    def _at_keys(self, attention: Attention) -> Bool[Tensor, "batch key"]:
        image = self.image.to(attention.q.device)
        return at_places(image, attention.key_positions, attention.real_keys)

    def _in_prompt(
        self, attention: Attention, image: Bool[Tensor, "batch key"]
    ) -> Float[Tensor, "batch head"]:
        """Mean over the prompt's text behind the image; this is the pass that reads the prompt."""
        of_prompt = self.model.call.rows("prompt").to(image.device)
        rows = of_prompt & text_after_image(image, attention.real_queries)
        columns = rows.any(0).nonzero().squeeze(1)
        mass = attention.mass_on(image, queries=columns)
        mine = rows[:, None, columns]
        return (mass * mine).sum(-1) / mine.sum(-1).clamp_min(1)

    def table(self, real: Bool[Tensor, "batch step"]) -> pd.DataFrame:
        """One row a prompt; steps are padded on the left (forced) or on the right (written)."""
        real = real.cpu()
        steps = torch.stack([torch.cat(self.steps[layer], dim=2) for layer in self.steps], dim=1)
        steps = steps[..., : real.shape[1]]  # a last token is said that no pass has read
        uniform = torch.cat(self.uniform, dim=1)[:, : real.shape[1]]
        prompt = torch.stack([self.prompt[layer] for layer in self.steps], dim=1)
        return pd.DataFrame(
            [
                {
                    "steps": steps[row][..., own].flatten().numpy(),
                    "uniform": uniform[row, own].numpy(),
                    "prompt": prompt[row].flatten().numpy(),
                    "n_steps": int(own.sum()),
                }
                for row, own in enumerate(real)
            ]
        )


def text_after_image(
    image: Bool[Tensor, "batch token"], real: Bool[Tensor, "batch token"]
) -> Bool[Tensor, "batch token"]:
    """Tokens of text that may see an image."""
    return real & ~image & (image.cumsum(1) > 0)


def _summarise(table: pd.DataFrame, layers: list[int], settings: dict) -> ImageAttention:
    per_prompt = [
        np.reshape(row.steps, (len(layers), -1, row.n_steps)) for row in table.itertuples()
    ]
    prompt = np.stack(table["prompt"].to_list()).reshape(len(table), -1).mean(0)
    uniform = np.array([np.mean(row) for row in table["uniform"]])
    heads = HeadScores.from_samples(
        np.stack([steps.mean(2) for steps in per_prompt]),
        layers=layers,
        keep_samples=True,
        **settings,
    )
    heads = HeadScores(
        heads.table.assign(prompt=prompt, uniform=uniform.mean()),
        heads.metadata,
        samples=heads.samples,
    )
    return ImageAttention(heads, _steps_of(per_prompt, table, layers), per_prompt)


def _steps_of(per_prompt: list[np.ndarray], table: pd.DataFrame, layers: list[int]) -> pd.DataFrame:
    parts: list[dict[str, Any]] = []
    for step in range(max(steps.shape[2] for steps in per_prompt)):
        rows = [n for n, steps in enumerate(per_prompt) if steps.shape[2] > step]
        share = np.mean([per_prompt[n][..., step] for n in rows], axis=0)
        layer, head = np.indices(share.shape).reshape(2, -1)
        uniform = np.mean([table["uniform"].iloc[n][step] for n in rows])
        columns = {"layer": np.asarray(layers)[layer], "head": head, "step": step}
        columns |= {"share": share.reshape(-1), "uniform": uniform, "n": len(rows)}
        parts.append(columns)
    return pd.concat([pd.DataFrame(columns) for columns in parts], ignore_index=True)
