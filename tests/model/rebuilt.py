"""A model's forward pass from the definition of its residual graph: slow, and obvious.

Every reader gets an input of its own, made by the caller from all that was written before it. Heads
are run one after the other through the wrapped layers of plain transformers: whole projections, of
which one head's slice is kept. No hook, no bridge, nothing of interp.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tests.tiny import eager

Written = dict[str, Tensor]


@dataclass
class Layout:
    """Where a family has its layers, and what they are called."""

    layers: str
    final: str
    norm1: str
    attn: str
    norm2: str
    out: str
    fused: str | None = None
    parallel: bool = False


LLAMA = Layout(
    layers="model.layers",
    final="model.norm",
    norm1="input_layernorm",
    attn="self_attn",
    norm2="post_attention_layernorm",
    out="o_proj",
)
GPT2 = Layout(
    layers="transformer.h",
    final="transformer.ln_f",
    norm1="ln_1",
    attn="attn",
    norm2="ln_2",
    out="c_proj",
    fused="c_attn",
)
LAYOUTS = {
    "gpt2": GPT2,
    "gpt_neox": Layout(
        layers="gpt_neox.layers",
        final="gpt_neox.final_layer_norm",
        norm1="input_layernorm",
        attn="attention",
        norm2="post_attention_layernorm",
        out="dense",
        fused="query_key_value",
        parallel=True,
    ),
    # one norm for both halves of a block
    "gptj": replace(GPT2, norm2="ln_1", out="out_proj", fused=None, parallel=True),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen3": LLAMA,
}
FAMILIES = sorted(LAYOUTS)


class Given(nn.Module):
    """In the place of a projection: what it shall give."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value

    def forward(self, *args):
        return self.value


class Rebuilt:
    """`run(sees)`: `sees(reader, written)` says what a reader reads, given all written so far.

    `written` holds biases of output projections as `bias0` ...: they belong to no writer. `run`
    gives the last token's logits and everything written.
    """

    def __init__(self, family: str, ids: Tensor, mask: Tensor, dtype=torch.float32):
        self.model = eager(family) if dtype == torch.float32 else eager(family).to(dtype)
        self.layout = LAYOUTS[family]
        config = self.model.config
        self.n_heads = config.num_attention_heads
        self.n_kv_heads = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.layers = list(self.model.get_submodule(self.layout.layers))
        self.calls, self.embedded = [], None
        attns = [self._part(layer, "attn") for layer in self.layers]
        handles = [x.register_forward_pre_hook(self._call, with_kwargs=True) for x in attns]
        handles.append(self.layers[0].register_forward_pre_hook(self._entry, with_kwargs=True))
        options = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0), "use_cache": False}
        with torch.no_grad():
            self.plain = self.model(ids, attention_mask=mask, **options).logits[:, -1]
        for handle in handles:
            handle.remove()

    def run(
        self, sees: Callable[[str, Written], Tensor], embed: Tensor | None = None
    ) -> tuple[Tensor, Written]:
        written = {"embed": self.embedded if embed is None else embed}
        for number, layer in enumerate(self.layers):
            before = dict(written)
            written |= self._heads(number, layer, sees, dict(written))
            seen = before if self.layout.parallel else written
            read = self._part(layer, "norm2")(sees(f"MLP{number}", dict(seen)))
            written[f"MLP{number}"] = layer.mlp(read)
        final = self.model.get_submodule(self.layout.final)(sees("logits", dict(written)))
        return self.model.get_output_embeddings()(final)[:, -1], written

    def _heads(self, number: int, layer: nn.Module, sees, written: Written) -> Written:
        attn, norm = self._part(layer, "attn"), self._part(layer, "norm1")
        parts = {}
        for part in "qkv":
            count = self.n_heads if part == "q" else self.n_kv_heads
            parts[part] = [
                self._project(attn, part, head, norm(sees(f"L{number}H{head}.{part}", written)))
                for head in range(count)
            ]
        with self._given(attn, parts):
            args, kwargs = self.calls[number]
            z = attn(*args, **kwargs)[0]
        out = attn.get_submodule(self.layout.out)
        weight = out.weight if self.layout.out == "c_proj" else out.weight.T
        found = {}
        for head in range(self.n_heads):
            size = z.shape[-1] // self.n_heads
            own = slice(head * size, (head + 1) * size)
            found[f"L{number}H{head}"] = z[..., own] @ weight[own]
        if out.bias is not None:
            found[f"bias{number}"] = out.bias.expand_as(written["embed"])
        return found

    def _project(self, attn: nn.Module, part: str, head: int, read: Tensor) -> Tensor:
        """One head's q, k or v, by the whole projection."""
        if self.layout.fused is None:
            whole = attn.get_submodule(f"{part}_proj")(read)
            count = self.n_heads if part == "q" else self.n_kv_heads
            return whole.chunk(count, -1)[head]
        whole = attn.get_submodule(self.layout.fused)(read)
        index = "qkv".index(part)
        if self.layout.parallel:  # GPT-NeoX: q, k, v of each head side by side
            return whole.chunk(self.n_heads, -1)[head].chunk(3, -1)[index]
        return whole.chunk(3, -1)[index].chunk(self.n_heads, -1)[head]

    @contextmanager
    def _given(self, attn: nn.Module, parts: dict[str, list[Tensor]]):
        names = {f"{part}_proj": torch.cat(heads, -1) for part, heads in parts.items()}
        if self.layout.fused is not None:
            every = list(names.values())
            if self.layout.parallel:
                every = [x for heads in zip(*parts.values()) for x in heads]
            names = {self.layout.fused: torch.cat(every, -1)}
        new = {name: Given(value) for name, value in names.items()}
        new[self.layout.out] = nn.Identity()
        old = {name: attn._modules[name] for name in new}
        attn._modules.update(new)
        try:
            yield
        finally:
            attn._modules.update(old)

    def _part(self, layer: nn.Module, name: str) -> nn.Module:
        return layer.get_submodule(getattr(self.layout, name))

    def _call(self, module, args, kwargs):
        self.calls.append((args, kwargs))

    def _entry(self, module, args, kwargs):
        self.embedded = args[0] if args else kwargs["hidden_states"]


def everything(reader: str, written: Written) -> Tensor:
    """What readers read in the model itself."""
    return sum(written.values())


def with_ablated(ablated: set[tuple[str, str]], source: Written):
    """Readers read `source` of the writers whose edge to them is ablated."""

    def sees(reader: str, written: Written) -> Tensor:
        return sum(source[w] if (w, reader) in ablated else x for w, x in written.items())

    return sees
