"""Append or map: the two exact ways to compute a CoordConv, and which of them is cheaper.

A convolution is linear in its channels, and the coordinates do not depend on the data. So with the
kernel split into its features' part F and its coordinates' part G

    CoordConv(x) = Conv([x, grid]; kernel) + bias         "append": the definition
                 = Conv(x; F) + bias + P                   "map"
    P = Conv(grid; G), one position bias for the whole batch, shape (out, *output shape).

Append copies the input to put the coordinates behind it, and convolves an odd number of channels.
Map copies F out of the kernel, makes P, and passes over the output once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from coordconv.coordinates import Coordinates, axis_tokens
from coordconv.geometry import ConvGeometry
from coordconv.grid import Array, channel_values, frozen, ramp

APPEND, MAP = "append", "map"

# What costs() counts with; one unit is the time to read or to write a number.
_PRODUCTS = 10  # multiplications and additions in a unit
_BLOCK = 16  # channels that libraries work on together
_MOST_FOR_MAP = 2  # units for a number of P, made axis by axis
_CALLS = 2e5  # units for calling the functions that map calls more than append

# Multiplications of a convolution with the coordinates, from which the axes are contracted one by
# one instead: measured on two CPUs, in torch.
MANY_PRODUCTS = 2**25

# What a compiler is taken to compile for, which shall make one graph for all sizes.
USUAL_BATCH, USUAL_POSITIONS = 8, 2**12

# What a test or `coordconv parity --way` sets to have one of the two wherever both are right.
FORCED: str | None = None


def choose(
    geometry: ConvGeometry,
    coords: Coordinates,
    channels: int,
    out: int,
    *,
    batch: int | None,
    positions: int | None,
    low_precision: bool = False,
    fused: bool = False,
) -> str:
    """Which of the two ways computes a layer.

    Args:
        geometry: the convolution.
        coords: the coordinate channels.
        channels: the number of feature channels, of all groups.
        out: the number of output channels.
        batch: the number of samples, or None if a tracer does not tell.
        positions: the number of positions of the output of a sample, or None likewise.
        low_precision: whether the layer computes in 16 bits. Neighbouring coordinates on an axis of
            512 samples are closer together than bfloat16 can tell apart, so that they must not be
            appended: only the map is right.
        fused: whether P is added to the output as that is made, by a compiler or as a product, and
            is never written by itself.

    Returns:
        :data:`APPEND` or :data:`MAP`.
    """
    # With "extend" the coordinates do not end where the features do: there is nothing to append.
    if low_precision or coords.outside == "extend":
        return MAP
    if FORCED is not None:
        return FORCED
    # No library is fast at groups with a few channels more than the features.
    if geometry.groups > 1:
        return MAP
    if batch is None or positions is None:  # the graph is the simpler
        return APPEND
    append, map = costs(geometry, len(coords), channels, out, batch, positions, fused)
    return APPEND if append < map else MAP


def costs(
    geometry: ConvGeometry,
    n: int,
    channels: int,
    out: int,
    batch: int,
    positions: int,
    fused: bool = False,
) -> tuple[float, float]:
    """What append and map take more than the plain convolution, in numbers read or written.

    Append reads and writes the input, and multiplies the coordinates of every sample; libraries
    work on blocks of channels, so that two channels more may cost as much as sixteen. Map reads and
    writes the features' part of the kernel, makes P, and reads and writes the output again, unless
    P is added as the output is made; and it calls a few functions more. The measurements that the
    constants are from, and what this function makes of them, are in ``docs/performance.md``.

    Args:
        geometry: the convolution.
        n: the number of coordinate channels.
        channels: the number of feature channels.
        out: the number of output channels.
        batch: the number of samples.
        positions: the number of positions of the output of a sample.
        fused: as in :func:`choose`.
    """
    steps = math.prod(geometry.per_axis.stride)
    inputs = channels * positions * (1 / steps if geometry.transposed else steps)
    outputs, taps = out * positions, geometry.taps
    added = n
    if channels >= _BLOCK:
        added = -(-(channels + n) // _BLOCK) * _BLOCK - -(-channels // _BLOCK) * _BLOCK
    append = batch * (2 * inputs + outputs * taps * added / _PRODUCTS)
    map = 2 * channels * out * taps + _CALLS
    if not fused:
        map += outputs * (1 + min(n * taps / _PRODUCTS, _MOST_FOR_MAP)) + 2 * batch * outputs
    return append, map


def divide(
    geometry: ConvGeometry, coords: Coordinates, out: int, positions: int | None
) -> tuple[Coordinates | None, Coordinates | None]:
    """Which coordinates are contracted axis by axis for P, and which are convolved.

    An axis coordinate is a ramp along its axis and constant along the others, so that its part of P
    is a product of a few small matrices. On a large map these take a fraction of the time of a
    convolution, which sums over all taps; on a small one their several steps cost more than they
    save: docs/performance.md has the measurements. The radius is no such product.

    Args:
        geometry: the convolution.
        coords: the coordinate channels.
        out: the number of output channels.
        positions: the number of positions of the output; None, if it is unknown, counts as many.

    Returns:
        The two, with the order of their channels kept; None for either that has no channel.
    """
    axes = [token for token in coords.channels if token != "r"]
    work = math.inf if positions is None else out * positions * len(axes) * geometry.taps
    if not axes or work < MANY_PRODUCTS:
        return None, coords
    if len(axes) == len(coords):
        return coords, None
    return replace(coords, channels="".join(axes)), replace(coords, channels="r")


def picked(kernel: Any, coords: Coordinates, part: Coordinates) -> Any:
    """The channels of the coordinates' part ``(out, n, *kernel)`` that belong to some of them."""
    if part == coords:
        return kernel
    order = [coords.channels.index(token) for token in part.channels]
    return kernel[:, order]


