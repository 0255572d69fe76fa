"""Every intervention of tests/intervention/conformance.py, put through the same trials."""

from collections.abc import Sequence

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close

import interp
from interp.heads import HeadError
from interp.intervention.base import Intervention, InterventionError
from interp.model.hooked import HookedModel, HookError
from tests.intervention.conformance import (
    BATCHED,
    IDENTITIES,
    INTERVENTIONS,
    ONE_BY_ONE,
    PREPARING,
    SPANS,
    WHENS,
)
from tests.tiny import random_ids, tiny, with_answers

ALL = {**INTERVENTIONS, **IDENTITIES, **PREPARING}
PROMPTS = random_ids(8, 5, 11, seed=2)
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
FILES = {"intervention.json", "vectors.safetensors", "README.md"}

every = pytest.mark.parametrize("name", INTERVENTIONS)
batched = pytest.mark.parametrize("name", BATCHED)
one_by_one = pytest.mark.parametrize("name", ONE_BY_ONE)


def made(name: str, model: HookedModel, *whens: str) -> Intervention:
    """The intervention with the first of `whens` that it has; skips the trial where it has none."""
    for when in whens or WHENS:
        edit = ALL[name](model, when)
        if edit is not None:
            return edit
    pytest.skip(f"{name}: not on {model.name}, or not at {', '.join(whens or WHENS)} tokens")


def told(model: HookedModel, lists: Sequence[Sequence[int]], n_answer: int = 0):
    """Where spans lie, and how many tokens at each end are an answer that is only read."""
    return model.spans([SPANS] * len(lists), [len(tokens) - n_answer for tokens in lists])


def logits(model: HookedModel, lists=PROMPTS, n_answer: int = 0) -> list[torch.Tensor]:
    """The logits of each prompt's real tokens, from one left-padded batch."""
    batch = model.batch(lists)
    with torch.no_grad(), told(model, lists, n_answer):
        out = model(batch.input_ids, attention_mask=batch.attention_mask)
    return [out[row, first:] for row, first in enumerate(batch.first.tolist())]


def right_padded(model: HookedModel, lists=PROMPTS) -> list[torch.Tensor]:
    width = max(map(len, lists))
    ids = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in lists])
    mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in lists])
    with torch.no_grad(), told(model, lists):
        out = model(ids, attention_mask=mask)
    return [out[row, : len(tokens)] for row, tokens in enumerate(lists)]


def written(model: HookedModel, lists=PROMPTS, **options) -> list[list[int]]:
    """Five tokens behind each prompt, by Hugging Face's `generate`."""
    batch = model.batch(lists)
    with told(model, lists):
        out = model.original_model.generate(
            batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=5,
            min_new_tokens=5, do_sample=False, **options,
        )  # fmt: skip
    return out[:, batch.input_ids.shape[1] :].tolist()


def by_transformer_lens(model: HookedModel, cache: bool) -> list[list[int]]:
    found = []
    for tokens in PROMPTS[:2]:
        with told(model, [tokens]):
            out = model.generate(
                torch.tensor([tokens]), max_new_tokens=5, do_sample=False, verbose=False,
                use_past_kv_cache=cache, stop_at_eos=False, return_type="tokens",
            )  # fmt: skip
        found.append(out[0, len(tokens) :].tolist())
    return found


def differs(one, other) -> bool:
    return any((a - b).abs().max() > 1e-3 for a, b in zip(one, other, strict=True))


def identical(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def close(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        assert_close(a, b, **TOLERANCE)


# It acts, and is undone


@every
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_acts_and_is_undone(name, family):
    model = tiny(family)
    before = logits(model)
    with model.intervene(made(name, model)):
        edited = logits(model, n_answer=2)
    assert differs(edited, before)
    assert identical(logits(model), before)


@every
def test_it_is_undone_after_an_error(name):
    model = tiny("llama")
    before = logits(model)
    edit = made(name, model)
    with pytest.raises(ZeroDivisionError), model.intervene(edit):
        logits(model)
        raise ZeroDivisionError
    assert identical(logits(model), before) and not model.applied

    def fail(value, hook):
        raise ZeroDivisionError

    broken = model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", fail)])
    with pytest.raises(ZeroDivisionError), model.intervene(edit), broken:
        logits(model)
    assert identical(logits(model), before)
    assert not any(point.has_hooks() for point in model.hook_dict.values())


@every
def test_blocks_nest(name):
    model = tiny("llama")
    edit, other = made(name, model), interp.Ablate(["L1H0"])
    with model.intervene(edit):
        alone = logits(model, n_answer=2)
        with model.intervene(other):
            both = logits(model, n_answer=2)
            assert model.applied == (edit, other)
        assert identical(logits(model, n_answer=2), alone)
    with model.intervene(edit, [other]):
        assert identical(logits(model, n_answer=2), both)
    assert differs(both, alone)


@every
def test_nothing_is_left_over_from_the_prompt_before(name):
    model = tiny("llama")
    edit, others = made(name, model), random_ids(13, 6, seed=5)
    with model.intervene(edit):
        expected = logits(model)
    with model.intervene(edit):
        written(model, others)
        logits(model, others)
        assert identical(logits(model), expected)


@pytest.mark.parametrize("name", IDENTITIES)
def test_nothing_done_is_nothing_changed(name):
    model = tiny("llama")
    before = logits(model)
    with model.intervene(made(name, model)):
        assert identical(logits(model), before)


# Batches, padding, the cache, beams


@batched
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "mistral", "qwen3"])
def test_a_batch_is_one_by_one(name, family):
    """Mixed lengths, padded on the left and on the right."""
    model = tiny(family)
    with model.intervene(made(name, model)):
        alone = [logits(model, [tokens])[0] for tokens in PROMPTS]
        for together in (logits(model), right_padded(model)):
            close(together, alone)


