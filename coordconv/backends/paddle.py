"""CoordConv for Paddle: subclasses of ``paddle.nn``'s own convolutions.

Each layer takes what its base class takes, in the same order and with the same defaults, and has
one parameter more: ``coord_weight`` of shape ``(out_channels, n, *kernel_size)``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache, partial
from io import BytesIO
from typing import Any

import numpy as np

from coordconv import networks
from coordconv.coordinates import Coordinates, CoordinatesLike, check_coord_init
from coordconv.geometry import ConvGeometry, check_input
from coordconv.grid import Array, coordinate_grid
from coordconv.position_bias import Share, factors, position_bias, shares
from coordconv.recording import (
    Model,
    Names,
    Recording,
    given_gradients,
    in_order,
    input_names,
)
from coordconv.weights import (
    Weights,
    checked,
    read_weights,
    replace_file,
    split_channels,
    split_state,
)

with warnings.catch_warnings():  # of a compiler cache, which only builders of extensions miss
    warnings.filterwarnings("ignore", "No ccache found")
    import paddle
    from paddle import Tensor, nn
    from paddle.nn.functional.conv import _update_padding_nd
    from paddle.utils.decorator_utils import param_one_alias
    from paddle.utils.layers_utils import convert_to_list

_CONVOLVE: dict[int, Callable[..., Tensor]] = {
    1: nn.functional.conv1d,
    2: nn.functional.conv2d,
    3: nn.functional.conv3d,
}
_DATA_FORMATS = ("NCL", "NLC", "NCHW", "NHWC", "NCDHW", "NDHWC")
_TRANSPOSED = (nn.Conv1DTranspose, nn.Conv2DTranspose, nn.Conv3DTranspose)
_geometry = lru_cache(maxsize=256)(ConvGeometry)
_output_shape = lru_cache(maxsize=256)(ConvGeometry.output_shape)
_for_output = lru_cache(maxsize=256)(ConvGeometry.for_output)

COMPILED = False  # what most users do


def split_state_dict(layer: nn.Layer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Another implementation's state as a network with CoordConvs wants it.

    The CoordConvs do this themselves in their ``set_state_dict``, but Paddle asks the outermost
    layer alone: for one of your own, write
    ``net.set_state_dict(split_state_dict(net, state_dict))``.

    Args:
        layer: the network, or one layer.
        state_dict: tensors or arrays by structured name; it is left as it is. A CoordConv's fused
            kernel, over features and coordinates, may be under its ``weight`` or ``conv.weight``.

    Returns:
        The same but for the fused kernels, which are split. What fits no layer is left for
        ``set_state_dict`` to warn of.

    Example:
        >>> net = nn.Sequential(CoordConv2D(3, 8, 1), nn.ReLU())
        >>> state = {f"0.conv.{n}": t for n, t in nn.Conv2D(3 + 2, 8, 1).state_dict().items()}
        >>> sorted(split_state_dict(net, state))
        ['0.bias', '0.coord_weight', '0.weight']
    """
    state = dict(state_dict)
    for name, each in layer.named_sublayers(include_self=True, remove_duplicate=False):
        if isinstance(each, _CoordConv):
            split_state(
                state,
                f"{name}." if name else "",
                each.weight.shape,
                len(each.coords),
                each._groups,
                each._transposed,
                nested="conv" not in each._sub_layers,
            )
    return state


class _TakesFused(nn.Layer):
    """A layer whose ``set_state_dict`` takes what other implementations save."""

    def set_state_dict(
        self, state_dict: dict[str, Any], use_structured_name: bool = True
    ) -> tuple[list[str], list[str]]:
        """As Paddle's; a fused kernel is split, see :func:`split_state_dict`."""
        if use_structured_name:
            state_dict = split_state_dict(self, state_dict)
        return super().set_state_dict(state_dict, use_structured_name)

    set_dict = load_dict = set_state_dict


