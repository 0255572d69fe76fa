"""Gradients at hooks: one forward and one backward pass, on a prompt or between two of them.

A hook hands the model the very tensor whose gradient is asked for; parameters, frozen or not, get
none. `along_path` takes the mean where its caller asks: at the midpoints of m equal pieces of the
straight line between what two prompts send into the first block,

    e_k = e_start + (k - 1/2) / m * (e_end - e_start),     k = 1 ... m

whose error shrinks with 1 / m^2 (that of the points k / m, k = 0 ... m - 1, which the authors' code
takes, with 1 / m: they hold one end and never the other). The path is that of "EAP-IG inputs",
Hanna, Pezzelle & Belinkov 2024 (arXiv 2403.17806); for integrated gradients themselves see
Sundararajan, Taly & Yan 2017 (arXiv 1703.01365).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import UserError
from interp.model.graph import Graph, Part, input_weights, norm_of, reader_hook, stream_hook
from interp.model.hooked import HookedModel, HookError

ENTRY = "blocks.0.hook_resid_pre"

MetricOfLogits = Callable[[Float[Tensor, "batch d_vocab"]], Float[Tensor, " batch"]]


class GradientError(UserError):
    """Gradients that cannot be had: inference mode, training mode, a metric without any."""


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """A pass: the last token's logits, what hooks saw, and the gradients of the metric there."""

    logits: Float[Tensor, "batch d_vocab"]
    values: dict[str, Any]
    gradients: dict[str, Tensor]


def trace(
    model: HookedModel,
    input_ids: Int[Tensor, "batch token"],
    attention_mask: Int[Tensor, "batch token"],
    names: Sequence[str],
    metric: MetricOfLogits,
    *,
    looks: Sequence[str] = (),
    entering: Float[Tensor, "batch token d_model"] | None = None,
) -> Trace:
    """Values and gradients at the hooks `names`, values alone at `looks`; from the last token.

    `entering` takes the place of what the prompts send into the first block. Rows of a batch are
    independent, so the gradient of the sum is each prompt's own.

    Raises:
        GradientError: Inside `torch.inference_mode()`, a model in training mode, a metric that is
            constant in the logits.
        HookError: A hook that is not there or never fires.
    """
    _check(model)
    model.check_hooks([*names, *looks])
    values: dict[str, Any] = {}

    def enter(value: Tensor, hook) -> Tensor:
        values[ENTRY] = (value if entering is None else entering).detach().requires_grad_()
        return values[ENTRY]

    def hand_over(value: Tensor, hook, name: str) -> Tensor:
        values[name] = value.view_as(value)
        return values[name]

    def look(value: Any, hook, name: str) -> None:
        values[name] = value

    hooks: list[tuple[str, Callable]] = [(ENTRY, enter)]
    hooks += [(name, partial(hand_over, name=name)) for name in names if name != ENTRY]
    hooks += [(name, partial(look, name=name)) for name in looks if name != ENTRY]
    with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        logits = _last_logits(model, input_ids, attention_mask)
        measured = metric(logits)
    silent = [name for name in (*names, *looks) if name not in values]
    if silent:
        raise HookError(f"hooks: {silent[0]} never fired, so it has no gradient.")
    if not measured.requires_grad:
        raise GradientError("metric: does not depend on the logits smoothly; it has no gradient.")
    with torch.enable_grad():  # the sum too: we may be inside torch.no_grad()
        total = measured.sum()
    found = torch.autograd.grad(total, [values[name] for name in names], allow_unused=True)
    gradients = {
        name: torch.zeros_like(values[name]) if gradient is None else gradient
        for name, gradient in zip(names, found)
    }
    plain = {k: v.detach() if torch.is_tensor(v) else v for k, v in values.items()}
    return Trace(logits.detach(), plain, gradients)


def along_path(
    model: HookedModel,
    input_ids: Int[Tensor, "batch token"],
    attention_mask: Int[Tensor, "batch token"],
    names: Sequence[str],
    metric: MetricOfLogits,
    start: Float[Tensor, "batch token d_model"],
    end: Float[Tensor, "batch token d_model"],
    steps: int,
    *,
    looks: Sequence[str] = (),
) -> Iterator[Trace]:
    """A trace at each of `steps` midpoints from `start` to `end`."""
    for step in range(steps):
        entering = torch.lerp(start, end, (step + 0.5) / steps)
        yield trace(model, input_ids, attention_mask, names, metric, looks=looks, entering=entering)


