"""How does a known answer become its letter? Output nodes, letter heads, low-rank subspaces.

    python analyses/multiple_choice.py data/models/mini-llama --out runs/multiple-choice-study

After Lieberum et al. 2023 (arXiv 2307.09458), on our task: the context gives a colour, the options
are colours, so that what a filter for knowledge must ensure elsewhere is in the prompt.

1. Can the model do it? By letter, and by the text of the options. Pairs on which it is sure of both
   prompts (same options, two right letters: no bias towards a letter passes) are studied.
2. Which nodes say the letter at the last token, and how many cover most of it?
3. Directly, or through later ones? 4. What do the heads look at; which classes are there?
5. Do few dimensions of their q, k and v suffice? Against the complement, random dimensions, and
   class means of shuffled options; fitted on other pairs than those measured.
6. Do the same dimensions serve shuffled letters, other letters, numbers?
7. Does the model need these heads more than others of the same layers?
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset

import interp
from interp.analysis.causality import ablation_control
from interp.analysis.choices.letters import LetterHeads, letter_attention, letter_heads
from interp.analysis.choices.logit_attribution import (
    NodeEffects,
    direct_and_total,
    direct_effect,
    logit_attribution,
    swap_nodes,
    total_effect,
)
from interp.evaluation import Evaluation, share_interval
from interp.heads import Head, HeadScores, ScoresError
from interp.intervention.low_rank import LowRank
from interp.intervention.subspaces import ENDS, LABELS
from interp.model.hooked import HookedModel
from interp.tasks.prompts import PromptError
from telling import finish, keep, show

RANKS = range(9)
KEPT = 0.95  # of the accuracy: as good as all dimensions
SURE = 0.5  # probability of the right letter among the letters
CHANCE = 0.25
LEAST = 8  # pairs for each right option, below which the filter is given up


def main() -> None:
    args = arguments()
    model = interp.load(args.model, dtype=args.dtype)
    args.out.mkdir(parents=True, exist_ok=True)
    drawn = {
        name: interp.tasks.multiple_choice(model, n=args.n, seed=args.seed + i)
        for i, name in enumerate(("fit", "test"))
    }
    found = []

    show("1. By letter and by text (chance 0.25)")
    ability, kept = can_do(model, drawn, args.batch_size)
    keep(ability, args.out / "ability.parquet")
    fit, test = (kept[name] or drawn[name] for name in ("fit", "test"))
    found += said_of_ability(ability, {name: part is not None for name, part in kept.items()})

    show("2. What says the letter at the last token: direct effects")
    direct = direct_effect(model, fit)
    direct.plot().write_html(args.out / "direct.html")
    output = direct.cover(args.share)
    rest = [node for node in direct.nodes["node"] if node not in output]
    attributed = logit_attribution(model, fit).table[["node", "effect"]]
    nodes = direct.table.merge(attributed.rename(columns={"effect": "attribution"}), on="node")
    nodes = nodes.assign(output=nodes["node"].isin(output))
    nodes.to_parquet(args.out / "nodes.parquet")
    print(nodes.nlargest(12, "effect")[["node", "effect", "low", "high", "attribution", "output"]])
    swapped = swap_nodes(model, test, {"output nodes": output, "all others": rest})
    keep(swapped, args.out / "output_nodes.parquet")
    found += said_of_output(direct, output, swapped, args.share)

    show("3. Directly or through later nodes: direct and total effects")
    ways = direct_and_total(direct, total_effect(model, fit))
    ways.to_parquet(args.out / "direct_and_total.parquet")
    print(ways.head(12).to_string(index=False, float_format=short))
    ways_of = ways["works"].value_counts().sort_index()
    found.append("nodes at T work " + ", ".join(f"{way} ({n})" for way, n in ways_of.items()))

    show("4. What heads look at, and their classes")
    letters = letter_heads(model, fit)
    letters.table.to_parquet(args.out / "letters.parquet")
    for site in ("label", "end"):
        letters.plot(site).write_html(args.out / f"looks_at_{site}.html")
    columns = ["layer", "head", "class", "reader", "borderline", "effect", "label_mass"]
    columns += ["label_share", "label_copies", "end_mass", "end_share", "end_copies", "looks_at"]
    print(letters.table.nlargest(10, "effect")[columns].to_string(index=False, float_format=short))
    heads, name = studied_heads(letters, output)
    at = places_of(letters.table, heads)
    found += said_of_classes(letters, heads, name, at)
    found += said_of_upstream(model, test, ways, heads)

    show(f"5. Dimensions of q, k and v: {name}, at {'labels' if at is LABELS else 'option ends'}")
    if at_chance(ability):
        found.append("steps 5 to 7 were left out: there is no skill that could be kept or broken")
    elif heads:
        edits = subspaces(model, fit, heads, at)
        sweep = pd.concat(swept(model, test, edits, args.batch_size), ignore_index=True)
        sweep.to_parquet(args.out / "ranks.parquet")
        wide(sweep, "condition", "rank")
        rank_figure(sweep, "accuracy").write_html(args.out / "ranks_accuracy.html")
        rank_figure(sweep, "loss").write_html(args.out / "ranks_loss.html")
        found += said_of_ranks(sweep)

        show("6. The same dimensions under other labels")
        table, skipped = mutated(model, args, edits)
        table.to_parquet(args.out / "mutations.parquet")
        wide(table, "labels", "condition")
        found += said_of_mutations(table, skipped)

        show("7. These heads ablated, and as many others")
        found += ablated(model, letters, direct, heads, test, args)

    finish(found, args.out)


# 1. Ability


def can_do(
    model: HookedModel, drawn: dict[str, Dataset], batch_size: int
) -> tuple[pd.DataFrame, dict[str, Dataset | None]]:
    """Accuracy on all pairs and on those kept; and the kept ones, None where they are too few."""
    rows, kept = [], {}
    for name, pairs in drawn.items():
        sides = [pairs, interp.tasks.corrupted(pairs)]
        scored = [interp.evaluate(model, side, batch_size=batch_size) for side in sides]
        sure = np.logical_and(*(sure_of(one) for one in scored))
        text = right_by_text(model, pairs, batch_size)
        for which, mask in (("all", np.full(len(pairs), True)), ("kept", sure)):
            numbers = ability_of(scored[0], text, mask)
            rows.append({"pairs": name, "which": which, "n": int(mask.sum()), **numbers})
        options = [row.index(answer) for row, answer in zip(pairs["choices"], pairs["answer"])]
        counts = np.bincount(np.array(options)[sure], minlength=4)
        kept[name] = pairs.select(np.flatnonzero(sure)) if counts.min() >= LEAST else None
    return pd.DataFrame(rows), kept


def interval_by_letter(ability: pd.DataFrame) -> tuple[float, float]:
    """95 % interval of the accuracy among the letters, all test pairs."""
    row = ability[(ability["which"] == "all") & (ability["pairs"] == "test")].iloc[0]
    return share_interval(round(row["among_letters"] * row["n"]), int(row["n"]))


def at_chance(ability: pd.DataFrame) -> bool:
    return interval_by_letter(ability)[0] <= CHANCE


def sure_of(scored: Evaluation) -> np.ndarray:
    """Is the right letter the likeliest, with half of what all the letters have?

    The margin over the best other letter is a bound: with three others, p >= 1 / (1 + 3 e^-margin).
    """
    margin = scored.table["logit_diff"].to_numpy(float)
    return 1 / (1 + 3 * np.exp(-margin)) >= SURE


def ability_of(scored: Evaluation, text: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """By letter among all words and among the letters, by text, and by letter for each letter."""
    if not mask.any():
        return {"by_letter": np.nan, "among_letters": np.nan, "by_text": np.nan}
    table = scored.table[mask]
    among = table["logit_diff"] > 0
    by_answer = among.groupby(table["answer"].str.strip()).mean()
    return {
        "by_letter": table["correct"].mean(),
        "among_letters": among.mean(),
        "by_text": text[mask].mean(),
        **{f"right_{letter}": share for letter, share in by_answer.items()},
    }


def right_by_text(model: HookedModel, pairs: Dataset, batch_size: int) -> np.ndarray:
    """Is the right option's text the likeliest answer where no options are listed?

    Mean log-likelihood of its tokens, behind the prompt without its labels and options.
    """
    lists, lengths = [], []
    for row in pairs:
        ids, spans = row["input_ids"], row["spans"]
        bare = ids[: spans["label_1"][0]] + ids[spans["option_4"][1] :]
        for option in ENDS:
            own = ids[slice(*spans[option])]
            lists.append(bare + own)
            lengths.append(len(own))
    scores = np.zeros(len(lists))
    for batch in model.batches(lists, batch_size):
        index = batch.index.tolist()
        width = max(lengths[i] for i in index) + 1
        logits = model.last_logits(batch.input_ids, batch.attention_mask, width)[:, :-1]
        told = batch.input_ids[:, 1 - width :, None]
        chosen = logits.log_softmax(-1).gather(-1, told).squeeze(-1)
        for row, i in enumerate(index):
            scores[i] = float(chosen[row, -lengths[i] :].mean())
    best = scores.reshape(-1, 4).argmax(1)
    right = [row.index(answer) for row, answer in zip(pairs["choices"], pairs["answer"])]
    return best == np.array(right)


# 4. and 5. Heads and their subspaces


def studied_heads(letters: LetterHeads, output: list[str]) -> tuple[list[Head], str]:
    """Correct letter heads; where there are none, the heads among the output nodes."""
    correct = letters.of("correct letter")
    if correct:
        return correct, "correct letter heads"
    return [Head.parse(node) for node in output if "H" in node], "heads among the output nodes"


def places_of(table: pd.DataFrame, heads: list[Head]) -> tuple[str, ...]:
    """Labels or ends of options, whichever the heads look at more."""
    names = [str(head) for head in heads]
    own = table[[f"L{r.layer}H{r.head}" in names for r in table.itertuples()]]
    return LABELS if own["label_mass"].sum() > own["end_mass"].sum() else ENDS


def subspaces(
    model: HookedModel, fit: Dataset, heads: list[Head], at: tuple[str, ...]
) -> dict[str, dict[int, LowRank]]:
    """The fitted dimensions and their controls, by rank."""
    widest = min(max(RANKS), model.cfg.d_head)
    fitted = LowRank.fit(model, fit, heads, widest, at=at)
    means, shuffled = (
        LowRank.fit(model, fit, heads, 3, at=at, class_means=True, permute=permute)
        for permute in (None, 0)
    )
    ranks = [rank for rank in RANKS if rank <= widest]
    return {
        "fitted": {rank: fitted.of_rank(rank) for rank in ranks},
        "complement": {rank: fitted.of_rank(rank).others() for rank in ranks},
        "random": {rank: fitted.of_rank(rank).random(0) for rank in ranks},
        "random again": {rank: fitted.of_rank(rank).random(1) for rank in ranks},
        "class means": {rank: means.of_rank(rank) for rank in range(1, 4)},
        "shuffled options": {rank: shuffled.of_rank(rank) for rank in range(1, 4)},
        "only q": {3: fitted.of_rank(3).only("q")},
        "only k": {3: fitted.of_rank(3).only("k")},
        "only v": {3: fitted.of_rank(3).only("v")},
    }


def swept(
    model: HookedModel, test: Dataset, edits: dict[str, dict[int, LowRank]], batch_size: int
) -> Iterator[pd.DataFrame]:
    """Accuracy, loss and logit difference of every edit; the clean run has rank -1."""
    conditions = {("clean", -1): []} | {
        (name, rank): edit for name, ranks in edits.items() for rank, edit in ranks.items()
    }
    for (name, rank), edit in conditions.items():
        with model.intervene(edit):
            scored = interp.evaluate(model, test, batch_size=batch_size, progress=False)
        yield scored.summary().assign(condition=name, rank=rank)


def rank_figure(sweep: pd.DataFrame, metric: str):
    """A line for each condition over ranks."""
    rows = sweep[(sweep["metric"] == metric) & (sweep["rank"] >= 0)]
    rows = rows[~rows["condition"].str.startswith("only")]
    return interp.figures.profile(
        rows["rank"], rows["value"], low=rows["low"], high=rows["high"],
        series=rows["condition"], x_title="dimensions", y_title=metric,
    )  # fmt: skip


def mutated(
    model: HookedModel, args, edits: dict[str, dict[int, LowRank]]
) -> tuple[pd.DataFrame, list[str]]:
    """The base format's dimensions on prompts with other labels, and which labels cannot be."""
    chosen = {
        "rank 3": edits["fitted"][3], "complement": edits["complement"][3],
        "random": edits["random"][3], "none": edits["fitted"][0],
    }  # fmt: skip
    parts, skipped = [], []
    for labels in ("ABCD", "shuffled", "random", "1234"):
        try:
            pairs = interp.tasks.multiple_choice(model, n=args.n, seed=args.seed + 2, labels=labels)
        except PromptError as error:
            skipped.append(f"labels {labels}: {str(error).split('. ')[0]}")
            continue
        conditions = {"clean": [], **chosen}
        found = interp.compare(model, pairs, conditions, batch_size=args.batch_size, progress=False)
        parts.append(found.table.assign(labels=labels))
    return pd.concat(parts, ignore_index=True), skipped


