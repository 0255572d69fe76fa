"""Heads of the language model and of the image encoder: both are named, looked at and edited."""

import pytest
import torch
from torch.testing import assert_close

import interp
from interp.heads import Head, HeadError
from interp.model.images import image_mark, images_of
from interp.model.towers import towers
from interp.tasks import from_examples
from tests import tiny
from tests.model import vision_families as vision
from tests.model.vision_families import picture

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
POINTS = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_attention", "hook_pattern")


@pytest.fixture(params=vision.FAMILIES)
def family(request) -> str:
    return request.param


def batch_of(model):
    mark = image_mark(model)
    prompts = from_examples(
        model,
        [
            {"text": f"w5 {mark} w6 w7", "image": picture(0)},
            {"text": f"{mark} {mark} w9", "image": [picture(1, 16, 32), picture(2)]},
        ],
    )
    return model.batch(prompts["input_ids"], images=images_of(prompts))


def run(model, batch):
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, **batch.inputs)
    return logits[batch.attention_mask.bool()]


def watched(model, batch, names):
    """What hooks of these names see, in the order in which they fire."""
    seen = {name: [] for name in names}

    def look(name):
        return name, lambda value, hook: seen[name].append(value)

    with model.hooks(fwd_hooks=[look(name) for name in names]):
        run(model, batch)
    return seen


def test_both_towers_are_known_with_their_own_layers_and_heads(family):
    model = vision.tiny(family)
    found = towers(model)
    assert {(t.name, len(t.layers), t.n_heads) for t in found.values()} == {
        ("text", 2, 4),
        ("vision", 3, 2),
    }
    model.check_heads([Head(1, 3), Head(2, 1, "vision")], tower=None)
    model.check_heads([Head(2, 1, "vision")], tower="vision")
    for head in (Head(2, 0), Head(0, 4), Head(3, 0, "vision"), Head(0, 2, "vision")):
        with pytest.raises(HeadError, match=rf"{head}.*layers 0-\d and heads 0-\d in its tower"):
            model.check_heads([Head(0, 0), head], tower=None)
        with pytest.raises(HeadError):
            model.hook_of(head, "hook_z")


def test_what_edits_the_language_model_does_not_take_the_encoder_s_heads(family):
    model = vision.tiny(family)
    for call in (
        lambda: model.check_heads([Head(0, 0), Head(1, 1, "vision")]),
        lambda: model.intervene(interp.Temperature([Head(1, 1, "vision")], 2.0)).__enter__(),
    ):
        with pytest.raises(HeadError, match="not of the tower 'text'.*vision:L1H1.*hook_of"):
            call()


def test_a_text_only_model_has_one_tower():
    model = tiny.tiny("llama")
    assert list(towers(model)) == ["text"]
    with pytest.raises(HeadError, match="vision:L0H0.*no tower 'vision'"):
        model.check_heads([Head(0, 0, "vision")])
    assert model.hook_of(Head(1, 2), "hook_z") == "blocks.1.attn.hook_z"


def test_an_image_encoder_s_heads_go_by_either_name():
    model = tiny.tiny("vit")
    for tower in ("text", "vision"):
        assert model.hook_of(Head(1, 2, tower), "hook_z") == "blocks.1.attn.hook_z"


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_every_head_has_all_hooks_and_they_look_alike(family, tower):
    model = vision.fresh(family)
    batch = batch_of(model)
    heads = 4 if tower == "text" else 2
    names = {point: model.hook_of(Head(0, 1, tower), point) for point in POINTS}
    before = run(model, batch)
    seen = watched(model, batch, names.values())
    for point in ("hook_q", "hook_z"):
        (value,) = seen[names[point]]
        assert value.shape[2] == heads and value.dim() == 4
    assert all(a.n_heads == heads for a in seen[names["hook_attention"]])
    for attention, pattern in zip(
        seen[names["hook_attention"]], seen[names["hook_pattern"]], strict=True
    ):
        assert_close(attention.pattern(), pattern, **TOLERANCE)
        assert attention.causal == (tower == "text") or attention.mask is not None
    for point in POINTS[:4]:
        with model.hooks(fwd_hooks=[(names[point], lambda value, hook: 0 * value)]):
            assert (run(model, batch) - before).abs().max() > 1e-6, point
    assert torch.equal(run(model, batch), before)


