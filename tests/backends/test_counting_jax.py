"""What ``tabulate`` of NNX and of Linen counts for a CoordConv: what its way of computing takes.

Both count the operations of the program that XLA is given.
"""

import inspect
import re

import pytest

pytest.importorskip("flax")

import jax
from flax import linen as nn
from flax import nnx
from flax_cases import draw

from coordconv import position_bias
from coordconv.backends import flax, linen

C, OUT, N = 3, 8, 2
SHAPE = (16, 20)
ELEMENTS = 2 * 16 * 20 * OUT  # of an output for a batch of two


def flops(table):
    """The two counts in the first row of a table: of the output, and with its gradient."""
    row = next(line for line in table.split("\n") if re.search(r"float32.*│ \d+ +│ \d+ +│", line))
    return tuple(int(cell) for cell in row.split("│") if cell.strip().isdigit())


def in_nnx(module, channels=C):
    x = draw(SHAPE, channels)
    counted = {"compute_flops": True, "compute_vjp_flops": True, "console_kwargs": {"width": 200}}
    return flops(re.sub(r"\x1b\[[\d;]*m", "", nnx.tabulate(module, x, **counted)))


def in_linen(module, channels=C):
    counted = {"compute_flops": True, "compute_vjp_flops": True, "console_kwargs": {"width": 200}}
    table = nn.tabulate(module, jax.random.key(0), **counted)(draw(SHAPE, channels))
    return flops(re.sub(r"\x1b\[[\d;]*m", "", table))


LAYERS = {
    "nnx": (
        in_nnx,
        lambda channels: nnx.Conv(channels, OUT, (3, 3), rngs=nnx.Rngs(0)),
        lambda: flax.CoordConv(C, OUT, (3, 3), rngs=nnx.Rngs(0)),
    ),
    "linen": (
        in_linen,
        lambda channels: nn.Conv(OUT, (3, 3)),
        lambda: linen.CoordConv(OUT, (3, 3)),
    ),
}


NEEDS_COUNTS = pytest.mark.skipif(
    "compute_flops" not in inspect.signature(nnx.tabulate).parameters,
    reason="this release of NNX counts no operations",
)


@pytest.fixture(params=[pytest.param("nnx", marks=NEEDS_COUNTS), "linen"])
def layers(request):
    return LAYERS[request.param]


def test_append_takes_what_a_convolution_over_all_channels_takes(layers, monkeypatch):
    monkeypatch.setattr(position_bias, "FORCED", "append")
    count, plain, ours = layers
    assert count(ours()) == count(plain(C + N), C + N)


def test_map_takes_a_convolution_over_the_features_and_one_map(layers, monkeypatch):
    monkeypatch.setattr(position_bias, "FORCED", "map")
    count, plain, ours = layers
    (found, _), (features, _) = count(ours()), count(plain(C))
    # P of one sample is less than a convolution over N channels; adding it is three operations an
    # element at most, as the program repeats P over the batch by a product.
    of_map = count(plain(N), N)[0] / 2
    assert features + ELEMENTS < found < features + 3 * ELEMENTS + of_map


@NEEDS_COUNTS
def test_a_fused_layer_takes_a_convolution_and_one_addition():
    fused = flax.CoordConv(C, OUT, (3, 3), rngs=nnx.Rngs(0)).fuse(SHAPE)
    plain = nnx.Conv(C, OUT, (3, 3), rngs=nnx.Rngs(0))
    assert in_nnx(fused)[0] == in_nnx(plain)[0] + ELEMENTS
