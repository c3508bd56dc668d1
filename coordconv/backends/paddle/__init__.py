"""CoordConv for Paddle."""

import warnings

with warnings.catch_warnings():  # of a compiler cache, which only builders of extensions miss
    warnings.filterwarnings("ignore", "No ccache found")
    import paddle  # noqa: F401

from coordconv.backends.paddle import quantizing  # noqa: F401  # tells Paddle of CoordConv2D
from coordconv.backends.paddle.changing import add_coords, remove_coords
from coordconv.backends.paddle.files import from_state, read_state
from coordconv.backends.paddle.fusing import fuse
from coordconv.backends.paddle.layers import (
    AddCoords,
    CoordConv1D,
    CoordConv1DTranspose,
    CoordConv2D,
    CoordConv2DTranspose,
    CoordConv3D,
    CoordConv3DTranspose,
)
from coordconv.backends.paddle.networks import (
    COMPILED,
    build,
    evaluate,
    recorded,
    trainer,
    write_state,
)
from coordconv.backends.paddle.position import PositionBias1D, PositionBias2D, PositionBias3D
from coordconv.tape import adapt_state_dict

__all__ = [
    "COMPILED",
    "AddCoords",
    "CoordConv1D",
    "CoordConv1DTranspose",
    "CoordConv2D",
    "CoordConv2DTranspose",
    "CoordConv3D",
    "CoordConv3DTranspose",
    "PositionBias1D",
    "PositionBias2D",
    "PositionBias3D",
    "adapt_state_dict",
    "add_coords",
    "build",
    "evaluate",
    "from_state",
    "fuse",
    "read_state",
    "recorded",
    "remove_coords",
    "trainer",
    "write_state",
]
