"""Where a prompt's exchangeable segments lie among the tokens of a pass.

A prompt is *prefix, segment_1, ..., segment_k, suffix*: the segments touch each other, each has a
token at least, and what is generated goes on with the suffix. With p tokens before the segments and
E = p + their sum, segment j ends at end_j and lies c_j = E - end_j tokens before E.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.intervention.base import InterventionError
from interp.intervention.steer import places_of
from interp.model.attention import Attention
from interp.model.call import Call

Range = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Layout:
    """The segments of each prompt of a batch, and which of them each token of a pass is in.

    Prompts with fewer segments are filled up with empty ones, `real` False. A token in no segment
    has number -1.
    """

    start: Int[Tensor, "batch segment"]
    end: Int[Tensor, "batch segment"]
    real: Bool[Tensor, "batch segment"]
    of_query: Int[Tensor, "batch query"]
    of_key: Int[Tensor, "batch key"]

    @classmethod
    def of(cls, names: Sequence[str], call: Call, attention: Attention) -> "Layout":
        """Raises `InterventionError` where segments overlap, leave gaps or are only partly here."""
        rows = segments_of(names, call)
        longest = max(map(len, rows))
        filled = [[*row, *[(row[-1][1], row[-1][1])] * (longest - len(row))] for row in rows]
        ranges = torch.tensor(filled, device=attention.q.device)
        start, end = ranges.unbind(-1)
        of_query = _number(attention.positions, attention.real_queries, start, end)
        of_key = _number(attention.key_positions, attention.real_keys, start, end)
        layout = cls(start, end, end > start, of_query, of_key)
        layout._check_whole()
        return layout

    @property
    def lengths(self) -> Int[Tensor, "batch segment"]:
        """L_j; 0 where it only fills up."""
        return self.end - self.start

    @property
    def before_end(self) -> Int[Tensor, "batch segment"]:
        """c_j: how many tokens of other segments follow."""
        return self.end.amax(1, keepdim=True) - self.end

    @property
    def inside(self) -> Bool[Tensor, "batch query"]:
        """Which queries are in a segment."""
        return self.of_query >= 0

    def at_query(self, of_segment: Int[Tensor, "batch segment"]) -> Int[Tensor, "batch query"]:
        """Each query's number by its segment; 0 outside."""
        found = of_segment.gather(1, self.of_query.clamp_min(0))
        return torch.where(self.inside, found, 0)

    def _check_whole(self) -> None:
        here, keys = self.inside.sum(1), (self.of_key >= 0).sum(1)
        whole = self.lengths.sum(1)
        broken = ((here != 0) & (here != whole)) | ((keys != 0) & (keys != whole))
        if broken.any():
            row = int(broken.int().argmax())
            raise InterventionError(
                f"segments: this pass has {int(here[row])} of the {int(whole[row])} tokens of "
                f"prompt {row}'s segments; each of them looks at all, so give the prompt whole, "
                "not in chunks, and to layers without a window that has left some behind."
            )


def segments_of(names: Sequence[str], call: Call) -> list[list[Range]]:
    """Each prompt's segments in the order of the text, [start, end) in the prompt's own tokens."""
    lengths = call.prompt_lengths.tolist()
    found = []
    for row, length in enumerate(lengths):
        places = [place for name in names for place in places_of(name, row, call, length)]
        ranges = sorted({(int(start), int(end)) for start, end in places})
        check_ranges(ranges, row, length)
        found.append(ranges)
    return found


def check_ranges(ranges: list[Range], row: int, length: int) -> None:
    """Raises `InterventionError` unless they lie in the prompt, side by side."""
    if not ranges:
        raise InterventionError(f"segments: prompt {row} of the batch has none.")
    for start, end in ranges:
        if not 0 <= start < end <= length:
            raise InterventionError(
                f"segments: prompt {row} of the batch has {length} tokens, and a segment is to be "
                f"[{start}, {end}); it needs one token at least, within the prompt."
            )
    for (_, end), (start, _) in pairwise(ranges):
        if start < end:
            raise InterventionError(
                f"segments: in prompt {row} of the batch, one begins at {start} before the last "
                f"one ends at {end}; they must not overlap."
            )
        if start > end:
            raise InterventionError(
                f"segments: in prompt {row} of the batch, tokens [{end}, {start}) between two of "
                "them are in none; what stands between segments belongs to one of them."
            )


def _number(
    positions: Int[Tensor, "batch token"],
    real: Bool[Tensor, "batch token"],
    start: Int[Tensor, "batch segment"],
    end: Int[Tensor, "batch segment"],
) -> Int[Tensor, "batch token"]:
    """Which segment each token is in; -1: none."""
    inside = (start[:, None] <= positions[..., None]) & (positions[..., None] < end[:, None])
    inside = inside & real[..., None]
    return torch.where(inside.any(-1), inside.int().argmax(-1), -1)