class _CoordConv(_TakesFused, nn.layer.conv._ConvNd):
    """What every CoordConv adds to the convolution it is mixed into.

    Args:
        coords: the coordinate channels: tokens such as ``"xyr"``, a
            :class:`~coordconv.Coordinates`, or None for all axes. Keyword only.
        coord_init: ``"fan_in"`` draws both kernels as the base class draws one over
            ``in_channels + groups * n`` channels, an initializer of ``weight_attr`` included, but
            for ``Assign``, whose values are the feature kernel's alone; ``"zeros"`` draws the
            feature kernel as the base class does and starts the coordinate kernel at zero.
            Keyword only.

    The rest of ``weight_attr`` holds for both kernels; if it has a ``name``, the coordinate
    kernel's is that with ``_coord`` appended.

    ``set_state_dict`` takes the layer's own state, and another implementation's: one kernel over
    features and coordinates, of each group if there are groups, under ``weight`` or
    ``conv.weight``. A plain convolution's leaves ``coord_weight`` alone. Inside a network see
    :func:`split_state_dict`.

    Raises:
        TypeError, ValueError: as :class:`~coordconv.Coordinates`, channels that ``groups`` does
            not divide, and from ``forward``: an input that is not floating-point, or of the wrong
            rank, channels or an empty axis, or for which the output would be empty.
    """

    rank: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # to_static without full_graph mistakes what super() is here, and makes the axes of an input
        # that comes in several shapes unknown; so it is told to leave the layer to eager execution.
        paddle.jit.marker.force_dynamic(cls)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        *args: Any,
        coords: CoordinatesLike = None,
        coord_init: str = "fan_in",
        **kwargs: Any,
    ) -> None:
        coordinates = Coordinates.resolve(coords, self.rank)
        check_coord_init(coord_init)
        before = paddle.get_rng_state()
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        for name, count in (("in_channels", in_channels), ("out_channels", out_channels)):
            if count % self._groups:
                raise ValueError(
                    f"{name} must be divisible by groups, got {count} and {self._groups}"
                )
        if len(self._data_format) != self.rank + 2:  # Paddle takes some of those, and misreads them
            formats = [f for f in _DATA_FORMATS if len(f) == self.rank + 2]
            raise ValueError(f"data_format must be one of {formats}, got {self._data_format!r}")
        self.coords = coordinates
        self.coord_init = coord_init
        attr = copy.copy(paddle.ParamAttr._to_attr(self._param_attr))
        assigned = isinstance(attr.initializer, nn.initializer.Assign)
        attr.initializer = nn.initializer.Constant(0.0)
        if attr.name is not None:  # Paddle wants the names of all parameters to differ
            attr.name += "_coord"
        self.coord_weight = self.create_parameter(
            [out_channels, len(coordinates), *self._kernel_size],
            attr=attr,
            dtype=self._dtype,
            device=self._device,
        )
        if coord_init == "fan_in":
            paddle.set_rng_state(before)  # so that a seed means what it means to the base class
            self._draw(assigned)

    def _draw(self, assigned: bool) -> None:
        """Draw both kernels as the base class draws one over features and coordinates."""
        plain = next(base for base in type(self).__mro__ if base.__module__ == nn.Conv2D.__module__)
        like = {} if self._transposed else {"device": self._device, "dtype": self._dtype}
        with paddle.utils.unique_name.guard():  # leave the names of later parameters as they were
            drawn = plain(
                self._in_channels + self._groups * len(self.coords),
                self._out_channels,
                self._kernel_size,
                groups=self._groups,
                weight_attr=None if assigned else self._param_attr,
                bias_attr=self._bias_attr,
                **like,
            )
        with paddle.no_grad():
            features = self._in_channels // self._groups
            weight, coord_weight = split_channels(
                drawn.weight, features, self._groups, self._transposed
            )
            if not assigned:
                self.weight.set_value(weight)
            self.coord_weight.set_value(coord_weight)
            if self.bias is not None:
                self.bias.set_value(drawn.bias)

    @paddle.jit.marker.unified  # to_static with full_graph=True traces it, and rewrites nothing
    @param_one_alias(["x", "input"])  # as the base class
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The convolution of ``x (N, C, *S)``, or ``(N, *S, C)``, and of the coordinates.

        A transposed layer takes ``output_size`` as its base class does.
        """
        if not paddle.is_floating_point(x):
            raise TypeError(f"input must be floating-point, got {x.dtype}")
        if -1 in x.shape[1:]:
            raise ValueError(f"input_spec must fix all axes but the batch, got {tuple(x.shape)}")
        shape = check_input(
            x.shape,
            rank=self.rank,
            channels=self._in_channels,
            coords=len(self.coords),
            channel_axis=-1 if self._channels_last else -1 - self.rank,
            batched=1,
        )
        sized = (args[0] if args else kwargs.get("output_size")) is not None
        geometry = self._conv_geometry(shape, sized)
        _output_shape(geometry, shape)  # Paddle may crash on an output of a negative length
        traced = not paddle.in_dynamic_mode()
        if geometry.pointwise and not self._channels_last and not traced and _is_plain(x):
            # On a CPU Paddle's own convolution takes 1.2 to 7 times as long.
            kernel = self.weight.reshape([self._out_channels, -1])
            if paddle.is_grad_enabled():  # a broadcast's second derivatives crash Paddle
                kernel = kernel.expand([len(x), *kernel.shape])
            output = paddle.matmul(kernel, x.reshape([*x.shape[:2], -1]))
            output = output.reshape([len(x), -1, *shape])
            return self._add(output, *self._map_arguments(geometry, shape), self.bias)
        output = super().forward(x, *args, **kwargs)
        if sized:
            chosen = tuple(output.shape[1:-1] if self._channels_last else output.shape[2:])
            if -1 in chosen:
                raise ValueError(
                    "output_size must be ints, not a tensor, while a program is traced"
                )
            geometry = _for_output(geometry, shape, chosen)
        return self._add(output, *self._map_arguments(geometry, shape))

    def _add(
        self,
        output: Tensor,
        kernel: Tensor,
        arrays: Sequence[Share],
        bias: Tensor | None = None,
    ) -> Tensor:
        """A convolution's ``output``, and what the coordinates and a ``bias`` add to it.

        On a CPU a product of two matrices is added in place: Paddle takes long to allocate a
        tensor, and longer for a broadcast or for its gradient than for a product. For one sample it
        is the product that makes the map, for several that of a column of ones with the map.
        """
        with _no_autocast():
            if not paddle.in_dynamic_mode() or not _is_plain(output):
                return output + self._position_bias(kernel, arrays, output.dtype)
            by_product = arrays[0].last is not None and not self._channels_last and bias is None
            if len(output) == len(arrays) == 1 and by_product:
                left, right = factors(kernel, arrays[0])
            else:
                left = _ones(len(output), output.dtype)
                right = self._position_bias(kernel, arrays, output.dtype)
                if bias is not None:
                    right = right.reshape([len(bias), -1]) + bias.reshape([-1, 1])
                right = right.reshape([1, -1])
            if not output.stop_gradient:
                return _AddProduct.apply([_anchor(), output, left, right])
            if not (left.stop_gradient and right.stop_gradient):  # then not in place
                return output + paddle.matmul(left, right).reshape(output.shape)
            return _add_product(output, left, right)

    def _position_bias(
        self, kernel: Tensor, arrays: Sequence[Share], dtype: paddle.dtype
    ) -> Tensor:
        """What the coordinates add to each sample, computed in the dtype of ``kernel``."""
        return position_bias(
            kernel,
            arrays,
            convolve=_convolve,
            channels_last=self._channels_last,
        ).astype(dtype)

    def _map_arguments(
        self, geometry: ConvGeometry, shape: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Share, ...]]:
        """The coordinate kernel, in float32 at least, and the arrays that the map is made with."""
        kernel = self.coord_weight
        if kernel.dtype in (paddle.float16, paddle.bfloat16):
            kernel = kernel.astype(paddle.float32)
        made_for = geometry, self.coords, shape, kernel.dtype
        if not paddle.in_dynamic_mode():  # a program would have its own tensors kept
            return kernel, _convert(*made_for, None)
        return kernel, _kept(*made_for, kernel.place)

    def _conv_geometry(self, shape: tuple[int, ...], sized: bool = False) -> ConvGeometry:
        """The geometry, from the attributes that the base class's ``forward`` reads.

        An output size given at call time replaces the layer's ``output_padding``.
        """
        kernel, stride = tuple(self._kernel_size), tuple(self._stride)
        padding: Any
        options: dict[str, Any] = {"padding_mode": self._padding_mode}
        if self._padding_mode != "zeros":
            ends = self._reversed_padding_repeated_twice  # the last axis first
            padding, algorithm = [*zip(ends[::2], ends[1::2], strict=True)][::-1], "EXPLICIT"
        elif self.rank == 1 or self._transposed:
            padding, algorithm = _update_padding_nd(self._padding, self._channels_last, self.rank)
        else:
            padding, algorithm = self._updated_padding, self._padding_algorithm
        if len(padding) == 2 * self.rank:
            padding = zip(padding[::2], padding[1::2], strict=True)
        padding = "same" if algorithm == "SAME" else tuple(padding)
        if self._transposed:
            if padding == "same":  # it cuts off what a plain convolution of the input would add
                padding = _geometry(kernel, stride=stride, padding="same").pads(shape)
            extra = 0 if sized else self.output_padding
            extra = tuple(convert_to_list(extra, self.rank, "output_padding"))
            options = {"transposed": True, "output_padding": extra}
        return _geometry(
            kernel,
            stride=stride,
            padding=padding,
            dilation=1 if algorithm == "SAME" else tuple(self._dilation),  # "SAME" undoes it
            groups=self._groups,
            **options,
        )

    @property
    def _transposed(self) -> bool:
        return isinstance(self, _TRANSPOSED)

    @property
    def _channels_last(self) -> bool:
        return self._data_format.endswith("C")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, coords={self.coords!r}"

    def export_weights(self) -> Weights:
        """The canonical weights: ``weight``, ``coord_weight`` and, if there is one, ``bias``."""
        arrays = {"weight": self.weight, "coord_weight": self.coord_weight, "bias": self.bias}
        return Weights(
            {name: _numpy(tensor) for name, tensor in arrays.items() if tensor is not None},
            {"": self.coords},
        )

    def import_weights(self, mapping: Mapping[str, Array]) -> None:
        """Take canonical weights.

        Raises:
            ValueError: arrays are missing, unexpected or wrongly shaped, or were made for other
                coordinates; all are listed and nothing is changed.
        """
        _import(self, mapping, {"": self.coords})


def _is_plain(output: Tensor) -> bool:
    """Whether it is one of those that Paddle can add to in place on a CPU."""
    dtypes = paddle.float32, paddle.float64
    return output.place.is_cpu_place() and output.dtype in dtypes and output.size > 0


def _no_autocast() -> AbstractContextManager[Any]:
    # Where it is off, this costs more than asking.
    return paddle.amp.auto_cast(enable=False) if paddle.is_autocast_enabled() else nullcontext()


def _add_product(output: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``output + left @ right``, in place."""
    paddle.addmm_(output.reshape([len(left), -1]), left, right)
    return output


