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
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from coordconv import backends, position_bias
from coordconv.grid import Array
from coordconv.parity.bounds import PRECISIONS, Expected, expected
from coordconv.parity.cases import Case
from coordconv.weights import Weights
from coordconv.windows import window

if TYPE_CHECKING:
    from coordconv.backends.protocols import Backend

WAYS = (position_bias.APPEND, position_bias.MAP)

# The output of a second call, in which no gradient is wanted: there a layer may compute otherwise.
_WITHOUT_GRADIENTS = "y without gradients"


@dataclass
class Tally:
    """What one backend made of the cases.

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

    @classmethod
    def of(cls, backend: str, case: Case, compiled: bool = False, **found: Any) -> Tally:
        """The tally of a single case that the backend ran."""
        return cls(
            backend,
            layers=int(case.is_layer),
            networks=int(not case.is_layer),
            exact=int(case.exact),
            kinds=Counter([case.kind] if case.is_layer else []),
            modes=Counter([f"{case.dtype}, {'compiled' if compiled else 'eager'}"]),
            **found,
        )

    def add(self, other: Tally) -> None:
        """Count more cases."""
        for name, value in vars(other).items():
            if name != "backend":
                own = getattr(self, name)
                setattr(self, name, max(own, value) if isinstance(own, float) else own + value)


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
            ``coordconv.position_bias`` wherever both are right; None leaves the choice to the
            layers.
        workers: the number of processes; 1 runs the cases in this process.

    Raises:
        ValueError: a backend that is unknown, or another ``way``.
        ImportError: a backend that is not installed.

    Returns:
        A report. A case fails if an element of the output or of a gradient is off by more than
        its bound or is no value of the case's type, if an exact case is not equal to the last
        bit, or if the framework raises. A case is excluded, and counted under the reason, if the
        framework lacks an option, or ends its process without coordinates too, which takes more
        than one process to see.

    Example:
        >>> from coordconv.parity import generate
        >>> check_layers(generate(1), backends.available_backends()[:1]).ok
        True
    """
    if way not in (None, *WAYS):
        raise ValueError(f"way must be None or one of {', '.join(WAYS)}, got {way!r}")
    names = tuple(dict.fromkeys(names))
    report = CaseReport([Tally(name) for name in names])
    run = partial(_tallies, compiled=compiled, way=way)
    found = (
        map(run, cases, repeat(names))
        if workers == 1
        else _in_processes(run, cases, names, workers, compiled)
    )
    for tallies in found:
        for tally, more in zip(report.tallies, tallies, strict=True):
            tally.add(more)
        advance()
    return report


def _in_processes(
    run: Callable[..., list[Tally]],
    cases: Sequence[Case],
    names: Sequence[str],
    workers: int,
    compiled: bool | None,
) -> Iterator[list[Tally]]:
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
            yield [_alone(run, cases[done], name, compiled) for name in names]
            done += 1


def _alone(run: Callable[..., list[Tally]], case: Case, name: str, compiled: bool | None) -> Tally:
    """A case in a process of its own, which the framework may end instead of raising."""
    for each in (case, case.plain):
        with _processes(1) as pool, suppress(BrokenProcessPool):
            (tally,) = pool.submit(run, each, [name]).result()
            if each is case:
                return tally
            failure = f"the framework ended its process in {case!r}"
            return Tally.of(name, case, _mode(backends.load(name), compiled), failures=[failure])
    reason = "the framework ends its process, without coordinates too"
    return Tally(name, excluded=Counter([reason]))


def _processes(workers: int) -> ProcessPoolExecutor:
    # Spawned, since a framework's threads do not survive a fork.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)


def _start_worker() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores already
    # What frameworks report while they run; in the calling process that is up to the caller.
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)


def _tallies(
    case: Case, names: Sequence[str], compiled: bool | None, way: str | None
) -> list[Tally]:
    """What each of the backends makes of a case, with its layers computing in that ``way``."""
    before = position_bias.FORCED
    position_bias.FORCED = way or before
    try:
        used = {name: backends.load(name) for name in names}
        weights, x, dy = data = case.data()
        with window(case.window):
            wanted = expected(case.network, weights, x, dy, PRECISIONS[case.dtype])
            wanted = {_WITHOUT_GRADIENTS: wanted["y"], **wanted}
            return [_tally(*item, case, data, wanted, compiled) for item in used.items()]
    finally:
        position_bias.FORCED = before


def _mode(backend: Backend, compiled: bool | None) -> bool:
    """Whether a backend's compiler is used: if nobody says, as most of its users do."""
    return backend.COMPILED if compiled is None else compiled


def _tally(
    name: str,
    backend: Backend,
    case: Case,
    data: tuple[Weights, Array, Array],
    wanted: dict[str, Expected],
    compiled: bool | None,
) -> Tally:
    weights, x, dy = data
    compiled = _mode(backend, compiled)
    try:
        module = backend.build(case.network, weights, case.dtype)
        y, gradients = backend.evaluate(module, weights, x, dy, compiled=compiled)
        without, _ = backend.evaluate(module, weights, x, compiled=compiled)
    except NotImplementedError as reason:
        return Tally(name, excluded=Counter([str(reason)]))
    except Exception as error:  # noqa: BLE001  # whatever it is, the case reproduces it
        message = str(error).strip().partition("\n")[0]
        failure = f"{type(error).__name__}: {message} in {case!r}"
        return Tally.of(name, case, compiled, failures=[failure])
    found = {"y": y, _WITHOUT_GRADIENTS: without, **gradients}
    errors = {array: value.error(found[array]) for array, value in wanted.items()}
    unequal = [array for array, value in wanted.items() if not value.equals(found[array])]
    problems = []
    for array, share in errors.items():
        if share > 1:
            problems.append(f"{array}: error {share:.3g} times the bound")
            continue
        if not np.array_equal(found[array], PRECISIONS[case.dtype].rounded(found[array])):
            problems.append(f"{array}: not in {case.dtype}")
        if case.exact and array in unequal:
            problems.append(f"{array}: not bitwise equal")
    return Tally.of(
        name,
        case,
        compiled,
        bitwise=int(case.exact and not unequal),
        forward_error=max(errors["y"], errors[_WITHOUT_GRADIENTS]),
        gradient_error=max(errors.values()),
        failures=[f"{'; '.join(problems)} in {case!r}"] if problems else [],
    )
