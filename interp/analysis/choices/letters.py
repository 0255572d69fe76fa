"""How a known answer becomes its letter: what the heads that say it look at, and what they copy.

T is the prompt's last token, p_n the label of option n, e_n the last token of its text. With A the
last query's weights, each head is measured by

    A[T, p_n], A[T, e_n] for all n, and the mass on the last few tokens
    copying: of all (prompt, n), where does the value at p_n (or e_n), through W_O and the
        unembedding, speak for n's own letter more than for any other?
    its direct effect on the centred answer logit (see `logit_attribution`)

and put into a class by the rules of `letter_classes`. A label stands before its
option's text and cannot know whether that is right; e_n can. So heads that read labels and heads
that read the ends of options are told apart.

Source: Lieberum et al. 2023, "Does Circuit Analysis Interpretability Scale?" (arXiv 2307.09458).
Copying is read off the values in the prompts at hand, not off embeddings, which a late layer no
longer sees; readers of option ends follow later work (arXiv 2504.18574).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp.analysis.choices.letter_classes import (
    CLASSES,
    SITES,
    LetterError,
    LetterRule,
    Profile,
    classes_of,
)
from interp.analysis.choices.logit_attribution import NodeEffects, direct_effect
from interp.analysis.choices.nodes import Choices, Readout
from interp.heads import Head, HeadScores
from interp.model.attention import Attention
from interp.model.call import Spans
from interp.model.hooked import HookedModel
from interp.tasks.prompts import describe, spans_of


@dataclass(frozen=True, eq=False)
class LetterAttention:
    """The last query's weights: `weights[site]` at labels ("label") and at ends of options ("end").

    `near` is the mass on the last tokens, `right` the right option of each prompt.
    """

    weights: dict[str, Float[np.ndarray, "prompt layer head option"]]
    near: Float[np.ndarray, "prompt layer head"]
    right: Int[np.ndarray, " prompt"]
    layers: list[int]
    metadata: dict[str, Any]

    def on_right(self, site: str = "label") -> HeadScores:
        """Weight on the right option's label ("label") or on the end of its text ("end")."""
        if site not in SITES:
            raise LetterError(f"site={site!r}: one of {', '.join(SITES)}.")
        index = self.right[:, None, None, None]
        samples = np.take_along_axis(self.weights[site], index, axis=-1)[..., 0]
        about = self.metadata | {"site": site}
        return HeadScores.from_samples(samples, layers=self.layers, keep_samples=True, **about)


@dataclass(frozen=True, eq=False)
class LetterHeads:
    """What `letter_heads` found: a row a head in `table`.

    Columns: `layer, head, class, reader, borderline` (another class if all thresholds were 10 %
    higher or lower), `effect` (direct), then for labels and for ends of options `_mass`, `_share`
    (of the right option in it), `_least_share` (over the right options), `_entropy` (over its
    maximum), `_copies`; `near`, `passed_on` (NaN where no head could pass on), `effect_1` ...
    """

    table: pd.DataFrame
    attention: LetterAttention
    effects: NodeEffects
    rule: LetterRule

    def of(self, name: str) -> list[Head]:
        """The heads of a class, by falling direct effect."""
        if name not in CLASSES:
            raise LetterError(f"class {name!r}: one of {', '.join(CLASSES)}.")
        rows = self.table[self.table["class"] == name].sort_values("effect", ascending=False)
        return [Head(layer, head) for layer, head in rows[["layer", "head"]].to_numpy().tolist()]

    def members(self, name: str) -> HeadScores:
        """1 for the heads of a class and 0 for all others, as `ablation_control` wants them."""
        chosen = [[head.layer, head.head] for head in self.of(name)]
        where = self.table[["layer", "head"]]
        score = [float(pair in chosen) for pair in where.to_numpy().tolist()]
        about = {"analysis": "letter_heads", "class": name, **asdict(self.rule)}
        return HeadScores(where.assign(score=score), self.effects.metadata | about)

    def plot(self, site: str = "label", **options):
        """Weight on the right option; heads of the class "correct letter" are marked."""
        options.setdefault("title", f"weight on the right option ({site})")
        return self.attention.on_right(site).plot(mark=self.of("correct letter"), **options)

    def __repr__(self) -> str:
        found = [f"{name}: {', '.join(map(str, self.of(name))) or 'none'}" for name in CLASSES[:-1]]
        return f"LetterHeads({len(self.attention.right)} pairs; {'; '.join(found)})"


