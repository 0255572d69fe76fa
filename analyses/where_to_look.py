"""Does the model look at what it is asked about, and does a closer look there help?

    python analyses/where_to_look.py shapes-llava --out runs/where-to-look

After Zhang et al. 2025 (arXiv 2502.17422), on scenes in which a dot on one shape is asked for:

1. Attention ratio by layer: how much of the map lies in the box of the shape that is asked about,
   over all boxes of that size (1 by chance). Relative attention and gradient-weighted attention,
   each against its patches shuffled, and against the box of another question's scene; for right and
   wrong answers apart. The input gradient has one map.
2. ViCrop: accuracy with a second image cut out where the map is strongest, against no second image,
   a random square of that size, one from the middle, one around the true box, and the whole image
   again. The layers of the map are chosen on other scenes. Differences are paired by prompt.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset

import interp
from interp import figures
from interp.analysis.image_maps import (
    ImageMaps,
    gradient_attention,
    input_gradient,
    relative_attention,
)
from interp.evaluation import Comparison, Evaluation, evaluate
from interp.intervention.vicrop import ViCrop
from interp.model.hooked import HookedModel
from interp.model.images import images_of
from interp.tasks.prompts import from_examples, spans_of
from telling import finish, show

MAPS = {"relative attention": relative_attention, "gradient attention": gradient_attention}


def main() -> None:
    args = arguments()
    model = interp.load(args.model, dtype=args.dtype)
    args.out.mkdir(parents=True, exist_ok=True)
    chosen_on, tested_on = (details(model, args, seed) for seed in (args.seed + 1, args.seed))
    said: list[str] = []

    show("1. Where does it look?")
    right = evaluate(model, tested_on, batch_size=args.batch_size, progress=False)
    print(right)
    ratios, best = [], {}
    for name, look in MAPS.items():
        about = {"batch_size": args.batch_size}
        if look is relative_attention:
            about["general"] = args.general
        maps = look(model, tested_on, **about)
        table = ratios_of(maps, tested_on, args).assign(map=name)
        ratios.append(table.merge(correct(right), on="prompt"))
        other = look(model, chosen_on, **about)
        best[name] = best_layer(other.attention_ratio(chosen_on["box"]))
        said.append(said_of(name, ratios[-1], best[name]))
        for n in range(min(args.drawn, len(tested_on))):
            figure = maps.plot(tested_on, n, best[name], boxes=[tested_on[n]["box"]])
            figure.write_html(args.out / f"{name.replace(' ', '-')}-{n}.html")
    maps = input_gradient(model, tested_on, general=args.general, batch_size=args.batch_size)
    table = ratios_of(maps, tested_on, args).assign(map="input gradient")
    ratios.append(table.merge(correct(right), on="prompt"))
    said.append(said_of("input gradient", ratios[-1], 0))
    whole = pd.concat(ratios, ignore_index=True)
    whole.to_parquet(args.out / "ratios.parquet", index=False)
    for name in MAPS:
        by_layer(whole[whole["map"] == name], name).write_html(
            args.out / f"ratio-{name.replace(' ', '-')}.html"
        )

    show("2. A second, closer look")
    if args.side is None:
        args.side = round(0.4 * args.size)
    comparison = looked_twice(model, tested_on, best["relative attention"], right, args)
    comparison.table.to_parquet(args.out / "vicrop.parquet", index=False)
    comparison.differences.to_parquet(args.out / "vicrop-changes.parquet", index=False)
    comparison.plot().write_html(args.out / "vicrop.html")
    print(comparison.table.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    said += changes_said(comparison)
    finish(said, args.out)


# Prompts


def details(model: HookedModel, args, seed: int) -> Dataset:
    """Questions about the dot on a shape, with that shape's box, in large pictures."""
    prompts = interp.tasks.scenes(
        model, args.n, seed, questions=("detail",), bias=args.bias, size=args.size
    )
    rows = [
        dict(row) | {"spans": spans, "image": image, "box": box_of(row)}
        for row, spans, image in zip(
            prompts.remove_columns("image"), spans_of(prompts) or [], images_of(prompts) or [],
            strict=True,
        )
    ]  # fmt: skip
    return from_examples(model, rows, task="scenes", parameters={"seed": seed, "n": args.n})


def box_of(row: dict) -> list[float]:
    """Where the shape is that is asked about."""
    return row["boxes"][row["objects"].index(row["target"])]


# 1. Where it looks


def ratios_of(maps: ImageMaps, prompts: Dataset, args) -> pd.DataFrame:
    """`prompt, layer, ratio`; the controls: `shuffled` patches, and an `other` prompt's box."""
    boxes = prompts["box"]
    rng = np.random.default_rng(args.seed)
    mixed = []
    for values in maps.maps:
        flat = values.reshape(len(values), -1)
        mixed.append(flat[:, rng.permutation(flat.shape[1])].reshape(values.shape))
    shuffled = ImageMaps(mixed, maps.layers, maps.grids, maps.metadata)
    table = maps.attention_ratio(boxes)
    table["shuffled"] = shuffled.attention_ratio(boxes)["ratio"]
    table["other"] = maps.attention_ratio([*boxes[1:], boxes[0]])["ratio"]
    return table


