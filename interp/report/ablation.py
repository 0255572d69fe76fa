"""The report's section on causality: the top heads taken out, against as many others."""

import pandas as pd

from interp.analysis.causality import WORSE, AblationControl
from interp.report.page import Figure, Section, Table
from interp.report.words import change, counted, interval, listed, number, percent

NAMES = {"accuracy": "accuracy", "loss": "loss on answers", "text_loss": "loss on text"}
TOO_LOW = 0.2  # below this accuracy has no room to fall: the loss decides


def ablation_section(result: AblationControl, match_note: str = "") -> Section:
    """The verdict, the figure, the paired differences, and what happened to ordinary text."""
    k = max(result.ks)
    return Section(
        "ablation",
        "Does the model need these heads?",
        verdict(result, k),
        [
            set_up(result, k, match_note),
            figure(result),
            verdict_detail(result, k),
            ranks_table(result),
            *([text_control(result, k)] if "text_loss" in result.metrics else []),
        ],
    )


def deciding(result: AblationControl) -> str:
    """The metric that the verdict rests on: accuracy, or the loss where accuracy cannot fall."""
    return "accuracy" if baseline(result, "accuracy") >= TOO_LOW else "loss"


def baseline(result: AblationControl, metric: str) -> float:
    """The unablated model's value."""
    table = result.table
    rows = table[(table["condition"] == "unablated") & (table["metric"] == metric)]
    return float(rows["value"].iloc[0])


def verdict(result: AblationControl, k: int) -> str:
    """What the experiment says, and no more than the numbers do."""
    metric = deciding(result)
    rank, sign = result.rank(k, metric), WORSE[metric]
    size = moved(result, rank, metric)
    draws, chance = counted(int(rank["draws"]), "random draw"), f"p = {rank['p_value']:.2f}"
    act = f"Taking out the top {counted(k, 'head')}"
    if metric == "loss":
        act = f"Accuracy has no room to fall, so the loss decides. {act}"
    clear = min(sign * rank["gap_low"], sign * rank["gap_high"]) > 0
    if not harmful(result, k, metric):
        return f"{act} does no measurable harm: {size}."
    if rank["as_bad"] == 0 and clear:
        return (
            f"{act} hurts, and none of {draws} of as many others hurts as much: {size}; {chance}."
        )
    if rank["as_bad"] == 0:
        return (
            f"{act} hurts more than each of {draws}, but by so little that the interval of the "
            f"difference includes none: {size}; {chance}."
        )
    if clear:
        return (
            f"{act} hurts more than others do on average, but {rank['as_bad']} of {draws} hurt at "
            f"least as much: {size}; {chance}."
        )
    return (
        f"{act} hurts no more than taking out others: {size}; {rank['as_bad']} of {draws} hurt at "
        f"least as much ({chance}). This experiment does not single these heads out."
    )


def harmful(result: AblationControl, k: int, metric: str) -> bool:
    """Is the interval of the top heads' effect, paired by prompt, on the worse side of zero?"""
    row = effect(result, k, metric)
    return bool(WORSE[metric] * (row["high"] if WORSE[metric] < 0 else row["low"]) > 0)


def effect(result: AblationControl, k: int, metric: str) -> pd.Series:
    """The row of `differences` of the top k heads."""
    table = result.differences
    return table[(table["condition"] == f"top {k}") & (table["metric"] == metric)].iloc[0]


def moved(result: AblationControl, rank: dict, metric: str) -> str:
    """`accuracy 60 % → 15 % (random heads: 62 %)`."""
    before = baseline(result, metric)
    say = percent if metric == "accuracy" else number
    top, random = (max(0.0, before + rank[name]) for name in ("top", "random"))
    return f"{NAMES[metric]} {say(before)} → {say(top)} (random heads: {say(random)})"


