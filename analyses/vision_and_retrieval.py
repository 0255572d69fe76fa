"""Are the heads that read the image those that read a long text? One language model, two senses.

    python analyses/vision_and_retrieval.py shapes-llava --out runs/two-senses

`shapes-llava` is SmolLM2, frozen, behind an image encoder: its heads never saw an image while they
were trained. So the same head can be asked twice: does it copy a needle out of a long text
(retrieval score), and does it bring in the image (VHD, attention on the image)?

1. Rank correlation of the scores: over all heads, and within layers, since both kinds of score have
   more to do with some layers than with others; the null permutes heads within their layers.
2. Overlap of the first heads, against chance with as many heads in each layer.
3. Ablations, crossed: retrieval heads where an image is asked about, image heads on needles, each
   also at home, against as many other heads of the same layers (of any, where a layer has not as
   many left); text of another kind says what else breaks.
"""

import argparse
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

import interp
from interp import figures
from interp.analysis.causality import AblationControl, ablation_control
from interp.analysis.image_attention import image_attention
from interp.heads import HeadScores
from interp.model.hooked import HookedModel
from telling import finish, keep, show

NAMES = {
    "retrieval": "retrieval score",
    "vhd": "VHD",
    "relative": "VHD / (|z+| + |z-|)",
    "attention": "attention on the image",
}
PERMUTATIONS = 2000


def main() -> None:
    args = arguments()
    seeing, reading = interp.load(args.model, dtype=args.dtype), interp.load(args.text_model)
    args.out.mkdir(parents=True, exist_ok=True)
    scores = scored(seeing, reading, args)
    said = []

    show("1. Do heads have the same rank?")
    table = correlations(scores)
    keep(table, args.out / "correlations.parquet")
    said += [
        f"{NAMES[row.image]} and retrieval score: Spearman {row.correlation:+.2f} over all heads, "
        f"{row.within:+.2f} within layers (p = {row.p_value:.3f})"
        for row in table.itertuples()
    ]

    show("2. Are the first heads the same?")
    table = overlaps(scores, args.top)
    keep(table, args.out / "overlap.parquet")
    said += [
        f"top {row.k} by {NAMES[row.image]}: {row.shared} are among the top {row.k} retrieval "
        f"heads (chance within layers {row.expected:.1f}, p = {row.p_value:.3f}; over all heads "
        f"{row.anywhere:.1f}): {row.heads or 'none'}"
        for row in table.itertuples()
    ]
    drawn = scores["retrieval"].table.merge(
        scores["relative"].table, on=["layer", "head", "tower"], suffixes=("", "_image")
    )
    labels = [f"L{row.layer}H{row.head}" for row in drawn.itertuples()]
    figures.scatter(
        drawn["score"], drawn["score_image"], labels,
        x_title=NAMES["retrieval"], y_title=NAMES["relative"],
    ).write_html(args.out / "scores.html")  # fmt: skip

    show("3. Crossed ablations")
    ranks = []
    for (heads, task, k), control in crossed(seeing, reading, scores, args).items():
        match = match_of(scores[heads], k)
        ranks.append(control.ranks.assign(heads=heads, task=task, match=match or "none"))
        control.plot().write_html(args.out / f"ablated_{heads}_{task}_{k}.html")
        said += ablation_said(heads, task, match, control)
    keep(pd.concat(ranks, ignore_index=True), args.out / "ablations.parquet")

    finish(said, args.out)


# Scores


def scored(seeing: HookedModel, reading: HookedModel, args) -> dict[str, HeadScores]:
    captions = interp.tasks.scenes(seeing, args.n, args.seed, questions=("caption",))
    found = interp.vision_head_divergence(
        seeing, captions, max_new_tokens=args.new_tokens, batch_size=args.batch_size,
        out=args.out / "vhd",
    ).heads  # fmt: skip
    looked = image_attention(
        seeing, captions, how="generate", max_new_tokens=args.new_tokens,
        batch_size=args.batch_size, out=args.out / "attention",
    ).heads  # fmt: skip
    needles = interp.tasks.needle(reading, [args.length], n=args.needles, seed=args.seed)
    retrieval = interp.retrieval_heads(reading, needles, out=args.out / "retrieval")
    print(retrieval.metadata["counts"])
    relative = HeadScores(found.table.assign(score=found.table["relative"]), found.metadata)
    scores = {"retrieval": retrieval, "vhd": found, "relative": relative, "attention": looked}
    for name, one in scores.items():
        best = ", ".join(f"{head} {one[head]['score']:.2f}" for head in one.top(8))
        print(f"{NAMES[name]}: {best}")
        one.plot(title=NAMES[name], mark=one.top(8)).write_html(args.out / f"{name}.html")
    return scores


