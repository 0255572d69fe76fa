"""A descent against a plain loop, and stopped at any step against one that ran through."""

from contextlib import suppress
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from interp.intervention.descent import CHECKPOINT, Tuning, TuningError, descend
from interp.runs import Run
from tests.tiny import unchecked

TARGETS = torch.linspace(-2, 3, 11)[:, None] * torch.tensor([1.0, -0.5, 0.2])


class Quadratic:
    """Half the mean squared distance from rows of TARGETS; breaks off when asked that often."""

    def __init__(self, parameter: torch.Tensor, breaks_at: int | None = None):
        self.parameter, self.breaks_at, self.batches = parameter, breaks_at, []

    def __call__(self, rows: list[int]) -> torch.Tensor:
        if len(self.batches) == self.breaks_at:
            raise KeyboardInterrupt
        self.batches.append(rows)
        return ((self.parameter - TARGETS[rows]) ** 2).sum(-1).mean() / 2


def start() -> torch.Tensor:
    return torch.tensor([5.0, 0.0, -4.0], requires_grad=True)


def by_hand(tuning: Tuning, batches: list[list[int]]) -> torch.Tensor:
    """AdamW as its paper has it, without weight decay, over the batches that were asked for."""
    p, first, second = torch.tensor([5.0, 0.0, -4.0]).double(), 0.0, 0.0
    for t, rows in enumerate(batches):
        g = (p - TARGETS[rows].double()).mean(0) + tuning.l1 * p.sign()
        g = g * min(1.0, tuning.clip / float(g.norm()))
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        rate = tuning.lr * (1 - t / len(batches))
        bias = 1 - 0.9 ** (t + 1), 1 - 0.999 ** (t + 1)
        p = p - rate * (first / bias[0]) / ((second / bias[1]).sqrt() + 1e-8)
    return p


@pytest.mark.parametrize("l1", [0.0, 0.3])
def test_each_step_is_that_of_adam_with_a_falling_rate(l1):
    tuning, parameter = Tuning(lr=0.3, l1=l1, epochs=3, batch_size=4, patience=None), start()
    loss = Quadratic(parameter)
    history = descend([parameter], loss, len(TARGETS), tuning, seed=3)
    assert_close(parameter.detach().double(), by_hand(tuning, loss.batches), atol=1e-5, rtol=1e-5)
    assert history["epoch"].tolist() == [1, 2, 3] and history["kept"].tolist() == [
        False,
        False,
        True,
    ]
    assert history["penalty"].iloc[-1] == pytest.approx(l1 * float(parameter.detach().abs().sum()))


def test_every_epoch_has_each_row_once_in_an_order_of_its_own():
    tuning, parameter = Tuning(epochs=2, batch_size=4), start()
    loss = Quadratic(parameter)
    descend([parameter], loss, len(TARGETS), tuning, seed=3)
    epochs = [list(chain(*loss.batches[:3])), list(chain(*loss.batches[3:]))]
    assert [sorted(rows) for rows in epochs] == [list(range(11))] * 2
    assert epochs[0] != epochs[1]


def test_it_comes_to_the_minimum():
    parameter = start()
    tuning = Tuning(lr=0.5, epochs=300, batch_size=11)
    history = descend([parameter], Quadratic(parameter), len(TARGETS), tuning)
    assert_close(parameter.detach(), TARGETS.mean(0), atol=0.02, rtol=0)
    assert history["loss"].iloc[-1] < history["loss"].iloc[0] / 2


@settings(max_examples=12)
@given(breaks_at=st.integers(0, 8), batch_size=st.sampled_from([3, 4, 11]))
def test_a_descent_that_was_stopped_ends_as_one_that_was_not(
    tmp_path_factory, breaks_at, batch_size
):
    """Also where it stopped within an epoch: what came after the last checkpoint is done again."""
    tuning = Tuning(lr=0.2, l1=0.01, epochs=3, batch_size=batch_size, patience=None)
    folder = tmp_path_factory.mktemp("run")
    losses = iter([3.0, 1.0, 2.0])

    whole = start()
    expected = descend([whole], Quadratic(whole), 11, tuning, held_out=lambda: next(losses), seed=1)
    held = [3.0, 1.0, 2.0]
    parameter = start()
    with suppress(KeyboardInterrupt):
        descend(
            [parameter], Quadratic(parameter, breaks_at), 11, tuning, seed=1,
            held_out=lambda: held.pop(0), run=Run.open(folder, {"a": 1}),
        )  # fmt: skip
    again = start()
    history = descend(
        [again], Quadratic(again), 11, tuning, seed=1, held_out=lambda: held.pop(0),
        run=Run.open(folder, {"a": 1}),
    )  # fmt: skip
    assert torch.equal(again, whole)
    assert history.equals(expected) and history["kept"].tolist() == [False, True, False]


