"""Do later attention sinks hurt, and does damping them in chosen heads help?

    python analyses/attention_calibration.py smollm2-135m --out runs/attention-calibration
    python analyses/attention_calibration.py mini-llama --tasks "two facts" --all-heads

On one thread the first takes about 40 minutes (the screens 17 of them), the second one or two.

After Yu et al. 2024 (arXiv 2406.15765), with what the paper leaves open. Prompts that choose heads
and prompts that measure are apart: no text is among both.

1. What can the model do as it is?
2. Which keys are later sinks? How many are among a prompt's last tokens, which few queries see, so
   that their mean is over the threshold by chance?
3. The screen: ACT on each head alone. Which heads does the paper's rule accept, which are beyond
   chance, and do halves of the prompts agree on them?
4. On other prompts: the accepted heads together, against as many others of the same layers, against
   as much mass from random columns of the same heads, against all candidates, and without damping
   the last tokens. Beside it the gain on the prompts that chose the heads, which flatters.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset, disable_progress_bars
from scipy.stats import hypergeom

import interp
from interp.analysis.calibration import BETTER, Acceptance, Metric, Screen, calibration_screen
from interp.analysis.causality import crossed_interval
from interp.analysis.circuits.find import random_circuits
from interp.evaluation import Comparison, metric_values
from interp.heads import Head, heads_of
from interp.intervention.act import ACT, N_LAST, middle_heads
from interp.model.hooked import HookedModel
from telling import finish, keep, show, shown

LEVEL = 0.05  # false discovery rate of heads beyond chance
SHOWN = 32  # prompts whose sinks are looked at

TASKS: dict[str, Callable[[HookedModel, int, int], Dataset]] = {
    "letters": lambda model, n, seed: interp.tasks.multiple_choice(model, n, seed),
    "two facts": lambda model, n, seed: interp.tasks.multiple_choice(model, n, seed, facts=2),
    "colours": lambda model, n, seed: interp.tasks.colored_objects(model, n, seed),
    "paper colours": lambda model, n, seed: interp.tasks.colored_objects(
        model, n, seed, form="paper"
    ),
    "ioi": lambda model, n, seed: interp.tasks.ioi(model, n, seed),
}


@dataclass(frozen=True)
class Condition:
    """One edit, and which rows of a table it belongs to: the draws of a control share a name."""

    name: str
    edit: ACT
    draw: int | None = None

    @property
    def n_heads(self) -> int:
        return len(heads_of(self.edit.heads))

    def __str__(self) -> str:
        return self.name if self.draw is None else f"{self.name} {self.draw}"


def main() -> None:
    args = arguments()
    disable_progress_bars()
    model = interp.load(args.model, dtype=args.dtype)
    args.out.mkdir(parents=True, exist_ok=True)
    tasks = {name: two_draws(model, name, args) for name in args.tasks}
    heads = every_head(model) if args.all_heads else middle_heads(model)
    candidates = ACT(heads, args.factor, args.alpha, min_queries=args.min_queries)
    print(candidates, flush=True)

    show("1. As it is, on the prompts that measure")
    rows = [
        interp.evaluate(model, test, progress=False).summary().assign(task=name)
        for name, (_, test) in tasks.items()
    ]
    keep(
        pd.concat(rows)[["task", "metric", "value", "low", "high", "n"]],
        args.out / "before.parquet",
    )

    show(f"2. Later sinks of the model as it is, {SHOWN} prompts of each task")
    sinks = {name: sinks_of(model, chosen, candidates) for name, (chosen, _) in tasks.items()}
    every = pd.concat([table.assign(task=name) for name, table in sinks.items()])
    every.to_parquet(args.out / "sinks.parquet", index=False)
    n_cells = min(SHOWN, args.n_screen) * len(heads)
    keep(
        pd.DataFrame([about(t, name, n_cells) for name, t in sinks.items()]),
        args.out / "sinks-short.parquet",
    )

    show("3. The screen: one head at a time")
    screens = {
        name: calibration_screen(
            model, chosen, candidates, batch_size=args.batch_size, out=args.out / f"screen-{name}"
        )
        for name, (chosen, _) in tasks.items()
    }
    for name, screen in screens.items():
        print(f"{name}: {screen}", flush=True)
        show_best(screen)
        for metric in ("accuracy", "loss"):
            figure = screen.scores(metric).plot(mark=screen.accepted(Acceptance(metric)))
            figure.write_html(args.out / f"screen-{name}-{metric}.html")
    agreement = [agreed(name, screen, args.seed) for name, screen in screens.items()]
    keep(pd.DataFrame(agreement), args.out / "halves.parquet")

    show("4. On other prompts: gains (positive is better) beside the model as it is")
    tables = []
    for name, (chosen, test) in tasks.items():
        table = measured(model, screens[name], chosen, test, name, args)
        if table is not None:
            tables.append(table.assign(task=name))
    if tables:
        keep(pd.concat(tables, ignore_index=True), args.out / "gains.parquet")

    found = [*map(said_of_sinks, sinks, sinks.values()), *map(said_of_halves, agreement)]
    found += [line for name in tasks for line in said_of_gains(name, tables)]
    finish(found, args.out)


def two_draws(model: HookedModel, name: str, args) -> tuple[Dataset, Dataset]:
    """Prompts that choose heads, and others that measure."""
    chosen = TASKS[name](model, args.n_screen, 2 * args.seed)
    drawn = TASKS[name](model, args.n_test, 2 * args.seed + 1)
    known = set(chosen["text"])
    test = drawn.select([i for i, text in enumerate(drawn["text"]) if text not in known])
    print(f"{name}: {len(chosen)} prompts for the screen, {len(test)} others", flush=True)
    return chosen, test


def every_head(model: HookedModel) -> tuple[Head, ...]:
    return tuple(Head(i, head) for i in model.attention_layers for head in range(model.cfg.n_heads))


# 2. Sinks


def sinks_of(model: HookedModel, prompts: Dataset, candidates: ACT) -> pd.DataFrame:
    """Later sinks where nothing is damped."""
    some = prompts.select(range(min(SHOWN, len(prompts))))
    return replace(candidates, factor=1.0).sinks(model, some)


def about(sinks: pd.DataFrame, name: str, n_cells: int) -> dict:
    """How common they are among heads and prompts, where they lie, what they are."""
    cells = sinks.groupby(["prompt", "layer", "head"])
    common = sinks["token"].str.strip().value_counts(normalize=True).head(6)
    return {
        "task": name,
        "with_sinks": len(cells) / n_cells,
        "sinks_each": len(sinks) / max(1, len(cells)),
        "mass": cells["mass"].first().mean(),
        "at_end": sinks["at_end"].mean(),
        "tokens": ", ".join(f"{token!r} {share:.2f}" for token, share in common.items()),
    }


# 3. The screen


def show_best(screen: Screen) -> None:
    columns = ["layer", "head", "edited", "accuracy", "accuracy_low", "accuracy_high", "accuracy_p"]
    columns += ["loss", "loss_low", "loss_high", "loss_p"]
    print(shown(screen.effects.sort_values("loss")[columns].head(6)), flush=True)


def agreed(name: str, screen: Screen, seed: int) -> dict:
    """What the paper's rule accepts on all prompts and on halves, and what is beyond chance."""
    one, other = screen.scores("accuracy").halves(seed)
    sets = [set(half.top(threshold=0.0)) for half in (one, other)]
    shared, n = len(sets[0] & sets[1]), len(screen.effects)
    by_loss = screen.scores("loss").halves(seed)
    beyond = {
        f"beyond_chance_{metric}": len(screen.accepted(Acceptance(metric, level=LEVEL)))
        for metric in BETTER
    }
    return {
        "task": name, "candidates": n, "accepted": len(screen.accepted()), **beyond,
        "half": len(sets[0]), "other_half": len(sets[1]), "shared": shared,
        "by_chance": len(sets[0]) * len(sets[1]) / n,
        "p_value": hypergeom.sf(shared - 1, n, len(sets[0]), len(sets[1])),
        "rank_correlation_loss": by_loss[0].correlation(by_loss[1]),
    }  # fmt: skip


