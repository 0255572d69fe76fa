"""Can a few heads be taught a task? LoFiT against ITI, other heads, shuffled answers and LoRA.

    python analyses/lofit.py smollm2-135m --out runs/lofit
    python analyses/lofit.py mini-llama --tasks "bare letters,two facts" --out runs/lofit-mini

After Yin, Ye & Durrett 2024 (arXiv 2406.01563), with the baseline of Li et al. 2023 (arXiv
2306.03341). Prompts to learn from, to stop by and to measure with are apart (no text is in two of
them); rates, strengths and epochs are chosen on the second kind, and the third is looked at once.

1. What can the model do as it is?
2. Transfer: offsets of each task on its own heads, on the other tasks', on random ones.
3. What else there is, with as many heads: ITI; heads with the largest offsets; answers shuffled
   among the prompts to learn from (whatever comes of that is format, not the task); and LoRA, where
   `peft` is installed, with the number of parameters of each.
4. Do the offsets do more the more there is of them? (strength from -1 to 1.5)
5. Folded into the weights, saved and loaded: the same logits?

What was learned and measured is kept in the folder as it comes: a run that was stopped goes on.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, disable_progress_bars

import interp
from interp.analysis.causality import crossed_interval
from interp.analysis.transfer import (
    RANDOM,
    UNEDITED,
    HeadTransfer,
    Parts,
    head_transfer,
    learned_in,
)
from interp.heads import Head, HeadScores
from interp.intervention.descent import Tuning, descend
from interp.intervention.folding import FoldError, plain_copy
from interp.intervention.iti import ITI
from interp.intervention.lofit import SELECTION, LoFiT
from interp.intervention.objectives import AnswerLoss
from interp.intervention.offsets import top_heads
from interp.model.hooked import HookedModel
from interp.runs import Run
from interp.tasks.multiple_choice import examples as letter_examples
from interp.tasks.prompts import from_examples
from telling import finish, keep, show

STRENGTHS = (0.0, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0)  # of ITI
SCALES = (-1.0, 0.0, 0.5, 1.0, 1.5)  # of learned offsets
PARTS = ("train", "validation", "test")


def main() -> None:
    args = arguments()
    disable_progress_bars()
    model = interp.load(args.model, dtype=args.dtype)
    args.out.mkdir(parents=True, exist_ok=True)
    tasks = {name: parts_of(model, name, args) for name in args.tasks}

    show("1. As it is")
    before = {
        name: interp.evaluate(model, part.test, progress=False) for name, part in tasks.items()
    }
    rows = [e.summary().assign(task=name) for name, e in before.items()]
    keep(
        pd.concat(rows)[["task", "metric", "value", "low", "high", "n"]],
        args.out / "before.parquet",
    )

    show("2. Heads of one task, offsets of another (accuracy on test prompts)")
    tuning = tuning_of(args, best_rate(model, tasks, args))
    transfer = head_transfer(
        model, tasks, k=args.k, seeds=args.seeds, tuning=tuning, batch_size=args.batch_size,
        selection=replace(SELECTION, epochs=args.epochs), out=args.out / "transfer",
    )  # fmt: skip
    print(transfer)
    transfer.table.to_parquet(args.out / "transfer.parquet", index=False)
    chosen_heads(transfer).to_parquet(args.out / "heads.parquet", index=False)
    transfer.plot().write_html(args.out / "transfer.html")
    keep(
        transfer.differences.query("metric == 'accuracy'"),
        args.out / "transfer-differences.parquet",
    )

    show("3. Beside other ways")
    others = other_ways(model, tasks, transfer, tuning, args)
    methods = compared(transfer, others, model.cfg.d_head)
    keep(methods, args.out / "methods.parquet")
    figure = interp.figures.conditions(
        methods.assign(metric=methods["task"]).rename(columns={"method": "condition"})
    )
    figure.write_html(args.out / "methods.html")

    show("4. Strength of the offsets")
    sweep = pd.concat(swept(model, tasks, args), ignore_index=True).query("metric == 'accuracy'")
    keep(sweep, args.out / "strengths.parquet")
    figure = interp.figures.profile(
        sweep["strength"], sweep["value"], low=sweep["low"], high=sweep["high"],
        series=sweep["task"], x_title="strength", y_title="accuracy",
    )  # fmt: skip
    figure.write_html(args.out / "strengths.html")

    show("5. Folded")
    last = folded(model, tasks, args)

    n_all = len(model.attention_layers) * model.cfg.n_heads
    found = [*said_of(methods), *said_of_transfer(transfer), said_of_heads(transfer, n_all), last]
    finish(found, args.out)


# Tasks


def parts_of(model: HookedModel, name: str, args) -> Parts:
    """Three draws, without texts that an earlier one has."""
    sizes = (args.n_train, args.n_validation, args.n_test)
    seen: set[str] = set()
    found = []
    for seed, n in enumerate(sizes):
        drawn = TASKS[name](model, n, 100 * args.data_seed + seed)
        rows = [i for i, text in enumerate(drawn["text"]) if text not in seen]
        found.append(drawn.select(rows))
        seen |= set(drawn["text"])
    print(f"{name}: " + ", ".join(f"{len(d)} {p}" for p, d in zip(PARTS, found)), flush=True)
    return Parts(*found)


def bare_letters(model: HookedModel, n: int, seed: int) -> Dataset:
    """Letter questions of one fact, without the full stops behind letters: `A blue B red`."""
    rows = []
    for example in letter_examples(n, seed):
        context, options = example["text"].split("? ")
        text = f"{context}? {options.replace('.', '')}"
        rows.append({"text": text, "answer": example["answer"], "choices": example["choices"]})
    return from_examples(model, rows, task="bare letters", parameters={"n": n, "seed": seed})


TASKS: dict[str, Callable[[HookedModel, int, int], Dataset]] = {
    "letters": lambda model, n, seed: interp.tasks.multiple_choice(model, n, seed),
    "two facts": lambda model, n, seed: interp.tasks.multiple_choice(model, n, seed, facts=2),
    "colours": lambda model, n, seed: interp.tasks.colored_objects(model, n, seed),
    "paper colours": lambda model, n, seed: interp.tasks.colored_objects(
        model, n, seed, form="paper"
    ),
    "bare letters": bare_letters,
}


# Ways to learn


@dataclass(frozen=True, eq=False)
class Case:
    """A task to learn with a seed; `heads` are those that LoFiT chose for it."""

    model: HookedModel
    task: str
    part: Parts
    seed: int
    heads: tuple[Head, ...]
    tuning: Tuning
    args: argparse.Namespace

    def offsets(self, heads, part: Parts | None = None) -> LoFiT:
        part = self.part if part is None else part
        return LoFiT.fit(
            self.model, part.train, heads, tuning=self.tuning, validation=part.validation,
            seed=self.seed, progress=False,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Learned:
    """The model that does the task, edited so; `parameters` are the numbers learned for it."""

    model: HookedModel
    edit: Any
    parameters: int


def tuning_of(args, lr: float) -> Tuning:
    return Tuning(lr=lr, epochs=args.epochs, batch_size=args.batch_size)


def best_rate(model: HookedModel, tasks: dict[str, Parts], args) -> float:
    """The rate whose offsets, on random heads, leave the least loss on prompts to stop by."""
    if len(args.rates) == 1:
        return args.rates[0]
    heads, rows = random_heads(model, args), []
    for name, part in tasks.items():
        for lr in args.rates:
            edit = LoFiT.fit(
                model, part.train, heads, tuning=tuning_of(args, lr), validation=part.validation,
                out=args.out / "rates" / f"{name}-{lr:g}", progress=False,
            )  # fmt: skip
            loss = loss_under(model, edit, part.validation)
            rows.append({"task": name, "rate": lr, "loss": loss})
    table = pd.DataFrame(rows)
    keep(table, args.out / "rates.parquet")
    best = table.groupby("rate")["loss"].mean().idxmin()
    print(f"rate {best:g}", flush=True)
    return float(best)


def random_heads(model: HookedModel, args) -> list[Head]:
    layers = model.attention_layers
    alike = HeadScores.from_samples(np.zeros((1, len(layers), model.cfg.n_heads)), layers=layers)
    rng = np.random.default_rng(args.data_seed)
    drawn = rng.choice(len(alike), len(top_heads(alike, args.k)), replace=False)
    return [alike.heads[i] for i in drawn]


def other_ways(
    model: HookedModel, tasks: dict[str, Parts], transfer: HeadTransfer, tuning: Tuning, args
) -> pd.DataFrame:
    """Test samples of the other ways to learn; each way has a folder, with a shard for a case."""
    cases = [
        Case(model, name, part, seed, transfer.chosen[name, name, seed], tuning, args)
        for name, part in tasks.items()
        for seed in args.seeds
    ]
    tables = []
    for way, learn in WAYS.items():
        if learn is lora and find_spec("peft") is None:
            print("LoRA: left out; pip install peft", flush=True)
            continue
        own = {"rank": args.rank, "rates": args.lora_rates} if learn is lora else {}
        settings = {"analysis": way, **own, "transfer": transfer.metadata}
        run = Run.open(args.out / "ways" / way.replace(" ", "-"), settings)
        for index, _ in run.shards(len(cases), 1):
            run.save_shard(index, measured(way, learn(cases[index]), cases[index]))
        run.finish(cases=len(cases))
        tables += run.tables()
    return pd.concat(tables, ignore_index=True)


def best_push(case: Case) -> Learned:
    """ITI of the strength that does best on prompts to stop by."""
    edit = ITI.fit(case.model, case.part.train, k=len(case.heads), seed=case.seed, progress=False)
    edits = [replace(edit, strength=strength) for strength in STRENGTHS]
    best = min(edits, key=lambda one: loss_under(case.model, one, case.part.validation))
    return Learned(case.model, best, best.vectors.numel())


def largest_offsets(case: Case) -> Learned:
    """The heads whose offsets grow most where all heads learn one: no stage of selection."""
    layers, heads = case.model.attention_layers, range(case.model.cfg.n_heads)
    whole = case.offsets([(layer, head) for layer in layers for head in heads])
    most = whole.vectors.norm(dim=1).topk(len(case.heads)).indices.tolist()
    edit = case.offsets([whole.heads[i] for i in most])
    return Learned(case.model, edit, edit.vectors.numel())


def shuffled_answers(case: Case) -> Learned:
    """The same prompts to learn from and to stop by, with one another's answers."""

    def mixed(data: Dataset) -> Dataset:
        order = np.random.default_rng(case.seed).permutation(len(data))
        answers, ids = data["answer"], data["answer_ids"]

        def swap(row: dict, i: int) -> dict:
            return {"answer": answers[order[i]], "answer_ids": ids[order[i]]}

        return data.map(swap, with_indices=True)

    part = Parts(mixed(case.part.train), mixed(case.part.validation), case.part.test)
    edit = case.offsets(case.heads, part)
    return Learned(case.model, edit, edit.vectors.numel())


