"""Models whose circuit is known because each of their weights was written, to test discovery on.

The idea is RASP's (Weiss, Goldberg & Yahav 2021, arXiv 2106.06981; compiled into weights by Tracr,
Lindner et al. 2023, arXiv 2301.05062): the residual stream holds variables in orthogonal subspaces,
a head selects positions by comparing two variables and moves a third, an MLP is a function of one
position. Here the result is a real model of Hugging Face, with its norms, soft attention and
positions, and the true heads, MLPs and edges stand beside it.

- *Codes.* A variable is written as one of a set of orthonormal directions. The basis is random and
  orthogonal to (1, ..., 1): no neuron shows a variable, and LayerNorm finds nothing to centre.
- *Norms.* Every embedding also has the same long vector, the constant, so that the stream's length
  hardly depends on what is written, and the norms' weights undo that length: each norm is nearly
  the identity. In layer 0 it is exactly that, as all embeddings are of one length.
- *Distractors.* All other heads and MLPs read everything but the constant at random, and write a
  little of it at random. Decoys do part of the job loudly where nobody listens.

An edge is true where resampling it from the other prompt of a pair can change the answer: what is
the same in both prompts (positions, the flag of the first token) flows along edges that are not.
"""

from functools import cache

from interp.model.hooked import HookedModel
from tests.known_circuits.circuit import KnownCircuit, hooked
from tests.known_circuits.histogram import HISTOGRAM
from tests.known_circuits.induction import INDUCTION

__all__ = ["CIRCUITS", "HISTOGRAM", "INDUCTION", "KnownCircuit", "hooked", "known"]

CIRCUITS = {circuit.name: circuit for circuit in (INDUCTION, HISTOGRAM)}


@cache
def known(name: str) -> HookedModel:
    """A circuit's model, shared by all tests: leave it as it is."""
    return CIRCUITS[name].fresh()
