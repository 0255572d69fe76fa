"""Learning a vector for each of some heads, by gradients through what the heads say.

`scaling_norms` and `learned_offsets` are the two stages of LoFiT (see `interp.intervention.lofit`);
both leave the model as it is, and give no weight of it a gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from interp.evaluation import prepared
from interp.heads import Head, HeadScores
from interp.intervention.base import Hook
from interp.intervention.descent import CHECKPOINT, Tuning, TuningError, descend
from interp.intervention.objectives import Kind, Objective, objective_of
from interp.intervention.offsets import for_all_heads, rows_by_layer
from interp.model.hooked import HookedModel
from interp.runs import Run
from interp.tasks.continuations import answers_of
from interp.tasks.prompts import as_prompts, describe

HooksOf = Callable[[Tensor], list[Hook]]


@dataclass(frozen=True, eq=False)
class Lesson:
    """What is learned from: prompts with answers, and others that say when to stop.

    `validation` may be a data set, or a share of the prompts that is then held out (drawn by
    `seed`); None learns from all prompts and keeps the last epoch. `beta` is the preferences'.
    """

    prompts: Any
    validation: Any = 0.2
    objective: Kind = "answers"
    beta: float = 0.5
    seed: int = 0

    def split(self, model: HookedModel) -> tuple[Dataset, Dataset | None]:
        """Prompts to learn from, and those held out. Raises `TuningError` where none are left."""
        prompts = prepared(model, as_prompts(model, self.prompts))
        answers_of(prompts)  # before it is counted how many there are
        if self.validation is None:
            return prompts, None
        if not isinstance(self.validation, float):
            return prompts, prepared(model, as_prompts(model, self.validation))
        n = round(self.validation * len(prompts))
        if not 0 < n < len(prompts):
            raise TuningError(
                f"validation={self.validation}: {n} of {len(prompts)} prompts; give a share that "
                "leaves some on both sides, other prompts, or None."
            )
        order = np.random.default_rng(self.seed).permutation(len(prompts))
        held, kept = sorted(order[:n].tolist()), sorted(order[n:].tolist())
        return prompts.select(kept), prompts.select(held)


@dataclass(frozen=True)
class Keeping:
    """Where a descent keeps its checkpoints, and whether it shows how far it is."""

    out: str | Path | None = None
    resume: bool = True
    progress: bool = True

    def within(self, name: str) -> "Keeping":
        """The same, one folder down."""
        out = None if self.out is None else Path(self.out) / name
        return Keeping(out, self.resume, self.progress)


def scaling_norms(
    model: HookedModel, lesson: Lesson, tuning: Tuning, keeping: Keeping = Keeping()
) -> HeadScores:
    """The norm of each head's learned scaling, as scores. Its folder keeps `heads.parquet`."""
    layers = model.attention_layers
    shape = (len(layers), model.cfg.n_heads, model.cfg.d_head)

    def hooks(scaling: Tensor) -> list[Hook]:
        return [
            (f"blocks.{layer}.attn.hook_z", partial(_scaled, scaling, row))
            for row, layer in enumerate(layers)
        ]

    about = {"analysis": "lofit_heads"}
    scaling, settings = _learn(model, lesson, tuning, shape, hooks, about, keeping)
    norms = scaling.norm(dim=-1).cpu()
    scores = HeadScores.from_samples(norms[None], layers=layers, **settings)
    if keeping.out is not None:
        scores.save(Path(keeping.out) / "heads.parquet")
    return scores


def learned_offsets(
    model: HookedModel,
    heads: Sequence[Head],
    lesson: Lesson,
    tuning: Tuning,
    keeping: Keeping = Keeping(),
) -> Float[Tensor, "head d_head"]:
    """What each of `heads` (sorted) should say more; on the CPU."""
    model.check_heads(heads)
    if not heads:
        raise TuningError("heads: none, so there is nothing to learn; name at least one.")

    def hooks(offsets: Tensor) -> list[Hook]:
        def add(rows: list[int], chosen: list[int], z: Tensor, hook) -> Tensor:
            # float32 where z is bf16: the sum of a vector's gradients over tokens needs it
            return (z + for_all_heads(model, chosen, offsets[rows])).to(z.dtype)

        return [
            (f"blocks.{layer}.attn.hook_z", partial(add, rows, chosen))
            for layer, (rows, chosen) in rows_by_layer(heads).items()
        ]

    about = {"analysis": "lofit_offsets", "heads": [str(head) for head in heads]}
    shape = (len(heads), model.cfg.d_head)
    return _learn(model, lesson, tuning, shape, hooks, about, keeping)[0].cpu()


@contextmanager
def frozen(model: HookedModel) -> Iterator[None]:
    """Gradients on, but for no weight of the model, so that passes keep nothing on their account.

    Raises `TuningError` in training mode, or inside `torch.inference_mode()`.
    """
    if torch.is_inference_mode_enabled():
        raise TuningError("inside torch.inference_mode() nothing can be learned; leave it.")
    if model.original_model.training:
        raise TuningError(
            f"{model.name} is in training mode, where dropout makes each pass another one; call "
            "model.eval() first."
        )
    weights = [p for p in model.original_model.parameters() if p.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def _learn(
    model: HookedModel,
    lesson: Lesson,
    tuning: Tuning,
    shape: tuple[int, ...],
    hooks: HooksOf,
    about: dict[str, Any],
    keeping: Keeping,
) -> tuple[Tensor, dict[str, Any]]:
    """Learned numbers of `shape`, which `hooks` puts to use; and all that they depend on."""
    train, held = lesson.split(model)
    settings = {
        **about,
        "objective": lesson.objective,
        "seed": lesson.seed,
        "tuning": asdict(tuning),
        "task": describe(train),
        "validation": None if held is None else describe(held),
        **model.provenance(),
    }
    if lesson.objective == "preferences":
        settings["beta"] = lesson.beta
    run = _open(keeping, settings)
    objective, others = (
        None if data is None else _objective(model, data, lesson, tuning) for data in (train, held)
    )
    learned = tuning.start(*shape, seed=lesson.seed, device=model.cfg.device)
    with frozen(model), model.hooks(fwd_hooks=hooks(learned)):
        history = descend(
            [learned],
            objective,
            len(train),
            tuning,
            seed=lesson.seed,
            held_out=None if others is None else partial(others.mean, tuning.batch_size),
            run=run,
            desc=about["analysis"].replace("_", " ") if keeping.progress else None,
        )
    if run is not None:
        history.to_parquet(run.folder / "history.parquet", index=False)
        run.finish(prompts=len(train), epochs=len(history))
    return learned.detach(), settings


def _objective(model: HookedModel, data: Dataset, lesson: Lesson, tuning: Tuning) -> Objective:
    return objective_of(
        lesson.objective, model, data, beta=lesson.beta, batch_size=tuning.batch_size
    )


def _open(keeping: Keeping, settings: dict[str, Any]) -> Run | None:
    if keeping.out is None:
        return None
    run = Run.open(keeping.out, settings, keeping.resume)
    if not keeping.resume:
        (run.folder / CHECKPOINT).unlink(missing_ok=True)
    return run


def _scaled(
    scaling: Float[Tensor, "layer head d_head"],
    row: int,
    z: Float[Tensor, "batch pos head d_head"],
    hook,
) -> Float[Tensor, "batch pos head d_head"]:
    return (z * (1 + scaling[row])).to(z.dtype)
