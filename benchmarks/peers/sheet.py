"""What all sides share: prompts to read, and where to put answers and seconds.

Nothing of interp and nothing but torch, so that it runs in the other libraries' environments.
"""

import json
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

NAMES = ("clean", "corrupted", "answers")


def read_pairs(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean and corrupted tokens [pair, token], and right and wrong answers [pair, 2]."""
    pairs = json.loads((folder / "pairs.json").read_text())
    clean, corrupted, answers = (torch.tensor(pairs[name]) for name in NAMES)
    return clean, corrupted, answers


def mean_logit_diff(logits: torch.Tensor, answers: torch.Tensor) -> float:
    """Mean over pairs of the right answer's logit minus the wrong one's; logits [pair, word]."""
    right, wrong = logits.gather(1, answers).unbind(1)
    return float((right - wrong).mean())


def note(
    folder: Path, library: str, how: str, sweep: Callable[[], list], warm_up: Callable[[], object]
) -> None:
    """Time `sweep`, which gives values [layer][head], after `warm_up`; append both to a file."""
    # nnsight runs with more threads than OMP_NUM_THREADS allows
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    with torch.no_grad():
        warm_up()
        clock, cpu = time.perf_counter(), time.process_time()
        values = sweep()
        clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    row = {"library": library, "version": version(library), "how": how, "values": values}
    row |= {"seconds": clock, "cpu": cpu, "threads": torch.get_num_threads()}
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{library} {row['version']}, {how}: {clock:.1f} s, {cpu:.1f} s of CPU")
