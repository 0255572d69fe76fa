"""Exact activation patching of all heads takes a third of the time of one run a cell, or less, and
of the residual stream by layer and position a fifth; the numbers are the same.

The peer is `transformer_lens.patching`, which runs the whole model once a cell: on our model, which
is a TransformerBridge, or on TransformerLens' own eager one, whichever is faster here (the record
says which). Both sides run the clean prompts too.

Pairs that differ from the first token on leave no prefix to be passed over; those that differ in
one token (as in IOI, where the second mention of a name is another one) leave most of it. Memory is
the peak of a process of its own beyond what it had when the model was loaded.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import interp
from benchmarks.models import (
    DEVICE,
    FOLDERS,
    about,
    eager_bridge,
    hooked,
    last_logits,
    random_tokens,
    smollm2,
)
from benchmarks.sinks import ROOT, STATUS, resident
from benchmarks.timing import elapsed, ratio
from interp import zoo
from interp.analysis.patching.activation import activation_patching
from interp.model.hooked import HookedModel

N_PAIRS, N_TOKENS = 8, 16
ONE_TOKEN = 11  # where pairs that differ in one token do

# A random GPT-2's heads say next to nothing. With weights this much larger, to patch one moves the
# logit difference by 0.1 (median) to 3, where pairs differ throughout.
SCALE = 3.0


@dataclass(frozen=True)
class Sweep:
    """The same cells, as we name them and as TransformerLens does."""

    case: str
    site: str
    by: tuple[str, str]
    theirs: Callable[..., Any]
    goal: str


SWEEPS = {
    sweep.site: sweep
    for sweep in (
        Sweep(
            "heads", "z", ("layer", "head"), patching.get_act_patch_attn_head_out_all_pos, ">= 3"
        ),
        Sweep(
            "resid_pre by position", "resid_pre", ("layer", "position"),
            patching.get_act_patch_resid_pre, ">= 5",
        ),
    )
}  # fmt: skip


def run(quick: bool) -> Iterator[dict]:
    """GPT-2 small's shape, then SmolLM2-135M, and memory there; quick: 2 layers of it."""
    if quick:
        models = {smollm2(2): (about(2), 3)}
    else:
        models = {gpt2_small(): ("random weights in GPT-2 small's shape, float32", 3)}
        models[smollm2(30)] = (about(30), 2)
    for folder, (words, repeats) in models.items():
        # by position, one run a cell takes SmolLM2 minutes a sweep
        sweeps = ["z"] if folder == smollm2(30) else list(SWEEPS)
        for record in measure(folder, repeats, sweeps=sweeps):
            yield record | {"model": words}
    if STATUS.exists():  # Linux
        yield memory(folder) | {"model": words}


def measure(
    folder: Path, repeats: int, n_tokens: int = N_TOKENS, sweeps: Sequence[str] = tuple(SWEEPS)
) -> Iterator[dict]:
    """TransformerLens / ours, for each sweep and both kinds of pairs."""
    ours = hooked(folder)
    peer_is, peer = faster({"hooked model": ours, "eager bridge": eager_bridge(folder)}, n_tokens)
    cases = {
        "differ throughout": random_pairs(ours, n_tokens, slice(None)),
        "differ in one token": random_pairs(ours, n_tokens, slice(ONE_TOKEN, ONE_TOKEN + 1)),
    }
    for sweep in map(SWEEPS.__getitem__, sweeps):
        for case, pairs in cases.items():
            yield ratio(
                partial(one_run_a_cell, peer, pairs, sweep),
                partial(by_replay, ours, pairs, sweep),
                repeats=repeats,
                atol=1e-3,
                benchmark="patching",
                case=f"TransformerLens / {sweep.case}, pairs {case}",
                goal=sweep.goal,
                peer=peer_is,
            )


def by_replay(model: HookedModel, pairs: Dataset, sweep: Sweep) -> Float[Tensor, "layer cell"]:
    """Ours: the mean logit difference under each patch."""
    found = activation_patching(model, pairs, sweep.site, sweep.by, progress=False)
    return torch.as_tensor(found.values.mean(0)).float().view(len(model.blocks), -1)


