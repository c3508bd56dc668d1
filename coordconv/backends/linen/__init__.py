"""CoordConv for Flax Linen."""

from coordconv.backends.linen.files import from_state, read_state, write_state
from coordconv.backends.linen.layers import AddCoords, CoordConv, CoordConvTranspose
from coordconv.backends.linen.networks import COMPILED, build, evaluate, trainer
from coordconv.backends.linen.recording import recorded

__all__ = [
    "COMPILED",
    "AddCoords",
    "CoordConv",
    "CoordConvTranspose",
    "build",
    "evaluate",
    "from_state",
    "read_state",
    "recorded",
    "trainer",
    "write_state",
]
