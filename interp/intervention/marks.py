"""Marks on a prompt's tokens, known in all passes after it: which are an image, which a sink.

They are kept by the places of tokens in their own prompts, since padding, a window or a static
cache moves columns about, not tokens. One object for each block and kind of mark. Tokens that are
generated bear none, so rows of beams, which share their prompt, need not be followed.
"""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from interp.intervention.base import InterventionError
from interp.intervention.following import check_goes_on
from interp.model.attention import Attention
from interp.model.call import Call, When, at_places, to_places
from interp.model.hooked import HookedModel
from interp.model.images import of_images


class Marks:
    """Which tokens of the prompts that are being continued bear a mark."""

    def __init__(self):
        self._by_place: Any = None  # Bool[Tensor, "batch place"]

    def add(self, marked: Bool[Tensor, "batch token"], call: Call) -> None:
        """Take down the marks of a pass with tokens of the prompt; a whole pass begins anew.

        Raises `InterventionError` where the pass goes on from one that was not seen.
        """
        size = call.real_keys.shape[1]
        new = to_places(marked.long(), call.positions, call.rows("prompt"), size) > 0
        if not call.whole:
            self.check_goes_on(call)
            new = new | pad(self._by_place, (0, size - self._by_place.shape[1]))
        self._by_place = new

    def at_keys(self, attention: Attention) -> Bool[Tensor, "batch key"]:
        """Which keys bear it."""
        marks = self._by_place.to(attention.q.device)
        return at_places(marks, attention.key_positions, attention.real_keys)

    def at_tokens(self, call: Call) -> Bool[Tensor, "batch token"]:
        """Which tokens of this pass bear it."""
        return at_places(self._by_place, call.positions, call.real)

    def check_goes_on(self, call: Call) -> None:
        """Raises `InterventionError` unless the prompt of these rows was read before."""
        check_goes_on("this edit", self._by_place, len(call.real_keys))


class LayerSets:
    """Sets of the prompt's tokens in each layer, brought to this pass's keys for all at once.

    One object for each block. While an answer is written only the keys move on, and what would be
    some small operations in every layer is done once a pass.
    """

    def __init__(self):
        self._by_place: dict[int, Bool[Tensor, "batch set place"]] = {}
        self._prompt: Call | None = None
        self._call: Call | None = None
        self._at_keys: dict[int, dict[int, Bool[Tensor, "batch set key"]]] = {}

    def __contains__(self, layer: int) -> bool:
        return layer in self._by_place

    def begin(self, call: Call) -> None:
        """A pass with tokens of the prompt, in which layers find their sets anew."""
        if call is not self._prompt:
            self._prompt, self._by_place = call, {}

    def add(
        self, layer: int, sets: Bool[Tensor, "batch set key"], attention: Attention, call: Call
    ) -> None:
        """Take down a layer's sets, in a pass with tokens of the prompt or right after it."""
        places, real = attention.key_positions, attention.real_keys
        known = to_places(sets.long(), places, real, call.real_keys.shape[1]) > 0
        self._by_place[layer], self._call = known, None

    def at_keys(
        self, layer: int, attention: Attention, call: Call
    ) -> Bool[Tensor, "batch set key"]:
        """Which keys of a later pass are in a layer's sets."""
        if call is not self._call:
            self._call, self._at_keys = call, {}
        n_keys, places = attention.n_keys, attention.key_positions
        if n_keys not in self._at_keys:
            known = torch.stack([sets.to(places.device) for sets in self._by_place.values()], 1)
            found = at_places(known, places, attention.real_keys).unbind(1)
            self._at_keys[n_keys] = dict(zip(self._by_place, found, strict=True))
        return self._at_keys[n_keys][layer].to(places.device)


class ImageMarks(Marks):
    """Which tokens stand for an image; looked up once a pass, by whichever layer comes first."""

    def __init__(self, model: HookedModel):
        super().__init__()
        self.model = model
        self._call: Call | None = None
        self._at_keys: dict[int, Tensor] = {}
        self._text: dict[When, tuple[Tensor, Tensor]] = {}

    def see(self, call: Call) -> None:
        """Take down this pass's tokens, unless that was done.

        Raises `InterventionError` where it was given embeddings in place of tokens.
        """
        if call is self._call:
            return
        if goes_on_writing(call):
            self.check_goes_on(call)
        elif call.input_ids is None:
            raise InterventionError(
                "this pass was given embeddings, which do not tell which of them are an image; "
                "give input_ids."
            )
        else:
            self.add(of_images(self.model, call.input_ids), call)
        self._call, self._at_keys, self._text = call, {}, {}

    def at_keys(self, attention: Attention) -> Bool[Tensor, "batch key"]:
        """As `Marks.at_keys`, found once for all layers with as many keys."""
        if attention.n_keys not in self._at_keys:
            self._at_keys[attention.n_keys] = super().at_keys(attention)
        return self._at_keys[attention.n_keys].to(attention.q.device)

    def text(
        self, when: When, call: Call, device: torch.device
    ) -> tuple[Bool[Tensor, "batch query"], Int[Tensor, " columns"]]:
        """Which of this pass's tokens are no image's, and which columns have any; once a pass."""
        if when not in self._text:
            rows = (call.rows(when) & ~self.at_tokens(call)).to(device)
            self._text[when] = rows, rows.any(0).nonzero().squeeze(1)
        rows, columns = self._text[when]
        return rows.to(device), columns.to(device)


def goes_on_writing(call: Call) -> bool:
    """Are all tokens of this pass generated, the prompt in the cache?"""
    return call.step > 0 and not call.whole
