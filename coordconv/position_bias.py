"""The position bias: what the coordinate channels add to a convolution, once for the whole batch.

A convolution is linear in its channels and the coordinates do not depend on the data, so

    CoordConv(x) = Conv(x; weight) + bias + P,    P of shape (out, *output shape).

An axis coordinate is a ramp along its own axis and constant along the others, so its share of P
contracts axis by axis with small tables: ``T[k, t]`` is what tap ``k`` reads at output position
``t``. The radius is not separable; it is convolved once, on a batch of one. Where the map is small,
all axes are one: a table of what every tap reads at every output position, whatever the coordinate,
makes P in a single product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import groupby
from operator import add
from typing import Any

import numpy as np

from coordconv.coordinates import Coordinates, axis_tokens
from coordconv.geometry import ConvGeometry
from coordconv.grid import Array, evaluate, frozen, ramp

# Entries of a table for all axes together, up to which it is used: 256 KiB in float32, which fits a
# core's cache; up to there one product takes less than the several steps that it replaces.
MOST_TOGETHER = 2**16

# Terms of the last product, up to which a compiler is given it as sums, to fuse with what follows:
# more of them, for each sample, cost more than to write a map once and to read it again.
MOST_SUMS = 9


@dataclass(frozen=True, eq=False)
class Share:
    """The arrays for a run of adjacent coordinate channels, all separable or all not.

    ``tables`` holds one array of shape ``(channels, kernel, output length)`` per axis, if the
    channels are separable, or one for all axes together; otherwise ``padded`` holds the channels as
    the convolution meets them, padded and dilated, of shape ``(channels, *padded shape)``, so that
    a convolution without padding, at stride ``stride`` and dilation ``dilation`` (with the taps in
    reverse order if ``flip``), gives their share. ``shape`` is the output's.

    The arrays are NumPy's, or a framework's: see :meth:`converted`.
    """

    start: int
    stop: int
    shape: tuple[int, ...]
    tables: tuple[Any, ...] = ()
    padded: Any = None
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    flip: bool = False

    @property
    def fusible(self) -> bool:
        """Whether a compiler is left the last contraction; see :func:`position_bias`."""
        return bool(self.tables) and math.prod(self.tables[-1].shape[:-1]) <= MOST_SUMS

    def converted(self, asarray: Callable[[Array], Any]) -> Share:
        """The same with the arrays of a framework, which ``asarray`` makes."""
        padded = None if self.padded is None else asarray(self.padded)
        return replace(self, tables=tuple(map(asarray, self.tables)), padded=padded)


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
    apart = by_axis(geometry, coords, shape, dtype)
    size = len(coords) * geometry.taps * math.prod(geometry.output_shape(shape))
    if size > MOST_TOGETHER or (len(apart) == 1 and len(apart[0].tables) == 1):
        return apart
    table = np.concatenate([_together(share, geometry.kernel) for share in apart])
    return (Share(0, len(coords), apart[0].shape, (frozen(table),)),)


def by_axis(
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: tuple[int, ...],
    dtype: type[np.floating[Any]],
) -> tuple[Share, ...]:
    """As :func:`shares`, with a table for each axis and the radius apart, whatever the size.

    But with one tap the radius is a table, too.
    """
    runs = []
    start = 0
    for radial, tokens in groupby(coords.channels, key=lambda token: token == "r"):
        stop = start + len(list(tokens))
        make = _padded_share if radial else _separable_share
        share = make(geometry, coords, shape, dtype, start, stop)
        if radial and geometry.taps == 1:
            # What one tap reads is no longer than the channels, and a convolution with it is one
            # whose gradient torch.compile gets the strides of wrong.
            table = np.asarray(_together(share, geometry.kernel))
            share = Share(start, stop, share.shape, (frozen(table),))
        runs.append(share)
        start = stop
    return tuple(runs)


def _together(share: Share, kernel: tuple[int, ...]) -> Array:
    """One table ``(channels, taps, outputs)`` for all axes of a share."""
    if share.tables:
        # Each product has at most one factor that is neither 0 nor 1: none of them rounds.
        table = reduce(
            lambda one, other: np.einsum("ckt,clu->ckltu", one, other).reshape(
                len(one), one.shape[1] * other.shape[1], -1
            ),
            share.tables,
        )
        return np.asarray(table)
    taps = []
    for tap in np.ndindex(*kernel):
        place = (k - 1 - i for k, i in zip(kernel, tap, strict=True)) if share.flip else tap
        window = (
            slice(i * d, i * d + (m - 1) * s + 1, s)
            for i, d, m, s in zip(place, share.dilation, share.shape, share.stride, strict=True)
        )
        taps.append(share.padded[(slice(None), *window)].reshape(len(share.padded), -1))
    return np.stack(taps, axis=1)


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
            np.stack([(along if c == token else meets).T for c in coords.channels[start:stop]])
        )
    arrays = tuple(frozen(np.ascontiguousarray(table, dtype)) for table in tables)
    return Share(start, stop, geometry.output_shape(tuple(shape)), arrays)


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
        geometry.output_shape(tuple(shape)),
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
    convolve: Callable[[Share, Any], Any],
    channels_last: bool = False,
    fused: bool = False,
) -> Any:
    """The position bias, in the framework whose functions are passed.

    Args:
        coord_weight: the coordinate kernel, shape ``(out, n, *kernel)``.
        arrays: what :func:`shares` returned, with the framework's arrays in them.
        einsum: the framework's ``einsum``.
        convolve: ``convolve(share, kernel)``: the framework's convolution of ``share.padded`` (one
            sample, channels first, no batch axis) with ``kernel``, as :class:`Share` says; returns
            shape ``(out, *output shape)``.
        channels_last: put the output channels last.
        fused: a compiler fuses elementwise operations with what follows: leave it the last
            contraction as such, up to :data:`MOST_SUMS` terms, so that there is no map in memory.

    Returns:
        An array of shape ``(out, *output shape)``, or ``(*output shape, out)``.
    """
    total = None
    for share in arrays:
        if share.tables:
            make = _sum_of_products if fused and share.fusible else _product
            term = make(coord_weight, share, einsum, channels_last)
            term = term.reshape((*share.shape, -1) if channels_last else (-1, *share.shape))
        else:
            term = convolve(share, coord_weight[:, share.start : share.stop])
            if channels_last:
                outs = "tuv"[: len(share.shape)]
                term = einsum(f"o{outs}->{outs}o", term)
        total = term if total is None else total + term
    return total


def _product(
    coord_weight: Any, share: Share, einsum: Callable[..., Any], channels_last: bool
) -> Any:
    left, right = factors(coord_weight, share, einsum, channels_last)
    return left @ right


def _sum_of_products(
    coord_weight: Any, share: Share, einsum: Callable[..., Any], channels_last: bool
) -> Any:
    rows, table = _contracted(coord_weight, share, einsum, channels_last, len(share.tables) - 1)
    if channels_last:
        products = (rows[j][..., None, :] * table[j][:, None] for j in range(len(table)))
    else:
        products = (rows[j][..., None] * table[j] for j in range(len(table)))
    return reduce(add, products)


def factors(
    coord_weight: Any, share: Share, einsum: Callable[..., Any], channels_last: bool = False
) -> tuple[Any, Any]:
    """The two matrices whose product is the map of a separable share.

    One is the table of the axis that is farthest from the channels in memory, so that the product,
    which has the most to do, is as it lies there, and its gradient, too.

    Returns:
        Matrices of shapes ``(out * other outputs, terms)`` and ``(terms, last outputs)``, or
        ``(first outputs, terms)`` and ``(terms, other outputs * out)``; of a table for all axes
        these are the last or the first.
    """
    axis = 0 if channels_last else len(share.tables) - 1
    if axis == 0 and not channels_last:  # on small layers each call counts
        kernel, (table,) = coord_weight[:, share.start : share.stop], share.tables
        return kernel.reshape((kernel.shape[0], -1)), table.reshape((-1, table.shape[-1]))
    rows, table = _contracted(coord_weight, share, einsum, channels_last, axis)
    rows = rows.reshape((rows.shape[0], -1))
    return (table.T, rows) if channels_last else (rows.T, table)


def _contracted(
    coord_weight: Any, share: Share, einsum: Callable[..., Any], channels_last: bool, kept: int
) -> tuple[Any, Any]:
    """A kernel contracted with the tables of all axes but one, and that one's table.

    Returns:
        Arrays of shapes ``(terms, out, *other outputs)``, with the ``out`` at the end if
        ``channels_last``, and ``(terms, kept outputs)``.
    """
    count, term = len(share.tables), coord_weight[:, share.start : share.stop]
    table = share.tables[kept].reshape((-1, share.tables[kept].shape[-1]))
    if count == 1:
        return term.reshape((term.shape[0], -1)).T, table
    taps, outs = "klm"[:count], "tuv"
    others = [axis for axis in range(count) if axis != kept]
    inner, outer = ("".join(names[axis] for axis in others) for names in (taps, outs))
    if channels_last:
        # As matrix products throughout, so that the channels are last in memory, too.
        term = einsum(f"oc{taps}->c{inner}{taps[kept]}o", term)
        for i, axis in enumerate(others):
            along = einsum("ckt->ctk", share.tables[axis])
            along = along.reshape((along.shape[0], *(1,) * i, *along.shape[1:]))
            term = along @ term.reshape((*term.shape[: i + 1], along.shape[-1], -1))
        shape = *term.shape[:count], -1, coord_weight.shape[0]
        term = einsum(f"c{outer}{taps[kept]}o->c{taps[kept]}{outer}o", term.reshape(shape))
    else:
        indices = f"oc{taps}"
        for i, axis in enumerate(others):
            result = f"c{taps[kept]}o{inner[i + 1 :]}{outer[: i + 1]}"
            along = f"c{taps[axis]}{outs[axis]}"
            term = einsum(f"{indices},{along}->{result}", term, share.tables[axis])
            indices = result
    return term.reshape((table.shape[0], *term.shape[2:])), table
