"""The report's sections on vision: what the model sees and makes up, and which heads look."""

from dataclasses import dataclass
from warnings import catch_warnings, simplefilter

import numpy as np
import pandas as pd
from datasets import Dataset

from interp.analysis.image_attention import ImageAttention, image_attention
from interp.analysis.image_maps import ImageMaps, gradient_attention
from interp.analysis.vision_heads import VisionHeads, vision_head_divergence
from interp.analysis.visual_sinks import VisualSinks, visual_sinks
from interp.evaluation import Evaluation, evaluate
from interp.heads import Head
from interp.metrics.chair import Chair, chair
from interp.metrics.vocabulary import scenes
from interp.model.hooked import HookedModel
from interp.report.page import Figure, Section, Table
from interp.report.plan import Plan
from interp.report.stages import Part, Stages
from interp.report.words import counted, interval, listed, number, percent
from interp.tasks.prompts import describe
from interp.tasks.scenes import QUESTIONS

VISION = ("captions", "image attention", "visual sinks", "maps")
CAPTION_TOKENS = 48
SHOWN = 12  # heads in the table
KINDS = {"exists": "is there ...?", "color": "which colour?", "count": "how many?"}


@dataclass(frozen=True, eq=False)
class Seen:
    """What was measured on pictures."""

    scenes: Dataset
    heads: VisionHeads
    captions: Chair
    answers: Evaluation
    attention: ImageAttention
    sinks: VisualSinks
    asked: Dataset
    maps: ImageMaps


def vision(model: HookedModel, plan: Plan, stages: Stages) -> Part:
    """All that a report says of a model that sees images."""
    options = {"batch_size": plan.batch_size, **stages.options}
    prompts, questions = plan.scenes(model), plan.questions(model)
    out = stages.begin(
        "captions", f"{counted(len(prompts), 'picture')} described, with and without"
    )
    heads = vision_head_divergence(
        model, prompts, max_new_tokens=CAPTION_TOKENS, out=out, **options
    )
    answers = evaluate(model, questions, batch_size=plan.batch_size, progress=stages.progress)
    out = stages.begin("image attention", "the share of each head on the picture")
    looked = image_attention(model, prompts, out=out, **options)
    out = stages.begin("visual sinks", "tokens of the picture that all text looks at")
    with catch_warnings():
        simplefilter("ignore", UserWarning)  # that there are none, the page says
        sinks = visual_sinks(model, prompts, out=out, **options)
    found = chair(heads.captions, prompts["objects"][:], scenes())
    stages.begin("maps", "where it looks when asked for a colour")
    asked = questions.select([i for i, kind in enumerate(questions["kind"]) if kind == "color"])
    maps = gradient_attention(model, asked, batch_size=plan.batch_size, progress=stages.progress)
    seen = Seen(prompts, heads, found, answers, looked, sinks, asked, maps)
    described = {"pictures": describe(prompts), "questions": describe(questions)}
    counts = {"vision heads": [str(head) for head in most_moved(heads)]}
    return Part([said_section(seen), looking_section(seen)], described, counts)


def most_moved(found: VisionHeads) -> list[Head]:
    """The heads that the tables list."""
    return found.heads.top(min(SHOWN, len(found.heads)))


# What it says


def said_section(seen: Seen) -> Section:
    """Captions and answers, against what the pictures show."""
    rates = seen.captions.summary().set_index("metric")
    return Section(
        "pictures",
        "What does it see, and what does it make up?",
        f"{named(rates)} {answered(seen.answers)}",
        [set_up(seen), captions_table(seen), rates_table(rates), answers_table(seen.answers)],
    )


def named(rates: pd.DataFrame) -> str:
    """What captions name."""
    wrong, recall = rates.loc["chair_i"], rates.loc["recall"]
    if np.isnan(wrong["value"]):
        return "Its captions name no object at all."
    return (
        f"{percent(wrong['value'])} {interval(wrong['low'], wrong['high'])} of the objects that "
        "its captions name are not in the picture as named, and they name "
        f"{percent(recall['value'])} {interval(recall['low'], recall['high'])} of those that are."
    )


def answered(answers: Evaluation) -> str:
    """How many questions are answered."""
    row = answers.summary().set_index("metric").loc["accuracy"]
    return (
        f"It answers {percent(row['value'])} {interval(row['low'], row['high'])} of "
        f"{len(answers.table)} questions about others."
    )


