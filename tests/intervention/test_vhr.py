"""VHR against its algorithm, written out for one prompt at a time in plain transformers."""

import pandas as pd
import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

import interp
from interp.heads import Head, HeadError
from interp.intervention.base import InterventionError
from interp.intervention.vhr import VHR, default_layers
from interp.model.aside import aside
from interp.model.graph import output_weights
from interp.model.images import ImageError, image_mark, images_of
from interp.tasks import from_examples
from tests import tiny
from tests.model import vision_families as vision
from tests.model.seen_by_hand import inputs_of, passed, plain, step_by_step, text_of
from tests.model.vision_families import picture

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
ANSWERS = [[8, 9, 12], [5, 6, 7], [4, 11, 13]]


@pytest.fixture(params=vision.FAMILIES)
def family(request) -> str:
    return request.param


def prompts_of(model):
    mark = image_mark(model)
    return from_examples(
        model,
        [
            {"text": f"w5 {mark} w6 w7", "image": picture(0)},
            {"text": "w5 w6 w7 w8", "image": None},
            {"text": f"{mark} w9 w3 w4 w10", "image": picture(1, 16, 32)},
        ],
    )


def forced(model, prompts, answers=ANSWERS, edit=()) -> torch.Tensor:
    """Logits that predict the answers, from one padded batch: `[batch step vocab]`."""
    ids = [[*p, *a[:-1]] for p, a in zip(prompts["input_ids"], answers, strict=True)]
    batch = model.batch(ids, images=images_of(prompts))
    lengths = [len(p) for p in prompts["input_ids"]]
    with model.intervene(list(edit)), model.spans(None, lengths):
        return model.last_logits(
            batch.input_ids, batch.attention_mask, len(answers[0]), **batch.inputs
        )


def cached(model, prompts, answers=ANSWERS, edit=()) -> torch.Tensor:
    """The same, a token at a time with the cache."""
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    found, cache, mask = [], DynamicCache(config=model.original_model.config), batch.attention_mask
    tokens, inputs = batch.input_ids, batch.inputs
    positions = {}
    with torch.no_grad(), model.intervene(list(edit)):
        for step in range(len(answers[0])):
            out = model.original_model(
                input_ids=tokens, attention_mask=mask, cache=cache, use_cache=True, **inputs,
                **positions,
            )  # fmt: skip
            found.append(out.logits[:, -1])
            tokens = torch.tensor([[answer[step]] for answer in answers])
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
            inputs = {}
            if (deltas := getattr(model.original_model.model, "rope_deltas", None)) is not None:
                # Qwen-VL's positions, which its `generate` gives it
                place = mask.sum(1, keepdim=True) - 1 + deltas
                positions = {"position_ids": place.expand(3, -1, -1)}
    return torch.stack(found, 1)


class ByHand:
    """Algorithm 1: `edit(layer, z)` for the prompt's pass, then for each step."""

    def __init__(self, family, prompts, row, alpha=2.0, layers=(0, 1), lockstep=False, test=True):
        self.model, self.alpha, self.layers, self.test = plain(family), alpha, layers, test
        self.other = plain(family, 1)
        self.lockstep, self.chosen = lockstep, {}
        self.has_image = bool(prompts[row]["image"])
        self.text = text_of(prompts, row)
        self.before = [z[-1] for z in passed(self.other, self.text)[0]]

    def without(self, layer):
        if not self.lockstep:
            return self.before[layer]

        def scale(below, z):
            return self.scaled(z, below) if below in self.chosen and below < layer else z

        return passed(self.other, self.text, scale)[0][layer][-1]

    def scaled(self, z, layer):
        z = z.clone()
        for head in self.chosen[layer]:
            z[:, head] *= self.alpha
        return z

    def edit(self, layer, z):
        if layer not in self.layers:
            return z
        if layer not in self.chosen:
            self.chosen[layer] = self.choose(z[-1], layer) if self.has_image else []
        return self.scaled(z, layer)

    def choose(self, z, layer):
        other = self.without(layer)
        d = [float((z[h] - other[h]).norm()) for h in range(len(z))]
        activity = [float(other[h].norm()) ** 2 for h in range(len(z))]
        left = [
            0 if self.test and d[h] > bound(d) and activity[h] > bound(activity) else d[h]
            for h in range(len(z))
        ]
        middle = sum(sorted(left)[1:3]) / 2  # of four heads
        return [h for h in range(len(z)) if left[h] > middle]