def lora(case: Case) -> Learned:
    """Low-rank updates, in float32, of the weights that `peft` takes by default.

    Of several rates the one with the least loss on prompts to stop by.
    """
    part, args = case.part, case.args
    tried = {}
    for lr in args.lora_rates:
        learner, weights = with_lora(case.model, args.rank, case.seed)
        loss, held_out = AnswerLoss(learner, part.train), AnswerLoss(learner, part.validation)
        history = descend(
            weights, loss, len(loss), tuning_of(args, lr), seed=case.seed,
            held_out=lambda held_out=held_out: held_out.mean(args.batch_size),
        )  # fmt: skip
        size = sum(weight.numel() for weight in weights)
        tried[float(history["held_out"].min())] = Learned(learner, [], size)
    return tried[min(tried)]


def with_lora(
    model: HookedModel, rank: int, seed: int
) -> tuple[HookedModel, list[torch.nn.Parameter]]:
    """A copy of the model with low-rank updates that do nothing yet, and their weights."""
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]

    torch.manual_seed(seed)
    wrapped = get_peft_model(plain_copy(model), LoraConfig(r=rank, lora_alpha=2 * rank))
    learner = interp.load(wrapped.get_base_model(), model.tokenizer)
    return learner, [p for p in learner.original_model.parameters() if p.requires_grad]


