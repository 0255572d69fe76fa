"""What every node wrote at the last token, and how the logits of the choices come of it.

At the last token T of a prompt the residual stream is a sum of what the nodes wrote there,

    r = sum over nodes j of c_j        (c_j: a head's z W_O, an MLP's output, embedding, biases)
    logits = W_U N(r) + b_U            (N: the final norm)

Both are checked on every batch against what the model itself has, so that a model of another form
(a norm behind attention as in Gemma-2, factors, caps on the logits) is refused, not misread.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import UserError
from interp.evaluation import token_after
from interp.heads import Head
from interp.model.hooked import Batch, HookedModel
from interp.tasks.prompts import tokenizer_of

# How far sums of nodes may be from what the model itself has, relative to the latter.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
COARSE = 0.05  # half precision


class AttributionError(UserError):
    """A model whose output is no sum over nodes, or prompts whose answer is no choice."""


def node_table(model: HookedModel) -> pd.DataFrame:
    """All nodes in the order in which effects have them: `node, kind, layer, head`."""
    rows: list[tuple[str, str, int | None, int | None]] = [("embed", "embed", None, None)]
    for layer in range(len(model.blocks)):
        sites = _sites(model, layer)
        if "attn.hook_z" in sites:
            heads = range(model.cfg.n_heads)
            rows += [(str(Head(layer, head)), "head", layer, head) for head in heads]
        if "hook_mlp_out" in sites:
            rows.append((f"MLP{layer}", "mlp", layer, None))
    rows.append(("bias", "bias", None, None))
    table = pd.DataFrame(rows, columns=["node", "kind", "layer", "head"])
    return table.astype({"layer": "Int64", "head": "Int64"})


def index_of(table: pd.DataFrame, nodes: Sequence[str]) -> list[int]:
    """The rows of these nodes; raises `AttributionError` with all names for an unknown one."""
    known = {name: index for index, name in enumerate(table["node"])}
    missing = [node for node in nodes if node not in known]
    if missing:
        raise AttributionError(f"nodes: there is no {missing[0]!r}; they are {', '.join(known)}.")
    return [known[node] for node in nodes]


@dataclass(frozen=True, eq=False)
class Choices:
    """The tokens that would say each prompt's choices, in their order, and which one is right."""

    tokens: Int[Tensor, "prompt choice"]
    right: Int[Tensor, " prompt"]

    @classmethod
    def of(cls, model: HookedModel, prompts: Dataset) -> "Choices":
        """Raises `AttributionError` where prompts have no choices, or differ in their number."""
        missing = {"choices", "answer", "text", "input_ids"} - set(prompts.column_names)
        if missing or not len(prompts):
            raise AttributionError(
                f"prompts: {'no column ' + sorted(missing)[0] if missing else 'no rows'}; give "
                "prompts with choices, such as interp.tasks.multiple_choice(model)."
            )
        tokenizer_of(model)
        tokens: list[list[int]] = []
        right: list[int] = []
        rows = prompts.select_columns(["text", "input_ids", "choices", "answer"]).to_list()
        for n, row in enumerate(rows):
            if row["answer"] not in row["choices"]:
                raise AttributionError(
                    f"prompt {n}: the answer {row['answer']!r} is none of its choices "
                    f"{row['choices']}."
                )
            own = [token_after(model, row, choice) for choice in row["choices"]]
            if len(set(own)) < len(own) or len(own) != len(tokens[0] if tokens else own):
                raise AttributionError(
                    f"prompt {n}: its choices {row['choices']} begin with the tokens {own}; every "
                    "prompt needs as many choices, each with a first token of its own."
                )
            tokens.append(own)
            right.append(row["choices"].index(row["answer"]))
        device = model.cfg.device
        return cls(torch.tensor(tokens, device=device), torch.tensor(right, device=device))

    def centred(self, logits: Float[Tensor, "prompt ... choice"]) -> Float[Tensor, "prompt ..."]:
        """The right choice's logit minus the mean over all choices, in float32."""
        logits = logits.float()
        right = self.right.view(-1, *[1] * (logits.dim() - 1)).expand(*logits.shape[:-1], 1)
        return logits.gather(-1, right).squeeze(-1) - logits.mean(-1)


