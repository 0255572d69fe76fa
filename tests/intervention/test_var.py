"""VAR against its definition, and what a batch, the cache and padding must not change."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

import interp
from interp.analysis.sink_dimensions import VisualSinkError, phi, scaled_tau
from interp.intervention.base import InterventionError
from interp.intervention.var import VAR, chosen_layers, drawn
from interp.model.images import ImageError, image_mark, images_of
from interp.tasks import from_examples
from tests import tiny as text_models
from tests.intervention import naive_var
from tests.model import vision_families as vision
from tests.model.vision_families import picture

# coordinates in which some tokens of the image and of the text are large
DIMENSIONS = {
    "llava": (3, 16, 19),
    "llava_next": (21, 22, 26),
    "qwen2_5_vl": (6, 8, 9),
    "qwen3_vl": (10, 13, 19),
}
RULE = {"moved": 0.6, "min_image_mass": 0.2, "min_non_sink": 0.3, "require_visual_sink": True}
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
WRITTEN = [[5, 9, 21, 4], [8, 7, 33, 6], [40, 3, 12, 5]]


@pytest.fixture(params=vision.FAMILIES)
def family(request) -> str:
    return request.param


def prompts_of(model):
    """Images of several sizes, two of them in one prompt; lengths differ."""
    mark = image_mark(model)
    return from_examples(
        model,
        [
            {"text": f"w5 w6 {mark} w6 w7 w8 w9", "answer": " w8 w9", "image": picture(0)},
            {"text": f"w3 {mark} w9", "answer": " w4", "image": picture(3, 24, 16)},
            {
                "text": f"w4 {mark} w17 {mark} w9 w21 w30",
                "answer": " w5 w6",
                "image": [picture(1, 16, 24), picture(2, 16, 32)],
            },
        ],
    )


def edit_of(family: str = "llava", **changes) -> VAR:
    """At a threshold that random weights are over."""
    return VAR(DIMENSIONS[family], **{"tau": 1.6, "layers": ":"} | RULE | changes)


def stepped(model, prompts, written) -> list[torch.Tensor]:
    """A left-padded batch, the prompt and then a token at a time: logits of each row's tokens."""
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    whole = naive_var.stepped(
        model.original_model, batch.input_ids, batch.attention_mask, batch.inputs, written
    )
    return [whole[row, first:] for row, first in enumerate(batch.first.tolist())]


def at_once(model, prompts, written) -> list[torch.Tensor]:
    """The same tokens, read in one pass whose last ones are told to be an answer."""
    lists = [[*ids, *more] for ids, more in zip(prompts["input_ids"], written, strict=True)]
    batch = model.batch(lists, images=images_of(prompts))
    lengths = [len(ids) for ids in prompts["input_ids"]]
    with torch.no_grad(), model.spans(None, lengths):
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, **batch.inputs)
    return [logits[row, first:] for row, first in enumerate(batch.first.tolist())]


def by_definition(family, model, prompts, row, **rule):
    one = prompts.select([row])
    batch = model.batch(one["input_ids"], images=images_of(one))
    return naive_var.logits_of(family, batch.inputs, one["input_ids"][0], WRITTEN[row], **rule)


# Equality with the definition


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"donors": "image"},
        {"donors": "text", "moved": 1.0},
        {"min_non_sink": 0.0, "min_image_mass": 0.0, "moved": 0.3, "require_visual_sink": False},
    ],
    ids=["as it is", "image's sinks", "text's sinks, all", "no choice"],
)
def test_a_batch_with_the_cache_is_the_definition_row_by_row(family, changes):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    with model.intervene(edit_of(family, **changes)):
        cached = stepped(model, prompts, WRITTEN)
        whole = at_once(model, prompts, WRITTEN)
    plain = stepped(model, prompts, WRITTEN)
    edited, changed = 0, 0.0
    for row in range(len(prompts)):
        rule = RULE | {"donors": "all"} | changes
        where = {"dimensions": DIMENSIONS[family], "tau": 1.6, "layers": {0, 1}}
        expected, counts, sinks = by_definition(family, model, prompts, row, **where, **rule)
        assert any(sinks.values())
        edited += counts.get("edited", 0)
        assert_close(cached[row], expected, **TOLERANCE)
        changed = max(changed, float((plain[row] - expected).abs().max()))
        if family.startswith("llava"):  # without a cache Qwen numbers answers otherwise
            assert_close(whole[row], expected, **TOLERANCE)
    assert edited > 20 and changed > 1e-2


