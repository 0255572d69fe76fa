"""The report's sections on needles and on the heads that retrieve them."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from datasets import Dataset
from jaxtyping import Bool

from interp import figures
from interp.analysis.patterns import Patterns
from interp.evaluation import Evaluation
from interp.heads import Head, HeadScores, ScoresError
from interp.report.page import Figure, Section, Table
from interp.report.words import counted, listed, number, percent

EDGES = [-np.inf, 0, 0.1, 0.5, np.inf]
CLASSES = ["0", "above 0, below 0.1", "0.1 to 0.5", "0.5 or more"]
BARS = 24
FEW = 5  # with fewer answered prompts heads are scored on all of them


# Accuracy


def needles_section(needles: Evaluation) -> Section:
    """The accuracy grid; `needles` has `length`, `depth` and `correct`."""
    return Section(
        "needles",
        "Finding a needle",
        accuracy(needles),
        [
            "A sentence with a code of three words is hidden in a text, and the model is asked for "
            "the code. Teacher-forced: an answer is right when each of its tokens is the model's "
            "first choice, given the prompt and the right tokens before.",
            grid(needles),
            cells(needles),
        ],
    )


def accuracy(needles: Evaluation) -> str:
    """How many needles are answered, over all and by length."""
    low, high = needles.interval
    right, n = int(needles.table["correct"].sum()), len(needles.table)
    by = needles.by("length").sort_values("length")
    lengths = [f"{percent(row.value)} at {row.length}" for row in by.itertuples()]
    tail = f": {listed(lengths)} tokens" if right and len(by) > 1 else ""
    none = " None at all: what follows on retrieval says little of this model." * (not right)
    return (
        f"The model answers {right} of {n} needle prompts ({percent(needles.accuracy)}, interval "
        f"{percent(low)} to {percent(high)}){tail}.{none}"
    )


def grid(needles: Evaluation) -> Figure:
    table = needles.by("length", "depth")
    table = table[table["metric"] == "accuracy"].drop(columns="metric")
    plot = figures.grid(
        table.assign(depth=table["depth"].round(2)), "length", "depth", "value", "n",
        colorbar="accuracy",
    )  # fmt: skip
    return Figure(
        "needles",
        "Share of needles answered, by length of the prompt (tokens) and depth of the needle",
        plot,
        table,
        "Depth 0: the needle opens the text; 1: it stands right before the question. n: prompts in "
        "the cell.",
    )


def cells(needles: Evaluation) -> str:
    """What the grid can and cannot tell."""
    table = needles.by("depth")
    table = table[table["metric"] == "accuracy"]
    n = int(needles.by("length", "depth").query("metric == 'accuracy'")["n"].min())
    width = f"With {counted(n, 'prompt')} a cell, single cells differ by chance"
    if len(table) < 2:
        return f"{width}."
    best, worst = table.loc[table["value"].idxmax()], table.loc[table["value"].idxmin()]
    if worst["high"] < best["low"]:
        return (
            f"{width}; over all lengths, depth matters: {percent(worst['value'])} at depth "
            f"{worst['depth']:.2g} against {percent(best['value'])} at depth {best['depth']:.2g}."
        )
    return f"{width}; over all lengths, no depth is told from another by these numbers."


# Heads


def answered_by(scores: HeadScores) -> Bool[np.ndarray, " prompt"]:
    """Which prompts were answered: the success filter made the others' samples NaN."""
    return ~np.isnan(scores.samples).all(axis=1)


def heads_section(
    scores: HeadScores, prompts: Dataset, top: list[Head], pattern: Sequence[str | Figure] = ()
) -> Section:
    """Map, ranking, classes, stability; `top` are the heads that the ablation takes."""
    stable = stability(scores, prompts["length"][:], len(top))
    parts = [
        counted_on(scores),
        heads_map(scores, top),
        ranking(scores, top),
        classes(scores),
        stability_sentence(stable),
        *([stability_table(stable)] if len(stable) else []),
        *pattern,
    ]
    return Section("retrieval", "Retrieval heads", strongest(scores), parts)


def strongest(scores: HeadScores) -> str:
    """How many heads retrieve, and which most."""
    table = scores.table
    strong = table[table["score"] >= 0.1]
    n = scores.metadata["counts"]["scored"]
    if not len(strong):
        best = table["score"].max()
        return (
            f"No head reaches a retrieval score of 0.1 (largest: {number(best)}; {n} prompts): "
            "these prompts show no retrieval heads."
        )
    names = [
        f"{head} ({number(scores[head]['score'])})" for head in scores.top(min(3, len(strong)))
    ]
    verb = "copies" if len(strong) == 1 else "copy"
    return (
        f"{len(strong)} of {len(table)} heads ({percent(len(strong) / len(table))}) {verb} the "
        f"answer's tokens out of the text with a score of 0.1 or more, first {listed(names)}."
    )


