"""Our side of the comparison with other libraries: `python -m benchmarks.peers FOLDER STEP`.

    prepare           write the model (gpt2, smollm2, or a folder) and the prompts of all sides
    interp            our sweep; as every side it appends to FOLDER/results.jsonl
    transformer-lens  the same by TransformerLens, on our model
    compare           median time of each side, and over ours; never of different answers

The other libraries' sides are scripts of this folder; its README.md says how to run them.
"""

import argparse
import json
import shutil
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset

from benchmarks.models import hooked, smollm2
from benchmarks.patching import (
    N_TOKENS,
    SWEEPS,
    by_replay,
    gpt2_small,
    one_run_a_cell,
    random_pairs,
)
from benchmarks.peers.sheet import note
from interp.analysis.patching.activation import activation_patching

MODELS = {"gpt2": gpt2_small, "smollm2": partial(smollm2, 30)}
SIDES = {
    "interp": (by_replay, "replay"),
    "transformer-lens": (one_run_a_cell, "one run a head, on our model"),
}
COLUMNS = {
    "clean_input_ids": "clean",
    "corrupted_input_ids": "corrupted",
    "answers": "answers",
}
APART = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("step", choices=["prepare", *SIDES, "compare"])
    parser.add_argument("--model", default="gpt2", help="prepare: gpt2, smollm2, or a folder")
    args = parser.parse_args()
    if args.step == "prepare":
        prepare(args.folder, MODELS[args.model]() if args.model in MODELS else Path(args.model))
    elif args.step == "compare":
        print(compare(args.folder).to_string(index=False))
    else:
        measure(args.folder, args.step)


def prepare(folder: Path, model: Path, n_tokens: int = N_TOKENS) -> None:
    """Pairs that differ throughout, so that we have no prefix to pass over."""
    shutil.copytree(model, folder / "model", dirs_exist_ok=True)
    pairs = random_pairs(hooked(model), n_tokens, slice(None))
    sheet = {name: list(pairs[column]) for column, name in COLUMNS.items()}
    (folder / "pairs.json").write_text(json.dumps(sheet), encoding="utf-8")
    (folder / "results.jsonl").unlink(missing_ok=True)


def measure(folder: Path, side: str) -> None:
    """One of our two sides."""
    model = hooked(folder / "model")
    sheet = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    pairs = Dataset.from_dict({column: sheet[name] for column, name in COLUMNS.items()})
    sweep, how = SIDES[side]
    note(
        folder,
        side,
        how,
        lambda: sweep(model, pairs, SWEEPS["z"]).tolist(),
        lambda: activation_patching(model, pairs, layers=[0], progress=False),
    )


def compare(folder: Path) -> pd.DataFrame:
    """One row a side. Raises `AssertionError` where answers or numbers of threads differ."""
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    ours = next(torch.tensor(row["values"]) for row in rows if row["library"] == "interp")
    for row in rows:
        same = torch.tensor(row.pop("values"))
        row["apart"] = float((same - ours).abs().max())
        assert row["apart"] <= APART, f"other answers than ours: {row}"
    assert len({row["threads"] for row in rows}) == 1, "set OMP_NUM_THREADS alike for all sides"
    table = pd.DataFrame(rows).groupby(["library", "version", "how", "threads"], sort=False)
    table = table.agg(
        runs=("seconds", "size"), seconds=("seconds", "median"), cpu=("cpu", "median"),
        apart=("apart", "max"),
    ).reset_index()  # fmt: skip
    own = table[table["library"] == "interp"].iloc[0]
    return table.assign(ratio=table["seconds"] / own.seconds, cpu_ratio=table["cpu"] / own.cpu)


if __name__ == "__main__":
    main()
