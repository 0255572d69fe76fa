"""A replay is the whole model's run: from any layer, from any position, on any stack of prompts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import interp
from interp.model import replay
from interp.model.replay import ReplayError, record
from tests.model.families import DECODERS, EAGER_ONLY
from tests.tiny import fresh, random_ids, tiny

LISTS = [[min(i, 58) for i in ids] for ids in random_ids(9, 12, 12)]  # 59 is an image to LLaVA
READ = [5, -1]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def recorded(family: str, dtype=torch.float32):
    model = tiny(family, dtype)
    batch = model.batch(LISTS)
    return model, batch, record(model, batch.input_ids, batch.attention_mask, read=READ)


@pytest.mark.parametrize("family", [*DECODERS, *EAGER_ONLY, "llava", "bert"])
def test_nothing_changed_is_nothing_changed(family):
    model, batch, recording = recorded(family)
    with torch.no_grad():
        whole = model(batch.input_ids, attention_mask=batch.attention_mask)[:, READ]
    real = batch.attention_mask[:, READ].bool()
    assert_close(recording.logits[real], whole[real], **CLOSE)
    assert recording.can_start_late == (family != "bert")
    rows = torch.tensor([0, 2, 2, 1, 0])
    for layer in range(recording.n_layers):
        for start in (0, 4, 6, 11) if recording.can_start_late else (0,):
            assert_close(recording.replay(layer, rows, start), recording.logits[rows], **CLOSE)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gpt_neox", "gemma2", "bloom"])
@settings(max_examples=20)
@given(
    layer=st.integers(0, 1), position=st.integers(3, 11), start=st.integers(0, 11),
    row=st.integers(0, 2), name=st.sampled_from(["hook_resid_pre", "hook_mlp_out", "attn.hook_v"]),
)  # fmt: skip
def test_a_change_at_a_position_is_that_of_the_whole_model(
    family, layer, position, start, row, name
):
    model, batch, recording = recorded(family)
    start = min(start, position)

    def change(offset):
        def fn(value, hook):
            edited = value.clone()
            edited[:, position - offset] *= -0.5
            return edited

        return [(f"blocks.{layer}.{name}", fn)]

    with torch.no_grad(), model.hooks(fwd_hooks=change(0)):
        whole = model(batch.input_ids, attention_mask=batch.attention_mask)[row, READ]
    with model.hooks(fwd_hooks=change(start)):
        ours = recording.replay(layer, torch.tensor([row, row]), start)
    real = batch.attention_mask[row, READ].bool()
    assert_close(ours[0][real], whole[real], **CLOSE)
    assert_close(ours[1], ours[0])


def test_blocks_before_are_not_run():
    model, _, recording = recorded("llama")
    ran = []
    hooks = [(f"blocks.{i}.hook_resid_post", lambda v, hook: ran.append(hook.name)) for i in (0, 1)]
    with model.hooks(fwd_hooks=hooks):
        recording.replay(1)
    assert ran == ["blocks.1.hook_out"]
    assert "forward" not in model.blocks[0].__dict__
    model(torch.tensor([LISTS[1]]))
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def test_only_the_tokens_asked_for_are_run():
    model, _, recording = recorded("llama")
    widths = []
    with model.hooks(
        fwd_hooks=[("blocks.1.hook_resid_pre", lambda v, hook: widths.append(v.shape))]
    ):
        recording.replay(0, torch.tensor([1, 1, 1, 1]), start=7)
    assert widths == [(4, 5, 32)]


def test_columns_before_the_start_keep_their_logits():
    model, _, recording = recorded("llama")

    def silence(z, hook):
        return torch.zeros_like(z)

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", silence)]):
        logits = recording.replay(1, start=8)
    assert torch.equal(logits[:, 0], recording.logits[:, 0])
    assert not torch.allclose(logits[:, 1], recording.logits[:, 1])


def test_an_error_leaves_the_model_as_it_was():
    model, batch, recording = recorded("llama")

    def fail(value, hook):
        raise ZeroDivisionError

    with (
        pytest.raises(ZeroDivisionError),
        model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", fail)]),
    ):
        recording.replay(1, start=3)
    assert "forward" not in model.blocks[0].__dict__
    with torch.no_grad():
        again = model(batch.input_ids, attention_mask=batch.attention_mask)[:, READ]
    assert_close(again[1], recording.logits[1], **CLOSE)


def test_interventions_act_in_the_recording_and_in_replays():
    model = tiny("llama")
    batch = model.batch(LISTS)
    edit = interp.Ablate(["L0H1", "L1H2"], when="prompt")
    with model.intervene(edit):
        recording = record(model, batch.input_ids, batch.attention_mask)
        with torch.no_grad():
            whole = model(batch.input_ids, attention_mask=batch.attention_mask)[:, -1:]
        assert not recording.can_start_late  # an edit may look at later tokens
        assert_close(recording.replay(1), whole, **CLOSE)
        with pytest.raises(ReplayError, match=r"start=3.*intervention"):
            recording.replay(1, start=3)


def test_hooks_are_told_of_the_prompt():
    model, batch, _ = recorded("llama")
    spans = [{"answer": [1, 2]}, {"answer": [2, 3]}, {"answer": [3, 4]}]
    seen = []

    def look(value, hook):
        call = model.call
        seen.append((call.phase, call.spans, call.positions[0].tolist(), call.rows("prompt").all()))

    with model.spans(spans):
        recording = record(model, batch.input_ids, batch.attention_mask)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", look)]):
        recording.replay(1, torch.tensor([2, 1]), start=11)
    assert seen == [("prompt", [spans[2], spans[1]], [11], True)]


def test_half_precision():
    _, _, recording = recorded("llama", torch.bfloat16)
    again = recording.replay(1, start=6)
    assert again.dtype == torch.bfloat16
    assert_close(again, recording.logits, atol=0.05, rtol=0.05)


def test_the_number_of_tokens_follows_the_memory(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(replay, "_free_memory", lambda device: 1 << 24)
    some = replay.tokens_at_once(model)
    monkeypatch.setattr(replay, "_free_memory", lambda device: 1 << 23)
    assert 1 <= replay.tokens_at_once(model) < some
    monkeypatch.setattr(replay, "_free_memory", lambda device: 1 << 50)
    assert replay.tokens_at_once(model) == replay.MOST_TOKENS["cpu"]


def test_what_cannot_be_replayed_is_refused():
    model = fresh("llama")
    ids = torch.tensor([LISTS[1]])
    with pytest.raises(ReplayError, match=r"layer=5, start=0: layers 0-1, positions 0-11"):
        record(model, ids).replay(5)
    with pytest.raises(ReplayError, match="start=12"):
        record(model, ids).replay(0, start=12)
    model.train()
    with pytest.raises(ReplayError, match=r"training mode.*model\.eval\(\)"):
        record(model, ids)
    model.eval()
    # a block that depends on more than its input
    model.blocks[1].original_component.register_forward_hook(
        lambda module, args, output: output + torch.rand_like(output)
    )
    with pytest.raises(ReplayError, match="a replay without any change differs"):
        record(model, ids)


@pytest.mark.parametrize("family", [*DECODERS, *EAGER_ONLY])
def test_a_lean_replay_gives_the_same_logits(family):
    model, _, recording = recorded(family)
    for layer, start in ((0, 0), (1, 6)):
        found = recording.replay(layer, start=start, lean=True)
        assert_close(found, recording.logits, **CLOSE)
    assert "forward" not in model.blocks[-1].mlp.__dict__


def test_a_lean_replay_runs_the_last_mlp_where_it_is_read():
    model, _, recording = recorded("llama")
    rows = []
    handle = model.blocks[1].mlp.register_forward_hook(
        lambda module, args, output: rows.append((output != 0).any(-1).sum(1).tolist())
    )
    recording.replay(0, lean=True)
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda value, hook: None)]):
        recording.replay(0, lean=True)  # somebody looks
    handle.remove()
    assert rows == [[2, 2, 2], [9, 12, 12]]  # nothing stands in the first one's padding


@given(
    starts=st.lists(st.integers(0, 11), min_size=1, max_size=9),
    most=st.integers(1, 4), cost=st.floats(0, 40),
)  # fmt: skip
def test_passes_are_cut_where_they_cost_least(starts, most, cost):
    """Against every way of cutting."""
    starts = sorted(starts)

    def price(cuts):
        return sum((b - a) * (12 - starts[a]) + cost for a, b in cuts)

    def every(first):
        if first == len(starts):
            yield []
        for stop in range(first + 1, min(len(starts), first + most) + 1):
            for rest in every(stop):
                yield [(first, stop), *rest]

    found = replay.passes(starts, 12, most, cost)
    assert [a for a, _ in found[1:]] == [b for _, b in found[:-1]]
    assert price(found) == pytest.approx(min(map(price, every(0))))
