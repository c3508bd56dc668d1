"""The networks: their shapes, and weights that start alike everywhere."""

import re
from dataclasses import replace

import numpy as np
import pytest

from coordconv import networks
from coordconv.backends import BACKENDS, available_backends
from coordconv.coordinates import Coordinates
from coordconv.geometry import ConvGeometry
from coordconv.networks import (
    NETWORKS,
    Conv,
    Flatten,
    Linear,
    MeanPool,
    Network,
    ReLU,
    initial_weights,
)


def test_the_papers_networks() -> None:
    coord, deconv = map(networks.get, ("coord_classifier", "deconv_classifier"))
    assert coord.input_shape == (2, 64, 64)
    assert deconv.input_shape == (2, 1, 1)
    for network in (coord, deconv):
        assert [*network.shapes()][-1][2] == (4096,)
    widths = [layer.out_channels for layer in coord.layers if isinstance(layer, Conv)]
    assert widths == [32, 32, 64, 64, 1]
    assert coord.coordinates() == {"conv1": Coordinates("xy")}


def test_the_articles_networks_differ_in_one_layer() -> None:
    plain, coord = networks.get("plain_cnn"), networks.get("coord_cnn")
    differing = [(a, b) for a, b in zip(plain.layers, coord.layers, strict=True) if a != b]
    assert [(a.name, b.name) for a, b in differing] == [("conv4", "conv4")]
    assert coord.coordinates() == {"conv4": Coordinates.named("paddle")}
    assert plain.coordinates() == {}


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_chain(name: str) -> None:
    network = networks.get(name)
    shape = network.input_shape
    for _, before, after in network.shapes():
        assert before == shape
        shape = after
    names = [layer.name for layer in network.layers if layer.weight_shapes()]
    assert len(set(names)) == len(names)


def test_any_network() -> None:
    """One of the caller's own: 1-D, grouped, transposed, without a bias."""
    network = Network(
        "own",
        (4, 9),
        (
            Conv("a", 4, 6, ConvGeometry((3,), groups=2), Coordinates("xr"), bias=False),
            ReLU(),
            Conv(
                "b", 6, 4, ConvGeometry((2,), stride=2, transposed=True, groups=2), Coordinates("x")
            ),
            Flatten(),
            Linear("c", 56, 2),
        ),
    )
    assert networks.get(network) is network
    assert network.weight_shapes() == {
        "a.weight": (6, 2 + 2, 3),
        "b.weight": (6 + 2, 2, 2),
        "b.bias": (4,),
        "c.weight": (2, 56),
        "c.bias": (2,),
    }
    assert [(layer.kind, after) for layer, _, after in network.shapes()] == [
        ("CoordConv1d", (6, 7)),
        ("ReLU", (6, 7)),
        ("CoordConvTranspose1d", (4, 14)),
        ("Flatten", (56,)),
        ("Linear", (2,)),
    ]
    weights = initial_weights(network)
    fan_in = {"a": (2 + 2) * 3, "b": (3 + 1) * 2, "c": 56}
    assert {x.name: x.fan_in for x in network.layers if x.weight_shapes()} == fan_in
    for name, array in weights.items():
        assert np.abs(array).max() <= np.float32(1 / np.sqrt(fan_in[name[0]]))


def test_a_mean_leaves_the_channels_of_a_map_of_any_rank() -> None:
    for shape in ((5, 7), (5, 7, 2), (5, 7, 2, 3)):
        network = Network("own", shape, (MeanPool(), Linear("linear", 5, 2)))
        assert [(layer.kind, after) for layer, _, after in network.shapes()] == [
            ("MeanPool", (5,)),
            ("Linear", (2,)),
        ]
        assert [*network.weight_shapes()] == ["linear.weight", "linear.bias"]


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_weights(name: str) -> None:
    weights = initial_weights(name, 3)
    again, other = initial_weights(name, 3), initial_weights(name, 4)
    network = networks.get(name)
    assert {k: a.shape for k, a in weights.items()} == network.weight_shapes()
    for key, array in weights.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, again[key])
        assert not np.array_equal(array, other[key])
    for layer in network.layers:
        for key in layer.weight_shapes():
            array = weights[f"{layer.name}.{key}"]
            limit = 1 / np.sqrt(layer.fan_in)
            assert np.abs(array).max() <= np.float32(limit)
            if array.size > 500:  # uniform, so of mean 0, and all but reaching its limit
                assert abs(array.mean()) < 5 * limit / np.sqrt(3 * array.size)
                assert np.abs(array).max() > limit * (1 - 20 / array.size)


def test_a_kernel_is_drawn_at_once_over_features_and_coordinates() -> None:
    """As ``torch.nn`` draws that of a convolution over so many channels."""
    network = networks.get("coord_classifier")
    rng = np.random.default_rng(5)
    limit = 1 / np.sqrt(2 + 2)
    wanted = rng.uniform(-limit, limit, (32, 2 + 2, 1, 1)).astype(np.float32)
    np.testing.assert_array_equal(initial_weights(network, 5)["conv1.weight"], wanted)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="network must be one of plain_cnn, coord_cnn, .*'lenet'"):
        networks.get("lenet")
    with pytest.raises(ValueError, match="network must be one of"):
        networks.build("lenet", "torch")
    with pytest.raises(ValueError, match="backend must be one of torch, paddle, flax, linen, got"):
        networks.build("plain_cnn", "tensorflow")
    twice = Network("own", (5, 3), (MeanPool(), MeanPool()))
    with pytest.raises(ValueError, match="MeanPool must have a map .* got \\(5,\\)"):
        networks.build(twice, "torch")


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = BACKENDS[name]
    absent = replace(backend, imports=("absent_framework",))
    monkeypatch.setitem(BACKENDS, name, absent)
    assert absent.missing == ("absent_framework",)
    assert name not in available_backends()
    install = re.escape(backend.install)
    with pytest.raises(ImportError, match=f"backend '{name}' needs absent_framework: {install}"):
        networks.build("plain_cnn", name)
