"""Hide tokens of the prompt from the text that follows an image: what do heads lose without them?

With H the tokens of the named spans, in each head of the chosen layers and each row of text

    a'_ij = 0 for j in H,    a'_ij = a_ij / (1 - sum over H of a_ij) for all others

(the softmax without them). Rows of the image's own tokens stay as they are, and so does a row that
would see nothing else. For removing visual sinks against as many other tokens of the image, as Kang
et al. 2025 do (arXiv 2503.03321): `interp.analysis.visual_sinks` finds them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from interp.intervention.base import Hook, Intervention, InterventionError
from interp.intervention.chosen import check_when, said_when
from interp.intervention.marks import ImageMarks
from interp.intervention.steer import places_of, suppressed
from interp.intervention.var import as_layers, chosen_layers
from interp.model.attention import Attention
from interp.model.call import Call, When
from interp.model.hooked import HookedModel
from interp.model.images import image_token


@dataclass(frozen=True, eq=False, repr=False)
class HideTokens(Intervention):
    """Take all attention of text off the tokens of `span`; the others take it up.

    `span` names spans of the prompts that run ("hidden_*": all whose name begins so); a prompt that
    has none loses nothing. `layers`: numbers, or a slice such as "2:-1"; default all.
    """

    span: str | Sequence[str] = "hidden_*"
    layers: Sequence[int] | slice | str = ":"
    when: When = "both"

    def __post_init__(self):
        names = (self.span,) if isinstance(self.span, str) else tuple(self.span)
        object.__setattr__(self, "span", names)
        if not names or not all(isinstance(name, str) and name.strip("*") for name in names):
            raise InterventionError(f"span={self.span!r}: names of spans, such as 'hidden_*'.")
        object.__setattr__(self, "layers", as_layers(self.layers))
        check_when(self.when)

    def __repr__(self) -> str:
        at = self.layers if isinstance(self.layers, str) else ", ".join(map(str, self.layers))
        return (
            f"HideTokens(all heads of layers {at}; text looks away from {', '.join(self.span)}; "
            f"{said_when(self.when)})"
        )

    def hooks(self, model: HookedModel) -> Iterable[Hook]:
        """One hook a layer. Raises `ImageError` for a text-only model."""
        image_token(model)
        image = ImageMarks(model)
        for layer in chosen_layers(self.layers, model):
            yield f"blocks.{layer}.attn.hook_attention", partial(self._hide, model, image)

    def _hide(
        self, model: HookedModel, image: ImageMarks, attention: Attention, hook
    ) -> Attention | None:
        call = model.call
        image.see(call)
        rows, _ = image.text(self.when, call, attention.q.device)
        keys = attention.real_keys.new_zeros(attention.real_keys.shape)
        places = attention.key_positions
        for row, ranges in enumerate(self._ranges(call)):
            for start, end in ranges:
                keys[row] |= (start <= places[row]) & (places[row] < end)
        keys = keys & attention.real_keys
        rows = rows & keys.any(1, keepdim=True)
        if not bool(rows.any()):
            return None
        return suppressed(attention, list(range(attention.n_heads)), rows, keys)

    def _ranges(self, call: Call) -> list[list[Sequence[int]]]:
        """Of each prompt; none where it has no such span. Raises where nobody told of spans."""
        found = []
        for row, length in enumerate(call.prompt_lengths.tolist()):
            own = {} if call.spans is None else call.spans[row]
            ranges: list[Sequence[int]] = []
            for name in self.span:
                stem = name.removesuffix("*")
                here = [n for n, place in own.items() if place and n.startswith(stem)]
                if call.spans is None or here or ":" in name:  # without any told, it says so
                    ranges += places_of(name, row, call, length)
            found.append(ranges)
        return found
