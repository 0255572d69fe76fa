"""LoFiT: its edit against plain transformers, what is learned, and what is left alone."""

from functools import partial

import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import interp
from interp.intervention import head_tuning
from interp.intervention.base import InterventionError
from interp.intervention.descent import Tuning, TuningError
from interp.intervention.lofit import LoFiT
from interp.intervention.objectives import AnswerLoss, objective_of
from interp.tasks.prompts import PromptError
from tests.intervention.test_ablate import by_hand
from tests.tiny import fresh, random_ids, tiny, unchecked, with_answers

FAMILIES = ["gpt2", "llama", "gpt_neox", "qwen3", "gemma2"]
PROMPTS = random_ids(8, 5, 11, seed=2)
HEADS = ["L0H1", "L0H2", "L1H3"]
QUICK = Tuning(lr=0.05, epochs=2, batch_size=4)


def vectors(n: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def lesson(n: int = 12, seed: int = 0, answer: int = 40) -> Dataset:
    """Random prompts, most of which shall be answered alike: there is something to learn."""
    lengths = torch.randint(4, 9, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    prompts = random_ids(*lengths, seed=seed)
    answers = [[answer, answer + 1] if row % 4 else [answer + 2] for row in range(n)]
    return with_answers(prompts, answers, [(0, 1)] * n, rejected_ids=[[answer + 3]] * n)


def logits(model, lists=PROMPTS) -> list[torch.Tensor]:
    batch = model.batch(lists)
    with torch.no_grad():
        out = model(batch.input_ids, attention_mask=batch.attention_mask)
    return [out[row, first:] for row, first in enumerate(batch.first.tolist())]


def assert_same(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, **({"atol": 2e-5, "rtol": 1e-4} | tolerance))


# The edit


@settings(max_examples=10)
@given(
    family=st.sampled_from(FAMILIES),
    heads=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 3)), min_size=1),
    strength=st.floats(-2, 2),
    seed=st.integers(0, 99),
)
def test_each_head_says_its_vector_more(family, heads, strength, seed):
    """Given in any order, as often as not in that of a set."""
    given_heads = list(heads)
    added = vectors(len(given_heads), seed)

    def edit(layer, z, real):
        for head, vector in zip(given_heads, added):
            if head[0] == layer:
                z[:, :, head[1]] += strength * vector

    model = tiny(family)
    with model.intervene(LoFiT(given_heads, added, strength)):
        assert_same(logits(model), by_hand(family, edit, PROMPTS))


def test_two_on_other_heads_are_a_sum_in_either_order():
    model, added = tiny("llama"), vectors()
    one, other = LoFiT(HEADS[:1], added[:1]), LoFiT(HEADS[1:], added[1:])
    with model.intervene(LoFiT(HEADS, added)):
        whole = logits(model)
    for order in ([one, other], [other, one]):
        with model.intervene(order):
            assert all(torch.equal(a, b) for a, b in zip(logits(model), whole))


def test_what_it_is_in_words_and_numbers():
    edit = LoFiT(HEADS, vectors(), 0.5)
    assert repr(edit) == (
        "LoFiT(3 heads: L0H1, L0H2, L1H3; a learned vector each added times 0.5; at all tokens)"
    )
    weights = sum(p.numel() for p in tiny("llama").original_model.parameters())
    assert f"parameters: 24, {24 / weights:.2g} of the model's {weights}" in edit.describe(
        tiny("llama")
    )


@pytest.mark.parametrize(
    "change, said",
    [
        ({"vectors": vectors(2)}, r"vectors: \[2, 8\] for 3 heads"),
        ({"vectors": vectors()[0]}, r"vectors: \[8\], and should be \[head, d_head\]"),
        ({"vectors": vectors() * torch.nan}, "vectors: holds NaN"),
        ({"strength": float("inf")}, "strength=inf: a finite number"),
        ({"when": "always"}, "when='always': one of prompt, generated, both"),
    ],
)
def test_parameters_without_meaning(change, said):
    with unchecked(), pytest.raises(InterventionError, match=said):
        LoFiT(**{"heads": HEADS, "vectors": vectors()} | change)