class _AddProduct(paddle.autograd.PyLayer):
    """:func:`_add_product` where there are gradients.

    Paddle's own would copy the output's gradient, and has no derivative. Takes one list: its first
    tensor, of :func:`_anchor`, is always in need of a gradient. Of a first one that is not, as
    where ``paddle.grad`` is asked for the others' alone, Paddle wants None in place of the list.
    """

    @staticmethod
    def forward(ctx: Any, tensors: list[Tensor]) -> Tensor:
        _, output, left, right = tensors
        ctx.rows = len(left)
        ctx.left = None if right.stop_gradient else left
        ctx.right = None if left.stop_gradient else right
        return _add_product(output, left, right)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        left, right = ctx.left, ctx.right
        with _no_autocast():
            flat = gradient.reshape([ctx.rows, -1])
            return (
                [
                    None,
                    gradient,
                    None if right is None else paddle.matmul(flat, right, transpose_y=True),
                    None if left is None else paddle.matmul(left, flat, transpose_x=True),
                ],
            )


@lru_cache(maxsize=1)
def _anchor() -> Tensor:
    """A tensor that takes gradients, though it never gets one."""
    anchor = paddle.zeros([1])
    anchor.stop_gradient = False
    return anchor


@lru_cache(maxsize=16)
def _ones(count: int, dtype: paddle.dtype) -> Tensor:
    return paddle.ones([count, 1], dtype, device="cpu")


