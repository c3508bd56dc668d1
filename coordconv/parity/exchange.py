"""Files of weights between backends: each saves one, and all give the same answers from it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coordconv import backends, networks
from coordconv.grid import Array
from coordconv.parity.bounds import PRECISIONS, expected
from coordconv.parity.compare import likely_error, longest_axis
from coordconv.weights import load_weights, save_weights

NETWORKS = ("coord_cnn", "coord_classifier")
_BATCH = 50


@dataclass(frozen=True)
class Pair:
    """What one backend computes from the file of another.

    ``error`` is the largest difference of an output from the float64 reference in units of the
    bound that ``coordconv.parity.bounds.expected`` proves, which through many layers is far
    above what happens; ``likely`` is the same in units of what rounding makes likely, by the rule
    of :func:`coordconv.parity.compare`. To ``same`` of the inputs both backends give the same
    answer: the index of the largest output, or the sign of a single one.
    """

    network: str
    saved: str
    loaded: str
    inputs: int
    error: float
    likely: float
    same: int

    @property
    def ok(self) -> bool:
        """Whether both errors are within their bounds, and all answers the same."""
        return self.error <= 1 and self.likely <= 1 and self.same == self.inputs


@dataclass(frozen=True)
class ExchangeReport:
    """What :func:`.check_exchange` found: a pair for each two backends and each network."""

    pairs: list[Pair]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(pair.ok for pair in self.pairs)

    def to_json(self) -> str:
        """The report as JSON."""
        pairs = [asdict(pair) | {"ok": pair.ok} for pair in self.pairs]
        return json.dumps({"ok": self.ok, "pairs": pairs}, indent=2)


def check_exchange(
    chosen: Iterable[str | networks.Network],
    names: Iterable[str],
    inputs: int = 1000,
    seed: int = 0,
    *,
    advance: Callable[[], Any] = lambda: None,
) -> ExchangeReport:
    """Save networks in each backend, load each file in every backend, and run the same inputs.

    Args:
        chosen: the networks, or their names.
        names: the backends.
        inputs: the number of inputs, from the normal distribution.
        seed: what weights and inputs are sampled with.
        advance: called ``count_steps(names, inputs)`` times for each network.

    Raises:
        ValueError: a network or a backend is unknown.
        ImportError: a backend is not installed.

    Returns:
        A report. A pair fails if an output is farther from the float64 reference than its bound, or
        than rounding makes likely, or if the two backends answer an input differently.

    Example:
        >>> report = check_exchange(["coord_cnn"], backends.available_backends()[:1], inputs=1)
        >>> report.ok
        True
    """
    names = tuple(dict.fromkeys(names))
    found = (_pairs(network, names, inputs, seed, advance) for network in map(networks.get, chosen))
    return ExchangeReport([pair for pairs in found for pair in pairs])


def count_steps(names: Sequence[str], inputs: int) -> int:
    """How often :func:`check_exchange` calls ``advance`` for a network."""
    return -(-inputs // _BATCH) * (1 + len(names) ** 2)


def _pairs(
    network: networks.Network,
    names: Sequence[str],
    inputs: int,
    seed: int,
    advance: Callable[[], Any],
) -> list[Pair]:
    start = networks.initial_weights(network, seed)
    # Built with other weights, so that the test is whether those of a file replace them.
    other = networks.initial_weights(network, seed + 1)
    modules, read = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            backend = backends.load(name)
            _, export = backend.trainer(backend.build(network, start), start)
            file = Path(folder) / f"{name}.safetensors"
            save_weights(file, export())
            read[name] = load_weights(file)
            modules[name] = backend, backend.build(network, other)
    longest = longest_axis(shape for _, *shapes in network.shapes() for shape in shapes)
    rng, batches = np.random.default_rng(seed), []
    for _ in range(0, inputs, _BATCH):
        # All of the same length, so that a compiler sees one shape.
        x = rng.standard_normal((_BATCH, *network.input_shape)).astype(np.float32)
        wanted = expected(network, start, x, None)["y"]
        usual = likely_error(wanted.value, len(network.layers), longest, PRECISIONS["float32"].unit)
        batches.append((x, wanted, usual))
        advance()

    def run(saved: str, loaded: str) -> tuple[float, float, Array]:
        backend, module = modules[loaded]
        error, likely, answers = 0.0, 0.0, []
        for x, wanted, usual in batches:
            y, _ = backend.evaluate(module, read[saved], x)
            error = max(error, wanted.error(y))
            likely = max(likely, float(np.abs(y - wanted.value).max()) / usual)
            answers.append(_answers(y))
            advance()
        return error, likely, np.concatenate(answers)[:inputs]

    pairs = []
    for saved in names:
        found = {loaded: run(saved, loaded) for loaded in names}
        _, _, own = found[saved]
        for loaded, (error, likely, answers) in found.items():
            same = int((answers == own).sum())
            pairs.append(Pair(network.name, saved, loaded, inputs, error, likely, same))
    return pairs


def _answers(y: Array) -> Array:
    return y[:, 0] > 0 if y.shape[1] == 1 else y.argmax(axis=1)
