"""The position bias: what the coordinate channels add to a convolution, once for the whole batch.

A convolution is linear in its channels and the coordinates do not depend on the data, so

    CoordConv(x) = Conv(x; weight) + bias + P,    P of shape (out, *output shape).

An axis coordinate is a ramp along its own axis and constant along the others, so its share of P
contracts axis by axis with small tables: ``T[k, t]`` is what tap ``k`` reads at output position
``t``. Away from the borders the taps read one ramp, some steps apart, so that few functions of
``t`` make all rows of a table: those of three taps are a constant, a ramp, and one at each border.
The radius is not separable; it is convolved once, on a batch of one. Where the map is small, all
axes are one: a table of what every tap reads at every output position, whatever the coordinate,
makes P in a single product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
MOST_SUMS = 4


@dataclass(frozen=True, eq=False)
class Share:
    """The arrays for a run of adjacent coordinate channels.

    ``table`` is what each tap reads at each output position, ``(channels * taps, positions)``; or,
    if there are ``bases``, how much of each product of their functions, one of each axis,
    ``(channels * taps, products)``. A basis is of shape ``(functions, output length)``.

    Where there is no table, ``padded`` holds the channels as the convolution meets them, padded and
    dilated, of shape ``(channels, *padded shape)``, so that a convolution without padding, at
    stride ``stride`` and dilation ``dilation`` (with the taps in reverse order if ``flip``), gives
    their share. ``shape`` is the output's.

    ``where`` says of each row of :attr:`last` between which columns it is not zero.

    The arrays are NumPy's, or a framework's: see :meth:`converted`.
    """

    start: int
    stop: int
    shape: tuple[int, ...]
    table: Any = None
    bases: tuple[Any, ...] = ()
    padded: Any = None
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    flip: bool = False
    where: tuple[tuple[int, int], ...] = ()

    @property
    def last(self) -> Any:
        """The right one of the last two matrices that are multiplied, of the last axis or of all.

        None where there is no table.
        """
        return self.bases[-1] if self.bases else self.table

    @property
    def fusible(self) -> bool:
        """Whether a compiler is left the last contraction; see :func:`position_bias`."""
        return self.last is not None and self.last.shape[0] <= MOST_SUMS

    def converted(self, asarray: Callable[[Array], Any]) -> Share:
        """The same with the arrays of a framework, which ``asarray`` makes."""
        if self.table is None:
            return replace(self, padded=asarray(self.padded))
        return replace(self, table=asarray(self.table), bases=tuple(map(asarray, self.bases)))


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
        >>> share.table
        array([[ 0., -1.,  0.],
               [-1.,  0.,  1.],
               [ 0.,  1.,  0.]], dtype=float32)
    """
    coords.check_rank(geometry.rank)
    output_shape = geometry.output_shape(shape)
    if len(coords) * geometry.taps * math.prod(output_shape) > MOST_TOGETHER:
        return by_axis(geometry, coords, shape, dtype)
    tables = [_table(geometry, coords, shape, *run) for run in _runs(coords)]
    share = Share(0, len(coords), output_shape, np.concatenate(tables))
    return (_finished(share, dtype),)


def by_axis(
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: tuple[int, ...],
    dtype: type[np.floating[Any]],
) -> tuple[Share, ...]:
    """As :func:`shares`, with a basis for each axis and the radius apart, whatever the size.

    But one axis needs none; and what one tap reads of the radius is a table, too: it is no longer
    than the channel, and of a convolution with it torch.compile gets the strides wrong in training.
    """
    made = []
    for start, stop in _runs(coords):
        run = geometry, coords, shape, start, stop
        if coords.channels[start] == "r" and geometry.taps > 1:
            share = _padded_share(*run)
        elif coords.channels[start] == "r" or geometry.rank == 1:
            share = Share(start, stop, geometry.output_shape(shape), _table(*run))
        else:
            tables, bases = zip(*(axis.factors() for axis in _axes(*run)), strict=True)
            share = Share(start, stop, geometry.output_shape(shape), _product(tables), bases)
        made.append(_finished(share, dtype))
    return tuple(made)


