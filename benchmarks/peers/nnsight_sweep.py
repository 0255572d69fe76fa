"""Every head's z patched from the clean into the corrupted run, in nnsight.

    python benchmarks/peers/nnsight_sweep.py FOLDER [cell | layer]

`cell`: one trace a head, as its tutorials write activation patching. `layer`: one trace a layer,
with an `invoke` for each head; nnsight puts these into one batch.
"""

import sys
from functools import partial
from pathlib import Path

import nnsight  # pyright: ignore[reportMissingImports]
import torch
from sheet import mean_logit_diff, note, read_pairs


def main(folder: Path, how: str) -> None:
    model = nnsight.TransformersModel(str(folder / "model"), task="text-generation", dispatch=True)
    clean, corrupted, answers = read_pairs(folder)
    if hasattr(model, "transformer"):
        projections = [block.attn.c_proj for block in model.transformer.h]
    else:
        projections = [block.self_attn.o_proj for block in model.model.layers]
    n_heads = model.config.num_attention_heads

    def sweep(n_layers: int | None = None) -> list[list[float]]:
        chosen = projections[:n_layers]
        with model.trace(clean):
            values = nnsight.save([])
            for projection in chosen:
                values.append(projection.input)
        width = values[0].shape[-1] // n_heads
        columns = [slice(head * width, (head + 1) * width) for head in range(n_heads)]
        patch = {"cell": by_cell, "layer": by_layer}[how]
        return [
            [
                mean_logit_diff(logits, answers)
                for logits in patch(model, projection, value, corrupted, columns)
            ]
            for projection, value in zip(chosen, values, strict=True)
        ]

    note(folder, "nnsight", f"one trace a {how}", sweep, partial(sweep, 1))


def by_cell(model, projection, value, corrupted, columns) -> list[torch.Tensor]:
    """Last logits under each head's patch, a trace for each."""
    found = []
    for own in columns:
        with model.trace(corrupted):
            projection.input[:, :, own] = value[:, :, own]
            logits = model.output.logits[:, -1].save()
        found.append(logits)
    return found


def by_layer(model, projection, value, corrupted, columns) -> list[torch.Tensor]:
    """The same in one trace."""
    with model.trace() as tracer:
        found = nnsight.save([])
        for own in columns:
            with tracer.invoke(corrupted):
                projection.input[:, :, own] = value[:, :, own]
                found.append(model.output.logits[:, -1])
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "cell")
