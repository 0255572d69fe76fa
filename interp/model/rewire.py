"""Run a model with chosen edges of its residual graph carrying what they carry in another run.

A reader v sees the sum of what all writers before it wrote. With the edges in A ablated it sees

    x_v = resid + sum over u with (u, v) in A of (source_u - now_u)

where source_u is what u wrote in the other run and now_u what it writes in this one, itself perhaps
changed by ablated edges further down. Any set of edges costs one forward pass, and several sets are
stacked in the batch: heads whose q, k or v reads another sum than the stream get theirs from the
norm of that sum, at `hook_q`, `hook_k`, `hook_v`; an MLP at the hook of its input. Blocks before
the first ablated edge are passed over (see `interp.model.replay`), and so are the positions before
the first where the runs differ.

The idea of one pass for any edge set is that of AutoCircuit: Miller, Chughtai & Saunders 2024
(arXiv 2407.08734). Here head writes are kept as differences in the stream, q, k and v are rebuilt
only where an edge of theirs is ablated, and k and v are those of key-value heads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.model.graph import (
    Graph,
    GraphError,
    Part,
    norm_of,
    output_weights,
    read_by_heads,
    reader_hook,
    stream_hook,
)
from interp.model.hooked import HookedModel
from interp.model.replay import COPIES_PER_TOKEN, Recording, record, tokens_at_once

Writes = Float[Tensor, "writer batch pos d_model"]


def writes_of(
    model: HookedModel,
    graph: Graph,
    input_ids: Int[Tensor, "batch token"],
    attention_mask: Int[Tensor, "batch token"],
) -> tuple[Writes, Float[Tensor, "batch d_vocab"]]:
    """What every writer adds to the residual stream, and the last token's logits; one pass."""
    values, hooks = _keeping(graph)
    with model.hooks(fwd_hooks=hooks):
        logits = model.last_logits(input_ids, attention_mask, 1)[:, -1]
    return writes_at(model, graph, values), logits


