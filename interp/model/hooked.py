"""`interp.load(...)` and the model it gives: a TransformerLens bridge whose attention is lazy."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.util import find_spec
from inspect import signature
from itertools import chain
from pathlib import Path
from types import FunctionType
from typing import Any, cast
from warnings import warn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
    detect_tokenizer_bos_eos,
)
from transformer_lens.model_bridge.sources.transformers import helpers as theirs
from transformer_lens.utilities.attn_implementation import force_eager_attention
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.image_processing_base import ImageProcessingMixin

from interp import zoo
from interp.heads import Head, HeadError
from interp.model import packed, towers
from interp.model.attention import Attention
from interp.model.call import Call, Prompts, Running, Spans
from interp.model.images import batch_inputs, check_plain_positions
from interp.model.lazy import IMPLEMENTATION, attention_module, can_be_lazy, make_lazy
from interp.model.midpoint import carry_mid_edits
from interp.model.norms import make_quiet_norms
from interp.model.rotary import Rotations
from interp.model.transparent import make_transparent
from interp.provenance import versions

# where it is missing, TransformerLens would install it by pip, and with it another torch
theirs._ensure_torchvision = lambda: find_spec("torchvision") is not None

packed.register()


class HookError(zoo.UserError):
    """A hook name that the model does not have, or a hook that never fired."""


def load(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    processor: Any = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> "HookedModel":
    """A hooked model from a name that we know, a folder, a hub id, or a loaded model.

    Args:
        model: `interp.zoo` name ("smollm2-135m"), folder, hub id, or a `PreTrainedModel`, which is
            then changed in place (its submodules become hooked ones).
        tokenizer: Default: the one beside the weights.
        processor: What makes pixels of images, for models that see; default: the one beside the
            weights. A whole processor, which has a tokenizer too, or an image processor.
        dtype: Default: the checkpoint's own.
        device: Default: CUDA where there is one, else the CPU. Not together with `device_map`.
        device_map: Spread over devices as in transformers.
        revision: Branch, tag or commit of a hub id.
        trust_remote_code: Run the repository's own Python code; off unless asked.

    Raises:
        ModelError: Unknown name, folder without weights, architecture without an adapter.
    """
    if isinstance(model, nn.Module):
        if device is not None or device_map is not None or dtype is not None:
            raise zoo.ModelError(
                "dtype, device, device_map: not with a loaded model; move it first."
            )
        return _hook_loaded(model, tokenizer, processor)
    source, known = zoo.resolve(model)
    name = known.name if known else str(model)
    if behind := zoo.language_model_of(Path(source)):
        if device_map is not None:
            raise zoo.ModelError(f"device_map: {name} lies on one device; give device instead.")
        return _hook_assembled(name, Path(source), behind, tokenizer, processor, dtype, device)
    settings = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _named_errors(model):
        config = AutoConfig.from_pretrained(source, **settings)
        if processor is None:
            processor = _load_processor(source, config, **settings)
        if tokenizer is None:
            tokenizer = _load_tokenizer(source, **settings)
        if device is None and device_map is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        bridge = TransformerBridge.boot_transformers(
            str(source),
            dtype=_dtype(dtype, config),
            device=device,
            device_map=device_map,
            tokenizer=deepcopy(tokenizer),
            **settings,
        )
    return _hooked(bridge, name, revision, tokenizer, processor)


class HookedModel(TransformerBridge):
    """A `TransformerBridge` whose attention is lazy; all of its names and functions are here.

    Beside the bridge's hooks every attention layer has `blocks.L.attn.hook_attention`, whose value
    is an `interp.model.attention.Attention`. A pattern exists only where a hook on scores or
    pattern is attached, or where somebody asks that `Attention` for one.
    """

    name: str
    revision: str | None
    processor: Any  # None where the model sees no images
    _running: Running

    @property
    def call(self) -> Call:
        """The facts of the forward pass that is running (or ran last)."""
        if self._running.call is None:
            raise RuntimeError("call: the model has not run yet.")
        return self._running.call

    @property
    def interventions(self) -> tuple[str, ...]:
        """What is applied at the moment, in words."""
        return tuple(_identity(one) for one in self.applied)

    @property
    def applied(self) -> tuple[Any, ...]:
        """The interventions that are applied at the moment, in their order."""
        return self._running.interventions

    @property
    def attention_layers(self) -> list[int]:
        """Layers that have attention."""
        return [i for i, block in enumerate(self.blocks) if "attn" in block._modules]

    @property
    def lazy(self) -> bool:
        """False where this architecture's attention runs on the bridge's own eager path."""
        return all(self.blocks[i].attn._lazy for i in self.attention_layers)

    def read_attention(
        self,
        input_ids: Int[Tensor, "batch token"],
        reader: Callable[[Attention], Tensor],
        *,
        layers: Sequence[int] | None = None,
        attention_mask: Int[Tensor, "batch token"] | None = None,
        **kwargs,
    ) -> Tensor:
        """Run once and stack what `reader` says of each layer's attention: `[batch layer ...]`.

        `layers`: default all. Other arguments go to the forward pass. No gradients, no logits.

        Raises `HeadError` where a layer is out of range.
        """
        layers = self.attention_layers if layers is None else list(layers)
        self.check_layers(layers)
        found: dict[int, Tensor] = {}

        def hook_of(layer: int):
            def look(attention: Attention, hook) -> None:
                found[layer] = reader(attention)

            return f"blocks.{layer}.attn.hook_attention", look

        with self.hooks(fwd_hooks=[hook_of(layer) for layer in layers]):
            self.run(input_ids, attention_mask, **kwargs)
        return torch.stack([found[layer] for layer in layers], dim=1)

    @torch.no_grad()
    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> None:
        """A forward pass for its hooks' sake: no logits but the last token's, no gradients."""
        if "logits_to_keep" in signature(self.original_model.forward).parameters:
            kwargs.setdefault("logits_to_keep", 1)
        self(input_ids, attention_mask=attention_mask, return_type=None, use_cache=False, **kwargs)

    @torch.no_grad()
    def last_logits(
        self, input_ids: Tensor, attention_mask: Tensor | None, n: int, **inputs
    ) -> Float[Tensor, "batch n vocab"]:
        """Logits of the last `n` columns, float32; the others are not computed if that can be."""
        keep = dict(inputs)
        if "logits_to_keep" in signature(self.original_model.forward).parameters:
            keep["logits_to_keep"] = n
        logits = self(input_ids, attention_mask=attention_mask, use_cache=False, **keep)
        return logits[:, -n:].float()

    @torch.no_grad()
    def continue_greedily(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **inputs
    ) -> Int[Tensor, "batch new"]:
        """What the model writes on, by Hugging Face's greedy `generate` with the KV cache.

        Rows that end early are filled up with the pad token. `inputs`: see `Batch.inputs`.
        """
        pad = getattr(self.tokenizer, "pad_token_id", None)
        out = self.original_model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0 if pad is None else pad,
            **inputs,
        )
        return out[:, input_ids.shape[1] :]

    def hooks(self, fwd_hooks=(), bwd_hooks=(), **settings):
        """TransformerLens' `hooks`: functions attached by name, for as long as the block lasts."""
        fwd_hooks, bwd_hooks = (
            [(name, _plain_function(fn)) for name, fn in hooks] for hooks in (fwd_hooks, bwd_hooks)
        )
        return super().hooks(fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks, **settings)

    @contextmanager
    def intervene(self, *interventions) -> Iterator["HookedModel"]:
        """Apply interventions, in order, to whatever runs in the block; undone on leaving it.

        Each is an intervention, a list of them, or a folder in which one was saved. Where two edit
        the same place, the later one gets what the earlier one made of it.

        Raises:
            InterventionError: One that was made on a model of another kind, or can't be read.
            HookError: Before the block for a hook that the model does not have; after it for a
                hook that never fired although the model ran.
        """
        fired: dict[str, int] = {}

        def watched(name: str, fn: Callable) -> tuple[str, Callable]:
            fired[name] = 0

            def hook_fn(value, hook):
                fired[name] += 1
                return fn(value, hook=hook)

            return name, hook_fn

        applied, running = _read(interventions), self._running
        for one in applied:
            getattr(one, "check_model", _accept)(self)
        pairs = chain.from_iterable(one.hooks(self) for one in applied)
        hooks = [watched(*pair) for pair in pairs]
        self.check_hooks(fired)
        passes, before = running.passes, running.interventions
        running.interventions = (*before, *applied)
        try:
            with self.hooks(fwd_hooks=hooks):
                yield self
        finally:
            running.interventions = before
        silent = [name for name, count in fired.items() if not count]
        if silent and running.passes > passes:
            raise HookError(
                f"hooks: {silent[0]} never fired (of {len(silent)} such): the edit did not act."
            )

    def prepare(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """What the applied interventions want to go in instead of a prompt (see `Intervention`).

        `prompt` is a row as in `interp.tasks`, with at least `text` and `input_ids`.
        """
        for one in self.applied:
            change = getattr(one, "prepare", None)
            prompt = prompt if change is None else change(prompt, self)
        return prompt

    @contextmanager
    def spans(
        self, spans: Sequence[Spans] | None, lengths: Sequence[int] | None = None
    ) -> Iterator[None]:
        """Tell hooks (`model.call.spans`) where each row's named spans lie, while in the block.

        `spans`: one dict a row, name -> [start, end) in the prompt's own tokens, padding not
        counted. `lengths`: how many of each row's tokens are the prompt, where answers follow.
        """
        before, self._running.prompts = self._running.prompts, Prompts(spans, lengths)
        try:
            yield
        finally:
            self._running.prompts = before

    def check_hooks(self, names: Iterable[str]) -> None:
        """Raises `HookError`, with the nearest names, where the model lacks one, or it is off."""
        points = self.hook_dict  # made anew each time that it is asked for
        for name in names:
            if name not in points:
                near = get_close_matches(name, points, n=3, cutoff=0)
                raise HookError(
                    f"hooks: {self.name} has no {name!r}; the nearest: {', '.join(near)}."
                )
            gate = self._gated_hook_reason(points[name].name or name)
            if gate is not None:
                raise HookError(f"hooks: {name} is off; call model.set_{gate}(True) first.")

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raises `HeadError` where the model has no attention in one of the layers."""
        missing = [layer for layer in layers if layer not in self.attention_layers]
        if missing:
            last = self.attention_layers[-1]
            raise HeadError(
                f"layers: {missing[0]} is not in {self.name}, which has layers 0-{last}."
            )

    def check_heads(self, heads: Sequence[Head], tower: str | None = "text") -> None:
        """Raises `HeadError` where the model lacks one of the heads, or it is not of `tower`.

        The language model is the tower "text", its image encoder "vision"; None: either.
        """
        towers.check_heads(self, heads, tower)

    def hook_of(self, head: Head, point: str) -> str:
        """The name of a hook of a head's layer, in its tower: `hook_z` is `blocks.3.attn.hook_z`.

        Raises `HeadError` where the model lacks the head.
        """
        self.check_heads([head], tower=None)
        return towers.towers(self)[head.tower].hook(head.layer, point)

    def generate(self, *args, **kwargs):
        """TransformerLens' `generate`; hooks know which tokens are generated, cache or not.

        Raises `ImageError` for images of a model (Qwen-VL) that gives them positions in a plane,
        which TransformerLens' loop cannot go on from; `continue_greedily` can.
        """
        check_plain_positions(self, kwargs)
        self._running.generating = 0
        try:
            return super().generate(*args, **kwargs)
        finally:
            self._running.generating = None

    def batches(
        self,
        token_lists: Sequence[Sequence[int]],
        batch_size: int = 8,
        desc: str | None = None,
        *,
        images: Sequence[Any] | None = None,
    ) -> Iterator["Batch"]:
        """Left-padded batches, longest first, with a progress bar where `desc` names it.

        Rows of a batch are near each other in length; `Batch.index` says which they are. `images`:
        what each prompt has, as in `batch` (`interp.model.images.images_of(prompts)`).
        """
        lengths = torch.tensor([len(tokens) for tokens in token_lists], dtype=torch.long)
        order = lengths.argsort(descending=True, stable=True)
        splits = order.split(batch_size) if len(order) else ()
        for index in tqdm(splits, desc=desc, disable=desc is None, leave=False):
            rows = index.tolist()
            shown = None if images is None else [images[i] for i in rows]
            yield self.batch([token_lists[i] for i in rows], index, images=shown)

    def batch(
        self,
        token_lists: Sequence[Sequence[int]],
        index: Tensor | None = None,
        *,
        images: Sequence[Any] | None = None,
    ) -> "Batch":
        """One left-padded batch on the model's device.

        `images`: for each prompt its image, a list of them, or None. Raises `ImageError` where a
        prompt's image tokens are not those of its images.
        """
        width = max(len(tokens) for tokens in token_lists)
        pad_id = getattr(self.tokenizer, "pad_token_id", None) or 0
        ids = torch.full((len(token_lists), width), pad_id)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(token_lists):
            ids[row, width - len(tokens) :] = torch.as_tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        index = torch.arange(len(ids)) if index is None else index
        ids, mask = ids.to(self.cfg.device), mask.to(self.cfg.device)
        inputs = batch_inputs(self, token_lists, ids, images, index.tolist())
        return Batch(ids, mask, index, inputs)

    def provenance(self) -> dict[str, Any]:
        """What a result must say of the model it was made with."""
        return {
            "model": self.name,
            "revision": self.revision,
            "architecture": self.cfg.architecture,
            "dtype": str(self.original_model.dtype).removeprefix("torch."),
            "device": str(self.cfg.device).split(":")[0],
            "attention": "lazy" if self.lazy else "eager",
            "interventions": list(self.interventions),
            "versions": versions(),
        }

    def run_with_cache(self, *args, names_filter=None, **kwargs):
        """TransformerLens' `run_with_cache`, without `hook_attention`, whose value is no tensor."""
        return super().run_with_cache(
            *args, names_filter=self._without_attention(names_filter), **kwargs
        )

    def get_caching_hooks(self, names_filter=None, *args, **kwargs):
        """TransformerLens' `get_caching_hooks`, without `hook_attention`."""
        return super().get_caching_hooks(self._without_attention(names_filter), *args, **kwargs)

    @staticmethod
    def _holds_tensor(name: str) -> bool:
        return not name.endswith("hook_attention")

    def _without_attention(self, names_filter):
        """An unfiltered cache leaves `hook_attention` out; asking for it by name is an error."""
        if names_filter is None:
            return lambda name: self._holds_tensor(name) and not self._gated_hook_reason(name)
        if callable(names_filter):
            return lambda name: self._holds_tensor(name) and names_filter(name)
        asked = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        if not all(self._holds_tensor(name) for name in asked):
            raise HookError(
                "names_filter: hook_attention holds no tensor to cache; "
                "use model.read_attention(input_ids, reader) and return what you need of it."
            )
        return names_filter


@dataclass(frozen=True, eq=False)
class Batch:
    """Left-padded prompts: row i is prompt `index[i]`, its tokens start at `first[i]`.

    `inputs` is what a forward pass or `generate` takes beside tokens and mask (the pixels of the
    prompts' images); for text there is nothing in it.
    """

    input_ids: Int[Tensor, "batch token"]
    attention_mask: Int[Tensor, "batch token"]
    index: Int[Tensor, " batch"]
    inputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def first(self) -> Int[Tensor, " batch"]:
        return self.input_ids.shape[1] - self.attention_mask.sum(1)


def _plain_function(fn: Callable) -> Callable:
    """TransformerLens asks each hook for its `repr`, and a bound method's has all it is bound to.

    A model, or the tensors of a dataclass, can take longer to print than to run.
    """
    return (lambda value, hook: fn(value, hook=hook)) if not isinstance(fn, FunctionType) else fn


def _hook_loaded(model: nn.Module, tokenizer: Any, processor: Any = None) -> HookedModel:
    kind = type(model).__name__
    if any(isinstance(module, GeneralizedComponent) for module in model.modules()):
        raise zoo.ModelError(f"model: this {kind} is hooked already; use what `load` gave.")
    if not isinstance(model, PreTrainedModel):
        raise zoo.ModelError(f"model: a {kind} is no model of transformers.")
    name = getattr(model.config, "_name_or_path", "") or kind
    with _named_errors(name):
        force_eager_attention(model)  # what a layer that can't be lazy falls back on
        bridge = build_bridge_from_module(
            model,
            type(model).__name__,
            hf_config=deepcopy(model.config),
            tokenizer=None,  # the bridge would load it anew, with a BOS
            model_name=name,
        )
    return _hooked(bridge, name, None, tokenizer, processor)


def _hook_assembled(
    name: str, folder: Path, behind: str, tokenizer, processor, dtype, device
) -> HookedModel:
    """A model of ours whose language model, `behind`, is another of the known ones."""
    from interp.model.assembled import assemble

    with _named_errors(name):
        wanted = None if dtype is None else _dtype(dtype, None)
        parts = assemble(folder, zoo.get(behind), wanted)
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        parts.model.config._name_or_path = name
        return _hook_loaded(
            parts.model.to(device), tokenizer or parts.tokenizer, processor or parts.processor
        )


def _hooked(
    bridge: TransformerBridge, name: str, revision: str | None, tokenizer: Any, processor: Any
) -> HookedModel:
    """Turn a bridge into a `HookedModel`, in place."""
    bridge.__class__ = HookedModel
    model = cast(HookedModel, bridge)
    running = Running()
    tokenizer = getattr(processor, "tokenizer", None) if tokenizer is None else tokenizer
    own = {"name": name, "revision": revision, "processor": processor, "_running": running}
    model.__dict__ |= own  # the bridge forwards unknown attributes
    _make_lazy(model, running)
    make_quiet_norms(model)
    carry_mid_edits(model)
    make_transparent(model)
    model._scan_existing_hooks(model, "")
    new = {name for name in model.hook_dict if name.endswith("hook_attention")}
    model._driver.supported_hook_points |= new
    # a bound method: a deepcopy of the model gets a `running` of its own
    model.original_model.register_forward_pre_hook(running.begin, with_kwargs=True)
    if tokenizer is not None:  # the bridge's copy prepends a BOS; ours follows its own policy
        model._tokenizer = tokenizer
        prepends, appends = detect_tokenizer_bos_eos(tokenizer)
        model.cfg.tokenizer_prepends_bos = model.cfg.default_prepend_bos = prepends
        model.cfg.tokenizer_appends_eos = appends
    return model


def _make_lazy(model: HookedModel, running: Running) -> None:
    """Lazy attention for each tower where all of its layers can have it."""
    components = [m for m in model.modules() if isinstance(m, AttentionBridge)]
    able = {id(c): can_be_lazy(c) for c in components}
    refused = {id(_config(c)) for c in components if not able[id(c)]}
    vision = getattr(model.original_model.config, "vision_config", None)
    rotations = Rotations().watch(model.original_model)
    for component in components:
        config = _config(component)
        lazy = able[id(component)] and id(config) not in refused
        sees_image = vision is not None and isinstance(config, type(vision))
        make_lazy(component, running, lazy, has_tokens=not sees_image, rotations=rotations)
        if lazy:
            config._attn_implementation = IMPLEMENTATION
    if refused:
        kind = type(model.original_model).__name__
        warn(
            f"{kind}: its attention can't be made lazy; it runs on the bridge's eager path.",
            stacklevel=4,
        )
        return
    # the bridge has transformers collect patterns, which are not made here
    for config in (model.original_model.config, *map(_config, components)):
        config.output_attentions = False


def _config(component: AttentionBridge):
    module = attention_module(component) or component.original_component
    return getattr(module, "config", None)


def _identity(intervention) -> str:
    """What an intervention is, in words and by its digest (one of a user's own may have none)."""
    digest = getattr(intervention, "digest", "")
    return f"{intervention!r} {digest[:12]}".strip()


def _read(interventions) -> list:
    """Interventions, lists of them and folders as one list."""
    from interp.intervention.base import interventions_of  # it is built on this module

    return interventions_of(interventions)


def _accept(model: HookedModel) -> None:
    """What an intervention of a user's own, which may have hooks only, says of a model."""


def _dtype(dtype: torch.dtype | str | None, config) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return getattr(config, "dtype", None) or torch.float32
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype):
        raise zoo.ModelError(f"dtype={dtype!r}: not a torch dtype; float32, bfloat16 or float16.")
    return found


def _load_tokenizer(source, **settings):
    """The tokenizer beside the weights, or None for a model that reads no text."""
    try:
        return AutoTokenizer.from_pretrained(source, **settings)
    except (OSError, ValueError, KeyError):
        return None


def _load_processor(source, config, **settings):
    """What reads images beside the weights, or None where they see none or nothing is there.

    Without torchvision, which no image needs, Qwen's whole processors (they read videos too) can't
    be had; the image processor can.
    """
    if not hasattr(config, "vision_config") and not hasattr(config, "image_size"):
        return None
    for kind in (AutoProcessor, AutoImageProcessor):
        try:
            found = kind.from_pretrained(source, **settings)
        except (OSError, ValueError, KeyError, ImportError):
            continue
        if hasattr(found, "image_processor") or isinstance(found, ImageProcessingMixin):
            return found
    return None


@contextmanager
def _named_errors(name) -> Iterator[None]:
    """What can go wrong on the way to a model, as one line that names it."""
    try:
        yield
    except zoo.UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise zoo.ModelError(f"model={str(name)!r}: {lines[0]}") from error