@lru_cache(maxsize=64)
def _kept(*made_for: Any) -> tuple[Share, ...]:
    return _convert(*made_for)


def _convert(
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: tuple[int, ...],
    dtype: paddle.dtype,
    place: Any,
) -> tuple[Share, ...]:
    """The arrays of a position bias as tensors."""
    exact = np.float64 if dtype == paddle.float64 else np.float32
    return tuple(
        share.converted(lambda array: paddle.to_tensor(array, place=place))
        for share in shares(geometry, coords, shape, exact)
    )


def _constant(array: Array, beside: Tensor) -> Tensor:
    """An array on another tensor's device; while a program is traced, no tensor has one."""
    return paddle.to_tensor(array, place=beside.place if paddle.in_dynamic_mode() else None)


def _convolve(share: Share, kernel: Tensor) -> Tensor:
    rank = len(share.stride)
    if share.flip:
        kernel = kernel.flip(list(range(-rank, 0)))
    return _CONVOLVE[rank](share.padded[None], kernel, None, share.stride, 0, share.dilation)[0]


class CoordConv1D(_CoordConv, nn.Conv1D):
    """``paddle.nn.Conv1D`` that sees its coordinates.

    Takes every argument of ``paddle.nn.Conv1D``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see the mixin for both.

    Shape:
        input ``(N, C, L)``, or ``(N, L, C)`` with ``data_format="NLC"``; output as
        ``paddle.nn.Conv1D``.

    Example:
        >>> layer = CoordConv1D(3, 8, 3, padding=1, coords="xr")
        >>> layer(paddle.zeros([2, 3, 16])).shape
        paddle.Size([2, 8, 16])
        >>> layer.coord_weight.shape
        paddle.Size([8, 2, 3])

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """

    rank = 1


