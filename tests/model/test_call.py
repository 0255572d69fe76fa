"""`model.call`: what a hook is told of the forward pass, whoever makes it."""

import pytest
import torch

from interp.model.hooked import load
from tests.model.families import build, inputs

IDS = torch.randint(3, 59, (2, 8), generator=torch.Generator().manual_seed(3))
NEW = 5


@pytest.fixture(scope="module")
def model():
    return load(build("llama"))


@pytest.fixture
def calls(model):
    """The calls made in a test, one per pass."""
    seen = []

    def look(attention, hook):
        seen.append(model.call)
        assert torch.equal(attention.positions, model.call.positions)
        assert torch.equal(attention.real_queries, model.call.real)
        n_keys = model.call.real_keys.shape[1]
        assert torch.equal(attention.real_keys[:, :n_keys], model.call.real_keys)
        assert not attention.real_keys[:, n_keys:].any()  # slots of a static cache

    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_attention", look)]):
        yield seen


def padded(side):
    mask = torch.ones_like(IDS)
    if side == "left":
        mask[1, :3] = 0
    else:
        mask[1, -3:] = 0
    return mask


def hf_generate(model, mask, **kwargs):
    return model.original_model.generate(
        input_ids=IDS, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW,
        pad_token_id=0, **({"do_sample": False} | kwargs),
    )  # fmt: skip


def test_a_plain_pass_is_a_prompt_s(model, calls):
    model(IDS)
    (call,) = calls
    assert (call.phase, call.step, call.n_tokens, call.prompt_width) == ("prompt", 0, 8, 8)
    assert torch.equal(call.input_ids, IDS)
    assert call.positions.tolist() == [list(range(8))] * 2
    assert call.real.all() and call.prompt_lengths.tolist() == [8, 8]
    assert call.rows("prompt").all() and call.rows("both").all()
    assert not call.rows("generated").any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_rows_and_takes_no_positions(model, calls, side):
    mask = padded(side)
    model(IDS, attention_mask=mask)
    (call,) = calls
    assert torch.equal(call.real, mask.bool()) and torch.equal(call.rows("prompt"), mask.bool())
    assert call.prompt_lengths.tolist() == [8, 5]
    assert call.positions[1][mask[1].bool()].tolist() == [0, 1, 2, 3, 4]


def assert_prompt_then_steps(calls, mask, cached=True):
    lengths = mask.sum(1)
    assert [call.step for call in calls] == list(range(NEW))
    assert [call.phase for call in calls] == ["prompt"] + ["generated"] * (NEW - 1)
    for step, call in enumerate(calls):
        assert torch.equal(call.prompt_lengths, lengths)
        assert torch.equal(call.positions[:, -1], lengths + step - 1)
        assert call.n_tokens == (1 if cached and step else 8 if cached else 8 + step)
        generated = call.rows("generated")
        assert generated.sum(1).tolist() == [min(step, call.n_tokens)] * 2
        assert (call.rows("prompt") ^ generated).equal(call.rows("both"))
        assert not (call.rows("prompt") & generated).any()


def test_hugging_face_s_generate(model, calls):
    mask = padded("left")
    hf_generate(model, mask)
    assert_prompt_then_steps(calls, mask)


def test_one_generation_after_another(model, calls):
    """A longer or shorter prompt before does not matter."""
    model(IDS[:, :3])
    hf_generate(model, padded("left"))
    model(torch.cat([IDS, IDS], dim=1))
    first = len(calls)
    hf_generate(model, padded("left"))
    assert_prompt_then_steps(calls[first:], padded("left"))


@pytest.mark.parametrize("cached", [True, False])
def test_transformer_lens_generate(model, calls, cached):
    model.generate(
        IDS, max_new_tokens=NEW, use_past_kv_cache=cached, verbose=False, stop_at_eos=False,
        do_sample=False,
    )  # fmt: skip
    assert_prompt_then_steps(calls, torch.ones_like(IDS), cached)
    model(IDS)
    assert calls[-1].phase == "prompt"  # the generation is over


def test_a_generation_that_fails_is_over(model, calls):
    with pytest.raises(ValueError, match="mine"), model.hooks([("embed.hook_out", fail)]):
        model.generate(IDS, max_new_tokens=2, verbose=False)
    model(IDS[:, :5])
    assert calls[-1].phase == "prompt" and calls[-1].prompt_width == 5


def fail(value, hook):
    raise ValueError("mine")


def test_beams_keep_their_prompt_s_positions(model, calls):
    mask = padded("left")
    hf_generate(model, mask, num_beams=3)
    lengths = mask.sum(1).repeat_interleave(3)
    assert len(calls) >= NEW - 1
    for step, call in enumerate(calls):
        assert torch.equal(call.positions[:, -1], lengths + step - 1)
        assert torch.equal(call.prompt_lengths, lengths)
        assert torch.equal(call.rows("both")[:, -1], torch.ones(6, dtype=torch.bool))


def test_a_prompt_in_chunks_is_one_prompt(model, calls):
    mask = padded("left")
    with torch.no_grad():
        past = None
        for start, stop in ((0, 3), (3, 6), (6, 8)):
            out = model.original_model(
                input_ids=IDS[:, start:stop], attention_mask=mask[:, :stop],
                past_key_values=past, use_cache=True,
            )  # fmt: skip
            past = out.past_key_values
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        model.original_model(input_ids=IDS[:, :1], attention_mask=mask, past_key_values=past)
    assert [call.phase for call in calls] == ["prompt"] * 3 + ["generated"]
    assert [call.n_tokens for call in calls] == [3, 3, 2, 1]
    assert calls[2].prompt_lengths.tolist() == [8, 5]
    assert calls[-1].prompt_lengths.tolist() == [8, 5] and calls[-1].step == 1
    assert calls[1].positions.tolist() == [[3, 4, 5], [0, 1, 2]]
    rows = torch.cat([call.rows("prompt") for call in calls[:3]], dim=1)
    assert torch.equal(rows, mask[:, :8].bool())


def test_hugging_face_s_chunked_prefill(model, calls):
    hf_generate(model, torch.ones_like(IDS), prefill_chunk_size=3)
    assert [call.phase for call in calls] == ["prompt"] * 3 + ["generated"] * (NEW - 1)
    assert calls[-1].prompt_lengths.tolist() == [8, 8]


def test_a_cache_from_elsewhere_is_a_prompt(model, calls):
    """Its tokens were the prompt: the model was asked something else in between."""
    with torch.no_grad():
        past = model.original_model(input_ids=IDS, use_cache=True).past_key_values
        model(IDS[:, :2])
        model.original_model(input_ids=IDS[:, :1], past_key_values=past)
    assert calls[-1].prompt_lengths.tolist() == [8, 8] and calls[-1].phase == "generated"


def test_images_have_no_input_ids():
    vit = load(build("vit"))
    seen = []
    point = "blocks.0.attn.hook_attention"
    with vit.hooks(fwd_hooks=[(point, lambda a, hook: seen.append((vit.call, a)))]):
        vit(inputs("vit")["pixel_values"])
    call, attention = seen[0]
    assert call.input_ids is None
    assert attention.real_keys.all() and attention.positions[0].tolist() == list(range(17))


def test_a_static_cache_s_unfilled_slots_are_not_seen(model, calls):
    out = hf_generate(model, padded("left"), cache_implementation="static")
    assert torch.equal(out, hf_generate(model, padded("left")))