def letter_heads(
    model: HookedModel,
    pairs: Dataset,
    rule: LetterRule = LetterRule(),
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> LetterHeads:
    """Measure every head at lettered options and put it into a class.

    Args:
        pairs: From `interp.tasks.multiple_choice`, or pairs with `choices` and the spans `label_1`,
            `option_1`, ... whose corrupted prompt has another right option.

    Raises:
        LetterError: Prompts without those spans, or an option that is right nowhere.
        AttributionError: A model whose heads have no direct effect (norms behind attention).
    """
    settings = {"batch_size": batch_size, "progress": progress}
    effects = direct_effect(model, pairs, **settings)
    attention = letter_attention(model, pairs, rule.window, **settings)
    copies = _copying(model, pairs, **settings)
    scores, n = effects.heads, len(pairs)
    weights = {site: w.reshape(n, -1, w.shape[-1]) for site, w in attention.weights.items()}
    samples = scores.samples
    assert samples is not None
    profile = Profile.of(weights, attention.near.reshape(n, -1), samples, attention.right)
    where = scores.table[["layer", "head"]]
    found, _ = classes_of(profile, effects.positive, rule)
    through = [
        Head(layer, head)
        for (layer, head), name in zip(where.to_numpy().tolist(), found)
        if name in CLASSES[:2]
    ]
    if through:
        passed = direct_effect(model, pairs, through=through, **settings).heads.table["score"]
        share = passed / scores.table["score"].replace(0, np.nan)
        profile = replace(profile, passed_on=share.to_numpy(float))
    found, reader = classes_of(profile, effects.positive, rule)
    moved = [classes_of(profile, effects.positive, rule.scaled(by))[0] for by in (0.9, 1.1)]
    borderline = [len(set(names)) > 1 for names in zip(found, *moved, strict=True)]
    table = where.assign(**{"class": found, "reader": reader, "borderline": borderline})
    table = table.join(profile.table())
    for index, site in enumerate(SITES):
        place = table.columns.get_loc(f"{site}_entropy")
        table.insert(int(place) + 1, f"{site}_copies", copies[:, index])  # pyright: ignore
    return LetterHeads(table, attention, effects, rule)


@torch.no_grad()
def letter_attention(
    model: HookedModel,
    prompts: Dataset,
    window: int = 3,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> LetterAttention:
    """The last query's weights on each option's label and end, as the model is now.

    Under an intervention it tells what that does to them. Of each pattern one row is formed.
    Raises `LetterError` where prompts lack the spans, or differ in their number of options.
    """
    right = Choices.of(model, prompts).right

    def look(attention: Attention, columns: Tensor, rows: Dataset) -> Tensor:
        row = attention.pattern(queries=[-1])[:, :, 0]
        near = row[..., -window:].sum(-1, keepdim=True)
        index = columns.to(row.device).flatten(1)[:, None].expand(-1, row.shape[1], -1)
        return torch.cat([row.gather(-1, index), near], dim=-1)

    found = _at_options(model, prompts, "hook_attention", look, batch_size, progress)
    values = torch.cat(found).float().numpy()
    n = values.shape[-1] // 2
    weights = {site: values[..., i * n : (i + 1) * n] for i, site in enumerate(SITES)}
    about = {"analysis": "letter_attention", "task": describe(prompts), **model.provenance()}
    return LetterAttention(
        weights, values[..., -1], right.cpu().numpy(), model.attention_layers, about
    )


@torch.no_grad()
def _copying(
    model: HookedModel, prompts: Dataset, batch_size: int, progress: bool
) -> Float[np.ndarray, "head site"]:
    """Share of (prompt, option) whose value speaks most for that option's own letter."""
    readout = Readout.of(model)

    def hear(v: Tensor, columns: Tensor, rows: Dataset, layer: int) -> Tensor:
        letters = readout.weight[Choices.of(model, rows).tokens].float() * readout.gain
        letters = readout.centred(letters)  # as the norm takes the mean off what heads write
        w_o, columns = model.blocks[layer].attn.W_O.float(), columns.to(v.device)
        batch = torch.arange(len(v), device=v.device)[:, None, None]
        values = v[batch, columns].float()  # [batch site option kv_head d_head]
        values = values.repeat_interleave(len(w_o) // values.shape[3], dim=3)
        said = torch.einsum("bsnhd,hdm,bcm->bhsnc", values, w_o, letters)
        own = torch.arange(said.shape[-1], device=v.device)
        return (said.argmax(-1) == own).float().mean(-1)

    found = _at_options(model, prompts, "hook_v", hear, batch_size, progress)
    return torch.cat(found).mean(0).flatten(0, 1).numpy()


def _at_options(
    model: HookedModel,
    prompts: Dataset,
    site: str,
    read: Callable[..., Tensor],
    batch_size: int,
    progress: bool,
) -> list[Float[Tensor, "batch layer head ..."]]:
    """What `read` says of each layer's value, given the columns [prompt site option] of a batch."""
    layers, parts = model.attention_layers, []
    desc = "letters" if progress else None
    for start in tqdm(range(0, len(prompts), batch_size), desc=desc, disable=not desc, leave=False):
        rows = prompts.select(range(start, min(start + batch_size, len(prompts))))
        batch = model.batch(list(rows["input_ids"]))
        spans = spans_of(rows)
        columns = _places(spans, start) + batch.first.cpu()[:, None, None]
        found: dict[int, Tensor] = {}

        def keep(value, hook, layer: int, columns=columns, rows=rows, found=found) -> None:
            more = {"layer": layer} if site == "hook_v" else {}
            found[layer] = read(value, columns, rows, **more).cpu()

        hooks = [(f"blocks.{n}.attn.{site}", partial(keep, layer=n)) for n in layers]
        with model.hooks(fwd_hooks=hooks), model.spans(spans):
            model.run(batch.input_ids, batch.attention_mask)
        parts.append(torch.stack([found[layer] for layer in layers], dim=1))
    return parts


def _places(spans: list[Spans] | None, first: int) -> Int[Tensor, "prompt site option"]:
    """Where each option's label begins and its text ends, in the prompt's own tokens."""
    found = []
    for n, row in enumerate(spans or [{}], first):
        options = 0
        while f"label_{options + 1}" in row and f"option_{options + 1}" in row:
            options += 1
        if options < 2:
            has = ", ".join(row) or "none"
            raise LetterError(
                f"prompt {n}: no spans label_1, option_1, label_2, ...; it has {has}. See "
                "interp.tasks.multiple_choice."
            )
        labels = [row[f"label_{i + 1}"][0] for i in range(options)]
        ends = [row[f"option_{i + 1}"][1] - 1 for i in range(options)]
        if found and len(found[0][0]) != options:
            raise LetterError(
                f"prompt {n}: {options} options, and those before it {len(found[0][0])}; give "
                "prompts with one number of options."
            )
        found.append([labels, ends])
    return torch.tensor(found)
