"""The proof that backends agree, and the same check for any models.

:func:`check_layers`, :func:`check_exchange` and :func:`check_training` run this package's backends;
:func:`compare` runs the same inputs through models of any kind, and says where they differ.
"""

from coordconv.parity.cases import Case, generate
from coordconv.parity.compare import ComparisonRow, Report, compare
from coordconv.parity.exchange import check_exchange
from coordconv.parity.layers import CaseReport, Tally, check_layers
from coordconv.parity.training import check_training

__all__ = [
    "Case",
    "CaseReport",
    "ComparisonRow",
    "Report",
    "Tally",
    "check_exchange",
    "check_layers",
    "check_training",
    "compare",
    "generate",
]
