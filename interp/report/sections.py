"""The report's sections: each runs a stage, and says what came out in figures and sentences.

Sentences are written from the numbers, whichever way they fall.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from datasets import Dataset

import interp
from interp import figures
from interp.analysis.causality import AblationControl, ablation_control
from interp.analysis.retrieval import retrieval_heads
from interp.analysis.sinks import Sinks, attention_sinks
from interp.heads import HeadScores
from interp.model.hooked import HookedModel
from interp.report.plan import Plan
from interp.tasks import needle, text


@dataclass(frozen=True)
class Figure:
    """A figure, the table behind it, and how to read it."""

    name: str
    figure: go.Figure
    table: pd.DataFrame
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading, what the numbers say, and figures."""

    title: str
    sentences: list[str]
    figures: list[Figure] = field(default_factory=list)


@dataclass
class Study:
    """The stages of one report; each result is computed once and kept in `out`."""

    model: HookedModel
    plan: Plan
    out: Path
    resume: bool = True

    @cached_property
    def texts(self) -> Dataset:
        plan = self.plan
        return text(self.model, plan.data, plan.text_tokens, plan.texts, plan.seed + 2)

    @cached_property
    def prompts(self) -> Dataset:
        plan = self.plan
        return needle(self.model, plan.lengths, plan.depths, plan.n, plan.seed)

    @cached_property
    def fresh(self) -> Dataset:
        """Prompts that the heads were not chosen on."""
        plan = self.plan
        return needle(self.model, plan.lengths[:1], plan.depths, plan.ablation_n, plan.seed + 1)

    @cached_property
    def sinks(self) -> Sinks:
        return attention_sinks(
            self.model, self.texts, batch_size=self.plan.batch_size, **self._kept("sinks")
        )

    @cached_property
    def scores(self) -> HeadScores:
        """Retrieval scores; of all prompts where the model answers none of them."""
        settings = {"batch_size": self.plan.batch_size, **self._kept("retrieval")}
        scores = retrieval_heads(self.model, self.prompts, only_successes=False, **settings)
        if scores.metadata["counts"]["answered"]:
            scores = retrieval_heads(self.model, self.prompts, **settings)
        return scores

    @cached_property
    def ablation(self) -> AblationControl:
        k = self.plan.top_of(self.scores)
        return ablation_control(
            self.model,
            self.scores,
            self.fresh,
            ks=[k],
            draws=self.plan.draws,
            match=self.match,
            seed=self.plan.seed,
            other=self.texts,
            batch_size=self.plan.batch_size,
            **self._kept("ablation"),
        )

    @property
    def match(self) -> str | None:
        """Controls from the same layers, where these have enough other heads."""
        try:
            self.scores.random(self.plan.top_of(self.scores), seed=0, match="layer")
        except interp.errors.UserError:
            return None
        return "layer"

    def _kept(self, stage: str) -> dict:
        return {"out": self.out / stage, "resume": self.resume}


def sections(study: Study) -> Iterator[Section]:
    """All sections, in the order in which they are read (and run)."""
    yield sinks_section(study)
    yield needle_section(study)
    yield heads_section(study)
    yield ablation_section(study)


def sinks_section(study: Study) -> Section:
    """Which keys take the attention."""
    sinks, heads = study.sinks, study.sinks.heads
    n_texts, n_tokens = len(sinks.received), study.plan.text_tokens
    later = sinks.later(threshold=0.1)
    sentences = [
        f"On {n_texts} texts of up to {n_tokens} tokens the first token receives "
        f"{heads.table['score'].mean():.2f} of the attention of the queries that may see it (mean "
        f"over {len(heads)} heads; a head that looked at all tokens alike would give it "
        f"{sinks.tokens.query('position == 0')['uniform'].mean():.2f}). Its sink rate at 0.3 is "
        f"{sinks.sink_rate():.0%} of heads and texts.",
        _later_sentence(later, n_texts),
        _massive_sentence(sinks.massive),
    ]
    layers = later["layer"].value_counts().index[:4].sort_values().tolist()
    example = int(later["prompt"].iloc[0]) if len(later) else 0
    tokens = sinks.tokens[sinks.tokens["prompt"] == example]
    by_layer = sinks.massive.groupby("layer", as_index=False).agg(
        largest=("value", lambda x: x.abs().max()), ratio=("ratio", "max")
    )
    return Section(
        "Attention sinks",
        sentences,
        [
            Figure(
                "first_token",
                heads.plot(title="What the first token receives", colorbar="received"),
                heads.table,
                "Mean attention that each head's queries give to the first token.",
            ),
            Figure(
                "profile",
                sinks.plot(prompt=example, layers=layers or None),
                tokens,
                "What every token of one text receives, mean over heads, in the layers with the "
                "most later sinks; the highest are named. The last columns are seen by few "
                "queries: read them with care.",
            ),
            Figure(
                "massive",
                figures.profile(
                    by_layer["layer"].to_numpy(),
                    by_layer["largest"].to_numpy(),
                    title="Largest activation after each layer",
                    x_title="layer",
                    y_title="largest |x|",
                    log=True,
                ),
                by_layer,
                "The largest entry of the residual stream after each layer, over all texts.",
            ),
        ],
    )