def known_tables(
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: tuple[int, ...],
    lengths: tuple[int, ...],
    dtype: type[np.floating[Any]] = np.float32,
) -> tuple[Array, ...]:
    """What :func:`axis_tables` says, for a known shape: for each axis ``(n, kernel, length)``."""
    tables = axis_tables(geometry, coords, shape, lengths, np.arange)
    return tuple(np.stack(table).astype(dtype) for table in tables)


def axis_tables(
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: Sequence[Any],
    lengths: Sequence[Any],
    arange: Callable[[Any], Any],
) -> list[list[Any]]:
    """What each tap reads of the axes' coordinates, axis by axis.

    What a tap reads of a channel at a position is the product of one entry for each axis: of the
    ramp along the channel's own axis, and along the others 1, or 0 where padding reads 0.

    Args:
        geometry: the convolution.
        coords: coordinate channels other than the radius.
        shape: the spatial shape of the input, of plain or symbolic ints.
        lengths: the spatial shape of the output, likewise.
        arange: the integers from 0 to before its argument, as a one-dimensional array.

    Returns:
        For each axis, an array ``(kernel length, output length)`` for each channel.
    """
    tables = []
    tokens = reversed(axis_tokens(geometry.rank))
    for token, n, m, (first, _, hole), k, s, d in zip(
        tokens,
        shape,
        lengths,
        _places(geometry, shape, lengths),
        *geometry.per_axis[:3],
        strict=True,
    ):
        taps, steps = arange(k).reshape((-1, 1)), arange(m)
        if geometry.transposed:  # the kernel is read backwards, and moves by one place
            place = steps + (k - 1 - taps) * d + first
        else:
            place = steps * s + taps * d + first
        index, mask = _read(geometry, coords, place, hole, n)
        values = ramp(coords, index, n)
        ones = values * 0 + 1  # of the same type
        if mask is not None:
            values, ones = values * mask, ones * mask
        tables.append([values if c == token else ones for c in coords.channels])
    return tables


def as_product(
    kernel: Any, tables: Sequence[Any], einsum: Callable[..., Any], shape: Sequence[int] = ()
) -> tuple[Any, Any]:
    """The axes' part of P as a product of two matrices.

    Args:
        kernel: the coordinates' part without the radius, ``(out, n, *kernel)``.
        tables: per axis, what :func:`axis_tables` returns, as one array ``(n, kernel, length)``.
        einsum: the framework's.
        shape: the shape of ``kernel``, where a tracer's stand-in for it cannot be iterated.

    Returns:
        Arrays of shapes ``(out * other lengths, terms)`` and ``(terms, last length)``.
    """
    out, n, *sizes = shape or kernel.shape
    *others, last = tables
    term, rows = kernel, out
    for size, table in zip(sizes, others, strict=False):
        # The axes so far are rows; channels and the axes to come are summed over at the end.
        term = einsum("rckz,ckt->rtcz", term.reshape((rows, n, size, -1)), table)
        rows = rows * table.shape[-1]  # not in place: a tracer's number is a tensor
    return term.reshape((rows, -1)), last.reshape((-1, last.shape[-1]))


def contract(
    kernel: Any, tables: Sequence[Any], einsum: Callable[..., Any], shape: Sequence[int] = ()
) -> Any:
    """The axes' part of P, ``(out, *lengths)``, from what :func:`as_product` takes."""
    left, right = as_product(kernel, tables, einsum, shape)
    out = (shape or kernel.shape)[0]
    return (left @ right).reshape((out, *(table.shape[-1] for table in tables)))


