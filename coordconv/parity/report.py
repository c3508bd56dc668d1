"""Running cases through backends, and what came of it."""

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
from typing import Any

import numpy as np

from coordconv import backends, position_bias
from coordconv.grid import Array
from coordconv.parity.cases import Case
from coordconv.parity.comparison import PRECISIONS, Expected, expected

_MOST_TOGETHER = {"apart": 0, "together": 2**40}


@dataclass(frozen=True)
class Outcome:
    """What one backend made of one case.

    Either ``excluded`` says why it did nothing; or ``forward`` and ``gradient`` are the largest
    errors in units of the bound, ``bitwise`` says whether everything equals the reference to the
    last bit, and ``problems`` what is wrong.
    """

    excluded: str = ""
    compiled: bool = False
    forward: float = 0.0
    gradient: float = 0.0
    bitwise: bool = False
    problems: tuple[str, ...] = ()


_ALONE = "y without gradients"


@dataclass
class Tally:
    """What one backend did.

    ``bitwise`` of the ``exact`` cases gave the reference's value to the last bit; the errors are
    the largest of all cases, in units of the bound; ``kinds`` counts the layers by rank, transposed
    or not, and padding mode, ``modes`` all cases by their type and whether they were compiled.
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

    def add(self, case: Case, outcome: Outcome) -> None:
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
    """A tally per backend; ``ok`` says that nothing failed."""

    tallies: list[Tally]

    @property
    def backends(self) -> list[str]:
        return [tally.backend for tally in self.tallies]

    @property
    def ok(self) -> bool:
        return not any(tally.failures for tally in self.tallies)

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(
            {"ok": self.ok, "backends": [vars(tally) for tally in self.tallies]}, indent=2
        )


def check(
    cases: Sequence[Case],
    names: Iterable[str],
    advance: Callable[[], Any] = lambda: None,
    *,
    compiled: bool | None = None,
    maps: str | None = None,
    workers: int = 1,
) -> CaseReport:
    """Run every case through every backend and compare with the float64 reference.

    Args:
        cases: what to run.
        names: the backends.
        advance: called after each case.
        compiled: put every framework's compiler before it, or none; None for what its users
            mostly do: JAX compiled, torch and Paddle not.
        maps: ``"apart"`` has the position bias made axis by axis, as that of a large map is, and
            ``"together"`` from one table; None leaves it to the size, and generated cases are
            small.
        workers: the number of processes; 1 runs the cases in this one, unless ``maps`` are given:
            what they are made from is kept for as long as a process lives.

    Raises:
        ValueError, ImportError: a backend that is unknown or not installed; other ``maps``.

    Returns:
        A report. A case fails if an element of the output or of a gradient is off by more than
        its bound or is no value of the case's type, if an exact case is not equal to the last
        bit, or if the framework raises. A case with an option that the framework lacks is counted
        as excluded, under the reason; so is, if there is more than one process, a case on which
        the framework ends it, if it does the same without coordinates.
    """
    if maps not in (None, *_MOST_TOGETHER):
        raise ValueError(f"maps must be None or one of {', '.join(_MOST_TOGETHER)}, got {maps!r}")
    report = CaseReport([Tally(name) for name in dict.fromkeys(names)])
    found = _each(cases, report.backends, compiled, maps, workers)
    for case, outcomes in zip(cases, found, strict=True):
        for tally, outcome in zip(report.tallies, outcomes, strict=True):
            tally.add(case, outcome)
        advance()
    return report


def _each(
    cases: Sequence[Case],
    names: Sequence[str],
    compiled: bool | None,
    maps: str | None,
    workers: int,
) -> Iterator[list[Outcome]]:
    if workers == 1 and maps is None:
        for case in cases:
            yield _outcomes(case, names, compiled)
        return
    done = 0
    while done < len(cases):
        with _processes(workers, maps) as pool:
            futures = [pool.submit(_outcomes, case, names, compiled) for case in cases[done:]]
            try:
                for future in futures:
                    yield future.result()
                    done += 1
            except BrokenProcessPool:  # in this case, or in one that ran beside it
                pool.shutdown(cancel_futures=True)
        if done < len(cases):
            yield [_alone(cases[done], name, compiled, maps) for name in names]
            done += 1


def _alone(case: Case, name: str, compiled: bool | None, maps: str | None) -> Outcome:
    """A case in a process of its own, which the framework may end instead of raising."""

    def survives(case: Case) -> list[Outcome]:
        with _processes(1, maps) as pool:
            try:
                return pool.submit(_outcomes, case, [name], compiled).result()
            except BrokenProcessPool:
                return []

    if outcomes := survives(case):
        return outcomes[0]
    if survives(case.plain):
        return Outcome(problems=("the framework ended its process",))
    return Outcome(excluded="the framework ends its process, without coordinates too")


def _processes(workers: int, maps: str | None) -> ProcessPoolExecutor:
    # Spawned, since a framework's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _start_worker, (maps,))


def _start_worker(maps: str | None) -> None:
    if maps is not None:
        position_bias.MOST_TOGETHER = _MOST_TOGETHER[maps]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores already
    # What frameworks say of themselves; in the calling process that is the caller's matter.
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)


def _outcomes(case: Case, names: Sequence[str], compiled: bool | None) -> list[Outcome]:
    modules = [backends.load(name) for name in names]
    weights, x, dy = case.draw()
    wanted = expected(case.network, weights, x, dy, PRECISIONS[case.dtype])
    return [_outcome(module, case, weights, x, dy, wanted, compiled) for module in modules]


def _outcome(
    backend: Any,
    case: Case,
    weights: Any,
    x: Array,
    dy: Array,
    wanted: dict[str, Expected],
    compiled: bool | None,
) -> Outcome:
    compiled = backend.COMPILED if compiled is None else compiled
    try:
        module = backend.build(case.network, weights, case.dtype)
        y, gradients = backend.evaluate(module, weights, x, dy, compiled=compiled)
        # Where no gradient is wanted, a layer may take another way.
        alone, _ = backend.evaluate(module, weights, x, compiled=compiled)
    except NotImplementedError as reason:
        return Outcome(excluded=str(reason))
    except Exception as error:  # noqa: BLE001  # whatever it is, the case reproduces it
        message = str(error).strip().partition("\n")[0]
        return Outcome(compiled=compiled, problems=(f"{type(error).__name__}: {message}",))
    found = {"y": y, _ALONE: alone, **gradients}
    wanted = {_ALONE: wanted["y"], **wanted}
    errors = {name: value.error(found[name]) for name, value in wanted.items()}
    unequal = [name for name, value in wanted.items() if not value.equals(found[name])]
    problems = [
        f"{name}: error {error:.3g} times the bound" for name, error in errors.items() if error > 1
    ]
    rounded = PRECISIONS[case.dtype].rounded
    problems += [
        f"{name}: not in {case.dtype}"
        for name, error in errors.items()
        if error <= 1 and not np.array_equal(found[name], rounded(found[name]))
    ]
    if case.exact:
        problems += [f"{name}: not bitwise equal" for name in unequal if errors[name] <= 1]
    return Outcome(
        compiled=compiled,
        forward=max(errors["y"], errors[_ALONE]),
        gradient=max(errors.values()),
        bitwise=not unequal,
        problems=tuple(problems),
    )
