"""Learning a few numbers by gradient descent, the model around them frozen.

AdamW without weight decay, a learning rate that falls linearly to zero, gradients clipped to a norm
of `clip`: the trainer's defaults in the code of Yin, Ye & Durrett 2024 (LoFiT, arXiv 2406.01563).
What is minimised is

    loss + l1 * sum of |p| over all parameters p

a plain sum, which grows with their number. After each epoch the loss on held-out rows is taken: the
best epoch's parameters stay, and `patience` epochs without a better one end the descent. (The
authors keep the last epoch.) Which rows make a batch follows from seed and epoch alone, so that a
run which goes on from a checkpoint ends with the numbers of one that was never stopped.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm

from interp.errors import UserError
from interp.files import write_atomically
from interp.runs import Run

CHECKPOINT = "checkpoint.safetensors"
EVERY = 50  # steps between checkpoints within an epoch

Loss = Callable[[list[int]], Float[Tensor, ""]]


class TuningError(UserError):
    """A descent that cannot be run as asked, or that left the finite numbers."""


@dataclass(frozen=True)
class Tuning:
    """How numbers are learned. Defaults: the authors' for offsets in a 7B model.

    `init` is the standard deviation of the noise that they begin as. With `patience=None` all
    epochs are run; the best one still is what stays.
    """

    lr: float = 1e-2
    l1: float = 0.0
    epochs: int = 5
    batch_size: int = 8
    patience: int | None = 2
    init: float = 1e-3
    clip: float = 1.0

    def __post_init__(self):
        for name in ("lr", "clip", "l1", "init"):
            value, above = getattr(self, name), name in ("lr", "clip")
            if not isfinite(value) or value < 0 or (above and value == 0):
                raise TuningError(f"{name}={value}: a number {'above' if above else 'from'} 0.")
        for name in ("epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TuningError(f"{name}={value}: a whole number from 1 on.")

    def start(self, *shape: int, seed: int, device: Any = None) -> Float[Tensor, "..."]:
        """Parameters to learn, as they begin: the same noise on any device."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(*shape, generator=generator) * self.init
        return noise.to(device).requires_grad_()


def descend(
    parameters: Sequence[Tensor],
    loss: Loss,
    n: int,
    tuning: Tuning,
    *,
    seed: int = 0,
    held_out: Callable[[], float] | None = None,
    run: Run | None = None,
    desc: str | None = None,
) -> pd.DataFrame:
    """Change `parameters` in place so that the loss falls; what happened, one row an epoch.

    Args:
        parameters: Tensors that need gradients and are the result of nothing.
        loss: Of some of the rows 0 ... n - 1.
        seed: Of the order in which rows come.
        held_out: The loss on other rows, without gradients.
        run: Keeps checkpoints in its folder: a descent that was stopped goes on there.

    Returns:
        Columns `epoch, loss` (mean over the epoch's batches), `penalty` (the L1 term at its end),
        `held_out` (NaN where there is none) and `kept`: whose parameters stay.

    Raises `TuningError` where the loss is not finite.
    """
    path = _Descent(parameters, n, tuning, seed, run)
    bar = tqdm(total=path.n_steps, initial=path.step, desc=desc, disable=desc is None, leave=False)
    with bar:
        while not path.over:
            path.move(loss(path.rows()))
            bar.update()
            if path.step % path.per_epoch == 0:
                path.end_epoch(nan if held_out is None else held_out())
                bar.set_postfix(path.history[-1])
    return path.result()


