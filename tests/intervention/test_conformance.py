"""Every intervention of tests/intervention/conformance.py, put through the same trials."""

import pytest
import torch
from torch.testing import assert_close

import interp
from interp.heads import HeadError
from interp.intervention.base import Intervention
from interp.model.hooked import HookError
from tests.intervention.conformance import HEADS, IDENTITIES, INTERVENTIONS, ONE_BY_ONE
from tests.tiny import random_ids, tiny

WHENS = ["prompt", "generated", "both"]
PROMPTS = random_ids(8, 5, 11, seed=2)
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}

every = pytest.mark.parametrize("name", INTERVENTIONS)
each = pytest.mark.parametrize("name", ONE_BY_ONE)


def logits(model, lists=PROMPTS) -> list[torch.Tensor]:
    """The logits of each prompt's real tokens, from one left-padded batch."""
    batch = model.batch(lists)
    with torch.no_grad():
        out = model(batch.input_ids, attention_mask=batch.attention_mask)
    return [out[row, first:] for row, first in enumerate(batch.first.tolist())]


def right_padded(model, lists=PROMPTS) -> list[torch.Tensor]:
    width = max(map(len, lists))
    ids = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in lists])
    mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in lists])
    with torch.no_grad():
        out = model(ids, attention_mask=mask)
    return [out[row, : len(tokens)] for row, tokens in enumerate(lists)]


def differs(one, other) -> bool:
    return any((a - b).abs().max() > 1e-3 for a, b in zip(one, other, strict=True))


def identical(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@every
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_acts_and_is_undone(name, family):
    model = tiny(family)
    before = logits(model)
    edit = INTERVENTIONS[name](model, "both")
    with model.intervene(edit):
        edited = logits(model)
    assert differs(edited, before)
    assert identical(logits(model), before)


@every
def test_it_is_undone_after_an_error(name):
    model = tiny("llama")
    before = logits(model)
    edit = INTERVENTIONS[name](model, "both")
    with pytest.raises(ZeroDivisionError), model.intervene(edit):
        logits(model)
        raise ZeroDivisionError
    assert identical(logits(model), before)

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
    edit, other = INTERVENTIONS[name](model, "both"), interp.Ablate(["L1H0"])
    with model.intervene(edit):
        alone = logits(model)
        with model.intervene(other):
            both = logits(model)
        assert identical(logits(model), alone)
    with model.intervene(edit, [other]):
        assert identical(logits(model), both)
    assert differs(both, alone)


@each
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "mistral", "qwen3"])
def test_a_batch_is_one_by_one(name, family):
    """Mixed lengths, padded on the left and on the right."""
    model = tiny(family)
    with model.intervene(ONE_BY_ONE[name](model, "both")):
        alone = [logits(model, [tokens])[0] for tokens in PROMPTS]
        for together in (logits(model), right_padded(model)):
            for ours, expected in zip(together, alone, strict=True):
                assert_close(ours, expected, **TOLERANCE)


def by_transformers(model, cache: bool) -> list[list[int]]:
    batch = model.batch(PROMPTS)
    out = model.original_model.generate(
        batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=5, min_new_tokens=5,
        do_sample=False, use_cache=cache,
    )  # fmt: skip
    return out[:, batch.input_ids.shape[1] :].tolist()


def by_transformer_lens(model, cache: bool) -> list[list[int]]:
    found = []
    for tokens in PROMPTS[:2]:
        out = model.generate(
            torch.tensor([tokens]), max_new_tokens=5, do_sample=False, verbose=False,
            use_past_kv_cache=cache, stop_at_eos=False, return_type="tokens",
        )  # fmt: skip
        found.append(out[0, len(tokens) :].tolist())
    return found


@each
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_transformers_writes_the_same_without_the_cache(name, family):
    model = tiny(family)
    with model.intervene(ONE_BY_ONE[name](model, "both")):
        assert by_transformers(model, True) == by_transformers(model, False)


