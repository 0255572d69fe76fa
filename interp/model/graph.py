"""The residual graph: who writes into the residual stream, and who reads what was written before.

Writers are the embedding (all that enters the first block), each head, z[h] W_O[h], and each MLP.
Readers are the query of each head, the key and the value of each *key-value* head, each MLP, and
the logits, which read the last residual stream. An edge goes from a writer to a reader that comes
after it; in a parallel block the MLP does not read its own layer's heads. With L layers, H heads
and K key-value heads in serial blocks these are

    sum over l of (H + 2K)(1 + l(H + 1)) + (1 + l(H + 1) + H),   plus 1 + L(H + 1)

edges (32,491 in GPT-2 small). A bias of the output projection belongs to no writer: it is the same
in every run. Names: `embed`, `L0H3`, `MLP1` write; `L1H5.q`, `L1H2.k`, `L1H2.v`, `MLP1`, `logits`
read, and the number in `.k` and `.v` is that of the key-value head.

Sources: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Conmy et al. 2023
(arXiv 2304.14997) for edges to q, k and v. Neither has grouped-query attention: that k and v edges
end at key-value heads is ours (an edge per query head would not be a place in the model).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interp.errors import UserError
from interp.model.hooked import HookedModel
from interp.model.replay import COARSE, TOLERANCE

Part = Literal["q", "k", "v", "mlp"]
Edge = tuple[str, str]


class GraphError(UserError):
    """A model without such a graph, or an edge that is not in it."""


@dataclass(frozen=True)
class Graph:
    """Writers and readers in the order in which they come: a reader sees the first `n_seen`."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool = False

    @classmethod
    def of(cls, model: HookedModel) -> "Graph":
        """The graph of a model, tried out on a short random prompt.

        Raises `GraphError` where the residual stream is not the sum of what heads and MLPs write,
        or they read something else than a norm of it (norms after attention, scaled residuals,
        shared blocks, encoder-decoders, BERT, ViT).
        """
        reason = _no_graph(model)
        if reason is not None:
            raise GraphError(f"{_name(model)} has no graph of edges: {reason}.")
        n_heads = model.cfg.n_heads
        n_kv_heads = getattr(model.cfg, "n_key_value_heads", None) or n_heads
        parallel = "blocks.0.hook_resid_mid" not in model.hook_dict
        graph = cls(len(model.blocks), n_heads, n_kv_heads, parallel)
        _try_out(model, graph)
        return graph

    @cached_property
    def writers(self) -> list[str]:
        names = ["embed"]
        for layer in range(self.n_layers):
            names += [f"L{layer}H{head}" for head in range(self.n_heads)] + [f"MLP{layer}"]
        return names

    @cached_property
    def readers(self) -> list[str]:
        names = []
        for layer in range(self.n_layers):
            for part, count in self._sizes.items():
                heads = [f"L{layer}H{head}.{part}" for head in range(count)]
                names += heads if part != "mlp" else [f"MLP{layer}"]
        return [*names, "logits"]

    @cached_property
    def possible(self) -> Bool[Tensor, "reader writer"]:
        """Which edges there are."""
        return torch.arange(len(self.writers)) < torch.tensor(self.n_seen)[:, None]

    @cached_property
    def edges(self) -> list[Edge]:
        """All edges, by reader, then by writer."""
        return self.edges_of(self.possible)

    @property
    def n_edges(self) -> int:
        return sum(self.n_seen)

    @property
    def n_layer_readers(self) -> int:
        """Readers in one layer."""
        return sum(self._sizes.values())

    @cached_property
    def n_seen(self) -> list[int]:
        """How many writers each reader sees; these are the first so many."""
        counts = []
        for layer in range(self.n_layers):
            before = self.n_before(layer)
            counts += [before] * (self.n_layer_readers - 1)
            counts.append(before if self.parallel else before + self.n_heads)
        return [*counts, self.n_before(self.n_layers)]

    def reads(self, layer: int, part: Part) -> slice:
        """The readers of one layer and kind."""
        start = layer * self.n_layer_readers
        for name, count in self._sizes.items():
            if name == part:
                break
            start += count
        return slice(start, start + self._sizes[part])

    def heads_write(self, layer: int) -> slice:
        """The writers that are heads of one layer; its MLP is the one after them."""
        start = self.n_before(layer)
        return slice(start, start + self.n_heads)

    def n_before(self, layer: int) -> int:
        """How many writers come before a layer."""
        return 1 + layer * (self.n_heads + 1)

    def mask(self, edges: Iterable[Edge]) -> Bool[Tensor, "reader writer"]:
        """`edges` as a matrix. Raises `GraphError`, with the nearest names, where one is none."""
        found = torch.zeros_like(self.possible)
        writers = {name: index for index, name in enumerate(self.writers)}
        readers = {name: index for index, name in enumerate(self.readers)}
        for writer, reader in edges:
            for name, known, kind in ((writer, writers, "writer"), (reader, readers, "reader")):
                if name not in known:
                    near = ", ".join(get_close_matches(name, known, n=3, cutoff=0))
                    raise GraphError(f"edges: no {kind} is called {name!r}; the nearest: {near}.")
            found[readers[reader], writers[writer]] = True
        wrong = self.edges_of(found & ~self.possible)
        if wrong:
            raise GraphError(f"edges: {wrong[0][1]} comes before {wrong[0][0]} and can't read it.")
        return found

    def edges_of(self, mask: Bool[Tensor, "reader writer"]) -> list[Edge]:
        """The edges in a matrix, by reader, then by writer."""
        return [(self.writers[w], self.readers[r]) for r, w in mask.nonzero().tolist()]

    def live(self, kept: Bool[Tensor, "reader writer"]) -> Bool[Tensor, "reader writer"]:
        """Those of `kept` that lie on a path of kept edges from the embedding to the logits."""
        return kept & self.heard(kept)[:, None] & self._fed(kept)

    def heard(self, kept: Bool[Tensor, "reader writer"]) -> Bool[Tensor, " reader"]:
        """Readers from which a path of `kept` edges leads on to the logits."""
        heard = torch.zeros(len(self.readers), dtype=torch.bool)
        heard[-1] = True
        for layer in reversed(range(self.n_layers)):
            writes = self.heads_write(layer)
            # the MLP first: it may read this layer's heads
            heard[self.reads(layer, "mlp")] = kept[heard, writes.stop].any()
            heads = kept[heard, writes].any(0)
            groups = heads.view(self.n_kv_heads, -1).any(1)
            heard[self.reads(layer, "q")] = heads
            heard[self.reads(layer, "k")] = heard[self.reads(layer, "v")] = groups
        return heard

    def _fed(self, kept: Bool[Tensor, "reader writer"]) -> Bool[Tensor, " writer"]:
        """Writers to which a path of `kept` edges leads from the embedding."""
        fed = torch.zeros(len(self.writers), dtype=torch.bool)
        fed[0] = True
        group = self.n_heads // self.n_kv_heads
        for layer in range(self.n_layers):
            reads = {part: (kept[self.reads(layer, part)] & fed).any(1) for part in ("q", "k", "v")}
            keys_values = (reads["k"] | reads["v"]).repeat_interleave(group)
            writes = self.heads_write(layer)
            fed[writes] = reads["q"] | keys_values
            fed[writes.stop] = (kept[self.reads(layer, "mlp")] & fed).any()
        return fed

    @cached_property
    def _sizes(self) -> dict[Part, int]:
        return {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads, "mlp": 1}