# 7. Ablation


def ablated(
    model: HookedModel, letters: LetterHeads, direct: NodeEffects, heads: list[Head], test, args
) -> list[str]:
    correct = letters.of("correct letter")
    scores: HeadScores = letters.members("correct letter") if correct else direct.heads
    ks = [k for k in (1, 3, len(heads)) if k <= len(heads)]
    for match in ("layer", None):
        try:
            result = ablation_control(
                model, scores, test, ks=ks, draws=args.draws, match=match,
                batch_size=args.batch_size,
            )  # fmt: skip
            break
        except ScoresError as error:
            print(f"controls from the same layers: {error}")
    else:
        return ["ablation: too few other heads to compare with"]
    keep(result.ranks, args.out / "ablation.parquet")
    result.plot().write_html(args.out / "ablation.html")
    rank = result.rank(max(ks), "accuracy")
    drawn = "of the same layers" if match else "from anywhere"
    return [
        f"without all {max(ks)} of these heads accuracy changes by {rank['top']:+.2f}, without as "
        f"many others {drawn} by {rank['random']:+.2f} (difference {rank['gap_low']:+.2f} to "
        f"{rank['gap_high']:+.2f}; {rank['as_bad']} of {rank['draws']} draws as bad)"
    ]


# What the numbers say


