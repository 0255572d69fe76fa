"""The report's section on circuits: which heads carry two small tasks, and do they share them?"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import pandas as pd

from interp import figures, tasks
from interp.analysis.circuits.find import Circuit, CircuitError, find_circuit
from interp.analysis.circuits.overlap import CircuitOverlap, circuit_overlap
from interp.analysis.paired import PairError
from interp.evaluation import Evaluation, evaluate
from interp.files import write_json
from interp.model.hooked import HookedModel
from interp.model.replay import ReplayError
from interp.report.page import Figure, Section, Table
from interp.report.plan import Plan
from interp.report.words import counted, interval, listed, number, percent
from interp.tasks.prompts import PromptError

NAMES = {"ioi": "indirect objects", "colored_objects": "coloured objects"}
MEMBERS = 12


@dataclass(frozen=True, eq=False)
class Found:
    """What came of one task: a circuit, or why there is none."""

    accuracy: Evaluation | None
    circuit: Circuit | None
    reason: str = ""


def find_circuits(
    model: HookedModel, plan: Plan, out: Path, *, resume: bool, progress: bool
) -> dict[str, Found]:
    """The circuit of each task that the model's tokens allow; kept in `out`, a folder a task."""
    if not resume:
        rmtree(out, ignore_errors=True)
    found = {}
    for task in NAMES if plan.n_pairs else ():
        folder = out / task
        if (folder / "circuit.json").exists():
            circuit = Circuit.load(folder)
            table = pd.read_parquet(folder / "prompts.parquet")
            found[task] = Found(Evaluation(table, {}), circuit)
            continue
        found[task] = _find(model, task, plan, progress)
        if (circuit := found[task].circuit) is not None and (done := found[task].accuracy):
            folder.mkdir(parents=True, exist_ok=True)
            done.table.to_parquet(folder / "prompts.parquet", index=False)
            circuit.save(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "none.json", {"task": task, "reason": found[task].reason})
    return found


def _find(model: HookedModel, task: str, plan: Plan, progress: bool) -> Found:
    make = {"ioi": tasks.ioi, "colored_objects": tasks.colored_objects}[task]
    try:
        pairs = make(model, n=plan.n_pairs, seed=plan.seed)
    except PromptError:
        return Found(None, None, "too few of its words are single tokens of this model")
    accuracy = evaluate(model, pairs, progress=False)
    try:
        circuit = find_circuit(model, pairs, seed=plan.seed, progress=progress)
    except (PairError, CircuitError, ReplayError) as error:
        return Found(accuracy, None, str(error).split(":", 1)[-1].strip().rstrip("."))
    if not circuit.interval[0] > 0:
        return Found(accuracy, None, "the model tells its two prompts too little apart")
    return Found(accuracy, circuit)


def circuits_section(found: Mapping[str, Found]) -> Section:
    """What was found, how good it is beside random heads, and whether the tasks share heads."""
    circuits = {task: one.circuit for task, one in found.items() if one.circuit is not None}
    parts: list[str | Figure | Table] = [set_up()]
    parts += [absent(task, one) for task, one in found.items() if one.circuit is None]
    if circuits:
        parts += [
            summary_table(found),
            maps(circuits),
            *(curve(task, circuit) for task, circuit in circuits.items()),
        ]
        parts += [members_table(task, circuit) for task, circuit in circuits.items()]
    if len(circuits) == 2:
        parts.append(overlap_sentence(circuit_overlap(*circuits.values())))
    return Section("circuits", "Which heads carry a task?", headline(found), parts)


def headline(found: Mapping[str, Found]) -> str:
    """One clause a task."""
    clauses = []
    for task, one in found.items():
        if one.circuit is None:
            clauses.append(f"no circuit of {NAMES[task]} ({one.reason.split(';')[0]})")
            continue
        circuit, random = one.circuit, one.circuit.tested["faithfulness"].iloc[1:]
        clauses.append(
            f"{counted(len(circuit.members), 'head')} of {len(circuit.heads)} do "
            f"{percent(max(0.0, circuit.faithfulness))} of {NAMES[task]} by themselves (as many "
            f"random heads of the same layers: {percent(max(0.0, float(random.mean())))})"
        )
    text = "; ".join(clauses)
    return f"{text[0].upper()}{text[1:]}."


def set_up() -> str:
    """What was done."""
    return (
        "Pairs of prompts differ in one word that turns the answer around. Each head in turn gets "
        "the output that it has on the other prompt of the pair; how far the logit difference of "
        "the two answers moves is its score. Heads are kept from the strongest down while all "
        "others stay as on the other prompt, and the circuit is the smallest set that does 80 % of "
        "what the whole model does. One half of the pairs finds it; all that is said of it here "
        "was measured on the other half."
    )


