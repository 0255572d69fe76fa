"""The facts of the forward pass that is running: what a hook may ask of `model.call`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import pad

Phase = Literal["prompt", "generated"]
When = Literal["prompt", "generated", "both"]


Spans = dict[str, Sequence[int]]


@dataclass(frozen=True, eq=False)
class Prompts:
    """What the caller knows of the prompts in the batch, one entry a row.

    `spans`: name -> [start, end) in the prompt's own tokens. `lengths`: how many of a row's tokens
    are the prompt; what follows is an answer that is only read, and counts as generated.
    """

    spans: Sequence[Spans] | None = None
    lengths: Sequence[int] | None = None

    def of(self, rows: Sequence[int]) -> "Prompts":
        """Of these rows, any number of times."""
        spans, lengths = (
            None if facts is None else [facts[row] for row in rows]
            for facts in (self.spans, self.lengths)
        )
        return Prompts(spans, lengths)

    def spread(self, n_rows: int) -> "Prompts | None":
        """For a batch in which each prompt stands as often as the next (beams), next to itself."""
        known = len(self.spans or self.lengths or ())
        if not known or n_rows % known:
            return None
        return self.of([row * known // n_rows for row in range(n_rows)])


@dataclass(frozen=True, eq=False)
class Call:
    """One forward pass. Tokens are those given to this pass; keys are all tokens seen so far.

    `prompt_width` is the number of columns of the prompt, padding included: tokens from there on
    are generated, also where a whole sequence is passed again without a cache (in
    `HookedModel.generate`). A prompt may come in chunks, of more than one token each.
    `prompts` is what the caller told of them (`HookedModel.spans`).
    """

    input_ids: Int[Tensor, "batch token"] | None
    real_keys: Bool[Tensor, "batch key"]
    n_tokens: int
    prompt_width: int
    prompts: Prompts | None = None

    @property
    def spans(self) -> Sequence[Spans] | None:
        """Each row's named spans, [start, end) in the prompt's own tokens; None if not told."""
        return None if self.prompts is None else self.prompts.spans

    @property
    def step(self) -> int:
        """How many columns came after the prompt so far; 0 in the prompt's own pass."""
        return self.real_keys.shape[1] - self.prompt_width

    @property
    def whole(self) -> bool:
        """Does this pass see all tokens so far, not going on from a cache?"""
        return self.real_keys.shape[1] == self.n_tokens

    @property
    def phase(self) -> Phase:
        """Whose next token this pass is about: the prompt's, or that of something generated."""
        return "generated" if self.step else "prompt"

    @cached_property
    def key_positions(self) -> Int[Tensor, "batch key"]:
        return (self.real_keys.cumsum(1) - 1).clamp_min(0)

    @cached_property
    def positions(self) -> Int[Tensor, "batch token"]:
        return self.key_positions[:, -self.n_tokens :]

    @cached_property
    def real(self) -> Bool[Tensor, "batch token"]:
        """Which tokens of this pass are no padding."""
        return self.real_keys[:, -self.n_tokens :]

    @cached_property
    def prompt_lengths(self) -> Int[Tensor, " batch"]:
        """Real tokens in each prompt."""
        if self.prompts is not None and self.prompts.lengths is not None:
            return torch.tensor(self.prompts.lengths, device=self.real_keys.device)
        return self.real_keys[:, : self.prompt_width].sum(1)

    def facts(self, n_keys: int, device: torch.device) -> dict[str, Tensor]:
        """Positions and padding of queries and keys in layers that see the last `n_keys` keys.

        The same tensors for all such layers.
        """
        if (n_keys, device) not in self._facts:
            real_keys, key_positions = self.real_keys[:, -n_keys:], self.key_positions[:, -n_keys:]
            if unfilled := n_keys - real_keys.shape[1]:  # slots of a static cache
                real_keys, key_positions = (
                    pad(x, (0, unfilled)) for x in (real_keys, key_positions)
                )
            facts = {
                "positions": self.positions,
                "key_positions": key_positions,
                "real_queries": self.real,
                "real_keys": real_keys,
            }
            self._facts[n_keys, device] = {name: fact.to(device) for name, fact in facts.items()}
        return self._facts[n_keys, device]

    @cached_property
    def _facts(self) -> dict[tuple[int, torch.device], dict[str, Tensor]]:
        return {}

    def rows(self, when: When) -> Bool[Tensor, "batch token"]:
        """The real tokens of this pass that belong to the prompt, are generated, or both."""
        if when == "both":
            return self.real
        return self._generated if when == "generated" else self._in_prompt

    @cached_property
    def _generated(self) -> Bool[Tensor, "batch token"]:
        return self.real & (self.positions >= self.prompt_lengths[:, None])

    @cached_property
    def _in_prompt(self) -> Bool[Tensor, "batch token"]:
        return self.real & ~self._generated


