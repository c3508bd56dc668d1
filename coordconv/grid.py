"""The coordinate grid: the values of the coordinate channels.

NumPy computes them in float64 and rounds once. Inside a traced graph, where a size may be unknown,
a framework computes the same formula: :func:`channel_values` takes whatever arrays it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from coordconv.coordinates import Coordinates, CoordinatesLike, axis_tokens
from coordconv.functions import AXES, Function, Given
from coordconv.functions import Array as Array
from coordconv.geometry import is_int
from coordconv.windows import Window

# Of positions and lengths of an input the places and lengths in its frame: Window.in_frame.
Frame: TypeAlias = Callable[[Sequence[Any], Sequence[Any]], tuple[Sequence[Any], Sequence[Any]]]


def coordinate_grid(
    shape: Sequence[int],
    coords: CoordinatesLike = None,
    *,
    dtype: npt.DTypeLike = np.float32,
    window: Window | None = None,
) -> Array:
    """The coordinate channels of a grid: what a CoordConv appends to its input.

    Every value is computed in float64 and rounded once to ``dtype``.

    Args:
        shape: the spatial shape, one to three positive lengths, last axis ``x``.
        coords: Coordinates, tokens, or None for all axes (``x``, ``xy``, ``xyz`` by rank).
        dtype: a floating-point dtype.
        window: which part of its frame the grid is, for one sample or for several.

    Returns:
        An array of shape ``(n, *shape)``, ``n`` the number of coordinate channels; with a window
        ``(N, n, *shape)``. It is read-only, since the last few grids are kept: copy it to change
        it.

    Raises:
        TypeError: a length that is not an integer, or a dtype that is not floating-point.
        ValueError: an empty axis, more than three axes, or tokens beyond the rank; a window of
            another rank.

    Example:
        >>> coordinate_grid((2, 3), "xy")
        array([[[-1.,  0.,  1.],
                [-1.,  0.,  1.]],
        <BLANKLINE>
               [[-1., -1., -1.],
                [ 1.,  1.,  1.]]], dtype=float32)
    """
    lengths = _spatial_shape(shape)
    dtype = np.dtype(dtype)
    if not np.issubdtype(dtype, np.floating):
        raise TypeError(f"dtype must be floating-point, got {dtype}")
    resolved = Coordinates.resolve(coords, len(lengths))
    if window is None:
        return _grid(lengths, resolved, dtype)
    window.check(len(lengths), None)
    positions = [np.arange(n) for n in lengths]
    return frozen(evaluate(resolved, positions, lengths, window.in_frame).astype(dtype))


@lru_cache(maxsize=16)
def _grid(shape: tuple[int, ...], coords: Coordinates, dtype: np.dtype[Any]) -> Array:
    return frozen(evaluate(coords, [np.arange(n) for n in shape], shape).astype(dtype))


def evaluate(
    coords: Coordinates,
    positions: Sequence[Array],
    shape: Sequence[int],
    frame: Frame | None = None,
) -> Array:
    """The coordinates ``(n, *m)``, in float64, at ``m`` samples on each axis, maybe outside.

    ``shape`` is the spatial shape that the scale belongs to. With a ``frame`` ``(N, n, *m)``.
    """
    values = channel_values(coords, positions, shape, np.sqrt, frame)
    return stacked(values, tuple(map(len, positions)), np, frame)  # type: ignore[no-any-return]


def channel_values(
    coords: Coordinates,
    positions: Sequence[Any],
    shape: Sequence[Any],
    sqrt: Callable[[Any], Any],
    frame: Frame | None = None,
) -> list[Any]:
    """Each coordinate channel at ``positions``, as an array that broadcasts to the grid.

    Written with operators alone, so that the arrays may be NumPy's or a framework's; a function or
    a given map takes NumPy's. Positions are
    per axis sample indices, of NumPy ints, which give float64, or of a framework's floats; the
    lengths in ``shape``, which the scale belongs to, are plain or symbolic ints. With a ``frame``
    the arrays have the samples in front.
    """
    rank, samples = len(shape), positions
    if frame is not None:
        positions, shape = in_frame(coords, frame, positions, shape)
    ramps = {}
    for behind, token in enumerate(axis_tokens(rank)):  # the last axis first
        values = ramp(coords, token, positions[rank - 1 - behind], shape, sqrt, frame is not None)
        if frame is None:
            ramps[token] = values.reshape((-1,) + (1,) * behind)
        else:
            ahead = (slice(None), *(None,) * (rank - 1 - behind))
            ramps[token] = values[(*ahead, slice(None), *(None,) * behind)]
    if "r" in coords.channels:
        centred = (values - coords.r_center for values in ramps.values())
        ramps["r"] = sqrt(sum(values * values for values in centred))
    return [
        ramps[channel]
        if isinstance(channel, str)
        else _own_values(channel, ramps, samples, shape, frame)
        for channel in coords.channels
    ]


def in_frame(
    coords: Coordinates, frame: Frame, positions: Sequence[Any], shape: Sequence[Any]
) -> tuple[Sequence[Any], Sequence[Any]]:
    """The places and lengths of a ``frame``, as :func:`ramp` takes them."""
    positions, shape = frame(positions, shape)
    if coords.align == "corners":  # a frame of less than a sample has coordinate 0
        shape = [length.clip(1) for length in shape]
    return positions, shape


def _own_values(
    channel: Function | Given,
    ramps: dict[str, Any],
    positions: Sequence[Any],
    shape: Sequence[Any],
    frame: Frame | None,
) -> Array:
    """A channel that NumPy alone computes."""
    if not all(isinstance(each, np.ndarray) for each in ramps.values()):
        raise ValueError(
            f"{channel.name!r} is computed by NumPy, for a size that is known: fix the size, and "
            "let the arrays of a window be NumPy's"
        )
    if isinstance(channel, Given):
        if frame is not None:
            raise ValueError(
                f"the map {channel.name!r} is given for one size, and has no window: cut it "
                "yourself, and append it to the features"
            )
        return channel.at(positions, shape)
    return channel([ramps[token] for token in channel.axes])


def stacked(
    values: Sequence[Any], shape: tuple[Any, ...], xp: Any, frame: Frame | None = None
) -> Any:
    """The channels as one array ``(n, *shape)``, by the functions of NumPy or of a framework.

    With a ``frame`` ``(N, n, *shape)``.
    """
    if frame is None:
        return xp.stack([xp.broadcast_to(value, shape) for value in values])
    # A window may be for each sample on one axis, and for the batch on another.
    sizes = [value.shape[0] for value in values]
    count = next((n for n in sizes if not isinstance(n, int) or n != 1), 1)
    return xp.stack([xp.broadcast_to(value, (count, *shape)) for value in values], 1)


def ramp(
    coords: Coordinates,
    token: str,
    position: Any,
    shape: Sequence[Any],
    sqrt: Callable[[Any], Any],
    framed: bool = False,
) -> Any:
    """The coordinate of samples at ``position`` on the axis of a ``token``.

    On the span -1 to 1 it is one division of two integers, so that it is the same bits in every
    framework; another span takes one multiplication and one addition more. ``framed`` says that
    positions and lengths are those of :func:`in_frame`.
    """
    length = shape[-1 - AXES.index(token)]
    if coords.units == "pixels":
        return position * 1.0 + (0.5 if coords.align == "edges" else 0)  # of NumPy's ints a float
    steps = steps_of(coords, length, shape, position, sqrt, framed)
    quotient = (2 * position + ((0 if coords.align == "start" else 1) - length)) / steps
    half, middle = scale(coords, token)
    values = quotient if half == 1 else quotient * half
    if middle:
        values = values + middle
    if coords.align == "corners" and (middle or coords.outside == "extend" or framed):
        values = values * (
            1 - _single(length, framed)
        )  # the formula gives 0 only inside a span around 0
    return values


def scale(coords: Coordinates, token: str) -> tuple[float, float]:
    """Half the span of an axis, and its middle."""
    first, last = coords.span_of(token)
    return (last - first) / 2, (first + last) / 2


def steps_of(
    coords: Coordinates,
    length: Any,
    shape: Sequence[Any],
    position: Any,
    sqrt: Callable[[Any], Any],
    framed: bool = False,
) -> Any:
    """The number of steps from sample to sample that the span is long, at least 1."""
    if coords.aspect != "each":
        one = position[:1] * 0 + 1  # lengths become arrays, which may be compared in a graph
        lengths = [one * n for n in shape]
        if coords.aspect == "longer":
            length = lengths[0]
            for n in lengths[1:]:
                length = (length + n + abs(length - n)) / 2  # the larger of two
        elif coords.align == "corners":
            length = sqrt(sum((n - 1) * (n - 1) for n in lengths)) + 1
        else:
            length = sqrt(sum(n * n for n in lengths))
    if coords.align != "corners":
        return length
    return length - 1 + _single(length, framed)


def _single(length: Any, framed: bool) -> Any:
    """1 for one sample and 0 for more, without a question put to a tracer."""
    if framed:  # an array of any numbers from 1 on, which there may be a gradient for
        return 1 - ((length - 1) * 2.0**20).clip(0, 1)
    return 1 // length


def _spatial_shape(shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, Collection):
        raise TypeError(f"shape must be one int per axis, got {shape!r}")
    for n in shape:
        if not is_int(n):
            raise TypeError(f"shape must hold integers, got {n!r} in {tuple(shape)}")
    lengths = tuple(map(int, shape))
    if not 1 <= len(lengths) <= 3:
        raise ValueError(f"shape must have 1, 2 or 3 axes, got {lengths}")
    if min(lengths) < 1:
        raise ValueError(f"shape must have no empty axis, got {lengths}")
    return lengths


def frozen(array: Array) -> Array:
    """``array``, made read-only: it is shared through a cache."""
    array.flags.writeable = False
    return array
