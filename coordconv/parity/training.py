"""Training in every backend: the same start, batches and optimiser must give the same weights.

How far float32 may lead a weight away in so many steps is partly derived and partly measured, all
in float64 NumPy and without any framework:

- Derived, for each element: what rounding the last sum of a gradient may do, and the optimiser's
  own arithmetic. Adam's moments carry intervals, so that an element whose gradient may be of either
  sign may move by the whole learning rate in either direction. The bounds of all steps are added
  up, and nothing cancels.
- Measured: what the sums before the last one, and the errors of the weights so far, do to a
  gradient. Beside the exact run there are perturbed runs, in which every sum is off, at random up
  or down, by the size that rounding errors are expected to reach, and whose weights go where that
  leads. The largest distance of their gradients from the exact ones in an array counts for every
  element of the array, since rounding changes the sign of another ReLU in every run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from coordconv import backends, networks
from coordconv.grid import Array, coordinate_grid
from coordconv.parity.bounds import PRECISIONS, Expected, Precision, propagated

STEPS = 50
EVERY = 10  # steps between two comparisons
BETAS = (0.9, 0.999)
_FLOAT32 = PRECISIONS["float32"]
_UNIT = _FLOAT32.unit
_BATCHES = 4
_HALF = 4  # pixels on each side of a square's centre: it is 9 wide, as the paper's
_PERTURBED_RUNS = 2


class _ProbablePrecision(Precision):
    """Rounding errors as often up as down: that of a sum grows as the root of its terms' number.

    Source:
        Higham and Mary, *A new approach to probabilistic rounding error analysis*, 2019.
    """

    def error(self, size: Array, terms: float, roundings: int) -> Array:
        return super().error(size, math.sqrt(terms), roundings)


_PROBABLE = _ProbablePrecision("float32", _UNIT)


@dataclass(frozen=True)
class Task:
    """What is trained, and how.

    Each sample is about a square on a canvas. A network of one output is given a picture of the
    white square on black, and learns the x of the square's centre by the squared error. A network
    with an output for each pixel is given the centre's x and y, tiled over the canvas, and learns
    to name the centre's pixel by the cross-entropy.

    ``optimizer`` is ``"sgd"`` or ``"adam"``, ``epsilon`` Adam's constant beside the root of the
    second moment; weights and the four batches, which take turns, are sampled with ``seed``.
    """

    network: networks.Network
    optimizer: str
    learning_rate: float
    batch: int = 4
    seed: int = 0
    epsilon: float = 1e-8

    @property
    def name(self) -> str:
        """The network, its canvas and the optimiser."""
        canvas = "x".join(map(str, self.network.input_shape[1:]))
        return f"{self.network.name} {canvas}, {self.optimizer}"

    def update_rule(self) -> Callable[[Expected], Expected]:
        """From the gradients of an array, step by step, to what is subtracted at a rate of 1."""
        return _Adam(self.epsilon).update if self.optimizer == "adam" else _sgd

    @property
    def start(self) -> dict[str, Array]:
        """The initial weights, float32."""
        return networks.initial_weights(self.network, self.seed)

    def batches(self, steps: int) -> Iterator[tuple[Array, Array]]:
        """The input and target of each step."""
        channels, *shape = self.network.input_shape
        grid = coordinate_grid(tuple(shape))
        rng = np.random.default_rng(self.seed)
        least, most = _HALF, np.array(shape)[:, None, None] - _HALF
        centres = rng.integers(least, most, (2, _BATCHES, self.batch))
        for step in range(steps):
            rows, columns = centres[:, step % _BATCHES]
            x = np.zeros((self.batch, channels, *shape), np.float32)
            if self._regresses:
                for image, row, column in zip(x, rows, columns, strict=True):
                    image[:, row - _HALF : row + _HALF + 1, column - _HALF : column + _HALF + 1] = 1
                yield x, grid[0, rows, columns][:, None]
            else:
                x += grid[:, rows, columns].T[:, :, None, None]
                yield x, rows * shape[1] + columns

    def loss(self, y: Array, target: Array) -> tuple[float, Expected]:
        """The loss, and its gradient with a bound on the error of float32 for the same ``y``.

        A framework's ``exp`` and ``log`` are taken to be off by four roundings at most.
        """
        if self._regresses:
            difference = y - target
            gradient = 2 * difference / difference.size
            return float((difference**2).mean()), Expected(gradient, 4 * _UNIT * np.abs(gradient))
        logits = y - y.max(axis=1, keepdims=True)
        total = np.exp(logits).sum(axis=1, keepdims=True)
        gradient = np.exp(logits) / total
        # Errors of the argument of exp (from which a framework may subtract the logarithm of the
        # sum) are absolute ones; then come the sum of all classes, and exp, log and the rest.
        roundings = np.abs(logits) + np.log(total) + y.shape[1] + 12
        error = gradient * roundings * _UNIT
        chosen = np.arange(len(y)), target
        loss = float((np.log(total)[:, 0] - logits[chosen]).mean())
        gradient[chosen] -= 1
        error += 4 * _UNIT * np.abs(gradient)
        return loss, Expected(gradient / len(y), error / len(y))

    def gradients(
        self,
        weights: Mapping[str, Array],
        batch: tuple[Array, Array],
        precision: Precision,
        passed_on: Callable[[Expected], Expected],
    ) -> tuple[float, dict[str, Expected]]:
        """The loss of a batch, and the gradients as :func:`propagated` gives them."""
        x, target = batch
        found = propagated(
            self.network, weights, x, lambda y: self.loss(y, target)[1], precision, passed_on
        )
        loss, _ = self.loss(found["y"].value, target)
        return loss, found

    @property
    def _regresses(self) -> bool:
        *_, (_, _, output_shape) = self.network.shapes()
        return output_shape == (1,)


def _sgd(gradient: Expected) -> Expected:
    # the learning rate is rounded, and so is its product with the gradient
    return gradient.widened(3 * _UNIT * gradient.largest)


class _Adam:
    """Adam of one array, with intervals for what rounding makes of the moments."""

    def __init__(self, epsilon: float) -> None:
        self._epsilon = epsilon
        self._steps, self._moments = 0, [Expected.exact(np.zeros(()))] * 2

    def update(self, gradient: Expected) -> Expected:
        """What is subtracted from the array, for a learning rate of 1."""
        self._steps += 1
        size, off = np.abs(gradient.value), gradient.bound
        first = self._moment(0, gradient)
        second = self._moment(1, Expected(size**2, (2 * size + off) * off))
        largest = np.sqrt(second.value + second.bound) + self._epsilon
        least = np.sqrt(np.maximum(second.value - second.bound, 0)) + self._epsilon
        high, low = first.value + first.bound, first.value - first.bound
        high = np.where(high > 0, high / least, high / largest)
        low = np.where(low < 0, low / least, low / largest)
        move = first.value / (np.sqrt(second.value) + self._epsilon)
        limit = self._limit()
        bound = np.maximum(np.minimum(high, limit) - move, move - np.maximum(low, -limit))
        return Expected(move, np.maximum(bound, 0) + 8 * _UNIT * np.abs(move))

    def _moment(self, which: int, given: Expected) -> Expected:
        """The corrected running mean.

        Most of its error comes from ``1 - beta``, which float32 holds with few digits.
        """
        beta, old = BETAS[which], self._moments[which]
        # Some implementations add a share of the difference of the two.
        added = (1 - beta) * (given.largest + old.largest)
        rounding = _UNIT * (4 * beta * old.largest + (4 + 1 / (1 - beta)) * added)
        mean = self._moments[which] = Expected(
            beta * old.value + (1 - beta) * given.value,
            beta * old.bound + (1 - beta) * given.bound + rounding,
        )
        power = beta**self._steps
        correction = 1 - power
        # beta itself is rounded, and so is each of its powers
        off = mean.largest * ((2 * self._steps + 2) * power / correction + 2) * _UNIT
        return Expected(mean.value / correction, (mean.bound + off) / correction)

    def _limit(self) -> float:
        """The largest move there can be, whatever the gradients were (Cauchy and Schwarz)."""
        ages = np.arange(self._steps)
        first, second = ((1 - b) * b**ages / (1 - b**self._steps) for b in BETAS)
        return float(np.sqrt((first**2 / second).sum()))


_CNN = networks.get("coord_cnn")
_CLASSIFIER = replace(networks.get("coord_classifier"), input_shape=(2, 16, 16))
TASKS = (
    Task(_CNN, "sgd", 0.05),
    Task(_CNN, "adam", 0.001),
    Task(_CLASSIFIER, "sgd", 0.2),
    # Many gradients of the classifier are 0 but for rounding, since softmax ignores what all logits
    # have in common. With the usual epsilon Adam would divide that noise by its own size, and even
    # two runs of the same framework would end at different weights.
    Task(_CLASSIFIER, "adam", 0.001, epsilon=1e-4),
)


class _PerturbedRun:
    """Training in float64 in which every sum is off, as the module describes it."""

    def __init__(self, task: Task, seed: int) -> None:
        self._task = task
        self._weights = {n: array.astype(np.float64) for n, array in task.start.items()}
        self._rules = {name: task.update_rule() for name in self._weights}
        self._rng = np.random.default_rng((task.seed, seed))
        # The same signs in every step: errors that push in one direction lead the farthest.
        self._signs = {n: self._rng.choice((-1.0, 1.0), a.shape) for n, a in self._weights.items()}

    def step(self, batch: tuple[Array, Array]) -> dict[str, Expected]:
        """Train on a batch; the gradients are the result."""
        _, gradients = self._task.gradients(self._weights, batch, _PROBABLE, self._perturbed)
        for name, rule in self._rules.items():
            sign, gradient, array = self._signs[name], gradients[name], self._weights[name]
            move = rule(Expected.exact(gradient.value + sign * gradient.bound))
            array = array - self._task.learning_rate * (move.value + sign * move.bound)
            self._weights[name] = array + sign * _UNIT * np.abs(array)
        return gradients

    def _perturbed(self, found: Expected) -> Expected:
        """A sum off by all of its bound, and taken as it is by the next layer.

        So errors cancel as they do in a framework, and a ReLU's sign changes where it would.
        """
        if not found.bound.any():
            return found
        down = self._rng.random(found.value.shape) < 0.5
        return Expected.exact(found.value + np.where(down, -found.bound, found.bound))


@dataclass(frozen=True)
class TrainingOutcome:
    """How one backend trained one task.

    By the number of steps, ``errors`` has the largest deviation of a weight in units of its bound,
    and ``worst`` the name of that weight; ``losses`` has every step's.
    """

    task: str
    backend: str
    errors: dict[int, float]
    worst: dict[int, str]
    losses: list[float]

    @property
    def ok(self) -> bool:
        """Whether every weight stayed within its bound."""
        return all(error <= 1 for error in self.errors.values())


@dataclass(frozen=True)
class ExactRun:
    """Training in float64: all losses and, by the number of steps, the weights with their bounds.

    The weights are those of every tenth step.
    """

    task: Task
    losses: list[float]
    weights: dict[int, dict[str, Expected]]

    def check_backend(
        self, name: str, advance: Callable[[], Any] = lambda: None
    ) -> TrainingOutcome:
        """Train the same task in a backend, and compare the weights with the exact run's."""
        backend, start = backends.load(name), self.task.start
        module = backend.build(self.task.network, start)
        step, export = backend.trainer(module, start, self.task.optimizer, self.task.epsilon)
        outcome = TrainingOutcome(self.task.name, name, {}, {}, [])
        for count, (x, target) in enumerate(self.task.batches(len(self.losses)), 1):
            outcome.losses.append(step(x, target, self.task.learning_rate))
            if count in self.weights:
                found = export()
                errors = {n: w.error(found[n]) for n, w in self.weights[count].items()}
                outcome.worst[count] = max(errors, key=errors.__getitem__)
                outcome.errors[count] = max(errors.values())
            advance()
        return outcome


