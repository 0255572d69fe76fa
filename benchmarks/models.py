"""The models that are timed: a few layers of SmolLM2-135M's shape, plain, hooked and eager."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import interp
from interp import zoo
from interp.intervention.base import Intervention
from interp.model.hooked import HookedModel

FOLDERS = TemporaryDirectory(prefix="interp-benchmarks-")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@cache
def smollm2(n_layers: int) -> Path:
    """A folder with the first layers of SmolLM2-135M; random ones of its shape if not installed."""
    folder = Path(FOLDERS.name) / f"smollm2-{n_layers}"
    known = zoo.SMOLLM2
    if known.installed:
        cut = {"num_hidden_layers": n_layers, "dtype": torch.float32}
        model = AutoModelForCausalLM.from_pretrained(known.folder, **cut)
        tokenizer = AutoTokenizer.from_pretrained(known.folder)
    else:
        tokenizer = AutoTokenizer.from_pretrained(zoo.EMBEDDED / "mini-llama")
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=576, intermediate_size=1536,
            num_hidden_layers=n_layers, num_attention_heads=9, num_key_value_heads=3,
            max_position_embeddings=8192,
        )  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def about(n_layers: int) -> str:
    """What `smollm2(n_layers)` is, in words."""
    if zoo.SMOLLM2.installed:
        return f"SmolLM2-135M, its first {n_layers} layers, float32"
    return f"random weights in SmolLM2-135M's shape, {n_layers} layers, float32"


def plain(folder: Path) -> nn.Module:
    """Hugging Face's model with SDPA: what runs where nobody looks."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="sdpa", dtype=torch.float32
    )
    return model.to(DEVICE).eval()


def hooked(folder: Path) -> HookedModel:
    """Ours."""
    return interp.load(folder, dtype=torch.float32, device=DEVICE)


def eager_bridge(folder: Path) -> TransformerBridge:
    """TransformerLens' own bridge, whose attention forms every pattern."""
    return TransformerBridge.boot_transformers(str(folder), dtype=torch.float32, device=DEVICE)


def random_tokens(model: nn.Module, n_tokens: int) -> Int[Tensor, "1 token"]:
    """Any text will do where only time counts."""
    size = getattr(model, "original_model", model).config.vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, size, (1, n_tokens), generator=generator).to(DEVICE)


@torch.no_grad()
def last_logits(
    model: nn.Module, tokens: Int[Tensor, "1 token"], **inputs: Tensor
) -> Float[Tensor, "1 vocab"]:
    """One forward pass; one row of logits, so that the unembedding hides nothing."""
    out = model(tokens, use_cache=False, logits_to_keep=1, **inputs)
    return (out if torch.is_tensor(out) else out.logits)[:, -1]


@torch.no_grad()
def written(
    model: nn.Module,
    tokens: Int[Tensor, "1 token"],
    n_new: int,
    edit: Intervention | None = None,
    cache: bool = True,
    **inputs: Tensor,
) -> Float[Tensor, "1 whole"]:
    """Prompt and continuation: greedy, always `n_new` tokens. `edit` is for a hooked model.

    `inputs`: the pixels of a prompt with images.
    """
    options = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False}
    options |= {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0, "use_cache": cache}
    options |= inputs
    if not isinstance(model, HookedModel):
        return model.generate(tokens, **options).float()
    with model.intervene([] if edit is None else edit):
        return model.original_model.generate(tokens, **options).float()