def bound(values):
    mean = sum(values) / len(values)
    return mean + (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5


def by_hand(family, prompts, **options) -> torch.Tensor:
    found = []
    for row, answer in enumerate(ANSWERS):
        hand = ByHand(family, prompts, row, **options)
        inputs = inputs_of(family, prompts, row)
        found.append(torch.stack(step_by_step(hand.model, inputs, answer, hand.edit)[1]))
    return torch.stack(found)


# against the algorithm


@pytest.mark.parametrize("options", [
    {}, {"alpha": 0.5}, {"layers": (1,)}, {"reference": "lockstep"}, {"outlier_test": False},
], ids=str)  # fmt: skip
def test_it_is_the_algorithm(family, options):
    """Prefill and decoding, in a padded batch with a prompt that has no image."""
    model = vision.tiny(family)
    prompts = prompts_of(model)
    edit = VHR(**{"layers": (0, 1), "alpha": 2.0} | options)
    expected = by_hand(
        family, prompts, alpha=edit.alpha, layers=edit.layers,
        lockstep=edit.reference == "lockstep", test=edit.outlier_test,
    )  # fmt: skip
    before = forced(model, prompts)
    assert_close(forced(model, prompts, edit=[edit]), expected, **TOLERANCE)
    assert_close(cached(model, prompts, edit=[edit]), expected, **TOLERANCE)
    assert (expected - before).abs().amax((1, 2))[[0, 2]].min() > 1e-2  # it acts
    assert_close(forced(model, prompts), before, atol=0, rtol=0)


def test_heads_are_those_that_the_algorithm_chooses(family):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    table = VHR(layers=(0, 1)).choices(model, prompts, batch_size=2)
    for row in range(3):
        hand = ByHand(family, prompts, row)
        passed(hand.model, inputs_of(family, prompts, row), hand.edit)
        for layer in (0, 1):
            own = table.query("prompt == @row and layer == @layer")
            assert own["head"][own["chosen"]].tolist() == hand.chosen[layer]
            assert own["distance"].isna().all() == (row == 1)
            assert own["chosen"].sum() == (0 if row == 1 else 2)
            assert not (own["chosen"] & own["outlier"]).any()


def test_without_any_strength_heads_are_still_chosen():
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    # below the first reinforced layer nothing differs
    tables = [VHR(alpha, layers=(0,)).choices(model, prompts) for alpha in (1.0, 2.0)]
    pd.testing.assert_frame_equal(*tables)


def test_written_answers_are_those_of_one_prompt_at_a_time(family):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    edit = VHR(3.0, layers=(0, 1))
    together = model.batch(prompts["input_ids"], images=images_of(prompts))
    with model.intervene(edit):
        written = model.continue_greedily(
            together.input_ids, together.attention_mask, 5, **together.inputs
        )
        for row in range(3):
            batch = model.batch([prompts[row]["input_ids"]], images=[prompts[row]["image"]])
            alone = model.continue_greedily(
                batch.input_ids, batch.attention_mask, 5, **batch.inputs
            )
            stop = alone[0].tolist()
            stop = stop.index(2) if 2 in stop else 5  # what follows the end token is filling
            assert written[row, :stop].tolist() == alone[0, :stop].tolist()


def test_beams_keep_what_was_chosen_for_their_prompt():
    """Rows of the cache are put into another order, and what follows goes with them."""
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    batch, order = (
        model.batch(prompts["input_ids"], images=images_of(prompts)),
        torch.tensor([2, 0, 0]),
    )

    def run(tokens, mask, cache, **inputs):
        with torch.no_grad():
            return model.original_model(
                input_ids=tokens, attention_mask=mask, cache=cache, use_cache=True, **inputs
            ).logits[:, -1]

    def written(order):
        with model.intervene(VHR(3.0, layers=(0, 1))):
            cache = DynamicCache(config=model.original_model.config)
            run(batch.input_ids, batch.attention_mask, cache, **batch.inputs)
            cache.reorder_cache(order)
            mask = torch.cat([batch.attention_mask, torch.ones(3, 2, dtype=torch.long)], 1)[order]
            first = run(torch.tensor([[5], [6], [7]])[order], mask[:, :-1], cache)
            return torch.stack([first, run(torch.full((3, 1), 9), mask, cache)], 1)

    straight, turned = written(torch.arange(3)), written(order)
    assert_close(turned, straight[order])
    assert (straight[0] - straight[2]).abs().max() > 1e-2


def test_beam_search_runs(family):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    batch = model.batch([prompts[0]["input_ids"]], images=[prompts[0]["image"]])
    with model.intervene(VHR(3.0, layers=(0, 1))):
        out = model.original_model.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=4,
            num_beams=3, do_sample=False, pad_token_id=0, **batch.inputs,
        )  # fmt: skip
    assert out.shape[0] == 1


