"""`load` and `HookedModel`: what they promise beside the bridge's own functions."""

import gc
import sys
from copy import deepcopy

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from interp.heads import Head, HeadError
from interp.model.attention import Attention
from interp.model.hooked import HookedModel, HookError, load
from interp.zoo import ModelError
from tests.model.families import build, inputs, small_tokenizer

IDS = inputs("llama")["input_ids"]
MASK = inputs("llama")["attention_mask"]


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return load(build("llama"), tokenizer=small_tokenizer())


def logits(model, ids=IDS, mask=MASK):
    with torch.no_grad():
        return model(ids, attention_mask=mask)


class Hooks:
    """An intervention of given pairs."""

    def __init__(self, *pairs):
        self.pairs = pairs

    def hooks(self, model):
        return self.pairs


def scaled(layer, factor, point="hook_z"):
    return Hooks((f"blocks.{layer}.attn.{point}", lambda value, hook: value * factor))


# reading


def test_a_full_cache_holds_tensors_only(model):
    _, cache = model.run_with_cache(IDS)
    assert all(torch.is_tensor(value) for value in cache.values())
    assert not [name for name in cache if "hook_attention" in name]
    assert "blocks.1.attn.hook_pattern" in cache and "blocks.0.attn.hook_z" in cache
    for names_filter in ("blocks.0.attn.hook_z", ["blocks.0.attn.hook_z"]):
        _, cache = model.run_with_cache(IDS, names_filter=names_filter)
        assert set(cache) == {"blocks.0.attn.hook_z", "blocks.0.attn.o.hook_in"}  # two names
    _, cache = model.run_with_cache(IDS, names_filter=lambda name: "blocks.0.attn" in name)
    assert "blocks.0.attn.hook_z" in cache and not [n for n in cache if "hook_attention" in n]


def test_caching_hooks_hold_tensors_only(model):
    cache, hooks, _ = model.get_caching_hooks()
    with model.hooks(fwd_hooks=hooks):
        logits(model)
    assert cache and all(torch.is_tensor(value) for value in cache.values())


@pytest.mark.parametrize("how", [str, lambda name: [name]])
def test_asking_to_cache_an_attention_says_what_to_do(model, how):
    with pytest.raises(HookError, match="read_attention"):
        model.run_with_cache(IDS, names_filter=how("blocks.0.attn.hook_attention"))


def test_read_attention_stacks_layers_in_the_order_asked(model):
    received = model.read_attention(IDS, lambda a: a.mass_received(), attention_mask=MASK)
    assert received.shape == (2, 2, 4, 12) and not received.requires_grad
    turned = model.read_attention(
        IDS, lambda a: a.mass_received([3]), layers=[1, 0], attention_mask=MASK
    )
    assert_close(turned, received[:, [1, 0]][:, :, [3]], equal_nan=True)
    assert received[1, :, :, :3].isnan().all() and not received[1, :, :, 3:].isnan().any()


def test_read_attention_names_a_layer_that_is_not_there(model):
    with pytest.raises(HeadError, match="layers: 2 .*0-1"):
        model.read_attention(IDS, lambda a: a.entropy(), layers=[0, 2])


def test_reading_leaves_nothing_behind_also_after_an_error(model):
    before = logits(model)

    def fails(attention):
        raise RuntimeError("reader")

    with pytest.raises(RuntimeError, match="reader"):
        model.read_attention(IDS, fails)
    assert not watched_points(model)
    assert torch.equal(logits(model), before)


def watched_points(model):
    return [name for name, point in model.hook_dict.items() if point.has_hooks()]


def test_a_reader_sees_each_layer_s_attention(model):
    seen = []
    model.read_attention(IDS, lambda a: seen.append(a) or a.entropy(), attention_mask=MASK)
    assert all(isinstance(a, Attention) for a in seen) and len(seen) == 2
    assert torch.equal(seen[0].real_queries, MASK.bool())
    assert seen[0].positions[1].tolist() == [0, 0, 0, *range(9)]


def test_check_heads_names_the_first_that_is_missing(model):
    model.check_heads([Head(1, 3)])
    with pytest.raises(HeadError, match="1 of 2.*L2H0.*layers 0-1 and heads 0-3"):
        model.check_heads([Head(0, 0), Head(2, 0)])
    with pytest.raises(HeadError, match="L0H4"):
        model.check_heads([Head(0, 4)])


# intervening


def test_an_intervention_is_undone_also_after_an_error(model):
    before = logits(model)
    with model.intervene(scaled(0, 0.0)) as same:
        assert same is model
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    with pytest.raises(ZeroDivisionError), model.intervene(scaled(0, 0.0)):
        logits(model)
        1 / 0  # noqa: B018
    assert torch.equal(logits(model), before) and not watched_points(model)


