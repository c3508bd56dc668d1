"""Running cases through backends, and what came of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coordconv import backends
from coordconv.grid import Array
from coordconv.parity.cases import Case
from coordconv.parity.comparison import Expected, expected


@dataclass
class Tally:
    """What one backend did.

    ``bitwise`` of the ``exact`` cases gave the reference's value to the last bit; the errors are
    the largest of all cases, in units of the bound; ``kinds`` counts the layers by rank, transposed
    or not, and padding mode.
    """

    backend: str
    layers: int = 0
    networks: int = 0
    exact: int = 0
    bitwise: int = 0
    forward_error: float = 0.0
    gradient_error: float = 0.0
    failures: list[str] = field(default_factory=list)
    excluded: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)


@dataclass
class Report:
    """A tally per backend; ``ok`` says that nothing failed."""

    tallies: list[Tally]

    @property
    def ok(self) -> bool:
        return not any(tally.failures for tally in self.tallies)

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(
            {"ok": self.ok, "backends": [vars(tally) for tally in self.tallies]}, indent=2
        )


def check(
    cases: Sequence[Case], names: Iterable[str], advance: Callable[[], Any] = lambda: None
) -> Report:
    """Run every case through every backend and compare with the float64 reference.

    Args:
        cases: what to run.
        names: the backends.
        advance: called after each case.

    Raises:
        ValueError, ImportError: a backend that is unknown or not installed.

    Returns:
        A report. A case fails if an element of the output or of a gradient is off by more than
        its bound, or if an exact case is not equal to the last bit. A case with an option that
        the framework lacks is counted as excluded, under the reason.
    """
    modules = {name: backends.load(name) for name in names}
    report = Report([Tally(name) for name in modules])
    for case in cases:
        weights, x, dy = case.draw()
        wanted = expected(case.network, weights, x, dy)
        for tally in report.tallies:
            _check_one(tally, modules[tally.backend], case, weights, x, dy, wanted)
        advance()
    return report


def _check_one(
    tally: Tally, backend: Any, case: Case, weights: Any, x: Array, dy: Array, wanted: Any
) -> None:
    try:
        module = backend.build(case.network, weights)
    except NotImplementedError as reason:
        tally.excluded[str(reason)] += 1
        return
    y, gradients = backend.evaluate(module, weights, x, dy)
    found = {"y": y, **gradients}
    if case.is_layer:
        tally.layers += 1
        tally.kinds[case.kind] += 1
    else:
        tally.networks += 1
    errors = {name: value.error(found[name]) for name, value in wanted.items()}
    tally.forward_error = max(tally.forward_error, errors["y"])
    tally.gradient_error = max(tally.gradient_error, *errors.values())
    problems = [
        f"{name}: error {error:.3g} times the bound" for name, error in errors.items() if error > 1
    ]
    if case.exact:
        unequal = _unequal(wanted, found)
        tally.exact += 1
        tally.bitwise += not unequal
        problems += [f"{name}: not bitwise equal" for name in unequal if errors[name] <= 1]
    if problems:
        tally.failures.append(f"{'; '.join(problems)} in {case!r}")


def _unequal(wanted: dict[str, Expected], found: dict[str, Array]) -> list[str]:
    return [name for name, value in wanted.items() if not value.equals(np.asarray(found[name]))]
