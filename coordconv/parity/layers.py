"""Generated layers through every backend, and what came of them."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from coordconv import backends, position_bias
from coordconv.grid import Array
from coordconv.parity.bounds import PRECISIONS, Expected, expected
from coordconv.parity.cases import Case
from coordconv.weights import Weights

if TYPE_CHECKING:
    from coordconv.backends.protocols import Backend

WAYS = (position_bias.APPEND, position_bias.MAP)

# The output of a second call, in which no gradient is wanted: there a layer may compute otherwise.
_WITHOUT_GRADIENTS = "y without gradients"


@dataclass(frozen=True)
class CaseOutcome:
    """What one backend made of one case: ``excluded`` is why it did not run, if it did not.

    ``forward`` is the largest error of an output, ``gradient`` that of output and gradients, both
    in units of their bounds; ``bitwise`` is whether every array equals the reference's.
    """

    excluded: str = ""
    compiled: bool = False
    forward: float = 0.0
    gradient: float = 0.0
    bitwise: bool = False
    problems: tuple[str, ...] = ()


@dataclass
class Tally:
    """The sum of one backend's outcomes.

    Args:
        backend: its name.
        layers: the number of layers that it ran.
        networks: the number of networks that it ran.
        exact: how many of these cases are in exact arithmetic.
        bitwise: how many of the exact cases equal the reference to the last bit.
        forward_error: the largest error of an output, in units of its bound.
        gradient_error: the largest error of an output or a gradient, in units of its bound.
        failures: a line for each case that failed, which has the case in it.
        excluded: the number of cases that it did not run, by reason.
        kinds: the number of layers by rank and by padding mode, or transposed.
        modes: the number of cases by type and by whether they were compiled.
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
    modes: Counter[str] = field(default_factory=Counter)

    def add(self, case: Case, outcome: CaseOutcome) -> None:
        """Count one outcome."""
        if outcome.excluded:
            self.excluded[outcome.excluded] += 1
            return
        if case.is_layer:
            self.layers += 1
            self.kinds[case.kind] += 1
        else:
            self.networks += 1
        self.modes[f"{case.dtype}, {'compiled' if outcome.compiled else 'eager'}"] += 1
        self.exact += case.exact
        self.bitwise += case.exact and outcome.bitwise
        self.forward_error = max(self.forward_error, outcome.forward)
        self.gradient_error = max(self.gradient_error, outcome.gradient)
        if outcome.problems:
            self.failures.append(f"{'; '.join(outcome.problems)} in {case!r}")


@dataclass
class CaseReport:
    """What :func:`check_layers` found: a tally for each backend."""

    tallies: list[Tally]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not any(tally.failures for tally in self.tallies)

    def to_json(self) -> str:
        """The report as JSON."""
        tallies = [vars(tally) for tally in self.tallies]
        return json.dumps({"ok": self.ok, "backends": tallies}, indent=2)


def check_layers(
    cases: Sequence[Case],
    names: Iterable[str],
    advance: Callable[[], Any] = lambda: None,
    *,
    compiled: bool | None = None,
    way: str | None = None,
    workers: int = 1,
) -> CaseReport:
    """Run every case through every backend, and compare with the float64 reference.

    Args:
        cases: what to run.
        names: the backends.
        advance: called after each case.
        compiled: whether to use the framework's compiler; None for what the users of the framework
            mostly do: JAX compiled, torch and Paddle not.
        way: ``"append"`` or ``"map"`` computes every layer in that one of the two ways of
            :mod:`coordconv.position_bias` wherever both are right; None leaves the choice to the
            layers.
        workers: the number of processes; 1 runs the cases in this process.

    Raises:
        ValueError: a backend that is unknown, or another ``way``.
        ImportError: a backend that is not installed.

    Returns:
        A report. A case fails if an element of the output or of a gradient is off by more than
        its bound or is no value of the case's type, if an exact case is not equal to the last
        bit, or if the framework raises. A case with an option that the framework lacks is counted
        as excluded, under the reason. A case on which the framework ends its process is excluded,
        too, if the same happens without coordinates; it takes more than one process to see that.

    Example:
        >>> from coordconv.parity import generate
        >>> check_layers(generate(1), backends.available_backends()[:1]).ok
        True
    """
    if way not in (None, *WAYS):
        raise ValueError(f"way must be None or one of {', '.join(WAYS)}, got {way!r}")
    names = tuple(dict.fromkeys(names))
    report = CaseReport([Tally(name) for name in names])
    run = partial(_outcomes, compiled=compiled, way=way)
    found = (
        (run(case, names) for case in cases)
        if workers == 1
        else _in_processes(run, cases, names, workers)
    )
    for case, outcomes in zip(cases, found, strict=True):
        for tally, outcome in zip(report.tallies, outcomes, strict=True):
            tally.add(case, outcome)
        advance()
    return report


