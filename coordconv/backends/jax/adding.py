"""JAX's hand in append and map, for NNX and for Linen.

Where the sizes are plain ints the coordinates are constants that NumPy made; where an exporter
leaves them open, JAX makes the coordinates in the graph, by the same formula.

Two things are XLA's, which fuses sums with what comes before and after, but not products:

- Without a radius each coordinate is the product of a function of the first axis and one of the
  others, so that P is, too: a convolution with one axis less, and a product along the first axis.
- The gradient of a sum over the batch takes many times as long as that of a product.

``docs/performance.md`` has what they gain.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from coordconv import position_bias as core
from coordconv.backends.jax import options, windows
from coordconv.coordinates import Coordinates, axis_tokens
from coordconv.geometry import ConvGeometry, check_input
from coordconv.grid import Array
from coordconv.position_bias import MapPlan
from coordconv.windows import Window, check_fused

_HIGHEST = lax.Precision.HIGHEST  # else accelerators multiply float32 in bfloat16 or TF32
# JAX joins arrays of the same sharding alone, where a mesh is explicit, which it may be since 0.7.
_EXPLICIT = "out_sharding" in inspect.signature(jnp.broadcast_to).parameters
_MOST_SUMS = 6  # above, a product is faster than as many sums
_CONTRACTIONS = {  # by rank: the taps of one axis after another become its positions
    2: ("ctuo,cuy->ctyo",),
    3: ("ctuvo,cuy->ctyvo", "ctyvo,cvx->ctyxo"),
}


def check(conv: Any, coords: Coordinates, inputs: Any, channels: int | None) -> None:
    """Say what is wrong with a convolution's ``inputs (..., *S, C)``."""
    given = {"rank": len(options.kernel_size(conv)), "coords": len(coords)}
    check_input(inputs.shape, **given, channels=channels, channel_axis=-1, batched=-1)


def add_coords(
    inputs: jax.Array, coords: Coordinates, rank: int, given: Window | None = None
) -> jax.Array:
    """``inputs (..., *S, C)`` with the coordinates behind them, checked."""
    check_pointwise(coords, rank, inputs, None)
    inputs = jnp.asarray(inputs)
    return append(coords, inputs, rank, window=windows.window_of(given, inputs, rank))


def add_pointwise(
    coords: Coordinates, rank: int, arrays: Sequence[Any], given: Window | None = None
) -> jax.Array:
    """Inputs ``(..., *S, C)`` and what a pointwise convolution makes of their coordinates.

    The arrays are those of :func:`coord_conv`, the kernel being over the coordinates alone.
    """
    inputs, kernel, bias = arrays
    geometry, shape = core.POINTWISE[rank], inputs.shape[-1 - rank : -1]
    window = windows.window_of(given, inputs, rank)
    if window is None:
        added = position_bias(geometry, coords, shape, kernel)
    else:
        added = _bias_of_window(geometry, coords, shape, kernel, window)
    if bias is not None:
        added += bias.reshape((*(1,) * (added.ndim - 1), -1)).astype(added.dtype)
    return add(inputs, added)


def check_pointwise(coords: Coordinates, rank: int, inputs: Any, channels: int | None) -> None:
    """Say what is wrong with the ``inputs (..., *S, C)`` of :func:`add_pointwise`."""
    if not jnp.issubdtype(inputs.dtype, jnp.inexact):
        raise TypeError(f"input must be floating-point, got {inputs.dtype}")
    given = {"rank": rank, "coords": len(coords)}
    check_input(inputs.shape, **given, channels=channels, channel_axis=-1, batched=-1)