def exact_run(
    task: Task, steps: int = STEPS, advance: Callable[[], Any] = lambda: None
) -> ExactRun:
    """Train in float64, with a bound on where float32 may end, as the module describes it.

    Example:
        >>> small = replace(TASKS[2].network, input_shape=(2, 9, 9))
        >>> found = exact_run(Task(small, "sgd", 0.1, batch=1), 10)
        >>> kernel = found.weights[10]["conv1.weight"]
        >>> kernel.value.shape, bool((kernel.bound < 1e-5).all())
        ((32, 4, 1, 1), True)
    """
    found, rate = ExactRun(task, [], {}), task.learning_rate
    perturbed = [_PerturbedRun(task, seed) for seed in range(_PERTURBED_RUNS)]
    rules = {name: task.update_rule() for name in task.start}
    weights = {name: Expected.exact(array) for name, array in task.start.items()}
    for count, batch in enumerate(task.batches(steps), 1):
        values = {name: weight.value for name, weight in weights.items()}
        loss, gradients = task.gradients(values, batch, _FLOAT32, lambda y: Expected.exact(y.value))
        others = [run.step(batch) for run in perturbed]
        found.losses.append(loss)
        for name, rule in rules.items():
            gradient, weight = gradients[name], weights[name]
            distance = max(np.abs(other[name].value - gradient.value).max() for other in others)
            move = rule(gradient.widened(distance))
            moved = Expected(weight.value - rate * move.value, weight.bound + rate * move.bound)
            weights[name] = moved.widened(_UNIT * moved.largest)
        if count % EVERY == 0:
            found.weights[count] = dict(weights)
        advance()
    return found