def counted_on(scores: HeadScores) -> str:
    """What the scores rest on, and the caveats that follow."""
    counts = scores.metadata["counts"]
    rest = (
        "A head's score on a prompt is the share of the answer's tokens at which its most-attended "
        "key is that very token inside the needle."
    )
    if scores.metadata["only_successes"]:
        share = counts["answered"] / counts["attempted"]
        low = (
            f" The model answers few of them, so scores rest on {counts['scored']} prompts only."
            if share < 0.2 or counts["scored"] < 10
            else ""
        )
        return (
            f"{rest} Scores are means over the {counts['scored']} of {counts['attempted']} prompts "
            f"that the model answers.{low}"
        )
    return (
        f"{rest} The model answers only {counts['answered']} of {counts['attempted']} prompts, too "
        "few to score on, so here all prompts count: the scores say where heads look while the "
        "right answer is put into the model's mouth, not how it would find it."
    )


def heads_map(scores: HeadScores, top: list[Head]) -> Figure:
    high = max(1.0, float(scores.table["score"].max()))
    return Figure(
        "retrieval-heads",
        "Retrieval score by layer and head",
        scores.plot(title="", mark=top, limits=(0.0, high)),
        scores.table,
        f"Outlined: the {len(top)} heads that the ablation below takes out.",
    )


def ranking(scores: HeadScores, top: list[Head]) -> Figure:
    """The best heads as bars, with the interval of their mean over prompts."""
    table = scores.interval().sort_values("score", ascending=False, kind="stable").head(BARS)
    table = table[(table["score"] > 0) | (np.arange(len(table)) < FEW)]
    heads = [Head(int(row.layer), int(row.head)) for row in table.itertuples()]
    half = table["high"] - table["score"]
    plot = go.Figure(
        go.Bar(
            x=[str(head) for head in heads],
            y=table["score"],
            marker_color=[figures.PALETTE[1 if head in top else 0] for head in heads],
            error_y={
                "array": half,
                "arrayminus": np.minimum(half, table["score"]),  # no score is below 0
                "color": figures.INK,
                "thickness": 1.3,
                "width": 3,
            },
            customdata=np.stack([table["frequency"], table["mass"], table["std"]], axis=1),
            hovertemplate="%{x}: %{y:.3f}<br>copies in %{customdata[0]:.0%} of prompts<br>"
            "weight on the needle %{customdata[1]:.2f}<br>std %{customdata[2]:.2f}<extra></extra>",
        )
    )
    plot.update_layout(
        template=figures.TEMPLATE, width=880, height=330, margin={"t": 20}, bargap=0.35
    )
    plot.update_xaxes(tickangle=-60, showgrid=False)
    plot.update_yaxes(title="retrieval score", rangemode="tozero")
    for line in (0.1, 0.5):
        plot.add_hline(line, line={"color": figures.FAINT, "dash": "dot", "width": 1.2})
    return Figure(
        "retrieval-ranking",
        f"The {len(table)} highest scores, with the interval of each mean over prompts",
        plot,
        scores.interval(),
        "Dotted: 0.1, from where the paper speaks of a retrieval head, and 0.5, a strong one. "
        "Orange: ablated below. Scores above 1 mean that a token was copied more than once.",
    )


def classes(scores: HeadScores) -> Table:
    """How many heads lie in each class of the paper."""
    # right=False: a head at 0.1 is a retrieval head; zero is a class of its own
    values = scores.table["score"].dropna()
    kinds = pd.cut(values.where(values > 0, -1.0), EDGES, right=False, labels=CLASSES)
    table = kinds.value_counts(sort=False).rename_axis("score").reset_index(name="heads")
    table["share"] = table["heads"] / len(values)
    shown = table.assign(share=table["share"].map(percent))
    return Table(
        "retrieval-classes",
        "Heads by mean score",
        table.astype({"score": str}),
        shown,
        "In most models that were looked at so, few per cent of the heads reach 0.1 (Wu et al. "
        "2024).",
    )


# Stability


def stability(scores: HeadScores, lengths: Sequence[int], k: int) -> pd.DataFrame:
    """Rank correlation and shared top k between halves of the prompts, and between lengths."""
    used = answered_by(scores)
    sizes = np.array(lengths)
    halves = np.cumsum(used) % 2  # every other scored prompt, so both halves span the grid
    pairs = [("two halves of the prompts", halves == 0, halves == 1)]
    pairs += [
        (f"{one} and {other} tokens", sizes == one, sizes == other)
        for one, other in combinations(sorted(set(lengths)), 2)
    ]
    rows = []
    for name, one, other in pairs:
        n = (int((one & used).sum()), int((other & used).sum()))
        if min(n) < 3:
            continue
        first, second = (scores.split(part.tolist())[True] for part in (one, other))
        with np.errstate(invalid="ignore"):
            correlation = correlated(first, second)
        overlap = first.overlap(second, k)
        shared, null = len(overlap.shared), overlap.expected
        row = {"between": name, "n_one": n[0], "n_other": n[1], "correlation": correlation}
        rows.append(row | {"k": k, "shared": shared, "by_chance": null, "p": overlap.p_value})
    return pd.DataFrame(rows)


