"""The proof that backends agree, and the same check for any models.

``check`` runs generated cases through this package's backends; ``compare`` runs the same inputs
through models of any kind, and says where they part.
"""

from coordconv.parity.cases import Case, generate
from coordconv.parity.models import Report, Row, compare
from coordconv.parity.report import CaseReport, Tally, check

__all__ = ["Case", "CaseReport", "Report", "Row", "Tally", "check", "compare", "generate"]