@dataclass(frozen=True)
class TrainingReport:
    """What :func:`.check_training` found; ``exact_losses`` are the exact run's, by the task."""

    exact_losses: dict[str, list[float]]
    outcomes: list[TrainingOutcome]

    @property
    def ok(self) -> bool:
        """Whether every weight stayed within its bound."""
        return all(outcome.ok for outcome in self.outcomes)

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2)


def check_training(
    tasks: Iterable[Task],
    names: Iterable[str],
    steps: int = STEPS,
    advance: Callable[[], Any] = lambda: None,
) -> TrainingReport:
    """Train every task in every backend, and compare with the exact run.

    Args:
        tasks: what to train.
        names: the backends.
        steps: the number of steps.
        advance: called after each step, of the exact run too.

    Raises:
        ValueError: a backend is unknown.
        ImportError: a backend is not installed.

    Returns:
        A report. An outcome fails if a weight is off by more than its bound at any comparison.

    Example:
        >>> small = Task(replace(TASKS[2].network, input_shape=(2, 9, 9)), "sgd", 0.1, batch=1)
        >>> check_training([small], backends.available_backends()[:1], 10).ok
        True
    """
    report, names = TrainingReport({}, []), tuple(names)
    for task in tasks:
        exact = exact_run(task, steps, advance)
        report.exact_losses[task.name] = exact.losses
        report.outcomes.extend(exact.check_backend(name, advance) for name in names)
    return report