@batched
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_is_written_as_one_by_one(name, beams):
    """What an intervention keeps while writing belongs to a row, and follows it among beams."""
    model = tiny("llama")
    with model.intervene(made(name, model)):
        alone = [written(model, [tokens], num_beams=beams)[0] for tokens in PROMPTS]
        assert written(model, num_beams=beams) == alone


@one_by_one
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_transformers_writes_the_same_without_the_cache(name, family):
    model = tiny(family)
    with model.intervene(made(name, model, "both")):
        assert written(model, use_cache=True) == written(model, use_cache=False)


@one_by_one
@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_transformer_lens_writes_the_same_with_and_without_the_cache(name, when, family):
    model = tiny(family)
    with model.intervene(made(name, model, when)):
        expected = written(model)
        for cache in (True, False):
            ours = by_transformer_lens(model, cache)
            for row, tokens in zip(ours, expected, strict=False):
                # transformers' min_new_tokens forbids the end token, ours writes it
                stop = tokens.index(2) if 2 in tokens else row.index(2) if 2 in row else 5
                assert row[:stop] == tokens[:stop]


@batched
@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_answer_that_is_read_is_as_one_that_was_written(name, when, family):
    """Teacher-forced evaluation, against the prompt first and then a token at a time."""
    model = tiny(family)
    answers = random_ids(*[3] * len(PROMPTS), seed=9)
    whole = [prompt + answer for prompt, answer in zip(PROMPTS, answers)]
    with model.intervene(made(name, model, when)):
        at_once = [out[-3:] for out in logits(model, whole, n_answer=3)]
        for row, (prompt, answer) in enumerate(zip(PROMPTS, answers)):
            cache, found = None, []
            for tokens in (prompt, *([token] for token in answer)):
                known = {} if cache is None else {"past_key_values": cache}
                with torch.no_grad(), model.spans([SPANS]):
                    out = model.original_model(torch.tensor([tokens]), use_cache=True, **known)
                cache = out.past_key_values
                found.append(out.logits[0, -1])
            assert_close(at_once[row], torch.stack(found[1:]), **TOLERANCE)


@batched
def test_what_comes_later_changes_nothing_earlier_unless_it_says_so(name):
    model = tiny("llama")
    edit = made(name, model)
    if not edit.causal:
        pytest.skip(f"{name} is not causal, and says so")
    longer = [prompt + more for prompt, more in zip(PROMPTS, random_ids(4, 2, 3, seed=6))]
    lengths = [len(prompt) for prompt in PROMPTS]
    with model.intervene(edit):
        short = logits(model)
        with model.spans([SPANS] * 3, lengths):
            batch = model.batch(longer)
            with torch.no_grad():
                out = model(batch.input_ids, attention_mask=batch.attention_mask)
    first = batch.first.tolist()
    close([out[row, first[row] : first[row] + n] for row, n in enumerate(lengths)], short)


@every
def test_the_prompt_is_left_alone_when_only_generated_tokens_are_meant(name):
    model = tiny("llama")
    before = logits(model)
    with model.intervene(made(name, model, "generated")):
        assert identical(logits(model), before)


# Types and devices


@every
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16], ids=str)
def test_it_works_in_bf16(name, family, made_in):
    model = tiny(family, torch.bfloat16)
    before = logits(model)
    with model.intervene(made(name, tiny(family, made_in))):
        edited = logits(model, n_answer=2)
    assert all(found.dtype == torch.bfloat16 and found.isfinite().all() for found in edited)
    assert differs(edited, before)


# What it says, and what is kept of it


