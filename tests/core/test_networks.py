"""The networks: the article's figures to the digit, and weights that start alike everywhere."""

import math
from dataclasses import replace

import numpy as np
import pytest

from coordconv import networks
from coordconv.backends import BACKENDS, available_backends
from coordconv.coordinates import Coordinates
from coordconv.geometry import ConvGeometry
from coordconv.networks import NETWORKS, Conv, Flatten, Linear, Network, ReLU, initial_weights

# The article's tables for batch 64, but for the names, which here are the article's attributes.
ARTICLE = {
    "plain_cnn": (
        [
            ("conv1", "Conv2d", (64, 3, 32, 32), (64, 32, 32, 32), 896),
            ("conv2", "Conv2d", (64, 32, 32, 32), (64, 64, 15, 15), 18496),
            ("conv3", "Conv2d", (64, 64, 15, 15), (64, 64, 7, 7), 36928),
            ("conv4", "Conv2d", (64, 64, 7, 7), (64, 64, 4, 4), 36928),
            ("flatten", "Flatten", (64, 64, 4, 4), (64, 1024), 0),
            ("linear1", "Linear", (64, 1024), (64, 64), 65600),
            ("linear2", "Linear", (64, 64), (64, 1), 65),
        ],
        158913,
        ("0.75", "25.59", "0.61", "26.95"),
    ),
    "coord_cnn": (
        [
            ("conv1", "Conv2d", (64, 3, 32, 32), (64, 32, 32, 32), 896),
            ("conv2", "Conv2d", (64, 32, 32, 32), (64, 64, 15, 15), 18496),
            ("conv3", "Conv2d", (64, 64, 15, 15), (64, 64, 7, 7), 36928),
            ("conv4.conv", "Conv2d", (64, 66, 7, 7), (64, 64, 4, 4), 38080),
            ("conv4", "CoordConv2d", (64, 64, 7, 7), (64, 64, 4, 4), 0),
            ("flatten", "Flatten", (64, 64, 4, 4), (64, 1024), 0),
            ("linear1", "Linear", (64, 1024), (64, 64), 65600),
            ("linear2", "Linear", (64, 64), (64, 1), 65),
        ],
        160065,
        ("0.75", "26.09", "0.61", "27.45"),
    ),
}


@pytest.mark.parametrize("name", ARTICLE)
def test_the_articles_figures(name: str) -> None:
    rows, parameters, sizes = ARTICLE[name]
    s = networks.summary(name, 64)
    assert (s.network, s.batch) == (name, 64)
    found = [(r.layer, r.kind, r.input_shape, r.output_shape, r.parameters) for r in s.rows]
    assert found == rows
    assert s.parameters == parameters
    figures = (s.input_mb, s.forward_backward_mb, s.parameters_mb, s.total_mb)
    assert tuple(f"{figure:.2f}" for figure in figures) == sizes
    assert s.total_mb == sum(figures[:3])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch", [1, 7])
def test_summary_counts_the_weights(name: str, batch: int) -> None:
    s = networks.summary(name, batch)
    assert s.parameters == sum(array.size for array in initial_weights(name).values())
    assert s.parameters == sum(row.parameters for row in s.rows)
    assert all(row.input_shape[0] == row.output_shape[0] == batch for row in s.rows)
    assert s.input_mb == batch * math.prod(NETWORKS[name].input_shape) * 4 / 2**20


def test_the_papers_networks() -> None:
    coord = networks.summary("coord_classifier")
    deconv = networks.summary("deconv_classifier")
    assert coord.parameters == 7553
    assert deconv.parameters > coord.parameters
    assert coord.rows[-1].output_shape == deconv.rows[-1].output_shape == (1, 4096)
    assert coord.rows[0].input_shape == (1, 4, 64, 64)
    assert deconv.rows[0].input_shape == (1, 2, 1, 1)
    widths = [
        layer.out_channels
        for layer in networks.get("coord_classifier").layers
        if isinstance(layer, Conv)
    ]
    assert widths == [32, 32, 64, 64, 1]
    assert networks.get("coord_classifier").coordinates() == {"conv1": Coordinates("xy")}


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
        "a.weight": (6, 2, 3),
        "a.coord_weight": (6, 2, 3),
        "b.weight": (6, 2, 2),
        "b.coord_weight": (4, 1, 2),
        "b.bias": (4,),
        "c.weight": (2, 56),
        "c.bias": (2,),
    }
    s = networks.summary(network, 3)
    assert [(r.layer, r.kind, r.output_shape) for r in s.rows] == [
        ("a.conv", "Conv1d", (3, 6, 7)),
        ("a", "CoordConv1d", (3, 6, 7)),
        ("b.conv", "ConvTranspose1d", (3, 4, 14)),
        ("b", "CoordConvTranspose1d", (3, 4, 14)),
        ("", "Flatten", (3, 56)),
        ("c", "Linear", (3, 2)),
    ]
    assert s.rows[0].input_shape == (3, 6, 9)
    weights = initial_weights(network)
    fan_in = {"a": (2 + 2) * 3, "b": (3 + 1) * 2, "c": 56}
    assert {x.name: x.fan_in for x in network.layers if x.weight_shapes()} == fan_in
    for name, array in weights.items():
        assert np.abs(array).max() <= np.float32(1 / np.sqrt(fan_in[name[0]]))


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_weights(name: str) -> None:
    weights = initial_weights(name, 3)
    again, other = initial_weights(name, 3), initial_weights(name, 4)
    network = networks.get(name)
    assert {k: a.shape for k, a in weights.items()} == network.weight_shapes()
    assert weights.coordinates == network.coordinates()
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


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="network must be one of plain_cnn, coord_cnn, .*'lenet'"):
        networks.get("lenet")
    with pytest.raises(ValueError, match="network must be one of"):
        networks.build("lenet", "torch")
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        networks.summary("plain_cnn", 0)
    with pytest.raises(ValueError, match="backend must be one of torch, paddle, flax, linen, got"):
        networks.build("plain_cnn", "tensorflow")


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = BACKENDS[name]
    absent = replace(backend, imports=("absent_framework",))
    monkeypatch.setitem(BACKENDS, name, absent)
    assert absent.missing == ("absent_framework",)
    assert name not in available_backends()
    install = rf"pip install 'coordconv\[{backend.extra}\]'"
    with pytest.raises(ImportError, match=f"backend '{name}' needs absent_framework: {install}"):
        networks.build("plain_cnn", name)
