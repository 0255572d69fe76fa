"""Retrieval heads: which heads copy the answer out of a long text, and does the model need them?

    python analyses/retrieval_heads.py smollm2-135m --out runs/retrieval-study

After Wu et al. 2024 (arXiv 2404.15574), on our needle task, with what the paper leaves open:

1. Few and strong? The share of heads by score, in the three forms of the score.
2. Stable? Halves of the grid, lengths, and reading the reference answer against generating.
3. Only induction heads by another name? Their score on repeated random tokens.
4. Needed? Heads chosen on one set of prompts are ablated on another, against as many others, drawn
   from the same layers and from anywhere; text that does not repeat says what else breaks.
"""

import argparse
from pathlib import Path

import pandas as pd

import interp
from interp.analysis.causality import ablation_control
from interp.analysis.retrieval import FORMS
from interp.heads import HeadScores
from telling import keep, show


def main() -> None:
    args = arguments()
    model = interp.load(args.model, dtype=args.dtype)
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = interp.tasks.needle(model, args.lengths, depths=5, n=args.n, seed=args.seed)

    show("1. Heads by score (count form; set and positions beside it)")
    scores = interp.retrieval_heads(model, prompts, out=args.out / "forced")
    print(scores.metadata["counts"])
    keep(shares_of(scores), args.out / "shares.parquet")
    top = scores.interval().sort_values("score", ascending=False).head(12)
    keep(
        top[["layer", "head", "score", "low", "high", "mass", "frequency"]],
        args.out / "top.parquet",
    )

    show("2. Rank correlation (Spearman) of the scores")
    generated = interp.retrieval_heads(model, prompts, how="generate", out=args.out / "generated")
    one, other = scores.halves(seed=args.seed)
    rows = [("halves of the grid", one.correlation(other))]
    rows += [("forced and generated", scores.correlation(generated))]
    by_length = scores.split(prompts["length"])
    for length in args.lengths[1:]:
        pair = f"{args.lengths[0]} and {length} tokens"
        rows += [(pair, by_length[args.lengths[0]].correlation(by_length[length]))]

    show("3. The same heads on repeated random tokens")
    repeats = interp.tasks.repeats(model, n=args.n, length=args.lengths[0] // 3, seed=args.seed)
    induction = interp.retrieval_heads(
        model, repeats, span="first", only_successes=False, out=args.out / "repeats"
    )
    rows += [("needles and repeats", scores.correlation(induction))]
    keep(pd.DataFrame(rows, columns=["what", "correlation"]), args.out / "stability.parquet")
    print("shared top 10:", overlap_of(scores, induction))

    show("4. Ablation on prompts that did not choose the heads")
    fresh = interp.tasks.needle(model, args.lengths[:1], depths=5, n=args.n, seed=args.seed + 1)
    control = interp.tasks.text(model, max_tokens=128, n=6, seed=args.seed + 2)
    for match in ("layer", None):
        result = ablation_control(
            model,
            scores,
            fresh,
            ks=args.ks,
            draws=args.draws,
            match=match,
            other=control,
            out=args.out / f"ablation-{match or 'anywhere'}",
        )
        print(f"\ncontrols drawn from {'the same layers' if match else 'all layers'}")
        keep(result.ranks, args.out / f"ranks-{match or 'anywhere'}.parquet")
        result.plot().write_html(args.out / f"ablation-{match or 'anywhere'}.html")

    scores.plot(mark=scores.top(5)).write_html(args.out / "heads.html")
    print(f"\ntables and figures: {args.out}")


def shares_of(scores: HeadScores) -> pd.DataFrame:
    """Share of heads in the paper's four classes, for each form of the score."""
    edges = [-1, 0, 0.1, 0.5, float("inf")]
    names = ["0", "0 to 0.1", "0.1 to 0.5", "above 0.5"]
    shares = {
        form: pd.cut(scores.table[form], edges, labels=names).value_counts(normalize=True)
        for form in FORMS
    }
    return pd.DataFrame(shares).loc[names].rename_axis("score").reset_index()


def overlap_of(scores: HeadScores, other: HeadScores) -> str:
    """How many of the top 10 are shared, and how many would be by chance within layers."""
    found = scores.overlap(other, k=10, match="layer")
    return f"{len(found.shared)} (chance {found.expected:.1f}, p = {found.p_value:.3f})"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/retrieval-study"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[192, 384])
    parser.add_argument("--n", type=int, default=30, help="prompts")
    parser.add_argument("--ks", type=int, nargs="+", default=[3, 6, 12])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
