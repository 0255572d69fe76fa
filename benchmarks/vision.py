"""Captions under an edit that reads the image: the goal is that VHR, its heads once chosen, takes
at most 1.05x the plain model's time, and VAR 1.15x.

Beside them stand the hooked model without an edit, and VHR with its choice of heads, which takes a
pass without the image for each prompt. So that both sides write the same when they are timed, VHR
scales by a millionth more than 1 and VAR moves a millionth, which is as much work as any other
number; that both move logits at their own strength is checked before.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

import interp
from benchmarks.models import DEVICE, last_logits, written
from benchmarks.timing import ratio
from interp import zoo
from interp.intervention.base import Intervention
from interp.intervention.var import VAR
from interp.intervention.vhr import VHR
from interp.model.assembled import assemble
from interp.model.hooked import HookedModel
from interp.model.images import images_of

LITTLE = 1e-6


def run(quick: bool) -> Iterator[dict]:
    """64 tokens of a caption by shapes-llava; quick, or without SmolLM2: 8 by mini-llava."""
    small = quick or not zoo.SMOLLM2.installed
    name, n_new, repeats = ("mini-llava", 8, 3) if small else ("shapes-llava", 64, 9)
    for record in measure(name, n_new, repeats):
        yield record | {"model": f"{name}, float32"}


def measure(name: str, n_new: int, repeats: int) -> Iterator[dict]:
    """Each edit's generation / the plain model's."""
    ours, peer = interp.load(name, dtype=torch.float32, device=DEVICE), plain(name)
    prompts = interp.tasks.scenes(ours, 1, questions=("caption",))
    batch = ours.batch(prompts["input_ids"], images=images_of(prompts))
    tokens, inputs = batch.input_ids, batch.inputs
    vhr, var = VHR(), VAR(largest(ours, tokens, inputs), require_visual_sink=False)
    table = vhr.choices(ours, prompts)
    chosen = [(row.layer, row.head) for row in table[table["chosen"]].itertuples()]
    for edit in (vhr, var):
        check_it_acts(ours, edit, tokens, inputs)
    cases: dict[str, tuple[Intervention | None, str]] = {
        "hooked, no edit": (None, ""),
        "VHR, heads chosen before": (VHR(1 + LITTLE, heads=chosen), "<= 1.05"),
        "VHR": (replace(vhr, alpha=1 + LITTLE), ""),
        "VAR": (replace(var, moved=LITTLE), "<= 1.15"),
    }
    for case, (edit, goal) in cases.items():
        yield ratio(
            partial(written, ours, tokens, n_new, edit, **inputs),
            partial(written, peer, tokens, n_new, **inputs),
            repeats=repeats,
            benchmark="vision",
            case=f"caption, {case} / plain SDPA, {tokens.shape[1]} + {n_new} tokens",
            goal=goal,
        )


def plain(name: str) -> nn.Module:
    """Hugging Face's model with SDPA: what runs where nobody looks."""
    folder = zoo.EMBEDDED / name
    if behind := zoo.language_model_of(folder):
        model = assemble(folder, zoo.get(behind), torch.float32).model
    else:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.set_attn_implementation("sdpa")
    return model.to(DEVICE).eval()


def largest(model: HookedModel, tokens: Tensor, inputs: dict[str, Tensor]) -> list[int]:
    """The dimension in which some token's stream is largest: it takes it for a sink."""
    found: list[Tensor] = []
    middle = f"blocks.{len(model.blocks) // 2}.hook_resid_pre"
    with model.hooks(fwd_hooks=[(middle, lambda value, hook: found.append(value))]):
        model.run(tokens, **inputs)
    return [int(found[0].abs().amax((0, 1)).argmax())]


def check_it_acts(
    model: HookedModel, edit: Intervention, tokens: Tensor, inputs: dict[str, Tensor]
) -> None:
    """Raises `AssertionError` where the edit changes nothing."""
    before = last_logits(model, tokens, **inputs)
    with model.intervene(edit):
        moved = float((last_logits(model, tokens, **inputs) - before).abs().max())
    assert moved > 1e-3, f"{edit!r} moved no logit by more than {moved:.1e}"
