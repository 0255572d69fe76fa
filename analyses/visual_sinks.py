"""Do images have attention sinks, does anybody need them, and does moving their attention help?

    python analyses/visual_sinks.py shapes-llava --out runs/visual-sinks-study

After Kang et al. 2025 (arXiv 2503.03321), on scenes whose objects are known:

1. Which coordinates of the residual stream are huge at the first token? Which tokens of the image
   are sinks by them, what attention do they get, what do they contribute? The control: as many
   random coordinates. Do sinks lie in the background, and how many of all patches do?
2. Hiding the image's sinks from text, against hiding as many random other tokens of the image that
   get attention, as many of the background, and the most attended of the others: accuracy on
   questions, CHAIR and recall of captions. (The same tokens in all layers.)
3. VAR against what it should beat: all heads in place of image-centric ones, as many random heads,
   random tokens in place of sinks, only the image's sinks, only the text's.

Differences are paired by prompt. A run that was killed goes on in step 1.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

import interp
from interp import figures, metrics
from interp.analysis.visual_sinks import VisualSinks, visual_sinks
from interp.evaluation import Comparison, evaluate
from interp.intervention.hide import HideTokens
from interp.intervention.var import VAR
from interp.metrics.measured import Measured
from interp.model.hooked import HookedModel
from interp.model.image_grid import Grid, grid_of
from interp.model.images import images_of
from interp.tasks.prompts import from_examples, spans_of
from telling import finish, keep, show

QUESTIONS = ("exists", "color", "count")


def main() -> None:
    args = arguments()
    model = interp.load(args.model, dtype=args.dtype)
    args.out.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    about = {"bias": args.bias}
    questions = interp.tasks.scenes(model, args.n, args.seed, questions=QUESTIONS, **about)
    captions = interp.tasks.scenes(model, args.n, args.seed + 1, questions=("caption",), **about)

    show("1. Which tokens of the image are sinks?")
    found = visual_sinks(
        model, questions, dimensions=args.dimensions, tau=args.tau, batch_size=args.batch_size,
        out=args.out / "sinks",
    )  # fmt: skip
    if found.candidates is not None:
        keep(found.candidates.table.head(8), args.out / "dimensions.parquet")
    keep(found.layers, args.out / "layers.parquet")
    found.tokens.to_parquet(args.out / "tokens.parquet", index=False)
    found.plot().write_html(args.out / "phi.html")
    found.heads.plot(title="Share of image-centric rows").write_html(args.out / "heads.html")
    said += said_of(found, model, questions)

    show("2. Hiding tokens of the image from text")
    written = visual_sinks(
        model, captions, dimensions=found.dimensions, tau=found.tau, batch_size=args.batch_size,
        out=args.out / "sinks-captions",
    )  # fmt: skip
    parts = []
    for how in HIDDEN if found.dimensions else HIDDEN[1:]:
        hidden = [
            hide(model, prompts, sinks, how, args)
            for prompts, sinks in ((questions, found), (captions, written))
        ]
        parts.append((how, [HideTokens()], *hidden))
    said += compared(model, [("as it is", [], questions, captions), *parts], args, "hidden")

    show("3. VAR")
    edits = edits_of(found, model, args)
    if edits:
        conditions = [("as it is", []), *edits.items()]
        parts = [(name, edit, questions, captions) for name, edit in conditions]
        said += compared(model, parts, args, "var")
    else:
        said.append("VAR: there are no sink dimensions, so there is nothing that it could move")
    finish(said, args.out)


# 1. What is there


def said_of(found: VisualSinks, model: HookedModel, prompts: Dataset) -> list[str]:
    if not found.dimensions:
        return [f"no sink dimensions{nearest(found)}, so no token of an image is a sink"]
    table = found.layers
    most = table.loc[table["image_sinks"].idxmax()]
    said = [
        f"sink dimensions {list(found.dimensions)} at tau {found.tau:.2f}; the first token has a "
        f"phi of {table['phi_first'].max():.1f} at most (layer "
        f"{int(table.loc[table['phi_first'].idxmax(), 'layer'])})",
        f"image sinks a prompt, most in layer {int(most['layer'])}: {most['image_sinks']:.2f} "
        f"({most['share_of_image']:.1%} of its tokens) with {most['share_of_mass']:.1%} of what "
        f"the image gets; as many random coordinates call {most['random_dims']:.2f} tokens sinks",
    ]
    if most["image_sinks"] > 0:
        said.append(
            f"there a sink contributes {most['contribution']:.4f}, another token of the image "
            f"{most['contribution_others']:.4f} (mean |a v W_O|)"
        )
        said.append(background(found, model, prompts))
    return said


def nearest(found: VisualSinks) -> str:
    if found.candidates is None:
        return ""
    first = found.candidates.table.iloc[0]
    return (
        f" (coordinate {int(first['dimension'])} is above tau = {found.tau:.2f} at the first token "
        f"in {first['share']:.0%} of prompts and layers, and at {first['elsewhere']:.0%} of the "
        "other tokens)"
    )


def background(found: VisualSinks, model: HookedModel, prompts: Dataset) -> str:
    """Which share of the sinks lies outside of all objects, and which of all patches does."""
    sinks, every = [], []
    for n in range(len(prompts)):
        outside = outside_boxes(model, prompts, n)
        start, end = prompts[n]["spans"]["image"]
        every += outside
        sinks += [outside[at - start] for at in found.positions(n) if at < end]
    if not sinks:
        return "no image token is a sink in any layer"
    return (
        f"{np.mean(sinks):.1%} of the image's sinks lie outside of objects, of all patches "
        f"{np.mean(every):.1%} do ({len(sinks)} sinks, {len(prompts)} images)"
    )


def outside_boxes(model: HookedModel, prompts: Dataset, n: int) -> list[bool]:
    """Of each of the image's tokens: does its patch touch no object?"""
    row = prompts[n]
    start, end = row["spans"]["image"]
    grid = grid_of(model, row["image"].size, end - start)
    inside = np.zeros((grid.height, grid.width), dtype=bool)
    for box in row["boxes"]:
        mark_box(inside, grid, box)
    return (~inside).reshape(-1).tolist()


