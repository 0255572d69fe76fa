"""A push should cost next to nothing, folded offsets nothing: the goal is that ITI's generation
takes at most 1.03x the plain model's time, a forward pass of a LoFiT folded into the weights 1.00x.

ITI pushes a twentieth of the heads, as its authors have it, at the prompt's last token and every
generated one. Beside it stands the hooked model without an edit. So that both sides say the same
when they are timed, strengths are 0 there, which is as much work as any other number; that the push
moves logits at strength 15, and that the folded model is the edited one, is checked before.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.models import about, hooked, last_logits, plain, random_tokens, smollm2, written
from benchmarks.timing import ratio
from interp.heads import Head
from interp.intervention.iti import ITI
from interp.intervention.lofit import LoFiT
from interp.model.hooked import HookedModel


def run(quick: bool) -> Iterator[dict]:
    """256 tokens of prompt and 64 written, all 30 layers; quick: 32 and 8, 2 layers."""
    n_layers, n_tokens, n_new, repeats = (2, 32, 8, 3) if quick else (30, 256, 64, 9)
    for record in measure(smollm2(n_layers), n_tokens, n_new, repeats):
        yield record | {"model": about(n_layers)}


def measure(folder: Path, n_tokens: int, n_new: int, repeats: int) -> Iterator[dict]:
    """ITI / plain generation; hooked without edits / plain; folded / plain forward."""
    ours, peer = hooked(folder), plain(folder)
    tokens = random_tokens(peer, n_tokens)
    push = pushes(ours)
    check_it_acts(ours, push, tokens)
    none = replace(push, strength=0.0)
    heads = f"{len(push.heads)} heads, {n_tokens} + {n_new} tokens"
    cases = {
        f"ITI / plain SDPA, {heads}": (none, "<= 1.03"),
        f"hooked, no edit / plain SDPA, {n_tokens} + {n_new} tokens": ([], ""),
    }
    for case, (edit, goal) in cases.items():
        yield ratio(
            partial(written, ours, tokens, n_new, edit),
            partial(written, peer, tokens, n_new),
            repeats=repeats,
            benchmark="offsets",
            case=f"generation, {case}",
            goal=goal,
        )
    edit = LoFiT(push.heads, torch.randn(len(push.heads), ours.cfg.d_head))
    check_fold(ours, edit, tokens)
    yield ratio(
        partial(last_logits, replace(edit, strength=0.0).fold(ours), tokens),
        partial(last_logits, peer, tokens),
        repeats=repeats,
        benchmark="offsets",
        case=f"forward, folded LoFiT / plain SDPA, {n_tokens} tokens",
        goal="1.00",
    )


def pushes(model: HookedModel) -> ITI:
    """Random directions for a twentieth of the heads, spread over layers."""
    n = model.cfg.n_layers * model.cfg.n_heads
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(0))[: max(1, round(n / 20))]
    heads = [Head(*divmod(int(i), model.cfg.n_heads)) for i in chosen]
    generator = torch.Generator().manual_seed(1)
    directions = normalize(torch.randn(len(heads), model.cfg.d_head, generator=generator))
    return ITI(heads, directions, torch.full((len(heads),), 0.1))


def check_it_acts(model: HookedModel, push: ITI, tokens: Int[Tensor, "1 token"]) -> None:
    """Raises `AssertionError` where the push changes nothing."""
    before = last_logits(model, tokens)
    with model.intervene(push):
        moved = float((last_logits(model, tokens) - before).abs().max())
    assert moved > 1e-3, f"the push moved no logit by more than {moved:.1e}"


def check_fold(model: HookedModel, edit: LoFiT, tokens: Int[Tensor, "1 token"]) -> None:
    """Raises `AssertionError` where the folded model says something else than the edited one."""
    with model.intervene(edit):
        expected = last_logits(model, tokens)
    torch.testing.assert_close(last_logits(edit.fold(model), tokens), expected, atol=1e-3, rtol=0)
    moved = float((expected - last_logits(model, tokens)).abs().max())
    assert moved > 1e-2, f"the offsets moved no logit by more than {moved:.1e}"
