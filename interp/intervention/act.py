"""ACT: take weight off the later attention sinks of chosen heads, found anew on every input.

Beside the first token some later ones, too, are looked at by nearly every query whatever they say.
With a_ij the weights of one head over a prompt of T tokens, n_j how many of its queries may see key
j, and M_j what j receives from them on average,

    M_j = (1 / n_j) * sum over i of a_ij
    S = {j : M_j > threshold and n_j >= min_queries}, but for one that is spared
    a'_is = factor * a_is for s in S;  the row's other keys take up the rest, in proportion

The threshold is alpha / T, alpha times uniform attention, or a constant, `theta`. M is that of the
head as it is, while the layers below it may be edited. Rows keep their sums; the first token, never
in S, takes up most. `interp.model.damped` has the closed form: no n x n matrix is made.

Source: Yu et al. 2024, "Unveiling and Harnessing Hidden Attention Sinks" (ICML 2024, arXiv
2406.15765), and its code, which differ: alpha / T (alpha = 5) is the paper's threshold, a constant
(0.1, for chats 0.15) the code's; the first key over the threshold, which the code spares, need not
be the first token. What to do in decoding is ours: the code cannot use a cache. Two traps belong to
the published rule: even uniform attention is over 5 / T on the first keys of a prompt of more than
82 tokens, and the last keys have so few queries that they are over it by chance (`min_queries`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import isfinite
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import pandas as pd
import torch

from interp.heads import Head, HeadsLike, heads_of
from interp.intervention.base import Hook, Intervention, InterventionError
from interp.intervention.chosen import said
from interp.intervention.later_sinks import Decode, Found, LaterRule, Search, Spare
from interp.model.attention import Attention
from interp.model.damped import damped
from interp.model.edits import LEAST_RECEIVED
from interp.model.hooked import HookedModel

if TYPE_CHECKING:
    from interp.analysis.calibration import Acceptance

Columns = Literal["sinks", "random"]

# How many of a prompt's last tokens `ACT.sinks` calls its end.
N_LAST = 8


@dataclass(frozen=True, eq=False, repr=False)
class ACT(Intervention):
    """Damp the later sinks of `heads`, which keep `factor` of their weight.

    `decode` says what happens to generated tokens:

    - `prefill`: nothing, only the prompt's rows are edited;
    - `frozen`: their rows are edited at the sinks that were found in the prompt;
    - `running`: each adds its weights to the means, T grows with it, and S is found again for its
      row (`frozen` cannot take a prompt that comes in chunks, this can).

    Not causal over the prompt: S comes from all of its rows, so what a token gives depends on later
    ones. The likelihood of a prompt's own tokens means nothing under ACT. That of an answer to it
    does, where it is told which tokens are the prompt's, as `interp.evaluate` does (`with
    model.spans(None, lengths)`). Untold, all of a text is a prompt, and only its last logits count;
    so it is to Hugging Face's `generate` without the KV cache at each step, and what it writes then
    is something else than with it.

    `spare`: "first_over_threshold" as in the authors' code, or "bos", the first token. A row whose
    other keys hold less than 1e-6 stays as it is. Two controls: `columns="random"` takes as much
    weight (in all, over the prompt) from other columns, which `seed` draws from those that are
    neither over the threshold nor the first token; other heads are `HeadScores.random`.

    Soft-capped logits and virtual sinks (GPT-OSS) are honoured, by the definition instead of the
    closed form. `effects`: what `fit` found, by head.
    """

    heads: HeadsLike
    factor: float = 0.4
    alpha: float = 5.0
    theta: float | None = None
    min_queries: int = 1
    spare: Spare = "first_over_threshold"
    decode: Decode = "frozen"
    columns: Columns = "sinks"
    seed: int = 0
    effects: Mapping[str, Mapping[str, float]] | None = None

    causal: ClassVar[bool] = False

    def __post_init__(self):
        object.__setattr__(self, "heads", tuple(sorted(heads_of(self.heads))))
        if not (isfinite(self.factor) and 0 <= self.factor <= 1):
            raise InterventionError(f"factor={self.factor}: the share that is kept, from 0 to 1.")
        for name, values in (("decode", get_args(Decode)), ("columns", get_args(Columns))):
            if getattr(self, name) not in values:
                value = getattr(self, name)
                raise InterventionError(f"{name}={value!r}: one of {', '.join(values)}.")
        if self.columns == "random" and self.decode == "running":
            raise InterventionError("columns='random': with decode='prefill' or 'frozen'.")
        _ = self.rule  # checks the rest
        if self.effects is not None:
            found = {str(Head.parse(h)): dict(values) for h, values in self.effects.items()}
            object.__setattr__(self, "effects", found)

    @property
    def rule(self) -> LaterRule:
        """When a key is a later sink."""
        return LaterRule(self.alpha, self.theta, self.min_queries, self.spare)

    def __repr__(self) -> str:
        over = f"{self.alpha:g}/T" if self.theta is None else f"{self.theta:g}"
        least = f", {self.min_queries} queries or more" if self.min_queries > 1 else ""
        spared = "the first token" if self.spare == "bos" else "the first such"
        what = f"later sinks (over {over}{least}; not {spared})"
        if self.columns == "random":
            what = f"random columns (seed {self.seed}) in place of {what}"
        when = {
            "prefill": "at the prompt's tokens only",
            "frozen": "at all tokens, found in the prompt",
            "running": "at all tokens, found anew for each generated one",
        }[self.decode]
        return f"ACT({said(self.heads)}; {what} keep {self.factor:g} of their weight, {when})"

    @classmethod
    def fit(
        cls,
        model: HookedModel,
        prompts,
        heads: HeadsLike | None = None,
        *,
        accept: "Acceptance | None" = None,
        batch_size: int = 8,
        out: str | Path | None = None,
        resume: bool = True,
        progress: bool = True,
        **settings,
    ) -> "ACT":
        """Calibrate one head at a time on prompts with answers; keep those that it helps.

        Args:
            prompts: Not those that the result is to be tested on.
            heads: The candidates. Default: all, but for the first two layers and the last one.
            accept: Which of them; default the paper's rule, any gain in accuracy. See `Acceptance`.
            out: Folder for every prompt's numbers: a killed run continues there.
            settings: Other parameters of `ACT`.

        Raises `CalibrationError` where nothing can be screened, as `calibration_screen`, which
        does the work and says more.
        """
        from interp.analysis.calibration import Acceptance, calibration_screen

        candidates = middle_heads(model) if heads is None else heads
        screen = calibration_screen(
            model,
            prompts,
            cls(candidates, **settings),
            batch_size=batch_size,
            out=out,
            resume=resume,
            progress=progress,
        )
        return screen.act(accept or Acceptance())

    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """One hook per layer touched. Raises `HeadError` where the model lacks a head."""
        model.check_heads(self.heads)
        for layer, search in self.searches().items():
            yield f"blocks.{layer}.attn.hook_attention", partial(self._edit, model, search)

    def searches(self) -> dict[int, Search]:
        """What finds the sinks in each layer touched, made anew for each block."""
        found = {}
        for layer, heads in groupby(self.heads, key=attrgetter("layer")):
            index = torch.tensor([head.head for head in heads])
            # random columns differ between layers
            seed = self.seed * 1009 + layer if self.columns == "random" else None
            found[layer] = Search(index, self.rule, self.factor, self.decode, seed)
        return found

    def _edit(
        self, model: HookedModel, search: Search, attention: Attention, hook
    ) -> Attention | None:
        if self.factor == 1:
            return None
        found = search.find(attention, model.call)
        return None if found is None else apply(attention, found)

    def sinks(self, model: HookedModel, prompts, *, batch_size: int = 8) -> pd.DataFrame:
        """Which keys this edit damps on some prompts, and in how many rows.

        One row a key: `prompt, layer, head, position, token, received` (M), `queries` (n), `at_end`
        (one of the prompt's last 8), `mass` (mean weight of the head's rows on all of its sinks),
        `left_alone` (how many rows had nothing else to give it to).
        """
        from interp.tasks.prompts import as_prompts

        prompts = as_prompts(model, prompts)
        model.check_heads(self.heads)
        rows: list[dict[str, Any]] = []
        for batch in model.batches(prompts["input_ids"], batch_size):
            hooks = [
                (
                    f"blocks.{layer}.attn.hook_attention",
                    partial(self._take_down, model, search, layer, batch.index.tolist(), rows),
                )
                for layer, search in self.searches().items()
            ]
            with model.hooks(fwd_hooks=hooks):
                model.run(batch.input_ids, batch.attention_mask)
        names = ["prompt", "layer", "head", "position", "received", "queries", "at_end", "mass"]
        table = pd.DataFrame(rows, columns=[*names, "left_alone"])
        ids = prompts["input_ids"]
        tokens = [
            model.tokenizer.decode([ids[row.prompt][row.position]]) for row in table.itertuples()
        ]
        table.insert(4, "token", tokens)
        return table.sort_values(names[:4], ignore_index=True)

    def _take_down(
        self,
        model: HookedModel,
        search: Search,
        layer: int,
        prompts: list[int],
        rows: list[dict[str, Any]],
        attention: Attention,
        hook,
    ) -> Attention | None:
        """Edit as always, and add a row for each key that is damped."""
        found = search.find(attention, model.call)
        if found is None:
            return None
        heads, keys = found.heads, found.keys[:, :, 0]
        shape = len(keys), attention.n_heads, 1, attention.n_keys
        whole = keys.new_zeros(shape).index_copy(1, heads, keys[:, :, None])
        mass = attention.mass_on(whole, heads)
        others = attention.mass_on(~whole, heads)
        real = found.rows[:, None]
        stuck = (real & (mass > 0) & (others < LEAST_RECEIVED)).sum(-1)
        mean = (mass * real).sum(-1) / real.sum(-1)
        received, queries = attention.mass_received(heads), attention.queries_per_key()
        places, last = attention.key_positions, found.rows.sum(1) - N_LAST
        for row, index, column in keys.nonzero().tolist():
            position = int(places[row, column])
            rows.append(
                {
                    "prompt": prompts[row],
                    "layer": layer,
                    "head": int(heads[index]),
                    "position": position,
                    "received": float(received[row, index, column]),
                    "queries": int(queries[row, column]),
                    "at_end": position >= int(last[row]),
                    "mass": float(mean[row, index]),
                    "left_alone": int(stuck[row, index]),
                }
            )
        return apply(attention, found)


def apply(attention: Attention, found: Found) -> Attention:
    """The attention with what was found damped; itself where that is nothing."""
    return damped(
        attention,
        found.heads,
        found.keys,
        found.factor,
        found.rows,
        each_has_some=found.each_has_some,
    )


def middle_heads(model: HookedModel) -> tuple[Head, ...]:
    """The authors' candidates: not those of the first two layers and of the last one.

    All of them in a model that would have none.
    """
    last = len(model.blocks) - 1
    layers = [layer for layer in model.attention_layers if 2 <= layer < last]
    chosen = layers or model.attention_layers
    return tuple(Head(layer, head) for layer in chosen for head in range(model.cfg.n_heads))
