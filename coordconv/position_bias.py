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

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from coordconv.coordinates import Coordinates
from coordconv.geometry import ConvGeometry
from coordconv.grid import Array, channel_values, frozen

APPEND, MAP = "append", "map"

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
        batch: the number of samples, or None if it is unknown and may be large.
        positions: the number of positions of the output, or None if it is unknown.
        low_precision: whether the layer computes in 16 bits. Neighbouring coordinates on an axis of
            512 samples are closer together than bfloat16 can tell apart, so that they must not be
            appended: only the map is right.
        fused: whether a compiler joins the addition of P with what follows.

    Returns:
        :data:`APPEND` or :data:`MAP`.
    """
    # With "extend" the coordinates do not end where the features do: there is nothing to append.
    if low_precision or coords.outside == "extend":
        return MAP
    if FORCED is not None:
        return FORCED
    return MAP


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
    return frozen(np.stack([np.broadcast_to(v, whole) for v in values]).astype(dtype))


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
        index, met = arange(count) + first, None
        if hole > 1:  # between two samples there are holes, which read 0
            index, met = index // hole, index % hole == 0
        if coords.outside == "zero":
            index, within = _apply_padding(index, shape[axis], geometry.padding_mode)
            if within is not None:
                met = within if met is None else met & within
        indices.append(index)
        if met is not None:
            masks.append(met.reshape((-1,) + (1,) * (geometry.rank - 1 - axis)))
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


def _apply_padding(index: Any, n: Any, mode: str) -> tuple[Any, Any]:
    """The sample that padding puts at ``index``, and whether it puts one there (None: always)."""
    if mode == "circular":
        return index % n, None
    if mode == "reflect":
        around = 2 * n - 2 + 1 // n  # at least 1, for an axis of one sample, which reflects itself
        folded = abs(index) % around
        return n - 1 - abs(n - 1 - folded), None
    clipped = index.clip(0, n - 1)
    return clipped, None if mode == "replicate" else clipped == index
