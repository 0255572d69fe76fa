"""Induction in GPT-2: "... A B ... A" is followed by B."""

from collections.abc import Iterator
from random import Random

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from interp.heads import Head
from tests.known_circuits.circuit import SPECIAL, KnownCircuit, Pair
from tests.known_circuits.weights import (
    CONSTANT,
    GAIN,
    SIZE,
    HeadWeights,
    Stream,
    distractor,
    selector,
    undo_length,
)

INDUCTION_WORDS = (*SPECIAL, *(f"w{i}" for i in range(17)))


def build_induction() -> GPT2LMHeadModel:
    """GPT-2 of 3 layers x 8 heads: L0H3 says of each token what came before it, L1H5 copies.

    L0H3  at position i attends to i - 1 and writes its token as `previous`
    L1H5  attends to where `previous` is the token here and writes the token there as `output`
    L2H1  decoy: what L0H3 does, too late
    L1H2  decoy: attends to its own token and writes it loudly as `unread`
    """
    n_words, d_head = len(INDUCTION_WORDS), 20
    config = GPT2Config(
        vocab_size=n_words, n_positions=d_head, n_embd=160, n_layer=3, n_head=8, n_inner=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    sizes = dict.fromkeys(("token", "previous", "output", "unread"), n_words)
    stream = Stream.of(config.n_embd, 0, position=config.n_positions, **sizes)
    token, position, previous = stream["token"], stream["position"], stream["previous"]
    before = selector(d_head, position.roll(-1, dims=0), position, token, previous)
    planted = {
        (0, 3): before,
        (1, 5): selector(d_head, token, previous, token, stream["output"]),
        (2, 1): before,
        (1, 2): selector(d_head, position, position, token, 3 * stream["unread"]),
    }
    model = GPT2LMHeadModel(config)
    body = model.transformer
    with torch.no_grad():
        body.wte.weight.copy_(token)
        body.wpe.weight.copy_(position + CONSTANT * stream["constant"])
        model.lm_head.weight.copy_(GAIN * stream["output"])
        for layer, block in enumerate(body.h):
            heads = [planted.get((layer, h)) or distractor(stream, d_head) for h in range(8)]
            write_gpt2(block, heads, stream)
        for norm in [n for n in body.modules() if isinstance(n, nn.LayerNorm)]:
            undo_length(norm, config.n_embd, content=2)
    return model


def write_gpt2(block: nn.Module, heads: list[HeadWeights], stream: Stream) -> None:
    """Heads, and an MLP of random neurons, into a block of GPT-2."""
    fused = [torch.cat([getattr(head, name) for head in heads]) for name in "qkv"]
    block.attn.c_attn.weight.copy_(torch.cat(fused).T)
    block.attn.c_proj.weight.copy_(torch.cat([head.o for head in heads]))
    n_inner = block.mlp.c_fc.weight.shape[1]
    block.mlp.c_fc.weight.copy_(stream.random_readers(n_inner).T)
    block.mlp.c_proj.weight.copy_(SIZE * stream.random(n_inner) / n_inner**0.5)


def induction_pairs(seed: int) -> Iterator[Pair]:
    """Five to eight words and one of them again; the same in another order, another asked for.

    The answers stand in both prompts, so that to know the words is not enough.
    """
    draw = Random(f"induction {seed}")
    while True:
        words = draw.sample(INDUCTION_WORDS[3:], draw.randint(5, 8))
        (clean, asked, right), (corrupted, other, wrong) = (
            _repeat(draw, draw.sample(words, len(words))) for _ in range(2)
        )
        if asked != other and right != wrong:
            yield Pair(clean, corrupted, right, wrong)


def _repeat(draw: Random, words: list[str]) -> tuple[str, str, str]:
    """The prompt, the word that is repeated, and the one that followed it."""
    place = draw.randrange(len(words) - 1)
    return " ".join([*words, words[place]]), words[place], words[place + 1]


INDUCTION = KnownCircuit(
    name="induction",
    build=build_induction,
    words=INDUCTION_WORDS,
    heads=frozenset({Head(0, 3), Head(1, 5)}),
    mlps=frozenset(),
    edges=frozenset(
        {
            ("embed", "L0H3.v"),
            ("L0H3", "L1H5.k"),
            ("embed", "L1H5.q"),
            ("embed", "L1H5.v"),
            ("L1H5", "logits"),
        }
    ),
    draw=induction_pairs,
)