def test_interventions_nest_and_act_in_order(model):
    before = logits(model)
    add = Hooks(("blocks.0.attn.hook_z", lambda z, hook: z + 1))
    with model.intervene(scaled(0, 2.0)):
        doubled = logits(model)
        with model.intervene(add):
            nested = logits(model)
        assert torch.equal(logits(model), doubled)
    with model.intervene(scaled(0, 2.0), [add]):
        assert torch.equal(logits(model), nested)
    with model.intervene(add, scaled(0, 2.0)):
        assert not torch.allclose(logits(model), nested)
    assert torch.equal(logits(model), before)


def test_an_unknown_hook_is_named_with_the_nearest(model):
    unknown = scaled(0, 0.0, "hook_zz")
    nearest = "hook_zz.*blocks.0.attn.hook_z"
    with pytest.raises(HookError, match=nearest), model.intervene(unknown):
        pytest.fail("must be refused before the block")
    assert not watched_points(model)


def test_a_hook_that_never_fired_is_an_error_if_the_model_ran(model):
    silent = Hooks(("blocks.0.attn.hook_hidden_states", lambda value, hook: value))
    with model.intervene(silent):
        pass  # nothing ran
    with pytest.raises(HookError, match="never fired"), model.intervene(silent):
        logits(model)
    with pytest.raises(ZeroDivisionError), model.intervene(silent):
        logits(model)
        1 / 0  # noqa: B018  (the first error is the one to see)


def test_a_hook_whose_gate_is_shut_says_how_to_open_it(model):
    gated = scaled(0, 0.0, "hook_result")
    with pytest.raises(HookError, match="set_use_attn_result"), model.intervene(gated):
        pytest.fail("must be refused before the block")


def test_no_interventions_change_nothing(model):
    before = logits(model)
    with model.intervene():
        assert torch.equal(logits(model), before)


def test_intervening_with_gradients(model):
    factor = torch.tensor(0.5, requires_grad=True)
    with model.intervene(scaled(1, factor)):
        model(IDS, attention_mask=MASK)[:, -1].sum().backward()
    assert factor.grad.abs() > 0


# state


def test_nothing_of_another_package_is_patched():
    def state():
        functions = dict(ALL_ATTENTION_FUNCTIONS.items())
        functions.pop("interp_lazy", None)
        modeling = {
            f"{name}.{key}": value
            for name, module in list(sys.modules.items())
            if name.startswith("transformers.models.") and ".modeling_" in name
            for key, value in vars(module).items()
            if callable(value)
        }
        torch_functions = {key: vars(torch.nn.functional)[key] for key in vars(torch.nn.functional)}
        return functions, modeling, torch_functions

    build("llama"), build("gpt2"), build("gemma2")  # their modules are imported now
    before = state()
    for family in ("llama", "gpt2", "gemma2"):
        model = load(build(family))
        model.read_attention(IDS, lambda a: a.mass_received())
        with model.intervene(scaled(0, 0.0)):
            logits(model)
    for now, then in zip(state(), before):
        changed = [key for key in then if now.get(key) is not then[key]]
        assert changed == []


def test_two_models_do_not_know_of_each_other(model):
    other = load(build("llama"))
    before = logits(other)
    with model.intervene(scaled(0, 0.0)):
        assert torch.equal(logits(other), before)
        assert not torch.equal(logits(model), before)
    assert other.call is not model.call


def test_passes_leave_no_tensors(model):
    def live():
        gc.collect()
        return sum(torch.is_tensor(thing) for thing in gc.get_objects())

    def passes():
        for _ in range(7):
            model.read_attention(IDS, lambda a: a.mass_received(), attention_mask=MASK)
            model.run_with_cache(IDS)
            with model.intervene(scaled(0, 0.5)):
                logits(model)
                model.generate(IDS[:1], max_new_tokens=2, verbose=False)

    passes()
    before = live()
    passes(), passes()
    assert live() <= before


def test_a_copy_is_a_model_of_its_own(model):
    copy = deepcopy(model)
    assert torch.equal(logits(copy), logits(model))
    logits(model, IDS[:1, :5], MASK[:1, :5])
    received = copy.read_attention(IDS, lambda a: a.mass_received(), attention_mask=MASK)
    theirs = model.read_attention(IDS, lambda a: a.mass_received(), attention_mask=MASK)
    assert_close(received, theirs, equal_nan=True)
    logits(copy, IDS[:1, :4], MASK[:1, :4])
    assert copy.call.n_tokens == 4 and model.call.n_tokens == 12
    before = logits(model)
    with copy.intervene(scaled(0, 0.0)):
        assert torch.equal(logits(model), before)
        assert not torch.equal(logits(copy), before)


def test_half_a_pass_does_not_leave_the_call_of_the_last(model):
    logits(model)
    assert model.call.n_tokens == 12 and model.call.phase == "prompt"
    logits(model, IDS[:1, :4], MASK[:1, :4])
    assert model.call.n_tokens == 4


def test_the_call_of_a_model_that_never_ran_is_an_error():
    with pytest.raises(RuntimeError, match="has not run"):
        load(build("llama")).call  # noqa: B018


