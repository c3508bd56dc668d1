"""CoordConv for Flax Linen."""

from coordconv.backends.jax.files import from_state, read_state
from coordconv.backends.jax.files import write_variables as write_state
from coordconv.backends.jax.networks import COMPILED, evaluate, trainer
from coordconv.backends.linen.changing import add_coords, remove_coords
from coordconv.backends.linen.fusing import fuse
from coordconv.backends.linen.layers import AddCoords, CoordConv, CoordConvTranspose, PositionBias
from coordconv.backends.linen.networks import build
from coordconv.backends.linen.recording import recorded

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
    "write_state",
]
