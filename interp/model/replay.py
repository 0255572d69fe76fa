"""Replay instead of rerun: continue a recorded pass from the layer that changed, many at once.

What happens at layer l changes nothing before l and, under causal attention, nothing before its
position. `record` runs the model once and keeps what entered each block, and every layer's keys and
values. `Recording.replay` runs the model again with the blocks before l passed over and, where only
positions from p on change, with the recorded keys and values before p as its cache. The model's own
forward does all of it (masks, rotary positions, windows, final norm, unembedding), so it holds for
every architecture whose blocks run once and in order; `record` tries it out and refuses where it
does not.

Hooks that are attached while replaying act as always, on the rows and tokens of the replay.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformers.cache_utils import DynamicCache, DynamicLayer

from interp.errors import UserError
from interp.model.call import Prompts
from interp.model.hooked import HookedModel
from interp.model.transparent import stands_in

KeysAndValues = tuple[
    Float[Tensor, "batch kv_head token d_head"], Float[Tensor, "batch kv_head token d_value"]
]

# Relative to the largest logit; float32 on paths of another order of operations.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
COARSE = 0.1  # half precision

# Numbers that a token takes in a pass, in units of what its residual stream takes.
COPIES_PER_TOKEN = 24
SHARE_OF_FREE_MEMORY = 0.25
# What a pass costs beyond its tokens (weights are read, and Python runs), in tokens.
PASS_COST = {"cpu": 96, "cuda": 4096}
# More tokens than this in one pass bring no speed, only memory.
MOST_TOKENS = {"cpu": 4096, "cuda": 1 << 16}


class ReplayError(UserError):
    """A model, or a place in it, that a recorded pass cannot be continued from."""


@dataclass(frozen=True, eq=False)
class Recording:
    """A pass over `input_ids`, to be continued. `logits` are those of the columns `read`.

    `keys_values` is None where every replay must run all positions: attention that is not causal,
    a cache of another kind, interventions that may look at later tokens.
    """

    model: HookedModel
    input_ids: Int[Tensor, "batch token"]
    attention_mask: Int[Tensor, "batch token"]
    read: Int[Tensor, " read"]
    resid_pre: list[Float[Tensor, "batch token d_model"]]
    keys_values: list[KeysAndValues] | None
    logits: Float[Tensor, "batch read d_vocab"]
    prompts: Prompts | None = None

    @property
    def can_start_late(self) -> bool:
        """May a replay leave out the positions before those that change?"""
        return self.keys_values is not None

    @property
    def n_layers(self) -> int:
        return len(self.resid_pre)

    def replay(
        self,
        layer: int,
        rows: Int[Tensor, " row"] | None = None,
        start: int = 0,
        *,
        lean: bool = False,
    ) -> Float[Tensor, "row read d_vocab"]:
        """Run blocks `layer` and later on prompts `rows` (any, repeated as wished) from `start` on.

        Returns the logits at `read` (as they were recorded where `read` comes before `start`).
        Hooks see the tokens from `start` on. `lean`: the last block's MLP runs at `read` only,
        unless a hook is in it; what hooks after it would see elsewhere is not what it would be.

        Raises:
            ReplayError: A layer or start that is not there.
        """
        n_tokens = self.input_ids.shape[1]
        if not 0 <= layer < self.n_layers or not 0 <= start < n_tokens:
            raise ReplayError(
                f"layer={layer}, start={start}: layers 0-{self.n_layers - 1}, positions "
                f"0-{n_tokens - 1}."
            )
        if start and not self.can_start_late:
            raise ReplayError(
                f"start={start}: this pass of {self.model.name} has to be replayed from position 0 "
                "(attention is not causal, its cache is of another kind, or an intervention is on)."
            )
        rows = torch.arange(len(self.input_ids)) if rows is None else rows
        rows = rows.to(self.input_ids.device)
        late = self.read >= start
        options: dict[str, Any] = {}
        if start:
            options[str(_cache_name(self.model))] = self._cache(layer, rows, start)
        hidden = self.resid_pre[layer][rows, start:]
        told = None if self.prompts is None else self.prompts.of(rows.tolist())
        with ExitStack() as around:
            around.enter_context(passing_over(self.model, layer, hidden))
            around.enter_context(_as_prompt(self.model, n_tokens, told))
            if lean:
                around.enter_context(_last_mlp_at(self.model, self.read[late] - start))
            logits = _logits_at(
                self.model,
                self.input_ids[rows, start:],
                self.attention_mask[rows],
                self.read[late] - start,
                **options,
            )
        if bool(late.all()):
            return logits
        whole = self.logits[rows].clone()
        whole[:, late] = logits
        return whole

    def _cache(self, layer: int, rows: Tensor, start: int) -> DynamicCache:
        """Recorded keys and values before `start`; those of blocks passed over only have a size."""
        assert self.keys_values is not None
        cache = DynamicCache()
        for index, (k, v) in enumerate(self.keys_values):
            if index < layer:
                k, v = (x[:1, :, :start].expand(len(rows), -1, -1, -1) for x in (k, v))
            else:
                k, v = k[rows, :, :start], v[rows, :, :start]
            kept = DynamicLayer()
            kept.lazy_initialization(k, v)
            kept.keys, kept.values = k, v
            cache.layers.append(kept)
        return cache


@torch.no_grad()
def record(
    model: HookedModel,
    input_ids: Int[Tensor, "batch token"],
    attention_mask: Int[Tensor, "batch token"] | None = None,
    read: Sequence[int] | Int[Tensor, " read"] = (-1,),
) -> Recording:
    """Run once and keep what a replay needs; `read`: the columns whose logits will be asked for.

    Hooks and interventions that are on act in the recording, and again in every replay.

    Raises:
        ReplayError: A model in training mode, or whose blocks can't be continued from.
    """
    if model.original_model.training:
        raise ReplayError(
            f"{model.name} is in training mode, where dropout makes each pass another one; "
            "call model.eval() first."
        )
    n_tokens = input_ids.shape[1]
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    columns = torch.as_tensor(read, device=input_ids.device)
    columns = torch.where(columns < 0, columns + n_tokens, columns)
    cache_name = _cache_name(model)
    cache = None if cache_name is None else DynamicCache()
    options = {} if cache_name is None else {cache_name: cache}
    resid_pre: list[Tensor] = []

    def keep(value: Tensor, hook) -> None:
        resid_pre.append(value)

    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(len(model.blocks))]
    told = model._running.prompts
    with model.hooks(fwd_hooks=[(name, keep) for name in names]), _as_prompt(model, n_tokens, told):
        logits = _logits_at(model, input_ids, mask, columns, **options)
    keys_values = None if model.interventions else _kept_by(cache, len(names), n_tokens)
    recording = Recording(model, input_ids, mask, columns, resid_pre, keys_values, logits, told)
    _try_out(recording)
    return recording


def passes(
    starts: Sequence[int], n_tokens: int, most: int, pass_cost: float
) -> list[tuple[int, int]]:
    """How to cut cells, in the order of their `starts`, into passes: [first, last) of each.

    Cells of one pass all run from its first start on, to `n_tokens`. The cut is the one that costs
    least, where a pass costs its tokens and `pass_cost` (both for one row a cell); `most` cells fit
    in a pass.
    """
    best, cut = [0.0], [0]
    for stop in range(1, len(starts) + 1):
        costs = [
            (best[first] + (stop - first) * (n_tokens - starts[first]) + pass_cost, first)
            for first in range(max(0, stop - most), stop)
        ]
        cost, first = min(costs)
        best.append(cost)
        cut.append(first)
    found, stop = [], len(starts)
    while stop:
        found.append((cut[stop], stop))
        stop = cut[stop]
    return found[::-1]


def pass_cost(model: HookedModel) -> int:
    """What a pass costs beyond its tokens, in tokens."""
    return PASS_COST.get(torch.device(model.cfg.device or "cpu").type, PASS_COST["cuda"])


def tokens_at_once(model: HookedModel) -> int:
    """How many tokens to replay in one pass: as fast as can be, within the memory there is."""
    device = torch.device(model.cfg.device or "cpu")
    width = max(model.cfg.d_model, getattr(model.cfg, "d_mlp", None) or 0)
    number = torch.finfo(model.original_model.dtype).bits // 8
    room = SHARE_OF_FREE_MEMORY * _free_memory(device) / (COPIES_PER_TOKEN * width * number)
    return max(1, min(int(room), MOST_TOKENS.get(device.type, MOST_TOKENS["cuda"])))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    from psutil import virtual_memory

    return virtual_memory().available


def _logits_at(
    model: HookedModel, input_ids: Tensor, mask: Tensor, columns: Tensor, **options
) -> Float[Tensor, "batch read d_vocab"]:
    """Logits at `columns` only, where the model can leave the others out."""
    if not len(columns):
        columns = torch.zeros_like(columns, shape=(1,))
    padded = None if bool(mask.all()) else mask
    keeps = _takes(model, "logits_to_keep")
    if keeps:
        options["logits_to_keep"] = columns
    if _takes(model, "use_cache"):
        options["use_cache"] = _cache_name(model) in options
    logits = model(input_ids, attention_mask=padded, return_type="logits", **options)
    return logits if keeps else logits[:, columns]


def _cache_name(model: HookedModel) -> str | None:
    """What its forward calls the cache (transformers 5.24 renamed it); None where it has none."""
    return next((name for name in ("cache", "past_key_values") if _takes(model, name)), None)


def _takes(model: HookedModel, name: str) -> bool:
    return name in signature(model.original_model.forward).parameters


def _kept_by(
    cache: DynamicCache | None, n_layers: int, n_tokens: int
) -> list[KeysAndValues] | None:
    """Keys and values of every layer; None where the cache is not simply that."""
    if cache is None or len(cache.layers) != n_layers:
        return None
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    found: list[Any] = [(layer.keys, layer.values) for layer in cache.layers]
    whole = all(k is not None and k.shape[-2] == n_tokens for k, _ in found)
    return found if whole else None


@contextmanager
def passing_over(model: HookedModel, layer: int, hidden: Tensor) -> Iterator[None]:
    """Blocks before `layer` do nothing, and `hidden` enters it whatever comes."""

    def enter(value: Tensor, hook) -> Tensor:
        return hidden

    entry = model.hook_dict[f"blocks.{layer}.hook_resid_pre"]
    entry.add_hook(enter, prepend=True)
    handle = entry.fwd_hooks[0]
    try:
        with ExitStack() as stack:
            for block in model.blocks[:layer]:
                stack.enter_context(stands_in(block, _hand_on))
            yield
    finally:
        handle.hook.remove()
        entry.fwd_hooks.remove(handle)


@contextmanager
def _last_mlp_at(model: HookedModel, columns: Int[Tensor, " read"]) -> Iterator[None]:
    """The last block's MLP runs at `columns` and gives nothing elsewhere."""
    mlp = model.blocks[-1]._modules.get("mlp")
    points = [] if mlp is None else [m for m in mlp.modules() if isinstance(m, HookPoint)]
    if mlp is None or any(point.has_hooks() for point in points):
        yield
        return
    whole = mlp.forward

    def forward(hidden_states: Tensor, *args, **kwargs) -> Any:
        if any(map(torch.is_tensor, (*args, *kwargs.values()))):  # a residual to add, as in BLOOM
            return whole(hidden_states, *args, **kwargs)
        found = whole(hidden_states[:, columns], *args, **kwargs)
        if not torch.is_tensor(found):  # a router's numbers beside it
            return whole(hidden_states, *args, **kwargs)
        return torch.zeros_like(hidden_states).index_copy(1, columns, found)

    with stands_in(mlp, forward):
        yield