def _finished(share: Share, dtype: type[np.floating[Any]]) -> Share:
    share = share.converted(lambda array: frozen(np.ascontiguousarray(array, dtype)))
    if share.last is None:
        return share
    columns = (np.flatnonzero(row) for row in share.last)
    where = ((int(c[0]), int(c[-1]) + 1) if len(c) else (0, 0) for c in columns)
    return replace(share, where=tuple(where))


def _runs(coords: Coordinates) -> Iterator[tuple[int, int]]:
    """The first channel and the last, plus 1, of each run of separable ones or radii."""
    start = 0
    for _, tokens in groupby(coords.channels, key=lambda token: token == "r"):
        stop = start + len(list(tokens))
        yield start, stop
        start = stop


def _table(
    geometry: ConvGeometry, coords: Coordinates, shape: Sequence[int], start: int, stop: int
) -> Array:
    """What each tap reads at each output position, ``(channels * taps, positions)``."""
    run = geometry, coords, shape, start, stop
    if coords.channels[start] != "r":
        return _product([axis.reads for axis in _axes(*run)])
    share = _padded_share(*run)
    taps = []
    for tap in np.ndindex(*geometry.kernel):
        place = (k - 1 - i for k, i in zip(geometry.kernel, tap, strict=True))
        window = (
            slice(i * d, i * d + (m - 1) * s + 1, s)
            for i, d, m, s in zip(
                place if share.flip else tap,
                share.dilation,
                share.shape,
                share.stride,
                strict=True,
            )
        )
        taps.append(share.padded[(slice(None), *window)].reshape(stop - start, -1))
    return np.concatenate(np.stack(taps, axis=1))


def _product(tables: Sequence[Array]) -> Array:
    """Tables ``(channels, taps, columns)`` of all axes as one, ``(channels * taps, columns)``.

    Each product has at most one factor that is neither 0 nor 1: none of them rounds.
    """
    table = reduce(
        lambda one, other: np.einsum("ckt,clu->ckltu", one, other).reshape(
            len(one), one.shape[1] * other.shape[1], -1
        ),
        tables,
    )
    return np.concatenate(table)


@dataclass(frozen=True)
class _Axis:
    """What each tap reads of each channel along an axis.

    Args:
        along: which channels are ramps along this axis; the others are one there.
        index: the sample that a tap reads, shape ``(output length, kernel)``.
        meets: whether there is one, likewise.
        values: the ramp there, or 0, likewise.
    """

    along: Array
    index: Array
    meets: Array
    values: Array

    @property
    def reads(self) -> Array:
        """Shape ``(channels, kernel, output length)``."""
        return np.where(self.along[:, None, None], self.values.T, self.meets.T)

    def factors(self) -> tuple[Array, Array]:
        """:attr:`reads` as a product, of as few functions of the position as there can be.

        At most positions only the place of the kernel differs: each tap reads there what the one in
        the middle reads, some steps on. Each of the others is a function by itself.

        Returns:
            Arrays of shapes ``(channels, kernel, functions)`` and ``(functions, output length)``.
        """
        reads = self.reads
        rows, row = np.unique(np.concatenate(reads), axis=0, return_inverse=True)
        middle = (reads.shape[1] - 1) // 2
        steps = np.where(self.meets, self.index - self.index[:, [middle]], np.iinfo(np.int64).max)
        _, kind, counts = np.unique(steps, axis=0, return_inverse=True, return_counts=True)
        common = kind.reshape(-1) == counts.argmax()
        first = common.argmax()
        others = np.flatnonzero(~common & self.meets.any(axis=1))
        ramps = self.along.any()
        if not self.meets[first, middle] or 1 + ramps + len(others) >= len(rows):
            each = np.eye(len(rows))[row.reshape(-1)]
            return each.reshape(*reads.shape[:2], -1), rows
        met, value = self.meets[first], self.values[first]
        constant = np.where(self.along[:, None], np.where(met, value - value[middle], 0), met)
        columns = [constant, *reads[:, :, others].transpose(2, 0, 1)]
        basis = [common, *(np.arange(len(common)) == other for other in others)]
        if ramps:
            columns.append(self.along[:, None] & met)
            basis.append(np.where(common, self.values[:, middle], 0))
        return np.stack(columns, axis=-1).astype(np.float64), np.stack(basis).astype(np.float64)