@dataclass
class Running:
    """What a model's hooks share while it runs.

    `call` is the forward pass that is running (or ran last), `passes` how many began. `generating`
    is the prompt's width while `HookedModel.generate` runs (0: its first pass has yet to come);
    `interventions` is what is applied at the moment, `prompts` what the caller told.
    """

    call: Call | None = None
    passes: int = 0
    generating: int | None = None
    interventions: tuple[Any, ...] = ()
    prompts: Prompts | None = None

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Take down the facts of a call to the Hugging Face model (as its forward pre-hook)."""
        tokens = _tokens(args, kwargs)
        past = _cached(kwargs)
        real_keys = _real_keys(tokens, past, kwargs.get("attention_mask"))
        n_keys = real_keys.shape[1]
        if self.generating == 0:
            self.generating = n_keys
        ids = None if tokens.is_floating_point() else tokens
        width = self._prompt_width(past, n_keys)
        told = None if self.prompts is None else self.prompts.spread(len(tokens))
        self.call = Call(ids, real_keys, tokens.shape[1], width, told)
        self.passes += 1

    def _prompt_width(self, past: int, n_keys: int) -> int:
        if self.generating is not None:
            return self.generating
        if not past:
            return n_keys
        before = self.call
        goes_on = before is not None and before.prompt_width <= past <= before.real_keys.shape[1]
        in_prompt = before.phase == "prompt" if goes_on else True
        if in_prompt and n_keys - past > 1:
            return n_keys  # several tokens at once, right after the prompt's: its next chunk
        return before.prompt_width if goes_on else past


def to_places(
    known: Shaped[Tensor, "batch *of token"],
    places: Int[Tensor, "batch token"],
    real: Bool[Tensor, "batch token"],
    size: int,
) -> Shaped[Tensor, "batch *of place"]:
    """What is known of these tokens, by their places in their prompts; 0 where there is none."""
    axes = (slice(None), *[None] * (known.dim() - 2))
    there = known * real[axes]
    found = there.new_zeros(*known.shape[:-1], size)
    return found.scatter_add(-1, places[axes].expand_as(there), there)


def at_places(
    known: Shaped[Tensor, "batch *of place"],
    places: Int[Tensor, "batch token"],
    real: Bool[Tensor, "batch token"],
) -> Shaped[Tensor, "batch *of token"]:
    """The way back: what is known by the places of tokens in their prompts, for these tokens.

    False or 0 for padding, and for tokens that came later. (Padding, a window or a static cache
    moves columns about, not places.)
    """
    axes, size = (slice(None), *[None] * (known.dim() - 2)), known.shape[-1]
    look = Lookup.last
    if look is None or not look.serves(places, real, size, known.device):
        look = Lookup.last = Lookup(places, real, size, known.device)
    index = look.index[axes].expand(*known.shape[:-1], -1)
    return known.gather(-1, index) * look.there[axes]


class Lookup:
    """Where `at_places` looks, and for which tokens there is something there.

    The last one is kept: all layers of a pass ask for the same.
    """

    last: "ClassVar[Lookup | None]" = None

    def __init__(self, places: Tensor, real: Tensor, size: int, device: torch.device):
        self.places, self.real, self.size = places, real, size
        places, real = places.to(device), real.to(device)
        self.index, self.there = places.clamp_max(size - 1), (places < size) & real

    def serves(self, places: Tensor, real: Tensor, size: int, device: torch.device) -> bool:
        same = self.places is places and self.real is real
        return same and self.size == size and self.index.device == device


def _real_keys(tokens: Tensor, past: int, mask: Tensor | None) -> Bool[Tensor, "batch key"]:
    n_keys = past + tokens.shape[1]
    if torch.is_tensor(mask) and mask.dim() == 2 and mask.shape[1] >= n_keys:
        return mask[:, :n_keys].bool()
    return torch.ones(len(tokens), n_keys, dtype=torch.bool, device=tokens.device)


def _tokens(args: tuple, kwargs: dict) -> Tensor:
    """The first tensor of the call that has a token axis (pixels count as one token each)."""
    named = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")]
    found = [x for x in (*named, *args[:1], kwargs.get("pixel_values")) if torch.is_tensor(x)]
    return found[0]


def _cached(kwargs: dict) -> int:
    """How many tokens the cache holds; transformers 5.24 renamed the argument."""
    caches = [kwargs.get(name) for name in ("cache", "past_key_values")]
    return max((int(cache.get_seq_length()) for cache in caches if cache is not None), default=0)