WAYS: dict[str, Callable[[Case], Learned]] = {
    "ITI": best_push,
    "largest offsets": largest_offsets,
    "shuffled answers": shuffled_answers,
    "LoRA": lora,
}


def loss_under(model: HookedModel, edit, prompts: Dataset) -> float:
    with model.intervene(edit):
        return interp.evaluate(model, prompts, progress=False).loss


def measured(way: str, learned: Learned, case: Case) -> pd.DataFrame:
    """Each test prompt, in the columns of a transfer's samples."""
    with learned.model.intervene(learned.edit):
        found = interp.evaluate(
            learned.model, case.part.test, batch_size=case.args.batch_size, progress=False
        )
    print(f"{way}, {case.task}, seed {case.seed}: accuracy {found.accuracy:.3f}", flush=True)
    about = {"heads": way, "task": case.task, "seed": case.seed, "prompt": range(len(found.table))}
    samples = pd.DataFrame(about).assign(parameters=learned.parameters)
    return samples.assign(correct=found.table["correct"], loss=found.table["loss"])


# Results


def compared(transfer: HeadTransfer, others: pd.DataFrame, d_head: int) -> pd.DataFrame:
    """Accuracy of every way, its gain over no edit, and LoFiT's lead over it, paired by prompt."""
    own = transfer.samples
    same = own["heads"] == own["task"]
    own = own.assign(heads=own["heads"].where(~same, "LoFiT"))
    own = own[own["heads"].isin(["LoFiT", RANDOM, UNEDITED])]
    size = d_head * len(next(iter(transfer.chosen.values())))
    own = own.assign(parameters=size * (own["heads"] != UNEDITED))
    samples = pd.concat([own, others], ignore_index=True)
    cells = samples[["task", "heads"]].drop_duplicates().itertuples(index=False)
    return pd.DataFrame(
        [{"task": task, "method": way, **beside(samples, task, way)} for task, way in cells]
    )