def mark_box(inside: np.ndarray, grid: Grid, box) -> None:
    left, top, right, bottom = grid.within(box)
    rows = slice(max(0, int(top * grid.height)), int(np.ceil(bottom * grid.height)))
    columns = slice(max(0, int(left * grid.width)), int(np.ceil(right * grid.width)))
    inside[rows, columns] = True


# 2. What is hidden

HIDDEN = ("sinks", "random attended", "random background", "most attended")


def hide(model: HookedModel, prompts: Dataset, found: VisualSinks, how: str, args) -> Dataset:
    """The prompts with spans `hidden_1`, ... on as many tokens as their images have sinks.

    Where a prompt has no sink, one token is hidden in its place (and none as a sink).
    """
    image = found.tokens[found.tokens["image"]]
    received = image.groupby(["prompt", "position"])["received"].mean()
    rows: list[dict[str, Any]] = []
    shown = images_of(prompts) or []
    spans = spans_of(prompts) or []
    for n, row in enumerate(prompts.remove_columns("image")):
        sinks = found.positions(n)
        others = received.loc[n].drop(sinks)
        outside = outside_boxes(model, prompts, n)
        start = spans[n]["image"][0]
        count = max(1, len(sinks))
        rng = random.Random(f"{how} {args.seed} {n}")
        pools = {
            "random attended": others[others >= others.median()].index.tolist(),
            "random background": [at for at in others.index if outside[at - start]],
        }
        if how == "sinks":
            chosen = sinks
        elif how == "most attended":
            chosen = others.nlargest(count).index.tolist()
        else:
            chosen = rng.sample(pools[how], min(count, len(pools[how])))
        own = spans[n] | {f"hidden_{k}": [at, at + 1] for k, at in enumerate(chosen)}
        rows.append(dict(row) | {"spans": own, "image": shown[n]})
    return from_examples(model, rows, task="hidden", parameters={"how": how})