def coord_conv(
    layer: Any,
    arrays: Sequence[Any],
    convolve: Callable[[Any, Any, Any], jax.Array],
    made: jax.Array | None = None,
    given: Window | None = None,
) -> jax.Array:
    """The output of a layer of either kind of Flax, in one of the two ways.

    The arrays are the inputs ``(..., *S, C)``, the kernel over features and coordinates in Flax's
    layout, and the bias or None, in the type that is computed with. Of three such arrays the
    layer's base class makes what ``convolve`` returns. Of a fused layer P was ``made``, and the
    kernel is the features' part.
    """
    inputs, kernel, bias = arrays
    if made is not None:
        check_fused()
        return add_made(convolve(inputs, kernel, bias), made)
    rank, axis = len(options.kernel_size(layer)), options.input_axis(layer)
    window = windows.window_of(given, inputs, rank)
    shape = inputs.shape[-1 - rank : -1]
    geometry = options.geometry(layer, shape)
    if _is_known(shape):
        geometry.output_shape(shape)  # which says what does not fit
    if _way(layer, geometry, inputs, kernel.shape[-3 - axis]) == core.APPEND:
        appended = append(layer.coords, inputs, rank, options.groups(layer), window)
        return convolve(appended, kernel, bias)
    of_features, of_coordinates = split(layer, kernel)
    output = convolve(inputs, of_features, bias)
    if window is not None:
        return _sum(output, _bias_of_window(geometry, layer.coords, shape, of_coordinates, window))
    return add(output, position_bias(geometry, layer.coords, shape, of_coordinates))