# Where a model has what the graph speaks of.


def stream_hook(graph: Graph, layer: int, part: Part) -> str:
    """The hook that shows the residual stream which readers of that kind read."""
    mid = part == "mlp" and not graph.parallel
    return f"blocks.{layer}.hook_resid_{'mid' if mid else 'pre'}"


def reader_hook(model: HookedModel, layer: int, part: Part) -> str:
    """The hook whose value is what a reader makes of the stream: q, k, v, or the MLP's input."""
    if part != "mlp":
        return f"blocks.{layer}.attn.hook_{part}"
    shared_norm = "ln2" not in model.blocks[layer]._modules
    return f"blocks.{layer}.{'mlp.hook_in' if shared_norm else 'ln2.hook_out'}"


def norm_of(model: HookedModel, layer: int, part: Part) -> nn.Module:
    """The norm between the residual stream and a reader, without its hooks (`hook_scale` ...)."""
    norms = model.blocks[layer]._modules
    name = "ln2" if part == "mlp" and "ln2" in norms else "ln1"
    return norms[name].original_component


def input_weights(
    model: HookedModel, layer: int, part: Part, n_heads: int
) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head"]]:
    """W and b of q, k or v, by heads, from the weights that the model itself uses."""
    attn = model.blocks[layer].attn
    fused = attn._modules.get("qkv")
    weight, bias = _weight_and_bias((fused or attn._modules[part]).original_component)
    if fused is not None:
        columns = attn._qkv_columns[part].to(weight.device)
        weight, bias = weight[:, columns], bias[columns]
    return weight.unflatten(1, (n_heads, -1)).transpose(0, 1), bias.unflatten(0, (n_heads, -1))


def output_weights(
    model: HookedModel, layer: int, n_heads: int
) -> tuple[Float[Tensor, "head d_head d_model"], Float[Tensor, " d_model"]]:
    """W_O by heads, and its bias, which belongs to no head."""
    weight, bias = _weight_and_bias(model.blocks[layer].attn.o.original_component)
    return weight.unflatten(0, (n_heads, -1)), bias


def read_by_heads(
    model: HookedModel,
    layer: int,
    part: Part,
    streams: Float[Tensor, "... head batch pos d_model"],
    heads: Tensor,
    n_heads: int,
) -> Float[Tensor, "... batch pos head d_head"]:
    """q, k or v of some heads, each of which reads a residual stream of its own."""
    weight, bias = input_weights(model, layer, part, n_heads)
    normed = norm_of(model, layer, part)(streams)
    return torch.einsum("...hbpd,hde->...bphe", normed, weight[heads]) + bias[heads]


