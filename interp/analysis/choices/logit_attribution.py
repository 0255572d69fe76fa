"""Which heads and MLPs say the answer: each one's direct and total effect on it, at the last token.

At the last token T of a prompt the residual stream is a sum of what the nodes wrote there,

    r = sum over nodes j of c_j        (c_j: a head's z W_O, an MLP's output, embedding, biases)

and the metric is the *centred answer logit*, which does not move when all choices rise alike:

    m(r) = logit[right] - mean over choices n of logit[n],      logits = W_U N(r),  N the final norm

Three effects of a node on it. All are positive where the node speaks for the right choice:

- `logit_attribution`: its term of m, with the scale of N frozen. All terms add up to m.
- `direct_effect`: m(r) - m(r - c_j + c'_j), with c'_j what the node writes on the source prompt,
  another choice being right there, and the norm computed anew. What a node says whatever is right
  cancels, which is why this one is preferred.
- `total_effect`: m minus m with the node's value at T taken from the source prompt, and all that
  follows recomputed. The difference from the direct effect goes by way of later nodes.

Nodes that act at other tokens than T are invisible here, by construction.

Source: Lieberum et al. 2023, "Does Circuit Analysis Interpretability Scale?" (arXiv 2307.09458),
which publishes no code: the centring and the pairing of source prompts are choices of ours. In the
attribution LayerNorm's own centring, over d_model, is applied to every term, and a bias of a head's
values counts as the head's (TransformerLens' folded weights count it as the layer's).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.analysis.choices.nodes import (
    AttributionError,
    Choices,
    Readout,
    Written,
    check_sum,
    index_of,
    node_table,
)
from interp.analysis.paired import Answers, pair_batch
from interp.analysis.patching.activation import activation_patching
from interp.heads import Head, HeadScores, heads_of
from interp.model.hooked import Batch, HookedModel
from interp.tasks.prompts import describe, spans_of


@dataclass(frozen=True, eq=False)
class NodeEffects:
    """An effect of every node on every prompt: `values[i, j]` for prompt i and node j.

    `nodes` has a row a node: `node` (`L3H5`, `MLP3`, `embed`, `bias`), `kind`, `layer`, `head`.
    `metric` is each prompt's centred answer logit.
    """

    nodes: pd.DataFrame
    values: Float[np.ndarray, "prompt node"]
    metric: Float[np.ndarray, " prompt"]
    metadata: dict[str, Any]

    @property
    def table(self) -> pd.DataFrame:
        """One row a node: `nodes`, then `effect` (mean), `std`, `low`, `high`, `n`.

        `low` and `high` are 95 %, by the normal approximation over prompts.
        """
        n = len(self.values)
        mean = self.values.mean(0)
        std = self.values.std(0, ddof=1) if n > 1 else np.full(len(mean), np.nan)
        half = 1.96 * std / np.sqrt(n)
        return self.nodes.assign(effect=mean, std=std, low=mean - half, high=mean + half, n=n)

    @property
    def heads(self) -> HeadScores:
        """The effects of the heads as scores, samples kept."""
        rows = (self.nodes["kind"] == "head").to_numpy()
        where = self.nodes.loc[rows, ["layer", "head"]].astype(int).assign(tower="text")
        return HeadScores.from_columns(where, self.values[:, rows], self.metadata)

    @property
    def positive(self) -> float:
        """The net effects above 0 of all heads and MLPs, added up."""
        return float(self._net.clip(lower=0).sum())

    def cover(self, share: float = 0.8) -> list[str]:
        """The fewest heads and MLPs whose net effects make up `share` of all positive ones."""
        if not 0 < share <= 1:
            raise AttributionError(f"share={share}: above 0 and at most 1.")
        net = self._net[self._net > 0].sort_values(ascending=False, kind="stable")
        enough = (net.cumsum() >= share * net.sum() * (1 - 1e-9)).to_numpy()
        return net.index[: int(enough.argmax()) + 1].tolist() if len(net) else []

    def of(self, node: str) -> Float[np.ndarray, " prompt"]:
        """One node's effects."""
        return self.values[:, index_of(self.nodes, [node])[0]]

    def plot(self, **options):
        """The heads' map; see `.table` for MLPs."""
        options.setdefault("title", self.metadata["analysis"].replace("_", " "))
        return self.heads.plot(**options)

    def __repr__(self) -> str:
        best = self._net.sort_values(ascending=False).head(4)
        return (
            f"NodeEffects({self.metadata['analysis']}: centred answer logit "
            f"{self.metric.mean():.3g} over {len(self.metric)} prompts; "
            + ", ".join(f"{node} {effect:+.3g}" for node, effect in best.items())
            + ")"
        )

    @property
    def _net(self) -> pd.Series:
        net = pd.Series(self.values.mean(0), index=self.nodes["node"])
        return net[self.nodes["kind"].isin(("head", "mlp")).to_numpy()]