# 3. What is moved


def edits_of(found: VisualSinks, model: HookedModel, args) -> dict[str, list]:
    if not found.dimensions:
        return {}
    layers = "2:-1" if len(model.blocks) > 3 else ":"
    common = {"layers": layers, "tau": found.tau, "moved": args.moved, "seed": args.seed}
    # where no token of the image is a sink, those of the text are the whole budget
    common["require_visual_sink"] = bool(found.layers["image_sinks"].max() > 0)
    variants: dict[str, dict[str, Any]] = {
        "VAR": {},
        "all heads": {"choose": "all"},
        "as many random heads": {"choose": "random"},
        "random tokens for sinks": {"sinks": "random"},
        "the image's sinks only": {"donors": "image"},
        "the text's sinks only": {"donors": "text"},
    }
    return {name: [VAR(found.dimensions, **common | more)] for name, more in variants.items()}


# Measuring


def compared(model: HookedModel, parts: list, args, name: str) -> list[str]:
    """Accuracy on questions, CHAIR and recall of captions, under each condition."""
    answered, described = {}, {}
    for condition, edit, questions, captions in parts:
        with model.intervene(edit):
            answered[condition] = evaluate(
                model, questions, batch_size=args.batch_size, progress=False
            )
            described[condition] = captions_of(model, captions, args)
        print(f"{condition}: {answered[condition]!r}; {described[condition]!r}", flush=True)
    comparison = Comparison(answered)
    chairs: dict[str, Measured] = described
    table = pd.concat([comparison.table, metrics.table_of(chairs)], ignore_index=True)
    changes = pd.concat([comparison.differences, metrics.differences(chairs)], ignore_index=True)
    table.to_parquet(args.out / f"{name}.parquet", index=False)
    changes.to_parquet(args.out / f"{name}-changes.parquet", index=False)
    shown = table[table["metric"].isin(["accuracy", "chair_s", "chair_i", "recall"])]
    figures.conditions(shown).write_html(args.out / f"{name}.html")
    return [sentence(condition, changes) for condition in list(answered)[1:]]


def captions_of(model: HookedModel, prompts: Dataset, args) -> metrics.Chair:
    written = evaluate(model, prompts, generate=True, batch_size=args.batch_size, progress=False)
    return metrics.chair(
        list(written.table["generated"]), list(prompts["objects"]), metrics.scenes()
    )


def sentence(condition: str, changes: pd.DataFrame) -> str:
    rows = changes[changes["condition"] == condition].set_index("metric")
    named = {"accuracy": "accuracy", "loss": "loss", "chair_i": "CHAIR_i", "recall": "recall"}
    parts = [
        f"{said} {rows.loc[metric, 'value']:+.3f} ({rows.loc[metric, 'low']:+.3f} to "
        f"{rows.loc[metric, 'high']:+.3f})"
        for metric, said in named.items()
        if metric in rows.index
    ]
    return f"{condition}: {', '.join(parts)}"


# Keeping


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="shapes-llava")
    parser.add_argument("--out", type=Path, default=Path("runs/visual-sinks-study"))
    parser.add_argument("--n", type=int, default=96, help="questions, and as many captions")
    parser.add_argument("--bias", default="broken", help="of the scenes: broken, even, training")
    parser.add_argument(
        "--dimensions", type=int, nargs="+", default=None, help="by hand, where none is found"
    )
    parser.add_argument("--tau", type=float, default=None, help="default: by the model's width")
    parser.add_argument("--moved", type=float, default=0.6, help="share of sinks' mass that moves")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
