"""Retrieval scores at least five times as fast as by the published procedure, and the same scores.

The peer is that of Wu et al. 2024 (arXiv 2404.15574), written afresh as a user would: one prompt at
a time, prefill with SDPA, then up to 50 steps with eager attention rows, and a Python loop over
layers and heads. (Theirs stops at a newline in Llama's vocabulary only; this one where the model
ends.) Three comparisons:

- with `how="forced"`, our default: one pass over the reference answers. On prompts that the model
  answers this differs from generation only by what is copied again after the answer, so the scores
  must correlate, and equal those of the procedure when it is fed the answers;
- with `how="generate"`: the same scores. Both read the whole prompt and write as many tokens; what
  is gained is the batch and the loop;
- the procedure fed the answers, with "forced": the same scores from the same rows.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor, nn

import interp
from benchmarks.models import DEVICE, hooked, plain
from benchmarks.timing import ratio
from interp import zoo
from interp.model.hooked import HookedModel

# As in the authors' code.
MAX_NEW_TOKENS = 50


def run(quick: bool) -> Iterator[dict]:
    """Needle prompts of 256 tokens on SmolLM2-135M where installed; quick or else: mini-llama."""
    small = quick or not zoo.SMOLLM2.installed
    known, length = (zoo.known_model("mini-llama"), 128) if small else (zoo.SMOLLM2, 256)
    repeats = 9 if small else 3
    for record in measure(known.folder, 8, length, MAX_NEW_TOKENS, repeats):
        yield record | {"model": f"{known.name}, float32"}


def measure(folder: Path, n: int, length: int, max_new_tokens: int, repeats: int) -> Iterator[dict]:
    """The published procedure / forced, / generate; then fed the answers / forced."""
    ours, peer = hooked(folder), plain(folder)
    prompts = interp.tasks.needle(ours, lengths=length, depths=4, n=n, seed=0)
    published = partial(reference, peer, prompts, max_new_tokens)
    fed = partial(reference, peer, prompts, max_new_tokens, forced=True)
    forced = partial(scores, ours, prompts, how="forced")
    generate = partial(scores, ours, prompts, how="generate", max_new_tokens=max_new_tokens)
    cases = {
        "published / forced": (published, forced, {"agree": correlate, "goal": ">= 5"}),
        "published / generate": (published, generate, {"goal": ">= 5"}),
        "fed the answers / forced": (fed, forced, {}),
    }
    for case, (theirs, mine, options) in cases.items():
        yield ratio(
            theirs,
            mine,
            repeats=repeats,
            benchmark="retrieval",
            case=f"{case}, {n} prompts of {length} tokens",
            **options,
        )


def correlate(answer: Tensor, same: Tensor) -> None:
    """Raises `AssertionError` where two sets of scores rank heads differently."""
    correlation = float(torch.corrcoef(torch.stack([answer.flatten(), same.flatten()]))[0, 1])
    assert correlation > 0.9, f"scores correlate by {correlation:.2f} only"


def scores(model: HookedModel, prompts: Dataset, **options) -> Float[Tensor, "layer head"]:
    """Ours, on all prompts in one batch."""
    options |= {"only_successes": False, "batch_size": len(prompts), "progress": False}
    return torch.as_tensor(interp.retrieval_heads(model, prompts, **options).matrix)


@torch.no_grad()
def reference(
    model: nn.Module, prompts: Dataset, max_new_tokens: int, forced: bool = False
) -> Float[Tensor, "layer head"]:
    """Share of the answer that each head copies; `forced`: the answer is written for the model."""
    n_layers, n_heads = model.config.num_hidden_layers, model.config.num_attention_heads
    total = torch.zeros(n_layers, n_heads, dtype=torch.float64)
    for row in prompts:
        text = torch.tensor([row["input_ids"]], device=DEVICE)
        start, end = row["spans"]["answer"]
        model.set_attn_implementation("sdpa")
        past = model(text[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        model.set_attn_implementation("eager")
        token = text[:, -1:]
        for step in range(len(row["answer_ids"]) if forced else max_new_tokens):
            out = model(token, past_key_values=past, use_cache=True, output_attentions=True)
            token = out.logits[:, -1:].argmax(-1)
            if forced:
                token[:] = row["answer_ids"][step]
            if token.item() == model.generation_config.eos_token_id:
                break
            for layer in range(n_layers):
                for head in range(n_heads):
                    key = out.attentions[layer][0, head, -1].topk(1).indices.item()
                    if start <= key < end and text[0, key].item() == token.item():
                        total[layer, head] += 1 / (end - start)
    return total / len(prompts)
