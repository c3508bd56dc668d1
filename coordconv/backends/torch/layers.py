"""CoordConv for PyTorch: subclasses of ``torch.nn``'s own convolutions.

Torch's convolutions call one method, ``_conv_forward``, for the computation alone: that is what
changes. Its transposed convolutions have none, so that their short ``forward`` is written anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from coordconv.backends.torch import adding, converting, options, states
from coordconv.backends.torch.fusing import FusedCoordConv
from coordconv.coordinates import Coordinates, CoordinatesLike
from coordconv.position_bias import APPEND
from coordconv.tape import TapeLayer, replicated, zeros
from coordconv.weights.kernels import KernelLayout, Position
from coordconv.windows import Window, called


class TorchCoordLayer(TapeLayer, states.TorchWeights):
    """What all CoordConvs of torch share; :class:`coordconv.layers.CoordLayer` has the arguments.

    ``load_state_dict`` takes the layer's own state, a plain convolution's (the coordinates' part
    becomes zero), and another implementation's kernel over features and coordinates, all of them
    also under ``conv.``. A state dict carries the layer's Coordinates in its metadata: the same set
    in another order is put in this layer's order, and other Coordinates are refused.

    Shape:
        input ``(N, C, *S)`` or ``(C, *S)``; output as the base class.

    Example:
        >>> layer = CoordConv2d(3, 8, 3, padding=1, coords="xyr")
        >>> layer(torch.zeros(2, 3, 16, 20)).shape
        torch.Size([2, 8, 16, 20])
        >>> layer.weight.shape  # over 3 features and 3 coordinates
        torch.Size([8, 6, 3, 3])
        >>> layer.eval().fuse((16, 20))(torch.zeros(2, 3, 16, 20)).shape
        torch.Size([2, 8, 16, 20])
    """

    CONVERSION = converting.CONVERSION
    FUSED = FusedCoordConv

    @property
    def layout(self) -> KernelLayout:
        """Where features and coordinates lie in ``weight``."""
        return KernelLayout(self.coords, self.in_channels, self.groups, self.transposed)

    def _layout_of(self, kernel: Tensor) -> KernelLayout:
        """The layout by the kernel's shape, where ``in_channels`` is not what it will be."""
        width = kernel.shape[0] if self.transposed else kernel.shape[1] * self.groups
        channels = int(width - self.groups * len(self.coords))
        return KernelLayout(self.coords, channels, self.groups, self.transposed)

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as ``coord_init`` says."""
        if self.coord_init == "fan_in" or is_lazy(self.weight) or not self.weight.numel():
            super().reset_parameters()
            return
        layout = self._layout_of(self.weight)
        plain = options.plain_class(self)(
            layout.channels,
            self.out_channels,
            self.kernel_size,
            groups=self.groups,
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            drawn = layout.fitted(plain.weight, torch.cat, zeros)
            self.weight.copy_(replicated(drawn, self.weight))
            if self.bias is not None:
                self.bias.copy_(replicated(plain.bias, self.bias))

    def _coord_conv(
        self,
        x: Any,
        kernel: Any,
        bias: Any,
        convolve: Callable[[Any, Any, Any], Any],
        window: Window | None,
    ) -> Any:
        """The layer's output, where its base class has ``convolve(x, kernel, bias)``."""
        geometry, out = options.geometry(self), self.out_channels
        low = self._is_low_precision(kernel)
        product = window is None and not self.map_only
        if product and adding.is_product(geometry, x, kernel, low):
            features, coordinates = self.layout.split(kernel)
            return adding.product(geometry, self.coords, x, features, bias, coordinates)
        given = geometry, self.coords, x, self.in_channels, out, low
        if not self.map_only and adding.choose(*given) == APPEND:
            return convolve(adding.append(self, x, self.rank, self.groups, window), kernel, bias)
        features, coordinates = self.layout.split(kernel)
        output = convolve(x, features, bias)
        if window is not None:
            return adding.add_map_of_window(self, geometry, output, x, coordinates, low, window)
        return adding.add_map(self, geometry, output, x, coordinates, out, low)

    def _adapt(self, state: Any, prefix: str, position: Position = "last") -> None:
        if not is_lazy(self._parameters.get("weight")):  # its first input will tell its channels
            super()._adapt(state, prefix, position)


_PLAIN = tuple(
    getattr(nn, f"Conv{kind}{rank}d") for kind in ("", "Transpose") for rank in (1, 2, 3)
)