# 4. Gains


def measured(
    model: HookedModel, screen: Screen, chosen: Dataset, test: Dataset, name: str, args
) -> pd.DataFrame | None:
    """The gains of all conditions; None where there is no head to calibrate."""
    accepted = screen.act()
    if not accepted.heads:
        print(f"{name}: no head is accepted")
        return None
    accepted.save_pretrained(args.out / f"act-{name}", model)
    tried = list(conditions(model, screen, args))
    edits = {str(one): one.edit for one in tried}
    found = interp.compare(
        model, test, {"as it is": [], **edits}, batch_size=args.batch_size, progress=False
    )
    found.table.to_parquet(args.out / f"conditions-{name}.parquet", index=False)
    where = interp.compare(model, chosen, {"as it is": [], "accepted": accepted}, progress=False)
    own = gains(where, [Condition("accepted", accepted)]).assign(condition="where chosen")
    table, draws = gains(found, tried), single_draws(found, tried)
    figure = interp.figures.conditions(
        table.assign(metric="gain, " + table["metric"]).rename(columns={"gain": "value"}),
        draws=draws.assign(metric="gain, " + draws["metric"]),
    )
    figure.write_html(args.out / f"gains-{name}.html")
    return pd.concat([table, own], ignore_index=True)


def conditions(model: HookedModel, screen: Screen, args) -> Iterator[Condition]:
    """The accepted heads, other choices of heads, and the controls."""
    accepted = screen.act()
    yield Condition("accepted", accepted)
    for n, half in enumerate(screen.scores("accuracy").halves(args.seed)):
        if heads := half.top(threshold=0.0):
            yield Condition("accepted by half the prompts", replace(accepted, heads=heads), n)
    for metric in BETTER:
        if heads := screen.accepted(Acceptance(metric, level=LEVEL)):
            yield Condition(f"beyond chance, {metric}", replace(accepted, heads=heads))
    yield Condition("all candidates", screen.candidates)
    yield Condition("not the last tokens", replace(accepted, min_queries=N_LAST + 1))
    for n in range(args.columns):
        yield Condition("other columns", replace(accepted, columns="random", seed=n), n)
    for n, heads in enumerate(
        random_circuits(model, heads_of(accepted.heads), args.draws, args.seed)
    ):
        yield Condition("other heads", replace(accepted, heads=heads), n)


