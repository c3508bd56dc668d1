"""The lines of docs/coordinates.md in each backend's layers, within the definition's bound."""

from contextlib import nullcontext

import numpy as np
import pytest

import coordconv
from coordconv import Coordinates, backends
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Network, initial_weights
from coordconv.parity.bounds import expected
from test_uses import LINES, NAMES, USES


@pytest.mark.parametrize("key", LINES, ids=lambda key: f"{key[0]}-{key[1]}")
def test_a_layer_takes_the_line(backend, key):
    shape, given, *_ = USES[key](8, 34, np.random.default_rng(3))
    said = eval(f"dict({LINES[key]})", NAMES | given)
    window = said.pop("window", None)
    coords = Coordinates.resolve(said["coords"], len(shape))
    conv = Conv("conv", 2, 3, ConvGeometry((3,) * len(shape), padding=1), coords)
    network = Network("use", (2, *map(int, shape)), (conv,))
    weights = initial_weights(network, 1)
    batch = 3 if window is None else max(len(np.atleast_1d(end)) for end in window.on("x"))
    x = np.random.default_rng(0).standard_normal((batch, *network.input_shape)).astype(np.float32)
    load = backends.load(backend)
    with nullcontext() if window is None else coordconv.window(window):
        found, _ = load.evaluate(load.build(network, weights), weights, x)
        assert expected(network, weights, x, None)["y"].error(found) <= 1
