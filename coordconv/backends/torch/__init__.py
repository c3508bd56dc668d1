"""CoordConv for PyTorch."""

from coordconv.backends.torch.changing import add_coords, remove_coords
from coordconv.backends.torch.files import from_state, read_state
from coordconv.backends.torch.fusing import fuse
from coordconv.backends.torch.layers import (
    AddCoords,
    CoordConv1d,
    CoordConv2d,
    CoordConv3d,
    CoordConvTranspose1d,
    CoordConvTranspose2d,
    CoordConvTranspose3d,
)
from coordconv.backends.torch.lazy import (
    LazyCoordConv1d,
    LazyCoordConv2d,
    LazyCoordConv3d,
    LazyCoordConvTranspose1d,
    LazyCoordConvTranspose2d,
    LazyCoordConvTranspose3d,
)
from coordconv.backends.torch.networks import (
    COMPILED,
    build,
    evaluate,
    recorded,
    trainer,
    write_state,
)
from coordconv.backends.torch.position import PositionBias1d, PositionBias2d, PositionBias3d
from coordconv.backends.torch.reporting import position_report
from coordconv.tape import adapt_state_dict

__all__ = [
    "COMPILED",
    "AddCoords",
    "CoordConv1d",
    "CoordConv2d",
    "CoordConv3d",
    "CoordConvTranspose1d",
    "CoordConvTranspose2d",
    "CoordConvTranspose3d",
    "LazyCoordConv1d",
    "LazyCoordConv2d",
    "LazyCoordConv3d",
    "LazyCoordConvTranspose1d",
    "LazyCoordConvTranspose2d",
    "LazyCoordConvTranspose3d",
    "PositionBias1d",
    "PositionBias2d",
    "PositionBias3d",
    "adapt_state_dict",
    "add_coords",
    "build",
    "evaluate",
    "from_state",
    "fuse",
    "position_report",
    "read_state",
    "recorded",
    "remove_coords",
    "trainer",
    "write_state",
]