def correct(evaluation: Evaluation) -> pd.DataFrame:
    right = evaluation.table["correct"].to_numpy(bool)
    return pd.DataFrame({"prompt": np.arange(len(right)), "correct": right})


def best_layer(ratios: pd.DataFrame) -> int:
    return int(ratios.groupby("layer")["ratio"].mean().idxmax())


def said_of(name: str, table: pd.DataFrame, layer: int) -> str:
    rows = table[table["layer"] == layer]
    parts = [
        f"{name}, layer {layer} (chosen on other scenes): attention ratio "
        f"{interval(rows['ratio'])}, patches shuffled {interval(rows['shuffled'])}, another "
        f"scene's box {interval(rows['other'])}"
    ]
    for label, right in (("right", True), ("wrong", False)):
        own = rows[rows["correct"] == right]["ratio"]
        if len(own) > 1:
            parts.append(f"{label} answers {interval(own)} (n = {len(own)})")
    return "; ".join(parts)


def interval(values: pd.Series) -> str:
    """The mean and its bootstrap interval."""
    values_ = values.dropna().to_numpy(float)
    if not len(values_):
        return "none"
    low, high = np.quantile(resampled(values_), [0.025, 0.975])
    return f"{values_.mean():.2f} ({low:.2f} to {high:.2f})"


def resampled(values: np.ndarray) -> np.ndarray:
    draws = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    return values[draws].mean(1)


def by_layer(table: pd.DataFrame, name: str):
    """A line each for the map and its controls."""
    rows = []
    for column, said in (("ratio", name), ("shuffled", "shuffled"), ("other", "another box")):
        for layer, own in table.groupby("layer")[column]:
            values = own.dropna().to_numpy(float)
            low, high = np.quantile(resampled(values), [0.025, 0.975])
            rows.append((layer, values.mean(), low, high, said))
    found = pd.DataFrame(rows, columns=["layer", "value", "low", "high", "series"])
    return figures.profile(
        found["layer"], found["value"], low=found["low"], high=found["high"],
        series=found["series"], x_title="layer", y_title="attention ratio",
    )  # fmt: skip


# 2. The closer look


def looked_twice(
    model: HookedModel, prompts: Dataset, layer: int, plain: Evaluation, args
) -> Comparison:
    settings = {"side": args.side, "seed": args.seed, "general": args.general}
    on_map = {"layers": [layer], **settings}
    conditions = {
        "relative attention": ViCrop("relative_attention", **on_map),
        "relative attention, all layers": ViCrop("relative_attention", **settings),
        "gradient attention": ViCrop("gradient_attention", **on_map),
        "input gradient": ViCrop("input_gradient", **settings),
        "random square": ViCrop("relative_attention", where="random", **on_map),
        "middle": ViCrop("relative_attention", where="center", **on_map),
        "true box": ViCrop(where="given", **settings),
        "whole image again": ViCrop(side=10 * args.size),
    }
    found = {"one image": plain}
    for name, edit in conditions.items():
        with model.intervene(edit):
            found[name] = evaluate(model, prompts, batch_size=args.batch_size, progress=False)
        print(f"{name}: {found[name]!r}", flush=True)
    return Comparison(found)


def changes_said(comparison: Comparison) -> list[str]:
    table = comparison.table[comparison.table["metric"] == "accuracy"].set_index("condition")
    changes = comparison.differences
    said = [
        f"one image: {table.loc['one image', 'value']:.3f} right "
        f"({table.loc['one image', 'low']:.3f} to {table.loc['one image', 'high']:.3f})"
    ]
    for row in changes[changes["metric"] == "accuracy"].itertuples():
        said.append(
            f"{row.condition}: {table.loc[row.condition, 'value']:.3f} right, a change of "
            f"{row.value:+.3f} ({row.low:+.3f} to {row.high:+.3f})"
        )
    return said


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="shapes-llava", help="trained on two images")
    parser.add_argument("--out", type=Path, default=Path("runs/where-to-look"))
    parser.add_argument("--n", type=int, default=96, help="questions about details")
    parser.add_argument("--size", type=int, default=192, help="pixels of the pictures' sides")
    parser.add_argument("--side", type=int, default=None, help="of a crop; default 0.4 of --size")
    parser.add_argument("--bias", default="even", help="of the scenes: broken, even, training")
    parser.add_argument("--general", default="Describe the image.", help="the general prompt")
    parser.add_argument("--drawn", type=int, default=4, help="maps drawn over their images")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