def test_checkpoints_within_an_epoch_are_gone_on_from(tmp_path, monkeypatch):
    monkeypatch.setattr("interp.intervention.descent.EVERY", 2)
    tuning, parameter = Tuning(epochs=1, batch_size=1), start()
    with pytest.raises(KeyboardInterrupt):
        descend([parameter], Quadratic(parameter, 7), 11, tuning, run=Run.open(tmp_path, {}))
    again, whole = start(), start()
    loss, through = Quadratic(again), Quadratic(whole)
    history = descend([again], loss, 11, tuning, run=Run.open(tmp_path, {}))
    expected = descend([whole], through, 11, tuning)
    assert loss.batches == through.batches[6:]
    assert torch.equal(again, whole) and history.equals(expected)


def test_a_finished_descent_is_read(tmp_path):
    tuning, parameter, again = Tuning(epochs=2), start(), start()
    first = descend([parameter], Quadratic(parameter), 11, tuning, run=Run.open(tmp_path, {}))
    read = descend([again], Quadratic(again, 0), 11, tuning, run=Run.open(tmp_path, {}))
    assert torch.equal(parameter, again) and read.equals(first)


@pytest.mark.parametrize("spoil", ["other run", "cut short", "no checkpoint of ours"])
def test_a_checkpoint_that_is_not_this_run_s_is_not_used(tmp_path, spoil):
    tuning, parameter, again = Tuning(epochs=2), start(), start()
    descend([parameter], Quadratic(parameter), 11, tuning, run=Run.open(tmp_path, {"seed": 0}))
    path = tmp_path / CHECKPOINT
    if spoil == "other run":
        (tmp_path / "run.json").unlink()
    elif spoil == "cut short":
        path.write_bytes(path.read_bytes()[:40])
    else:
        path.write_text("none")
    run = Run.open(tmp_path, {"seed": 1 if spoil == "other run" else 0})
    loss = Quadratic(again)
    descend([again], loss, 11, tuning, run=run)
    assert len(loss.batches) == 4 and torch.equal(again, parameter)


def test_the_best_epoch_stays_and_patience_ends_the_descent():
    values = iter([3.0, 1.0, 2.0, 1.5, 0.5])
    seen, parameter = [], start()

    def held_out() -> float:
        seen.append(parameter.detach().clone())
        return next(values)

    tuning = Tuning(lr=0.1, epochs=9, patience=2)
    history = descend([parameter], Quadratic(parameter), 11, tuning, held_out=held_out)
    assert history["held_out"].tolist() == [3.0, 1.0, 2.0, 1.5]
    assert torch.equal(parameter, seen[1]) and not torch.equal(seen[1], seen[3])


def test_nothing_else_gets_a_gradient():
    other = torch.ones(3, requires_grad=True)
    parameter = start()
    descend([parameter], lambda rows: ((parameter * other) ** 2).sum(), 4, Tuning(epochs=1))
    assert other.grad is None and parameter.grad is None and parameter.requires_grad


def test_a_loss_that_is_no_number_is_an_error():
    parameter = start()
    with pytest.raises(TuningError, match="loss: nan at step 0 of 2; take a smaller lr than 0.01"):
        descend([parameter], lambda rows: parameter.sum() * torch.nan, 9, Tuning(epochs=1))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"lr": 0.0}, "lr=0.0: a number above 0"),
        ({"clip": float("inf")}, "clip=inf"),
        ({"l1": -1.0}, "l1=-1.0: a number from 0"),
        ({"epochs": 0}, "epochs=0: a whole number from 1 on"),
        ({"patience": 0}, "patience=0"),
    ],
)
def test_settings_without_meaning(change, said):
    with unchecked(), pytest.raises(TuningError, match=said):
        Tuning(**change)


def test_the_start_is_noise_of_the_wanted_size_and_seed():
    one, other = Tuning(init=0.1).start(50, 40, seed=1), Tuning(init=0.1).start(50, 40, seed=2)
    assert float(one.detach().std()) == pytest.approx(0.1, rel=0.05)
    assert torch.equal(one, Tuning(init=0.1).start(50, 40, seed=1)) and not torch.equal(one, other)
    assert one.requires_grad and one.is_leaf
