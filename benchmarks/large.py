"""Models of 7 billion weights on a GPU: looking and editing beside what Hugging Face does plainly.

The weights are random ones in the shapes of Llama-2-7B and LLaVA-1.5-7B (they cost the same time as
trained ones, and can be had anywhere), in bfloat16. Writing a token takes much longer than reading
the weights would: the processor queues small kernels one by one, and time is its time again. Which
rows VAR edits depends on the weights, and so in part does its time.

As in `benchmarks.offsets`, `act` and `vision`, edits are as good as none while they are timed, so
that both sides write as much; that they act at their own strength is checked there. Random weights
in bfloat16 leave next tokens close to each other, so both sides need not write the same: what is
compared is the logits of a first pass.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

import interp
from benchmarks.act import SAME, a_tenth
from benchmarks.models import DEVICE, last_logits, random_tokens, written
from benchmarks.offsets import pushes
from benchmarks.sinks import logits_and_sinks
from benchmarks.timing import ratio
from benchmarks.vision import LITTLE, largest
from interp import zoo
from interp.intervention.act import ACT
from interp.intervention.base import Intervention
from interp.intervention.var import VAR
from interp.intervention.vhr import VHR
from interp.model.hooked import HookedModel
from interp.model.images import images_of

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "vocab_size": 32000,
}
CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def run(quick: bool) -> Iterator[dict]:
    """Quick: three narrow layers, anywhere; else 7B, where there is a GPU."""
    if not quick and DEVICE != "cuda":
        return
    yield from text(quick)
    yield from pictures(quick)


def text(quick: bool) -> Iterator[dict]:
    """Llama: forward passes, sinks, and generation under edits, each / plain SDPA."""
    size = LLAMA_7B | (narrow(64) if quick else {})
    folder = zoo.EMBEDDED / "mini-llama"
    ours, peer = both(LlamaForCausalLM, LlamaConfig(**size), AutoTokenizer.from_pretrained(folder))
    lengths, written_after, n_new = ([64], 32, 2) if quick else ([4096, 16384], 512, 64)
    for n_tokens in lengths:
        tokens = random_tokens(peer, n_tokens)
        passes: dict[str, Callable] = {"hooked": last_logits, "mass received": logits_and_sinks}
        for case, look in passes.items():
            said = f"forward, {case} / plain SDPA, {n_tokens} tokens"
            yield timed(partial(look, ours, tokens), partial(last_logits, peer, tokens), said)
    edits: dict[str, Intervention | None] = {
        "hooked, no edit": None,
        "ITI": replace(pushes(ours), strength=0.0),
        "ACT, frozen": ACT(a_tenth(ours), factor=SAME, decode="frozen"),
    }
    yield from generation(ours, peer, random_tokens(peer, written_after), n_new, edits, {})


def pictures(quick: bool) -> Iterator[dict]:
    """LLaVA: captions under edits that read the image, each / plain SDPA."""
    folder = zoo.EMBEDDED / "mini-llava"
    config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    config.text_config.update(LLAMA_7B | (narrow(64) if quick else {}))
    config.text_config.tie_word_embeddings = False
    if not quick:
        config.vision_config.update(CLIP_LARGE)
        config.image_seq_length = 576
        processor.image_processor.size = {"height": 336, "width": 336}
        processor.image_processor.crop_size = {"height": 336, "width": 336}
        processor.patch_size = 14
    ours, peer = both(LlavaForConditionalGeneration, config, processor.tokenizer, processor)
    prompts = interp.tasks.scenes(ours, 1, questions=("caption",))
    batch = ours.batch(prompts["input_ids"], images=images_of(prompts))
    tokens, inputs = batch.input_ids, batch.inputs
    vhr = VHR(1 + LITTLE)
    table = replace(vhr, alpha=2.0).choices(ours, prompts)
    chosen = [(row.layer, row.head) for row in table[table["chosen"]].itertuples()]
    edits: dict[str, Intervention | None] = {
        "caption, no edit": None,
        "VHR, heads chosen before": replace(vhr, heads=chosen),
        "VHR": vhr,
        "VAR": VAR(
            largest(ours, tokens, inputs), moved=LITTLE, layers=":", require_visual_sink=False
        ),
    }
    yield from generation(ours, peer, tokens, 2 if quick else 64, edits, inputs)


def narrow(width: int) -> dict:
    """A small model in place of a large one."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": width // 8}
    return {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 3} | heads


def both(kind: type, config, tokenizer, processor=None) -> tuple[HookedModel, nn.Module]:
    """The hooked model and its twin, in bfloat16, made where they are to be."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        plain: nn.Module = kind._from_config(config, dtype=torch.bfloat16).eval()
    plain.set_attn_implementation("sdpa")
    ours = interp.load(copy.deepcopy(plain), tokenizer, processor=processor)
    return ours, plain


def same_logits(one: Float[Tensor, "1 vocab"], other: Float[Tensor, "1 vocab"]) -> None:
    """Raises `AssertionError` unless they are the same but for bfloat16's rounding."""
    size = float(other.float().std())
    torch.testing.assert_close(one.float(), other.float(), atol=0.1 * size, rtol=0.05)


def same_shape(one: Tensor, other: Tensor) -> None:
    """Raises `AssertionError` unless as much was written."""
    assert one.shape == other.shape


def generation(
    ours: HookedModel,
    peer: nn.Module,
    tokens: Int[Tensor, "1 token"],
    n_new: int,
    edits: dict[str, Intervention | None],
    inputs: dict[str, Tensor],
) -> Iterator[dict]:
    """Writing under each edit / the plain model's."""
    same_logits(last_logits(ours, tokens, **inputs), last_logits(peer, tokens, **inputs))
    for case, edit in edits.items():
        yield timed(
            partial(written, ours, tokens, n_new, edit, **inputs),
            partial(written, peer, tokens, n_new, **inputs),
            f"generation, {case} / plain SDPA, {tokens.shape[1]} + {n_new} tokens",
            agree=same_shape,
        )


def timed(top: Callable, bottom: Callable, case: str, agree: Callable = same_logits) -> dict:
    """The ratio of two ways, and where it was measured."""
    repeats = 5 if DEVICE == "cuda" else 2
    record = ratio(top, bottom, repeats=repeats, agree=agree, benchmark="large", case=case)
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    return record | {"model": "random weights of 7B models' shapes, bfloat16", "device": where}
