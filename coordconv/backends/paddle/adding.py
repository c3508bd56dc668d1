"""Paddle's hand in append and map.

In eager execution the coordinates are constants that NumPy made, kept on the device for the next
call. In a traced program they are made in the graph, by the same formula, so that they follow a
size that may be unknown.

On a CPU Paddle takes long to add a tensor that has to be broadcast, be it only a bias: about as
long as to convolve 3 channels to 64. A product of two matrices is added in place in a fraction of
that time. So P and the bias are one, and are added as a product: see :func:`_add_product`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from coordconv import position_bias
from coordconv.backends.paddle import options
from coordconv.coordinates import Coordinates
from coordconv.grid import channel_values
from coordconv.position_bias import MapPlan, plain
from coordconv.weights.kernels import KernelLayout
from coordconv.windows import Window

_CONVOLVE: dict[tuple[int, bool], Any] = {  # by rank, and whether it is transposed
    (1, False): nn.functional.conv1d,
    (2, False): nn.functional.conv2d,
    (3, False): nn.functional.conv3d,
    (1, True): nn.functional.conv1d_transpose,
    (2, True): nn.functional.conv2d_transpose,
    (3, True): nn.functional.conv3d_transpose,
}
_LOW_PRECISION = (paddle.float16, paddle.bfloat16)
_GRIDS: dict[bool, Any] = {False: MapPlan.padded_grid, True: MapPlan.channels_last}


def spatial_shape(x: Tensor, channels_last: bool) -> tuple[Any, ...]:
    """The spatial shape: ints, and a traced program's scalars where a length is unknown."""
    shape = list(x.shape)
    if -1 in shape:
        lengths = paddle.shape(x)
        shape = [n if n >= 0 else lengths[axis] for axis, n in enumerate(shape)]
    return tuple(shape[1:-1] if channels_last else shape[2:])


def is_low_precision(kernel: Tensor) -> bool:
    """Whether a convolution with this kernel is computed in 16 bits."""
    return kernel.dtype in _LOW_PRECISION or paddle.is_autocast_enabled()


def convolve(
    layer: Any,
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    output_size: Any = None,
    groups: int | None = None,
) -> Tensor:
    """What a layer's base class does with an input, with another kernel, bias and groups."""
    if layer._padding_mode != "zeros":
        ends, mode = layer._reversed_padding_repeated_twice, layer._padding_mode
        x = nn.functional.pad(x, ends, mode=mode, data_format=layer._data_format)
    steps = options.steps(layer, output_size)
    steps["groups"] = groups or layer._groups
    return _CONVOLVE[layer.rank, layer.transposed](x, kernel, bias, **steps)  # type: ignore[no-any-return]


def choose(layer: Any, x: Tensor) -> str:
    """Append or map, for an input of a layer."""
    geometry, batch = options.geometry(layer), x.shape[0]
    shape = tuple(x.shape[1:-1] if layer.channels_last else x.shape[2:])
    known = -1 not in shape
    return position_bias.choose(
        geometry,
        layer.coords,
        layer._in_channels,
        layer._out_channels,
        batch=batch if batch >= 0 else None,
        positions=math.prod(geometry.lengths(shape)) if known else None,
        low_precision=is_low_precision(layer.weight),
        fused=_is_quick(x),
        block=1,  # its convolution is one product of matrices
    )


