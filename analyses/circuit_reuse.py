"""Circuit reuse: do two tasks share their heads, and can one task's circuit mend the other?

    python analyses/circuit_reuse.py smollm2-135m --out runs/circuit-reuse

After Merullo et al. 2024 (arXiv 2310.08744), on indirect objects (IOI) and coloured objects:

1. How well does the model do the tasks, and an unrelated one (continuing a repeated sequence)?
2. The circuit of each, found on one half of the pairs and measured on the other.
3. How far do they overlap, beside chance and beside the unrelated task?
4. Does one task's circuit do the other? (cross-task faithfulness, beside random heads)
5. What do the heads do? (roles, from behaviour)
6. The repair: heads that tell IOI's wrong name from the right one are made to look at the wrong
   colours, as they look at the wrong name in IOI. Against as many random heads of the same layers,
   and the same heads made to look elsewhere, on prompts that no step above has seen.

Coloured objects' heads are scored by the KL divergence where the model does not do the task: then
the circuit is that of whatever changes with the object asked for.
"""

import argparse
import random
from pathlib import Path

import pandas as pd
from datasets import Dataset

import interp
from interp import tasks
from interp.analysis.circuits.find import Circuit, random_circuits
from interp.analysis.circuits.keeping import circuit_faithfulness
from interp.heads import Head
from interp.model.hooked import HookedModel
from interp.tasks.repeats import ordinary_tokens
from telling import keep, show

UNSEEN = 1000  # the seeds of prompts that choose nothing begin here


def main() -> None:
    args = arguments()
    model = interp.load(args.model, dtype=args.dtype)
    args.out.mkdir(parents=True, exist_ok=True)
    pairs = {
        "ioi": tasks.ioi(model, n=args.n, seed=args.seed),
        "colored": tasks.colored_objects(model, n=args.n, seed=args.seed, form=args.form),
        "repeats": repeated(model, args.n, args.seed),
    }

    show("1. Accuracy (over the whole vocabulary), and logit difference of right and wrong")
    done = {name: interp.evaluate(model, data, progress=False) for name, data in pairs.items()}
    rows = [e.summary().assign(task=name) for name, e in done.items()]
    keep(
        pd.concat(rows)[["task", "metric", "value", "low", "high", "n"]],
        args.out / "accuracy.parquet",
    )

    show("2. Circuits")
    circuits = {name: circuit_of(model, name, data, args) for name, data in pairs.items()}
    keep(
        pd.DataFrame([summary(name, c) for name, c in circuits.items()]),
        args.out / "circuits.parquet",
    )
    for name, circuit in circuits.items():
        print(f"{name}: {', '.join(map(str, circuit.members))}")
        circuit.plot().write_html(args.out / f"curve-{name}.html")

    show("3. Overlap, chance within layers, and the unrelated task beside it")
    overlap = interp.circuit_overlap(
        circuits["ioi"], circuits["colored"], beside={"repeats": circuits["repeats"]}
    )
    keep(
        overlap.table.drop(columns=["expected_uniform", "p_uniform"]), args.out / "overlap.parquet"
    )
    overlap.plot().write_html(args.out / "overlap.html")

    show("4. Each task run with each circuit: share of the task (KL where so scored)")
    keep(crossed(model, pairs, circuits, args.seed), args.out / "cross-task.parquet")

    show("5. Roles, from behaviour on IOI")
    roles = interp.head_roles(model, pairs["ioi"], progress=False)
    print(roles)
    named = roles.table[roles.table["role"] != "none"]
    keep(named, args.out / "roles.parquet", most=12)
    roles.plot().write_html(args.out / "roles.html")

    show("6. The repair, on prompts that chose nothing")
    heads = repairing(roles, circuits)
    print("heads:", ", ".join(map(str, heads)))
    fresh = tasks.colored_objects(model, n=args.n_repair, seed=UNSEEN + args.seed, form=args.form)
    comparison = interp.compare(model, fresh, conditions(model, heads, args), progress=False)
    keep(comparison.table[comparison.table["metric"] != "loss"], args.out / "repair.parquet")
    keep(comparison.differences.query("metric != 'loss'"), args.out / "repair-differences.parquet")
    comparison.plot().write_html(args.out / "repair.html")
    print(f"\ntables and figures: {args.out}")