@each
@pytest.mark.parametrize("when", WHENS)
@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_transformer_lens_writes_the_same_with_and_without_the_cache(name, when, family):
    model = tiny(family)
    with model.intervene(ONE_BY_ONE[name](model, when)):
        expected = by_transformers(model, True)
        for cache in (True, False):
            ours = by_transformer_lens(model, cache)
            for row, tokens in zip(ours, expected, strict=False):
                # transformers' min_new_tokens forbids the end token, ours writes it
                stop = tokens.index(2) if 2 in tokens else row.index(2) if 2 in row else 5
                assert row[:stop] == tokens[:stop]


@every
def test_the_prompt_is_left_alone_when_only_generated_tokens_are_meant(name):
    model = tiny("llama")
    before = logits(model)
    with model.intervene(INTERVENTIONS[name](model, "generated")):
        assert identical(logits(model), before)


@every
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_works_in_bf16(name, family):
    model = tiny(family, torch.bfloat16)
    before = logits(model)
    with model.intervene(INTERVENTIONS[name](model, "both")):
        edited = logits(model)
    assert all(found.dtype == torch.bfloat16 and found.isfinite().all() for found in edited)
    assert differs(edited, before)


@pytest.mark.parametrize("name", IDENTITIES)
def test_nothing_done_is_nothing_changed(name):
    model = tiny("llama")
    before = logits(model)
    with model.intervene(IDENTITIES[name](model, "both")):
        assert identical(logits(model), before)


@pytest.mark.parametrize("name", {**INTERVENTIONS, **IDENTITIES})
def test_saving_keeps_it(name, tmp_path):
    model = tiny("llama")
    edit = {**INTERVENTIONS, **IDENTITIES}[name](model, "prompt")
    edit.save_pretrained(tmp_path)
    loaded = interp.load_intervention(tmp_path)
    again = type(edit).from_pretrained(tmp_path)
    assert loaded == edit == again and hash(loaded) == hash(edit) and loaded is not edit
    assert repr(edit) in (tmp_path / "README.md").read_text()
    for path in tmp_path.iterdir():
        assert path.name in ("intervention.json", "vectors.safetensors", "README.md")
    if name in IDENTITIES:
        return
    with model.intervene(edit):
        before = logits(model)
    with model.intervene(loaded):
        assert identical(logits(model), before)


@every
def test_it_says_in_words_what_it_does(name):
    model = tiny("llama")
    edit = INTERVENTIONS[name](model, "prompt")
    assert str(len(HEADS)) in repr(edit) and "prompt" in repr(edit)
    assert "hook: blocks.0.attn." in edit.describe(model)
    assert len({repr(INTERVENTIONS[name](model, when)) for when in WHENS}) == 3


@every
def test_it_is_frozen(name):
    edit = INTERVENTIONS[name](tiny("llama"), "both")
    assert isinstance(edit, Intervention)
    with pytest.raises(AttributeError):
        edit.heads = ()


@pytest.mark.parametrize("name", [n for n in INTERVENTIONS if "bank" not in n])
def test_heads_that_the_model_lacks_are_named_before_it_runs(name, monkeypatch):
    from tests.intervention import conformance

    monkeypatch.setattr(conformance, "HEADS", ["L0H1", "L7H0", "L0H4"])
    edit = INTERVENTIONS[name](tiny("llama"), "both")
    with (
        pytest.raises(HeadError, match="2 of 3.*first: L0H4.*layers 0-1 and heads 0-3"),
        tiny("llama").intervene(edit),
    ):
        raise AssertionError("the block was entered")


@every
def test_a_hook_that_never_fires_is_an_error(name, monkeypatch):
    model = tiny("llama")
    edit = INTERVENTIONS[name](model, "both")
    with model.intervene(edit):
        pass  # the model did not run
    real, silent = type(edit).hooks, "blocks.0.attn.hook_hidden_states"  # for fused projections
    monkeypatch.setattr(type(edit), "hooks", lambda self, m: [*real(self, m), (silent, len)])
    with pytest.raises(HookError, match=f"{silent} never fired"), model.intervene(edit):
        logits(model)
    with pytest.raises(ZeroDivisionError), model.intervene(edit):  # not instead of another error
        logits(model)
        raise ZeroDivisionError
