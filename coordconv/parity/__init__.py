"""The proof that backends agree: cases, what they must compute, and the report."""

from coordconv.parity.cases import Case, generate
from coordconv.parity.report import Report, Tally, check

__all__ = ["Case", "Report", "Tally", "check", "generate"]