class CoordConv2D(_CoordConv, nn.Conv2D):
    """``paddle.nn.Conv2D`` that sees its coordinates.

    Takes every argument of ``paddle.nn.Conv2D``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see the mixin for both.

    Shape:
        input ``(N, C, H, W)``, or ``(N, H, W, C)`` with ``data_format="NHWC"``; output as
        ``paddle.nn.Conv2D``.

    Example:
        >>> layer = CoordConv2D(3, 8, 3, padding=1, coords="xyr")
        >>> layer(paddle.zeros([2, 3, 16, 16])).shape
        paddle.Size([2, 8, 16, 16])
        >>> layer.coord_weight.shape
        paddle.Size([8, 3, 3, 3])

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """

    rank = 2


class CoordConv3D(_CoordConv, nn.Conv3D):
    """``paddle.nn.Conv3D`` that sees its coordinates.

    Takes every argument of ``paddle.nn.Conv3D``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see the mixin for both.

    Shape:
        input ``(N, C, D, H, W)``, or ``(N, D, H, W, C)`` with ``data_format="NDHWC"``; output as
        ``paddle.nn.Conv3D``.

    Example:
        >>> layer = CoordConv3D(3, 8, 3, padding=1, coords="xyzr")
        >>> layer(paddle.zeros([2, 3, 4, 8, 8])).shape
        paddle.Size([2, 8, 4, 8, 8])
        >>> layer.coord_weight.shape
        paddle.Size([8, 4, 3, 3, 3])

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """

    rank = 3


class CoordConv1DTranspose(_CoordConv, nn.Conv1DTranspose):
    """``paddle.nn.Conv1DTranspose`` that sees its coordinates, those of its input.

    Takes every argument of ``paddle.nn.Conv1DTranspose``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see the mixin for both.

    Shape:
        input ``(N, C, L)``, or ``(N, L, C)`` with ``data_format="NLC"``; output as
        ``paddle.nn.Conv1DTranspose``.

    Example:
        >>> layer = CoordConv1DTranspose(3, 8, 3, coords="xr")
        >>> layer(paddle.zeros([2, 3, 16])).shape
        paddle.Size([2, 8, 18])
        >>> layer.coord_weight.shape
        paddle.Size([8, 2, 3])

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """

    rank = 1


class CoordConv2DTranspose(_CoordConv, nn.Conv2DTranspose):
    """``paddle.nn.Conv2DTranspose`` that sees its coordinates, those of its input.

    Takes every argument of ``paddle.nn.Conv2DTranspose``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see the mixin for both.

    Shape:
        input ``(N, C, H, W)``, or ``(N, H, W, C)`` with ``data_format="NHWC"``; output as
        ``paddle.nn.Conv2DTranspose``.

    Example:
        >>> layer = CoordConv2DTranspose(3, 8, 3, coords="xyr")
        >>> layer(paddle.zeros([2, 3, 16, 16])).shape
        paddle.Size([2, 8, 18, 18])
        >>> layer.coord_weight.shape
        paddle.Size([8, 3, 3, 3])

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """

    rank = 2


class CoordConv3DTranspose(_CoordConv, nn.Conv3DTranspose):
    """``paddle.nn.Conv3DTranspose`` that sees its coordinates, those of its input.

    Takes every argument of ``paddle.nn.Conv3DTranspose``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see the mixin for both.

    Shape:
        input ``(N, C, D, H, W)``, or ``(N, D, H, W, C)`` with ``data_format="NDHWC"``; output as
        ``paddle.nn.Conv3DTranspose``.

    Example:
        >>> layer = CoordConv3DTranspose(3, 8, 3, coords="xyzr")
        >>> layer(paddle.zeros([2, 3, 4, 8, 8])).shape
        paddle.Size([2, 8, 6, 10, 10])
        >>> layer.coord_weight.shape
        paddle.Size([8, 4, 3, 3, 3])

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """

    rank = 3