def needle_section(study: Study) -> Section:
    """Can the model do the task that the heads are scored on?"""
    counts = study.scores.metadata["counts"]
    prompts = study.prompts.select_columns(["length", "depth"]).to_pandas()
    prompts["correct"] = _answered(study)
    cells = prompts.groupby(["length", "depth"], as_index=False).agg(
        accuracy=("correct", "mean"), n=("correct", "size")
    )
    cells["depth"] = cells["depth"].round(2)
    answered, attempted = counts["answered"], counts["attempted"]
    low, high = interp.evaluation.share_interval(answered, attempted)
    sentences = [
        f"{answered} of {attempted} needles are found ({answered / attempted:.0%}, 95 % interval "
        f"{low:.0%} to {high:.0%}): every token of the answer is the model's first choice, given "
        "those before it."
    ]
    if answered == 0:
        sentences.append(
            "The model answers none, so what follows rests on prompts that it fails: heads may "
            "look at the answer all the same, but nothing here can show that the model needs them."
        )
    elif answered < 0.2 * attempted:
        sentences.append("That is little: the head scores below rest on these few prompts.")
    figure = figures.grid(cells, "length", "depth", "accuracy", "n", title="Needles found")
    caption = "Share of needles found, by prompt length in tokens and depth (0 = at the start)."
    return Section(
        "The needle task",
        sentences,
        [Figure("needles", figure, cells, caption)],
    )


def heads_section(study: Study) -> Section:
    """Which heads copy the answer."""
    scores, table = study.scores, study.scores.table
    best = scores.top(k=min(5, len(scores)))
    names = ", ".join(f"{head} ({scores[head]['score']:.2f})" for head in best)
    above, strong = (table["score"] > 0.1).mean(), (table["score"] >= 0.5).sum()
    sentences = [
        f"The heads that copy most: {names}. {above:.1%} of heads score above 0.1, {strong} reach "
        f"0.5, {(table['score'] == 0).mean():.0%} never copy (n = {int(table['n'].max())} prompts).",
        _stability_sentence(study),
    ]
    ranked = scores.interval().sort_values("score", ascending=False).head(15)
    ranked["condition"] = [f"L{r.layer}H{r.head}" for r in ranked.itertuples()]
    ranked["metric"], ranked["value"] = "retrieval score", ranked["score"]
    looked = _attention_of(study, best[0])
    return Section(
        "Retrieval heads",
        sentences,
        [
            Figure(
                "retrieval",
                scores.plot(title="Retrieval score", mark=best),
                table,
                "Share of the answer's tokens that each head copies; the top five are outlined.",
            ),
            Figure(
                "top_heads",
                figures.conditions(ranked, title="The highest scores"),
                ranked,
                "With 95 % intervals over prompts (normal theory; the spread is over contexts).",
            ),
            Figure(
                "looks_at",
                figures.profile(
                    looked["position"].to_numpy(),
                    looked["weight"].to_numpy(),
                    tokens=looked["token"].tolist(),
                    title=f"Where {best[0]} looks while the answer is produced",
                    y_title="weight",
                    peaks=6,
                ),
                looked,
                "One prompt: the mean weight of the answer's rows on each token.",
            ),
        ],
    )


def ablation_section(study: Study) -> Section:
    """Does the model need these heads?"""
    result, k = study.ablation, study.plan.top_of(study.scores)
    where = "the same layers" if study.match else "any layer (these layers have too few others)"
    sentences = [
        f"The top {k} heads are switched off (their output set to zero) on {len(study.fresh)} "
        f"prompts that did not choose them; the control is {study.plan.draws} draws of {k} other "
        f"heads from {where}.",
        *(_effect_sentence(result.rank(k, metric)) for metric in result.metrics),
    ]
    caption = (
        "Dots with 95 % intervals over prompts (for random heads over prompts and draws); grey: "
        "single draws. loss: nats per token of the answer; text_loss: of text without needles."
    )
    figure = result.plot(title="Ablation and its control")
    return Section(
        "Does the model need them?",
        sentences,
        [
            Figure("ablation", figure, result.table, caption),
        ],
    )


