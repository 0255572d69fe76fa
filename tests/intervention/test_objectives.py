"""Losses of answers and of preferences, against plain transformers, one prompt at a time."""

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close

import interp
from interp.intervention.objectives import ObjectiveError, objective_of
from interp.tasks.prompts import PromptError
from tests.tiny import eager, one_by_one, random_ids, tiny, unchecked, with_answers

PROMPTS = random_ids(8, 5, 11, 6, seed=2)
RIGHT, WRONG = random_ids(3, 1, 2, 4, seed=4), random_ids(1, 2, 2, 3, seed=5)
SPANS = [(1, 3)] * 4


def prompts() -> Dataset:
    return with_answers(PROMPTS, RIGHT, SPANS, rejected_ids=WRONG)


def log_probs(family: str, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of each of the answer's tokens, from the plain model."""
    logits = one_by_one(eager(family), prompt + answer).logits[0].log_softmax(-1)
    return torch.stack([logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer)])


def objective(kind: str, family: str, batch_size: int = 4):
    return objective_of(kind, tiny(family), prompts(), beta=0.5, batch_size=batch_size)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3", "gemma2"])
def test_the_loss_of_answers_is_a_mean_over_their_tokens(family):
    loss = objective("answers", family)
    expected = [-log_probs(family, p, a) for p, a in zip(PROMPTS, RIGHT)]
    for rows in ([0, 1, 2, 3], [2], [3, 1]):
        wanted = torch.cat([expected[row] for row in rows]).mean()
        assert_close(loss(rows), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_loss_of_preferences_is_measured_from_the_model_as_it_was(family):
    model, loss = tiny(family), objective("preferences", family, batch_size=3)
    assert_close(loss([0, 1, 2, 3]), torch.tensor(2.0).log(), atol=1e-5, rtol=0)
    edit = interp.Ablate(["L0H1", "L1H3"])
    before, after = [], []
    for prompt, right, wrong in zip(PROMPTS, RIGHT, WRONG):
        before.append(
            log_probs(family, prompt, right).sum() - log_probs(family, prompt, wrong).sum()
        )
        with model.intervene(edit), torch.no_grad():
            sums = []
            for answer in (right, wrong):
                out = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
                places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
                sums.append(sum(out[i, token] for i, token in zip(places, answer)))
            after.append(sums[0] - sums[1])
    gain = 0.5 * (torch.stack(after) - torch.stack(before))
    with model.intervene(edit):
        for rows in ([0, 1, 2, 3], [3, 1]):
            wanted = torch.log(1 + torch.exp(-gain[rows])).mean()
            assert_close(loss(rows), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["answers", "preferences"])
def test_the_mean_over_all_rows_is_that_of_one_batch(kind):
    loss, model = objective(kind, "llama"), tiny("llama")
    with model.intervene(interp.Ablate(["L0H1"])):
        whole = float(loss([0, 1, 2, 3]).detach())
        for batch_size in (1, 3, 4):
            assert loss.mean(batch_size) == pytest.approx(whole, abs=1e-5)


def test_hooks_are_told_where_spans_and_prompts_end():
    told = []

    def look(value, hook):
        told.append((model.call.prompt_lengths.tolist(), model.call.spans))

    model = tiny("llama")
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", look)]):
        objective("answers", "llama")([2, 1])
    assert told == [([11, 5], [{"answer": [1, 3]}] * 2)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_unembedded_has_no_gaps(family):
    """Of answers of several tokens; what torch makes of a view costs it a copy of the weights."""
    model, seen = tiny(family), []
    head = model.unembed.original_component
    handle = head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    objective("answers", family)([0, 1, 2, 3])
    handle.remove()
    assert [tuple(last.shape[:2]) for last in seen] == [(4, 4)] and seen[0].is_contiguous()


def test_gradients_reach_what_hooks_put_in():
    model, loss = tiny("llama"), objective("answers", "llama")
    added = torch.zeros(4, 8, requires_grad=True)
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: z + added)]):
        (slope,) = torch.autograd.grad(loss([0, 1, 2, 3]), added)
        step = 1e-2 * slope / slope.norm()
        with torch.no_grad():
            added += step
            above = float(loss([0, 1, 2, 3]))
            added -= 2 * step
            below = float(loss([0, 1, 2, 3]))
    assert (above - below) / 2e-2 == pytest.approx(float(slope.norm()), rel=0.02)


def test_what_is_asked_for_must_be_there():
    plain = with_answers(PROMPTS, RIGHT, SPANS)
    with pytest.raises(PromptError, match="nothing says what is wrong"):
        objective_of("preferences", tiny("llama"), plain, beta=0.5, batch_size=2)
    with pytest.raises(PromptError, match="prompt 0 has no answer"):
        bare = plain.remove_columns("answer_ids")
        objective_of("answers", tiny("llama"), bare, beta=0.5, batch_size=2)
    with unchecked(), pytest.raises(ObjectiveError, match="objective='dpo': one of answers, pref"):
        objective_of("dpo", tiny("llama"), plain, beta=0.5, batch_size=2)