@pytest.mark.parametrize("name", ALL)
def test_saving_keeps_it(name, tmp_path):
    model = tiny("llama")
    edit = made(name, model, "prompt", "both", "generated")
    edit.save_pretrained(tmp_path)
    loaded = interp.load_intervention(tmp_path)
    again = type(edit).from_pretrained(tmp_path)
    assert loaded == edit == again and hash(loaded) == hash(edit) and loaded is not edit
    assert loaded.made_on == edit.made_on and repr(loaded) == repr(edit)
    assert repr(edit) in (tmp_path / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} <= FILES
    if name in INTERVENTIONS:
        with model.intervene(edit):
            before = logits(model, n_answer=2)
        for other in (loaded, tmp_path, str(tmp_path)):
            with model.intervene(other):
                assert identical(logits(model, n_answer=2), before)


@pytest.mark.parametrize("name", ALL)
def test_a_model_of_another_kind_is_refused(name, tmp_path):
    edit = made(name, tiny("llama"))
    edit.save_pretrained(tmp_path, tiny("llama"))
    loaded = interp.load_intervention(tmp_path, tiny("llama"))
    said = "made on LlamaForCausalLM .*architecture LlamaForCausalLM, not GPT2LMHeadModel"
    with pytest.raises(InterventionError, match=said):
        interp.load_intervention(tmp_path, tiny("gpt2"))
    with pytest.raises(InterventionError, match=said), tiny("gpt2").intervene(loaded):
        raise AssertionError("the block was entered")


@every
def test_it_says_in_words_what_it_does(name):
    model = tiny("llama")
    edits = [edit for when in WHENS if (edit := ALL[name](model, when)) is not None]
    for edit in edits:
        heads = getattr(edit, "heads", None)
        assert heads is None or str(len(heads)) in repr(edit)
        assert "hook: blocks.0." in edit.describe(model)
        assert f"stored numbers: {edit.n_stored}" in edit.describe()
    assert len({repr(edit) for edit in edits}) == len(edits)


@pytest.mark.parametrize("name", ALL)
def test_it_is_frozen(name):
    edit = made(name, tiny("llama"))
    assert isinstance(edit, Intervention)
    for field in edit.__dataclass_fields__:
        with pytest.raises(AttributeError):
            setattr(edit, field, ())


@every
def test_heads_that_the_model_lacks_are_named_before_it_runs(name, monkeypatch):
    from tests.intervention import conformance

    model = tiny("llama")
    if getattr(made(name, model), "heads", None) is None:
        pytest.skip(f"{name} names no heads")
    monkeypatch.setattr(conformance, "HEADS", ["L0H1", "L7H0", "L0H4"])
    with (
        pytest.raises(HeadError, match="2 of 3.*first: L0H4.*layers 0-1 and heads 0-3"),
        model.intervene(made(name, model)),
    ):
        raise AssertionError("the block was entered")


@every
def test_a_hook_that_never_fires_is_an_error(name, monkeypatch):
    model = tiny("llama")
    edit = made(name, model)
    with model.intervene(edit):
        pass  # the model did not run
    real, silent = type(edit).hooks, "blocks.0.attn.hook_hidden_states"  # for fused projections
    monkeypatch.setattr(type(edit), "hooks", lambda self, m: [*real(self, m), (silent, len)])
    with pytest.raises(HookError, match=f"{silent} never fired"), model.intervene(edit):
        logits(model)
    with pytest.raises(ZeroDivisionError), model.intervene(edit):  # not instead of another error
        logits(model)
        raise ZeroDivisionError


# Those that change what goes in


@pytest.mark.parametrize("name", PREPARING)
def test_what_goes_in_is_another_prompt(name):
    """Spans and answers still are where they say, and the row that was given is left as it was."""
    model, edit = tiny("llama"), made(name, tiny("llama"))
    prompts = with_answers(PROMPTS, random_ids(2, 1, 3, seed=4), [(1, 3)] * 3)
    for row in prompts:
        before = {key: str(value) for key, value in row.items()}
        new = edit.prepare(row, model)
        assert new["input_ids"] != row["input_ids"]
        assert {key: str(value) for key, value in row.items()} == before
        assert new["answer_ids"] == row["answer_ids"]
        start, end = new["spans"]["answer"]
        assert new["input_ids"][start:end] == row["input_ids"][1:3]
    plain = interp.evaluate(model, prompts, progress=False)
    with model.intervene(edit):
        changed = interp.evaluate(model, prompts, progress=False)
        assert model.prepare(row) == new
    in_its_place = Dataset.from_list([edit.prepare(row, model) for row in prompts])
    expected = interp.evaluate(model, in_its_place, progress=False)
    assert changed.loss == pytest.approx(expected.loss) != pytest.approx(plain.loss)
    assert changed.metadata["task"] == plain.metadata["task"]
    assert model.prepare(row) is row


@pytest.mark.parametrize("name", PREPARING)
def test_the_loss_of_another_text_is_not_asked_for(name):
    model = tiny("llama")
    with (
        model.intervene(made(name, model)),
        pytest.raises(interp.evaluation.EvaluationError, match="without answers.*changes prompts"),
    ):
        interp.evaluate(model, "w5 w6 w7 w8 w9 w10", progress=False)
