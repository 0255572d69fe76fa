"""Which heads of a vision transformer matter, how far do they look, and what do they draw?

    python analyses/vit_heads.py digits-vit --out runs/vit-heads

After Li et al. 2023 (arXiv 2303.13731), on handwritten digits. Heads are chosen on validation
images and pruned on test images:

1. How well are digits read?
2. Importance by pruning one head at a time, six measures. Do they agree, with each other and on the
   two halves of the images? Does pruning to the mean rank heads as pruning to zero does?
3. What does pruning the most and the least important heads do to accuracy, against as many random
   heads of the same layers? Intervals are paired by image; p is the rank among the draws.
4. All heads, one after the other: in falling and rising order, by the first-order estimate, at
   random. (Areas between the curves.)
5. Hop profiles and the atlas of patterns; the same for a blank image, for shuffled pixels, and for
   random weights: what of it is learned, and what depends on what is seen?
6. Does where a head looks tell how much it matters, beyond the layer it is in?
7. Which part of each head's attention matters?
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset

import interp
from interp import figures, tasks
from interp.analysis.vit.atlas import hop_profile, pattern_atlas
from interp.analysis.vit.classify import classify
from interp.analysis.vit.parts import prune_parts
from interp.analysis.vit.patterns import look_at_patterns
from interp.analysis.vit_heads import Pruning, prune_heads
from interp.evaluation import Comparison, Evaluation
from interp.heads import Head, HeadScores
from interp.model.hooked import HookedModel
from interp.model.pictures import Pictures
from telling import keep, show, shown

WHERE = ["mean_hop", "near", "on_special", "key_share", "spread"]


def main() -> None:
    args = arguments()
    model = interp.load(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    chosen_on = tasks.digits("validation", args.n_choose)
    tested_on = tasks.digits("test", args.n_test)

    show("1. Accuracy")
    read = {"validation": chosen_on, "test": tested_on}
    done = {name: classify(model, images, progress=False) for name, images in read.items()}
    keep(Comparison(done).table, args.out / "accuracy.parquet")

    show("2. Importance (validation images)")
    pruned = prune_heads(model, chosen_on, batch_size=32, progress=False)
    mean = prune_heads(model, chosen_on, value="mean", batch_size=32, progress=False)
    scores = interp.vit_heads(model, chosen_on, score=args.score, batch_size=32, progress=False)
    scores.save(args.out / "heads.parquet")
    columns = ["layer", "head", *pruned.measures, "changed", "layer_drop", "mean_hop", "kind"]
    print(shown(scores.table.sort_values("score", ascending=False)[columns].head(10)))
    print("\nSpearman between measures, all heads / mean of layers:")
    keep(agreement(pruned), args.out / "agreement.parquet")
    print("\nSpearman of two halves of the images, and of pruning to zero and to the mean:")
    keep(stability(pruned, mean), args.out / "stability.parquet")
    scores.plot(mark=scores.top(args.ks[-1])).write_html(args.out / "heads.html")

    show("3. Pruning the most and the least important (test images)")
    comparison, ranks = pruning(model, scores, tested_on, args)
    keep(ranks, args.out / "pruning.parquet", most=99)
    comparison.plot().write_html(args.out / "pruning.html")

    show("4. Heads pruned one after the other (test images)")
    curves = orders(model, scores, pruned, tested_on, args)
    keep(
        curves.groupby("order", sort=False)["accuracy"].agg(area="mean").reset_index(),
        args,
        "areas",
    )
    curves.to_parquet(args.out / "curves.parquet", index=False)
    plot_curves(curves).write_html(args.out / "curves.html")

    show("5. Where heads look")
    images = tested_on.select(range(min(args.n_patterns, len(tested_on))))
    atlas = pattern_atlas(model, images, progress=False)
    keep(by_layer(model, images, args.seed), args.out / "patterns.parquet")
    print("\nkinds:", atlas.table["kind"].value_counts().to_dict())
    atlas.table.to_parquet(args.out / "atlas.parquet", index=False)
    most = max(0.05, float(np.quantile(atlas.offsets, 0.999)))
    atlas.plot(mark=scores.top(args.ks[-1]), most=most).write_html(args.out / "atlas.html")
    atlas.plot_map().write_html(args.out / "atlas-map.html")
    hop_profile(model, images, progress=False).plot().write_html(args.out / "hops.html")

    show("6. Does where a head looks tell how much it matters, beyond its layer?")
    keep(explained(scores, args.seed), args.out / "explained.parquet")

    show("7. Parts of attention (test images): mean over heads of |drop| of each part, by layer")
    parts = prune_parts(model, images, batch_size=8, progress=False)
    parts.to_parquet(args.out / "parts.parquet", index=False)
    sizes = parts.assign(size=parts["drop"].abs()).groupby(["layer", "part"], sort=False)
    keep(sizes[["size", "mass"]].mean().reset_index(), args.out / "parts-by-layer.parquet")
    print(f"\ntables and figures: {args.out}")


def agreement(pruned: Pruning) -> pd.DataFrame:
    """Rank correlation of each two measures, over all heads and within layers (their mean)."""
    rows = []
    scores = {name: pruned.scores(name) for name in pruned.measures}
    for i, one in enumerate(pruned.measures):
        for other in pruned.measures[i + 1 :]:
            ours, theirs = (pd.DataFrame(scores[name].matrix) for name in (one, other))
            within = ours.T.corrwith(theirs.T, method="spearman").mean()
            overall = scores[one].correlation(scores[other])
            rows.append({"one": one, "other": other, "all": overall, "within": within})
    return pd.DataFrame(rows)


def stability(pruned: Pruning, mean: Pruning) -> pd.DataFrame:
    rows = []
    for name in pruned.measures:
        scores = pruned.scores(name)
        first, second = scores.halves(seed=0)
        rows.append({"measure": name, "halves": first.correlation(second)})
        if name != "taylor":  # an estimate of pruning to zero
            rows[-1]["zero_and_mean"] = scores.correlation(mean.scores(name))
    return pd.DataFrame(rows)


def pruning(
    model: HookedModel, scores: HeadScores, images: Dataset, args
) -> tuple[Comparison, pd.DataFrame]:
    """Accuracy without the first and last k heads, and without as many random ones."""
    lowest = HeadScores(scores.table.assign(score=-scores.table["score"]), scores.metadata)
    found: dict[str, Evaluation] = {"intact": without(model, [], images)}
    rows = []
    for k in args.ks:
        for name, ranked in (("most", scores), ("least", lowest)):
            condition = f"{name} important {k}"
            found[condition] = without(model, ranked.top(k), images)
            change = Comparison({"": found["intact"], condition: found[condition]}).differences
            change = change[change["metric"] == "accuracy"].iloc[0]
            row = {"heads": condition, "accuracy": found[condition].accuracy}
            row |= {"change": change["value"], "low": change["low"], "high": change["high"]}
            for match in ("layer", None):
                drawn = draws(model, ranked, k, match, images, args)
                if drawn is None:
                    continue
                worse = sum(a <= found[condition].accuracy for a in drawn)
                label = "same_layers" if match else "any_layer"
                row |= {
                    label: np.mean(drawn),
                    f"{label}_low": min(drawn),
                    f"{label}_high": max(drawn),
                }
                row |= {f"{label}_p": (1 + worse) / (1 + len(drawn))}
            rows.append(row)
    return Comparison(found), pd.DataFrame(rows)


def draws(
    model: HookedModel, ranked: HeadScores, k: int, match: str | None, images: Dataset, args
) -> list[float] | None:
    """Accuracy without k random heads, several times; None where a layer has too few others."""
    try:
        drawn = [ranked.random(k, seed=args.seed + n, match=match) for n in range(args.draws)]
    except ValueError:
        return None
    return [without(model, heads, images).accuracy for heads in drawn]


def without(model: HookedModel, heads: list[Head], images: Dataset) -> Evaluation:
    with model.intervene(interp.Ablate(heads)):
        return classify(model, images, progress=False)


def orders(
    model: HookedModel, scores: HeadScores, pruned: Pruning, images: Dataset, args
) -> pd.DataFrame:
    """Accuracy after each head that goes: `order, pruned, accuracy`."""
    falling, every = scores.top(len(scores)), scores.heads
    named = {"falling": falling, "rising": falling[::-1]}
    taylor = pruned.scores("taylor")
    named["taylor, rising"] = taylor.top(len(taylor))[::-1]
    for n in range(args.orders):
        drawn = np.random.default_rng([args.seed, n]).permutation(len(every))
        named[f"random {n}"] = [every[i] for i in drawn]
    rows = []
    for name, heads in named.items():
        for k in range(0, len(heads) + 1, args.step):
            accuracy = without(model, heads[:k], images).accuracy
            rows.append({"order": name, "pruned": k, "accuracy": accuracy})
    return pd.DataFrame(rows)


def plot_curves(curves: pd.DataFrame):
    random = curves["order"].str.startswith("random")
    by_size = curves[random].groupby("pruned")["accuracy"]
    mean = by_size.agg(["mean", "min", "max"]).reset_index()
    named = curves[~random]
    return figures.profile(
        np.concatenate([named["pruned"], mean["pruned"]]),
        np.concatenate([named["accuracy"], mean["mean"]]),
        low=np.concatenate([named["accuracy"], mean["min"]]),
        high=np.concatenate([named["accuracy"], mean["max"]]),
        series=[*named["order"], *["random (mean, range)"] * len(mean)],
        title="Accuracy as heads are pruned",
        x_title="heads pruned",
        y_title="accuracy",
    )


def by_layer(model: HookedModel, images: Dataset, seed: int) -> pd.DataFrame:
    """Means of each layer's heads: as it is, and under three controls."""
    pixels = Pictures.of(model, images).inputs(range(len(images)))["pixel_values"]
    generator = torch.Generator().manual_seed(seed)
    flat = pixels.flatten(2)
    order = torch.rand(len(flat), 1, flat.shape[2], generator=generator).argsort(-1)
    shuffled = flat.gather(2, order.expand_as(flat)).view_as(pixels)
    blank = pixels.min().expand_as(pixels[:1]).clone()
    torch.manual_seed(seed)
    untrained = interp.load(type(model.original_model)(model.original_model.config))
    untrained.eval()
    seen = {
        "digits": look_at_patterns(model, pixels, progress=False),
        "pixels shuffled": look_at_patterns(model, shuffled, progress=False),
        "blank image": look_at_patterns(model, blank, progress=False),
        "random weights": look_at_patterns(untrained, pixels, progress=False),
    }
    parts = [
        looked.columns.groupby("layer")[WHERE].mean().reset_index().assign(images=name)
        for name, looked in seen.items()
    ]
    uniform = seen["digits"].grid.even_hops @ np.arange(seen["digits"].grid.side)
    table = pd.concat(parts, ignore_index=True).assign(uniform_hop=uniform)
    return table[["images", "layer", *WHERE, "uniform_hop"]]


