"""CoordConv for Paddle: subclasses of ``paddle.nn``'s own convolutions.

Paddle's convolutions call a functional, such as ``paddle.nn.functional.conv2d``, in a ``forward``
of a few lines. That ``forward`` is written anew, as no step of it can be replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.utils.decorator_utils import param_one_alias

from coordconv.backends.paddle import adding, converting, options, windows
from coordconv.backends.paddle.fusing import FusedCoordConv
from coordconv.backends.paddle.initializer import coordinates_at_zero
from coordconv.coordinates import Coordinates, CoordinatesLike
from coordconv.grid import Array
from coordconv.position_bias import APPEND
from coordconv.tape import TapeLayer, TapeWeights, adapt_state_dict
from coordconv.weights.kernels import KernelLayout
from coordconv.windows import Window


class PaddleWeights(TapeWeights):
    """A layer that takes canonical weights."""

    def _assign(self, arrays: Mapping[str, Array]) -> None:
        with paddle.no_grad():
            for name, array in arrays.items():
                tensor = getattr(self, name)
                tensor.set_value(paddle.to_tensor(array).astype(tensor.dtype))


class PaddleCoordLayer(PaddleWeights, TapeLayer):
    """What all CoordConvs of Paddle share; :class:`coordconv.layers.CoordLayer` has the arguments.

    ``set_state_dict`` takes the layer's own state, a plain convolution's (the coordinates' part
    becomes zero), and another implementation's kernel over features and coordinates, all of them
    also under ``conv.``. Inside a network see
    :func:`~coordconv.backends.paddle.adapt_state_dict`.

    Shape:
        input ``(N, C, *S)``, or ``(N, *S, C)`` by ``data_format``; output as the base class.

    Example:
        >>> layer = CoordConv2D(3, 8, 3, padding=1, coords="xyr")
        >>> list(layer(paddle.zeros([2, 3, 16, 20])).shape)
        [2, 8, 16, 20]
        >>> list(layer.weight.shape)  # over 3 features and 3 coordinates
        [8, 6, 3, 3]
        >>> _ = layer.eval()
        >>> list(layer.fuse((16, 20))(paddle.zeros([2, 3, 16, 20])).shape)
        [2, 8, 16, 20]
    """

    CONVERSION = converting.CONVERSION
    FUSED = FusedCoordConv
    CHANNELS_ATTRIBUTE = "_in_channels"
    transposed = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, nn.Layer):
            # to_static without full_graph simulates Python, and fails on the core's: so it is told
            # to leave the layer to eager execution. With full_graph the layer is in the graph.
            paddle.jit.marker.force_dynamic(cls)

    def _prepare(self, arguments: dict[str, Any]) -> None:
        options.check_arguments(arguments, self.rank)
        if self.coord_init == "zeros":
            sizes = arguments["in_channels"], arguments["groups"], self.transposed
            layout = KernelLayout(self.coords, *sizes)
            arguments["weight_attr"] = coordinates_at_zero(arguments["weight_attr"], layout)

    @property
    def layout(self) -> KernelLayout:
        """Where features and coordinates lie in ``weight``."""
        return KernelLayout(self.coords, self._in_channels, self._groups, self.transposed)

    @property
    def channels_last(self) -> bool:
        """Whether the channels are the last axis."""
        return self._data_format.endswith("C")

    def _forward(self, x: Tensor, window: Window | None, output_size: Any = None) -> Tensor:
        """The layer's output, for a transposed layer of the size that the call wants."""
        options.check(x, self.rank, self.channels_last, self._in_channels, len(self.coords))
        shape = adding.spatial_shape(x, self.channels_last)
        if all(isinstance(n, int) for n in shape):
            options.output_shape(options.geometry(self, shape, output_size), shape)
        window = windows.window_of(window, x, self.rank)
        if not self.map_only and adding.choose(self, x) == APPEND:
            x = adding.append(self.coords, x, self.channels_last, self._groups, window)
            return adding.convolve(self, x, self.weight, self.bias, output_size)
        features, coordinates = adding.split(self.layout, self.weight)
        output = adding.convolve(self, x, features, None, output_size)
        if window is not None:
            return adding.add_map_of_window(self, output, x, coordinates, output_size, window)
        return adding.add_map(self, output, x, coordinates, output_size)

    def set_state_dict(
        self, state_dict: dict[str, Any], use_structured_name: bool = True
    ) -> tuple[list[str], list[str]]:
        """As Paddle's; another implementation's state is adapted, see ``adapt_state_dict``."""
        if use_structured_name:
            state_dict = adapt_state_dict(self, state_dict)
        return super().set_state_dict(state_dict, use_structured_name)  # type: ignore[no-any-return]

    set_dict = load_dict = set_state_dict


