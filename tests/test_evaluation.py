"""Evaluation against one prompt at a time in plain transformers, and intervals against formulas."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

import interp
from interp.evaluation import (
    Comparison,
    Evaluation,
    EvaluationError,
    answer_rows,
    token_losses,
)
from interp.model.hooked import HookedModel
from interp.tasks.prompts import from_examples
from tests.tiny import eager, fresh, one_by_one, random_ids, tiny, tokenizer, with_answers, words

FAMILIES = ["gpt2", "gpt_neox", "llama", "mistral", "gemma2"]
LENGTHS = (9, 4, 14, 6, 11)


def greedy(family: str, ids: list[int], n: int) -> list[int]:
    new = []
    for _ in range(n):
        new.append(int(one_by_one(eager(family), ids + new).logits[0, -1].argmax()))
    return new


def answered(family: str = "llama", **columns) -> Dataset:
    """Answers of one to four tokens; the second and the last are what the model writes itself."""
    prompts, answers = random_ids(*LENGTHS), random_ids(3, 1, 4, 2, 3, seed=7)
    for row in (1, 4):
        answers[row] = greedy(family, prompts[row], len(answers[row]))
    choices = [[f" w{i}" for i in (ids[0], 5, 17 + n)] for n, ids in enumerate(answers)]
    columns = {"choices": choices, "length": [9, 4, 9, 4, 9]} | columns
    return with_answers(prompts, answers, [(0, 1)] * 5, **columns)


def evaluate(model, data, **options) -> Evaluation:
    return interp.evaluate(model, data, progress=False, **options)


def by_loop(family: str, data: Dataset) -> pd.DataFrame:
    """Definitions, from all logits of one prompt and its answer."""
    rows = []
    for row in data:
        prompt, answer = row["input_ids"], row["answer_ids"]
        logits = one_by_one(eager(family), prompt + answer).logits[0].double()
        losses, right = [], True
        for t, token in enumerate(answer):
            at = logits[len(prompt) - 1 + t]
            losses.append(-float(at.log_softmax(-1)[token]))
            right = right and int(at.argmax()) == token
        wrong = {int(choice[2:]) for choice in row["choices"]} - {answer[0]}
        first = logits[len(prompt) - 1]
        gap = float(first[answer[0]]) - max(float(first[token]) for token in wrong)
        rows.append({"correct": right, "loss": np.mean(losses), "logit_diff": gap})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_a_loop_over_prompts_finds(family):
    data = answered(family)
    expected = by_loop(family, data)
    for size in (8, 2, 1):
        found = evaluate(tiny(family), data, batch_size=size)
        columns = ["correct", "loss", "logit_diff"]
        pd.testing.assert_frame_equal(found.table[columns], expected, atol=1e-4, rtol=1e-4)
    assert found.accuracy == pytest.approx(0.4)
    assert found.loss == pytest.approx(expected["loss"].mean(), rel=1e-4)
    assert found.logit_diff == pytest.approx(expected["logit_diff"].mean(), rel=1e-3)


def test_writing_agrees_with_the_forced_answer():
    data = answered()
    forced, written = (evaluate(tiny("llama"), data, generate=g) for g in (False, True))
    assert written.table["correct"].tolist() == forced.table["correct"].tolist()
    assert written.table["correct"].tolist() == [False, True, False, False, True]
    assert "teacher-forced" in repr(forced) and "generated" in repr(written)
    assert "loss" not in written.table and math.isnan(written.loss)
    told = tokenizer().decode(data[4]["answer_ids"], skip_special_tokens=True)
    assert written.table["generated"][4].startswith(told) and told


def test_what_follows_the_end_is_not_told(monkeypatch):
    """After its end a row is filled up, where there is no pad token with an ordinary one."""
    model, data = fresh("llama"), answered()
    new = [greedy("llama", row["input_ids"], 4) for row in data]
    end = new[0][1]
    model.original_model.generation_config.eos_token_id = end
    write = HookedModel.continue_greedily
    monkeypatch.setattr(
        HookedModel,
        "continue_greedily",
        lambda *args: write(*args).masked_fill(write(*args) == 0, 9),
    )
    found = evaluate(model, data, generate=True).table["generated"]
    for tokens, text in zip(new, found, strict=True):
        own = tokens[: tokens.index(end)] if end in tokens else tokens
        assert text == tokenizer().decode(own, skip_special_tokens=True)
    assert min(len(text.split()) for text in found) < 4


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_the_loss_on_text_is_that_of_transformers(family):
    texts = random_ids(*LENGTHS)
    expected = []
    for ids in texts:
        labels = torch.tensor([ids])
        expected.append(float(one_by_one(eager(family), ids, labels=labels).loss))
    found = evaluate(tiny(family), [words(ids) for ids in texts], batch_size=3)
    np.testing.assert_allclose(found.table["loss"], expected, rtol=1e-4)
    assert math.isnan(found.accuracy) and math.isnan(found.logit_diff)
    assert found.interval[0] < found.loss < found.interval[1]
    tokens = Dataset.from_dict({"text": ["-"] * 5, "input_ids": texts})  # without more columns
    np.testing.assert_allclose(evaluate(tiny(family), tokens).table["loss"], expected, rtol=1e-4)


def test_losses_of_a_large_vocabulary_are_exact():
    logits, target = 3 * torch.randn(2, 3, 50_000), torch.randint(50_000, (2, 3))
    expected = -logits.double().log_softmax(-1).gather(2, target[..., None])[..., 0]
    torch.testing.assert_close(token_losses(logits, target).double(), expected, atol=5e-6, rtol=0)


def test_bf16_is_near_float32():
    exact, rough = (evaluate(tiny("llama", d), answered()) for d in (torch.float32, torch.bfloat16))
    assert rough.loss == pytest.approx(exact.loss, rel=0.05)
    assert rough.metadata["dtype"] == "bfloat16"


def test_answers_are_padded_on_the_left():
    target, real = answer_rows([[5, 6], [7]], "cpu")
    assert target.tolist() == [[5, 6], [0, 7]] and real.tolist() == [[True, True], [False, True]]


# Intervals


def made(correct, loss=None, **columns) -> Evaluation:
    columns |= {} if loss is None else {"loss": loss}
    return Evaluation(pd.DataFrame({"correct": correct, **columns}), {})


@pytest.mark.parametrize("right, n", [(0, 5), (3, 7), (50, 50), (12, 40)])
def test_a_share_has_the_wilson_interval(right, n):
    z, p = 1.959963984540054, right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = made([True] * right + [False] * (n - right)).interval
    assert low == pytest.approx(middle - half, abs=1e-9)
    assert high == pytest.approx(middle + half, abs=1e-9)


def test_a_mean_has_a_bootstrap_interval_that_is_the_same_each_time():
    loss = np.random.default_rng(1).normal(3, 1, 200)
    one, other = (made([True] * 200, loss).summary() for _ in range(2))
    pd.testing.assert_frame_equal(one, other)
    row = one[one["metric"] == "loss"].iloc[0]
    half = 1.96 * loss.std() / math.sqrt(200)  # the normal interval is near
    assert row["value"] == loss.mean() and row["n"] == 200
    assert (row["low"], row["high"]) == pytest.approx(
        (loss.mean() - half, loss.mean() + half), abs=0.05
    )


def test_prompts_without_spread_have_a_point():
    row = made([True], [2.0]).summary().iloc[1]
    assert row["low"] == row["high"] == 2.0


def test_prompts_that_say_nothing_are_left_out():
    found = made([True, False, True], logit_diff=[1.0, np.nan, 3.0])
    row = found.summary().set_index("metric").loc["logit_diff"]
    assert row["value"] == 2.0 == found.logit_diff and row["n"] == 2
    assert row["low"] <= 2 <= row["high"]
    nothing = made([True, False], logit_diff=[np.nan, np.nan])
    assert nothing.summary()["metric"].tolist() == ["accuracy"] and math.isnan(nothing.logit_diff)


def test_summaries_by_column():
    found = evaluate(tiny("llama"), answered(kind=list("aabba")))
    by = found.by("length")
    accuracy = by[by["metric"] == "accuracy"].set_index("length")
    assert accuracy["value"].to_dict() == {4: 0.5, 9: pytest.approx(1 / 3)}
    assert accuracy["n"].to_dict() == {4: 2, 9: 3}
    assert list(by.columns) == ["length", "metric", "value", "low", "high", "n"]
    both = found.by("length", "kind")
    assert len(both) == 4 * 3 and both[both["metric"] == "loss"]["n"].sum() == 5
    with pytest.raises(EvaluationError, match="by='lenght'.*no such column.*length"):
        found.by("lenght")


# Comparisons


def test_each_condition_is_evaluated_as_it_is():
    model, data = tiny("llama"), answered()
    edit, other = interp.Ablate(["L0H1"]), interp.Ablate(["L1H2"], "uniform")
    conditions = {"none": [], "one": edit, "two": [edit, other], "also none": None}
    found = interp.compare(model, data, conditions, progress=False)
    with model.intervene(edit):
        alone = evaluate(model, data)
        with model.intervene(other):
            both = evaluate(model, data)
    for name, expected in (("none", evaluate(model, data)), ("one", alone), ("two", both)):
        pd.testing.assert_frame_equal(found.evaluations[name].table, expected.table)
    assert not np.allclose(alone.table["loss"], both.table["loss"])
    assert not np.allclose(alone.table["loss"], found.evaluations["none"].table["loss"])
    assert list(found.table.columns) == ["condition", "metric", "value", "low", "high", "n"]
    assert found.table["condition"].unique().tolist() == list(conditions)
    assert repr(found).count("\n") == 3


def test_differences_are_paired_by_prompt():
    before = made([True, True, False, False], [1.0, 2.0, 3.0, 4.0])
    after = made([False, True, False, True], [2.0, 3.0, 4.0, 5.0])
    rows = Comparison({"none": before, "edit": after}).differences.set_index("metric")
    assert rows["condition"].tolist() == ["edit", "edit"]
    assert rows.loc["accuracy", "value"] == 0 and rows.loc["accuracy", "low"] < 0
    # each prompt's loss rises by 1: no doubt is left, though losses differ among prompts
    assert rows.loc["loss", ["value", "low", "high"]].tolist() == [1, 1, 1]


def test_differences_are_those_of_the_tables():
    found = interp.compare(
        tiny("llama"), answered(), {"none": [], "edit": interp.Ablate(["L0H1"])}, progress=False
    )
    none, edit = (found.evaluations[name].table for name in ("none", "edit"))
    rows = found.differences.set_index("metric")
    assert rows.loc["loss", "value"] == pytest.approx((edit["loss"] - none["loss"]).mean())
    again = Comparison(found.evaluations).differences
    pd.testing.assert_frame_equal(found.differences, again)


# Choices


def test_choices_follow_a_chat_prompt_too():
    """Its text has the start token already: it must not be counted twice."""
    ids = random_ids(6)[0]
    data = with_answers([[1, *ids]], [[20, 21]], [(0, 1)], choices=[[" w20", " w30"]])
    data = data.map(lambda row: {"text": "<s> " + row["text"].split(" ", 1)[1]})
    found = evaluate(tiny("llama"), data).logit_diff
    logits = one_by_one(eager("llama"), [1, *ids]).logits[0, -1]
    assert found == pytest.approx(float(logits[20] - logits[30]), rel=1e-3)


def test_choices_that_begin_alike_say_nothing():
    data = answered(choices=[[f" w{i}"] * 2 for i in (5, 6, 7, 8, 9)])
    data = data.map(lambda row: {"choices": [" " + row["answer"].split()[0] + " w5"] * 2})
    found = evaluate(tiny("llama"), data)
    assert math.isnan(found.logit_diff)
    assert found.summary()["metric"].tolist() == ["accuracy", "loss"]


def test_a_choice_that_is_no_token_of_its_own_is_named():
    data = answered(choices=[["w5", "w6"]] * 5)  # no space: merges with the prompt's last word
    with pytest.raises(EvaluationError, match="choices: 'w5' does not follow"):
        evaluate(tiny("llama"), data)


# Errors


def test_prompts_with_and_without_answers_do_not_mix():
    data = from_examples(tokenizer(), [{"text": "w5 w6", "answer": " w7"}, {"text": "w8 w9"}])
    with pytest.raises(EvaluationError, match="prompts: 1 has no answer"):
        evaluate(tiny("llama"), data)


def test_writing_needs_answers_to_compare_with():
    with pytest.raises(EvaluationError, match="generate=True.*no answers"):
        evaluate(tiny("llama"), "w5 w6 w7", generate=True)


def test_one_token_has_no_loss():
    with pytest.raises(EvaluationError, match="prompt 1 has one token"):
        evaluate(tiny("llama"), ["w5 w6", "w7"])


def test_conditions_are_needed():
    with pytest.raises(EvaluationError, match="conditions: give at least one"):
        interp.compare(tiny("llama"), answered(), {})


def test_a_loss_that_is_no_number_names_the_prompt():
    model = fresh("llama")
    with torch.no_grad():
        model.original_model.lm_head.weight[4] = torch.nan
    for data in (answered(), words(random_ids(5)[0])):
        with pytest.raises(EvaluationError, match="loss on prompt 0 is nan.*float32"):
            evaluate(model, data)