def test_evaluation_agrees_with_writing():
    model = vision.tiny("llava")
    mark = image_mark(model)
    rows = [
        {"text": f"w5 {mark} w6 w7", "image": picture(0)},
        {"text": f"{mark} w9 w3", "image": picture(1)},
    ]
    edit = VHR(3.0, layers=(0, 1))
    with model.intervene(edit):
        prompts = from_examples(model, rows)
        batch = model.batch(prompts["input_ids"], images=images_of(prompts))
        new = model.continue_greedily(batch.input_ids, batch.attention_mask, 2, **batch.inputs)
        answers = [" " + model.tokenizer.decode(tokens) for tokens in new]
        own = from_examples(model, [row | {"answer": a} for row, a in zip(rows, answers)])
        for generate in (False, True):
            found = interp.evaluate(model, own, generate=generate, batch_size=1, progress=False)
            assert found.accuracy == 1


# invariants


@pytest.mark.parametrize(
    "edit",
    [VHR(1.0, layers=(0, 1)), VHR(layers=()), VHR(heads=()), VHR(1.0, heads=["L0H1"])],
    ids=repr,
)
def test_where_nothing_is_scaled_nothing_changes(family, edit):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    assert torch.equal(forced(model, prompts), forced(model, prompts, edit=[edit]))


def test_a_prompt_without_an_image_is_left_as_it_is(family):
    model = vision.tiny(family)
    prompts = prompts_of(model)
    before = forced(model, prompts)
    for which in ("upper", "lower", "random", "all", "others"):
        after = forced(model, prompts, edit=[VHR(3.0, layers=(0, 1), which=which)])
        assert torch.equal(before[1], after[1])
        assert (before - after).abs().amax((1, 2))[[0, 2]].min() > 1e-3


@pytest.mark.parametrize("reference, passes", [("plain", 1), ("lockstep", 2)])
def test_one_image_free_pass_is_made_at_the_prompt_and_none_later(reference, passes):
    model = vision.tiny("llava")
    prompts, seen = prompts_of(model), []
    handle = model.original_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or [kwargs["input_ids"]])[0].shape),
        with_kwargs=True,
    )
    try:
        cached(model, prompts, edit=[VHR(layers=(0, 1), reference=reference)])
    finally:
        handle.remove()
    width = max(map(len, prompts["input_ids"]))
    assert seen[0] == (3, width) and seen[-2:] == [(3, 1)] * 2
    # two of three prompts have images
    assert seen[1:-2] == [(2, 4)] * passes


def test_all_heads_of_a_layer_make_its_attention_say_so_many_times_as_much():
    model = vision.tiny("llava")
    prompts = prompts_of(model).select([0, 2])
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))

    def said():
        found = {}

        def keep(value, hook):
            found["out"] = value

        with model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", keep)]):
            model.run(batch.input_ids, batch.attention_mask, **batch.inputs)
        return found["out"]

    before = said()
    with model.intervene(VHR(2.5, layers=(1,), which="all")):
        after = said()
    real = batch.attention_mask.bool()
    assert_close(after[real], 2.5 * before[real], atol=1e-5, rtol=1e-5)