@dataclass(frozen=True, eq=False)
class Readout:
    """From the residual stream to the logits: the final norm and the unembedding, in float32."""

    norm: torch.nn.Module
    gain: Float[Tensor, " d_model"]
    subtracts_mean: bool
    weight: Float[Tensor, "d_vocab d_model"]
    bias: Float[Tensor, " d_vocab"]

    @classmethod
    def of(cls, model: HookedModel) -> "Readout":
        """Raises `AttributionError` where the model has no norm and unembedding at its end."""
        norm = getattr(model, "ln_final", None)
        unembed = model.original_model.get_output_embeddings()
        if norm is None or unembed is None or unembed.weight.shape[1] != model.cfg.d_model:
            raise AttributionError(
                f"{model.name} ({model.cfg.architecture}): has no final norm and unembedding of "
                "its residual stream; total_effect(model, pairs) needs none."
            )
        gain = norm.weight.float() + (1.0 if norm.uses_weight_offset else 0.0)
        weight, bias = unembed.weight, getattr(unembed, "bias", None)
        bias = torch.zeros(len(weight), device=weight.device) if bias is None else bias.float()
        own = deepcopy(norm.original_component).float()
        return cls(own, gain, not norm.uses_rms_norm, weight, bias)

    def __call__(
        self, resid: Float[Tensor, "prompt node d_model"], tokens: Int[Tensor, "prompt choice"]
    ) -> Float[Tensor, "prompt node choice"]:
        """The logits of `tokens` that a residual stream would give."""
        rows = self.weight[tokens].float()
        return torch.einsum("bnm,bcm->bnc", self.norm(resid), rows) + self.bias[tokens][:, None]

    def constant(self, tokens: Int[Tensor, "prompt choice"]) -> Float[Tensor, "prompt choice"]:
        """The part of the logits that no node brings: the norm's bias and the unembedding's."""
        zero = torch.zeros(len(tokens), 1, self.weight.shape[1], device=tokens.device)
        return self(zero, tokens)[:, 0]

    def direction(self, choices: Choices) -> Float[Tensor, "prompt d_model"]:
        """What a normed residual is multiplied with to give the centred answer logit."""
        rows = self.weight[choices.tokens].float().transpose(1, 2)
        return choices.centred(rows) * self.gain

    def centred(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """`x` as the norm sees it: LayerNorm takes off the mean over d_model."""
        return x - x.mean(-1, keepdim=True) if self.subtracts_mean else x


@dataclass(frozen=True, eq=False)
class Written:
    """What each node of `node_table` wrote at the last token of each prompt, float32."""

    nodes: Float[Tensor, "prompt node d_model"]
    resid: Float[Tensor, "prompt d_model"]
    scale: Float[Tensor, "prompt 1"]
    logits: Float[Tensor, "prompt d_vocab"]

    @classmethod
    @torch.no_grad()
    def by(
        cls, model: HookedModel, batch: Batch, hooks: Sequence[tuple[str, Callable]] = ()
    ) -> "Written":
        """Run the model once. Raises `AttributionError` where the stream is no sum over nodes."""
        found: dict[str, Tensor] = {}

        def keep(value: Tensor, hook, name: str) -> None:
            found[name] = value[:, -1].float()

        names = ["ln_final.hook_scale"]
        for layer in range(len(model.blocks)):
            ends = ("hook_resid_pre", "hook_resid_post", *_sites(model, layer))
            names += [f"blocks.{layer}.{end}" for end in ends]
        reading = [(name, partial(keep, name=name)) for name in names]
        with model.hooks(fwd_hooks=[*hooks, *reading]):  # what hooks change is read as changed
            logits = model.last_logits(batch.input_ids, batch.attention_mask, 1)[:, -1]
        nodes = [found["blocks.0.hook_resid_pre"][:, None]]
        bias = torch.zeros_like(nodes[0])
        for layer in range(len(model.blocks)):
            own, constant = _layer(model, layer, found)
            before, after = (
                found[f"blocks.{layer}.hook_resid_{end}"][:, None] for end in ("pre", "post")
            )
            _check_layer(model, layer, before + own.sum(1, keepdim=True) + constant, after)
            nodes.append(own)
            bias = bias + constant
        return cls(torch.cat([*nodes, bias], 1), after[:, 0], found["ln_final.hook_scale"], logits)


def _sites(model: HookedModel, layer: int) -> list[str]:
    sites = ("attn.hook_z", "hook_mlp_out")
    return [site for site in sites if f"blocks.{layer}.{site}" in model.hook_dict]


def _layer(
    model: HookedModel, layer: int, found: dict[str, Tensor]
) -> tuple[Float[Tensor, "prompt node d_model"], Float[Tensor, "1 1 d_model"]]:
    """What a layer's heads and MLP wrote, and the bias behind its heads."""
    parts, sites = [], _sites(model, layer)
    bias = torch.zeros_like(found["blocks.0.hook_resid_pre"])[:1, None]
    if "attn.hook_z" in sites:
        attn = model.blocks[layer].attn
        z = found[f"blocks.{layer}.attn.hook_z"]
        parts.append(torch.einsum("bhd,hdm->bhm", z, attn.W_O.float()))
        if attn.b_O is not None:
            bias = bias + attn.b_O.float()
    if "hook_mlp_out" in sites:
        parts.append(found[f"blocks.{layer}.hook_mlp_out"][:, None])
    return torch.cat(parts, 1) if parts else bias[:, :0], bias


def _check_layer(model: HookedModel, layer: int, added: Tensor, resid: Tensor) -> None:
    apart = float((added - resid).abs().max() / resid.abs().max().clamp_min(1e-6))
    if not apart <= _tolerance(model):
        raise AttributionError(
            f"{model.name} ({model.cfg.architecture}): what heads and MLP of layer {layer} write "
            f"is not what the residual stream gains (off by {apart:.1g} of it), because a norm or "
            "a factor stands between them; so heads have no direct effect of their own. "
            "total_effect(model, pairs) works."
        )


def check_sum(model: HookedModel, found: Tensor, metric: Tensor, largest: Tensor) -> None:
    """Raises `AttributionError` where `found` is not the `metric` that the model itself has."""
    apart = float((found - metric).abs().max() / largest.clamp_min(1))
    if not apart <= _tolerance(model):
        raise AttributionError(
            f"{model.name} ({model.cfg.architecture}): its logits are not the unembedding of the "
            f"normed residual stream (off by {apart:.1g} of the largest; a cap or a factor on the "
            "logits?), so they are no sum over nodes. total_effect(model, pairs) works."
        )


def _tolerance(model: HookedModel) -> float:
    return TOLERANCE.get(next(model.original_model.parameters()).dtype, COARSE)