def write_hooks(graph: Graph) -> list[str]:
    """The hooks whose values `writes_at` needs."""
    names = ["blocks.0.hook_resid_pre"]
    for layer in range(graph.n_layers):
        names += [f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out"]
    return names


@torch.no_grad()
def writes_at(model: HookedModel, graph: Graph, values: Mapping[str, Tensor]) -> Writes:
    """What every writer adds to the residual stream, from what `write_hooks` saw."""
    entered = values["blocks.0.hook_resid_pre"]
    found = [entered[None]]
    for layer in range(graph.n_layers):
        weight, _ = output_weights(model, layer, graph.n_heads)
        z = values[f"blocks.{layer}.attn.hook_z"]
        found.append(torch.einsum("bphe,hed->hbpd", z, weight))
        found.append(values[f"blocks.{layer}.hook_mlp_out"].reshape(1, *entered.shape))
    return torch.cat(found)


@dataclass(frozen=True, eq=False, repr=False)
class Rewiring:
    """A recorded run, and what its edges carry when they are ablated: `source`.

    Before the column `start` the two are the same.
    """

    model: HookedModel
    graph: Graph
    recording: Recording
    source: Writes
    difference: Writes
    start: int

    @classmethod
    def of(
        cls,
        model: HookedModel,
        graph: Graph,
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Int[Tensor, "batch token"],
        source: Float[Tensor, "writer ... d_model"],
        start: int = 0,
    ) -> "Rewiring":
        """Record the run of `input_ids`. `source` may be the same for all prompts and positions.

        Raises `ReplayError` for a model that cannot be replayed, or is in training mode.
        """
        values, hooks = _keeping(graph)
        with model.hooks(fwd_hooks=hooks):
            recording = record(model, input_ids, attention_mask)
        writes = writes_at(model, graph, values)
        # padding takes no part
        source = torch.where(attention_mask.bool()[..., None], source.to(writes), writes)
        start = start if recording.can_start_late else 0
        return cls(model, graph, recording, source, source - writes, start)

    @property
    def logits(self) -> Float[Tensor, "batch d_vocab"]:
        """With no edge ablated, at the last token."""
        return self.recording.logits[:, -1].float()

    def circuits_at_once(self, n_readers: int, n_writers: int) -> int:
        """How many edge sets to stack in one pass: as fast as can be, within the memory there is.

        `n_readers` is how many of a layer see an ablated edge, `n_writers` how many writers in
        blocks that are run have one.
        """
        n_prompts, n_tokens = self.recording.input_ids.shape
        copies = COPIES_PER_TOKEN + 4 * n_readers + n_writers
        tokens = tokens_at_once(self.model) * COPIES_PER_TOKEN // copies
        return max(1, tokens // (n_prompts * (n_tokens - self.start)))

    @torch.no_grad()
    def run(
        self, ablated: Bool[Tensor, "circuit reader writer"]
    ) -> Float[Tensor, "circuit batch d_vocab"]:
        """The last token's logits under each set of ablated edges. One pass for all of them."""
        device = self.source.device
        if bool((ablated & ~self.graph.possible.to(ablated.device)).any()):
            raise GraphError("ablated: some of these edges are not in the graph.")
        n_circuits, n_prompts = len(ablated), self.source.shape[1]
        touched = ablated.any(2).any(0).nonzero().flatten()
        if not len(touched):
            return self.logits.expand(n_circuits, -1, -1)
        layer = min(int(touched[0]) // self.graph.n_layer_readers, self.graph.n_layers - 1)
        running = _Pass(self, ablated.to(device), layer)
        rows = torch.arange(n_prompts).repeat(n_circuits)
        with self.model.hooks(fwd_hooks=running.hooks()):
            logits = self.recording.replay(layer, rows, self.start)[:, -1]
        return logits.float().unflatten(0, (n_circuits, n_prompts))


# repr=False: TransformerLens asks a hook that is no plain function for it, tensors and all
@dataclass(eq=False, repr=False)
class _Pass:
    """One pass over stacked edge sets, from block `first` on: what has been written so far."""

    rewiring: Rewiring
    ablated: Bool[Tensor, "circuit reader writer"]
    first: int
    stream: Tensor = field(default_factory=lambda: torch.empty(0))
    # (source - now) of the writers so far, with positions and d_model as one axis behind prompts:
    # [writer numbers] where all circuits agree, else [circuit writer numbers]
    changes: list[tuple[slice, Tensor]] = field(default_factory=list)

    def __post_init__(self):
        before = slice(0, self.graph.n_before(self.first))
        if self._used(before):
            known = self.rewiring.difference[before, :, self.rewiring.start :]
            self.changes.append((before, known.flatten(1)))

    @property
    def graph(self) -> Graph:
        return self.rewiring.graph

    def hooks(self) -> list[tuple[str, Callable]]:
        """Readers where an edge of theirs is ablated, writers where an edge of theirs is."""
        graph, model, hooks = self.graph, self.rewiring.model, []
        parts: tuple[Part, ...] = ("q", "k", "v", "mlp")
        for layer in range(self.first, graph.n_layers):
            for name in sorted({stream_hook(graph, layer, part) for part in parts}):
                hooks.append((name, self._keep_stream))
            for part in parts:
                if self._active(graph.reads(layer, part)) is None:
                    continue
                read = self._set_mlp if part == "mlp" else partial(self._set_heads, part=part)
                hooks.append((reader_hook(model, layer, part), partial(read, layer=layer)))
            heads = graph.heads_write(layer)
            if self._used(heads):
                add = partial(self._add_heads, layer=layer)
                hooks.append((f"blocks.{layer}.attn.hook_z", add))
            if self._used(slice(heads.stop, heads.stop + 1)):
                add = partial(self._add_mlp, writer=heads.stop)
                hooks.append((f"blocks.{layer}.hook_mlp_out", add))
        if self._active(slice(-1, None)) is not None:
            hooks.append((f"blocks.{graph.n_layers - 1}.hook_resid_post", self._set_last))
        return hooks

    def _used(self, writers: slice) -> bool:
        return bool(self.ablated[:, :, writers].any())

    def _active(self, readers: slice) -> Int[Tensor, " active"] | None:
        """Which of these readers any circuit ablates an edge of; None: none of them."""
        active = self.ablated[:, readers].any(2).any(0).nonzero().flatten()
        return active if len(active) else None

    def _keep_stream(self, value: Tensor, hook) -> None:
        self.stream = value

    def _streams(
        self, readers: slice, active: Int[Tensor, " active"]
    ) -> Float[Tensor, "circuit active batch pos d_model"]:
        """What each of these readers reads."""
        ablated = self.ablated[:, readers][:, active]
        stream = self.stream.unflatten(0, (len(ablated), -1))[:, None]
        total = torch.zeros((), dtype=stream.dtype, device=stream.device)
        for writers, change in self.changes:
            chosen = ablated[:, :, writers]
            if bool(chosen.any()):
                total = total + chosen.to(change.dtype) @ change
        if total.dim():
            total = total.unflatten(2, stream.shape[2:])
        return stream + total

    def _set_heads(self, value: Tensor, hook, layer: int, part: Part) -> Tensor:
        readers = self.graph.reads(layer, part)
        active = self._active(readers)
        assert active is not None
        streams, model = self._streams(readers, active), self.rewiring.model
        count = readers.stop - readers.start
        made = read_by_heads(model, layer, part, streams, active, count).flatten(0, 1)
        return value.index_copy(2, active, made.to(value.dtype))

    def _set_mlp(self, value: Tensor, hook, layer: int) -> Tensor:
        readers = self.graph.reads(layer, "mlp")
        streams = self._streams(readers, torch.zeros(1, dtype=torch.long, device=value.device))
        normed = norm_of(self.rewiring.model, layer, "mlp")(streams)
        return normed.squeeze(1).reshape(value.shape).to(value.dtype)

    def _set_last(self, value: Tensor, hook) -> Tensor:
        self.stream = value
        one = torch.zeros(1, dtype=torch.long, device=value.device)
        return self._streams(slice(-1, None), one).reshape(value.shape)

    def _add_heads(self, z: Tensor, hook, layer: int) -> None:
        weight, _ = output_weights(self.rewiring.model, layer, self.graph.n_heads)
        written = torch.einsum("bphe,hed->hbpd", z, weight)
        self._add(self.graph.heads_write(layer), written)

    def _add_mlp(self, value: Tensor, hook, writer: int) -> None:
        self._add(slice(writer, writer + 1), value.reshape(1, *self.stream.shape))

    def _add(self, writers: slice, written: Float[Tensor, "writer row pos d_model"]) -> None:
        now = written.unflatten(1, (len(self.ablated), -1)).transpose(0, 1)
        source = self.rewiring.source[writers, :, self.rewiring.start :]
        self.changes.append((writers, (source - now).flatten(2)))


def _keeping(graph: Graph) -> tuple[dict[str, Tensor], list[tuple[str, Callable]]]:
    """Hooks that keep what writers write, and where they keep it."""
    values: dict[str, Tensor] = {}

    def keep(value: Tensor, hook, name: str) -> None:
        # the first time only: a recording is followed by a replay that tries it out
        values.setdefault(name, value)

    return values, [(name, partial(keep, name=name)) for name in write_hooks(graph)]