def test_only_the_layers_asked_for_are_edited(family):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    with model.intervene(edit_of(family, layers=[1])):
        found = stepped(model, prompts, WRITTEN)
    rule = RULE | {"donors": "all"}
    expected, *_ = by_definition(
        family, model, prompts, 0, dimensions=DIMENSIONS[family], tau=1.6, layers={1}, **rule
    )
    assert_close(found[0], expected, **TOLERANCE)


# What it must not depend on


CONTROLS = [{}, {"choose": "random"}, {"choose": "all"}, {"sinks": "random"}]


@pytest.mark.parametrize("changes", CONTROLS, ids=str)
def test_a_batch_is_one_by_one(family, changes):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    with model.intervene(edit_of(family, **changes)):
        together = stepped(model, prompts, WRITTEN)
        for row in range(len(prompts)):
            one = prompts.select([row])
            assert_close(together[row], stepped(model, one, [WRITTEN[row]])[0], **TOLERANCE)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_is_written_as_one_by_one(family, beams):
    model = vision.tiny(family)
    prompts = prompts_of(model)

    def written(some):
        batch = model.batch(some["input_ids"], images=images_of(some))
        out = model.original_model.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, num_beams=beams,
            max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, **batch.inputs,
        )  # fmt: skip
        return out[:, batch.input_ids.shape[1] :].tolist()

    with model.intervene(edit_of(family)):
        alone = [written(prompts.select([row]))[0] for row in range(len(prompts))]
        if family.startswith("qwen") and beams > 1:
            pytest.skip("transformers expands Qwen's packed images for beams in its own way")
        assert written(prompts) == alone


def test_the_second_prompt_of_a_block_is_like_the_first(family):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    one, other = prompts.select([0]), prompts.select([2])
    with model.intervene(edit_of(family)):
        expected = stepped(model, one, [WRITTEN[0]])[0]
    with model.intervene(edit_of(family)):
        stepped(model, other, [WRITTEN[2]])
        assert torch.equal(stepped(model, one, [WRITTEN[0]])[0], expected)


def test_it_acts_only_when_it_is_meant_to():
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    plain, n = stepped(model, prompts, WRITTEN), len(prompts["input_ids"][0])
    with model.intervene(edit_of(when="generated")):
        found = stepped(model, prompts, WRITTEN)
    assert torch.equal(found[0][:n], plain[0][:n])
    assert (found[0][n:] - plain[0][n:]).abs().max() > 1e-3
    with model.intervene(edit_of(when="prompt")):
        found = stepped(model, prompts, WRITTEN)
    assert (found[0][:n] - plain[0][:n]).abs().max() > 1e-3


def look(value, hook):
    """Leaves things as they are."""


@pytest.mark.parametrize(
    "nothing",
    [{"moved": 0.0}, {"min_non_sink": 1.01}, {"min_image_mass": 1.01}, {"tau": 5.6}],
    ids=str,
)
def test_where_nothing_is_chosen_nothing_changes(nothing):
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    # with a hook that only looks, since without any another kernel may run
    with model.hooks(fwd_hooks=[(f"blocks.{i}.attn.hook_attention", look) for i in (0, 1)]):
        plain = stepped(model, prompts, WRITTEN)
        with model.intervene(edit_of(**nothing)):
            found = stepped(model, prompts, WRITTEN)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_rows_before_the_image_and_prompts_without_one_stay_as_they_are():
    model = vision.tiny("llava")
    mark = image_mark(model)
    prompts = from_examples(
        model,
        [
            {"text": f"w5 w6 w9 {mark} w6 w7", "image": picture(0)},
            {"text": "w5 w6 w7 w8 w9", "image": None},
        ],
    )
    written = WRITTEN[:2]
    plain = stepped(model, prompts, written)
    with model.intervene(edit_of(require_visual_sink=False, choose="all")):
        found = stepped(model, prompts, written)
    assert_close(found[0][:3], plain[0][:3], atol=1e-6, rtol=1e-6)
    assert_close(found[1], plain[1], atol=1e-6, rtol=1e-6)
    assert (found[0][-1] - plain[0][-1]).abs().max() > 1e-3