class _CoordConv(PaddleCoordLayer):
    @paddle.jit.marker.unified  # to_static traces the method, and rewrites nothing
    @param_one_alias(["x", "input"])  # as the base class
    def forward(self, x: Tensor, *, window: Window | None = None) -> Tensor:
        """The convolution of ``x`` and its coordinates, maybe of a ``window``."""
        return self._forward(x, window)


class _CoordConvTranspose(PaddleCoordLayer):
    transposed = True

    @paddle.jit.marker.unified
    def forward(
        self, x: Tensor, output_size: Any = None, *, window: Window | None = None
    ) -> Tensor:
        """The transposed convolution of ``x`` and its coordinates, maybe of a ``window``."""
        return self._forward(x, window, output_size)


class CoordConv1D(_CoordConv, nn.Conv1D, rank=1):
    """``paddle.nn.Conv1D`` that sees its coordinates; see :class:`coordconv.layers.CoordLayer`."""


class CoordConv2D(_CoordConv, nn.Conv2D, rank=2):
    """``paddle.nn.Conv2D`` that sees its coordinates; see :class:`coordconv.layers.CoordLayer`."""


class CoordConv3D(_CoordConv, nn.Conv3D, rank=3):
    """``paddle.nn.Conv3D`` that sees its coordinates; see :class:`coordconv.layers.CoordLayer`."""


class CoordConv1DTranspose(_CoordConvTranspose, nn.Conv1DTranspose, rank=1):
    """As :class:`CoordConv1D`, of ``paddle.nn.Conv1DTranspose``."""


class CoordConv2DTranspose(_CoordConvTranspose, nn.Conv2DTranspose, rank=2):
    """As :class:`CoordConv2D`, of ``paddle.nn.Conv2DTranspose``."""


class CoordConv3DTranspose(_CoordConvTranspose, nn.Conv3DTranspose, rank=3):
    """As :class:`CoordConv3D`, of ``paddle.nn.Conv3DTranspose``."""


@paddle.jit.marker.force_dynamic  # as the convolutions are
class AddCoords(nn.Layer):
    """Append the coordinate channels to an input, for layers that have no CoordConv.

    The ``coords`` are tokens, a :class:`~coordconv.Coordinates`, or None for all axes, of which
    there are ``rank``; ``data_format`` is Paddle's, such as ``"NHWC"``, or None for channels first.

    Shape:
        input ``(N, C, *S)`` or ``(N, *S, C)``; output with ``n`` channels more.

    Raises:
        TypeError: the input is not floating-point.
        ValueError: ``coords``, a ``data_format`` or an input of another rank; an empty axis.

    Example:
        >>> AddCoords("x", rank=1)(paddle.zeros([1, 1, 3])).numpy()
        array([[[ 0.,  0.,  0.],
                [-1.,  0.,  1.]]], dtype=float32)
    """

    def __init__(
        self, coords: CoordinatesLike = None, *, rank: int = 2, data_format: str | None = None
    ) -> None:
        super().__init__()
        self.coords = Coordinates.resolve(coords, rank)
        if data_format is not None:
            options.check_data_format(data_format, rank)
        self.rank = rank
        self.data_format = data_format

    @paddle.jit.marker.unified
    def forward(self, x: Tensor, *, window: Window | None = None) -> Tensor:
        """The input with the coordinates, maybe of a ``window``, behind its channels."""
        last = self.data_format is not None and self.data_format.endswith("C")
        options.check(x, self.rank, last)
        window = windows.window_of(window, x, self.rank)
        return adding.append(self.coords, x, last, window=window)

    def extra_repr(self) -> str:
        return f"coords={self.coords!r}, rank={self.rank}, data_format={self.data_format!r}"