def said_of_ability(ability: pd.DataFrame, filtered: dict[str, bool]) -> list[str]:
    row, kept = (
        ability[(ability["which"] == which) & (ability["pairs"] == "test")].iloc[0]
        for which in ("all", "kept")
    )
    low, high = interval_by_letter(ability)
    found = [
        f"by letter {row['among_letters']:.2f} right ({low:.2f} to {high:.2f}, chance 0.25), by "
        f"text {row['by_text']:.2f}; sure of both prompts of a pair on {kept['n']} of {row['n']}"
    ]
    if at_chance(ability):
        found.append("not above chance by letter: there is no such circuit to find")
    if not all(filtered.values()):
        found.append("too few sure pairs of each letter: all pairs were studied, unfiltered")
    return found


def said_of_output(
    direct: NodeEffects, output: list[str], swapped: pd.DataFrame, share: float
) -> list[str]:
    inside, outside = swapped.itertuples()
    n_heads = sum("H" in node for node in output)
    return [
        f"{count(n_heads, 'head')} and {count(len(output) - n_heads, 'MLP')} of "
        f"{len(direct.nodes) - 2} nodes make up {share:.0%} of the positive direct effect ("
        f"{', '.join(output[:8])}"
        f"{', ...' if len(output) > 8 else ''})",
        f"set to the source prompt they alone bring its letter in {inside.source_wins:.2f} of the "
        f"pairs ({inside.moved:.2f} of the way), all other nodes in {outside.source_wins:.2f}",
    ]