def repeated(model: HookedModel, n: int, seed: int, length: int = 12) -> Dataset:
    """Random tokens begun a second time; corrupted: the token to be copied is another one."""
    words = ordinary_tokens(model.tokenizer)
    rng = random.Random(f"repeated {seed}")
    clean, corrupted, answers = [], [], []
    for _ in range(n):
        *block, right, other = rng.sample(words, length + 2)
        cut = length // 2
        around = [*block[:cut], None, *block[cut:]]
        clean.append([right if t is None else t for t in around] + block[:cut])
        corrupted.append([other if t is None else t for t in around] + block[:cut])
        answers.append((right, other))
    return tasks.pairs(
        model, clean, corrupted, answers=answers, task="repeats", parameters={"seed": seed}
    )


def circuit_of(model: HookedModel, name: str, pairs: Dataset, args) -> Circuit:
    """Found anew, or as an earlier run of this study left it."""
    folder = args.out / f"circuit-{name}"
    if (folder / "circuit.json").exists():
        return Circuit.load(folder)
    metric = "logit_diff"
    if interp.evaluate(model, pairs, progress=False).logit_diff <= 0:
        metric = "kl"
        print(f"{name}: the wrong answer is preferred; scored by KL")
    circuit = interp.find_circuit(model, pairs, args.method, metric, seed=args.seed)
    circuit.save(folder)
    return circuit


def summary(name: str, circuit: Circuit) -> dict:
    low, high = circuit.interval
    others = circuit.tested["faithfulness"].iloc[1:]
    return {
        "task": name, "metric": circuit.metadata["metric"], "heads": len(circuit.members),
        "faithfulness": circuit.faithfulness, "low": low, "high": high,
        "without": circuit.complement, "random": others.mean(), "random_most": others.max(),
        "area": circuit.area["linear"], "area_log": circuit.area["log"],
    }  # fmt: skip


def crossed(
    model: HookedModel, pairs: dict[str, Dataset], circuits: dict[str, Circuit], seed: int
) -> pd.DataFrame:
    """Every task on its held-out pairs with the circuit of every task, and with random heads."""
    tables = []
    for name, data in pairs.items():
        own = circuits[name]
        drawn = random_circuits(model, own.members, 5, seed)
        sets = {other: circuit.members for other, circuit in circuits.items()}
        sets |= {f"random {n}": heads for n, heads in enumerate(drawn)}
        held_out = data.select(range(1, len(data), 2))
        table = circuit_faithfulness(model, held_out, sets, own.metadata["metric"], progress=False)
        tables.append(table.assign(task=name))
    found = pd.concat(tables, ignore_index=True)
    return found[["task", "circuit", "size", "faithfulness", "low", "high", "complement", "n"]]


def repairing(roles, circuits: dict[str, Circuit]) -> list[Head]:
    """Heads that look at IOI's wrong name: inhibition and negative movers, four at most.

    Where no head has these roles: the strongest of IOI's circuit that coloured objects' has not.
    """
    heads = [*roles.of("inhibition"), *roles.of("negative mover")]
    if not heads:
        rest = set(circuits["ioi"].members) - set(circuits["colored"].members)
        heads = [head for head in circuits["ioi"].members if head in rest]
        print("no head has the roles of the paper's four; taken: IOI's own members")
    return sorted(dict.fromkeys(heads))[:4]


def conditions(model: HookedModel, heads: list[Head], args) -> dict:
    """The repair and its controls."""
    steer = interp.SteerAttention
    drawn = random_circuits(model, heads, args.draws, args.seed + 1)
    found = {
        "none": [],
        "on the wrong colours": steer(heads, "wrong_*"),
        "on the right colour": steer(heads, "color"),
        "on the first tokens": steer(heads, "0:2"),
        "off the wrong colours": steer(heads, "wrong_*", how="suppress"),
        "ablated": interp.Ablate(heads),
    }
    for n, others in enumerate(drawn):
        found[f"random heads {n}"] = steer(others, "wrong_*")
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/circuit-reuse"))
    parser.add_argument("--n", type=int, default=64, help="pairs of each task, half of them tests")
    parser.add_argument("--n-repair", type=int, default=100, help="fresh prompts for the repair")
    parser.add_argument("--draws", type=int, default=10, help="random heads for the repair")
    parser.add_argument("--form", default="plain", help="of coloured objects: plain or paper")
    parser.add_argument("--method", default="patching")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
