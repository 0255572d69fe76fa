"""What every token receives, in every layer and head, at 8K tokens: at most 1.6x an SDPA forward,
and memory that grows with the number of tokens, not with its square.

The peer is Hugging Face's forward with SDPA, which tells nothing of attention: what one would call
otherwise (`output_attentions=True`, eager) needs 2.4 GB a layer there, so that it only serves to
check the numbers, at a shorter length. Memory is the peak of a process of its own beyond what it
had when the model was loaded.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.models import DEVICE, about, hooked, last_logits, plain, random_tokens, smollm2
from benchmarks.timing import ratio
from interp.model.attention import Attention
from interp.model.hooked import HookedModel

ROOT = Path(__file__).parents[1]
STATUS = Path("/proc/self/status")


def run(quick: bool) -> Iterator[dict]:
    """8K tokens, memory at 2K, 4K and 8K; quick: 512, memory at 256 and 512."""
    n_layers = 2 if quick else 6
    n_tokens, repeats = (512, 3) if quick else (8192, 7)
    for record in measure(smollm2(n_layers), n_tokens, repeats):
        yield record | {"model": about(n_layers)}
    if STATUS.exists():  # Linux
        lengths = [256, 512] if quick else [2048, 4096, 8192]
        yield memory(smollm2(2), lengths) | {"model": about(2)}


def measure(folder: Path, n_tokens: int, repeats: int) -> Iterator[dict]:
    """The statistics are checked first, then both sides give the same logits."""
    ours, peer = hooked(folder), plain(folder)
    check(ours, folder, min(n_tokens, 1024))
    tokens = random_tokens(peer, n_tokens)
    yield ratio(
        partial(logits_and_sinks, ours, tokens),
        partial(last_logits, peer, tokens),
        repeats=repeats,
        atol=1e-3,
        benchmark="sinks",
        case=f"mass received, all layers / plain SDPA, {n_tokens} tokens",
        goal="<= 1.6",
    )


def logits_and_sinks(model: HookedModel, tokens: Int[Tensor, "1 token"]) -> Tensor:
    """A forward pass in which every layer's statistics are taken; its logits."""
    received = []

    def look(attention: Attention, hook) -> None:
        received.append(attention.mass_received())

    names = [f"blocks.{layer}.attn.hook_attention" for layer in model.attention_layers]
    with model.hooks(fwd_hooks=[(name, look) for name in names]):
        return last_logits(model, tokens)


def check(model: HookedModel, folder: Path, n_tokens: int) -> None:
    """Raises `AssertionError` where mass received is not that of eager patterns."""
    tokens = random_tokens(model, n_tokens)
    fast = model.read_attention(tokens, Attention.mass_received)
    torch.testing.assert_close(fast, received_by_hand(folder, tokens), atol=1e-5, rtol=0)


@torch.no_grad()
def received_by_hand(
    folder: Path, tokens: Int[Tensor, "1 token"]
) -> Float[Tensor, "1 layer head key"]:
    """Column sums of Hugging Face's eager patterns, over the queries that may see each key."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    patterns = model.to(DEVICE)(tokens, use_cache=False, output_attentions=True).attentions
    queries = torch.arange(tokens.shape[1], 0, -1, device=DEVICE)
    return torch.stack([pattern.sum(2) / queries for pattern in patterns], dim=1)


def memory(folder: Path, lengths: list[int]) -> dict:
    """Peak memory at the longest length over that at the shortest: n would give their quotient."""
    peaks = {side: [peak(folder, side, n) for n in lengths] for side in ("sinks", "plain")}
    longer = lengths[-1] // lengths[0]
    return {
        "benchmark": "sinks",
        "case": f"peak memory of the pass, {lengths[-1]} / {lengths[0]} tokens",
        "goal": f"about {longer} (linear), not {longer**2} (quadratic)",
        "ratio": peaks["sinks"][-1] / peaks["sinks"][0],
        "tokens": lengths,
        "sinks_mb": peaks["sinks"],
        "plain_mb": peaks["plain"],
    }


def peak(folder: Path, side: str, n_tokens: int) -> float:
    """MB that a pass takes at most beyond the loaded model, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.sinks", str(folder), side, str(n_tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def measure_peak(folder: Path, side: str, n_tokens: int) -> float:
    """What `peak` runs in its process."""
    model = hooked(folder) if side == "sinks" else plain(folder)
    one_pass = logits_and_sinks if side == "sinks" else last_logits
    one_pass(model, random_tokens(model, 16))  # whatever is loaded at the first call
    before = resident("VmRSS")
    one_pass(model, random_tokens(model, n_tokens))
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """A line of /proc/self/status in MB. (`ru_maxrss` would begin with the parent's peak.)"""
    return int(re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())[1]) / 1024


if __name__ == "__main__":
    print(json.dumps(measure_peak(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