def set_up(seen: Seen) -> str:
    """What was shown."""
    return (
        f"{counted(len(seen.scenes), 'picture')} of one to three coloured shapes, all objects "
        "equally often; an object is a colour and a shape, and a caption that gives one of the two "
        "wrong names an object that is not there. Captions are written greedily, at most "
        f"{CAPTION_TOKENS} tokens. A question counts as answered where each token of the right "
        "answer is the likeliest."
    )


def captions_table(seen: Seen) -> Table:
    """The first few captions beside what is there."""
    table = pd.DataFrame({"caption": seen.heads.captions, "objects": seen.scenes["objects"][:]})
    shown = table.head(6).assign(
        objects=[", ".join(objects) for objects in table["objects"].head(6)],
        wrong=[", ".join(words) or "–" for words in seen.captions.table["hallucinated"].head(6)],
    )
    columns = {"caption": "caption", "objects": "what is there", "wrong": "not there as named"}
    return Table("captions", "Some captions", table, shown.rename(columns=columns))


def rates_table(rates: pd.DataFrame) -> Table:
    names = {
        "chair_s": "captions that name something wrong",
        "chair_i": "of all mentions, wrong",
        "chair_i_set": "of all objects named, wrong",
        "recall": "of the objects there, named",
        "words": "words a caption",
        "distinct": "distinct word groups of four",
    }
    rows = rates.loc[list(names)]
    shown = pd.DataFrame(
        {
            "": list(names.values()),
            "value": [number(v) for v in rows["value"]],
            "95 %": [interval(r.low, r.high) for r in rows.itertuples()],
        }
    )
    how = (
        "The first three are CHAIR. A caption that says less is wrong less often: read them with "
        "recall and length."
    )
    return Table("chair", "Hallucination in captions", rates.reset_index(), shown, how)


def answers_table(answers: Evaluation) -> Table:
    by_kind = answers.by("kind").query("metric == 'accuracy'").reset_index(drop=True)
    shown = pd.DataFrame(
        {
            "question": [KINDS[kind] for kind in by_kind["kind"]],
            "right": [percent(v) for v in by_kind["value"]],
            "95 %": [interval(r.low, r.high) for r in by_kind.itertuples()],
            "of": by_kind["n"],
        }
    )
    return Table("answers", "Questions about pictures", by_kind, shown)


# Which heads look


def looking_section(seen: Seen) -> Section:
    """Attention on the image, divergence without it, and sinks among its tokens."""
    return Section(
        "vision-heads",
        "Which heads look at the picture?",
        f"{looking(seen)} {changing(seen)} {sinking(seen.sinks)}",
        [
            how_measured(seen),
            Figure(
                "image-attention",
                "Share of attention on the picture while a caption is written, by layer and head",
                seen.attention.heads.plot(title="", colorbar="share", limits=(0.0, 1.0)),
                seen.attention.heads.table,
                "Mean over the rows that predict the caption's tokens, and over pictures.",
            ),
            Figure(
                "divergence",
                "How far a head's output moves when the picture is taken away",
                seen.heads.heads.plot(title="", colorbar="VHD"),
                seen.heads.heads.table,
                "Vision-aware head divergence: the Euclidean distance of the head's outputs at the "
                "tokens that predict the caption. Later layers have longer outputs: compare heads "
                "within a layer, or by the relative distance in the table.",
            ),
            heads_table(seen),
            *sink_parts(seen.sinks),
            pointing(seen),
            overlay(seen),
        ],
    )


def looking(seen: Seen) -> str:
    """How much attention goes to the picture."""
    heads, steps = seen.attention.heads, seen.attention.steps
    share, even = heads.table["score"].mean(), steps["uniform"].mean()
    many = int((heads.table["score"] > 0.5).sum())
    return (
        f"While captions are written {percent(share)} of all attention is on the picture (looking "
        f"at everything alike would put {percent(even)} there), and {counted(many, 'head')} of "
        f"{len(heads)} {'spends' if many == 1 else 'spend'} more than half of theirs on it."
    )


