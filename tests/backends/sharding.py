"""Tests of split inputs, which run in processes of their own: on two ranks, or on four devices.

A test file collects its :class:`Cases` and calls ``main`` where it is run as a script. There a
case returns its largest differences by name; what it raises, or skips by ``Lacking``, is told to
the process that runs pytest.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import integers, normal

from coordconv import Coordinates, Window, window
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Network, ReLU
from coordconv.parity.bounds import Expected, expected

ROWS, CHANNELS, OUT = 16, 2, 3


class Lacking(Exception):  # noqa: N818  # no error, but the reason of a skip
    """What an older framework lacks."""


class Cases(dict[str, Callable[..., Any]]):
    """The cases of a file by their names, and the decorator that collects them."""

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self[function.__name__] = function
        return function


def main(cases: Cases, *args: Any) -> None:
    """Run the cases in their order up to the first that fails, and write what came of each."""
    found = Path(os.environ["SHARDING_FOUND"])
    results = {}
    for name, function in cases.items():
        start = time.perf_counter()
        try:
            results[name] = {"largest": function(*args) or {}}
        except Lacking as reason:
            results[name] = {"lacking": str(reason)}
        except Exception:  # noqa: BLE001  # told to the process of pytest
            results[name] = {"error": traceback.format_exc()}
        results[name]["seconds"] = round(time.perf_counter() - start, 1)
        found.write_text(json.dumps(results), encoding="utf-8")
        if "error" in results[name]:  # the other rank may wait for this one
            sys.exit(1)


def run(path: str, ranks: int = 1, **variables: str) -> list[dict[str, Any]]:
    """What the cases of a file came to on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        ports = [str(port) for port in _free_ports(ranks)]
        shared = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(Path(path).parent)]),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": ports[0],
            "SHARDING_PORTS": ",".join(ports),
            "SHARDING_FOLDER": folder,
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        results = [Path(folder, f"rank{rank}.json") for rank in range(ranks)]
        running = [
            subprocess.Popen(
                [sys.executable, path],
                env=shared | {"RANK": str(rank), "SHARDING_FOUND": str(result)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, result in enumerate(results)
        ]
        try:
            printed = [each.communicate(timeout=300)[0] for each in running]
        finally:
            for each in running:
                each.kill()
        return [
            {"printed": text, **(json.loads(result.read_text()) if result.exists() else {})}
            for text, result in zip(printed, results, strict=True)
        ]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]


def check(results: list[Mapping[str, Any]], name: str) -> None:
    """Hold that a case ran on every rank, and say how far it was off."""
    for rank, result in enumerate(results):
        came = result.get(name, {"error": f"not reached; printed:\n{result['printed']}"})
        if "lacking" in came:
            pytest.skip(came["lacking"])
        assert "error" not in came, f"rank {rank}: {came['error']}"
        print(f"rank {rank} of {len(results)} ran {name} in {came['seconds']} s: {came['largest']}")


def with_outside(network: Network, outside: str) -> Network:
    """The same with other coordinates beyond the frame."""
    layers = (
        replace(layer, coords=replace(layer.coords, outside=outside))
        if isinstance(layer, Conv) and layer.coords
        else layer
        for layer in network.layers
    )
    return replace(network, layers=tuple(layers))


def network(coords: Any = "xyr", outside: str = "extend", align: str = "corners") -> Network:
    """Two layers, the first with a stride."""
    seen = Coordinates(coords, outside=outside, align=align)
    layers = (
        Conv("first", CHANNELS, 4, ConvGeometry((3, 3), stride=(2, 1), padding=1), seen),
        ReLU(),
        Conv("second", 4, OUT, ConvGeometry((3, 3), padding=1), seen),
    )
    return Network("split", (CHANNELS, ROWS, 8), layers)


# Every sum of these is exact, so that its order does not matter.
EXACT = network("xy", align="edges")
KINDS: dict[str, tuple[Network, Callable[..., Any]]] = {
    "exact": (EXACT, integers),
    "real": (network(), normal),
}


def data(network: Network, make: Callable[..., Any], batch: int = 4) -> tuple[Any, Any, Any]:
    """Weights, an input and the gradient of the output."""
    shapes = network.weight_shapes()
    weights = {name: make(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    *_, (_, _, out) = network.shapes()
    x = make(batch, *network.input_shape, seed=len(shapes))
    return weights, x, make(batch, *out, seed=len(shapes) + 1)


def wanted(network: Network, weights: Any, x: Any, dy: Any) -> dict[str, Expected]:
    """What one process computes of the whole, and the bound of a computation by windows."""
    with window(Window(0, 1)):
        return expected(network, weights, x, dy)


def hold(
    kind: str, want: Mapping[str, Expected], found: Mapping[str, Any], label: str = ""
) -> dict[str, float]:
    """Hold arrays to what is wanted, bitwise where it is exact, and return how far they are off."""
    largest = {}
    for name, array in found.items():
        array = np.asarray(array)
        largest[" ".join(filter(None, (label, kind, name)))] = float(
            np.abs(array - want[name].value).max()
        )
        if kind == "exact":
            assert want[name].equals(array), (name, largest)
        else:
            assert want[name].error(array) <= 1, (name, want[name].error(array), largest)
    return largest