@paddle.jit.marker.force_dynamic  # as the convolutions are
class AddCoords(nn.Layer):
    """Append the coordinate channels to an input, for layers that have no CoordConv.

    Args:
        coords: tokens, a :class:`~coordconv.Coordinates`, or None for all axes of the input.
        data_format: one of Paddle's, such as ``"NHWC"``; None for channels first, of any rank.

    Shape:
        input ``(N, C, *S)`` with one to three spatial axes; output ``(N, C + n, *S)``; with the
        channels last ``(N, *S, C)`` and ``(N, *S, C + n)``.

    Raises:
        TypeError: the input is not floating-point.
        ValueError: an unknown ``data_format``; the input has no spatial axes or an empty one,
            another rank than ``data_format``, or lacks an axis of ``coords``.

    Example:
        >>> AddCoords("x")(paddle.zeros([1, 1, 3])).numpy()
        array([[[ 0.,  0.,  0.],
                [-1.,  0.,  1.]]], dtype=float32)
    """

    def __init__(self, coords: CoordinatesLike = None, data_format: str | None = None) -> None:
        super().__init__()
        if data_format is not None and data_format not in _DATA_FORMATS:
            raise ValueError(f"data_format must be one of {_DATA_FORMATS}, got {data_format!r}")
        self.coords = coords if coords is None else Coordinates.resolve(coords, 3)
        self.data_format = data_format

    @paddle.jit.marker.unified
    def forward(self, x: Tensor) -> Tensor:
        if not paddle.is_floating_point(x):
            raise TypeError(f"input must be floating-point, got {x.dtype}")
        if self.data_format is not None and len(self.data_format) != x.ndim:
            form = ", ".join(self.data_format)
            raise ValueError(f"input must have shape ({form}), got {tuple(x.shape)}")
        last = self.data_format is not None and self.data_format.endswith("C")
        shape = x.shape[1:-1] if last else x.shape[2:]
        grid = coordinate_grid(shape, self.coords, dtype=np.float64)
        channels = _constant(np.moveaxis(grid, 0, -1) if last else grid, x)
        batch = x.shape[0] if x.shape[0] >= 0 else paddle.shape(x)[0]  # -1 where input_spec is open
        channels = channels.astype(x.dtype).expand([batch, *channels.shape])
        return paddle.concat([x, channels], axis=-1 if last else 1)

    def extra_repr(self) -> str:
        return f"coords={self.coords!r}, data_format={self.data_format!r}"


class Network(_TakesFused, nn.Sequential):
    """A :class:`coordconv.networks.Network` as a Paddle layer; input ``(N, C, *S)``."""

    def __init__(self, network: networks.Network) -> None:
        super().__init__(
            *(
                (layer.name or f"{layer.kind.lower()}{i}", _layer(layer))
                for i, layer in enumerate(network.layers)
            )
        )
        self.network = network

    def export_weights(self) -> Weights:
        """The canonical weights under dotted names."""
        arrays = _canonical(self, dict(self.named_parameters()))
        return self.network.weights(arrays)

    def import_weights(self, mapping: Mapping[str, Array]) -> None:
        """Take canonical weights; errors as a layer's ``import_weights``, nothing changed."""
        _import(self, mapping, self.network.coordinates())


def build(
    network: networks.Network, weights: Mapping[str, Array], dtype: str = "float32"
) -> Network:
    """Build a network with these weights."""
    if dtype in ("float16", "bfloat16") and paddle.device.get_device() == "cpu":
        raise NotImplementedError("paddle convolutions have no 16-bit types on a CPU")
    module = Network(network).to(dtype=getattr(paddle, dtype))
    module.import_weights(weights)
    return module


def evaluate(
    module: Network,
    weights: Mapping[str, Array],
    x: Array,
    dy: Array | None = None,
    *,
    compiled: bool = COMPILED,
) -> tuple[Array, dict[str, Array]]:
    """Output and gradients; see :mod:`coordconv.backends`."""
    module.import_weights(weights)
    names, parameters = zip(*module.named_parameters(), strict=True)
    dtype = parameters[0].dtype
    run = paddle.jit.to_static(module.forward, full_graph=True) if compiled else module
    given = paddle.to_tensor(x, dtype, stop_gradient=dy is None)
    if dy is None:
        with paddle.no_grad():
            return _numpy(run(given)), {}
    output = run(given)
    gradients = paddle.grad(output, (given, *parameters), paddle.to_tensor(dy, dtype))
    found = zip(("x", *names), gradients, strict=True)
    return _numpy(output), _canonical(module, dict(found))


def trainer(
    module: Network, weights: Mapping[str, Array], optimizer: str = "adam", epsilon: float = 1e-8
) -> tuple[Callable[[Array, Array, float], float], Callable[[], Weights]]:
    """A training step and the weights it leaves; see :mod:`coordconv.backends`."""
    module.import_weights(weights)
    kinds: dict[str, Any] = {
        "adam": partial(paddle.optimizer.Adam, epsilon=epsilon),
        "sgd": paddle.optimizer.SGD,
    }
    rule = kinds[optimizer](parameters=module.parameters())

    def step(x: Array, target: Array, learning_rate: float) -> float:
        rule.set_lr(learning_rate)
        rule.clear_grad()
        wanted = paddle.to_tensor(target)
        squared = wanted.is_floating_point()
        criterion = nn.functional.mse_loss if squared else nn.functional.cross_entropy
        loss = criterion(module(paddle.to_tensor(x)), wanted)
        loss.backward()
        rule.step()
        return float(loss)

    return step, module.export_weights


