"""A histogram in Llama: "... A ... A" is followed by how often A occurred."""

from collections.abc import Iterator
from random import Random

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

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

MOST = 4
LETTERS = tuple("abcdefghij")
COUNTS = tuple(f"n{count}" for count in range(1, MOST + 1))
HISTOGRAM_WORDS = (*SPECIAL, *LETTERS, *COUNTS)
D_HEAD = 32
SHARE = 6.0  # what a share of attention of 1 is written as


def build_histogram() -> LlamaForCausalLM:
    """Llama of 3 layers x 6 heads, 3 of them key-value heads: L0H2 counts, MLP 1 reads off.

        L0H2  attends to <s> and to the c tokens equal to this one alike, so that <s> gets
              1 / (1 + c), which it writes as `share`
        MLP1  turns the share into the code of c by a staircase of steps
        L1H4  decoy: what L0H2 does, and writes it loudly as `unread`

    Rotary positions: codes lie in those pairs of a head's dimensions that hardly turn.
    """
    config = LlamaConfig(
        vocab_size=len(HISTOGRAM_WORDS), hidden_size=96, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=3, head_dim=D_HEAD, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12}, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    slow = [*range(D_HEAD // 4, D_HEAD // 2), *range(3 * D_HEAD // 4, D_HEAD)]
    stream = Stream.of(
        config.hidden_size, 1, token=len(HISTOGRAM_WORDS), share=1, count=MOST, unread=1
    )
    start, letters = stream["token"][1:2], stream["token"][3 : 3 + len(LETTERS)]
    keys = torch.cat([start, letters])
    queries = torch.cat([stream.is_one, letters])
    planted = {
        (0, 2): selector(D_HEAD, queries, keys, start, SHARE * stream["share"], slow),
        (1, 4): selector(D_HEAD, queries, keys, start, 2 * SHARE * stream["unread"], slow),
    }
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(stream["token"] + CONSTANT * stream["constant"])
        model.lm_head.weight.zero_()
        model.lm_head.weight[-MOST:] = GAIN * stream["count"]
        for layer, block in enumerate(model.model.layers):
            heads = [planted.get((layer, h)) or distractor(stream, D_HEAD) for h in range(6)]
            write_llama(block, heads, stream)
        write_staircase(model.model.layers[1].mlp, stream)
        for norm in [n for n in model.modules() if type(n).__name__ == "LlamaRMSNorm"]:
            undo_length(norm, config.hidden_size, content=1)
    return model


def write_llama(block: nn.Module, heads: list[HeadWeights], stream: Stream) -> None:
    """Heads, and an MLP of random neurons, into a block of Llama.

    Of the heads that share a key-value head the first one gives it.
    """
    attention, mlp = block.self_attn, block.mlp
    givers = heads[:: attention.num_key_value_groups]
    attention.q_proj.weight.copy_(torch.cat([head.q for head in heads]))
    attention.k_proj.weight.copy_(torch.cat([head.k for head in givers]))
    attention.v_proj.weight.copy_(torch.cat([head.v for head in givers]))
    attention.o_proj.weight.copy_(torch.cat([head.o for head in heads]).T)
    n_inner = len(mlp.gate_proj.weight)
    for projection in (mlp.gate_proj, mlp.up_proj):  # their product grows with the square
        projection.weight.copy_(stream.random_readers(n_inner) / 3)
    mlp.down_proj.weight.copy_(SIZE * stream.random(n_inner).T / n_inner**0.5)


def write_staircase(mlp: nn.Module, stream: Stream) -> None:
    """share -> count: the code of MOST, and a step to the next lower count at each threshold.

    A step is the difference of two rectifiers, each a SiLU so far out that it is nearly one.
    """
    far, width = 20.0, 0.1
    shares = [SHARE / (1 + count) for count in range(1, MOST + 1)]
    count, is_one = stream["count"], stream.is_one[0]
    neurons = [(far * is_one, count[MOST - 1])]
    for lower in range(MOST - 1):
        threshold = (shares[lower] + shares[lower + 1]) / 2
        step = count[lower] - count[lower + 1]
        for side in (-1, 1):
            height = (stream["share"][0] - (threshold + side * width / 2) * is_one) / width
            neurons.append((far * height, -side * step))
    for row, (gate, written) in enumerate(neurons):
        mlp.gate_proj.weight[row] = gate
        mlp.up_proj.weight[row] = is_one
        mlp.down_proj.weight[:, row] = written / far


def histogram_pairs(seed: int) -> Iterator[Pair]:
    """Six to twelve letters; how often the last one occurs differs, and so does the last one."""
    draw = Random(f"histogram {seed}")
    while True:
        before = draw.randint(5, 11)
        asked, other = draw.sample(LETTERS, 2)
        right, wrong = draw.sample(range(MOST), 2)
        sides = []
        for letter, count in ((asked, right), (other, wrong)):
            others = [x for x in LETTERS if x != letter]
            text = [letter] * count + draw.choices(others, k=before - count)
            sides.append(" ".join([*draw.sample(text, before), letter]))
        yield Pair(*sides, COUNTS[right], COUNTS[wrong])


HISTOGRAM = KnownCircuit(
    name="histogram",
    build=build_histogram,
    words=HISTOGRAM_WORDS,
    heads=frozenset({Head(0, 2)}),
    mlps=frozenset({1}),
    edges=frozenset(
        {
            ("embed", "L0H2.q"),
            ("embed", "L0H1.k"),  # key-value head 1 serves heads 2 and 3
            ("L0H2", "MLP1"),
            ("MLP1", "logits"),
        }
    ),
    draw=histogram_pairs,
)
