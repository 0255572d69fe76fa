"""Do few heads read the image, are hallucinated words written without them, do more of them help?

    python analyses/hallucination.py shapes-llava --out runs/hallucination

After He et al. 2024 (arXiv 2412.13949), on scenes of coloured shapes. In training these had a habit
(where there is a red circle, there is a blue square); here they break it, or have none ("even").
With the controls that the paper leaves out:

1. Is a minority of heads set apart by VHD? Its distribution, halves of the captions, and the image
   masked instead of deleted.
2. Is T-VHD lower at hallucinated words than at true ones, at the same place in the caption? For
   every k, in the paper's distance and in one that does not grow with the length of z.
3. Does VHR lower CHAIR, without loss of recall? Against greedy captions, as they are and cut to
   VHR's length or recall; against random, lower and all heads, one head set for all images, and
   other heads that move the residual stream as far.
4. And POPE, in its three splits.

All differences are paired by image. A run that was killed goes on.
"""

import argparse
import re
from pathlib import Path

import numpy as np
import pandas as pd

import interp
from interp import figures, metrics
from interp.analysis.separation import SeparationError, separation
from interp.analysis.vision_heads import VisionHeads
from interp.heads import HeadScores
from interp.intervention.vhr import VHR
from interp.metrics import Chair, Measured, MetricError, Pope
from interp.model.hooked import HookedModel
from interp.tasks.scenes import NEGATIVES
from telling import finish, keep, show

CHAIR = ("chair_s", "chair_i", "chair_i_set", "recall", "words", "distinct")
POPE = ("accuracy", "f1", "yes_rate")
PLAIN = "greedy"
ANSWER_TOKENS = 3
LEAST_WRONG = 10  # hallucinated words that an AUC is said for


def main() -> None:
    args = arguments()
    model = interp.load(args.model, dtype=args.dtype)
    args.out.mkdir(parents=True, exist_ok=True)
    said, tables = [], {"chair": [], "chair_changes": [], "pope": [], "pope_changes": [], "auc": []}
    for bias in args.biases:
        prompts = interp.tasks.scenes(model, args.n, args.seed, questions=("caption",), bias=bias)
        show(f"{bias} scenes: {len(prompts)} captions")
        found = divergences(model, prompts, args, bias)
        said += [f"{bias}: {s}" for s in heads_said(found, args, bias)]
        auc, sentences = words_said(found["deleted"], prompts, args, bias)
        tables["auc"].append(auc.assign(bias=bias))
        said += [f"{bias}: {s}" for s in sentences]
        edits = conditions(model, prompts, args)
        results = captioned(model, prompts, edits, args, bias)
        add(results, tables, "chair", bias, CHAIR, args)
        said += [f"{bias}: {s}" for s in changes_said(results, CHAIR)]
        answers = polled(model, edits, args, bias)
        add(answers, tables, "pope", bias, POPE, args)
        said += [f"{bias}, POPE: {s}" for s in changes_said(answers, POPE)]
    for name, parts in tables.items():
        pd.concat(parts, ignore_index=True).to_parquet(args.out / f"{name}.parquet")
    finish(said, args.out)


# 1. Heads


def divergences(model: HookedModel, prompts, args, bias: str) -> dict[str, VisionHeads]:
    """Without the image in both ways, of the same captions."""
    found = {
        reference: interp.vision_head_divergence(
            model, prompts, max_new_tokens=args.new_tokens, reference=reference,
            batch_size=args.batch_size, out=args.out / f"vhd-{reference}-{bias}",
        )
        for reference in ("deleted", "masked")
    }  # fmt: skip
    heads = found["deleted"].heads
    heads.plot(mark=heads.top(5)).write_html(args.out / f"vhd_{bias}.html")
    relative = HeadScores(heads.table.assign(score=heads.table["relative"]), heads.metadata)
    relative.plot(title="VHD / (|z+| + |z-|)").write_html(args.out / f"relative_{bias}.html")
    keep(heads.interval().sort_values("score", ascending=False).head(12)[
        ["layer", "head", "score", "low", "high", "relative", "outlier", "chosen"]
    ], args.out / f"top_{bias}.parquet")  # fmt: skip
    return found


def heads_said(found: dict[str, VisionHeads], args, bias: str) -> list[str]:
    heads, masked = found["deleted"].heads, found["masked"].heads
    score = heads.table["score"].to_numpy()
    one, other = heads.halves(seed=args.seed)
    k = max(1, round(0.1 * len(score)))
    figures.histogram(score, x_title="VHD").write_html(args.out / f"distribution_{bias}.html")
    middle = np.median(score)
    within = spread_within_layers(heads)
    return [
        f"VHD: the top 10 % of heads ({k}) hold {share_of_top(score, k):.0%} of the sum (were all "
        f"alike: {k / len(score):.0%}); the largest is {score.max() / middle:.1f} times the "
        f"median, within its layer {within:.1f} times (mean over layers); "
        f"{int((score > score.mean() + 2 * score.std()).sum())} of {len(score)} heads lie above "
        "mean + 2 sd",
        f"VHD: halves of the captions agree (Spearman {one.correlation(other):.2f}); "
        f"with the image masked instead of deleted {heads.correlation(masked):.2f}, the sum then "
        f"is {masked.table['score'].sum() / score.sum():.2f} of what it was; "
        f"{shared(heads, masked, k)} of the top {k} are the same",
        "VHD: " + relative_said(heads, k),
    ]