def _check_bases(cls: type, ours: type) -> None:
    """Raise TypeError if a class has a step that it would leave out, of a base behind ours."""
    for base in cls.__mro__[cls.__mro__.index(ours) :]:
        if issubclass(base, _PLAIN) and not base.__module__.startswith(("coordconv.", "torch.nn.")):
            for name in {"forward", "_conv_forward"} & vars(base).keys():
                raise TypeError(
                    f"bases of {cls.__name__} must have {base.__name__}, which has a {name} of its "
                    "own, before the CoordConv, which does not call it for all of its kernel"
                )


class _CoordConv(TorchCoordLayer):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _check_bases(cls, _CoordConv)

    def forward(self, input: Tensor, window: Window | None = None) -> Tensor:
        """The convolution of ``input`` and its coordinates, maybe of a ``window``."""
        options.check(input, self.rank, self.in_channels, len(self.coords))
        window = options.traced(window)
        return called(window, self._conv_forward, input, self.weight, self.bias)  # type: ignore[no-any-return]

    def _conv_forward(self, input: Any, weight: Any, bias: Any) -> Any:
        window = options.window(None, input, self.rank)
        return self._coord_conv(input, weight, bias, super()._conv_forward, window)


class _CoordConvTranspose(TorchCoordLayer):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _check_bases(cls, _CoordConvTranspose)

    def forward(
        self,
        input: Tensor,
        output_size: Sequence[int] | None = None,
        window: Window | None = None,
    ) -> Tensor:
        """The transposed convolution of ``input`` and its coordinates, maybe of a ``window``."""
        options.check(input, self.rank, self.in_channels, len(self.coords))
        extra = self.output_padding
        if output_size is not None:
            extra = options.output_padding(self, input.shape, output_size)
        function = getattr(nn.functional, f"conv_transpose{self.rank}d")

        def convolve(x: Any, weight: Any, bias: Any) -> Any:
            steps = self.stride, self.padding, extra, self.groups, self.dilation
            return function(x, weight, bias, *steps)

        window = options.window(options.traced(window), input, self.rank)
        return self._coord_conv(input, self.weight, self.bias, convolve, window)


class CoordConv1d(_CoordConv, nn.Conv1d, rank=1):
    """``torch.nn.Conv1d`` that sees its coordinates; see :class:`coordconv.layers.CoordLayer`."""


class CoordConv2d(_CoordConv, nn.Conv2d, rank=2):
    """``torch.nn.Conv2d`` that sees its coordinates; see :class:`coordconv.layers.CoordLayer`."""


class CoordConv3d(_CoordConv, nn.Conv3d, rank=3):
    """``torch.nn.Conv3d`` that sees its coordinates; see :class:`coordconv.layers.CoordLayer`."""


class CoordConvTranspose1d(_CoordConvTranspose, nn.ConvTranspose1d, rank=1):
    """As :class:`CoordConv1d`, of ``torch.nn.ConvTranspose1d``."""


class CoordConvTranspose2d(_CoordConvTranspose, nn.ConvTranspose2d, rank=2):
    """As :class:`CoordConv2d`, of ``torch.nn.ConvTranspose2d``."""


class CoordConvTranspose3d(_CoordConvTranspose, nn.ConvTranspose3d, rank=3):
    """As :class:`CoordConv3d`, of ``torch.nn.ConvTranspose3d``."""


class AddCoords(adding.OwnChannels, nn.Module):
    """Append the coordinate channels to an input, for layers that have no CoordConv.

    The ``coords`` are tokens, a :class:`~coordconv.Coordinates`, or None for all axes, of which
    there are ``rank``: this tells an image without a batch axis from a batch of sequences.

    Shape:
        input ``(N, C, *S)`` or ``(C, *S)``; output with ``n`` channels more.

    Raises:
        TypeError: the input is not floating-point.
        ValueError: ``coords`` or an input of another rank; an empty axis.

    Example:
        >>> AddCoords("x", rank=1)(torch.zeros(1, 1, 3))
        tensor([[[ 0.,  0.,  0.],
                 [-1.,  0.,  1.]]])
    """

    def __init__(self, coords: CoordinatesLike = None, *, rank: int = 2) -> None:
        super().__init__()
        self.coords = Coordinates.resolve(coords, rank)
        self.rank = rank

    def forward(self, input: Tensor, window: Window | None = None) -> Tensor:
        """The input with the coordinates, maybe of a ``window``, behind its channels."""
        options.check(input, self.rank)
        window = options.window(options.traced(window), input, self.rank)
        return adding.append(self, input, self.rank, window=window)

    def extra_repr(self) -> str:
        return f"coords={self.coords!r}, rank={self.rank}"
