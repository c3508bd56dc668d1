"""Layers whose first input says ``in_channels``, as torch's lazy convolutions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from coordconv.backends.torch import options
from coordconv.backends.torch.layers import (
    CoordConv1d,
    CoordConv2d,
    CoordConv3d,
    CoordConvTranspose1d,
    CoordConvTranspose2d,
    CoordConvTranspose3d,
    TorchCoordLayer,
)


class _LazyCoordLayer(TorchCoordLayer):
    """Before ``cls_to_become``, which it becomes as its first input says ``in_channels``."""

    def initialize_parameters(self, input: Tensor, *args: Any, **kwargs: Any) -> None:
        """Make the parameters for an input, as torch does, with the coordinates' channels."""
        options.check(input, self.rank)
        shape = list(input.shape)
        shape[-1 - self.rank] += self.groups * len(self.coords)
        super().initialize_parameters(input.new_empty(shape, device="meta"), *args, **kwargs)
        # Here and not before: if a state was loaded, torch finds nothing left to initialise.
        self.in_channels = self._layout_of(self.weight).channels


class LazyCoordConv1d(_LazyCoordLayer, CoordConv1d, nn.LazyConv1d):
    """:class:`CoordConv1d` whose first input says ``in_channels``."""

    cls_to_become = CoordConv1d


class LazyCoordConv2d(_LazyCoordLayer, CoordConv2d, nn.LazyConv2d):
    """:class:`CoordConv2d` whose first input says ``in_channels``."""

    cls_to_become = CoordConv2d


class LazyCoordConv3d(_LazyCoordLayer, CoordConv3d, nn.LazyConv3d):
    """:class:`CoordConv3d` whose first input says ``in_channels``."""

    cls_to_become = CoordConv3d


class LazyCoordConvTranspose1d(_LazyCoordLayer, CoordConvTranspose1d, nn.LazyConvTranspose1d):
    """:class:`CoordConvTranspose1d` whose first input says ``in_channels``."""

    cls_to_become = CoordConvTranspose1d


class LazyCoordConvTranspose2d(_LazyCoordLayer, CoordConvTranspose2d, nn.LazyConvTranspose2d):
    """:class:`CoordConvTranspose2d` whose first input says ``in_channels``."""

    cls_to_become = CoordConvTranspose2d


class LazyCoordConvTranspose3d(_LazyCoordLayer, CoordConvTranspose3d, nn.LazyConvTranspose3d):
    """:class:`CoordConvTranspose3d` whose first input says ``in_channels``."""

    cls_to_become = CoordConvTranspose3d