def explained(scores: HeadScores, seed: int, n: int = 2000) -> pd.DataFrame:
    """R^2 of the rank of `drop_size` by layer, and by layer and where the head looks.

    The null shuffles heads within their layer.
    """
    table = scores.table
    y = table["drop_size"].rank().to_numpy(float)
    layers = pd.get_dummies(table["layer"]).to_numpy(float)
    where = table[WHERE].rank().to_numpy(float)
    generator = np.random.default_rng(seed)
    by_layer = r_squared(layers, y)
    full = r_squared(np.hstack([layers, where]), y)
    groups = [np.flatnonzero(table["layer"] == layer) for layer in table["layer"].unique()]
    null = []
    for _ in range(n):
        order = np.arange(len(y))
        for rows in groups:
            order[rows] = generator.permutation(rows)
        null.append(r_squared(np.hstack([layers, where[order]]), y))
    p = (1 + sum(value >= full for value in null)) / (1 + n)
    row = {"heads": len(y), "layer": by_layer, "layer_and_where": full}
    return pd.DataFrame([row | {"null": np.mean(null), "p": p}])


def r_squared(x: np.ndarray, y: np.ndarray) -> float:
    fitted = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return float(1 - ((y - fitted) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="digits-vit", help="reads handwritten digits")
    parser.add_argument("--out", type=Path, default=Path("runs/vit-heads"))
    parser.add_argument("--score", default="drop", help="the measure that ranks heads")
    parser.add_argument("--n-choose", type=int, default=None, help="validation images; default all")
    parser.add_argument("--n-test", type=int, default=None, help="test images; default all")
    parser.add_argument("--n-patterns", type=int, default=100, help="images to look at patterns on")
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 2, 4], help="heads to prune")
    parser.add_argument("--draws", type=int, default=20, help="random sets of as many heads")
    parser.add_argument("--orders", type=int, default=10, help="random orders of all heads")
    parser.add_argument("--step", type=int, default=2, help="heads between points of a curve")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
