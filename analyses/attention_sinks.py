"""Attention sinks: which keys take the attention, on which inputs, and what else is odd about them.

    python analyses/attention_sinks.py smollm2-135m --out runs/sinks-study

Four questions, after Gu et al. 2025 (arXiv 2410.10781), Sun et al. 2024 (arXiv 2402.17762) and
Yu et al. 2024 (arXiv 2406.15765), each with the control that could undo the answer:

1. Is the first token a sink, and is it because of what it is or of where it stands? Text, random
   tokens and one token repeated; the same texts with their first two tokens swapped.
2. Which later tokens are sinks? Against uniform attention, which favours early keys by itself.
3. Do massive activations and small values sit at the same tokens?
4. Did training make it so? The same architecture with random weights.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForCausalLM

import interp
from interp.model.hooked import HookedModel
from interp.tasks.prompts import from_examples
from telling import keep, show

WINDOW = 64  # tokens: rates fall with length, and Gu et al. use 64


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    model = interp.load(args.model, dtype=args.dtype)
    texts = interp.tasks.text(model, args.data, max_tokens=WINDOW, n=args.n, seed=args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    show("1. Sink rate of the first token (share of heads and prompts above 0.3)")
    inputs = {"text": texts, **controls_of(model, texts)}
    sinks = {name: interp.attention_sinks(model, prompts) for name, prompts in inputs.items()}
    rates = pd.DataFrame([rates_of(name, found) for name, found in sinks.items()])
    keep(rates, args.out / "rates.parquet")

    show("2. Later sinks, mean over heads, beside what uniform attention would give that position")
    later = sinks["text"].later(threshold=0.1)
    named = later.groupby(["layer", "token"], as_index=False).agg(
        prompts=("prompt", "nunique"), received=("received", "mean"), uniform=("uniform", "mean")
    )
    named = named.sort_values(["prompts", "received"], ascending=False).head(15)
    keep(named, args.out / "later.parquet")

    show("3. Massive activations, and values at the first token, by layer")
    massive = sinks["text"].massive
    by_layer = massive.groupby("layer").agg(
        largest=("value", lambda x: x.abs().max()),
        ratio=("ratio", "max"),
        at_first_token=("position", lambda x: (x == 0).mean()),
    )
    heads = sinks["text"].heads.table
    by_layer["first_received"] = heads.groupby("layer")["score"].mean()
    by_layer["first_value_norm"] = heads.groupby("layer")["value_norm"].mean()
    keep(by_layer.reset_index(), args.out / "massive.parquet")

    show("4. The same architecture with random weights")
    untrained = interp.attention_sinks(untrained_like(model), texts)
    keep(pd.DataFrame([rates_of("untrained", untrained)]), args.out / "untrained.parquet")

    sinks["text"].heads.plot(title="Attention that the first token receives").write_html(
        args.out / "first_token.html"
    )
    sinks["text"].plot(prompt=0).write_html(args.out / "profile.html")
    print(f"\ntables and figures: {args.out}")


def controls_of(model: HookedModel, texts) -> dict:
    """The inputs beside text: random tokens, one token repeated, first two tokens swapped."""
    generator = torch.Generator().manual_seed(0)
    special = set(model.tokenizer.all_special_ids)
    vocabulary = torch.tensor([t for t in range(len(model.tokenizer)) if t not in special])

    def draw(*size: int) -> torch.Tensor:
        return vocabulary[torch.randint(len(vocabulary), size, generator=generator)]

    lists = texts["input_ids"]
    kinds = {
        "random tokens": [draw(len(ids)).tolist() for ids in lists],
        "one token repeated": [draw(1).tolist() * len(ids) for ids in lists],
        "first two swapped": [[ids[1], ids[0], *ids[2:]] for ids in lists],
    }
    return {name: tokens_as_prompts(model, lists, name) for name, lists in kinds.items()}


def tokens_as_prompts(model: HookedModel, lists: list[list[int]], task: str):
    """Prompts made from token ids; their text is only for reading."""
    rows = [
        {
            "text": model.tokenizer.decode(ids),
            "input_ids": ids,
            "answer_ids": [],
            "spans": {"text": [0, len(ids)]},
        }
        for ids in lists
    ]
    return from_examples(model, rows, task=task)


def untrained_like(model: HookedModel) -> HookedModel:
    """A model of the same configuration whose weights are as they were drawn."""
    config = model.original_model.config
    config = type(config).from_dict(config.to_dict())  # our attention's name stays behind
    return interp.load(AutoModelForCausalLM.from_config(config).eval(), model.tokenizer)


def rates_of(name: str, sinks) -> dict:
    """One line of the first table: Gu et al.'s rate of the first keys, and the strongest later."""
    later = sinks.tokens[(sinks.tokens["position"] > 0) & (sinks.tokens["queries"] >= 8)]
    return {
        "input": name,
        "rate of key 0": sinks.sink_rate(0),
        "rate of key 1": sinks.sink_rate(1),
        "key 0 receives": sinks.heads.table["score"].mean(),
        "strongest later": later["received"].max(),
        "prompts": len(sinks.received),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/sinks-study"))
    parser.add_argument("--data", default=None, help="text file or folder; default: our filler")
    parser.add_argument("--n", type=int, default=20, help="prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
