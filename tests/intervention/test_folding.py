"""Offsets in the weights of a plain model: the same logits as with hooks, also after the disk."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import interp
from interp.intervention.folding import FoldError, plain_copy
from interp.intervention.iti import ITI
from interp.intervention.lofit import LoFiT
from tests.intervention.conformance import random_push
from tests.tiny import fresh, random_ids, tiny, tokenizer

HEADS = ["L0H1", "L0H2", "L1H3"]
PROMPTS = random_ids(8, 5, 11, seed=2)
slow = partial(pytest.param, marks=pytest.mark.slow)
FAMILIES = ["gpt2", "llama", "gpt_neox", "qwen3", "gemma2", *map(slow, ("gemma3", "olmo2", "opt"))]
FAMILIES += [slow("gpt_oss"), slow("bloom")]


def vectors() -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def plain_logits(model, lists=PROMPTS) -> list[torch.Tensor]:
    """Each prompt's logits, by itself."""
    with torch.no_grad():
        return [model(torch.tensor([tokens])).logits[0] for tokens in lists]


def hooked_logits(model, edit, lists=PROMPTS) -> list[torch.Tensor]:
    """The same from one left-padded batch."""
    batch = model.batch(lists)
    with torch.no_grad(), model.intervene(edit):
        out = model(batch.input_ids, attention_mask=batch.attention_mask)
    return [out[row, first:] for row, first in enumerate(batch.first.tolist())]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_model_is_the_edited_one_also_after_the_disk(family, tmp_path):
    model, edit = tiny(family), LoFiT(HEADS, vectors(), 0.7)
    before = hooked_logits(model, [])
    expected = hooked_logits(model, edit)
    folded = edit.fold(model)
    assert_same(plain_logits(folded), expected)
    folded.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(plain_logits(loaded), expected)
    assert all(torch.equal(a, b) for a, b in zip(hooked_logits(model, []), before))
    assert not torch.allclose(before[0], expected[0], atol=1e-2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_folded_model_writes_what_the_edited_one_does(family):
    model, edit = tiny(family), LoFiT(HEADS, vectors())
    folded = edit.fold(model)
    batch = model.batch(PROMPTS)
    options = {"attention_mask": batch.attention_mask, "max_new_tokens": 6, "do_sample": False}
    with model.intervene(edit):
        expected = model.original_model.generate(batch.input_ids, **options)
    assert torch.equal(folded.generate(batch.input_ids, **options), expected)


def test_a_folded_model_can_be_hooked_again(tmp_path):
    model, edit = tiny("llama"), LoFiT(HEADS, vectors())
    expected = hooked_logits(model, edit)
    folded = edit.fold(model)
    folded.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    for again in (interp.load(folded, tokenizer()), interp.load(tmp_path)):
        assert again.lazy
        assert_same(hooked_logits(again, []), expected)
        back = LoFiT(HEADS, -vectors())
        assert_same(hooked_logits(again, back), hooked_logits(model, []))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_was_loaded_from_disk_folds_and_goes_back_there(family, tmp_path):
    """The bridge changes the config of what it loads by itself."""
    plain_copy(tiny(family)).save_pretrained(tmp_path / "before")
    tokenizer().save_pretrained(tmp_path / "before")
    model, edit = interp.load(tmp_path / "before"), LoFiT(HEADS, vectors())
    expected = hooked_logits(model, edit)
    edit.fold(model).save_pretrained(tmp_path / "after")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert_same(plain_logits(loaded), expected)
    assert not loaded.config.output_attentions


def test_a_push_at_all_tokens_folds_too():
    model, edit = tiny("llama"), ITI(HEADS, *random_push(), at="all")
    assert_same(plain_logits(edit.fold(model)), hooked_logits(model, edit))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_sum_over_heads_is_rounded_once_in_bf16(family):
    model, edit = tiny(family, torch.bfloat16), LoFiT(HEADS, vectors())
    folded = edit.fold(model)
    assert folded.dtype == torch.bfloat16
    plain = plain_copy(model)
    for layer in (0, 1):
        weight = model.blocks[layer].attn.o.original_component.weight.detach().double()
        weight = weight if family == "gpt2" else weight.T
        rows = torch.zeros(4, 8, dtype=torch.float64)
        for head, vector in zip(HEADS, vectors()):
            if int(head[1]) == layer:
                rows[int(head[3])] = vector.double()
        written = rows.flatten() @ weight
        name = f"transformer.h.{layer}.attn.c_proj" if family == "gpt2" else (
            f"model.layers.{layer}.self_attn.o_proj"
        )  # fmt: skip
        bias, old = folded.get_submodule(name).bias, plain.get_submodule(name).bias
        old = 0 if old is None else old.detach().double()
        assert torch.equal(bias, (old + written).bfloat16())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_plain_copy_is_a_model_of_its_own(family):
    model = fresh(family)
    before = hooked_logits(model, [])
    copy = plain_copy(model)
    assert_same(plain_logits(copy), before)
    with torch.no_grad():
        for weight in copy.parameters():
            weight.zero_()
    assert all(torch.equal(a, b) for a, b in zip(hooked_logits(model, []), before))
    assert copy.config._attn_implementation != "interp_lazy"
    assert model.original_model.config._attn_implementation == "interp_lazy"


@pytest.mark.parametrize("family", ["mistral", "phi3", "gptj"])
def test_an_architecture_without_a_place_for_it_is_refused(family):
    model = tiny(family)
    kind = type(model.original_model).__name__
    said = f"{kind} has no place for a bias.*apply the intervention with model.intervene"
    with pytest.raises(FoldError, match=said):
        LoFiT(HEADS, vectors()).fold(model)


def test_edits_of_some_tokens_only_are_no_weights():
    model = tiny("llama")
    with pytest.raises(FoldError, match="when='prompt'; weights act at all tokens"):
        LoFiT(HEADS, vectors(), when="prompt").fold(model)
    with pytest.raises(FoldError, match="at='end'; weights act at all tokens"):
        ITI(HEADS, *random_push()).fold(model)


def test_weights_that_were_processed_are_refused():
    model = fresh("gpt2")
    model.enable_compatibility_mode()
    with pytest.raises(FoldError, match="compatibility mode.*load the model anew"):
        LoFiT(HEADS, vectors()).fold(model)


def test_heads_of_another_model_are_refused():
    with pytest.raises(interp.heads.HeadError, match="1 of 1 are not in"):
        LoFiT(["L4H0"], vectors()[:1]).fold(tiny("llama"))