def _later_sentence(later: pd.DataFrame, n_texts: int) -> str:
    if later.empty:
        return "No later token receives more than 0.1 on the mean over heads in any layer."
    named = later.groupby("token")["prompt"].nunique().sort_values(ascending=False).head(4)
    tokens = ", ".join(f"{token!r} ({n} of {n_texts} texts)" for token, n in named.items())
    best = later.iloc[0]
    low, high = later["layer"].min(), later["layer"].max()
    return (
        f"Later tokens are sinks too, in layers {low} to {high}: {tokens}. The strongest is "
        f"{best['token']!r} at position {best['position']} in layer {best['layer']}, which receives "
        f"{best['received']:.2f} where uniform attention would give it {best['uniform']:.2f}."
    )


def _massive_sentence(massive: pd.DataFrame) -> str:
    largest = massive.loc[massive["value"].abs().idxmax()]
    what = f"|x| = {abs(largest['value']):,.0f} in dimension {largest['dim']}"
    where = f"{largest['token']!r} (position {largest['position']}) after layer {largest['layer']}"
    ratio = f"{largest['ratio']:,.0f} times the median"
    found = massive[massive["massive"]]
    if found.empty:
        return (
            f"No activation is massive (above 100 and 1,000 times the median): the largest is {what} "
            f"at {where}, {ratio}."
        )
    first, last = found["layer"].min(), found["layer"].max()
    share = (found["position"] == 0).mean()
    return (
        f"Massive activations stand in layers {first} to {last}, {share:.0%} of them at the first "
        f"token; the largest is {what} at {where}, {ratio}."
    )


def _stability_sentence(study: Study) -> str:
    scores = study.scores
    if int(scores.table["n"].max()) < 4:
        return "Too few prompts for a word on stability."
    one, other = scores.halves(seed=study.plan.seed)
    said = [f"between halves of the grid {one.correlation(other):.2f}"]
    by_length = scores.split(study.prompts["length"])
    lengths = [n for n in study.plan.lengths if by_length[n].table["n"].max() > 0]
    if len(lengths) > 1:
        value = by_length[lengths[0]].correlation(by_length[lengths[-1]])
        said.append(f"between {lengths[0]} and {lengths[-1]} tokens {value:.2f}")
    return f"Rank correlation of the scores (Spearman): {', '.join(said)}."


def _effect_sentence(rank: dict) -> str:
    names = {"accuracy": "Accuracy", "loss": "The answer's loss", "text_loss": "The text's loss"}
    verdict = (
        f"{rank['as_bad']} of {rank['draws']} draws hurt at least as much (rank p = "
        f"{rank['p_value']:.2f})."
    )
    clear = rank["gap_low"] > 0 or rank["gap_high"] < 0
    gap = "clearly apart from" if clear else "not clearly apart from"
    return (
        f"{names[rank['metric']]} changes by {rank['top']:+.2f} against {rank['random']:+.2f} for "
        f"random heads ({rank['random_low']:+.2f} to {rank['random_high']:+.2f}): {gap} the "
        f"control (difference {rank['gap']:+.2f}, 95 % interval {rank['gap_low']:+.2f} to "
        f"{rank['gap_high']:+.2f}); {verdict}"
    )


def _answered(study: Study) -> np.ndarray:
    """Which prompts of the grid were answered: as the scoring run found it."""
    folder = study.out / "retrieval" / "shards"
    shards = sorted(folder.glob("shard-*.parquet"))
    return pd.concat([pd.read_parquet(s, columns=["success"]) for s in shards])[
        "success"
    ].to_numpy()


@torch.no_grad()
def _attention_of(study: Study, head) -> pd.DataFrame:
    """Mean weight of the answer's rows on each token of the first prompt."""
    model, row = study.model, study.prompts[0]
    ids = [*row["input_ids"], *row["answer_ids"][:-1]]
    rows = slice(len(row["input_ids"]) - 1, None)
    found = model.read_attention(
        model.batch([ids]).input_ids,
        lambda attention: attention.pattern(heads=[head.head], queries=rows).mean(2),
        layers=[head.layer],
    )
    return pd.DataFrame(
        {
            "position": np.arange(len(ids)),
            "token": [model.tokenizer.decode([token]) for token in ids],
            "weight": found[0, 0, 0].cpu().numpy(),
        }
    )