def test_given_heads_are_weights_scaled():
    """Hook = scaled columns of W_O = what is added to the residual stream."""
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    heads = [Head(0, 1), Head(1, 0), Head(1, 3)]
    edited = forced(model, prompts, edit=[VHR(2.0, heads=heads)])
    folded = vision.fresh("llava")
    with torch.no_grad():
        for head in heads:
            weight = folded.blocks[head.layer].attn.o.original_component.weight
            weight.unflatten(1, (4, -1))[:, head.head] *= 2
    assert_close(edited, forced(folded, prompts), atol=1e-5, rtol=1e-5)

    def add(z, layer):
        own = [head.head for head in heads if head.layer == layer]
        weight, _ = output_weights(model, layer, 4)
        return torch.einsum("bphd,hde->bpe", z[:, :, own], weight[own])

    seen = {}
    hooks = [
        pair
        for layer in (0, 1)
        for pair in (
            (f"blocks.{layer}.attn.hook_z", lambda z, hook, n=layer: seen.update({n: add(z, n)})),
            (f"blocks.{layer}.hook_attn_out", lambda out, hook, n=layer: out + seen[n]),
        )
    ]
    with model.hooks(fwd_hooks=hooks):
        assert_close(edited, forced(model, prompts), atol=1e-5, rtol=1e-5)


def test_others_move_the_stream_as_far_and_are_other_heads():
    model = vision.tiny("llava")
    prompts = prompts_of(model).select([0, 2])
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    real = batch.attention_mask.bool()

    def moved(which):
        seen = []
        keep = [("blocks.1.attn.hook_z", lambda z, hook: seen.append(z))]
        with model.hooks(fwd_hooks=keep):
            model.run(batch.input_ids, batch.attention_mask, **batch.inputs)
        with model.intervene(VHR(3.0, layers=(1,), which=which)), model.hooks(fwd_hooks=keep):
            model.run(batch.input_ids, batch.attention_mask, **batch.inputs)
        return seen[-1] - seen[0]

    weight, _ = output_weights(model, 1, 4)
    upper, others = moved("upper"), moved("others")
    lengths = [torch.einsum("bphd,hde->bpe", z, weight).norm(dim=-1) for z in (upper, others)]
    assert_close(lengths[0][real], lengths[1][real], atol=1e-4, rtol=1e-4)
    acts = [z.abs().amax((1, 3)) > 0 for z in (upper, others)]
    assert torch.equal(acts[0], ~acts[1]) and (acts[0].sum(1) == 2).all()


def test_the_controls_choose_other_halves():
    model = vision.tiny("qwen2_5_vl")
    prompts = prompts_of(model).select([0, 2])
    found = {
        which: VHR(layers=(0,), which=which, outlier_test=False).choices(model, prompts)["chosen"]
        for which in ("upper", "lower", "random", "all")
    }
    assert (found["upper"] == ~found["lower"]).all() and found["all"].all()
    assert found["random"].sum() == 4
    others = [
        VHR(layers=(0, 1), which="random", seed=n).choices(model, prompts)["chosen"]
        for n in range(4)
    ]
    assert len({tuple(one) for one in others}) > 1


def test_other_edits_act_in_the_prompt_s_own_pass_only():
    model = vision.tiny("llava")
    prompts, seen = prompts_of(model), []

    def look(value, hook):
        seen.append(len(value))

    hooks = [("blocks.0.hook_resid_pre", look), ("hook_embed", look)]
    with model.intervene(VHR(layers=(0, 1))), model.hooks(fwd_hooks=hooks):
        batch = model.batch(prompts["input_ids"], images=images_of(prompts))
        model.run(batch.input_ids, batch.attention_mask, **batch.inputs)
        assert torch.equal(model.call.input_ids, batch.input_ids)
    assert seen == [3, 3]
    with model.intervene(VHR(3.0, layers=(1,)), interp.Temperature(["L0H1"], 0.5)):
        both = model.last_logits(batch.input_ids, batch.attention_mask, 1, **batch.inputs)
    with model.intervene(interp.Temperature(["L0H1"], 0.5), VHR(3.0, layers=(1,))):
        turned = model.last_logits(batch.input_ids, batch.attention_mask, 1, **batch.inputs)
    assert_close(both, turned)


def test_a_pass_aside_leaves_no_trace():
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    fired = []
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_attention", lambda a, hook: fired.append(a))]):
        model.run(batch.input_ids, batch.attention_mask, **batch.inputs)
        call, passes = model.call, model._running.passes
        with pytest.raises(ZeroDivisionError), aside(model):
            model.run(torch.tensor([[5, 6]]))
            assert model.call.n_tokens == 2
            raise ZeroDivisionError
        assert model.call is call and model._running.passes == passes and len(fired) == 1
        model.run(batch.input_ids, batch.attention_mask, **batch.inputs)
    assert len(fired) == 2


