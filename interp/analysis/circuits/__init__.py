"""Circuits: of heads or of edges, found, measured, compared, and told by what their heads do."""

from interp.analysis.circuits.edge_curve import edge_curve
from interp.analysis.circuits.edge_scores import EdgeScores
from interp.analysis.circuits.edge_search import greedy_edges
from interp.analysis.circuits.edges import edge_attribution, edge_patching
from interp.analysis.circuits.find import Circuit, find_circuit
from interp.analysis.circuits.keeping import circuit_faithfulness
from interp.analysis.circuits.overlap import circuit_overlap
from interp.analysis.circuits.roles import head_roles

__all__ = [
    "Circuit",
    "EdgeScores",
    "circuit_faithfulness",
    "circuit_overlap",
    "edge_attribution",
    "edge_curve",
    "edge_patching",
    "find_circuit",
    "greedy_edges",
    "head_roles",
]