def _axes(
    geometry: ConvGeometry, coords: Coordinates, shape: Sequence[int], start: int, stop: int
) -> Iterator[_Axis]:
    axes = reversed(axis_tokens(geometry.rank))
    for token, n, (index, meets) in zip(axes, shape, geometry.tap_positions(shape), strict=True):
        if coords.outside != "extend":
            index, inside = _apply_padding(index, n, geometry.padding_mode)
            meets = meets & inside
        along = np.array([c == token for c in coords.channels[start:stop]])
        yield _Axis(along, index, meets, np.where(meets, ramp(coords, index, n), 0))


def _padded_share(
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: Sequence[int],
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
        padded=values,
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
    convolve: Callable[[Share, Any], Any],
    channels_last: bool = False,
    fused: bool = False,
) -> Any:
    """The position bias, in the framework whose arrays are passed.

    Args:
        coord_weight: the coordinate kernel, shape ``(out, n, *kernel)``.
        arrays: what :func:`shares` returned, with the framework's arrays in them.
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
        if share.last is None:
            term = convolve(share, coord_weight[:, share.start : share.stop])
            if channels_last:
                term = term.reshape((term.shape[0], -1)).T
        elif fused and share.fusible:
            term = _sum_of_products(coord_weight, share, channels_last)
        else:
            left, right = factors(coord_weight, share, channels_last)
            term = left @ right
        term = term.reshape((*share.shape, -1) if channels_last else (-1, *share.shape))
        total = term if total is None else total + term
    return total


def factors(coord_weight: Any, share: Share, channels_last: bool = False) -> tuple[Any, Any]:
    """The two matrices whose product is the map of a share with a table.

    One is the basis of the axis that is farthest from the channels in memory, so that the product,
    which has the most to do, is as it lies there, and its gradient, too.

    Returns:
        Matrices of shapes ``(out * other outputs, terms)`` and ``(terms, last outputs)``, or
        ``(first outputs, terms)`` and ``(terms, other outputs * out)``; of a table without bases
        these outputs are all.
    """
    if not channels_last:
        return _contracted(coord_weight, share, channels_last), share.last
    kernel = _flat(coord_weight, share).T
    if not share.bases:
        return share.table.T, kernel
    first, *others = share.bases
    term, before = share.table.T @ kernel, share.table.shape[1]
    for basis in reversed(others):
        before //= basis.shape[0]
        term = basis.T @ term.reshape((before, basis.shape[0], -1))
    return first.T, term.reshape((first.shape[0], -1))


def _sum_of_products(coord_weight: Any, share: Share, channels_last: bool) -> Any:
    term, last = _contracted(coord_weight, share, channels_last), share.last
    count = last.shape[0]
    if not channels_last:
        return reduce(add, (term[:, j, None] * last[j] for j in range(count)))
    term = term.reshape((-1, count, coord_weight.shape[0]))
    return reduce(add, (term[:, j, None] * last[j][:, None] for j in range(count)))


def _contracted(coord_weight: Any, share: Share, channels_last: bool) -> Any:
    """A kernel contracted with all but ``share.last``.

    Returns:
        A matrix of shape ``(out * other outputs, terms)``, or ``(other outputs, terms * out)``.
    """
    kernel = _flat(coord_weight, share)
    if share.bases:
        term = share.table.T @ kernel.T if channels_last else kernel @ share.table
        done = 1 if channels_last else kernel.shape[0]
        for basis in share.bases[:-1]:
            term = basis.T @ term.reshape((done, basis.shape[0], -1))
            done *= basis.shape[1]
        return term.reshape((done, -1))
    return kernel.T if channels_last else kernel


def _flat(coord_weight: Any, share: Share) -> Any:
    out, channels = coord_weight.shape[:2]
    if share.stop - share.start < channels:
        coord_weight = coord_weight[:, share.start : share.stop]
    return coord_weight.reshape((out, -1))
