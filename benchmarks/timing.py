"""Two ways to the same answer, timed in turn in one process: ratios, not seconds.

Clock time is what a user waits for. CPU time (of all threads) is less disturbed by other work on
the machine; where the two ratios disagree, something else was running.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def ratio(
    top: Callable[[], Tensor],
    bottom: Callable[[], Tensor],
    *,
    repeats: int = 9,
    atol: float = 1e-4,
    agree: Callable[[Tensor, Tensor], None] | None = None,
    **about,
) -> dict:
    """Median and quartiles of the time of `top` over that of `bottom`, by the clock and in CPU.

    Raises `AssertionError` where the two give different tensors (more than `atol` apart), or
    whatever `agree` raises, where the two are asked in ways that need not give the same.
    """
    answer, same = top(), bottom()  # also warms up both
    (agree or partial(torch.testing.assert_close, atol=atol, rtol=0))(answer, same)
    seconds = {"top": [], "bottom": []}
    for repeat in range(repeats):
        turn = [("top", top), ("bottom", bottom)]
        for name, call in turn if repeat % 2 else reversed(turn):
            seconds[name].append(elapsed(call))
    pairs = list(zip(seconds["top"], seconds["bottom"], strict=True))
    return about | {
        **quartiles("ratio", [a[0] / b[0] for a, b in pairs]),
        **quartiles("cpu", [a[1] / b[1] for a, b in pairs]),
        "seconds": [statistics.median(s for s, _ in seconds[name]) for name in ("top", "bottom")],
        "largest_difference": float((answer - same).abs().max()),
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }


def elapsed(call: Callable[[], object]) -> tuple[float, float]:
    """(clock, CPU) seconds of one call."""
    settle()
    clock, cpu = time.perf_counter(), time.process_time()
    call()
    settle()
    return time.perf_counter() - clock, time.process_time() - cpu


def settle() -> None:
    """Wait for what was only queued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quartiles(name: str, samples: list[float]) -> dict[str, float]:
    """`name` is the median; `name_low` and `name_high` are the quartiles, within the samples."""
    low, mid, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {name: mid, f"{name}_low": low, f"{name}_high": high}


def line(record: dict) -> str:
    """One row of the table that people read."""

    def shown(name: str) -> str:
        if name not in record:
            return "-"
        low, high = record.get(f"{name}_low"), record.get(f"{name}_high")
        spread = "" if low is None else f" ({low:.2f}-{high:.2f})"
        return f"{record[name]:.2f}x{spread}"

    case = f"{record['benchmark']}: {record['case']}"
    return f"{case:<74}  {shown('ratio'):<20}  {shown('cpu'):<20}  {record.get('goal', '')}"


HEADER = f"{'time of / time of':<74}  {'by the clock':<20}  {'CPU time':<20}  goal"
