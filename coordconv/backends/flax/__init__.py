"""CoordConv for Flax NNX."""

from coordconv.backends.flax.changing import add_coords, remove_coords, with_coords
from coordconv.backends.flax.fusing import fuse
from coordconv.backends.flax.layers import AddCoords, CoordConv, CoordConvTranspose, PositionBias
from coordconv.backends.flax.networks import build
from coordconv.backends.flax.recording import recorded
from coordconv.backends.jax.files import from_state, read_state, write_state
from coordconv.backends.jax.networks import COMPILED, evaluate, trainer

__all__ = [
    "COMPILED",
    "AddCoords",
    "CoordConv",
    "CoordConvTranspose",
    "PositionBias",
    "add_coords",
    "build",
    "evaluate",
    "from_state",
    "fuse",
    "read_state",
    "recorded",
    "remove_coords",
    "trainer",
    "with_coords",
    "write_state",
]
