"""The position bias: what the coordinate channels add to a convolution, once for the whole batch.

A convolution is linear in its channels and the coordinates do not depend on the data, so

    CoordConv(x) = Conv(x; weight) + bias + P,    P of shape (out, *output shape).

An axis coordinate is a ramp along its own axis and constant along the others, so its share of P
contracts axis by axis with small tables: ``T[t, k]`` is what tap ``k`` reads at output position
``t``. The radius is not separable; it is convolved once, on a batch of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import groupby
from typing import Any

import numpy as np

from coordconv.coordinates import Coordinates, axis_tokens
from coordconv.geometry import ConvGeometry
from coordconv.grid import Array, evaluate, frozen, ramp


@dataclass(frozen=True, eq=False)
class Share:
    """The arrays for a run of adjacent coordinate channels, all separable or all not.

    ``tables`` holds one array of shape ``(channels, output length, kernel)`` per axis, if the
    channels are separable; otherwise ``padded`` holds the channels as the convolution meets them,
    padded and dilated, of shape ``(channels, *padded shape)``, so that a convolution without
    padding, at stride ``stride`` and dilation ``dilation`` (with the taps in reverse order if
    ``flip``), gives their share.
    """

    start: int
    stop: int
    tables: tuple[Array, ...] = ()
    padded: Array | None = None
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    flip: bool = False


@lru_cache(maxsize=64)
def shares(
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: tuple[int, ...],
    dtype: type[np.floating[Any]],
) -> tuple[Share, ...]:
    """The arrays that the position bias is made from: functions of shape and options alone.

    Args:
        geometry: the convolution.
        coords: the coordinate channels.
        shape: the spatial shape of the input.
        dtype: ``np.float32`` or ``np.float64``, in which the bias is computed.

    Raises:
        ValueError: as :meth:`ConvGeometry.output_shape` and :meth:`Coordinates.check_rank`.

    Example:
        >>> (share,) = shares(ConvGeometry((3,), padding=1), Coordinates("x"), (3,), np.float32)
        >>> share.tables[0]
        array([[[ 0., -1.,  0.],
                [-1.,  0.,  1.],
                [ 0.,  1.,  0.]]], dtype=float32)
    """
    coords.check_rank(geometry.rank)
    runs = []
    start = 0
    for radial, tokens in groupby(coords.channels, key=lambda token: token == "r"):
        stop = start + len(list(tokens))
        make = _padded_share if radial else _separable_share
        runs.append(make(geometry, coords, shape, dtype, start, stop))
        start = stop
    return tuple(runs)


def _separable_share(
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: Sequence[int],
    dtype: Any,
    start: int,
    stop: int,
) -> Share:
    extend = coords.outside == "extend"
    tables = []
    axes = reversed(axis_tokens(geometry.rank))
    for token, n, (index, meets) in zip(axes, shape, geometry.tap_positions(shape), strict=True):
        if not extend:
            index, inside = _apply_padding(index, n, geometry.padding_mode)
            meets = meets & inside
        along = np.where(meets, ramp(coords, index, n), 0)
        tables.append(
            np.stack([along if c == token else meets for c in coords.channels[start:stop]])
        )
    return Share(start, stop, tuple(frozen(table.astype(dtype)) for table in tables))


def _padded_share(
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: Sequence[int],
    dtype: Any,
    start: int,
    stop: int,
) -> Share:
    """The channels on every place that a tap reaches, those between holes and outside included."""
    _, stride, dilation, _, holes = geometry.per_axis
    if geometry.transposed:
        holes, stride = stride, (1,) * geometry.rank
    positions, masks = [], []
    for n, (before, _), m, k, s, d, hole in zip(
        shape,
        geometry.pads(shape),
        geometry.output_shape(shape),
        geometry.kernel,
        stride,
        dilation,
        holes,
        strict=True,
    ):
        if geometry.transposed:
            first = before - d * (k - 1)
        else:
            first = -before * (1 if geometry.padding_mode == "zeros" else hole)
        place = first + np.arange((m - 1) * s + d * (k - 1) + 1)
        index, meets = place // hole, place % hole == 0
        if coords.outside != "extend":
            index, inside = _apply_padding(index, n, geometry.padding_mode)
            meets = meets & inside
        positions.append(index)
        masks.append(meets)
    meets = reduce(np.logical_and.outer, masks)
    values = np.where(meets, evaluate(coords, positions, shape)[start:stop], 0)
    return Share(
        start,
        stop,
        padded=frozen(values.astype(dtype)),
        stride=stride,
        dilation=dilation,
        flip=geometry.transposed,
    )


def _apply_padding(index: Array, n: int, mode: str) -> tuple[Array, Array]:
    """The sample that padding puts at ``index``, and whether it puts one there."""
    if mode == "circular":
        return index % n, np.ones(index.shape, bool)
    if mode == "reflect":
        folded = np.abs(index) % (2 * n - 2 or 1)
        return np.minimum(folded, 2 * n - 2 - folded), np.ones(index.shape, bool)
    clipped = np.clip(index, 0, n - 1)
    return clipped, np.ones(index.shape, bool) if mode == "replicate" else clipped == index


def position_bias(
    coord_weight: Any,
    arrays: Sequence[Share],
    *,
    einsum: Callable[..., Any],
    convolve: Callable[[Share, Any, Any], Any],
    asarray: Callable[[Array], Any] = lambda array: array,
    channels_last: bool = False,
) -> Any:
    """The position bias, in the framework whose functions are passed.

    Args:
        coord_weight: the coordinate kernel, shape ``(out, n, *kernel)``.
        arrays: what :func:`shares` returned.
        einsum: the framework's ``einsum``.
        convolve: ``convolve(share, padded, kernel)``: the framework's convolution of the array
            ``padded`` (one sample, channels first, no batch axis) with ``kernel``, as
            :class:`Share` says; returns shape ``(out, *output shape)``.
        asarray: turns a NumPy array into the framework's.
        channels_last: put the output channels last.

    Returns:
        An array of shape ``(out, *output shape)``, or ``(*output shape, out)``.
    """
    total = None
    for share in arrays:
        kernel = coord_weight[:, share.start : share.stop]
        if share.tables:
            term = _contract(
                kernel, [asarray(table) for table in share.tables], einsum, channels_last
            )
        else:
            assert share.padded is not None
            term = convolve(share, asarray(share.padded), kernel)
            if channels_last:
                letters = "tuv"[: len(share.stride)]
                term = einsum(f"o{letters}->{letters}o", term)
        total = term if total is None else total + term
    return total


def _contract(
    kernel: Any, tables: Sequence[Any], einsum: Callable[..., Any], channels_last: bool
) -> Any:
    rank = len(tables)
    taps, outs = "klm"[:rank], "tuv"[:rank]
    term, indices = kernel, "oc" + taps
    for axis, table in enumerate(tables):
        last = axis == rank - 1
        result = indices.replace(taps[axis], outs[axis])
        if last:  # the channels are summed with the last axis, in one product
            result = result.replace("c", "")
            if channels_last:
                result = result[1:] + "o"
        term = einsum(f"{indices},c{outs[axis]}{taps[axis]}->{result}", term, table)
        indices = result
    return term