def gains(found: Comparison, tried: list[Condition]) -> pd.DataFrame:
    """What each condition gains beside no edit, and how far the accepted heads are ahead of it.

    Intervals are over prompts and draws; `as_good` counts the draws that gain as much or more.
    """
    names = list(dict.fromkeys(one.name for one in tried))
    rows = []
    for metric in BETTER:
        values = {
            name: np.stack([gained(found, one, metric) for one in tried if one.name == name])
            for name in names
        }
        ours = values["accepted"]
        for name, own in values.items():
            low, high = crossed_interval(own)
            lead_low, lead_high = crossed_interval(ours - own)
            as_good = int((own.mean(1) >= ours.mean() - 1e-9).sum())
            rows.append(
                {
                    "condition": name, "metric": metric,
                    "heads": np.mean([one.n_heads for one in tried if one.name == name]),
                    "gain": own.mean(), "low": low, "high": high,
                    "lead": ours.mean() - own.mean(), "lead_low": lead_low, "lead_high": lead_high,
                    "draws": len(own), "as_good": as_good, "n": own.shape[1],
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def gained(found: Comparison, one: Condition, metric: Metric) -> np.ndarray:
    """The change for the better, prompt by prompt."""
    before, after = (
        metric_values(found.evaluations[name].table, metric) for name in ("as it is", str(one))
    )
    assert before is not None and after is not None  # prompts have answers
    return BETTER[metric] * (after - before)


def single_draws(found: Comparison, tried: list[Condition]) -> pd.DataFrame:
    rows = [
        {"condition": one.name, "metric": metric, "value": gained(found, one, metric).mean()}
        for one in tried if one.draw is not None for metric in BETTER
    ]  # fmt: skip
    return pd.DataFrame(rows)


# In short


def said_of_sinks(name: str, sinks: pd.DataFrame) -> str:
    if sinks.empty:
        return f"{name}: no candidate has a later sink"
    return (
        f"{name}: {sinks['at_end'].mean():.0%} of the later sinks are among the last {N_LAST} "
        f"tokens of their prompt, {(sinks['queries'] < 3).mean():.0%} among the last two"
    )


def said_of_halves(row: dict) -> str:
    beyond = ", ".join(f"{row[f'beyond_chance_{metric}']} by {metric}" for metric in BETTER)
    return (
        f"{row['task']}: the paper's rule accepts {row['accepted']} of {row['candidates']} heads; "
        f"beyond chance are {beyond}; halves of the prompts accept {row['half']} and "
        f"{row['other_half']}, {row['shared']} of them in common (chance {row['by_chance']:.1f}, "
        f"p = {row['p_value']:.2g})"
    )


def said_of_gains(name: str, tables: list[pd.DataFrame]) -> Iterator[str]:
    own = next((t for t in tables if t["task"].iloc[0] == name), None)
    if own is None:
        yield f"{name}: no head was accepted, so that nothing was calibrated"
        return
    for metric in BETTER:
        by = own[own["metric"] == metric].set_index("condition")
        ours, controls = by.loc["accepted"], by.loc[["other heads", "other columns"]]
        helps = bool(ours["low"] > 0 and (controls["lead_low"] > 0).all())
        verdict = "ACT helps" if helps else "NO gain beyond the controls"
        beside = [
            f"{control} {row['gain']:+.3f} (ahead by {row['lead_low']:+.3f} to "
            f"{row['lead_high']:+.3f}; {row['as_good']:.0f} of {row['draws']:.0f} as good)"
            for control, row in controls.iterrows()
        ]
        yield (
            f"{name}, {metric}: {verdict}: {ours['gain']:+.3f} [{ours['low']:+.3f}, "
            f"{ours['high']:+.3f}] with {ours['heads']:.0f} heads on other prompts, "
            f"{by.loc['where chosen', 'gain']:+.3f} on those that chose them; {'; '.join(beside)}"
        )


def names(text: str) -> list[str]:
    """Tasks, divided by commas."""
    found = [name.strip() for name in text.split(",")]
    if unknown := [name for name in found if name not in TASKS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: one of {', '.join(TASKS)}")
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/attention-calibration"))
    parser.add_argument("--tasks", type=names, default="letters,colours", help=", ".join(TASKS))
    parser.add_argument("--n-screen", type=int, default=128, help="prompts that choose heads")
    parser.add_argument("--n-test", type=int, default=200, help="prompts that measure")
    parser.add_argument("--draws", type=int, default=20, help="random heads")
    parser.add_argument("--columns", type=int, default=5, help="draws of random columns")
    parser.add_argument("--all-heads", action="store_true", help="screen the outer layers too")
    parser.add_argument("--factor", type=float, default=0.4, help="what a sink keeps")
    parser.add_argument("--alpha", type=float, default=5.0, help="a sink gets over alpha / tokens")
    parser.add_argument("--min-queries", type=int, default=1, help="that must see a sink")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