def split(layer: Any, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The features' part of a layer's kernel, and ``(*kernel, n, out)`` in the canonical order."""
    axis = options.input_axis(layer)
    features = kernel.shape[axis] - len(layer.coords)
    of_features = lax.slice_in_dim(kernel, 0, features, axis=axis)
    of_coordinates = lax.slice_in_dim(kernel, features, kernel.shape[axis], axis=axis)
    if axis == -1:
        of_coordinates = of_coordinates.swapaxes(-1, -2)
    elif options.is_transposed(layer):
        of_coordinates = lax.rev(of_coordinates, tuple(range(kernel.ndim - 2)))
    return of_features, of_coordinates


def _way(layer: Any, geometry: ConvGeometry, inputs: jax.Array, out: int) -> str:
    if has_own_step(layer):  # whatever that function computes, it has features and coordinates
        if layer.coords.outside == "extend":
            raise ValueError(
                "a conv_general_dilated of one's own pads the coordinates as it pads the features, "
                f'so that they end at the border: want outside="zero", got {layer.coords}'
            )
        return core.APPEND
    if layer.map_only:
        return core.MAP
    rank = geometry.rank
    return core.choose(
        geometry,
        layer.coords,
        inputs.shape[-1],
        out,
        batch=_product(inputs.shape[: -1 - rank]),
        positions=_product(geometry.lengths(inputs.shape[-1 - rank : -1])),
        low_precision=jnp.finfo(inputs.dtype).bits < 32,
        fused=isinstance(inputs, jax.core.Tracer),
    )


def has_own_step(layer: Any) -> bool:
    """Whether the user gave the layer another function in place of ``lax``'s convolution."""
    own = getattr(layer, "conv_general_dilated_cls", None)
    own = own or getattr(layer, "conv_general_dilated", None)
    return own not in (None, lax.conv_general_dilated)


def _product(lengths: Sequence[Any]) -> int | None:
    """The product of plain ints; an exporter's symbols are unknown."""
    return math.prod(lengths) if _is_known(lengths) else None


def _is_known(lengths: Sequence[Any]) -> bool:
    return all(isinstance(n, int) for n in lengths)


def append(
    coords: Coordinates,
    x: jax.Array,
    rank: int,
    groups: int = 1,
    window: Window | None = None,
) -> jax.Array:
    """``x (..., *S, C)`` with the coordinates behind the features of each group."""
    plan = core.plain(coords, x.shape[-1 - rank : -1])
    grid = _made(MapPlan.channels_last, plan, _wide(x.dtype), window).astype(x.dtype)
    if window is not None and (x.ndim == rank + 1 or grid.shape[0] == 1):
        grid = grid[0]
    if groups > 1:
        x, grid = x.reshape((*x.shape[:-1], groups, -1)), jnp.expand_dims(grid, -2)
    options = {"out_sharding": jax.typeof(x).sharding} if _EXPLICIT else {}
    grid = jnp.broadcast_to(grid, (*x.shape[:-1], len(coords)), **options)
    x = jnp.concatenate([x, grid], -1)
    return x.reshape((*x.shape[:-2], -1)) if groups > 1 else x


def _made(
    method: Callable[..., Any], plan: MapPlan, dtype: Any, window: Window | None = None
) -> Any:
    """What a method of a plan makes: by NumPy where it can, and else in the graph.

    With a window the graph is preferred, but for channels that NumPy alone computes.
    """
    frame: tuple[Any, ...] = ()
    if window is None:
        if _is_known(plan.shape):
            return jax.device_put(core.known(method, plan, _exact(dtype)))
    elif plan.coords.own and not any(
        isinstance(each, jax.core.Tracer) for each in window.parts()[0]
    ):
        return jax.device_put(method(plan, np.arange, np, window.in_frame).astype(dtype))
    else:
        frame = (partial(window.in_frame, convert=lambda each: jnp.asarray(each, dtype)),)
    with _lenient():
        return method(plan, lambda n: lax.iota(dtype, n), jnp, *frame)


def _wide(dtype: Any) -> Any:
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def _bias_of_window(
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: Sequence[Any],
    kernel: jax.Array,
    window: Window,
) -> jax.Array:
    """As :func:`position_bias`, of inputs that show parts of their frames.

    It is ``(N, *S, out)``, or ``(*S, out)`` where all samples have one window.
    """
    kernel = kernel.astype(_wide(kernel.dtype))
    plan = MapPlan(geometry, coords, tuple(shape), geometry.lengths(shape))
    if not plan.is_affine:
        grids = _made(MapPlan.padded_grid, plan, kernel.dtype, window)
        return _of_samples(_convolved(plan, kernel, grids))

    def convolve(channel: int, grids: jax.Array) -> jax.Array:
        return _convolved(plan, _channels(kernel, [channel]), grids)

    maps = plan.maps(_made(MapPlan.basis, plan, kernel.dtype), convolve)
    given = _made(MapPlan.coefficients, plan, kernel.dtype, window)
    if not isinstance(kernel, jax.core.Tracer):
        product = jnp.tensordot(given, jnp.stack(maps), axes=1, precision=_HIGHEST)
        return _of_samples(product)
    # XLA fuses the sum with what P is added to, and not a product of matrices.
    columns = (given[:, i].reshape((-1,) + (1,) * maps[0].ndim) for i in range(len(maps)))
    return _of_samples(sum(a * b for a, b in zip(columns, maps, strict=True)))


def _of_samples(maps: jax.Array) -> jax.Array:
    """One map for each sample, or the one of all samples without an axis for them."""
    return lax.squeeze(maps, (0,)) if maps.shape[0] == 1 else maps


def position_bias(
    geometry: ConvGeometry, coords: Coordinates, shape: Sequence[Any], kernel: jax.Array
) -> jax.Array:
    """P, what the coordinates add to the output of every sample, ``(*output shape, out)``.

    The ``kernel (*kernel, n, out)`` has its taps in the canonical order; P is in its type, in
    float32 at least. Where the ``shape`` of the input is symbolic, P is a convolution alone.
    """
    if jnp.finfo(kernel.dtype).bits < 32:
        kernel = kernel.astype(jnp.float32)
    plan = MapPlan(geometry, coords, tuple(shape), geometry.lengths(shape))
    by_axes = _is_known(shape) and geometry.rank > 1
    divided = plan.divided(None) if by_axes else (None, plan)
    return plan.position_bias(kernel, divided, _by_axes, _by_convolution, _channels)  # type: ignore[no-any-return]


def _by_convolution(plan: MapPlan, kernel: jax.Array) -> jax.Array:
    """P as the convolution of the padded grid, a batch of one."""
    grid = _made(MapPlan.padded_grid, plan, kernel.dtype)
    return lax.squeeze(_convolved(plan, kernel, jnp.expand_dims(grid, 0)), (0,))


def _convolved(plan: MapPlan, kernel: jax.Array, grids: jax.Array) -> jax.Array:
    """P of each of several grids ``(N, n, *padded shape)``."""
    rank = plan.geometry.rank
    if plan.geometry.transposed:
        kernel = lax.rev(kernel, tuple(range(rank)))
    space = "DHW"[-rank:]
    return lax.conv_general_dilated(
        grids.astype(kernel.dtype),
        kernel,
        plan.stride,
        "VALID",
        rhs_dilation=plan.geometry.per_axis.dilation,
        dimension_numbers=(f"NC{space}", f"{space}IO", f"N{space}C"),
        precision=_HIGHEST,
    )


def _by_axes(plan: MapPlan, kernel: jax.Array) -> jax.Array:
    """P as a sum over the taps of the first axis, of products of one function for each axis."""
    rank = plan.geometry.rank
    first, *others = core.known(MapPlan.tables, plan, _exact(kernel.dtype))
    terms = jnp.moveaxis(kernel, -2, 0)  # channel, taps of the first axis, taps of others, out
    for table, contraction in zip(others, _CONTRACTIONS[rank], strict=True):
        table = jax.device_put(table).astype(kernel.dtype)
        terms = jnp.einsum(contraction, terms, table, precision=_HIGHEST)
    # All channels but that of the first axis have the same table, so that their terms are summed.
    runs_along = [token == axis_tokens(rank)[-1] for token in plan.coords.channels]
    tables, summed = [], []
    for whether in set(runs_along):
        alike = [c for c, is_along in enumerate(runs_along) if is_along == whether]
        tables.append(first[alike[0]])
        summed.append(_channels(terms, alike, axis=0).sum(0))
    return _sum_of_products(np.concatenate(tables), lax.concatenate(summed, 0))


def _sum_of_products(table: Array, terms: jax.Array) -> jax.Array:
    """``sum(table[t][:, None] * terms[t] for t in ...)`` along a new first axis.

    XLA fuses such sums with what P is added to, and not a product of matrices. Of many terms the
    product is the faster one, and always for the gradient.
    """

    def product(terms: jax.Array) -> jax.Array:
        factor = jax.device_put(table).astype(terms.dtype)
        return jnp.tensordot(factor, terms, axes=(0, 0), precision=_HIGHEST)

    @jax.custom_jvp
    def sums(terms: jax.Array) -> jax.Array:
        columns = table.reshape(*table.shape, *(1,) * (terms.ndim - 1)).astype(terms.dtype)
        pairs = zip(columns, lax.split(terms, (1,) * len(table)), strict=True)
        return sum(column * term for column, term in pairs)

    sums.defjvp(lambda primals, tangents: (sums(*primals), product(*tangents)))
    if len(table) > _MOST_SUMS or not isinstance(terms, jax.core.Tracer):
        return product(terms)
    return sums(terms)


def add(output: jax.Array, bias: jax.Array) -> jax.Array:
    """The ``output (..., *S, out)`` of a convolution and P, rounded once."""
    batch = output.shape[: output.ndim - bias.ndim]
    if batch not in ((), (1,)) and isinstance(bias, jax.core.Tracer) and _is_known(bias.shape):
        # As a product, since the gradient of that is one, too: XLA takes many times as long to sum
        # over the batch, on a CPU. Forward it sees through the product, and just adds. Of symbolic
        # lengths that might be 0, as those of a stride, it reshapes none.
        ones = jnp.ones((math.prod(batch), 1), bias.dtype)
        bias = jnp.matmul(ones, bias.reshape((1, -1)), precision=_HIGHEST).reshape(output.shape)
    return _sum(output, bias)


def _sum(output: jax.Array, bias: jax.Array) -> jax.Array:
    """The sum in the wider type of the two, rounded to the output's."""
    bias = bias.reshape((*(1,) * (output.ndim - bias.ndim), *bias.shape))
    wide = max(output.dtype, bias.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    return (output.astype(wide) + bias.astype(wide)).astype(output.dtype)


def add_made(output: jax.Array, bias: jax.Array) -> jax.Array:
    """The ``output`` of a convolution and a P that was made before, in a type that is wide enough.

    In PyTorch and Paddle a layer's input has the type of its kernel; JAX promotes the kernel.
    """
    if jnp.finfo(output.dtype).bits > jnp.finfo(bias.dtype).bits:
        raise ValueError(
            f"input must not make the output {output.dtype}, as the map that was fused is "
            f"{bias.dtype}: fuse a layer in the type that it is to run in"
        )
    return _sum(output, bias)  # for which no gradient is taken


def _channels(array: jax.Array, picked: Sequence[int], axis: int = -2) -> jax.Array:
    """The channels in ``picked`` of an axis."""
    if list(picked) == list(range(array.shape[axis])):
        return array
    parts = [lax.slice_in_dim(array, c, c + 1, axis=axis) for c in picked]
    return lax.concatenate(parts, axis % array.ndim)


def _exact(dtype: Any) -> Any:
    return np.float64 if jnp.finfo(dtype).bits == 64 else np.float32


@contextmanager
def _lenient() -> Iterator[None]:
    """Within it JAX broadcasts and converts by itself, as the formulas of the core ask for."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