def share_of_top(score, k: int) -> float:
    return float(np.sort(score)[-k:].sum() / score.sum())


def spread_within_layers(heads: HeadScores) -> float:
    by_layer = heads.table.groupby("layer")["score"]
    return float((by_layer.max() / by_layer.median()).mean())


def shared(one: HeadScores, other: HeadScores, k: int) -> str:
    found = one.overlap(other, k=k, match="layer")
    return f"{len(found.shared)} (chance within layers {found.expected:.1f})"


def relative_said(heads: HeadScores, k: int) -> str:
    relative = HeadScores(heads.table.assign(score=heads.table["relative"]), heads.metadata)
    values = relative.table["score"].to_numpy()
    return (
        f"relative to the length of z, heads have {values.min():.2f} to {values.max():.2f}, "
        f"{int((values > 0.5).sum())} above 0.5; rank correlation with VHD "
        f"{relative.correlation(heads):.2f}, {shared(relative, heads, k)} of the top {k} the same"
    )


# 2. Words


def words_said(found: VisionHeads, prompts, args, bias: str) -> tuple[pd.DataFrame, list[str]]:
    named = metrics.chair(found.captions, prompts["objects"][:], metrics.scenes())
    n_heads = found.heads.matrix.shape[1]
    rows = []
    for relative in (False, True):
        for k in range(1, n_heads + 1):
            words = found.of_words(named, k, relative).assign(right=named.mentions["right"])
            words["place"] = words.groupby("prompt").cumcount()
            for of in ("first", "largest", "mean"):
                for strata in (None, "place"):
                    row = auc_row(words, of, strata)
                    rows.append({"k": k, "relative": relative, "of": of, "strata": strata, **row})
    table = pd.DataFrame(rows)
    words = found.of_words(named)
    figure(words).write_html(args.out / f"t_vhd_{bias}.html")
    counts = words["right"].value_counts()
    head = (
        f"T-VHD: {counts.get(True, 0)} words name an object that is there, {counts.get(False, 0)} "
        "one that is not; "
    )
    if counts.get(False, 0) < LEAST_WRONG:
        return table, [head + "too few of them to tell anything"]
    own = table[table["of"].eq("largest")]
    parts = []
    for relative in (False, True):
        some = own[own["relative"] == relative]
        plain = some[some["strata"].isna()].set_index("k")
        placed = some[some["strata"].notna()].set_index("k")
        what = "relative T-VHD" if relative else "T-VHD"
        best = plain["auc"].idxmax()
        parts.append(
            f"{what} is higher at true words with AUC {interval(plain.loc[found.k])} for k = "
            f"{found.k}, at the same place in the caption {interval(placed.loc[found.k])}; over k "
            f"from {plain['auc'].min():.2f} to {plain['auc'].max():.2f} (k = {best})"
        )
    return table, [head + "; ".join(parts)]


def auc_row(words: pd.DataFrame, of: str, strata: str | None) -> dict:
    try:
        found = separation(
            words[of].to_numpy(), words["right"].to_numpy(bool), words["prompt"].to_numpy(),
            None if strata is None else words[strata].to_numpy(),
        )  # fmt: skip
    except SeparationError:
        return {"auc": np.nan, "low": np.nan, "high": np.nan, "pairs": 0}
    return {"auc": found.auc, "low": found.low, "high": found.high, "pairs": found.n_pairs}


def figure(words: pd.DataFrame):
    """True and hallucinated words over their place in the caption."""
    words = words.assign(place=words.groupby("prompt").cumcount() + 1)
    means = words.groupby(["place", "right"])["largest"].agg(["mean", "sem"]).reset_index()
    names = means["right"].map({True: "true", False: "hallucinated"})
    half = 1.96 * means["sem"].fillna(0)
    return figures.profile(
        means["place"], means["mean"], low=means["mean"] - half, high=means["mean"] + half,
        series=names, x_title="number of the object in its caption", y_title="T-VHD",
    )  # fmt: skip


# 3. Captions


def conditions(model: HookedModel, prompts, args) -> dict[str, list]:
    one = VHR().choices(model, prompts.select([0]))
    fixed = [(row.layer, row.head) for row in one[one["chosen"]].itertuples()]
    alpha = args.alpha
    found = {
        PLAIN: [],
        "VHR": [VHR(alpha)],
        "VHR in lockstep": [VHR(alpha, reference="lockstep")],
        "VHR, outliers too": [VHR(alpha, outlier_test=False)],
        "one head set": [VHR(alpha, heads=fixed)],
        "random half": [VHR(alpha, which="random", seed=args.seed)],
        "lower half": [VHR(alpha, which="lower")],
        "others, as far": [VHR(alpha, which="others")],
        "all heads": [VHR(alpha, which="all")],
    }
    found |= {f"VHR x {alpha:g}": [VHR(alpha)] for alpha in args.alphas}
    return {name: edits for name, edits in found.items() if wanted(name, args)}