def test_it_composes_with_other_edits():
    """The closed form on top of an edited layer, and another edit on top of it."""
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    steer = interp.SteerAttention(["L0H1", "L1H2"], "0:1", "suppress", "all", "both")

    def looked(*edits):
        patterns, outputs = [], []

        def look(attention, hook):
            patterns.append(attention.pattern())
            v = attention.per_query_head(attention.v)
            outputs.append((attention.output(), patterns[-1] @ v))

        names = [f"blocks.{layer}.attn.hook_attention" for layer in (0, 1)]
        with model.intervene(*edits), model.hooks(fwd_hooks=[(n, look) for n in names]):
            stepped(model, prompts, WRITTEN)
        return patterns, outputs

    for edits in ([edit_of(), interp.ACT(["L0H0"], alpha=1.2)], [steer, edit_of()]):
        for output, dense in looked(*edits)[1]:
            assert_close(output, dense, atol=1e-5, rtol=1e-4)


# What moves where


def test_invariants_of_an_edited_row():
    """New image mass is M + p m_t; the share on no sink grows; sums and proportions are kept."""
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    image = (batch.input_ids == vision.IMAGE)[:, None, None]
    kept = {}

    def keep(value, hook, name):
        kept[name] = value

    names = ["blocks.0.hook_resid_pre", "blocks.0.attn.hook_attention"]
    hooks = [(name, partial(keep, name=name)) for name in names]

    def run():
        model.run(batch.input_ids, batch.attention_mask, **batch.inputs)
        return kept[names[1]].pattern()

    with model.hooks(fwd_hooks=hooks):
        before = run()
    with model.intervene(edit_of()), model.hooks(fwd_hooks=hooks):
        after = run()
    real = batch.attention_mask.bool()
    sinks = ((phi(kept[names[0]], DIMENSIONS["llava"]) >= 1.6) & real)[:, None, None]
    changed = (before - after).abs().amax(-1) > 1e-6
    assert changed.any() and not changed.all()
    assert_close(after.sum(-1), before.sum(-1), atol=1e-6, rtol=0)
    held, text = (before * image).sum(-1), (before * (sinks & ~image)).sum(-1)
    assert_close((after * image).sum(-1)[changed], (held + 0.6 * text)[changed])
    non_sink = (before * (image & ~sinks)).sum(-1) / held
    now = (after * (image & ~sinks)).sum(-1) / (after * image).sum(-1)
    assert (now[changed] >= non_sink[changed] - 1e-6).all()
    others = (~image & ~sinks).expand_as(before)[changed]
    assert torch.equal(after[changed][others], before[changed][others])


def test_random_heads_are_as_many_and_random_sinks_hold_as_much():
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    image = (batch.input_ids == vision.IMAGE)[:, None, None]

    def pattern(*edits):
        kept = []
        hook = ("blocks.0.attn.hook_attention", lambda value, hook: kept.append(value.pattern()))
        with model.intervene(*edits), model.hooks(fwd_hooks=[hook]):
            model.run(batch.input_ids, batch.attention_mask, **batch.inputs)
        return kept[0]

    plain = pattern()
    changes = {"donors": "text", "moved": 0.05, "min_image_mass": 0.5, "min_non_sink": 0.4}
    ruled, heads, sinks = (
        pattern(edit_of(**changes, **more))
        for more in ({}, {"choose": "random"}, {"sinks": "random"})
    )
    edited, others = ((plain != one).any(-1) for one in (ruled, heads))
    assert edited.any() and not torch.equal(edited, others)
    # a row may be drawn that holds nothing on text's sinks and so shows no change
    assert (others.sum(1) <= edited.sum(1)).all() and others.sum() > 0.7 * edited.sum()
    gain = ((ruled - plain) * image).sum(-1)
    same = ((sinks - plain) * image).sum(-1)
    assert (same <= gain + 1e-6).all() and same.sum() > 0.5 * gain.sum()