def _in_processes(
    run: Callable[..., list[CaseOutcome]],
    cases: Sequence[Case],
    names: Sequence[str],
    workers: int,
) -> Iterator[list[CaseOutcome]]:
    done = 0
    while done < len(cases):
        with _processes(workers) as pool:
            futures = [pool.submit(run, case, names) for case in cases[done:]]
            try:
                for future in futures:
                    yield future.result()
                    done += 1
            except BrokenProcessPool:  # in this case, or in one that ran beside it
                pool.shutdown(cancel_futures=True)
        if done < len(cases):
            yield [_alone(run, cases[done], name) for name in names]
            done += 1


def _alone(run: Callable[..., list[CaseOutcome]], case: Case, name: str) -> CaseOutcome:
    """A case in a process of its own, which the framework may end instead of raising."""
    for each in (case, case.plain):
        with _processes(1) as pool:
            try:
                (outcome,) = pool.submit(run, each, [name]).result()
            except BrokenProcessPool:
                continue
        if each is case:
            return outcome
        return CaseOutcome(problems=("the framework ended its process",))
    return CaseOutcome(excluded="the framework ends its process, without coordinates too")


def _processes(workers: int) -> ProcessPoolExecutor:
    # Spawned, since a framework's threads do not survive a fork.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)


def _start_worker() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores already
    # What frameworks report while they run; in the calling process that is up to the caller.
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)


def _outcomes(
    case: Case, names: Sequence[str], compiled: bool | None, way: str | None
) -> list[CaseOutcome]:
    """The outcome of a case in each of the backends, whose layers compute in that ``way``."""
    before = position_bias.FORCED
    position_bias.FORCED = way or before
    try:
        modules = [backends.load(name) for name in names]
        weights, x, dy = data = case.data()
        wanted = expected(case.network, weights, x, dy, PRECISIONS[case.dtype])
        wanted = {_WITHOUT_GRADIENTS: wanted["y"], **wanted}
        return [_outcome(module, case, data, wanted, compiled) for module in modules]
    finally:
        position_bias.FORCED = before


def _outcome(
    backend: Backend,
    case: Case,
    data: tuple[Weights, Array, Array],
    wanted: dict[str, Expected],
    compiled: bool | None,
) -> CaseOutcome:
    weights, x, dy = data
    compiled = backend.COMPILED if compiled is None else compiled
    try:
        module = backend.build(case.network, weights, case.dtype)
        y, gradients = backend.evaluate(module, weights, x, dy, compiled=compiled)
        without, _ = backend.evaluate(module, weights, x, compiled=compiled)
    except NotImplementedError as reason:
        return CaseOutcome(excluded=str(reason))
    except Exception as error:  # noqa: BLE001  # whatever it is, the case reproduces it
        message = str(error).strip().partition("\n")[0]
        return CaseOutcome(compiled=compiled, problems=(f"{type(error).__name__}: {message}",))
    found = {"y": y, _WITHOUT_GRADIENTS: without, **gradients}
    errors = {name: value.error(found[name]) for name, value in wanted.items()}
    unequal = [name for name, value in wanted.items() if not value.equals(found[name])]
    problems = []
    for name, share in errors.items():
        if share > 1:
            problems.append(f"{name}: error {share:.3g} times the bound")
            continue
        if not np.array_equal(found[name], PRECISIONS[case.dtype].rounded(found[name])):
            problems.append(f"{name}: not in {case.dtype}")
        if case.exact and name in unequal:
            problems.append(f"{name}: not bitwise equal")
    return CaseOutcome(
        compiled=compiled,
        forward=max(errors["y"], errors[_WITHOUT_GRADIENTS]),
        gradient=max(errors.values()),
        bitwise=not unequal,
        problems=tuple(problems),
    )