def test_vectors_for_heads_of_another_width():
    edit = LoFiT(HEADS, torch.ones(3, 5))
    with pytest.raises(InterventionError, match="of width 5, and .* has 8"):
        list(edit.hooks(tiny("llama")))


# What is learned


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_offsets_follow_the_slope_of_the_loss(family):
    """One step of Adam from zero goes by the learning rate against the sign of each slope."""
    model, data = tiny(family), lesson()
    tuning = Tuning(lr=1e-3, epochs=1, batch_size=12, init=0.0, clip=1e6)
    found = LoFiT.fit(model, data, HEADS, tuning=tuning, validation=None, progress=False).vectors
    loss, step = AnswerLoss(model, data), 1e-2
    for row, head in enumerate(HEADS):
        for column in (0, 5):
            sides = []
            for sign in (1, -1):
                nudge = torch.zeros(1, 8)
                nudge[0, column] = sign * step
                with model.intervene(LoFiT([head], nudge)), torch.no_grad():
                    sides.append(float(loss(list(range(12)))))
            slope = (sides[0] - sides[1]) / (2 * step)
            if abs(slope) > 1e-3:
                assert float(found[row, column]) == pytest.approx(
                    -1e-3 * (1 if slope > 0 else -1), rel=1e-3
                )


@pytest.mark.parametrize("objective", ["answers", "preferences"])
def test_the_loss_falls_also_on_what_was_held_out(objective):
    model, data, others = tiny("llama"), lesson(24), lesson(12, seed=9)
    edit = LoFiT.fit(
        model, data, k=3, objective=objective, progress=False,
        selection=QUICK, tuning=Tuning(lr=0.05, epochs=8, batch_size=4),
    )  # fmt: skip
    loss = objective_of(objective, model, others, beta=0.5, batch_size=4)
    before = loss.mean(4)
    with model.intervene(edit):
        assert loss.mean(4) < before - 0.1
    assert len(edit.heads) == 3 and edit.vectors.dtype == torch.float32
    assert edit.made_on.architecture == "LlamaForCausalLM"