def changing(seen: Seen) -> str:
    """Which heads change most without it."""
    heads = seen.heads.heads
    scores = np.sort(heads.table["score"].to_numpy())[::-1]
    few = max(1, round(0.1 * len(scores)))
    top = [f"{head} ({number(heads[head]['score'])})" for head in heads.top(3)]
    return (
        f"Without the picture the outputs of {listed(top)} move most; the top tenth of all heads "
        f"makes up {percent(scores[:few].sum() / scores.sum())} of all that moves."
    )


def sinking(sinks: VisualSinks) -> str:
    """Are some of the picture's tokens sinks?"""
    if not sinks.dimensions:
        return "No coordinate of its residual stream marks sinks, so none of its tokens is one."
    most = sinks.layers.loc[sinks.layers["image_sinks"].idxmax()]
    if not most["image_sinks"]:
        return "None of the picture's tokens is a sink."
    return (
        f"At most (layer {int(most['layer'])}) {number(most['image_sinks'], 1)} of the picture's "
        f"tokens are sinks, with {percent(most['share_of_mass'])} of what the picture gets."
    )


def how_measured(seen: Seen) -> str:
    return (
        "The share of attention was measured while the true captions are read, the distance while "
        "the model's own are: the same prompt and caption once with the picture and once without "
        "it. A part of that distance is the request to describe nothing, and that all text moves "
        "closer together; `interp score vhd --masked` is the control."
    )


def heads_table(seen: Seen) -> Table:
    """The heads that change most, and whether they look."""
    heads, looked = seen.heads.heads, seen.attention.heads
    top = most_moved(seen.heads)
    rows = [heads[head] for head in top]
    shown = pd.DataFrame(
        {
            "head": [str(head) for head in top],
            "VHD": [number(row["score"]) for row in rows],
            "relative": [number(row["relative"]) for row in rows],
            "on the picture": [percent(looked[head]["score"]) for head in top],
        }
    )
    rank = heads.correlation(looked)
    how = f"Over all heads the two measures agree with a rank correlation of {number(rank)}."
    return Table("vision-heads", f"The {len(top)} heads that move most", heads.table, shown, how)


def sink_parts(sinks: VisualSinks) -> list[str | Figure | Table]:
    """The sizes that make a sink, layer by layer; nothing where no coordinate marks any."""
    if not sinks.dimensions:
        return []
    dims = listed([f"dimension {d}" for d in sinks.dimensions])
    return [
        Figure(
            "visual-sinks",
            "Size of the coordinates that mark sinks",
            sinks.plot(title="").update_layout(width=760, height=360),
            sinks.layers,
            f"{dims[0].upper()}{dims[1:]} of what enters each block, over its root mean square. "
            f"A token above tau ({number(sinks.tau)}) is a sink. As many random coordinates would "
            f"call {number(sinks.layers['random_dims'].max(), 1)} tokens sinks at most.",
        )
    ]


# Where it looks


def box_asked_for(row: dict) -> list[float]:
    """Where the shape is whose colour is asked for: the only one of its kind in the picture."""
    shapes = [name.split()[-1] for name in row["objects"]]
    return row["boxes"][shapes.index(row["target"])]


def pointing(seen: Seen) -> str:
    """Do the maps point at what is asked for?"""
    boxes = [box_asked_for(row) for row in seen.asked]
    ratios = seen.maps.attention_ratio(boxes)
    by_layer = ratios.groupby("layer")["ratio"].mean()
    best = by_layer.idxmax()
    return (
        f"Asked for a colour ({counted(len(boxes), 'question')}), the shape in question has "
        f"{number(ratios['ratio'].mean())} times the gradient-weighted attention of a place of its "
        f"size anywhere in the picture, mean over layers (1 by chance). In layer {best}, the best "
        f"of {len(by_layer)} on these very questions, it has {number(by_layer[best])} times."
    )


def overlay(seen: Seen) -> Figure:
    """The map of one question over its picture."""
    row = seen.asked[0]
    values = seen.maps.map(0)
    table = pd.DataFrame(values).rename(columns=str).rename_axis("row").reset_index()
    question = QUESTIONS["color"].format(target=row["target"])
    return Figure(
        "overlay",
        f"Where it looks: “{question}”, answer “{row['answer'].strip()}”",
        seen.maps.plot(seen.asked, 0, boxes=[box_asked_for(row)], title=""),
        table,
        "Attention of the token that answers, weighted by how much it speaks for the answer, mean "
        "over heads and layers; outlined is the shape that is asked for.",
    )
