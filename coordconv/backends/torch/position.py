"""A layer of position alone for PyTorch: a module of its own, as it convolves no input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from coordconv.backends.torch import adding, options
from coordconv.backends.torch.states import TorchWeights
from coordconv.coordinates import Coordinates, CoordinatesLike, check_coord_init
from coordconv.layers import PositionLayer, check_channels
from coordconv.tape import replicated
from coordconv.windows import Window


class TorchPositionLayer(TorchWeights, PositionLayer, nn.Module):
    """What :class:`PositionBias2d` and its kin share; see :class:`.PositionLayer` for what P is.

    Args:
        channels: of the input and the output.
        coords: the coordinate channels: tokens such as ``"xyr"``, a
            :class:`~coordconv.Coordinates`, or None for all axes.
        bias: whether P has a constant for each channel, too.
        coord_init: ``"fan_in"`` or ``"zeros"``.
        device, dtype: of the parameters.

    A state dict carries the Coordinates, as a CoordConv's.

    Shape:
        input ``(N, C, *S)`` or ``(C, *S)``; output of the same shape and type.

    Example:
        >>> layer = PositionBias2d(8, "xyr")
        >>> layer(torch.zeros(2, 8, 16, 20)).shape
        torch.Size([2, 8, 16, 20])
        >>> layer.weight.shape
        torch.Size([8, 3, 1, 1])
    """

    rank: ClassVar[int]

    def __init__(
        self,
        channels: int,
        coords: CoordinatesLike = None,
        *,
        bias: bool = True,
        coord_init: str = "fan_in",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_channels("channels", channels)
        check_coord_init(coord_init)
        self.coords = Coordinates.resolve(coords, self.rank)
        self.channels, self.coord_init = int(channels), coord_init
        given = {"device": device, "dtype": dtype}
        weight = torch.empty(self.channels, len(self.coords), *(1,) * self.rank, **given)
        self.weight = nn.Parameter(weight)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(self.channels, **given)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as ``coord_init`` says."""
        plain = getattr(nn, f"Conv{self.rank}d")(
            len(self.coords),
            self.channels,
            1,
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                drawn = getattr(plain, name)
                drawn = drawn if self.coord_init == "fan_in" else torch.zeros_like(drawn)
                parameter.copy_(replicated(drawn, parameter))

    def forward(self, input: Tensor, window: Window | None = None) -> Tensor:
        """The input and P at each of its positions, maybe of a ``window``."""
        options.check(input, self.rank, self.channels, len(self.coords))
        window, weight = options.window(options.traced(window), input, self.rank), self.weight
        if isinstance(weight, Tensor) and weight.is_complex() and not input.is_complex():
            raise TypeError(f"input must be complex as the weight is, got {input.dtype}")
        low = self._is_low_precision(weight)
        return adding.add_pointwise(self, input, weight, self.bias, low, window)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.channels}, coords={self.coords!r}, bias={self.bias is not None}"


class PositionBias1d(TorchPositionLayer):
    """``x + P(L)`` for ``(N, C, L)``; see :class:`.TorchPositionLayer`."""

    rank = 1


class PositionBias2d(TorchPositionLayer):
    """``x + P(H, W)`` for ``(N, C, H, W)``; see :class:`.TorchPositionLayer`."""

    rank = 2


class PositionBias3d(TorchPositionLayer):
    """``x + P(D, H, W)`` for ``(N, C, D, H, W)``; see :class:`.TorchPositionLayer`."""

    rank = 3