def test_a_head_of_the_image_encoder_is_what_its_columns_are(family):
    """Without z of head 1, as if the output projection did not read it."""
    model, plain = vision.tiny(family), vision.build(family)
    batch = batch_of(model)
    layers = plain.model.vision_tower.encoder.layers if "llava" in family else None
    layer = plain.model.visual.blocks[0] if layers is None else layers[0]
    projection = layer.attn.proj if layers is None else layer.self_attn.out_proj
    with torch.no_grad():
        projection.weight[:, 16:] = 0
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        positions = (batch.attention_mask.cumsum(1) - 1).clamp_min(0)
        if "llava" in family:
            inputs["position_ids"] = positions
        expected = plain(**inputs, **batch.inputs).logits[batch.attention_mask.bool()]

    def without(z, hook):
        return torch.stack([z[:, :, 0], torch.zeros_like(z[:, :, 1])], dim=2)

    hooks = [(model.hook_of(Head(0, 1, "vision"), "hook_z"), without)]
    with model.hooks(fwd_hooks=hooks):
        assert_close(run(model, batch), expected, **TOLERANCE)


def test_no_pattern_is_made_where_nobody_looks(family, monkeypatch):
    model = vision.tiny(family)
    batch = batch_of(model)
    monkeypatch.setattr("interp.model.attention.Attention.pattern", None)
    point = model.hook_of(Head(1, 0, "vision"), "hook_attention")
    (one, *_) = watched(model, batch, [point])[point]
    assert_close(one.mass_received().sum(-1), torch.ones(len(one.q), 2))


def test_patterns_of_the_image_encoder_are_hugging_face_s(family):
    model, plain = vision.tiny(family), vision.build(family)
    batch = batch_of(model)
    name = model.hook_of(Head(1, 0, "vision"), "hook_attention")
    found = [one.pattern() for one in watched(model, batch, [name])[name]]
    theirs = []
    layers = plain.model.vision_tower.encoder.layers if "llava" in family else None
    attention = plain.model.visual.blocks[1].attn if layers is None else layers[1].self_attn

    def note(weights, *args, **kwargs):
        theirs.append(softmax(weights, *args, **kwargs))
        return theirs[-1]

    softmax = torch.nn.functional.softmax
    run_plain = attention.forward

    def noted(*args, **kwargs):
        torch.nn.functional.softmax = note
        try:
            return run_plain(*args, **kwargs)
        finally:
            torch.nn.functional.softmax = softmax

    attention.forward = noted
    with torch.no_grad():
        plain(batch.input_ids, attention_mask=batch.attention_mask, **batch.inputs)
    assert len(found) == len(theirs) > 0
    for ours, weights in zip(found, theirs, strict=True):
        assert_close(ours, weights, **TOLERANCE)


def test_an_edit_of_attention_in_the_image_encoder_acts(family):
    """Uniform rows in every head: z is the mean of the values of the image (or its window)."""
    model = vision.tiny(family)
    batch = batch_of(model)
    before = run(model, batch)
    point, values = (model.hook_of(Head(0, 0, "vision"), p) for p in ("hook_attention", "hook_z"))
    means, z = [], []

    def uniform(attention, hook):
        means.append(attention.v.mean(2, keepdim=True).expand_as(attention.q))
        return attention.set_rows()

    hooks = [(point, uniform), (values, lambda value, hook: z.append(value))]
    with model.hooks(fwd_hooks=hooks):
        after = run(model, batch)
    expected = [mean.transpose(1, 2) for mean in means]
    together = torch.cat(expected, dim=1 if len(z[0]) == 1 else 0)
    assert_close(z[0], together, **TOLERANCE)
    assert (after - before).abs().max() > 1e-6