def set_up(result: AblationControl, k: int, match_note: str) -> str:
    """What was done, on what."""
    rank = result.rank(k, "accuracy")
    match = (
        "as many from each layer as the top heads have there"
        if result.metadata["match"] == "layer"
        else "from any layer"
    )
    low = (
        f" The unablated model answers only {percent(baseline(result, 'accuracy'))} of them, so "
        "accuracy can hardly fall and the verdict rests on the loss."
        if deciding(result) == "loss"
        else ""
    )
    return (
        f"The heads ({listed(result.heads(k), 14)}) were chosen on the prompts above and are "
        f"ablated ({result.metadata['how']}) on {rank['n']} other prompts. The control: "
        f"{counted(int(rank['draws']), 'random draw')} of as many other heads, {match}.{match_note}"
        f"{low}"
    )


def figure(result: AblationControl) -> Figure:
    plot = result.plot()
    for title in plot.layout.annotations:
        title.text = NAMES.get(title.text, title.text)
    return Figure(
        "ablation",
        "The unablated model, the top heads taken out, random heads taken out",
        plot.update_layout(width=min(980, plot.layout.width)),
        result.table,
        "Losses in nats a token, lower is better. Lines: intervals over prompts (for random heads, "
        "over prompts and draws). Grey dots: the single draws.",
    )


def verdict_detail(result: AblationControl, k: int) -> str:
    """The paired differences behind the verdict, in words."""
    parts = []
    for metric in ("accuracy", "loss"):
        rank, row = result.rank(k, metric), effect(result, k, metric)
        parts.append(
            f"{NAMES[metric]} changes by {change(row['value'])} "
            f"{interval(row['low'], row['high'])} with the top heads out, and by "
            f"{change(rank['random'])} with random ones ({change(rank['random_low'])} to "
            f"{change(rank['random_high'])} over the draws)"
        )
    draws = int(result.rank(k, "accuracy")["draws"])
    return (
        f"Paired by prompt, {'; '.join(parts)}. With {draws} draws, p cannot be below "
        f"{1 / (1 + draws):.2f}."
    )


def ranks_table(result: AblationControl) -> Table:
    ranks = result.ranks
    shown = pd.DataFrame(
        {
            "heads": [f"{k}" for k in ranks["k"]],
            "metric": ranks["metric"].map(NAMES),
            "top": ranks["top"].map(change),
            "random, mean": ranks["random"].map(change),
            "over draws": [
                f"{change(low)} to {change(high)}"
                for low, high in zip(ranks["random_low"], ranks["random_high"])
            ],
            "top − random": [
                f"{change(r.gap)} {interval(r.gap_low, r.gap_high)}" for r in ranks.itertuples()
            ],
            "as bad": [f"{r.as_bad} of {r.draws}" for r in ranks.itertuples()],
            "p": ranks["p_value"].map(lambda value: f"{value:.2f}"),
        }
    )
    return Table(
        "ablation-ranks",
        "Changes from the unablated model, paired by prompt",
        ranks,
        shown,
        "“As bad”: draws that hurt at least as much as the top heads. p = (1 + as bad) / "
        "(1 + draws). The interval of top − random is over prompts and draws.",
    )


def text_control(result: AblationControl, k: int) -> str:
    """Did something else break?"""
    rank = result.rank(k, "text_loss")
    row, answers = effect(result, k, "text_loss"), result.rank(k, "loss")
    base = (
        f"On {rank['n']} plain texts without a needle (loss {number(baseline(result, 'text_loss'))}"
        f" unablated) the top heads change the loss by {change(row['value'])} "
        f"{interval(row['low'], row['high'])}, random ones by {change(rank['random'])} "
        f"({change(rank['random_low'])} to {change(rank['random_high'])})"
    )
    if row["low"] <= 0:
        return f"{base}: no measurable harm to ordinary text."
    if row["value"] > rank["random_high"]:
        share = f", against {change(answers['top'])} on the answers" if answers["top"] > 0 else ""
        return (
            f"{base}: more than any random draw, so these heads serve ordinary text as well{share}."
        )
    return f"{base}: within what random heads do."
