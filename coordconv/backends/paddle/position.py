"""A layer of position alone for Paddle: a layer of its own, as it convolves no input."""

from __future__ import annotations

from typing import Any, ClassVar

import paddle
from paddle import Tensor, nn

from coordconv.backends.paddle import adding, options, windows
from coordconv.backends.paddle.initializer import at_zero
from coordconv.backends.paddle.layers import PaddleWeights
from coordconv.coordinates import Coordinates, CoordinatesLike, check_coord_init
from coordconv.layers import PositionLayer, check_channels
from coordconv.windows import Window


class PaddlePositionLayer(PaddleWeights, PositionLayer, nn.Layer):
    """What :class:`PositionBias2D` and its kin share; see :class:`.PositionLayer` for what P is.

    Args:
        channels: of the input and the output.
        coords: the coordinate channels: tokens such as ``"xyr"``, a
            :class:`~coordconv.Coordinates`, or None for all axes.
        coord_init: ``"fan_in"``, which the two that follow may change, or ``"zeros"``.
        weight_attr, bias_attr: as Paddle's convolutions take them; False for no bias.
        data_format: Paddle's, such as ``"NHWC"``; None for channels first.

    Shape:
        input ``(N, C, *S)``, or ``(N, *S, C)`` by ``data_format``; output of the same shape and
        type.

    Example:
        >>> layer = PositionBias2D(8, "xyr")
        >>> list(layer(paddle.zeros([2, 8, 16, 20])).shape)
        [2, 8, 16, 20]
        >>> list(layer.weight.shape)
        [8, 3, 1, 1]
    """

    rank: ClassVar[int]

    def __init__(
        self,
        channels: int,
        coords: CoordinatesLike = None,
        *,
        coord_init: str = "fan_in",
        weight_attr: Any = None,
        bias_attr: Any = None,
        data_format: str | None = None,
    ) -> None:
        super().__init__()
        check_channels("channels", channels)
        check_coord_init(coord_init)
        self.coords = Coordinates.resolve(coords, self.rank)
        self.channels, self.coord_init = int(channels), coord_init
        if data_format is None:
            data_format = next(f for f in options.DATA_FORMATS if len(f) == self.rank + 2)
        options.check_data_format(data_format, self.rank)
        self.data_format = data_format
        if coord_init == "zeros":
            weight_attr, bias_attr = at_zero(weight_attr), at_zero(bias_attr)
        attributes = {"weight_attr": weight_attr, "bias_attr": bias_attr}
        plain = getattr(nn, f"Conv{self.rank}D")(len(self.coords), channels, 1, **attributes)
        self.weight, self.bias = plain.weight, plain.bias

    @property
    def channels_last(self) -> bool:
        """Whether the channels are the last axis."""
        return self.data_format.endswith("C")

    @paddle.jit.marker.unified
    def forward(self, x: Tensor, *, window: Window | None = None) -> Tensor:
        """The input and P at each of its positions, maybe of a ``window``."""
        options.check(x, self.rank, self.channels_last, self.channels, len(self.coords))
        return adding.add_pointwise(self, x, windows.window_of(window, x, self.rank))

    def extra_repr(self) -> str:
        return f"{self.channels}, coords={self.coords!r}, data_format={self.data_format!r}"


@paddle.jit.marker.force_dynamic  # as the convolutions are
class PositionBias1D(PaddlePositionLayer):
    """``x + P(L)`` for ``(N, C, L)``; see :class:`.PaddlePositionLayer`."""

    rank = 1


@paddle.jit.marker.force_dynamic
class PositionBias2D(PaddlePositionLayer):
    """``x + P(H, W)`` for ``(N, C, H, W)``; see :class:`.PaddlePositionLayer`."""

    rank = 2


@paddle.jit.marker.force_dynamic
class PositionBias3D(PaddlePositionLayer):
    """``x + P(D, H, W)`` for ``(N, C, D, H, W)``; see :class:`.PaddlePositionLayer`."""

    rank = 3