def beside(samples: pd.DataFrame, task: str, method: str) -> dict[str, float]:
    """A way's row in the table of ways."""
    values, ours, plain = (wide(samples, task, name) for name in (method, "LoFiT", UNEDITED))
    low, high = crossed_interval(values)
    lead = ours - values
    lead_low, lead_high = crossed_interval(lead)
    rows = samples[(samples["task"] == task) & (samples["heads"] == method)]
    return {
        "parameters": int(rows["parameters"].max()),
        "value": values.mean(), "low": low, "high": high, "gain": values.mean() - plain.mean(),
        "lofit_lead": lead.mean(), "lead_low": lead_low, "lead_high": lead_high,
        "loss": rows["loss"].mean(), "n": values.shape[1], "seeds": len(values),
    }  # fmt: skip


def wide(samples: pd.DataFrame, task, method) -> np.ndarray:
    """Right or not, [seed prompt]."""
    own = samples[(samples["task"] == task) & (samples["heads"] == method)]
    return own.pivot(index="seed", columns="prompt", values="correct").to_numpy(float)


def swept(model: HookedModel, tasks: dict[str, Parts], args) -> Iterator[pd.DataFrame]:
    """Each task's own offsets, turned down, up and about."""
    for name, part in tasks.items():
        edit = own_offsets(name, args)
        for strength in SCALES:
            with model.intervene(replace(edit, strength=strength)):
                scored = interp.evaluate(
                    model, part.test, batch_size=args.batch_size, progress=False
                )
            yield scored.summary().assign(task=name, strength=strength)


def own_offsets(name: str, args) -> LoFiT:
    """What step 2 has learned for a task on its own heads, with the first seed."""
    folder = learned_in(args.out / "transfer", name, name, args.seeds[0])
    return LoFiT.from_pretrained(folder)  # pyright: ignore[reportReturnType]


def folded(model: HookedModel, tasks: dict[str, Parts], args) -> str:
    """Hooks against weights that were saved and loaded, on one task's test prompts."""
    name, part = next(iter(tasks.items()))
    edit = own_offsets(name, args)
    exact = interp.load(plain_copy(model).float(), model.tokenizer)  # bf16 rounds in every layer
    try:
        again, written = reloaded(edit, exact), reloaded(edit, model)
    except FoldError as error:
        return str(error)
    batch = model.batch(list(part.test["input_ids"][:8]))
    with torch.no_grad(), exact.intervene(edit):
        expected = exact(batch.input_ids, attention_mask=batch.attention_mask)
    with torch.no_grad():
        found = again(batch.input_ids, attention_mask=batch.attention_mask)
    apart = float((found - expected)[batch.attention_mask.bool()].abs().max())
    right = interp.evaluate(written, part.test, progress=False).accuracy
    return (
        f"folded into the weights, saved and loaded ({name}): accuracy {right:.3f}; in float32 "
        f"the logits are at most {apart:.1e} from those of the hooks"
    )


