"""Runs the benchmarks and prints a table: `python -m benchmarks [NAME ...] [--quick] [--out FILE]`.

`--out` keeps all that was measured, one JSON object a line.
"""

import argparse
import json
import platform
from importlib import import_module
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.timing import HEADER, line
from interp.provenance import versions

NAMES = (
    "forward",
    "one_layer",
    "sinks",
    "retrieval",
    "patching",
    "offsets",
    "act",
    "vision",
    "large",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(NAMES)}; default all")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all?")
    parser.add_argument("--out", type=Path, help="file for JSON lines")
    parser.add_argument("--threads", type=int, help="threads of torch")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"{sorted(unknown)[0]!r}: one of {', '.join(NAMES)}.")
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    machine = {"machine": platform.machine(), "versions": versions()}
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n{HEADER}", flush=True)
    lines = []
    for name in args.names or NAMES:
        for record in import_module(f"benchmarks.{name}").run(args.quick):
            print(line(record), flush=True)
            lines.append(json.dumps(record | machine))
            if args.out:  # after each, so that a run that is stopped leaves what it has
                args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