def said_of_classes(
    letters: LetterHeads, heads: list[Head], name: str, at: tuple[str, ...]
) -> list[str]:
    counts = letters.table["class"].value_counts()
    found = [f"classes: {', '.join(f'{n} {kind}' for kind, n in counts.items())}"]
    where = "labels" if at is LABELS else "the ends of options"
    shown = ", ".join(map(str, heads)) or "none"
    if name != "correct letter heads":
        found.append("no head looks at the right option, whichever it is, and says its letter")
    return [*found, f"studied further: {name} ({shown}), at {where}"]


def said_of_upstream(
    model: HookedModel, test: Dataset, ways: pd.DataFrame, heads: list[Head]
) -> list[str]:
    """What the head that works most through later nodes does to where the studied heads look."""
    through = ways[(ways["works"] == "through later nodes") & (ways["kind"] == "head")]
    if not len(through) or not heads:
        return ["no head at T works mainly through later ones"]
    upstream = through.iloc[0]
    before = letter_attention(model, test)
    with model.intervene(interp.Ablate([upstream["node"]])):
        after = letter_attention(model, test)
    moved = {
        site: np.abs(after.weights[site] - before.weights[site]).sum(-1).mean(0)
        for site in before.weights
    }
    share = sum(
        moved[site][before.layers.index(head.layer), head.head] for head in heads for site in moved
    )
    return [
        f"{upstream['node']} works through later nodes (direct {upstream['direct']:.2f}, total "
        f"{upstream['total']:.2f}); without it the studied heads move {share / len(heads):.2f} of "
        "their weight between options"
    ]