def wanted(name: str, args) -> bool:
    return args.conditions is None or name == PLAIN or name in args.conditions


def captioned(model: HookedModel, prompts, edits, args, bias: str) -> dict[str, Chair]:
    """CHAIR under each condition, and of greedy captions cut to VHR's length and recall."""
    objects, words = prompts["objects"][:], metrics.scenes()
    texts, results = {}, {}
    for name, edit in edits.items():
        with model.intervene(edit):
            written = metrics.write_captions(
                model, prompts, max_new_tokens=args.new_tokens, batch_size=args.batch_size,
                out=args.out / "captions" / bias / folder(name),
            )  # fmt: skip
        texts[name] = list(written["caption"])
        results[name] = metrics.chair(texts[name], objects, words)
        print(f"{name}: {results[name]!r}")
    if "VHR" in results:
        alike = metrics.cut_alike(texts[PLAIN], texts["VHR"])
        results["greedy, cut to VHR's length"] = metrics.chair(alike, objects, words)
        try:
            same = metrics.cut_to_recall(texts[PLAIN], objects, words, results["VHR"]["recall"])[0]
            cut = [row["caption"] for row in same]
            results["greedy, cut to VHR's recall"] = metrics.chair(cut, objects, words)
        except MetricError:
            print("VHR recalls more than greedy captions: nothing to cut")
    return results


# 4. Questions


def polled(model: HookedModel, edits, args, bias: str) -> dict[str, Pope]:
    """POPE over all three splits under each condition."""
    polls = {
        split: interp.tasks.polls(model, args.polls, args.seed, negatives=split, bias=bias)
        for split in NEGATIVES
    }
    results = {}
    for name, edit in edits.items():
        parts = []
        for split, prompts in polls.items():
            with model.intervene(edit):
                written = metrics.write_captions(
                    model, prompts, max_new_tokens=ANSWER_TOKENS, batch_size=args.batch_size,
                    out=args.out / "polls" / bias / folder(name) / split,
                )  # fmt: skip
            parts.append(metrics.pope(list(written["caption"]), prompts).table.assign(split=split))
        # the same scenes in all splits: an image's questions stay together
        results[name] = Pope(pd.concat(parts, ignore_index=True), {"splits": list(polls)})
        by = results[name].by("split")
        print(f"{name}: {results[name]!r}; accuracy by split "
              + ", ".join(f"{r.split} {r.value:.3f}"
                          for r in by[by["metric"] == "accuracy"].itertuples()))  # fmt: skip
        results[name].table.to_parquet(args.out / f"pope_{bias}_{folder(name)}.parquet")
    return results


# What the numbers say


def add(results: dict, tables: dict, name: str, bias: str, wanted, args) -> None:
    table, changes = metrics.table_of(results), metrics.differences(results)
    tables[name].append(table.assign(bias=bias))
    tables[f"{name}_changes"].append(changes.assign(bias=bias))
    chosen = table[table["metric"].isin(wanted)]
    figures.conditions(chosen).write_html(args.out / f"{name}_{bias}.html")
    moved = changes[changes["metric"].isin(wanted)]
    figures.conditions(moved).write_html(args.out / f"{name}_changes_{bias}.html")
    shown = chosen.pivot(index="condition", columns="metric", values="value")
    print(shown.loc[list(results), list(wanted)].to_string(float_format=lambda x: f"{x:.3f}"))


def changes_said(results: dict[str, Measured], wanted) -> list[str]:
    first, *others = results
    before = results[first].summary().set_index("metric")
    said = [f"{first}: " + ", ".join(f"{m} {interval(before.loc[m])}" for m in wanted)]
    for name in others:
        change = results[name].minus(results[first]).set_index("metric")
        said.append(f"{name}: " + ", ".join(f"{m} {interval(change.loc[m], '+')}" for m in wanted))
    return said


def interval(row, sign: str = "") -> str:
    value = row["auc"] if "auc" in row else row["value"]
    return f"{value:{sign}.2f} ({row['low']:{sign}.2f} to {row['high']:{sign}.2f})"


def folder(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="shapes-llava")
    parser.add_argument("--out", type=Path, default=Path("runs/hallucination"))
    parser.add_argument("--n", type=int, default=200, help="captions of each kind of scenes")
    parser.add_argument("--polls", type=int, default=100, help="scenes that are asked about")
    parser.add_argument("--biases", nargs="+", default=["even", "broken"])
    parser.add_argument("--alpha", type=float, default=2.0, help="of VHR and of its controls")
    parser.add_argument(
        "--alphas", type=float, nargs="*", default=[0.5, 1.1, 1.25, 1.5], help="of VHR besides"
    )
    parser.add_argument("--conditions", nargs="+", default=None, help="default: all")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
