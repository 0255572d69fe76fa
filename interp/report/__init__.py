"""The report: the whole loop on one model, as one self-contained HTML page."""

from interp.report.page import write
from interp.report.plan import Plan

__all__ = ["Plan", "write"]
