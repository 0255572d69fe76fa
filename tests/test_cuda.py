"""What the CPU says, CUDA says too. `make test-cuda` runs this where there is a GPU: other tests do
not see it, so that they are the same everywhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

import interp
from interp.errors import UserError
from interp.intervention.base import Intervention
from interp.metrics import write_captions
from interp.model.attention import Attention
from interp.model.hooked import HookedModel
from tests.intervention.conformance import INTERVENTIONS, SEEING, SPANS, WHENS
from tests.model import families, vision_families
from tests.tiny import random_ids, tokenizer, words

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ("cpu", "cuda")
CLOSE = {"atol": 1e-3, "rtol": 1e-3}


@cache
def embedded(name: str, device: str) -> HookedModel:
    return interp.load(name, dtype=torch.float32, device=device)


@cache
def tiny(family: str, device: str) -> HookedModel:
    return interp.load(families.build(family).to(device), tokenizer=tokenizer())


@cache
def seeing(family: str, device: str) -> HookedModel:
    made = vision_families.build(family).to(device)
    processor = vision_families.processor(family)
    return interp.load(made, tokenizer=vision_families.tokenizer(), processor=processor)


def on_cpu(value: Any) -> Any:
    return value.float().cpu() if torch.is_tensor(value) else value


# Models and what can be asked of their attention


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_hook_sees_the_same(family):
    seen: dict[str, dict[str, Any]] = {}
    for device in DEVICES:
        model, values = tiny(family, device), {}
        names = [n for n in model.hook_dict if not n.endswith("hook_attention")]
        hooks = [
            (name, lambda value, hook, name=name, values=values: values.update({name: value}))
            for name in names
            if not model._gated_hook_reason(name)
        ]
        inputs = {name: value.to(device) for name, value in families.inputs(family).items()}
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            model.original_model(**inputs)
        seen[device] = {name: on_cpu(value) for name, value in values.items()}
    assert seen["cpu"].keys() == seen["cuda"].keys()
    for name, value in seen["cpu"].items():
        if torch.is_tensor(value):
            finite = value.abs() < 1e30  # hidden keys' scores
            size = max(1.0, float(value[finite].abs().max()))
            found = seen["cuda"][name]
            assert_close(found[finite], value[finite], atol=1e-4 * size, rtol=1e-3, msg=name)


STATISTICS: dict[str, Callable] = {
    "pattern": lambda a: a.pattern(queries=[-1, -3]),
    "z": lambda a: a.output(),
    "lse": lambda a: a.lse,
    "mass_received": lambda a: a.mass_received().nan_to_num(),
    "largest_received": lambda a: a.largest_received(),
    "entropy": lambda a: a.entropy(),
    "top_keys": lambda a: a.top_keys(2)[0],
    "rescaled": lambda a: a.rescale(torch.arange(a.n_keys, device=a.q.device) == 2, 0.3).output(),
    "hotter": lambda a: a.temperature(2.0, heads=[1]).output(),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [None, [0, 5, 2]])
def test_halves_are_multiplied_as_if_they_were_float32(dtype, heads):
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = (2, 6, 40, 16), (2, 3, 40, 16), (2, 3, 40, 16)
    made = [torch.randn(s, generator=generator, device="cuda", dtype=dtype) for s in sizes]
    positions = torch.arange(40, device="cuda").expand(2, 40)
    real = torch.ones_like(positions, dtype=torch.bool)
    facts = (0.25, positions, positions, real, real)
    halves = Attention(*made, *facts)
    whole = Attention(*(x.float() for x in made), *facts)
    assert_close(halves.pattern(heads), whole.pattern(heads), atol=1e-6, rtol=1e-5)
    assert_close(halves.lse, whole.lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma3"])
@pytest.mark.parametrize("name", STATISTICS)
def test_attention_answers_the_same(family, name):
    found: dict[str, list[torch.Tensor]] = {}
    for device in DEVICES:
        model, values = tiny(family, device), []
        batch = model.batch(random_ids(9, 5, 12, seed=1))
        real = batch.attention_mask[:, None, :, None].bool()

        def look(attention, hook, values=values, real=real):
            value = STATISTICS[name](attention)
            by_query = value.dim() == 4 and value.shape[2] == real.shape[2]
            values.append(on_cpu(torch.where(real, value, 0) if by_query else value))

        hooks = [(f"blocks.{i}.attn.hook_attention", look) for i in range(len(model.blocks))]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            model.run(batch.input_ids, batch.attention_mask)
        found[device] = values
    for one, other in zip(found["cuda"], found["cpu"], strict=True):
        padding = ~(other.abs() < 1e30)  # of rows that see nothing
        assert_close(one.masked_fill(padding, 0), other.masked_fill(padding, 0), **CLOSE)


# Passes


def pairs(model: HookedModel):
    return interp.tasks.ioi(model, n=4, seed=0)


def needles(model: HookedModel, *lengths: int):
    return interp.tasks.needle(model, lengths=list(lengths), depths=2, n=4)


def scenes(model: HookedModel):
    return interp.tasks.scenes(model, n=3, seed=0, questions=("caption",))


QUIET = {"progress": False}
PASSES: dict[str, tuple[str, Callable[[HookedModel], Any]]] = {
    "sinks": (
        "mini-llama",
        lambda m: interp.attention_sinks(
            m, interp.tasks.text(m, max_tokens=64, n=3), **QUIET
        ).heads.table,
    ),
    "retrieval": (
        "mini-llama",
        lambda m: interp.retrieval_heads(m, needles(m, 64, 96), **QUIET).table,
    ),
    "retrieval, generated": (
        "mini-llama",
        lambda m: interp.retrieval_heads(m, needles(m, 64), how="generate", **QUIET).table,
    ),
    "evaluation": (
        "mini-llama",
        lambda m: interp.evaluate(m, needles(m, 64, 96), **QUIET).table,
    ),
    "activation patching": (
        "mini-llama", lambda m: interp.activation_patching(m, pairs(m), **QUIET).table
    ),
    "attribution patching": (
        "mini-llama", lambda m: interp.attribution_patching(m, pairs(m), ig_steps=2, **QUIET).table
    ),
    "path patching": (
        "mini-llama", lambda m: interp.path_patching(m, pairs(m), **QUIET).heads.table
    ),
    "edge attribution": (
        "mini-llama", lambda m: interp.edge_attribution(m, pairs(m), **QUIET).table
    ),
    "logit attribution": (
        "mini-llama", lambda m: interp.logit_attribution(m, pairs(m), **QUIET).table
    ),
    "vision head divergence": (
        "mini-llava",
        lambda m: interp.vision_head_divergence(
            m, scenes(m), max_new_tokens=8, **QUIET
        ).heads.table,
    ),
    "image attention": (
        "mini-llava", lambda m: interp.image_attention(m, scenes(m), **QUIET).heads.table
    ),
    "gradient maps": (
        "mini-llava", lambda m: interp.gradient_attention(m, scenes(m), **QUIET).maps
    ),
    "relative maps": (
        "mini-llava", lambda m: interp.relative_attention(m, scenes(m), **QUIET).maps
    ),
    "input gradient": ("mini-llava", lambda m: interp.input_gradient(m, scenes(m), **QUIET).maps),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_finds_the_same(name):
    model, run = PASSES[name]
    found, expected = (run(embedded(model, device)) for device in ("cuda", "cpu"))
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, atol=2e-3, rtol=2e-3)
    else:
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-3, rtol=1e-2)


# Interventions


EDITS = [(name, when) for name in INTERVENTIONS for when in WHENS]


def logits(model: HookedModel, edit: Intervention) -> list[torch.Tensor]:
    """Of two prompts, padded, and of the tokens written after them."""
    batch = model.batch(random_ids(9, 5, seed=4))
    with torch.no_grad(), model.spans([SPANS] * 2), model.intervene(edit):
        read = model(batch.input_ids, attention_mask=batch.attention_mask)
        written = model.generate(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            verbose=False,
        )
    real = batch.attention_mask[..., None].bool()
    return [on_cpu(torch.where(real, read, 0)), *map(on_cpu, written.logits)]


@pytest.mark.parametrize(("name", "when"), EDITS)
def test_an_edit_does_the_same(name, when):
    edit = INTERVENTIONS[name](tiny("llama", "cpu"), when)
    if edit is None:
        pytest.skip("there is no such thing")
    expected, found = (logits(tiny("llama", device), edit) for device in DEVICES)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, **CLOSE)


def test_a_model_that_is_moved_takes_its_edits_with_it():
    edit = INTERVENTIONS["damped sinks"](tiny("llama", "cpu"), "both")
    model = interp.load(families.build("llama"), tokenizer=tokenizer())
    expected = logits(model, edit)
    for one, other in zip(logits(model.to("cuda"), edit), expected, strict=True):
        assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", INTERVENTIONS)
def test_an_edit_in_half_precision_is_near(name, dtype):
    edit = INTERVENTIONS[name](tiny("llama", "cpu"), "both")
    if edit is None:
        pytest.skip("there is no such thing")
    half = families.build("llama", dtype=dtype).to("cuda")
    model = interp.load(half, tokenizer=tokenizer())
    expected, found = logits(tiny("llama", "cpu"), edit)[0], logits(model, edit)[0]
    assert bool(found.isfinite().all())
    near = torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    assert float(near) > 0.97


@contextmanager
def supported() -> Iterator[None]:
    """Skips where an edit says that it can't be had in a family."""
    try:
        yield
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("family", vision_families.FAMILIES)
@pytest.mark.parametrize("name", SEEING)
def test_an_edit_of_what_is_seen_does_the_same(name, family):
    edit, said = SEEING[name](seeing(family, "cpu"), "both"), []
    for device in DEVICES:
        model = seeing(family, device)
        mark = interp.model.images.image_mark(model)
        rows = [
            {"text": f"w5 {mark} w6 w7 w8", "answer": " w8", "image": vision_families.picture(0)},
            {"text": f"w3 w9 {mark} w6 w4", "answer": " w8", "image": vision_families.picture(1)},
        ]
        for row in rows:
            row["char_spans"] = {"text": row["text"][-5:]}
        prompts = interp.tasks.from_examples(model, rows)
        with supported(), model.intervene(edit):
            loss = interp.evaluate(model, prompts, batch_size=2, **QUIET).table["loss"].tolist()
            texts = write_captions(model, prompts, max_new_tokens=4, batch_size=2, **QUIET)
        said.append((loss, texts["tokens"].tolist()))
    assert_close(torch.tensor(said[1][0]), torch.tensor(said[0][0]), **CLOSE)
    assert said[1][1] == said[0][1]


# Memory


def test_nothing_of_the_size_of_a_pattern_is_ever_held():
    from transformers import LlamaConfig, LlamaForCausalLM

    n_tokens = 16384
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=512, intermediate_size=1024, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=n_tokens,
    )  # fmt: skip
    made = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    model = interp.load(made, tokenizer=tokenizer())
    one_pattern = n_tokens**2 * 8 * 2  # bytes of a layer's, in bfloat16
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sinks = interp.attention_sinks(model, words(random_ids(n_tokens - 1)[0]), **QUIET)
    assert torch.cuda.max_memory_allocated() - before < one_pattern / 4
    assert np.isfinite(sinks.received[0]).all()