def reloaded(edit: LoFiT, model: HookedModel) -> HookedModel:
    """The model with the edit in its weights, as it comes back from disk."""
    with TemporaryDirectory() as folder:
        edit.fold(model).save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        return interp.load(folder, dtype=model.original_model.dtype)


def said_of(methods: pd.DataFrame) -> list[str]:
    found = []
    for task, rows in methods.groupby("task", sort=False):
        by = rows.set_index("method")
        ours, plain = by.loc["LoFiT"], by.loc[UNEDITED]
        beside = [
            f"{method} {row['value']:.2f} (LoFiT ahead by {row['lead_low']:+.2f} to "
            f"{row['lead_high']:+.2f})"
            for method, row in by.drop(["LoFiT", UNEDITED]).iterrows()
        ]
        learned_it = float(plain["lead_low"]) > 0
        verdict = "learned" if learned_it else "NOT learned beyond chance variation"
        found.append(
            f"{task}: {verdict}: {plain['value']:.2f} -> {ours['value']:.2f} [{ours['low']:.2f}, "
            f"{ours['high']:.2f}] with {ours['parameters']:.0f} numbers; {'; '.join(beside)}"
        )
    return found


def said_of_transfer(transfer: HeadTransfer) -> list[str]:
    rows = transfer.differences
    rows = rows[(rows["metric"] == "accuracy") & ~rows["heads"].isin([UNEDITED])]
    return [
        f"{row.task} on heads of {row.heads}: {row.value:+.2f} [{row.low:+.2f}, {row.high:+.2f}] "
        "beside its own"
        for row in rows.itertuples()
    ]


def chosen_heads(transfer: HeadTransfer) -> pd.DataFrame:
    """Which heads each cell learned on: `heads, task, seed, layer, head`."""
    rows = [
        {"heads": name, "task": task, "seed": seed, "layer": head.layer, "head": head.head}
        for (name, task, seed), heads in transfer.chosen.items()
        for head in heads
    ]
    return pd.DataFrame(rows)


def said_of_heads(transfer: HeadTransfer, n_all: int) -> str:
    """How many of the chosen heads two tasks, and two seeds of a task, have in common."""
    own = {(t, seed): set(h) for (name, t, seed), h in transfer.chosen.items() if name == t}
    shared = defaultdict(list)
    for (one, seed), (other, another) in combinations(own, 2):
        if one == other:
            shared[f"two seeds of {one}"].append(own[one, seed] & own[other, another])
        elif seed == another:
            shared[f"{one} and {other}"].append(own[one, seed] & own[other, another])
    k = len(next(iter(own.values())))
    means = [f"{who} {np.mean([len(s) for s in sets]):.1f}" for who, sets in shared.items()]
    return (
        f"{k} of {n_all} heads; in common: {'; '.join(means) or 'nothing to compare'}; by chance "
        f"{k * k / n_all:.1f}"
    )


def arguments() -> argparse.Namespace:
    def numbers(kind: type) -> Callable[[str], list]:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/lofit"))
    parser.add_argument("--tasks", default="letters,colours", help="; ".join(TASKS))
    parser.add_argument("--k", type=float, default=0.1, help="share of heads")
    parser.add_argument("--seeds", type=numbers(int), default=[0, 1, 2])
    parser.add_argument("--n-train", type=int, default=64)
    parser.add_argument("--n-validation", type=int, default=32)
    parser.add_argument("--n-test", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rates", type=numbers(float), default=[0.01, 0.05], help="of LoFiT")
    parser.add_argument("--lora-rates", type=numbers(float), default=[1e-3, 4e-3])
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", help="of the model; offsets are float32")
    args = parser.parse_args()
    args.tasks = [name.strip() for name in args.tasks.split(",")]
    unknown = sorted(set(args.tasks) - set(TASKS))
    if unknown:
        parser.error(f"--tasks: no {unknown[0]!r}; there are {'; '.join(TASKS)}.")
    return args


if __name__ == "__main__":
    main()