def test_no_weight_gets_a_gradient_and_none_changes():
    model = fresh("llama")
    before = logits(model)
    some = next(model.original_model.parameters())
    some.requires_grad_(False)
    LoFiT.fit(model, lesson(), k=2, selection=QUICK, tuning=QUICK, progress=False)
    weights = list(model.original_model.parameters())
    assert all(p.grad is None for p in weights)
    assert not some.requires_grad and all(p.requires_grad for p in weights[1:])
    assert all(torch.equal(a, b) for a, b in zip(logits(model), before))
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def test_a_weight_that_was_open_to_training_is_so_again_after_an_error(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(AnswerLoss, "__call__", lambda self, rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LoFiT.fit(model, lesson(), HEADS, progress=False)
    assert all(p.requires_grad for p in model.original_model.parameters())
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def test_only_vectors_of_the_chosen_heads_are_in_the_graph():
    """The graph begins at the first layer that is edited: what is below it takes no memory."""
    model, seen = tiny("llama"), {}

    def look(value, hook):
        seen[hook.name] = value.requires_grad

    names = [f"blocks.{layer}.hook_resid_pre" for layer in (0, 1)] + ["blocks.1.hook_resid_post"]
    with model.hooks(fwd_hooks=[(name, look) for name in names]):
        LoFiT.fit(
            model, lesson(), ["L1H0"], tuning=Tuning(epochs=1), validation=None, progress=False
        )
    assert list(seen.values()) == [False, False, True]


def test_scalings_are_learned_for_every_head_and_scored_by_their_norm():
    """Against a loop over steps: here one, from zero, with A as the only parameter."""
    model, data = tiny("gpt2"), lesson()
    tuning = Tuning(lr=1e-3, l1=0.0, epochs=1, batch_size=12, init=0.0, clip=1e6)
    scores = LoFiT.select(model, data, tuning=tuning, validation=None, progress=False)
    assert scores.matrix.shape == (2, 4)
    # each of a head's 8 numbers moved by the rate
    assert scores.matrix == pytest.approx(1e-3 * 8**0.5, rel=1e-2)


def test_the_slope_of_a_scaling_is_that_of_z_times_the_slope_at_z():
    model, data = tiny("llama"), lesson()
    loss, rows = AnswerLoss(model, data), list(range(12))
    scaling = torch.zeros(2, 4, 8, requires_grad=True)
    name, kept = "blocks.1.attn.hook_z", {}

    def keep(z, hook):
        kept["z"] = z.view_as(z)
        return kept["z"]

    with model.hooks(fwd_hooks=[(name, partial(head_tuning._scaled, scaling, 1))]):
        (slope,) = torch.autograd.grad(loss(rows), scaling)
    with model.hooks(fwd_hooks=[(name, keep)]):
        value = loss(rows)
    (at_z,) = torch.autograd.grad(value, kept["z"])
    assert_close(slope[1], (kept["z"].detach() * at_z).sum((0, 1)), atol=1e-5, rtol=1e-3)
    assert slope[1].abs().max() > 1e-3 and not slope[0].any()


def test_a_penalty_keeps_scalings_small():
    model, data = tiny("llama"), lesson()
    free, held = (
        LoFiT.select(model, data, tuning=Tuning(lr=5e-3, l1=l1, epochs=6), progress=False)
        for l1 in (0.0, 10.0)
    )
    assert held.matrix.max() < free.matrix.min() / 2


def test_a_head_that_alone_can_help_is_chosen():
    """All other heads are cut off from the logits, so scaling them changes nothing."""
    model = fresh("llama")
    with torch.no_grad():
        for layer in (0, 1):
            weight = model.blocks[layer].attn.o.original_component.weight
            keep = slice(16, 24) if layer == 1 else slice(0, 0)
            kept = weight[:, keep].clone()
            weight.zero_()
            weight[:, keep] = kept
    scores = LoFiT.select(model, lesson(), tuning=Tuning(lr=0.01, epochs=4), progress=False)
    assert scores.top(1) == [interp.Head(1, 2)]
    others = [scores.matrix[layer, head] for layer in (0, 1) for head in range(4)]
    others.remove(scores.matrix[1, 2])
    assert scores.matrix[1, 2] > 3 * max(others)


def test_seeds_decide():
    model, data = tiny("llama"), lesson()
    fits = [
        LoFiT.fit(model, data, HEADS, tuning=QUICK, seed=seed, progress=False) for seed in (0, 0, 1)
    ]
    assert fits[0] == fits[1] != fits[2]


@pytest.mark.parametrize("k, n", [(3, 3), (0.5, 4), (1.0, 8), (1, 1)])
def test_k_is_a_number_or_a_share_of_heads(k, n):
    tuning = Tuning(epochs=1, batch_size=12)
    edit = LoFiT.fit(tiny("llama"), lesson(), k=k, selection=tuning, tuning=tuning, progress=False)
    assert len(edit.heads) == len(edit.vectors) == n


def test_held_out_prompts_are_a_share_or_given(tmp_path):
    model, data, others = tiny("llama"), lesson(), lesson(5, seed=9)
    for validation, n in ((0.25, 9), (others, 12), (None, 12)):
        folder = tmp_path / str(n) / type(validation).__name__
        LoFiT.fit(
            model, data, HEADS, tuning=QUICK, validation=validation, out=folder, progress=False
        )
        history = pd.read_parquet(folder / "offsets" / "history.parquet")
        assert history["held_out"].isna().all() == (validation is None)
        record = interp.runs.read_record(folder / "offsets")
        assert record["counts"]["prompts"] == n and record["status"] == "complete"


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_bf16_model_is_taught_in_float32(dtype):
    model, data = tiny("llama", dtype), lesson(24)
    edit = LoFiT.fit(
        model, data, HEADS, tuning=Tuning(lr=0.05, epochs=4, batch_size=8), progress=False
    )
    assert edit.vectors.dtype == torch.float32
    loss = AnswerLoss(model, lesson(12, seed=9))
    before = loss.mean(4)
    with model.intervene(edit):
        assert loss.mean(4) < before - 0.05
    exact = LoFiT.fit(
        tiny("llama"), data, HEADS, tuning=Tuning(lr=0.05, epochs=4, batch_size=8), progress=False
    )
    cosine = torch.cosine_similarity(edit.vectors.flatten(), exact.vectors.flatten(), dim=0)
    assert float(cosine) > 0.95


# Stopped, and gone on with


def test_a_fit_that_was_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch):
    model, data = tiny("llama"), lesson()
    settings = {"k": 2, "selection": QUICK, "tuning": QUICK, "progress": False}
    expected = LoFiT.fit(model, data, **settings)
    real, count = AnswerLoss.__call__, iter(range(999))
    for stop in (4, 9):  # within the second epoch of either stage

        def interrupted(self, rows, stop=stop):
            if next(count) == stop:
                raise KeyboardInterrupt
            return real(self, rows)

        monkeypatch.setattr(AnswerLoss, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            LoFiT.fit(model, data, out=tmp_path, **settings)
    monkeypatch.setattr(AnswerLoss, "__call__", real)
    found = LoFiT.fit(model, data, out=tmp_path, **settings)
    assert found == expected
    scores = interp.HeadScores.load(tmp_path / "heads" / "heads.parquet")
    assert sorted(scores.top(2)) == list(found.heads)
    monkeypatch.setattr(AnswerLoss, "__call__", lambda self, rows: 1 / 0)
    assert LoFiT.fit(model, data, out=tmp_path, **settings) == expected  # all of it is read
    with pytest.raises(ZeroDivisionError):
        LoFiT.fit(model, data, out=tmp_path, resume=False, **settings)


def test_a_folder_of_another_fit_is_refused(tmp_path):
    model, data = tiny("llama"), lesson()
    settings = {"tuning": QUICK, "progress": False, "out": tmp_path}
    LoFiT.fit(model, data, HEADS, **settings)
    with pytest.raises(interp.runs.RunError, match="holds another run: seed is 0 there and 1"):
        LoFiT.fit(model, data, HEADS, seed=1, **settings)


# Mistakes


@pytest.mark.parametrize(
    "change, kind, said",
    [
        ({"prompts": ["w5 w6 w7"]}, PromptError, "prompt 0 has no answer"),
        ({"heads": ["L5H0"]}, interp.heads.HeadError, "1 of 1 are not in"),
        ({"heads": []}, TuningError, "heads: none, so there is nothing to learn"),
        ({"validation": 0.01}, TuningError, "validation=0.01: 0 of 12 prompts"),
        ({"validation": 1.0}, TuningError, "validation=1.0: 12 of 12 prompts"),
        ({"heads": None, "k": 9}, interp.heads.ScoresError, "k=9: a whole number from 0 to 8"),
        ({"heads": None, "k": 1.5}, interp.heads.ScoresError, "fraction=1.5: above 0"),
    ],
)
def test_what_can_not_be_learned(change, kind, said):
    given_values = {"prompts": lesson(), "heads": HEADS, "tuning": QUICK, "selection": QUICK}
    with pytest.raises(kind, match=said):
        LoFiT.fit(tiny("llama"), progress=False, **(given_values | change))


def test_training_and_inference_mode_are_refused():
    model = fresh("llama")
    model.original_model.train()
    with pytest.raises(TuningError, match="is in training mode.*call model.eval"):
        LoFiT.fit(model, lesson(), HEADS, validation=None, progress=False)
    with torch.inference_mode(), pytest.raises(TuningError, match="inference_mode"):
        LoFiT.fit(tiny("llama"), lesson(), HEADS, validation=None, progress=False)


def test_inside_no_grad_it_learns_all_the_same():
    model, data = tiny("llama"), lesson()
    expected = LoFiT.fit(model, data, HEADS, tuning=QUICK, progress=False)
    with torch.no_grad():
        assert LoFiT.fit(model, data, HEADS, tuning=QUICK, progress=False) == expected