def _weight_and_bias(
    module: nn.Module,
) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
    if not isinstance(module, nn.Linear | Conv1D):
        raise GraphError(f"{type(module).__name__}: a projection of another kind than a matrix.")
    weight = module.weight.detach()
    weight = weight if isinstance(module, Conv1D) else weight.T
    bias = module.bias
    return weight, weight.new_zeros(weight.shape[1]) if bias is None else bias.detach()


# Whether a model is such a graph.


def _no_graph(model: HookedModel) -> str | None:
    """Why not, where the architecture tells; else None."""
    config = model.original_model.config
    if getattr(config, "is_encoder_decoder", False) or "blocks" not in model._modules:
        return "it is no plain decoder (an encoder-decoder, or without blocks)"
    if model.original_model.main_input_name != "input_ids":
        return f"it reads {model.original_model.main_input_name}, not tokens"
    modules = [block._modules for block in model.blocks]
    if len({id(m["_original_component"]) for m in modules}) < len(modules):
        return "its layers share one block"
    for layer, own in enumerate(modules):
        if "attn" not in own or "mlp" not in own:
            missing = "attention" if "attn" not in own else "MLP"
            return f"layer {layer} has no {missing} of the usual form"
        if "ln1_post" in own or "ln2_post" in own:
            return f"layer {layer} has norms after attention or MLP: heads do not add up"
        if "ln1" not in own:
            return f"layer {layer} has no norm before attention"
    return None


@torch.no_grad()
def _try_out(model: HookedModel, graph: Graph) -> None:
    """On six tokens: does every reader read, and every writer write, what the graph says?"""
    # low numbers: placeholders of images are mostly among the last
    ids = torch.randint(3, 3 + min(40, model.cfg.d_vocab - 4), (2, 6), generator=_generator())
    values: dict[str, Tensor] = {}

    def keep(value: Tensor, hook, name: str) -> None:
        values[name] = value

    names = {f"blocks.{graph.n_layers - 1}.hook_resid_post"}
    for layer in range(graph.n_layers):
        names |= {f"blocks.{layer}.hook_{name}" for name in ("resid_pre", "mlp_out")}
        names.add(f"blocks.{layer}.attn.hook_z")
        for part in get_args(Part):
            names |= {reader_hook(model, layer, part), stream_hook(graph, layer, part)}
    hooks: list[tuple[str, Callable]] = [
        (name, lambda value, hook, name=name: keep(value, hook, name)) for name in names
    ]
    try:
        with model.hooks(fwd_hooks=hooks):
            model.run(ids.to(model.cfg.device))
        for what, there, expected in _comparisons(model, graph, values):
            apart = float((there - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
            if not apart <= TOLERANCE.get(there.dtype, COARSE):
                cause = "an intervention" if model.interventions else "a norm or a factor"
                raise GraphError(
                    f"{_name(model)} has no graph of edges: {what} is off by {apart:.1g} of its "
                    f"largest value ({cause} where such a graph has none?)."
                )
    except GraphError:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise GraphError(
            f"{_name(model)} has no graph of edges: its heads and MLPs are not where it needs them "
            f"({type(error).__name__}: {str(error).splitlines()[0]})."
        ) from error


def _comparisons(
    model: HookedModel, graph: Graph, values: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What the model has, and what the graph expects there."""
    for layer in range(graph.n_layers):
        sizes: dict[Part, int] = {"q": graph.n_heads, "k": graph.n_kv_heads, "v": graph.n_kv_heads}
        for part, count in sizes.items():
            stream = values[stream_hook(graph, layer, part)]
            streams = stream.expand(count, *stream.shape)
            expected = read_by_heads(model, layer, part, streams, torch.arange(count), count)
            yield f"{part} of layer {layer}", values[reader_hook(model, layer, part)], expected
        before = values[f"blocks.{layer}.hook_resid_pre"]
        weight, bias = output_weights(model, layer, graph.n_heads)
        z = values[f"blocks.{layer}.attn.hook_z"]
        middle = before + torch.einsum("bphe,hed->bpd", z, weight) + bias
        if not graph.parallel:
            name = stream_hook(graph, layer, "mlp")
            yield f"the sum of heads in layer {layer}", values[name], middle
        read = norm_of(model, layer, "mlp")(values[stream_hook(graph, layer, "mlp")])
        yield f"the input of MLP {layer}", values[reader_hook(model, layer, "mlp")], read
        last = layer == graph.n_layers - 1
        after = f"blocks.{layer}.hook_resid_post" if last else f"blocks.{layer + 1}.hook_resid_pre"
        written = values[f"blocks.{layer}.hook_mlp_out"].reshape_as(middle)
        yield f"the sum of what layer {layer} writes", values[after], middle + written


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _name(model: HookedModel) -> str:
    return f"{model.name} ({model.cfg.architecture})"