def test_numbers_drawn_for_places_do_not_depend_on_how_many_there_are():
    places = torch.tensor([[0, 1, 2, 3, 4]])
    longer = torch.arange(40)[None]
    assert torch.equal(drawn(places, 4, 3), drawn(longer, 4, 3)[:, :5])


# Bad input, and what it says


def test_a_text_only_model_is_refused():
    with (
        pytest.raises(ImageError, match="takes no images"),
        text_models.tiny("llama").intervene(edit_of()),
    ):
        raise AssertionError("the block was entered")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dimensions": ()}, "one at least"),
        ({"dimensions": (3, 99)}, "99 is not in .* has 0-31"),
        ({"tau": 20.0}, "at most sqrt.32. = 5.7 .* default is 1.77"),
        ({"tau": -1.0}, "above 0"),
        ({"moved": 1.2}, "from 0 to 1"),
        ({"choose": "some"}, "one of image-centric, random, all"),
        ({"layers": "2:-1"}, "none of the 2 layers"),
        ({"layers": "two"}, "a slice"),
        ({"when": "now"}, "one of prompt, generated, both"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(settings, said):
    with (
        text_models.unchecked(),
        pytest.raises(InterventionError, match=said),
        vision.tiny("llava").intervene(VAR(**{"dimensions": (3,), "layers": ":"} | settings)),
    ):
        raise AssertionError("the block was entered")


def test_a_pass_that_goes_on_from_an_unseen_prompt_is_refused():
    model = vision.tiny("llava")
    prompts = prompts_of(model).select([0])
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    with torch.no_grad():
        out = model.original_model(input_ids=batch.input_ids, use_cache=True, **batch.inputs)
    cache = {"past_key_values": out.past_key_values}
    with (
        pytest.raises(InterventionError, match="no prompt was read in this block"),
        model.intervene(edit_of()),
    ):
        model.original_model(input_ids=torch.tensor([[5]]), use_cache=True, **cache)


def test_the_reference_s_parameters_are_complements():
    found = VAR.from_reference(p=0.6, rho=0.5, dimensions=[1415, 2533])
    assert found.moved == pytest.approx(0.4) and found.min_non_sink == 0.5
    assert found.tau == 20 and found.layers == "2:" and found.min_image_mass == 0.2


def test_layers_may_be_a_slice_or_numbers():
    model = vision.tiny("llava")
    assert chosen_layers(edit_of(layers=slice(None, -1)).layers, model) == [0]
    assert chosen_layers(edit_of(layers=(1, 0)).layers, model) == [0, 1]


def test_saving_keeps_it(tmp_path):
    for n, edit in enumerate((edit_of(), edit_of(layers=[0, 1], choose="random", seed=3))):
        edit.save_pretrained(tmp_path / str(n))
        assert interp.load_intervention(tmp_path / str(n)) == edit


def test_fit_finds_the_dimensions_or_says_that_there_are_none():
    """A coordinate that is made huge at the first token is found; without it there is none."""
    model = vision.fresh("llava")
    prompts = prompts_of(model)
    with pytest.raises(VisualSinkError, match="no sink dimensions.*tau = 4.00"):
        VAR.fit(model, prompts, tau=4.0)
    planted = planted_sinks(model, [int(ids[0]) for ids in prompts["input_ids"]], 9)
    found = VAR.fit(planted, prompts, tau=4.0, layers=":")
    assert found.dimensions == (9,) and found.made_on is not None


def planted_sinks(model, tokens, dimension):
    """Embeddings of these tokens are huge in one coordinate."""
    weight = model.original_model.get_input_embeddings().weight
    with torch.no_grad():
        weight[tokens, dimension] += 300
    return model


def test_tau_is_scaled_with_the_width():
    assert scaled_tau(4096) == 20 and scaled_tau(1024) == 10
    x = torch.zeros(1, 16)
    x[0, 5] = 3.0
    assert float(phi(x, [5])[0]) == pytest.approx(4.0, abs=1e-5)
    assert float(phi(7 * x, [5, 2])[0]) == pytest.approx(4.0, abs=1e-5)
    assert float(phi(x, [])[0]) == 0