class _Descent:
    """A descent under way, or taken up from its checkpoint."""

    def __init__(
        self, parameters: Sequence[Tensor], n: int, tuning: Tuning, seed: int, run: Run | None
    ):
        self.parameters, self.n, self.tuning = list(parameters), n, tuning
        self.seed, self.run = seed, run
        self.optimizer = torch.optim.AdamW(self.parameters, lr=tuning.lr, weight_decay=0.0)
        self.per_epoch = -(-n // tuning.batch_size)
        self.n_steps = tuning.epochs * self.per_epoch
        self.step = 0
        self.losses: list[float] = []  # of the epoch so far
        self.history: list[dict[str, float]] = []
        self.best = [p.detach().clone() for p in self.parameters]
        if run is not None:
            self._take_up(run)

    @property
    def kept(self) -> int:
        """The epoch that was best, as an index into the history; the last one if none is known."""
        known = [row["held_out"] if isfinite(row["held_out"]) else inf for row in self.history]
        return int(np.argmin(known)) if min(known, default=inf) < inf else len(known) - 1

    @property
    def over(self) -> bool:
        patience = self.tuning.patience
        waited = len(self.history) - 1 - self.kept
        return self.step >= self.n_steps or (patience is not None and waited >= patience)

    def rows(self) -> list[int]:
        """The rows of the next batch."""
        epoch, batch = divmod(self.step, self.per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
        size = self.tuning.batch_size
        return order[batch * size : (batch + 1) * size].tolist()

    def move(self, loss: Float[Tensor, ""]) -> None:
        """One step down."""
        value = float(loss.detach())
        if not isfinite(value):
            raise TuningError(
                f"loss: {value} at step {self.step} of {self.n_steps}; take a smaller lr than "
                f"{self.tuning.lr}, or a dtype with more range."
            )
        total = loss + self._penalty() if self.tuning.l1 else loss
        # asked for by name, so that no weight of the model gets a gradient
        gradients = torch.autograd.grad(total, self.parameters)
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient
        clip_grad_norm_(self.parameters, self.tuning.clip)
        self.optimizer.param_groups[0]["lr"] = self.tuning.lr * (1 - self.step / self.n_steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(value)
        if self.run is not None and self.step % EVERY == 0 and self.step % self.per_epoch:
            self._save(self.run)

    def end_epoch(self, held_out: float) -> None:
        penalty = float(self._penalty().detach())
        loss = float(np.mean(self.losses))
        row = {"epoch": len(self.history) + 1, "loss": loss, "penalty": penalty}
        self.history.append(row | {"held_out": held_out})
        self.losses = []
        if self.kept == len(self.history) - 1:
            self.best = [p.detach().clone() for p in self.parameters]
        if self.run is not None:
            self._save(self.run)

    @torch.no_grad()
    def result(self) -> pd.DataFrame:
        for parameter, best in zip(self.parameters, self.best):
            parameter.copy_(best)
        table = pd.DataFrame(self.history)
        return table.assign(kept=np.arange(len(table)) == self.kept)

    def _penalty(self) -> Float[Tensor, ""]:
        return self.tuning.l1 * torch.stack([p.abs().sum() for p in self.parameters]).sum()

    def _save(self, run: Run) -> None:
        tensors = {f"best.{i}": best for i, best in enumerate(self.best)}
        for i, parameter in enumerate(self.parameters):
            tensors[f"now.{i}"] = parameter.detach()
            for name in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{i}"] = self.optimizer.state[parameter][name]
        about = {"run": run.record["digest"], "step": self.step}
        about |= {"losses": self.losses, "history": self.history}
        tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
        header = {"format": "pt", "interp": json.dumps(about)}
        write_atomically(
            run.folder / CHECKPOINT, lambda path: save_file(tensors, path, metadata=header)
        )

    @torch.no_grad()
    def _take_up(self, run: Run) -> None:
        """Go on from the folder's checkpoint, where there is one of this run."""
        try:
            with safe_open(run.folder / CHECKPOINT, framework="pt") as file:
                about = json.loads((file.metadata() or {})["interp"])
                if about["run"] != run.record["digest"]:
                    return
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return
        self.step, self.losses, self.history = (about[k] for k in ("step", "losses", "history"))
        for i, parameter in enumerate(self.parameters):
            parameter.copy_(tensors[f"now.{i}"])
            self.best[i].copy_(tensors[f"best.{i}"])
            state = {
                name: tensors[f"{name}.{i}"].to(parameter) for name in ("exp_avg", "exp_avg_sq")
            }
            self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **state}