def test_layers_of_the_paper_in_proportion():
    assert default_layers(range(32)) == [1, *range(18, 32)]
    assert default_layers(range(4)) == [1, 2, 3]
    assert default_layers(range(30)) == [1, *range(17, 30)]
    assert default_layers([0]) == [0]


# saying, saving, errors


def test_it_is_saved_and_says_what_it_does(tmp_path):
    for edit in (VHR(), VHR(0.5, layers=(1,), which="others", when="generated"), VHR(heads="L0H1")):
        edit.save_pretrained(tmp_path)
        assert interp.load_intervention(tmp_path) == edit
    assert "half that the image changes most say 2 times as much; at all tokens" in repr(VHR())
    assert "1 heads: L0H1" in repr(VHR(heads="L0H1"))
    assert VHR(heads="L0H1").causal and not VHR().causal


def test_text_only_models_take_given_heads_only():
    model = tiny.tiny("llama")
    with pytest.raises(ImageError, match="takes no images"), model.intervene(VHR()):
        raise AssertionError("the block was entered")
    with pytest.raises(HeadError, match="L5H0"), model.intervene(VHR(heads=["L5H0"])):
        raise AssertionError("the block was entered")
    with (
        pytest.raises(HeadError, match="layers: 7"),
        vision.tiny("llava").intervene(VHR(layers=[7])),
    ):
        raise AssertionError("the block was entered")


def test_prompts_in_pieces_are_refused():
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    batch = model.batch([prompts[0]["input_ids"]], images=[prompts[0]["image"]])
    cache = DynamicCache(config=model.original_model.config)
    with model.intervene(VHR(layers=(0, 1))), torch.no_grad():
        model.original_model(input_ids=batch.input_ids, cache=cache, use_cache=True, **batch.inputs)
        with pytest.raises(InterventionError, match="in chunks"):
            model.original_model(input_ids=torch.tensor([[5, 6]]), cache=cache, use_cache=True)


def test_a_cache_of_other_prompts_is_refused():
    model = vision.tiny("llava")
    prompts = prompts_of(model)
    batch = model.batch([prompts[0]["input_ids"]], images=[prompts[0]["image"]])
    cache = DynamicCache(config=model.original_model.config)
    with torch.no_grad():
        model.original_model(input_ids=batch.input_ids, cache=cache, use_cache=True, **batch.inputs)
        with (
            pytest.raises(InterventionError, match="read in this block"),
            model.intervene(VHR(layers=(0, 1))),
        ):
            model.original_model(input_ids=torch.tensor([[5]]), cache=cache, use_cache=True)
        with model.intervene(VHR(layers=(0, 1))):
            other = model.batch([prompts["input_ids"][2]], images=[prompts[2]["image"]])
            model.run(other.input_ids, other.attention_mask, **other.inputs)
            with pytest.raises(InterventionError, match="not the last ones read"):
                model.original_model(input_ids=torch.tensor([[5]]), cache=cache, use_cache=True)


def test_it_has_to_know_which_tokens_are_an_image_s():
    model = vision.tiny("llava")
    prompts = from_examples(model, [{"text": f"w5 {image_mark(model)}", "image": picture(0)}])
    batch = model.batch(prompts["input_ids"], images=images_of(prompts))
    with pytest.raises(ImageError, match="ends in an image"), model.intervene(VHR(layers=(0, 1))):
        model.run(batch.input_ids, batch.attention_mask, **batch.inputs)


def test_what_has_no_meaning_is_refused():
    with tiny.unchecked():
        for options, said in (
            ({"alpha": float("nan")}, "alpha=nan"),
            ({"which": "best"}, "which='best'.*upper"),
            ({"reference": "none"}, "reference='none'"),
            ({"when": "now"}, "when='now'"),
            ({"heads": ["L0H1"], "layers": (1,)}, "no layers"),
            ({"which": "others", "reference": "lockstep"}, "plain"),
        ):
            with pytest.raises(InterventionError, match=said):
                VHR(**options)
    with pytest.raises(InterventionError, match="heads are given"):
        VHR(heads=["L0H1"]).choices(vision.tiny("llava"), ["w5"])
