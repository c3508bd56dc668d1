"""Summaries: the article's figures to the digit."""

import math

import pytest

from coordconv.coordinates import Coordinates
from coordconv.geometry import ConvGeometry
from coordconv.networks import NETWORKS, Conv, Flatten, Linear, Network, ReLU, initial_weights
from coordconv.summary import SummaryRow, summary

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
    s = summary(name, 64)
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
    s = summary(name, batch)
    assert s.parameters == sum(array.size for array in initial_weights(name).values())
    assert s.parameters == sum(row.parameters for row in s.rows)
    assert all(row.input_shape[0] == row.output_shape[0] == batch for row in s.rows)
    assert s.input_mb == batch * math.prod(NETWORKS[name].input_shape) * 4 / 2**20


def test_the_papers_networks() -> None:
    coord, deconv = summary("coord_classifier"), summary("deconv_classifier")
    assert coord.parameters == 7553
    assert deconv.parameters > coord.parameters
    assert coord.rows[-1].output_shape == deconv.rows[-1].output_shape == (1, 4096)
    assert coord.rows[0].input_shape == (1, 4, 64, 64)
    assert deconv.rows[0].input_shape == (1, 2, 1, 1)


def test_a_coordconv_is_two_rows() -> None:
    """The convolution inside, which has the parameters, and the layer around it."""
    geometry = ConvGeometry((2,), stride=2, transposed=True, groups=2)
    network = Network(
        "own",
        (4, 9),
        (
            Conv("a", 4, 6, ConvGeometry((3,), groups=2), Coordinates("xr"), bias=False),
            ReLU(),
            Conv("b", 6, 4, geometry, Coordinates("x")),
            Flatten(),
            Linear("c", 56, 2),
        ),
    )
    assert summary(network, 3).rows == (
        SummaryRow("a.conv", "Conv1d", (3, 4 + 2 * 2, 9), (3, 6, 7), 6 * 4 * 3),
        SummaryRow("a", "CoordConv1d", (3, 4, 9), (3, 6, 7), 0),
        SummaryRow("b.conv", "ConvTranspose1d", (3, 6 + 2, 7), (3, 4, 14), 8 * 2 * 2 + 4),
        SummaryRow("b", "CoordConvTranspose1d", (3, 6, 7), (3, 4, 14), 0),
        SummaryRow("", "Flatten", (3, 4, 14), (3, 56), 0),
        SummaryRow("c", "Linear", (3, 56), (3, 2), 2 * 56 + 2),
    )


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        summary("plain_cnn", 0)
    with pytest.raises(ValueError, match="network must be one of plain_cnn, coord_cnn, .*'lenet'"):
        summary("lenet")