@lru_cache(maxsize=64)
def padded_grid(
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: tuple[int, ...],
    lengths: tuple[int, ...],
    dtype: type[np.floating[Any]] = np.float32,
) -> Array:
    """The coordinates as the kernel slides over them, for P of a known shape.

    The arrays of the last few layers and shapes are kept: they are functions of these arguments.

    Args:
        geometry: the convolution.
        coords: the coordinate channels.
        shape: the spatial shape of the input.
        lengths: the spatial shape of the output, which ``output_size`` may have chosen.
        dtype: ``np.float32`` or ``np.float64``.

    Returns:
        A read-only array of shape ``(n, *padded shape)``. Its convolution without padding, with the
        stride of :func:`map_stride` and the dilation of ``geometry``, is P. For a transposed
        convolution the taps of the kernel have to be reversed.

    Example:
        >>> padded_grid(ConvGeometry((3,), padding=1), Coordinates("x"), (3,), (3,))
        array([[ 0., -1.,  0.,  1.,  0.]], dtype=float32)
    """
    values = padded_values(geometry, coords, shape, lengths, np.arange, np.sqrt)
    whole = padded_shape(geometry, shape, lengths)
    grid = np.stack([np.broadcast_to(v, whole) for v in values])
    return frozen((grid + 0.0).astype(dtype))  # padding reads 0, not -0


def map_stride(geometry: ConvGeometry) -> tuple[int, ...]:
    """The stride at which the kernel slides over the padded grid."""
    return (1,) * geometry.rank if geometry.transposed else geometry.per_axis.stride


def padded_shape(
    geometry: ConvGeometry, shape: Sequence[Any], lengths: Sequence[Any]
) -> tuple[Any, ...]:
    """The spatial shape of the padded grid; the lengths may be symbolic."""
    return tuple(count for _, count, _ in _places(geometry, shape, lengths))


def padded_values(
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: Sequence[Any],
    lengths: Sequence[Any],
    arange: Callable[[Any], Any],
    sqrt: Callable[[Any], Any],
) -> list[Any]:
    """The channels of the padded grid, made of a framework's operators.

    Args:
        geometry: the convolution.
        coords: the coordinate channels.
        shape: the spatial shape of the input, of plain or symbolic ints.
        lengths: the spatial shape of the output, likewise.
        arange: the integers from 0 to before its argument, as a one-dimensional array.
        sqrt: the square root of an array.

    Returns:
        One array a channel, each of which broadcasts to :func:`padded_shape`.
    """
    indices, masks = [], []
    for axis, (first, count, hole) in enumerate(_places(geometry, shape, lengths)):
        index, mask = _read(geometry, coords, arange(count) + first, hole, shape[axis])
        indices.append(index)
        if mask is not None:
            masks.append(mask.reshape((-1,) + (1,) * (geometry.rank - 1 - axis)))
    values = channel_values(coords, indices, shape, sqrt)
    for mask in masks:
        values = [value * mask for value in values]
    return values


def _places(
    geometry: ConvGeometry, shape: Sequence[Any], lengths: Sequence[Any]
) -> list[tuple[Any, Any, int]]:
    """Per axis, the first place that a tap reaches, the number of places, and the hole.

    A place is a sample or between two samples: from one sample to the next are ``hole`` places.
    """
    places: list[tuple[Any, Any, int]] = []
    for n, m, (before, after), k, s, d, _, hole in zip(
        shape, lengths, geometry.pads(shape), *geometry.per_axis, strict=True
    ):
        reach = d * (k - 1)
        if geometry.transposed:
            places.append((before - reach, m + reach, s))
        elif geometry.padding_mode == "zeros":
            places.append((-before, (n - 1) * hole + 1 + before + after, hole))
        else:  # these modes copy samples, before holes are made between them
            places.append((-before * hole, (n + before + after - 1) * hole + 1, hole))
    return places


def _read(
    geometry: ConvGeometry, coords: Coordinates, place: Any, hole: int, n: Any
) -> tuple[Any, Any]:
    """The sample that is read at each place of an axis, and 1 or 0 for whether there is one.

    None for the second says that there always is. Numbers for it, since not every framework
    multiplies by truth values.
    """
    index, mask = place, None
    if hole > 1:
        index, mask = place // hole, 1 - (place % hole).clip(0, 1)
    if coords.outside == "extend":
        return index, mask
    mode = geometry.padding_mode
    if mode == "circular":
        return index % n, mask
    if mode == "reflect":
        around = 2 * n - 2 + 1 // n  # at least 1, for an axis of one sample, which reflects itself
        return n - 1 - abs(n - 1 - abs(index) % around), mask
    clipped = index.clip(0, n - 1)
    if mode == "replicate":
        return clipped, mask
    inside = 1 - abs(clipped - index).clip(0, 1)
    return clipped, inside if mask is None else inside * mask