def plot_training(path: str | os.PathLike[str], report: TrainingReport) -> None:
    """Write a picture: for each task the loss curves, and beneath them the deviations."""
    from matplotlib.figure import Figure  # only the picture needs it

    figure = Figure(figsize=(4 * len(report.exact_losses), 6), layout="constrained")
    axes = figure.subplots(2, len(report.exact_losses), squeeze=False, sharex="col")
    for (above, below), (task, losses) in zip(axes.T, report.exact_losses.items(), strict=True):
        steps = range(1, len(losses) + 1)
        above.plot(steps, losses, color="0.8", linewidth=7, label="float64")
        outcomes = [outcome for outcome in report.outcomes if outcome.task == task]
        for i, outcome in enumerate(outcomes):
            style: dict[str, Any] = {"color": f"C{i}", "label": outcome.backend}
            dashes = (3 * i, (3, 3 * (len(outcomes) - 1))) if len(outcomes) > 1 else "-"
            above.plot(steps, outcome.losses, linestyle=dashes, linewidth=2, **style)
            below.plot(outcome.errors.keys(), outcome.errors.values(), marker="o", **style)
        below.axhline(1, color="black", linewidth=1, linestyle="--")
        above.set(title=task)
        below.set(yscale="log", xlabel="step")
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("largest deviation of a weight,\nin units of the bound")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    figure.savefig(path, dpi=110)