def reader_hooks(graph: Graph, model: HookedModel) -> tuple[list[str], list[str]]:
    """The `names` and `looks` of a trace that `input_gradients` can be made of."""
    names, looks = [f"blocks.{graph.n_layers - 1}.hook_resid_post"], []
    parts: tuple[Part, ...] = ("q", "k", "v", "mlp")
    for layer in range(graph.n_layers):
        names += [reader_hook(model, layer, part) for part in parts]
        looks += sorted({stream_hook(graph, layer, part) for part in parts})
    return names, looks


def input_gradients(
    graph: Graph, model: HookedModel, traced: Trace
) -> Iterator[tuple[slice, Float[Tensor, "reader batch pos d_model"]]]:
    """The gradient in what each reader reads of the residual stream, some readers at a time.

    With G_q[h] the gradient at hook_q, a head's query reads x through q = N(x) W_Q[h] + b, so

        dm/dx = J_N(x)^T (G_q[h] W_Q[h]^T)

    with the transposed Jacobian of the model's own norm N; keys, values and MLPs likewise. What
    follows q (rotation, QK-norm) is behind the hook, and a key-value head's gradient holds that of
    its whole group.
    """
    sizes: dict[Part, int] = {"q": graph.n_heads, "k": graph.n_kv_heads, "v": graph.n_kv_heads}
    for layer in range(graph.n_layers):
        pulled = []
        for part, count in sizes.items():
            weight, _ = input_weights(model, layer, part, count)
            gradient = traced.gradients[reader_hook(model, layer, part)]
            pulled.append(torch.einsum("bphe,hde->hbpd", gradient, weight))
        start = graph.reads(layer, "q").start
        stop = graph.reads(layer, "v").stop
        yield slice(start, stop), _through_norm(graph, model, traced, layer, "q", torch.cat(pulled))
        gradient = traced.gradients[reader_hook(model, layer, "mlp")][None]
        yield graph.reads(layer, "mlp"), _through_norm(graph, model, traced, layer, "mlp", gradient)
    last = traced.gradients[f"blocks.{graph.n_layers - 1}.hook_resid_post"]
    yield slice(len(graph.readers) - 1, len(graph.readers)), last[None]


def _through_norm(
    graph: Graph,
    model: HookedModel,
    traced: Trace,
    layer: int,
    part: Part,
    gradient: Float[Tensor, "reader batch pos d_model"],
) -> Float[Tensor, "reader batch pos d_model"]:
    """Pull gradients behind a norm back to its input, by autograd through the norm itself."""
    stream = traced.values[stream_hook(graph, layer, part)]
    with torch.enable_grad():
        read = stream.expand_as(gradient).detach().requires_grad_()
        normed = norm_of(model, layer, part)(read)
    return torch.autograd.grad(normed, read, gradient)[0]


def _last_logits(
    model: HookedModel, input_ids: Tensor, attention_mask: Tensor
) -> Float[Tensor, "batch d_vocab"]:
    """`HookedModel.last_logits` of one token, with gradients."""
    keep = {}
    if "logits_to_keep" in signature(model.original_model.forward).parameters:
        keep["logits_to_keep"] = 1
    logits = model(input_ids, attention_mask=attention_mask, use_cache=False, **keep)
    return logits[:, -1].float()


def _check(model: HookedModel) -> None:
    if torch.is_inference_mode_enabled():
        raise GradientError(
            "gradients: there are none inside torch.inference_mode(); leave it, or use "
            "torch.no_grad(), inside which this works."
        )
    if model.original_model.training:
        raise GradientError(
            f"{model.name} is in training mode, where dropout makes each pass another one; "
            "call model.eval() first."
        )
    if any(parameter.is_inference() for parameter in model.original_model.parameters()):
        raise GradientError(
            f"{model.name}: was loaded inside torch.inference_mode(), so no gradient passes "
            "through its weights; load it outside."
        )
