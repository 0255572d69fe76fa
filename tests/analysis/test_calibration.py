"""The screen against whole reruns under ACT of one head, rules of acceptance, and what it is for.

The last tests run on mini-llama: the screen finds sinks that were planted, and on the model as it
is, where there is nothing to mend, what the paper's rule accepts does no good on other prompts.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from scipy import stats

import interp
from interp.analysis import calibration
from interp.analysis.calibration import (
    Acceptance,
    CalibrationError,
    Screen,
    calibration_screen,
    intervals,
    mcnemar,
    paired_t,
)
from interp.analysis.circuits.find import random_circuits
from interp.heads import Head, HeadError, heads_of
from interp.intervention.act import ACT, middle_heads
from interp.runs import RunError
from interp.tasks.prompts import PromptError
from tests.lettered import gained
from tests.tiny import fresh, random_ids, tiny, unchecked, with_answers, words

LENGTHS = (9, 20, 14, 6, 17)
ALL = [(layer, head) for layer in range(2) for head in range(4)]
MODES = ["prefill", "frozen", "running"]


def prompts_of(model, answers=(1, 3, 2, 1, 2), seed: int = 3) -> Dataset:
    """Random prompts; every other answer begins with what the model would say, all others not."""
    prompts = random_ids(*LENGTHS, seed=seed)
    after = random_ids(*answers, seed=seed + 1)
    with torch.no_grad():
        said = [int(model(torch.tensor([ids]))[0, -1].argmax()) for ids in prompts]
    given = [[said[i], *ids[1:]] if i % 2 else ids for i, ids in enumerate(after)]
    return with_answers(prompts, given, [(1, 3)] * len(prompts))


def screen_of(model, prompts, act=None, **options) -> Screen:
    act = ACT(ALL, alpha=1.2) if act is None else act
    return calibration_screen(model, prompts, act, progress=False, **options)


def by_whole_runs(model, prompts, act: ACT) -> dict[str, np.ndarray]:
    """The changes, [prompt head], each from an evaluation under ACT of that head."""
    before = interp.evaluate(model, prompts, progress=False).table
    found = {"accuracy": [], "loss": []}
    for head in heads_of(act.heads):
        with model.intervene(replace(act, heads=[head])):
            after = interp.evaluate(model, prompts, progress=False).table
        for name, column in (("accuracy", "correct"), ("loss", "loss")):
            found[name].append((after[column].astype(float) - before[column]).to_numpy())
    return {name: np.stack(columns, axis=1) for name, columns in found.items()}


def assert_same_changes(screen: Screen, expected: dict[str, np.ndarray]) -> None:
    assert np.abs(expected["loss"]).max() > 1e-2
    np.testing.assert_allclose(screen.samples["loss"], expected["loss"], atol=2e-5)
    np.testing.assert_array_equal(screen.samples["accuracy"], expected["accuracy"])
    for name, values in expected.items():
        np.testing.assert_allclose(screen.effects[name], values.mean(0), atol=2e-5)


# Replay against whole runs


@pytest.mark.parametrize("decode", MODES)
@pytest.mark.parametrize(
    "family", ["gpt2", "gpt_neox", "llama", "qwen3", "mistral", "gemma2", "gpt_oss"]
)
def test_every_effect_is_that_of_a_whole_run(family, decode):
    """Prompts and answers of mixed lengths, in batches that cut the prompts otherwise."""
    model = tiny(family)
    prompts, act = prompts_of(model), ACT(ALL, alpha=1.2, decode=decode)
    screen = screen_of(model, prompts, act, batch_size=3)
    assert_same_changes(screen, by_whole_runs(model, prompts, act))
    plain = interp.evaluate(model, prompts, progress=False)
    assert screen.base == pytest.approx({"accuracy": plain.accuracy, "loss": plain.loss}, abs=1e-5)


def test_answers_do_flip():
    """So that the equality of accuracies says something."""
    model = gained("llama")
    prompts = prompts_of(model, answers=(1,) * 5)
    screen = screen_of(model, prompts, ACT(ALL, alpha=1.0, factor=0.0))
    assert (screen.samples["accuracy"] != 0).any() and 0 < screen.base["accuracy"] < 1
    expected = by_whole_runs(model, prompts, screen.candidates)
    np.testing.assert_array_equal(screen.samples["accuracy"], expected["accuracy"])


def test_random_columns_and_sparing_the_first_token_are_screened_too():
    model = tiny("llama")
    prompts = prompts_of(model)
    for settings in ({"columns": "random"}, {"spare": "bos", "theta": 0.1, "min_queries": 3}):
        act = ACT(ALL, **({"alpha": 1.2} | settings))
        assert_same_changes(screen_of(model, prompts, act), by_whole_runs(model, prompts, act))


def test_what_is_applied_already_is_applied_in_the_screen():
    model = tiny("llama")
    prompts, other = prompts_of(model), interp.Ablate(["L0H1"], "uniform")
    with model.intervene(other):
        screen = screen_of(model, prompts)
        expected = by_whole_runs(model, prompts, screen.candidates)
    assert_same_changes(screen, expected)
    assert np.abs(screen.samples["loss"] - screen_of(model, prompts).samples["loss"]).max() > 1e-3


def test_heads_without_a_later_sink_are_not_run():
    model = tiny("llama")
    prompts, act = prompts_of(model), ACT(ALL, alpha=2.0)
    screen = screen_of(model, prompts, act)
    # a prompt by itself in the unedited model, as one head at a time has it
    found = {(row.prompt, row.layer, row.head) for row in replace(act, factor=1.0).sinks(
        model, prompts
    ).itertuples()}  # fmt: skip
    share = [np.mean([(p, *head) in found for p in range(len(prompts))]) for head in ALL]
    assert 0 < np.mean(share) < 1
    np.testing.assert_allclose(screen.effects["edited"], share)
    for index, head in enumerate(ALL):
        without = [p for p in range(len(prompts)) if (p, *head) not in found]
        assert (screen.samples["loss"][without, index] == 0).all()
    nothing = screen_of(model, prompts, ACT(ALL, theta=0.9999))
    assert (nothing.effects["edited"] == 0).all() and not nothing.samples["loss"].any()
    assert nothing.accepted() == ()


# What is made of the changes


CHANGES = np.array([[1.0, 0, -1, 0], [1, 0, 0, 0], [1, 0, 1, -1], [0, 0, -1, 0], [1, 0, 0, 0]])


def test_p_values_are_of_no_gain():
    expected = [stats.binomtest(4, 4, alternative="greater").pvalue, 1.0]
    expected += [stats.binomtest(b, n, alternative="greater").pvalue for b, n in ((1, 3), (0, 1))]
    assert mcnemar(CHANGES) == pytest.approx(expected)
    gains = np.random.default_rng(0).normal(0.3, 1, (20, 3))
    gains[:, 1] = 0.5
    some = gains[:, [0, 2]]
    first, last = stats.t.sf(some.mean(0) / (some.std(0, ddof=1) / np.sqrt(20)), 19)
    assert paired_t(gains) == pytest.approx([first, 1.0, last])
    assert paired_t(gains[:1]).tolist() == [1, 1, 1]


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(1)
    drawn = rng.normal(0.2, 1, (60, 400))  # 400 experiments of 60 prompts
    low, high = intervals(drawn)
    assert 0.91 < ((low < 0.2) & (high > 0.2)).mean() < 0.97
    low, high = intervals(np.ones((5, 2)))
    assert (low == 1).all() and (high == 1).all()


def effects(**columns) -> pd.DataFrame:
    return pd.DataFrame(columns)


def test_the_papers_rule_is_any_gain_in_accuracy():
    table = effects(accuracy=[0.01, 0.0, -0.02, 0.1], loss=[0.5, -1.0, -2.0, 0.1])
    assert Acceptance().accepts(table).tolist() == [True, False, False, True]
    assert Acceptance("loss").accepts(table).tolist() == [False, True, True, False]
    assert Acceptance(margin=0.01).accepts(table).tolist() == [False, False, False, True]
    assert Acceptance(most=1).accepts(table).tolist() == [False, False, False, True]
    assert Acceptance("loss", most=1).accepts(table).tolist() == [False, False, True, False]
    assert Acceptance(most=9).accepts(table).tolist() == Acceptance().accepts(table).tolist()


def test_beyond_chance_is_benjamini_hochberg():
    p_values = [0.03, 0.011, 0.4, 0.001, 0.02]
    table = effects(accuracy=[0.1] * 5, accuracy_p=p_values)
    # the largest rank k with p_(k) <= 0.05 k / 5, by hand: 0.001, 0.011, 0.02, 0.03 all are below
    assert Acceptance(level=0.05).accepts(table).tolist() == [True, True, False, True, True]
    # 0.02 k / 5: only the first
    assert Acceptance(level=0.02).accepts(table).tolist() == [False, False, False, True, False]
    lost = table.assign(accuracy=[0.1, 0.1, 0.1, -0.1, 0.1])
    assert Acceptance(level=0.02).accepts(lost).tolist() == [False] * 5


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"metric": "f1"}, "metric='f1': accuracy or loss"),
        ({"margin": -0.1}, "margin=-0.1: a gain, from 0"),
        ({"level": 1.0}, "level=1.0: a rate between 0 and 1"),
        ({"most": 0}, "most=0: a number of heads, from 1"),
    ],
)
def test_rules_that_mean_nothing(wrong, said):
    with unchecked(), pytest.raises(CalibrationError, match=said):
        Acceptance(**wrong)


@pytest.fixture(scope="module")
def screen() -> Screen:
    model = gained("llama")
    return screen_of(model, prompts_of(model, answers=(1,) * 5), ACT(ALL, alpha=1.0, factor=0.1))


def test_an_act_of_the_accepted_heads_keeps_all_effects(screen):
    rule = Acceptance("loss")
    act = screen.act(rule)
    gains = screen.samples["loss"].mean(0) < 0
    assert 0 < gains.sum() < len(ALL)
    assert act.heads == tuple(Head(*head) for head, gain in zip(ALL, gains) if gain)
    assert act.heads == screen.accepted(rule) and act.factor == 0.1 and act.alpha == 1.0
    assert set(act.effects) == {str(Head(*head)) for head in ALL}
    for row in screen.effects.to_dict("records"):
        own = act.effects[f"L{row['layer']:.0f}H{row['head']:.0f}"]
        assert own == {k: v for k, v in row.items() if k not in ("layer", "head")}
    assert list(own) == [
        "accuracy", "accuracy_low", "accuracy_high", "accuracy_p", "loss", "loss_low", "loss_high",
        "loss_p", "edited", "n",
    ]  # fmt: skip


def test_scores_are_gains_prompt_by_prompt(screen):
    for metric, sign in (("accuracy", 1), ("loss", -1)):
        scores = screen.scores(metric)
        np.testing.assert_allclose(scores.samples, sign * screen.samples[metric])
        assert scores.metadata["metric"] == metric and scores.heads == [Head(*h) for h in ALL]
    assert tuple(screen.scores("loss").top(threshold=0.0)) != ()
    assert set(screen.scores("loss").top(threshold=0.0)) == set(screen.accepted(Acceptance("loss")))
    with unchecked(), pytest.raises(CalibrationError, match="metric='f1'"):
        screen.scores("f1")


def test_it_says_what_it_found(screen):
    best = screen.effects["accuracy"].max()
    said = repr(screen)
    assert said.startswith("Screen(8 heads, 5 prompts; accuracy 0.")
    assert f"with the best head {best:+.3f} [" in said
    assert said.endswith(f"the paper's rule accepts {len(screen.accepted())})")


# Fitting, folders, bad input


def test_fitting_is_a_screen_and_a_rule(tmp_path):
    model = tiny("llama")
    prompts, rule = prompts_of(model), Acceptance("loss", most=3)
    settings = {"alpha": 1.2, "decode": "running"}
    fitted = ACT.fit(model, prompts, accept=rule, progress=False, **settings)
    screen = screen_of(model, prompts, ACT(middle_heads(model), **settings))
    assert fitted == screen.act(rule) and len(fitted.heads) == 3
    assert fitted.made_on is not None and fitted.made_on.architecture == "LlamaForCausalLM"
    some = ACT.fit(model, prompts, "L0H1, L1H2", accept=rule, progress=False, **settings)
    assert set(some.effects) == {"L0H1", "L1H2"} and set(some.heads) <= {Head(0, 1), Head(1, 2)}
    loaded = interp.load_intervention(fitted.save_pretrained(tmp_path), model)
    assert loaded == fitted and loaded.effects == fitted.effects


def test_a_killed_screen_goes_on(tmp_path, monkeypatch):
    model = tiny("llama")
    prompts = prompts_of(model)
    real, asked = calibration._measure, []

    def measure(model, act, some):
        asked.append(len(some))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(model, act, some)

    monkeypatch.setattr(calibration, "_measure", measure)
    with pytest.raises(KeyboardInterrupt):
        screen_of(model, prompts, batch_size=2, out=tmp_path)
    found = screen_of(model, prompts, batch_size=2, out=tmp_path)
    assert asked == [2, 2, 2, 1]  # the first two prompts are not run again
    expected = screen_of(model, prompts, batch_size=2)
    pd.testing.assert_frame_equal(found.effects, expected.effects)
    for name, values in expected.samples.items():
        np.testing.assert_allclose(found.samples[name], values)
    kept = pd.read_parquet(tmp_path / "effects.parquet")
    pd.testing.assert_frame_equal(kept, expected.effects)
    assert interp.HeadScores.load(tmp_path / "heads.parquet").heads == expected.scores().heads


def test_a_folder_of_another_screen_is_refused(tmp_path):
    model = tiny("llama")
    prompts = prompts_of(model)
    screen_of(model, prompts, out=tmp_path)
    with pytest.raises(RunError, match="act"):
        screen_of(model, prompts, ACT(ALL, alpha=1.3), out=tmp_path)
    screen_of(model, prompts, ACT(ALL, alpha=1.3), out=tmp_path, resume=False)


def test_a_model_on_the_eager_path_is_refused():
    model = tiny("bloom")
    with pytest.raises(CalibrationError, match="eager path.*give ACT its heads by hand"):
        screen_of(model, prompts_of(model))


def test_what_can_not_be_screened():
    model = tiny("llama")
    prompts = prompts_of(model)
    with pytest.raises(CalibrationError, match="candidates: no heads"):
        screen_of(model, prompts, ACT(()))
    with pytest.raises(HeadError, match="L7H0"):
        screen_of(model, prompts, ACT(["L0H1", "L7H0"]))
    with pytest.raises(CalibrationError, match="prompts: 0 has no answer"):
        screen_of(model, [words(ids) for ids in random_ids(5, 6)])
    emptied = with_answers(random_ids(5, 6), [[7], []], [(1, 2)] * 2)
    with pytest.raises(CalibrationError, match="prompts: 1 has no answer"):
        screen_of(model, emptied)
    with pytest.raises(PromptError, match="no rows"):
        screen_of(model, prompts.select([]))


def test_a_loss_that_is_not_finite_is_told():
    model = fresh("llama")
    prompts = prompts_of(model)
    only = set(prompts[1]["input_ids"]).difference(*(prompts[i]["input_ids"] for i in (0, 2, 3, 4)))
    with torch.no_grad():
        model.original_model.get_input_embeddings().weight[min(only)] = torch.inf
    with pytest.raises(CalibrationError, match="prompts: LlamaForCausalLM .*not finite.*float32"):
        screen_of(model, prompts)


# On a trained model


@pytest.fixture(scope="module")
def mini(mini_llama):
    return interp.load(mini_llama)


EVERY = [(layer, head) for layer in range(4) for head in range(8)]
PLANTED = (Head(0, 3), Head(0, 7))


def changes(model, prompts, edits: dict, metric: str) -> pd.Series:
    """Of a metric beside no edit, by condition."""
    found = interp.compare(
        model, prompts, {"none": [], **edits}, batch_size=50, progress=False
    ).differences
    return found[found["metric"] == metric].set_index("condition")["value"]


@pytest.mark.slow
def test_planted_sinks_are_found_and_mended(mini):
    """Two heads are made to look at token 4, whatever it is, which nearly halves the accuracy.

    Damping it there, and not in other heads, nor other columns there, gives all of it back.
    """
    screened, test = (
        interp.tasks.multiple_choice(mini, n, seed) for seed, n in ((0, 100), (1, 150))
    )
    plant = interp.SteerAttention(PLANTED, "4:5", "boost", "all", "both", 6)
    act = ACT(EVERY, spare="bos")
    with mini.intervene(plant):
        screen = calibration_screen(mini, screened, act, batch_size=50, progress=False)
        assert screen.base["accuracy"] < 0.7
        assert screen.accepted(Acceptance(level=0.05)) == PLANTED
        assert screen.scores("loss").top(2) == [Head(0, 7), Head(0, 3)]
        mended = screen.act(Acceptance(level=0.05))
        drawn = [
            heads for heads in random_circuits(mini, PLANTED, 12, seed=0)
            if not set(heads) & set(PLANTED)
        ][:4]  # fmt: skip
        edits: dict[str, ACT] = {"mended": mended}
        edits |= {f"columns {n}": replace(mended, columns="random", seed=n) for n in range(3)}
        edits |= {f"heads {n}": replace(act, heads=heads) for n, heads in enumerate(drawn)}
        # the planted column is the first one over the threshold, which the authors' code spares
        edits["first spared"] = replace(mended, spare="first_over_threshold")
        accuracy, loss = (changes(mini, test, edits, name) for name in ("accuracy", "loss"))
        with mini.intervene(mended):
            assert interp.evaluate(mini, test, progress=False).accuracy > 0.99
    assert len(drawn) == 4
    assert accuracy["mended"] > 0.35
    assert accuracy.drop("mended").max() < accuracy["mended"] - 0.2
    columns = [name for name in edits if name.startswith("columns")]
    assert (accuracy[columns] < 0).all() and (loss[columns] > 0).all()


@pytest.mark.slow
def test_where_nothing_is_to_be_mended_the_papers_rule_accepts_chance(mini):
    """Two facts, of which the model takes either: half right, so that a gain would show.

    Six heads raise the accuracy by a prompt or two; on other prompts they do not, and no head is
    beyond chance. The screen is right about harm: the head that it says hurts most does.
    """
    screened, test = (
        interp.tasks.multiple_choice(mini, n, seed, facts=2) for seed, n in ((0, 100), (1, 300))
    )
    act = ACT(EVERY)
    screen = calibration_screen(mini, screened, act, batch_size=50, progress=False)
    accepted = screen.act()
    assert len(accepted.heads) > 2
    for metric in ("accuracy", "loss"):
        assert screen.accepted(Acceptance(metric, level=0.05)) == ()
    order = screen.scores("loss").top(len(EVERY))
    worst = replace(act, heads=order[-1:])
    edits = {"accepted": accepted, "worst": worst}
    edits |= {f"columns {n}": replace(worst, columns="random", seed=n) for n in range(3)}
    edits |= {
        f"heads {n}": replace(act, heads=heads)
        for n, heads in enumerate(random_circuits(mini, accepted.heads, 8, seed=0))
    }
    accuracy, loss = (changes(mini, test, edits, name) for name in ("accuracy", "loss"))
    drawn = [name for name in edits if name.startswith("heads")]
    assert accuracy["accepted"] < accuracy[drawn].max()
    assert loss["accepted"] > loss[drawn].min()
    assert loss["worst"] > 0.03
    columns = [name for name in edits if name.startswith("columns")]
    assert loss[columns].max() < loss["worst"] / 2