# 1. and 2.


def correlations(scores: dict[str, HeadScores]) -> pd.DataFrame:
    rows = []
    for name in ("vhd", "relative", "attention"):
        within, p_value = within_layers(scores["retrieval"], scores[name])
        correlation = scores["retrieval"].correlation(scores[name])
        rows.append(
            {"image": name, "correlation": correlation, "within": within, "p_value": p_value}
        )
    return pd.DataFrame(rows)


def within_layers(one: HeadScores, other: HeadScores) -> tuple[float, float]:
    """Correlation of ranks within layers; its two-sided p-value, by permuting heads in layers."""
    ranks = [centred_ranks(scores.matrix) for scores in (one, other)]
    observed = cosine(*ranks)
    rng = np.random.default_rng(0)
    drawn = [cosine(ranks[0], rng.permuted(ranks[1], axis=1)) for _ in range(PERMUTATIONS)]
    as_far = int((np.abs(drawn) >= abs(observed) - 1e-12).sum())
    return observed, (1 + as_far) / (1 + PERMUTATIONS)


def centred_ranks(matrix: np.ndarray) -> np.ndarray:
    ranks = pd.DataFrame(matrix.T).rank().to_numpy().T
    return ranks - ranks.mean(1, keepdims=True)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))


def overlaps(scores: dict[str, HeadScores], ks: list[int]) -> pd.DataFrame:
    rows = []
    for name in ("vhd", "relative", "attention"):
        for k in ks:
            found = scores["retrieval"].overlap(scores[name], k=k, match="layer")
            anywhere = scores["retrieval"].overlap(scores[name], k=k)
            rows.append(
                {
                    "image": name,
                    "k": k,
                    "shared": len(found.shared),
                    "expected": found.expected,
                    "p_value": found.p_value,
                    "anywhere": anywhere.expected,
                    "heads": ", ".join(map(str, found.shared)),
                }
            )
    return pd.DataFrame(rows)


# 3.


def crossed(
    seeing: HookedModel, reading: HookedModel, scores: dict[str, HeadScores], args
) -> dict[tuple[str, str, int], AblationControl]:
    """Each kind of heads ablated on each kind of task, on prompts that did not choose them."""
    seed = args.seed + 1
    tasks = {
        "images": (
            seeing, interp.tasks.scenes(seeing, args.n, seed, questions=("caption", "color"))
        ),
        "needles": (
            reading, interp.tasks.needle(reading, [args.length], n=args.needles, seed=seed)
        ),
    }  # fmt: skip
    found = {}
    for heads, k in product(("retrieval", *args.image_heads), args.ks):
        for task, (model, prompts) in tasks.items():
            print(f"{k} {NAMES[heads]} heads, {task}")
            found[heads, task, k] = ablation_control(
                model, scores[heads], prompts, ks=[k], draws=args.draws,
                match=match_of(scores[heads], k),
                other=interp.tasks.text(model, max_tokens=96, n=6, seed=args.seed + 2),
                batch_size=args.batch_size, out=args.out / f"ablation-{heads}-{task}-{k}",
            )  # fmt: skip
            print(found[heads, task, k])
    return found


def match_of(scores: HeadScores, k: int) -> str | None:
    """By layer, but where the first `k` take so much of one that not as many are left."""
    layers = scores.table["layer"].value_counts()
    taken = Counter(head.layer for head in scores.top(k))
    return "layer" if all(2 * n <= layers[layer] for layer, n in taken.items()) else None


def ablation_said(heads: str, task: str, match: str | None, control: AblationControl) -> list[str]:
    rows = control.ranks[control.ranks["metric"].isin(["accuracy", "loss"])]
    where = "of the same layers" if match else "of any layer"
    return [
        f"{task}, {row.k} heads by {NAMES[heads]} ablated: {row.metric} {row.top:+.2f}, as many "
        f"others {where} {row.random:+.2f} ({row.random_low:+.2f} to "
        f"{row.random_high:+.2f} over {row.draws} draws); gap {row.gap:+.2f} ({row.gap_low:+.2f} "
        f"to {row.gap_high:+.2f}), p = {row.p_value:.2f}"
        for row in rows.itertuples()
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="shapes-llava")
    parser.add_argument(
        "--text-model", default="smollm2-135m", help="the language model inside, by itself"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/two-senses"))
    parser.add_argument("--n", type=int, default=64, help="images")
    parser.add_argument("--needles", type=int, default=30)
    parser.add_argument("--length", type=int, default=256, help="of a needle's prompt, in tokens")
    parser.add_argument("--top", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--ks", type=int, nargs="+", default=[10, 20], help="heads to ablate")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--image-heads", nargs="+", default=["relative", "attention"])
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
