"""ITI: its push against plain transformers, and what it is made from against the definition."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

import interp
from interp.analysis.probes import last_z, logistic
from interp.intervention.base import InterventionError
from interp.intervention.iti import ITI, directions_of
from interp.intervention.lofit import LoFiT
from tests.intervention.test_ablate import by_hand
from tests.tiny import random_ids, tiny, unchecked, with_answers, words

FAMILIES = ["gpt2", "llama", "gpt_neox", "qwen3", "gemma2"]
PROMPTS = random_ids(8, 5, 11, seed=2)
HEADS = ["L1H3", "L0H1", "L0H2"]
CORPUS = random_ids(*[5, 8, 6, 7] * 4, seed=7)
TEXTS = [words(ids) for ids in CORPUS]
LABELS = [n % 2 for n in range(16)]


def push(strength: float = 15.0, **settings) -> ITI:
    directions = normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)))
    return ITI(HEADS, directions, torch.tensor([0.1, 0.3, 0.2]), strength, **settings)


def logits(model, lists=PROMPTS) -> list[torch.Tensor]:
    batch = model.batch(lists)
    with torch.no_grad():
        out = model(batch.input_ids, attention_mask=batch.attention_mask)
    return [out[row, first:] for row, first in enumerate(batch.first.tolist())]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, atol=2e-5, rtol=1e-4)


def added(edit: ITI) -> dict[tuple[int, int], torch.Tensor]:
    return {
        (head.layer, head.head): edit.strength * spread * direction
        for head, direction, spread in zip(edit.heads, edit.directions, edit.spreads)
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at", ["all", "end"])
def test_heads_are_pushed_along_their_directions(family, at):
    edit = push(at=at)
    where = slice(None) if at == "all" else slice(-1, None)  # left-padded

    def change(layer, z, real):
        for (own, head), vector in added(edit).items():
            if own == layer:
                z[:, where, head] += vector

    model = tiny(family)
    with model.intervene(edit):
        assert_same(logits(model), by_hand(family, change, PROMPTS))


def test_it_is_the_edit_of_lofit_with_such_vectors():
    model, edit = tiny("llama"), push(at="all")
    with model.intervene(edit):
        ours = logits(model)
    with model.intervene(LoFiT(edit.heads, edit.vectors)):
        assert all(torch.equal(a, b) for a, b in zip(logits(model), ours))


def test_strength_and_direction_turned_about_together_are_the_same():
    model, edit = tiny("llama"), push()
    with model.intervene(edit):
        ours = logits(model)
    turned = ITI(edit.heads, -edit.directions, edit.spreads, -edit.strength)
    with model.intervene(turned):
        assert all(torch.equal(a, b) for a, b in zip(logits(model), ours))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_written_with_the_cache_is_what_is_read_at_once(family):
    """The last prompt token and generated ones, in steps of one token and in a single pass."""
    model, edit = tiny(family), push()
    for tokens in PROMPTS:
        with model.intervene(edit):
            written = model.original_model.generate(
                torch.tensor([tokens]), max_new_tokens=5, min_new_tokens=5, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            with model.spans([{}], [len(tokens)]), torch.no_grad():
                read = model(written.sequences[:, :-1])[0, len(tokens) - 1 :]
        assert_close(read, torch.cat(written.logits), atol=2e-5, rtol=1e-4)


def test_beams_are_pushed_alike():
    model, edit = tiny("llama"), push()
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    ids = torch.tensor(PROMPTS[:1])
    with model.intervene(edit):
        found = model.original_model.generate(ids, **options)
        assert torch.equal(
            found, model.original_model.generate(ids, **options, cache_implementation="dynamic")
        )
    assert not torch.equal(found, model.original_model.generate(ids, **options))


# What it is made from


def z_of(heads) -> torch.Tensor:
    z = last_z(tiny("llama"), CORPUS)
    return torch.stack([z[:, head.layer, head.head] for head in heads], dim=1)


def test_mass_mean_is_the_way_from_wrong_to_right_in_standard_deviations():
    edit = ITI.fit(tiny("llama"), TEXTS, LABELS, HEADS, strength=3.0, progress=False)
    z, right = z_of(edit.heads).numpy(), np.array(LABELS) == 1
    for row in range(3):
        way = z[right, row].mean(0) - z[~right, row].mean(0)
        way /= np.linalg.norm(way)
        assert edit.directions[row].numpy() == pytest.approx(way, abs=1e-5)
        assert float(edit.spreads[row]) == pytest.approx(np.std(z[:, row] @ way), rel=1e-4)
    assert edit.strength == 3.0 and edit.when == "both" and edit.at == "end"


def test_labels_turned_about_turn_the_push_about():
    one, other = (
        ITI.fit(tiny("llama"), TEXTS, labels, HEADS, progress=False)
        for labels in (LABELS, ["b" if label == 0 else "a" for label in LABELS])
    )
    assert_close(one.vectors, -other.vectors)


def test_the_probe_s_direction_is_its_weights():
    edit = ITI.fit(tiny("llama"), TEXTS, LABELS, HEADS, direction="probe", progress=False)
    w, _ = logistic(z_of(edit.heads).transpose(0, 1), torch.tensor(LABELS) == 1, 1.0)
    assert_close(edit.directions, normalize(w).float())


def test_random_directions_are_those_of_the_seed():
    one, same, other = (
        ITI.fit(tiny("llama"), TEXTS, LABELS, HEADS, direction="random", seed=seed, progress=False)
        for seed in (0, 0, 1)
    )
    assert one == same != other
    assert_close(one.directions.norm(dim=1), torch.ones(3))


def test_spreads_may_come_from_other_prompts():
    other = random_ids(4, 9, 5, seed=11)
    edit = ITI.fit(
        tiny("llama"), TEXTS, LABELS, HEADS, spread_over=[words(i) for i in other], progress=False
    )
    same = ITI.fit(tiny("llama"), TEXTS, LABELS, HEADS, progress=False)
    assert torch.equal(edit.directions, same.directions)
    z = last_z(tiny("llama"), other)
    for head, direction, spread in zip(edit.heads, edit.directions, edit.spreads):
        along = z[:, head.layer, head.head] @ direction
        assert float(spread) == pytest.approx(float(along.std(correction=0)), rel=1e-4)


def test_a_push_grows_with_what_the_head_says():
    """z of twice the size: the same direction, twice the spread."""
    z = torch.randn(20, 3, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 2
    heads = [interp.Head.parse(head) for head in HEADS]
    one, other = (directions_of(x, labels, "mass_mean", 0, heads) for x in (z, 2 * z))
    assert_close(one, other)


@pytest.mark.parametrize("direction", ["mass_mean", "probe"])
def test_on_round_clouds_both_directions_are_the_way_between_them(direction):
    generator = torch.Generator().manual_seed(0)
    way = normalize(torch.randn(1, 3, 8, generator=generator), dim=-1)
    labels = torch.arange(4000) % 2
    z = torch.randn(4000, 3, 8, generator=generator) + (2 * labels[:, None, None] - 1) * way
    heads = [interp.Head.parse(head) for head in HEADS]
    found = directions_of(z, labels, direction, 0, heads)
    assert torch.cosine_similarity(found, way[0]).min() > 0.98


def test_the_best_probed_heads_are_pushed():
    model = tiny("llama")
    scores = interp.probe_heads(model, TEXTS, LABELS, folds=4, seed=2, progress=False)
    for k, n in ((2, 2), (0.5, 4)):
        edit = ITI.fit(model, TEXTS, LABELS, k=k, folds=4, seed=2, progress=False)
        assert list(edit.heads) == sorted(scores.top(n))
    assert edit.made_on.d_head == 8


def test_right_and_wrong_answers_say_where_to_push():
    prompts = with_answers(CORPUS, [[20]] * 16, [(0, 1)] * 16, rejected_ids=[[21]] * 16)
    edit = ITI.fit(tiny("llama"), prompts, heads=HEADS, progress=False)
    right = last_z(tiny("llama"), [p["input_ids"] + p["answer_ids"] for p in prompts])
    wrong = last_z(tiny("llama"), [p["input_ids"] + p["rejected_ids"] for p in prompts])
    way = right.mean(0) - wrong.mean(0)
    for head, direction in zip(edit.heads, edit.directions):
        assert_close(direction, normalize(way[head.layer, head.head], dim=0), atol=1e-4, rtol=1e-3)


# Mistakes


@pytest.mark.parametrize(
    "change, said",
    [
        ({"directions": torch.ones(3, 8)}, "directions: not of length 1; divide each by its norm"),
        ({"directions": torch.eye(8)[:2]}, r"directions: \[2, 8\] for 3 heads"),
        ({"directions": torch.eye(8)[0]}, r"should be \[head, d_head\]"),
        ({"spreads": torch.tensor([1.0, -1.0, 1.0])}, "spreads: one number a head, none below 0"),
        ({"spreads": torch.ones(3, 1)}, "spreads: one number a head"),
        ({"spreads": torch.tensor([1.0, torch.nan, 1.0])}, "spreads: holds NaN"),
        ({"strength": float("nan")}, "strength=nan: a finite number"),
        ({"at": "start"}, "at='start': one of end, all"),
        ({"when": "later"}, "when='later'"),
    ],
)
def test_parameters_without_meaning(change, said):
    given = {"heads": HEADS, "directions": torch.eye(8)[:3], "spreads": torch.ones(3)}
    with unchecked(), pytest.raises(InterventionError, match=said):
        ITI(**(given | change))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"direction": "mean"}, "direction='mean': one of mass_mean, probe, random"),
        ({"labels": [n % 3 for n in range(16)]}, "labels: 3 kinds, and a push needs two"),
        ({"at": "start"}, "at='start'"),
    ],
)
def test_what_no_push_can_be_made_of(options, said):
    given = {"prompts": TEXTS, "labels": LABELS, "heads": HEADS, "progress": False}
    with unchecked(), pytest.raises(InterventionError, match=said):
        ITI.fit(tiny("llama"), **(given | options))


def test_a_head_that_says_the_same_on_both_kinds_is_named():
    with pytest.raises(InterventionError, match="L0H1 says the same on both kinds; leave it out"):
        ITI.fit(tiny("llama"), [TEXTS[0]] * 4, [0, 1, 0, 1], HEADS, progress=False)