def logit_attribution(
    model: HookedModel, prompts: Dataset, *, batch_size: int = 16, progress: bool = True
) -> NodeEffects:
    """Each node's term of the centred answer logit, the final norm's scale frozen.

    Args:
        prompts: With `choices`, as tasks of pairs give them (their clean side).

    Raises:
        AttributionError: Answers that are none of their choices, or a model whose logits are no
            sum over nodes (a norm behind attention, a factor or a cap on the logits).
    """

    def terms(rows: Dataset) -> tuple[Tensor, Tensor]:
        batch, choices = model.batch(list(rows["input_ids"])), Choices.of(model, rows)
        written = Written.by(model, batch)
        readout = Readout.of(model)
        direction = readout.direction(choices) / written.scale
        found = torch.einsum("bnm,bm->bn", readout.centred(written.nodes), direction)
        found[:, -1] += choices.centred(readout.constant(choices.tokens))
        metric = choices.centred(written.logits.gather(1, choices.tokens))
        check_sum(model, found.sum(1), metric, written.logits.abs().max())
        return found, metric

    return _effects(model, prompts, terms, "logit_attribution", batch_size, progress)


def direct_effect(
    model: HookedModel,
    pairs: Dataset,
    *,
    through: Sequence[Head | str] | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> NodeEffects:
    """What each node's own path to the logits loses by its value on the source prompt.

    Args:
        pairs: Clean prompts with `choices`, and as their sources corrupted ones, where another
            choice is right.
        through: Take as source not the corrupted prompt but the clean one, with only these heads
            at T as on the corrupted prompt: how much of a node's effect comes by way of them. They
            themselves get NaN.

    Raises:
        AttributionError: As `logit_attribution`.
    """
    heads = None if through is None else heads_of(through)
    model.check_heads(heads or ())

    def drops(rows: Dataset) -> tuple[Tensor, Tensor]:
        clean, source, choices = _both(model, rows, heads)
        readout = Readout.of(model)
        metric = choices.centred(readout(clean.resid[:, None], choices.tokens)[:, 0])
        swapped = clean.resid[:, None] - clean.nodes + source.nodes
        found = metric[:, None] - choices.centred(readout(swapped, choices.tokens))
        if heads is not None:
            found[:, index_of(node_table(model), [str(head) for head in heads])] = torch.nan
        return found, metric

    found = _effects(model, pairs, drops, "direct_effect", batch_size, progress)
    if heads is not None:
        found.metadata["through"] = [str(head) for head in heads]
    return found


def total_effect(model: HookedModel, pairs: Dataset, *, progress: bool = True) -> NodeEffects:
    """What the model loses by a node's value at T of the source prompt, later nodes recomputed.

    `activation_patching` (direction "noise") of z and mlp_out at the position "end". Works on any
    model that can be replayed; `pairs` as for `direct_effect`.
    """
    choices = Choices.of(model, pairs)
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, tokens in enumerate(choices.tokens.tolist()):  # a metric does not know its row
        groups.setdefault(tuple(sorted(tokens)), []).append(row)
    nodes = node_table(model)
    nodes = nodes[nodes["kind"].isin(("head", "mlp"))].reset_index(drop=True)
    metric, values = np.zeros(len(pairs)), np.zeros((len(pairs), len(nodes)))
    for tokens, rows in groups.items():
        for site, by, kind in (("z", ["layer", "head"], "head"), ("mlp_out", ["layer"], "mlp")):
            own = nodes[nodes["kind"] == kind]
            layers = [int(layer) for layer in own["layer"].unique()]
            if not layers:
                continue
            swept = activation_patching(
                model, pairs.select(rows), site, [*by, "position"], _centred_on(tokens),
                direction="noise", layers=layers, positions=["end"],
                progress=progress,
            )  # fmt: skip
            metric[rows] = swept.clean
            values[np.ix_(rows, own.index)] = swept.clean[:, None] - swept.values
    return NodeEffects(nodes, values, metric, _about(model, pairs, "total_effect"))


@torch.no_grad()
def swap_nodes(
    model: HookedModel,
    pairs: Dataset,
    sets: dict[str, Sequence[str]],
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> pd.DataFrame:
    """Whole sets of nodes at once as on the source prompt, all others as on the clean one.

    Only their own paths to the logits count: every node's output is given, and nothing recomputed.

    Returns:
        One row a set: `set`, `nodes` (how many), `metric` (centred answer logit), `moved` (share of
        the way from the clean to the source prompt's metric), `clean_wins` and `source_wins` (share
        of prompts where that prompt's right choice is the likeliest of the choices), `n`.

    Raises:
        AttributionError: An unknown node, or as `direct_effect`.
    """
    table = node_table(model)
    index = {name: index_of(table, nodes) for name, nodes in sets.items()}
    chosen = torch.zeros(len(index) + 2, len(table))
    chosen[-1] = 1  # the source prompt itself; the row before it, with no node, is the clean one
    for row, nodes in enumerate(index.values()):
        chosen[row, nodes] = 1
    parts = []
    for rows in _slices(model, pairs, batch_size, "node sets" if progress else None):
        clean, source, choices = _both(model, rows, None)
        change = torch.einsum("sn,bnm->bsm", chosen.to(clean.nodes), source.nodes - clean.nodes)
        logits = Readout.of(model)(clean.resid[:, None] + change, choices.tokens)
        best = choices.tokens.gather(1, logits.argmax(-1))
        right, wrong = (
            choices.tokens.gather(1, choices.right[:, None]),
            pair_batch(model, rows).wrong,
        )
        values = choices.centred(logits), best == right, best == wrong[:, None]
        parts.append(torch.stack([value.double() for value in values]))
    metric, clean_wins, source_wins = torch.cat(parts, dim=1).mean(1).cpu().numpy()
    return pd.DataFrame(
        {
            "set": list(index),
            "nodes": [len(nodes) for nodes in index.values()],
            "metric": metric[:-2],
            "moved": (metric[-2] - metric[:-2]) / ((metric[-2] - metric[-1]) or np.nan),
            "clean_wins": clean_wins[:-2],
            "source_wins": source_wins[:-2],
            "n": len(pairs),
        }
    )


def direct_and_total(direct: NodeEffects, total: NodeEffects, least: float = 0.02) -> pd.DataFrame:
    """Both effects of each head and MLP, and how it works, largest total effect first.

    Columns `node, kind, layer, head, direct, total, indirect` (total - direct) and `works`:
    "through later nodes" where the total effect is more than twice the direct one, "made up for
    later" where it is less than half of it, else "directly"; "hardly" where both are below `least`
    of the mean centred answer logit. The same ratios judge a node that speaks against the answer.
    """
    columns = ["node", "kind", "layer", "head"]
    one, other = (e.table[[*columns, "effect"]] for e in (direct, total))
    table = one.merge(other, on=columns, suffixes=("_d", "_t")).rename(
        columns={"effect_d": "direct", "effect_t": "total"}
    )
    both = table[["direct", "total"]].to_numpy()
    largest = np.abs(both).argmax(1)
    signs = np.sign(both[np.arange(len(both)), largest])
    own, whole = (both * signs[:, None]).T
    small = np.abs(both).max(1) < least * abs(direct.metric.mean())
    works = np.select(
        [small, whole > 2 * own, own > 2 * whole],
        ["hardly", "through later nodes", "made up for later"],
        "directly",
    )
    table = table.assign(indirect=table["total"] - table["direct"], works=works)
    order = table["total"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)


def _both(
    model: HookedModel, rows: Dataset, through: tuple[Head, ...] | None
) -> tuple[Written, Written, Choices]:
    """The clean prompts' nodes, and those of their sources."""
    batch, choices = pair_batch(model, rows), Choices.of(model, rows)
    clean = Written.by(model, batch.clean)
    if through is None:
        source = Written.by(model, batch.corrupted)
    else:
        source = Written.by(model, batch.clean, _heads_of_source(model, batch.corrupted, through))
    again = choices.centred(Readout.of(model)(clean.resid[:, None], choices.tokens)[:, 0])
    metric = choices.centred(clean.logits.gather(1, choices.tokens))
    check_sum(model, again, metric, clean.logits.abs().max())
    return clean, source, choices


def _heads_of_source(
    model: HookedModel, source: Batch, heads: tuple[Head, ...]
) -> list[tuple[str, Callable]]:
    """Hooks that put the source prompts' z of these heads at the last token."""
    kept: dict[int, Tensor] = {}

    def keep(z: Tensor, hook, layer: int) -> None:
        kept[layer] = z[:, -1]

    def patch(z: Tensor, hook, layer: int) -> Tensor:
        index = [head.head for head in heads if head.layer == layer]
        z = z.clone()
        z[:, -1, index] = kept[layer][:, index]
        return z

    layers = sorted({head.layer for head in heads})
    name = "blocks.{}.attn.hook_z".format
    with model.hooks(fwd_hooks=[(name(layer), partial(keep, layer=layer)) for layer in layers]):
        model.run(source.input_ids, source.attention_mask)
    return [(name(layer), partial(patch, layer=layer)) for layer in layers]


def _effects(model, prompts, measure, analysis, batch_size: int, progress: bool) -> NodeEffects:
    desc = analysis.replace("_", " ") if progress else None
    with torch.no_grad():
        parts = [measure(rows) for rows in _slices(model, prompts, batch_size, desc)]
    values, metric = (torch.cat(part).double().cpu().numpy() for part in zip(*parts))
    return NodeEffects(node_table(model), values, metric, _about(model, prompts, analysis))


def _about(model: HookedModel, prompts: Dataset, analysis: str) -> dict[str, Any]:
    about = {"analysis": analysis, "metric": "centred answer logit", "task": describe(prompts)}
    return about | model.provenance()


def _slices(model: HookedModel, prompts: Dataset, size: int, desc: str | None) -> Iterator[Dataset]:
    """Some prompts at a time, their spans told to whatever runs meanwhile."""
    if size < 1:
        raise AttributionError(f"batch_size={size}: at least 1.")
    starts = range(0, len(prompts), size)
    for start in tqdm(starts, desc=desc, disable=desc is None, leave=False):
        rows = prompts.select(range(start, min(start + size, len(prompts))))
        with model.spans(spans_of(rows)):
            yield rows


def _centred_on(tokens: tuple[int, ...]):
    """The metric for `activation_patching` on prompts that have the same choices."""

    def centred_answer_logit(
        logits: Float[Tensor, "batch d_vocab"], answers: Answers
    ) -> Float[Tensor, " batch"]:
        right = logits.gather(1, answers.right[:, None]).squeeze(1)
        return right - logits[:, list(tokens)].mean(1)

    return centred_answer_logit
