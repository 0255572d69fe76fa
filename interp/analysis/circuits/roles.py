"""Head roles: what each head does, told from what it looks at and what comes of it, never by name.

On repeats of random tokens (`interp.tasks.repeats`), mean weight of the rows of the last copy on

    previous    the token before
    duplicate   earlier copies of the current token
    induction   the tokens after them

On pairs of prompts (`interp.tasks.ioi`, ...), for the clean prompts' last token, the one that the
answer is read from:

    on_answer, on_repeat, on_question   its weight on these places
    copying     -1 to 1: do the head's values at the first two, weighed by how much it looks there,
                raise the logit of what stands there, or lower it? (see `copying`)
    direct      `moved` of the direct path to the logits (`path_patching`, MLPs frozen)
    to_movers   `moved` of the paths to the queries of the movers (not there if there are none)

A head has the roles whose rules in `role_rules` it meets; `role` is the strongest,
or "none". The table has all measures, so that other rules can be put in place of ours.

Sources: Wang et al. 2022 (arXiv 2211.00593) and Merullo et al. 2024 (arXiv 2310.08744) for the
roles, Olsson et al. 2022 (arXiv 2209.11895) for previous-token and induction heads. Roles are those
of these tasks' circuits in GPT-2: a model that solves a task another way has heads that matter and
no role.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp.analysis.circuits.copying import copying
from interp.analysis.circuits.role_rules import (
    ON_PAIRS,
    ON_REPEATS,
    ROLES,
    RoleError,
    Thresholds,
    strengths_of,
)
from interp.analysis.paired import PairError, check_pairs, in_pair_batches
from interp.analysis.patching.paths import path_patching
from interp.heads import Head, HeadScores
from interp.model.attention import Attention
from interp.model.hooked import Batch, HookedModel
from interp.tasks.prompts import context_window, describe
from interp.tasks.repeats import repeats

# Where the places of the tasks in `interp.tasks` are: names of positions or of spans.
PLACES: Mapping[str, tuple[str, ...]] = {
    "answer": ("IO", "color", "right_label"),
    "repeat": ("S2",),
    "question": ("question", "asked", "begun"),
}
REPEATED_TOKENS = 50
PAIRS_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class Roles:
    """Each head's measures (`scores`, by name) and what roles follow from them."""

    scores: dict[str, HeadScores]
    thresholds: Thresholds
    metadata: dict[str, Any]

    @property
    def table(self) -> pd.DataFrame:
        """One row a head: `layer`, `head`, the measures, `role` (the strongest)."""
        where, strengths = self._where, self.strengths[list(ROLES)]
        best = strengths.fillna(0).to_numpy()
        names = np.array(ROLES)[best.argmax(1)]
        return where.assign(**self._measures, role=np.where(best.max(1) >= 1, names, "none"))

    @property
    def strengths(self) -> pd.DataFrame:
        """One row a head: `layer`, `head`, and each role's strength; NaN where it is not known."""
        return self._where.join(strengths_of(self._measures, self.thresholds))

    def of(self, role: str) -> list[Head]:
        """The heads that have a role, perhaps beside a stronger one; the strongest first.

        Raises `RoleError` for an unknown role.
        """
        if role not in ROLES:
            near = get_close_matches(role, ROLES, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RoleError(f"role={role!r}: one of {', '.join(ROLES)}.{hint}")
        table = self.strengths.sort_values(role, ascending=False, kind="stable")
        chosen = table.loc[table[role] >= 1, ["layer", "head"]]
        return [Head(layer, head) for layer, head in chosen.to_numpy().tolist()]

    def plot(self, **options):
        """The layer x head map of roles; `options` go to `interp.figures.head_map`."""
        return _drawn(self.table, **options)

    def __repr__(self) -> str:
        parts = []
        for role in ROLES:
            heads = self.of(role)
            more = ", ..." if len(heads) > 6 else ""
            if heads:
                parts.append(f"{role} {', '.join(map(str, heads[:6]))}{more}")
        n, model = len(self._where), self.metadata.get("model", "")
        return f"Roles({model}, {n} heads; {'; '.join(parts) or 'no roles'})"

    @property
    def _where(self) -> pd.DataFrame:
        return next(iter(self.scores.values())).table[["layer", "head"]]

    @property
    def _measures(self) -> dict[str, Float[np.ndarray, " head"]]:
        return {name: scores.table["score"].to_numpy() for name, scores in self.scores.items()}


def head_roles(
    model: HookedModel,
    pairs: Dataset | None = None,
    *,
    effects: HeadScores | None = None,
    places: Mapping[str, str | Sequence[str]] = PLACES,
    n_repeats: int = 20,
    seed: int = 0,
    thresholds: Thresholds = Thresholds(),
    progress: bool = True,
) -> Roles:
    """The roles of all heads; without `pairs` only those that repeats show.

    Args:
        pairs: From `interp.tasks` (`ioi`, `colored_objects`, ...): clean and corrupted prompts.
        effects: What is taken for `direct`, such as `path_patching(model, pairs).heads`.
        places: Where "answer", "repeat" and "question" stand in the clean prompts: names of
            positions or spans of the pairs, taken together where there are several. The default
            knows the tasks in `interp.tasks`; a place that pairs do not have is not looked at.
        n_repeats: How many prompts of repeats, of up to 50 tokens twice, drawn with `seed`.

    Raises:
        PairError: Pairs that are none, or in which no place is found.
        RoleError: A place that is none, effects of other heads.
        ReplayError: With pairs, a model that cannot be replayed, or is in training mode.
    """
    unknown = sorted(places.keys() - PLACES.keys())
    if unknown:
        raise RoleError(f"places: {unknown[0]!r} is none of {', '.join(PLACES)}.")
    window = context_window(model) or 4 * REPEATED_TOKENS
    length = min(REPEATED_TOKENS, (window - 4) // 2)  # room for special tokens
    about = {
        "analysis": "head_roles",
        "thresholds": asdict(thresholds),
        "n_repeats": n_repeats,
        "length": length,
        "seed": seed,
        **model.provenance(),
    }
    prompts = repeats(model, n=n_repeats, length=length, seed=seed)
    scores = _on_repeats(model, prompts, length, about, progress)
    if pairs is None:
        return Roles(scores, thresholds, about)
    check_pairs(pairs)
    about |= {"task": describe(pairs)}
    scores |= _on_pairs(model, pairs, places, thresholds.top, about, progress)
    if effects is None:
        paths = path_patching(model, pairs, sender_position=-1, freeze_mlps=True, progress=progress)
        effects = paths.heads
    elif effects.heads != scores["copying"].heads:
        raise RoleError("effects: they are not of this model's heads; score all of them.")
    scores["direct"] = effects
    movers = Roles(scores, thresholds, about).of("mover")
    if movers:
        paths = path_patching(model, pairs, movers, "q", sender_position=-1, progress=progress)
        scores["to_movers"] = paths.heads
    return Roles(scores, thresholds, about)


def repeat_keys(
    tokens: Int[Tensor, "batch token"],
) -> dict[str, Bool[Tensor, "batch query key"]]:
    """For each token the keys that `previous`, `duplicate` and `induction` heads look at."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    behind = places[:, None] - places
    same = (tokens[:, :, None] == tokens[:, None]) & (behind > 0)
    after = torch.zeros_like(same)
    after[:, :, 1:] = same[:, :, :-1]
    return {
        "previous": (behind == 1).expand_as(same),
        "duplicate": same,
        "induction": after,
    }


@torch.no_grad()
def _on_repeats(
    model: HookedModel, prompts: Dataset, length: int, about: dict[str, Any], progress: bool
) -> dict[str, HeadScores]:
    rows = slice(1 - length, None)  # the last copy, which lacks its last token

    def look(attention: Attention, keys: dict[str, Tensor]) -> Tensor:
        masses = [attention.mass_on(keys[name][:, None], queries=rows) for name in ON_REPEATS]
        return torch.stack(masses, dim=-1).mean(2)

    found = []
    desc = "roles on repeats" if progress else None
    for batch in model.batches(prompts["input_ids"], desc=desc):  # all of one length
        keys = repeat_keys(batch.input_ids)
        found.append(model.read_attention(batch.input_ids, lambda a, k=keys: look(a, k)))
    return _scores(model, torch.cat(found).cpu(), ON_REPEATS, about)


def _on_pairs(
    model: HookedModel,
    pairs: Dataset,
    places: Mapping[str, str | Sequence[str]],
    top: int,
    about: dict[str, Any],
    progress: bool,
) -> dict[str, HeadScores]:
    found = []
    bar = tqdm(total=len(pairs), desc="roles on pairs", disable=not progress, leave=False)
    start, anywhere = 0, False
    with bar:
        for batch in in_pair_batches(model, pairs, PAIRS_AT_ONCE):
            rows = pairs.select(range(start, start + len(batch)))
            keys = {name: _keys_at(rows, batch.clean, places.get(name, ())) for name in PLACES}
            anywhere |= any(bool(there.any()) for there in keys.values())
            found.append(_measured(model, batch.clean, keys, batch.right, batch.wrong, top))
            start += len(batch)
            bar.update(len(batch))
    if not anywhere:
        raise PairError(
            "places: the pairs have none of the positions and spans that are asked for. Name them: "
            "places={'answer': ..., 'repeat': ..., 'question': ...}."
        )
    return _scores(model, torch.cat(found).cpu(), ON_PAIRS, about)


def _measured(
    model: HookedModel,
    batch: Batch,
    keys: dict[str, Bool[Tensor, "batch key"]],
    right: Int[Tensor, " batch"],
    wrong: Int[Tensor, " batch"],
    top: int,
) -> Float[Tensor, "batch layer head measure"]:
    """`ON_PAIRS` for each pair; NaN where it lacks the place."""
    places = [keys["answer"], keys["repeat"], keys["question"]]

    def look(attention: Attention) -> Tensor:
        masses = [attention.mass_on(there, queries=[-1]).squeeze(2) for there in places]
        return torch.stack(masses, dim=-1)

    masses = model.read_attention(batch.input_ids, look, attention_mask=batch.attention_mask)
    there = torch.stack([place.any(1) for place in places], dim=-1)[:, None, None]
    masses = masses.masked_fill(~there, torch.nan)
    copies = [
        copying(model, batch.input_ids, batch.attention_mask, place, token, top)
        for place, token in zip(places, (right, wrong))
    ]
    weights, copied = masses[..., :2].nan_to_num(), torch.stack(copies, dim=-1).nan_to_num()
    mean = (weights * copied).sum(-1) / weights.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    mean = mean.masked_fill(~there[..., :2].any(-1), torch.nan)
    return torch.cat([masses, mean[..., None]], dim=-1)


def _keys_at(pairs: Dataset, batch: Batch, names: str | Sequence[str]) -> Bool[Tensor, "batch key"]:
    """The tokens at the named positions and spans that the pairs have."""
    names = [names] if isinstance(names, str) else list(names)
    keys = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    for row, (pair, first) in enumerate(zip(pairs, batch.first.tolist())):
        for name in names:
            place = (pair.get("positions") or {}).get(name)
            span = (pair.get("spans") or {}).get(name)
            if span is not None:
                keys[row, first + span[0] : first + span[1]] = True
            elif place is not None:
                keys[row, first + place] = True
    return keys


def _scores(
    model: HookedModel,
    samples: Float[Tensor, "prompt layer head measure"],
    names: Sequence[str],
    about: dict[str, Any],
) -> dict[str, HeadScores]:
    return {
        name: HeadScores.from_samples(
            values, layers=model.attention_layers, keep_samples=True, measure=name, **about
        )
        for name, values in zip(names, samples.unbind(-1), strict=True)
    }


def _drawn(table: pd.DataFrame, title: str = "head roles", **options):
    """A head map whose colours are roles."""
    from interp import figures

    names = [role for role in (*ROLES, "none") if (table["role"] == role).any()]
    palette = [*figures.PALETTE, figures.NOTHING]
    codes = HeadScores(
        table.assign(score=table["role"].map(names.index))[["layer", "head", "score"]]
    )
    steps = [(edge, palette[(*ROLES, "none").index(name)]) for i, name in enumerate(names)
             for edge in (i / len(names), (i + 1) / len(names))]  # fmt: skip
    limits = (-0.5, len(names) - 0.5)
    figure = figures.head_map(codes.matrix, title, "role", limits=limits, **options)
    text = np.full(codes.matrix.shape, "", dtype=object)
    text[table["layer"], table["head"]] = table["role"]
    figure.update_traces(
        colorscale=steps,
        colorbar={"tickvals": list(range(len(names))), "ticktext": names},
        text=text,
        hovertemplate="L%{y}H%{x}<br>%{text}<extra></extra>",
    )
    return figure