def _hand_on(hidden_states: Tensor, *args, **kwargs) -> Tensor:
    return hidden_states


@contextmanager
def _as_prompt(model: HookedModel, n_tokens: int, told: Prompts | None) -> Iterator[None]:
    """Tokens that are replayed behind a cache are the prompt's, not generated ones."""
    running = model._running
    before = running.generating, running.prompts
    running.generating, running.prompts = n_tokens, told
    try:
        yield
    finally:
        running.generating, running.prompts = before


def _try_out(recording: Recording) -> None:
    """Nothing changed must change nothing: from the middle of the layers, and of the prompt."""
    model, logits = recording.model, recording.logits[:1]
    n_tokens = recording.input_ids.shape[1]
    start = n_tokens // 2 if recording.can_start_late else 0
    try:
        again = recording.replay(recording.n_layers // 2, torch.zeros(1, dtype=torch.long), start)
        apart = float((again - logits).abs().max() / logits.abs().max().clamp_min(1))
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ReplayError(
            f"{model.name} ({model.cfg.architecture}): its blocks can't be continued from "
            f"({type(error).__name__}: {error})."
        ) from error
    if not apart <= TOLERANCE.get(logits.dtype, COARSE):
        raise ReplayError(
            f"{model.name} ({model.cfg.architecture}): a replay without any change differs by "
            f"{apart:.1g} of the largest logit, so its blocks depend on more than what enters them."
        )