def absent(task: str, one: Found) -> str:
    """Why a task has no circuit."""
    did = "" if one.accuracy is None else f" The model is right on {right(one.accuracy)}."
    return f"No circuit of {NAMES[task]}: {one.reason}.{did}"


def right(accuracy: Evaluation) -> str:
    """`20 of 24 (83 %)`."""
    n = len(accuracy.table)
    return f"{int(accuracy.table['correct'].sum())} of {n} ({percent(accuracy.accuracy)})"


def summary_table(found: Mapping[str, Found]) -> Table:
    rows, shown = [], []
    for task, one in found.items():
        if one.circuit is None:
            continue
        circuit = one.circuit
        random = circuit.tested["faithfulness"].iloc[1:]
        low, high = circuit.interval
        rows.append(
            {"task": task, "members": len(circuit.members), "heads": len(circuit.heads)}
            | {"faithfulness": circuit.faithfulness, "low": low, "high": high}
            | {"complement": circuit.complement, "random": random.mean()}
            | {"random_most": random.max(), **circuit.area}
        )
        shown.append(
            {
                "task": NAMES[task],
                "right": right(one.accuracy) if one.accuracy else "–",
                "heads kept": f"{len(circuit.members)} of {len(circuit.heads)}",
                "faithfulness": f"{number(circuit.faithfulness)} {interval(low, high)}",
                "without them": number(circuit.complement),
                "random heads": f"{number(random.mean())} (at most {number(random.max())})",
            }
        )
    return Table(
        "circuits",
        "Circuits, measured on pairs that did not choose them",
        pd.DataFrame(rows),
        pd.DataFrame(shown),
        "Faithfulness: the share of the task that these heads do while all others are as on the "
        "corrupted prompt. Random heads: as many from the same layers, ten draws.",
    )


def maps(circuits: Mapping[str, Circuit]) -> Figure:
    shared = set.intersection(*(set(circuit.members) for circuit in circuits.values()))
    plot = figures.head_maps(
        [circuit.heads.matrix for circuit in circuits.values()],
        [NAMES[task] for task in circuits],
        [circuit.members for circuit in circuits.values()],
        both=shared if len(circuits) > 1 else (),
        colorbar="share moved",
    )
    table = pd.concat(
        [circuit.heads.table.assign(task=task) for task, circuit in circuits.items()],
        ignore_index=True,
    )
    both = " Green: heads of both circuits." if len(circuits) > 1 else ""
    return Figure(
        "circuit-heads",
        "How much of the gap each head moves by itself; members are outlined",
        plot,
        table,
        f"1: all of the gap between the two prompts; below 0: the head works against it.{both}",
    )


def curve(task: str, circuit: Circuit) -> Figure:
    return Figure(
        f"circuit-curve-{task}",
        f"{NAMES[task].capitalize()}: how much a number of heads do by themselves",
        circuit.plot(title=""),
        circuit.curve,
        "Heads are kept from the strongest score down. Bands: 95 % over pairs. Black: the circuit; "
        "grey: as many random heads of the same layers.",
    )


def members_table(task: str, circuit: Circuit) -> Table:
    table = circuit.minimality.merge(circuit.heads.table, on=["layer", "head"])
    table = table.sort_values("cost", ascending=False, ignore_index=True)
    shown = pd.DataFrame(
        {
            "head": [f"L{row.layer}H{row.head}" for row in table.itertuples()],
            "moves by itself": table["score"].map(number),
            "leaving it out costs": [
                f"{number(r.cost)} {interval(r.low, r.high)}" for r in table.itertuples()
            ],
        }
    )
    more = len(shown) - MEMBERS
    return Table(
        f"circuit-members-{task}",
        f"{NAMES[task].capitalize()}: the members" + (f" (and {more} more)" if more > 0 else ""),
        table,
        shown.head(MEMBERS),
        "Cost: the faithfulness that the circuit loses without this member.",
    )


def overlap_sentence(overlap: CircuitOverlap) -> str:
    """Do they share heads, beside what chance would share?"""
    row = overlap.table.iloc[0]
    names = f" ({listed(overlap.shared)})" if overlap.shared else ""
    return (
        f"The two circuits share {counted(int(row['shared']), 'head')}{names} of "
        f"{row['size_one']} and {row['size_other']}; drawn within layers they would share "
        f"{number(row['expected'])} (p = {row['p_value']:.2g}). The rank correlation of all scores "
        f"is {number(row['correlation'])}. Heads that matter for every task overlap too: this "
        "says nothing of these two alone."
    )