def split(layout: KernelLayout, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """The features' part of a kernel and the coordinates'."""
    if layout.transposed:
        return layout.split(kernel)
    # The gradient of two slices takes up to 60 times as long, as each is filled up with zeros.
    return tuple(paddle.split(kernel, [layout.features, -1], 1))  # type: ignore[return-value]


def append(
    coords: Coordinates,
    x: Tensor,
    channels_last: bool,
    groups: int = 1,
    window: Window | None = None,
) -> Tensor:
    """The input with the coordinates behind the features of each group."""
    axis = -1 if channels_last else 1
    grid = _coordinates(coords, x, channels_last, window)
    if paddle.in_dynamic_mode() and not x.stop_gradient:
        grid = grid.detach()  # a gradient that nobody asks for: without it that of concat has none
        grid.stop_gradient = False
    parts = x.chunk(groups, axis) if groups > 1 else [x]
    return paddle.concat([each for part in parts for each in (part, grid)], axis)


def add_map(
    layer: Any, output: Tensor, x: Tensor, kernel: Tensor, output_size: Any = None
) -> Tensor:
    """A convolution's output, and P and the layer's bias, which are made as one; rounded once.

    The ``output`` is that of the features, without a bias; the ``kernel`` is the coordinates' part,
    ``(out, n, *kernel size)``; ``output_size`` is what the call of a transposed layer wants.
    """
    coords, bias, last = layer.coords, layer.bias, layer.channels_last
    low = is_low_precision(kernel)
    if low:  # neighbouring coordinates may be the same number in 16 bits
        kernel = kernel.astype(paddle.float32)
        bias = None if bias is None else bias.astype(paddle.float32)
    shapes = spatial_shape(x, last), spatial_shape(output, last)
    quick = _is_quick(output) and not low
    with _no_autocast():
        if quick and len(output) == 1 and not last and len(coords.along_axes) == len(coords):
            # One sample's P would take as long as the convolution, and is never made.
            plan = MapPlan(options.geometry(layer, shapes[0], output_size), coords, *shapes)
            return _add_product(output, *_product(plan, kernel, bias))
        if coords.outside == "zero":  # padding does to coordinates what it does to features
            one = x[:1].astype(kernel.dtype) if low else x[:1]
            grid = _coordinates(coords, one, last)
            kernel = kernel.moveaxis(0, 1) if layer.transposed else kernel
            added = convolve(layer, grid, kernel, bias, output_size, groups=1)
            if not paddle.in_dynamic_mode():
                # Of a batch that is not known to be 1, paddle.inference takes P for as large as
                # the output, with which it fuses the sum, and fails.
                added = added[0]
        else:
            plan = MapPlan(options.geometry(layer, shapes[0], output_size), coords, *shapes)
            conv = _CONVOLVE[layer.rank, False]
            added = plan.convolve(
                kernel, _made(MapPlan.padded_grid, plan, kernel)[None], conv, bias
            )
            added = added.moveaxis(1, -1) if last else added
        if quick:
            return _add_product(output, _ones(len(output), added.dtype), added.reshape([1, -1]))
        return (output + added).astype(output.dtype)


def add_map_of_window(
    layer: Any, output: Tensor, x: Tensor, kernel: Tensor, output_size: Any, window: Window
) -> Tensor:
    """As :func:`add_map`, of inputs that show parts of their frames."""
    bias, last, low = layer.bias, layer.channels_last, is_low_precision(kernel)
    if low:
        kernel = kernel.astype(paddle.float32)
        bias = None if bias is None else bias.astype(paddle.float32)
    shape, lengths = spatial_shape(x, last), spatial_shape(output, last)
    plan = MapPlan(options.geometry(layer, shape, output_size), layer.coords, shape, lengths)
    conv = _CONVOLVE[layer.rank, False]
    with _no_autocast():
        if not plan.is_affine:
            grids = _made(MapPlan.padded_grid, plan, kernel, window)
            added = plan.convolve(kernel, grids, conv, bias)
            added = added.moveaxis(1, -1) if last else added
            return (output + added).astype(output.dtype)

        def convolve(channel: int, grids: Tensor) -> Tensor:
            return plan.convolve(kernel[:, channel : channel + 1], grids, conv)  # type: ignore[no-any-return]

        maps = paddle.stack(plan.maps(_made(MapPlan.basis, plan, kernel), convolve))
        maps = maps.moveaxis(1, -1) if last else maps
        left = _made(MapPlan.coefficients, plan, kernel, window)
        count, ones = 2 * len(layer.coords), [1] * (layer.rank + 1)
        if paddle.in_dynamic_mode():
            added = paddle.matmul(left, maps.reshape([count, -1])).reshape([-1, *maps.shape[1:]])
        else:  # a program cannot be told a shape of several unknown lengths
            added = sum(left[:, i].reshape([-1, *ones]) * maps[i] for i in range(count))
        if bias is not None:
            added = added + (bias if last else bias.reshape([-1, *ones[1:]]))
        return (output + added).astype(output.dtype)


def add_pointwise(layer: Any, x: Tensor, window: Window | None) -> Tensor:
    """An input, and what a pointwise convolution makes of its coordinates, rounded once."""
    coords, weight, bias, last = layer.coords, layer.weight, layer.bias, layer.channels_last
    if is_low_precision(weight):
        weight = weight.astype(paddle.float32)
        bias = None if bias is None else bias.astype(paddle.float32)
    with _no_autocast():
        one = x[:1].detach().astype(weight.dtype)
        grids = _coordinates(coords, one, last, window)
        # A product, since Paddle gets second derivatives of convolutions wrong.
        matrix = weight.reshape([-1, len(coords)]).t()
        grids = grids if last else grids.moveaxis(1, -1)
        if paddle.in_dynamic_mode():
            added = nn.functional.linear(grids, matrix, bias)
        else:  # paddle.inference fuses a linear with the sum below, and fails
            added = sum(grids[..., i : i + 1] * matrix[i] for i in range(len(coords)))
            added = added if bias is None else added + bias
        added = added if last else added.moveaxis(-1, 1)
        if _is_quick(x) and x.dtype == added.dtype and len(added) == 1:
            return _add_product(x.clone(), _ones(len(x), x.dtype), added.reshape([1, -1]))
        return (x + added).astype(x.dtype)


def _coordinates(
    coords: Coordinates, x: Tensor, channels_last: bool, window: Window | None = None
) -> Tensor:
    """The coordinates of an input, maybe in its frame, for each of its samples, in its format."""
    shape = spatial_shape(x, channels_last)
    if window is None and paddle.in_dynamic_mode():
        grid = _grid(coords, shape, channels_last, x.dtype, x.place)
        return grid.expand([len(x), *grid.shape])
    exact = _wide(x.dtype)
    zeros = paddle.zeros_like(x[..., :1] if channels_last else x[:, :1], exact)  # for each sample
    if coords.own or window is not None:
        grid = _made(_GRIDS[channels_last], plain(coords, shape), x, window)
        return (zeros + grid).astype(x.dtype)
    # A stack of the channels would make the program larger.
    lengths = [_scalar(n, exact) for n in shape]
    positions = [_arange(n, exact) for n in lengths]
    values = channel_values(coords, positions, lengths, paddle.sqrt)
    parts = [zeros + (v.unsqueeze(-1) if channels_last else v) for v in values]
    return paddle.concat(parts, -1 if channels_last else 1).astype(x.dtype)


def _made(
    method: Callable[..., Any], plan: MapPlan, like: Tensor, window: Window | None = None
) -> Any:
    """What a method of a plan makes, in the type of ``like``: kept, or made in the graph.

    With a window, and in a graph, it is in float32 at least.
    """
    eager = paddle.in_dynamic_mode()
    if eager and window is None:
        return _kept(method, plan, like.dtype, like.place)
    dtype = _wide(like.dtype)

    def convert(value: Any) -> Tensor:
        tensor = value if not isinstance(value, np.ndarray) else paddle.to_tensor(value)
        return tensor.astype(dtype)

    frame: tuple[Any, ...] = ()
    if window is not None:
        if eager and plan.coords.own:
            return convert(method(plan, np.arange, np, window.in_frame))
        frame = (partial(window.in_frame, convert=convert),)
    elif plan.coords.own and all(isinstance(n, int) for n in (*plan.shape, *plan.lengths)):
        return convert(position_bias.known(method, plan, _exact(dtype)))
    if not eager:
        # Of a known size, too: a program keeps a constant as text, 44 MB of it for 608x608 samples.
        sizes = (tuple(_scalar(n, dtype) for n in each) for each in (plan.shape, plan.lengths))
        plan = MapPlan(plan.geometry, plan.coords, *sizes)
    return method(plan, lambda n: _arange(n, dtype), paddle, *frame)


def _arange(n: Any, dtype: Any) -> Tensor:
    """The numbers below ``n`` in a graph, where Paddle keeps ends that are plain in float64."""
    return paddle.arange(0, paddle.full([], n, dtype) if isinstance(n, int) else n, dtype=dtype)


def _scalar(n: Any, dtype: Any) -> Any:
    """A length for arithmetic with coordinates: Paddle does not mix floats and ints in a graph."""
    return n if isinstance(n, int) else n.astype(dtype)


@lru_cache(maxsize=64)
def _kept(method: Callable[..., Any], plan: MapPlan, dtype: Any, place: Any) -> Tensor:
    # The tensors alone are kept, and not NumPy's arrays as well.
    made = position_bias.computed(method, plan, _exact(dtype))
    return paddle.to_tensor(made, place=place).astype(dtype)


@lru_cache(maxsize=64)
def _grid(
    coords: Coordinates, shape: tuple[int, ...], channels_last: bool, dtype: Any, place: Any
) -> Tensor:
    """A grid that is kept, and found without a plan: small layers append it in every call."""
    return _kept(_GRIDS[channels_last], plain(coords, shape), dtype, place)


def _wide(dtype: Any) -> Any:
    return paddle.float32 if dtype in _LOW_PRECISION else dtype


def _exact(dtype: Any) -> Any:
    return np.float32 if dtype == paddle.float32 else np.float64


def _no_autocast() -> AbstractContextManager[Any]:
    # Where autocast is off, to turn it off takes longer than to ask.
    return paddle.amp.auto_cast(enable=False) if paddle.is_autocast_enabled() else nullcontext()


def _is_quick(x: Tensor) -> bool:
    """Whether it is a tensor, or a layer's input, to which a product can be added in place."""
    return (
        paddle.in_dynamic_mode()
        and x.place.is_cpu_place()
        and x.dtype in (paddle.float32, paddle.float64)
        and x.size > 0
        and not x.is_dist()
    )


@lru_cache(maxsize=64)
def _tables(plan: MapPlan, dtype: Any, bias: bool) -> list[Tensor]:
    """The tables of the axes; the last as a matrix, with a row of ones more for a bias."""
    *others, last = position_bias.known(MapPlan.tables, plan, _exact(dtype))
    last = last.reshape((-1, last.shape[-1]))
    if bias:
        last = np.concatenate([last, np.ones_like(last[:1])])
    return [paddle.to_tensor(table, place=paddle.CPUPlace()) for table in (*others, last)]


def _product(plan: MapPlan, kernel: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """P and the bias of a layer without a radius, as a product of two matrices.

    The first has a row for each output channel and each place on the axes before the last.
    """
    out, tables = len(kernel), _tables(plan, kernel.dtype, bias is not None)
    left, right = plan.as_product(kernel, tables, _einsum, out)
    if bias is not None:
        column = bias.unsqueeze(1).expand([out, len(left) // out]).reshape([-1, 1])
        left = paddle.concat([left, column], 1)
    return left, right


def _einsum(_: str, term: Tensor, table: Tensor) -> Tensor:
    """The sum that ``contract`` asks for, ``rckz,ckt->rtcz``: Paddle's has no second derivative."""
    r, c, k, z = term.shape
    product = paddle.matmul(term.transpose([1, 0, 3, 2]).reshape([c, r * z, k]), table)
    return product.reshape([c, r, z, -1]).transpose([1, 3, 0, 2])


def _add_product(output: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``output + left @ right``, the product reshaped, in place if a gradient can be had of that.

    Paddle takes long to allocate a tensor, and longer for the gradient of a sum.
    """
    if not output.stop_gradient:
        return _AddProduct.apply([_always_differentiable(), output, left, right])  # type: ignore[no-any-return]
    if left.stop_gradient and right.stop_gradient:
        return _add_in_place(output, left, right)
    return output + paddle.matmul(left, right).reshape(output.shape)


def _add_in_place(output: Tensor, left: Tensor, right: Tensor) -> Tensor:
    flat = output.reshape([len(left), -1])  # a view, but by Paddle's flags it may be a copy
    return paddle.addmm_(flat, left, right).reshape(output.shape)


class _AddProduct(paddle.autograd.PyLayer):
    """:func:`_add_in_place` where there are gradients.

    Paddle's own would copy the output's gradient, and has no derivative. It takes one list, whose
    first tensor is always in need of a gradient: :func:`_always_differentiable`. Of separate
    tensors, and of a list whose first is not in need, Paddle refuses gradients where
    ``paddle.grad`` is asked for some of the inputs alone.
    """

    @staticmethod
    def forward(ctx: Any, tensors: list[Tensor]) -> Tensor:
        _, output, left, right = tensors
        ctx.left = None if right.stop_gradient else left
        ctx.right = None if left.stop_gradient else right
        ctx.rows = len(left)
        return _add_in_place(output, left, right)

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
def _always_differentiable() -> Tensor:
    """A tensor that takes gradients, though it never gets one."""
    tensor = paddle.zeros([1])
    tensor.stop_gradient = False
    return tensor


@lru_cache(maxsize=16)
def _ones(count: int, dtype: Any) -> Tensor:
    return paddle.ones([count, 1], dtype, device="cpu")