def read_state(path: str) -> dict[str, Array]:
    """The arrays of a ``.pdparams`` file that is no pickle; see :mod:`coordconv.backends`.

    ``paddle.load`` runs whatever code a pickle holds, and has no option that would not.
    """
    try:
        return read_weights(path)
    except ValueError as error:
        if "not a safetensors file" not in str(error):
            raise
        raise ValueError(
            f"{error}\nPaddle's own files are pickles, which may hold code, and Paddle cannot read "
            "them without running it. If you trust this one, let Paddle write it anew:\n"
            "  import paddle\n"
            f"  paddle.save(paddle.load({path!r}), 'safe.pdparams', safetensors=True)"
        ) from error


def from_state(network: networks.Network, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Canonical arrays from Paddle's, or Paddle's from canonical ones: linear weights swap axes."""
    layers = (layer for layer in network.layers if isinstance(layer, networks.Linear))
    linear = {f"{layer.name}.weight" for layer in layers}
    return {n: np.ascontiguousarray(a.T) if n in linear else a for n, a in arrays.items()}


def write_state(path: str, network: networks.Network, weights: Mapping[str, Array]) -> None:
    """Write a ``.pdparams`` file as ``paddle.save`` does; see :mod:`coordconv.backends`."""
    content = BytesIO()
    state = from_state(network, weights)
    paddle.save({name: paddle.to_tensor(array) for name, array in state.items()}, content)
    replace_file(path, content.getvalue())


def recorded(
    layer: nn.Layer,
    *,
    names: Names = None,
    output_gradient: Array | Mapping[str, Array] | None = None,
    **kwargs: Any,
) -> Model:
    """The layer as a function on NumPy arrays that returns what each layer in it returned.

    It makes models for :func:`coordconv.parity.compare`; see :mod:`coordconv.backends`. The layer
    runs as it is, in training or in evaluation, and is left as it was, its buffers too. Inputs
    that are floating-point get the type of its first floating-point parameter.

    Args:
        layer: any layer that is not compiled: ``to_static`` with ``full_graph=True`` hides the
            layers inside, and without it fails on what records them.
        names: other names for the layers inside it, by those of ``named_sublayers()``.
        output_gradient: the output's gradient, to have gradients recorded, too.
        kwargs: what ``layer`` is called with beside the inputs.

    Example:
        >>> net = nn.Sequential(CoordConv2D(3, 8, 3), nn.ReLU())
        >>> run = recorded(net, names={"0": "conv"})
        >>> {name: array.shape for name, array in run(np.ones((1, 3, 5, 5))).items()}
        {'conv': (1, 8, 3, 3), '1': (1, 8, 3, 3), 'model output': (1, 8, 3, 3)}
    """

    def run(*inputs: Array) -> Mapping[str, Array]:
        floats = [p for p in layer.parameters() if paddle.is_floating_point(p)]
        given = [paddle.to_tensor(x) for x in inputs]
        if floats:
            given = [x.astype(floats[0].dtype) if paddle.is_floating_point(x) else x for x in given]
        recording = Recording(names)
        graph: dict[str, Tensor] = {}  # what gradients are wanted of

        def leaf(name: str, part: Any) -> Any:
            if not isinstance(part, Tensor):
                return part
            recording.keep(name, _numpy(part))
            if output_gradient is None or not paddle.is_floating_point(part):
                return part
            graph[name] = _leaf_of_graph(part) if part.stop_gradient else part
            return graph[name].clone()  # the model may write to what it is given

        def hook(name: str) -> Any:
            def after(_: Any, __: Any, output: Any) -> Any:
                made = recording.visit(name, output, leaf)
                return None if output_gradient is None else made

            return after

        with ExitStack() as stack, paddle.set_grad_enabled(output_gradient is not None):
            stack.callback(_restorer(layer))
            for name, each in layer.named_sublayers():
                stack.callback(each.register_forward_post_hook(hook(name)).remove)
            if output_gradient is not None:
                given = [_leaf_of_graph(x) if paddle.is_floating_point(x) else x for x in given]
            # Clones, since no leaf of a graph can be written to.
            output = layer(*(x.clone() for x in given), **kwargs)
            intermediates = dict(graph)
            recording.end(output, leaf)
            if output_gradient is None:
                return in_order(recording.found())
            outputs = {name: graph[name] for name in graph if name not in intermediates}
            shapes = {name: tuple(tensor.shape) for name, tensor in outputs.items()}
            gradients = given_gradients(output_gradient, shapes)
            wanted = dict(zip(input_names(len(given)), given, strict=True)) | intermediates
            wanted = {name: tensor for name, tensor in wanted.items() if not tensor.stop_gradient}
            if not wanted:
                return in_order(recording.found())
            found = paddle.grad(
                [*outputs.values()],
                [*wanted.values()],
                [paddle.to_tensor(gradients[n], outputs[n].dtype) for n in outputs],
                allow_unused=True,
            )
            arrays = (
                _numpy(paddle.zeros_like(tensor) if gradient is None else gradient)
                for tensor, gradient in zip(wanted.values(), found, strict=True)
            )
            return in_order(recording.found(), zip(wanted, arrays, strict=True))

    return run


def _leaf_of_graph(tensor: Tensor) -> Tensor:
    """The same values, of which gradients can be taken."""
    tensor = tensor.detach()
    tensor.stop_gradient = False
    return tensor


def _restorer(layer: nn.Layer) -> Callable[[], None]:
    """What gives a layer's state but for what is trained, as batch statistics, its values of now.

    Paddle keeps some of it as parameters that are not trained.
    """
    state = [*layer.buffers(), *(p for p in layer.parameters() if p.stop_gradient)]
    saved = [(tensor, tensor.clone()) for tensor in state if tensor._is_initialized()]

    def restore() -> None:
        with paddle.no_grad():
            for tensor, value in saved:
                if not paddle.equal_all(tensor, value):
                    tensor.set_value(value)

    return restore


def _layer(layer: networks.Layer) -> nn.Layer:
    match layer:
        case networks.Conv():
            return _conv(layer)
        case networks.Linear():
            return nn.Linear(layer.in_features, layer.out_features)
        case networks.ReLU():
            return nn.ReLU()
        case networks.Flatten():
            return nn.Flatten()


def _conv(layer: networks.Conv) -> nn.Layer:
    geometry = layer.geometry
    kernel, stride, dilation, output_padding, holes = geometry.per_axis
    pads: Any = geometry.padding
    same, mode = pads == "same", geometry.padding_mode
    ends: tuple[int, ...] = () if same else tuple(end for pair in pads for end in pair)
    copying, unequal = mode != "zeros", len(set(ends)) > 1
    lacking = {
        "input_dilation": max(holes) > 1,
        "dilation with padding='SAME'": same and max(dilation) > 1,
        "padding_mode with padding='SAME'": same and copying,
        "padding_mode with unequal padding": copying and unequal,
        "negative padding": min(ends, default=0) < 0,
        "output_padding of the stride or more": any(
            extra >= s for extra, s in zip(output_padding, stride, strict=True)
        ),
    }
    for option, wanted in lacking.items():
        if wanted:
            raise NotImplementedError(f"paddle convolutions have no {option}")
    options: dict[str, Any] = {"padding_mode": mode}
    if geometry.transposed:
        options = {"output_padding": list(output_padding)}
    if layer.coords:
        options["coords"] = layer.coords
    name = f"Conv{geometry.rank}D{'Transpose' if geometry.transposed else ''}"
    return (globals()[f"Coord{name}"] if layer.coords else vars(nn)[name])(  # type: ignore[no-any-return]
        layer.in_channels,
        layer.out_channels,
        kernel,
        stride=stride,
        padding="SAME" if same else ends[0] if copying else ends,
        dilation=dilation,
        groups=geometry.groups,
        bias_attr=None if layer.bias else False,
        **options,
    )


def _numpy(tensor: Tensor) -> Array:
    if tensor.dtype == paddle.bfloat16:  # NumPy has none; float32 holds every value of it
        tensor = tensor.astype(paddle.float32)
    return tensor.numpy()  # a copy


def _canonical(module: nn.Layer, tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """Tensors under the names of a module's parameters, as canonical arrays."""
    linear = _linear_weights(module)
    arrays = {name: _numpy(tensor) for name, tensor in tensors.items()}
    return {n: np.ascontiguousarray(a.T) if n in linear else a for n, a in arrays.items()}


def _linear_weights(module: nn.Layer) -> set[str]:
    """The names of the weights that Paddle keeps as ``(in, out)``."""
    layers = module.named_sublayers()
    return {f"{name}.weight" for name, layer in layers if isinstance(layer, nn.Linear)}


def _import(
    module: nn.Layer, mapping: Mapping[str, Array], coordinates: Mapping[str, Coordinates]
) -> None:
    linear = _linear_weights(module)
    parameters = dict(module.named_parameters())
    shapes = {
        name: tuple(tensor.shape)[:: -1 if name in linear else 1]
        for name, tensor in parameters.items()
    }
    arrays = checked(mapping, shapes, coordinates)
    with paddle.no_grad():
        for name, tensor in parameters.items():
            array = arrays[name].T if name in linear else arrays[name]
            tensor.set_value(paddle.to_tensor(array).astype(tensor.dtype))