def said_of_ranks(sweep: pd.DataFrame) -> list[str]:
    table = sweep[sweep["metric"] == "accuracy"].set_index(["condition", "rank"])["value"]
    clean = table[("clean", -1)]
    good = [rank for rank in RANKS if table.get(("fitted", rank), 0) >= KEPT * clean]
    at_three = {
        name: table[(name, 3)] for name in ("fitted", "complement", "random", "random again")
    }
    means, shuffled = table[("class means", 3)], table[("shuffled options", 3)]
    least = f"rank {min(good)} is the least that" if good else "no rank up to 8"
    found = [
        f"{least} keeps {KEPT:.0%} of the accuracy ({clean:.2f}); rank 0 leaves "
        f"{table[('fitted', 0)]:.2f}",
        f"three keep {at_three['fitted']:.2f}, all but these three {at_three['complement']:.2f}, "
        f"three at random {at_three['random']:.2f} and {at_three['random again']:.2f}, those of "
        f"class means {means:.2f}, of shuffled options {shuffled:.2f}",
    ]
    if at_three["fitted"] >= KEPT * clean and shuffled >= KEPT * clean:
        found.append(
            "class means of shuffled options serve as well: what suffices is the largest spread of "
            "these heads' activations, found without knowing which option is which"
        )
    return found


def said_of_mutations(table: pd.DataFrame, skipped: list[str]) -> list[str]:
    rows = table[table["metric"] == "accuracy"]
    wide = rows.pivot(index="labels", columns="condition", values="value")
    found = [
        f"labels {labels}: clean {row['clean']:.2f}, three dimensions of the base format "
        f"{row['rank 3']:.2f}, random {row['random']:.2f}, none {row['none']:.2f}"
        for labels, row in wide.loc[list(dict.fromkeys(rows["labels"]))].iterrows()
    ]
    return found + skipped


def wide(table: pd.DataFrame, rows: str, columns: str) -> None:
    """Print accuracy and loss as tables of rows and columns, in the order in which they come."""
    for metric in ("accuracy", "loss"):
        part = table[table["metric"] == metric]
        shown = part.pivot(index=rows, columns=columns, values="value")
        shown = shown.reindex(index=part[rows].unique(), columns=part[columns].unique())
        print(f"{metric}\n{shown.to_string(float_format=short, na_rep='')}\n")


def count(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def short(number: float) -> str:
    return f"{number:.3f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="data/models/mini-llama")
    parser.add_argument("--out", type=Path, default=Path("runs/multiple-choice-study"))
    parser.add_argument("--n", type=int, default=192, help="pairs to fit on, and as many to test")
    parser.add_argument("--share", type=float, default=0.8, help="of the direct effect to cover")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