@torch.no_grad()
def one_run_a_cell(
    model: TransformerBridge, pairs: Dataset, sweep: Sweep
) -> Float[Tensor, "layer cell"]:
    """TransformerLens': the same."""
    clean, corrupted, answers = (
        torch.tensor(list(pairs[name]), device=DEVICE)
        for name in ("clean_input_ids", "corrupted_input_ids", "answers")
    )

    def mean_logit_diff(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, ""]:
        right, wrong = logits[:, -1].gather(1, answers).unbind(1)
        return (right - wrong).mean()

    _, clean_cache = model.run_with_cache(
        clean, names_filter=lambda name: name.endswith(f"hook_{sweep.site}")
    )
    return sweep.theirs(model, corrupted, clean_cache, mean_logit_diff).cpu()


@torch.no_grad()
def faster(models: dict[str, TransformerBridge], n_tokens: int) -> tuple[str, TransformerBridge]:
    """The model that takes less time for what TransformerLens does in each cell."""

    def once(model: TransformerBridge, tokens: Tensor) -> float:
        hook = ("blocks.0.attn.hook_z", lambda value, hook: value)
        return elapsed(lambda: model.run_with_hooks(tokens, fwd_hooks=[hook]))[0]

    seconds = {}
    for name, model in models.items():
        tokens = random_tokens(model, N_PAIRS * n_tokens).view(N_PAIRS, n_tokens)
        seconds[name] = min(once(model, tokens) for _ in range(4))
    name = min(seconds, key=seconds.__getitem__)
    return name, models[name]


def random_pairs(model: HookedModel, n_tokens: int, apart: slice) -> Dataset:
    """Prompts of random tokens, which differ in the columns `apart`, and random answers."""
    generator = torch.Generator().manual_seed(0)
    n_words = int(model.cfg.d_vocab)
    clean, other = torch.randint(4, n_words, (2, N_PAIRS, n_tokens), generator=generator)
    other = torch.where(other == clean, (other - 3) % (n_words - 4) + 4, other)
    corrupted = clean.clone()
    corrupted[:, apart] = other[:, apart]
    answers = torch.stack(
        [torch.randperm(n_words - 4, generator=generator)[:2] + 4 for _ in range(N_PAIRS)]
    )
    return interp.tasks.pairs(model, clean, corrupted, answers=answers)


@cache
def gpt2_small() -> Path:
    """A folder with a random GPT-2 of the small one's shape: 12 x 12 heads, 50,257 tokens."""
    folder = Path(FOLDERS.name) / "gpt2-small"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(SCALE)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(zoo.EMBEDDED / "mini-llama").save_pretrained(folder)
    return folder


def memory(folder: Path, n_tokens: int = N_TOKENS) -> dict:
    """Peak memory of our sweep of heads over that of TransformerLens on the same model."""
    peaks = {side: peak(folder, side, n_tokens) for side in ("ours", "peer")}
    return {
        "benchmark": "patching",
        "case": "peak memory of heads, ours / TransformerLens",
        "goal": "",
        "ratio": peaks["ours"] / peaks["peer"],
        "ours_mb": peaks["ours"],
        "peer_mb": peaks["peer"],
    }


def peak(folder: Path, side: str, n_tokens: int) -> float:
    """MB that a sweep takes at most beyond the loaded model, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.patching", str(folder), side, str(n_tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def measure_peak(folder: Path, side: str, n_tokens: int) -> float:
    """What `peak` runs in its process."""
    model = hooked(folder)
    last_logits(model, random_tokens(model, n_tokens))  # whatever is loaded at the first call
    pairs = random_pairs(model, n_tokens, slice(None))
    before = resident("VmRSS")
    {"ours": by_replay, "peer": one_run_a_cell}[side](model, pairs, SWEEPS["z"])
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps(measure_peak(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
