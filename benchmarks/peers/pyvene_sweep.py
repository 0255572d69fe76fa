"""Every head's z patched from the clean into the corrupted run, in pyvene.

    python benchmarks/peers/pyvene_sweep.py FOLDER

As in its tutorials: an intervenable model a layer, a call a head, each given base and source.
"""

import sys
from functools import partial
from pathlib import Path

import pyvene as pv  # pyright: ignore[reportMissingImports]
from sheet import mean_logit_diff, note, read_pairs
from transformers import AutoModelForCausalLM


def main(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    clean, corrupted, answers = read_pairs(folder)
    n_pairs, n_tokens = clean.shape
    base, source = {"input_ids": corrupted}, {"input_ids": clean}

    def patched(intervenable: pv.IntervenableModel, head: int) -> float:
        place = [[[[head]] * n_pairs, [list(range(n_tokens))] * n_pairs]]
        _, out = intervenable(base, [source], {"sources->base": (place, place)})
        return mean_logit_diff(out.logits[:, -1], answers)

    def sweep(n_layers: int | None = None) -> list[list[float]]:
        rows = []
        for layer in range(model.config.num_hidden_layers)[:n_layers]:
            where = pv.RepresentationConfig(layer, "head_attention_value_output", "h.pos")
            config = pv.IntervenableConfig([where], pv.VanillaIntervention)
            intervenable = pv.IntervenableModel(config, model)
            rows.append(
                [patched(intervenable, head) for head in range(model.config.num_attention_heads)]
            )
        return rows

    note(folder, "pyvene", "one call a head", sweep, partial(sweep, 1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
