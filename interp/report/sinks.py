"""The report's section on attention sinks."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from interp import figures
from interp.analysis.sinks import Sinks, uniform_received
from interp.report.page import Figure, Section, Table
from interp.report.words import counted, listed, number, percent, quoted

KINDS = {"prose": "prose text", "filler": "text", "data": "given text"}
MANY, SOME = 0.3, 0.05  # sink rates at which the first token is called a sink of many, some heads


def sinks_section(sinks: Sinks, kinds: list[str]) -> Section:
    """First token, later tokens, massive activations, value norms; `kinds` as in `Texts`."""
    later = later_sinks(sinks)
    massive = by_layer(sinks)
    return Section(
        "sinks",
        "Attention sinks",
        f"{first_token(sinks)} {later_tokens(sinks, later)}",
        [
            measured(sinks, kinds),
            first_map(sinks),
            later_detail(sinks, later),
            profile_of(sinks, kinds, later),
            *([later_table(sinks, later)] if len(later) else []),
            massive_sentence(sinks, massive),
            massive_figure(massive),
            norms_sentence(sinks),
            norms_figure(sinks),
        ],
    )


# The first token


def first_token(sinks: Sinks) -> str:
    """Is the first token a sink, and how strong?"""
    rate = sinks.sink_rate()
    heads = "many heads" if rate >= MANY else "some heads" if rate >= SOME else "hardly any head"
    heads = heads if rate else "no head"
    received = sinks.heads.table["score"].mean()
    return (
        f"The first token is an attention sink for {heads}: it receives {percent(received)} of the "
        f"attention on average, and above {sinks.rule.epsilon:g} in {percent(rate)} of all pairs "
        "of head and text."
    )


def measured(sinks: Sinks, kinds: list[str]) -> str:
    """What was measured on, and what even attention would give."""
    first = np.array([values[:, :, 0].mean() for values in sinks.received])
    groups = {kind: first[np.array(kinds) == kind] for kind in dict.fromkeys(kinds)}
    parts = [
        f"{percent(v.mean())} on {counted(len(v), KINDS[kind])}" + " of filler" * (kind == "filler")
        for kind, v in groups.items()
    ]
    n_tokens = [values.shape[2] for values in sinks.received]
    even = np.mean([uniform_received(n)[0] for n in n_tokens])
    spread = "" if len(first) < 2 else f", from {percent(first.min())} to {percent(first.max())}"
    return (
        f"Measured on {counted(len(first), 'text')} of at most {max(n_tokens)} tokens. What a "
        "token receives is its mean weight over all queries that may see it. The first token of "
        f"a text receives {listed(parts)}{spread} (mean over layers and heads); attention spread "
        f"evenly over all visible tokens would give it {percent(even)}. Such shares fall as texts "
        "get longer: compare them at equal lengths only."
    )


def first_map(sinks: Sinks) -> Figure:
    heads = sinks.heads
    strong = heads.table["score"] > sinks.rule.epsilon
    return Figure(
        "sinks-first",
        "Share of attention that the first token receives, by layer and head",
        heads.plot(title="", colorbar="share", limits=(0.0, 1.0)),
        heads.table,
        f"Dark cells: heads that park their attention on the first token. {strong.sum()} of "
        f"{len(strong)} heads give it more than {sinks.rule.epsilon:g}, mean over the texts.",
    )


# Later tokens


def later_sinks(sinks: Sinks) -> pd.DataFrame:
    """One row a token other than the first that is a sink in some layer: its strongest layer."""
    found = sinks.later()
    places = found.groupby(["prompt", "position"], sort=False)
    best = found.loc[places["received"].idxmax()]
    layers = places["layer"].agg(["min", "max", "nunique"]).reset_index()
    merged = best.merge(layers, on=["prompt", "position"])
    return merged.sort_values("received", ascending=False, ignore_index=True)


def later_tokens(sinks: Sinks, later: pd.DataFrame) -> str:
    """Are there later sinks, and which is the strongest?"""
    if not len(later):
        return "No later token does as much."
    best = later.iloc[0]
    sizes = [values.shape[2] for values in sinks.received]
    n_tokens = sum(n - sinks.rule.least_queries(n) for n in sizes)  # those that enough queries see
    return (
        f"{len(later)} of {n_tokens:,} later tokens {'stands' if len(later) == 1 else 'stand'} out "
        f"in some layer; strongest is {quoted(best['token'])} at position {best['position']} of a "
        f"text, which receives {percent(best['received'])} in layer {best['layer']}."
    )


def later_detail(sinks: Sinks, later: pd.DataFrame) -> str:
    """The rule, and where later sinks are found."""
    n_tokens = max(values.shape[2] for values in sinks.received)
    rule = (
        f"A later token counts as a sink where it receives more than {sinks.rule.alpha:g} / "
        f"(number of tokens), here {number(sinks.rule.threshold(n_tokens), 3)}, mean over the "
        f"heads of a layer, and at least {sinks.rule.least_queries(n_tokens)} queries can see it. "
    )
    if not len(later):
        return rule + "No token but the first does."
    strong = later[later["received"] > 0.1]
    layers = strong["layer"].value_counts()
    where = f", most often in {listed([f'layer {n}' for n in layers.index[:3]])}" * bool(
        len(strong)
    )
    early = (later["position"] <= 3).mean()
    return (
        f"{rule}{counted(len(later), 'token')} {'does' if len(later) == 1 else 'do'}; "
        f"{len(strong)} of them receive more than 10 %{where}. {percent(early)} of them stand at "
        "positions 1 to 3, which even attention favours too."
    )


def profile_of(sinks: Sinks, kinds: list[str], later: pd.DataFrame) -> Figure:
    """What each token of one text receives: the text with the strongest later sink."""
    own = [p for p, kind in enumerate(kinds) if kind != "filler"] or list(range(len(kinds)))
    found = later[later["prompt"].isin(own)]
    prompt = int(found["prompt"].iloc[0]) if len(found) else own[0]
    table = sinks.tokens[sinks.tokens["prompt"] == prompt]
    least = sinks.rule.least_queries(sinks.received[prompt].shape[2])
    seen = table[table["queries"] >= least]
    strongest = seen[seen["position"] > 0].groupby("layer")["received"].max()
    seen = seen[seen["layer"].isin(strongest.nlargest(4).index)]
    plot = figures.profile(
        seen["position"],
        seen["received"],
        tokens=seen["token"],
        series=[f"layer {layer}" for layer in seen["layer"]],
        y_title="attention received",
        peaks=8,
        log=True,
    )
    return Figure(
        "sinks-profile",
        "Attention received along one text, in the layers where later tokens receive most",
        plot.update_layout(width=940, height=420),
        table,
        "Mean over the heads of a layer, logarithmic; peaks are named by their token. The last "
        f"{least - 1} tokens are left out: too few queries see them.",
    )


def later_table(sinks: Sinks, later: pd.DataFrame) -> Table:
    """Later sinks by token: how often, how strong, where."""
    groups = later.groupby("token", sort=False)
    named = groups.agg(
        times=("received", "size"),
        texts=("prompt", "nunique"),
        strongest=("received", "max"),
        position=("position", "first"),
        layer=("layer", "first"),
        even=("uniform", "first"),
    ).reset_index()
    top = named.sort_values("strongest", ascending=False, ignore_index=True).head(10)
    first_layer = sinks.tokens[sinks.tokens["layer"] == sinks.tokens["layer"].min()]
    stood = first_layer.loc[first_layer["position"] > 0, "token"].value_counts()
    shown = pd.DataFrame(
        {
            "token": [quoted(token) for token in top["token"]],
            "strongest": top["strongest"].map(percent),
            "in layer": top["layer"],
            "at position": top["position"],
            "if even": top["even"].map(percent),
            "a sink": [f"{n} of {stood[t]}" for n, t in zip(top["times"], top["token"])],
            "texts": top["texts"],
        }
    )
    return Table(
        "sinks-later",
        f"Later sinks by token, the {len(top)} strongest of {len(named)}",
        later,
        shown,
        "“If even”: what attention spread evenly would give that position. “A sink”: how often, of "
        "all times that the token stands after the first place. A token that is one in several "
        "texts is more likely one by what it is.",
    )


# Massive activations and value norms


def by_layer(sinks: Sinks) -> pd.DataFrame:
    """The largest activation after each layer over all texts, and the median there."""
    massive = sinks.massive
    rows = massive.loc[massive["value"].abs().groupby(massive["layer"]).idxmax()]
    count = massive[massive["massive"]].groupby("layer")["prompt"].nunique()
    return rows.assign(
        largest=rows["value"].abs(),
        median=rows["value"].abs() / rows["ratio"],
        texts=rows["layer"].map(count).fillna(0).astype(int),
    ).reset_index(drop=True)


def massive_sentence(sinks: Sinks, table: pd.DataFrame) -> str:
    """Are there massive activations, where, and at which tokens?"""
    best = table.loc[table["largest"].idxmax()]
    size = (
        f"The largest activation of the residual stream is {number(best['largest'])} (dimension "
        f"{best['dim']}, after layer {best['layer']}, at {quoted(best['token'])}, position "
        f"{best['position']}), {number(best['ratio'])} times the median there."
    )
    found = sinks.massive[sinks.massive["massive"]]
    if found.empty:
        return f"{size} None is massive by the usual rule (above 100 and 1,000 times the median)."
    first = (found["position"] == 0).mean()
    dims = found["dim"].value_counts().index[:3]
    return (
        f"{size} Massive activations (above 100 and above 1,000 times the median) follow "
        f"{found['layer'].nunique()} of {len(table)} layers, {percent(first)} of them at the first "
        f"token, in {counted(found['dim'].nunique(), 'dimension')} (first: {listed(dims)})."
    )


def massive_figure(table: pd.DataFrame) -> Figure:
    layers = [*table["layer"], *table["layer"]]
    values = [*table["largest"], *table["median"]]
    series = ["largest"] * len(table) + ["median"] * len(table)
    plot = figures.profile(
        layers, values, series=series, x_title="after layer", y_title="|activation|", log=True
    )
    return Figure(
        "sinks-massive",
        "The largest activation of the residual stream after each layer, and the median",
        plot.update_layout(width=760, height=340),
        table,
        "Over all texts, logarithmic. A gap of a thousand times between the lines is what is "
        "called a massive activation.",
    )


def norms_sentence(sinks: Sinks) -> str:
    """Are the first token's values small in the heads that look at it?"""
    table = sinks.heads.table
    parked = table[table["score"] > sinks.rule.epsilon]
    every = f"the first token's value vectors are {number(table['value_norm'].median())} times"
    if len(parked) < 3:
        return f"Over all heads {every} as long as the median token's (median over heads)."
    here = parked["value_norm"].median()
    reading = (
        "such heads write little when they look there"
        if here < 0.67
        else "such heads do write something when they look there"
    )
    return (
        f"Over all heads {every} as long as the median token's; over the {len(parked)} heads that "
        f"park their attention on it, {number(here)} times: {reading}."
    )


def norms_figure(sinks: Sinks) -> Figure:
    table = sinks.heads.table
    plot = figures.scatter(
        table["score"],
        table["value_norm"],
        labels=[str(head) for head in sinks.heads.heads],
        x_title="attention that the first token receives",
        y_title="its value norm / median",
    )
    line = {"color": figures.FAINT, "dash": "dot"}
    plot.add_hline(1.0, line=line).update_yaxes(rangemode="tozero").update_layout(width=620)
    assert isinstance(plot, go.Figure)
    return Figure(
        "sinks-values",
        "Value norm of the first token against the attention that it receives; a point is a head",
        plot,
        table,
        "Below the line the first token's values are shorter than the median token's. Heads that "
        "share a key-value head share the norm.",
    )