def test_provenance_says_what_ran(model):
    found = model.provenance()
    assert found["attention"] == "lazy" and found["dtype"] == "float32"
    assert found["architecture"] == "LlamaForCausalLM" and found["device"] == "cpu"
    assert "torch" in found["versions"]


# loading


def test_an_unknown_name_is_one_line_with_the_nearest():
    with pytest.raises(ModelError, match="smollm2-135n.*smollm2-135m"):
        load("smollm2-135n")


def test_a_folder_without_weights_is_named(tmp_path):
    build("llama").config.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_dtype_that_is_none_is_named(tmp_path):
    saved(tmp_path)
    with pytest.raises(ModelError, match="dtype='bfloat61'.*float32"):
        load(tmp_path, dtype="bfloat61")


def saved(folder, **kwargs):
    build("llama").save_pretrained(folder)
    small_tokenizer(**kwargs).save_pretrained(folder)
    return folder


def test_a_folder_is_loaded_as_it_was_saved(tmp_path):
    model = load(saved(tmp_path), device="cpu")
    assert model.name == str(tmp_path) and model.lazy
    with torch.no_grad():
        theirs = build("llama")(input_ids=IDS, attention_mask=MASK).logits
    assert_close(logits(model)[MASK.bool()], theirs[MASK.bool()], atol=1e-2, rtol=0)
    half = load(tmp_path, dtype="bfloat16", device="cpu")
    assert half.provenance()["dtype"] == "bfloat16"


def test_a_loaded_model_is_not_moved():
    with pytest.raises(ModelError, match="device.*move it first"):
        load(build("llama"), device="cpu")


def test_a_family_without_an_adapter_is_one_line():
    with pytest.raises(ModelError, match="Linear is no model of transformers"):
        load(torch.nn.Linear(2, 2))
    config = build("bert").config
    with pytest.raises(ModelError, match="BertModel") as error:
        load(transformers.BertModel(config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("again", [lambda m: m, lambda m: m.original_model])
def test_a_model_that_is_hooked_already_says_so(again):
    with pytest.raises(ModelError, match="hooked already"):
        load(again(load(build("llama"))))


# tokens


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("from_folder", [False, True])
def test_tokens_follow_the_tokenizer_s_own_policy(tmp_path, adds_bos, from_folder):
    if from_folder:
        model = load(saved(tmp_path, adds_bos=adds_bos))
    else:
        model = load(build("llama"), tokenizer=small_tokenizer(adds_bos))
    own = small_tokenizer(adds_bos)("w7 w8 w9").input_ids
    assert own == [1] * adds_bos + [7, 8, 9]
    assert model.tokenizer("w7 w8 w9").input_ids == own
    assert model.to_tokens("w7 w8 w9")[0].tolist() == own
    assert_close(model("w7 w8 w9"), model(torch.tensor([own])))
    _, cache = model.run_with_cache("w7 w8 w9")
    assert cache["blocks.0.attn.hook_z"].shape[1] == len(own)


def test_a_batch_is_padded_on_the_left(model):
    batch = model.batch([[7, 8], [5, 6, 7, 8, 9]])
    assert batch.input_ids.tolist() == [[0, 0, 0, 7, 8], [5, 6, 7, 8, 9]]
    assert batch.attention_mask.tolist() == [[0, 0, 0, 1, 1], [1] * 5]
    assert batch.first.tolist() == [3, 0] and batch.index.tolist() == [0, 1]


def test_batches_have_every_prompt_once_longest_first(model):
    prompts = [[5] * n for n in (2, 9, 4, 4, 7)]
    batches = list(model.batches(prompts, batch_size=2))
    assert torch.cat([b.index for b in batches]).tolist() == [1, 4, 2, 3, 0]
    for batch in batches:
        for row, index in enumerate(batch.index.tolist()):
            tokens = batch.input_ids[row, batch.first[row] :].tolist()
            assert tokens == prompts[index]
    assert list(model.batches([])) == []


def test_a_padded_batch_reads_as_one_by_one(model):
    prompts = [IDS[0, :5].tolist(), IDS[0].tolist(), IDS[1, 3:].tolist()]
    batch = model.batch(prompts)
    together = model.read_attention(
        batch.input_ids, lambda a: a.mass_received(), attention_mask=batch.attention_mask
    )
    for row, tokens in enumerate(prompts):
        alone = model.read_attention(torch.tensor([tokens]), lambda a: a.mass_received())[0]
        assert_close(together[row, :, :, batch.first[row] :], alone, atol=1e-6, rtol=1e-4)


def test_provenance_names_what_is_applied_and_only_then(model):
    assert model.provenance()["interventions"] == []
    with pytest.raises(KeyError), model.intervene(scaled(0, 0.0)):
        assert len(model.provenance()["interventions"]) == 1
        raise KeyError
    assert model.provenance()["interventions"] == []


def test_a_head_of_another_tower_is_not_taken_for_one_of_the_text(model):
    with pytest.raises(HeadError, match="vision:L0H0"):
        model.check_heads([Head(0, 0, "vision")])