def correlated(one: HeadScores, other: HeadScores) -> float:
    """Rank correlation; NaN where all scores are the same."""
    if min(len(set(s.table["score"].dropna())) for s in (one, other)) < 2:
        return float("nan")
    try:
        return one.correlation(other)
    except ScoresError:
        return float("nan")


def stability_sentence(table: pd.DataFrame) -> str:
    """Do other prompts give the same heads?"""
    if not len(table):
        return "Too few prompts were scored to compare halves of them, or lengths."
    row = table.iloc[0]
    if np.isnan(row["correlation"]):
        return "All scores are equal: nothing can be said of their stability."
    size = round(row["correlation"], 2)  # the word fits the number that is shown
    word = "stable" if size >= 0.8 else "moderately stable" if size >= 0.5 else "not stable"
    return (
        f"Between {row['between']} the ranking of heads is {word}: rank correlation "
        f"{number(size)}, and {row['shared']} of the top {row['k']} are the same "
        f"({number(row['by_chance'], 1)} expected by chance)."
    )


def stability_table(table: pd.DataFrame) -> Table:
    shown = pd.DataFrame(
        {
            "between": table["between"],
            "prompts": [f"{a} + {b}" for a, b in zip(table["n_one"], table["n_other"])],
            "rank correlation": table["correlation"].map(
                lambda value: "–" if np.isnan(value) else f"{value:.2f}"
            ),
            f"shared of top {table['k'].iloc[0]}": table["shared"],
            "by chance": table["by_chance"].map(lambda value: f"{value:.1f}"),
            "p": table["p"].map(p_value),
        }
    )
    return Table(
        "retrieval-stability",
        "Do other prompts, and other lengths, give the same heads?",
        table,
        shown,
        "Spearman over all heads, of which those without any score tie; p: the chance of sharing "
        "so many of the top heads if one list had been drawn at random.",
    )


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


# One head at work


def pattern_parts(patterns: Patterns, prompt: dict, answered: bool) -> list[str | Figure]:
    """The rows of the answer, of the heads in `patterns`, on one needle prompt."""
    start, end = prompt["spans"]["answer"]
    rows = slice(-len(prompt["answer_ids"]), None)
    weights = patterns.patterns[:, rows]
    head = patterns.heads[0]
    mass = weights[0][:, start:end].sum(1).mean()
    aim = [prompt["input_ids"][int(key)] if key < len(prompt["input_ids"]) else -1
           for key in weights[0].argmax(1)]  # fmt: skip
    inside = [start <= key < end for key in weights[0].argmax(1)]
    hits = sum(a == b and i for a, b, i in zip(aim, prompt["answer_ids"], inside, strict=True))
    n_keys, written = len(patterns.tokens), patterns.tokens[rows]
    plot = figures.attention_pattern(
        weights, patterns.tokens, [str(h) for h in patterns.heads],
        query_tokens=written, first_query=n_keys - len(written), columns=1,
    )  # fmt: skip
    plot.update_layout(width=940, height=110 + 230 * len(patterns.heads))
    plot.add_vrect(
        x0=start - 0.5, x1=end - 0.5, line={"color": figures.PALETTE[1], "width": 1.5},
        row="all", col="all",
    )  # fmt: skip
    say = "writes the answer" if answered else "is given the answer (it would write another)"
    return [
        f"On one prompt of {n_keys} tokens, while the model {say}, {head} puts "
        f"{percent(mass)} of its attention on the answer inside the needle, and in {hits} of "
        f"{len(aim)} rows it looks most at the very token that comes next.",
        Figure(
            "retrieval-pattern",
            f"Attention of {listed(patterns.heads)} while the answer is written",
            plot,
            block_of(patterns, weights, n_keys - len(written)),
            "A row is the token that has just been read, and shows where the head looks to say "
            "the next one; framed: the answer inside the needle.",
        ),
    ]


def block_of(patterns: Patterns, weights: np.ndarray, first_query: int) -> pd.DataFrame:
    """The shown block as a table."""
    panel, query, key = np.indices(weights.shape).reshape(3, -1)
    heads = [str(head) for head in patterns.heads]
    return pd.DataFrame(
        {
            "head": [heads[i] for i in panel],
            "query": query + first_query,
            "key": key,
            "token": [patterns.tokens[i] for i in key],
            "weight": weights.reshape(-1),
        }
    )
