"""The coordinate grid: the pure NumPy generator that every backend shares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from coordconv.coordinates import Coordinates, CoordinatesLike, axis_tokens

Array = npt.NDArray[Any]


def coordinate_grid(
    shape: Sequence[int], coords: CoordinatesLike = None, *, dtype: npt.DTypeLike = np.float32
) -> Array:
    """The coordinate channels of a grid: what a CoordConv appends to its input.

    Every value is computed in float64 and rounded once to ``dtype``. The grids of the last few
    shapes are kept, so the array is read-only: copy it to change it.

    Args:
        shape: the spatial shape, one to three positive lengths, last axis ``x``.
        coords: Coordinates, tokens, or None for all axes (``x``, ``xy``, ``xyz`` by rank).
        dtype: a floating-point dtype.

    Returns:
        A read-only array of shape ``(n, *shape)``, ``n`` the number of coordinate channels.

    Raises:
        TypeError: a length that is not an integer, or a dtype that is not floating-point.
        ValueError: an empty axis, more than three axes, or tokens beyond the rank.

    Example:
        >>> coordinate_grid((2, 3), "xy")
        array([[[-1.,  0.,  1.],
                [-1.,  0.,  1.]],
        <BLANKLINE>
               [[-1., -1., -1.],
                [ 1.,  1.,  1.]]], dtype=float32)
    """
    lengths = check_spatial_shape(shape)
    dtype = np.dtype(dtype)
    if not np.issubdtype(dtype, np.floating):
        raise TypeError(f"dtype must be floating-point, got {dtype}")
    return _grid(lengths, Coordinates.resolve(coords, len(lengths)), dtype)


@lru_cache(maxsize=16)
def _grid(shape: tuple[int, ...], coords: Coordinates, dtype: np.dtype[Any]) -> Array:
    return frozen(evaluate(coords, [np.arange(n) for n in shape], shape).astype(dtype))


def evaluate(coords: Coordinates, positions: Sequence[Array], shape: Sequence[int]) -> Array:
    """The coordinate channels at the product of ``positions``, sample indices that may lie outside.

    Args:
        coords: which channels, on which scale.
        positions: per axis, the sample indices, shape ``(m_axis,)``.
        shape: the spatial shape that the scale belongs to.

    Returns:
        A float64 array of shape ``(n, *m)``.
    """
    rank = len(shape)
    ramps = {
        token: ramp(coords, positions[rank - 1 - i], shape[rank - 1 - i]).reshape((-1,) + (1,) * i)
        for i, token in enumerate(axis_tokens(rank))
    }
    if "r" in coords.channels:
        squares = sum((values - coords.r_center) ** 2 for values in ramps.values())
        ramps["r"] = np.sqrt(squares)
    grid_shape = tuple(len(p) for p in positions)
    return np.stack([np.broadcast_to(ramps[token], grid_shape) for token in coords.channels])


def ramp(coords: Coordinates, position: Array, length: int) -> Array:
    """The coordinate of sample ``position`` on an axis of ``length`` samples, in float64.

    The numerator is exact for spans of small integers, so that the division is the only rounding
    and the ends and the middle of the axis come out exactly.
    """
    first, last = coords.span
    if coords.align == "edges":
        left, whole = 2 * position + 1, 2 * length
    elif length > 1:
        left, whole = position, length - 1
    else:
        return np.zeros(np.shape(position))
    return (first * (whole - left) + last * left) / whole


def check_spatial_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The spatial shape as a tuple of one to three positive ints, or an error that says why not."""
    if not isinstance(shape, Iterable):
        raise TypeError(f"shape must be one int per axis, got {shape!r}")
    lengths = []
    for n in shape:
        if isinstance(n, bool) or not hasattr(n, "__index__"):
            raise TypeError(f"shape must hold integers, got {n!r} in {tuple(shape)}")
        lengths.append(n.__index__())
    if not 1 <= len(lengths) <= 3:
        raise ValueError(f"shape must have 1, 2 or 3 axes, got {tuple(lengths)}")
    if min(lengths) < 1:
        raise ValueError(f"shape must have no empty axis, got {tuple(lengths)}")
    return tuple(lengths)


def frozen(array: Array) -> Array:
    """``array``, made read-only: it is shared through a cache."""
    array.flags.writeable = False
    return array
