"""Append or map: the two exact ways to compute a CoordConv, and which of them is cheaper.

A convolution is linear in its channels, and the coordinates do not depend on the data. So with the
kernel split into its features' part F and its coordinates' part G

    CoordConv(x) = Conv([x, grid]; kernel) + bias         "append": the definition
                 = Conv(x; F) + bias + P                   "map"
    P = Conv(grid; G), one position bias for the whole batch, shape (out, *output shape).

Append copies the input to put the coordinates behind it, and convolves an odd number of channels.
Map copies F out of the kernel, makes P, and passes over the output once more. :func:`choose` says
which, and :class:`MapPlan` makes P, of NumPy's arrays or of a framework's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from coordconv.coordinates import Coordinates, axis_tokens
from coordconv.functions import AXES
from coordconv.geometry import ConvGeometry
from coordconv.grid import Array, Frame, channel_values, frozen, in_frame, ramp, stacked

APPEND, MAP = "append", "map"

# What costs() counts with; one unit is the time to read or to write a number.
_PRODUCTS = 10  # multiplications and additions in a unit
BLOCK = 16  # channels that most libraries work on together
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
    block: int = BLOCK,
) -> str:
    """Which of the two ways computes a layer from ``channels``, of all groups, to ``out``.

    ``batch`` and the ``positions`` of a sample's output are None if a tracer does not tell. P is
    ``fused`` if a compiler or a product adds it to the output as that is made, and never writes it
    by itself. Convolutions work on a ``block`` of channels together.
    """
    # With "extend" the coordinates do not end where the features do: there is nothing to append. In
    # 16 bits neighbouring coordinates on an axis of 512 samples may be the same number.
    if low_precision or coords.outside == "extend":
        return MAP
    if FORCED is not None:
        return FORCED
    # No library is fast at groups with a few channels more than the features.
    if geometry.groups > 1:
        return MAP
    if batch is None or positions is None:  # the graph is the simpler
        return APPEND
    append, map = costs(geometry, len(coords), channels, out, batch, positions, fused, block)
    return APPEND if append < map else MAP


def costs(
    geometry: ConvGeometry,
    n: int,
    channels: int,
    out: int,
    batch: int,
    positions: int,
    fused: bool = False,
    block: int = BLOCK,
) -> tuple[float, float]:
    """What append and map take more than the plain convolution, in numbers read or written.

    Append reads and writes the input, and multiplies the ``n`` coordinates of every sample;
    libraries work on blocks of channels, so that two channels more may cost as much as sixteen. Map
    reads and writes the features' part of the kernel, makes P, and reads and writes the output
    again, unless P is ``fused``; and it calls a few functions more. The measurements that the
    constants are from, and what this function makes of them, are in ``docs/performance.md``.
    """
    steps = math.prod(geometry.per_axis.stride)
    inputs = channels * positions * (1 / steps if geometry.transposed else steps)
    outputs, taps = out * positions, geometry.taps
    added = n
    if channels >= block:
        added = -(-(channels + n) // block) * block - -(-channels // block) * block
    append = batch * (2 * inputs + outputs * taps * added / _PRODUCTS)
    map = 2 * channels * out * taps + _CALLS
    if not fused:
        map += outputs * (1 + min(n * taps / _PRODUCTS, _MOST_FOR_MAP)) + 2 * batch * outputs
    return append, map


@dataclass(frozen=True)
class MapPlan:
    """All that P depends on but the kernel: what its constants are made of, and kept by.

    Args:
        geometry: the convolution.
        coords: the coordinate channels.
        shape: the spatial shape of the input, of plain or symbolic ints.
        lengths: that of the output, which ``output_size`` may have chosen.

    Its methods take a framework's functions, or NumPy's: ``xp`` has ``sqrt``, ``stack`` and
    ``broadcast_to``, as NumPy has; ``arange`` counts from 0 in the type that is computed with;
    a ``frame`` is a window's. Kernels are the coordinates' part, ``(out, n, *kernel)``.
    """

    geometry: ConvGeometry
    coords: Coordinates
    shape: tuple[Any, ...]
    lengths: tuple[Any, ...]

    def divided(self, out: int | None) -> tuple[MapPlan | None, MapPlan | None]:
        """What is contracted axis by axis for P, and what is convolved; None for no channel.

        An axis coordinate is a ramp along its axis and constant along the others, so that its part
        of P is a product of a few small matrices. On a large map these take a fraction of the time
        of a convolution, which sums over all taps; on a small one their several steps cost more
        than they save: docs/performance.md has the measurements. Where ``out`` is None the size is
        unknown, and counts as large. The radius is no such product, nor need functions be.
        """
        axes = self.coords.along_axes
        if out is not None:
            work = out * math.prod(self.lengths) * len(axes) * self.geometry.taps
            if work < MANY_PRODUCTS:
                return None, self
        if len(axes) in (0, len(self.coords)):
            return (self, None) if axes else (None, self)
        first, second = (
            MapPlan(self.geometry, self.coords.only(tokens), self.shape, self.lengths)
            for tokens in (
                axes,
                [c for c in self.coords.channels if not isinstance(c, str) or c not in axes],
            )
        )
        return first, second

    def position_bias(
        self,
        kernel: Any,
        divided: tuple[MapPlan | None, MapPlan | None],
        contract: Callable[[MapPlan, Any], Any],
        convolve: Callable[[MapPlan, Any], Any],
        pick: Callable[[Any, list[int]], Any] = lambda kernel, channels: kernel[:, channels],
    ) -> Any:
        """P, the sum of what two functions make of the two plans and their channels of a kernel."""
        axes, others = divided
        if axes is None or others is None:
            return contract(self, kernel) if axes else convolve(self, kernel)
        of_axes, of_others = (
            pick(kernel, [self.coords.names.index(name) for name in plan.coords.names])
            for plan in (axes, others)
        )
        bias = contract(axes, of_axes)
        bias += convolve(others, of_others)  # in place, where arrays can: to allocate takes longer
        return bias

    def tables(self, arange: Callable[[Any], Any], xp: Any) -> list[Any]:
        """What each tap reads of the axes' coordinates: for each axis ``(n, kernel, length)``.

        What a tap reads of a channel at a position is the product of one entry for each axis: of
        the ramp along the channel's own axis, and along the others 1, or 0 where padding reads 0.
        """
        tables = []
        for token, n, m, (first, _, hole), k, s, d in zip(
            reversed(axis_tokens(self.geometry.rank)),
            self.shape,
            self.lengths,
            self._places(),
            *self.geometry.per_axis[:3],
            strict=True,
        ):
            taps, steps = arange(k).reshape((-1, 1)), arange(m)
            if self.geometry.transposed:  # the kernel is read backwards, and moves by one place
                place = steps + (k - 1 - taps) * d + first
            else:
                place = steps * s + taps * d + first
            index, mask = self._read(place, hole, n)
            values = ramp(self.coords, token, index, self.shape, xp.sqrt)
            ones = values * 0 + 1  # of the same type
            if mask is not None:
                values, ones = values * mask, ones * mask
            tables.append(xp.stack([values if c == token else ones for c in self.coords.channels]))
        return tables

    def as_product(
        self, kernel: Any, tables: Sequence[Any], einsum: Callable[..., Any], out: int
    ) -> tuple[Any, Any]:
        """The axes' part of P as a product of two matrices, from :meth:`tables`.

        Their shapes are ``(out * other lengths, terms)`` and ``(terms, last length)``.
        """
        *others, last = tables
        term, rows = kernel, out
        for size, table in zip(self.geometry.kernel[:-1], others, strict=True):
            # The axes so far are rows; channels and the axes to come are summed over at the end.
            term = term.reshape((rows, len(self.coords), size, -1))
            term = einsum("rckz,ckt->rtcz", term, table)
            rows = rows * table.shape[-1]  # not in place: a tracer's number is a tensor
        return term.reshape((rows, -1)), last.reshape((-1, last.shape[-1]))

    def contract(
        self, kernel: Any, tables: Sequence[Any], einsum: Callable[..., Any], out: int
    ) -> Any:
        """The axes' part of P, ``(out, *lengths)``, from what :meth:`as_product` takes."""
        left, right = self.as_product(kernel, tables, einsum, out)
        return (left @ right).reshape((out, *(table.shape[-1] for table in tables)))

    @property
    def stride(self) -> tuple[int, ...]:
        """The stride at which the kernel slides over the padded grid."""
        geometry = self.geometry
        return (1,) * geometry.rank if geometry.transposed else geometry.per_axis.stride

    def convolve(
        self, kernel: Any, grids: Any, conv: Callable[..., Any], bias: Any | None = None
    ) -> Any:
        """P of each of several :meth:`padded_grid`, as the framework's convolution of them."""
        if self.geometry.transposed:
            kernel = kernel.flip([*range(2, 2 + self.geometry.rank)])
        return conv(grids, kernel, bias, self.stride, 0, self.geometry.per_axis.dilation)

    def padded_grid(self, arange: Callable[[Any], Any], xp: Any, frame: Frame | None = None) -> Any:
        """The coordinates as the kernel slides over them, ``(n, *padded shape)``.

        Its convolution without padding, with :attr:`stride` and the geometry's dilation, is P. For
        a transposed convolution the taps of the kernel have to be reversed. With the ``frame`` of a
        window ``(N, n, *padded shape)``.
        """
        indices, masks, shape = self._padded(arange)
        values = channel_values(self.coords, indices, self.shape, xp.sqrt, frame)
        return stacked(_masked(values, masks), shape, xp, frame)

    def channels_last(
        self, arange: Callable[[Any], Any], xp: Any, frame: Frame | None = None
    ) -> Any:
        """As :meth:`padded_grid`, ``(*padded shape, n)``."""
        grid = self.padded_grid(arange, xp, frame)
        return xp.moveaxis(grid, -1 - self.geometry.rank, -1)

    def _padded(self, arange: Callable[[Any], Any]) -> tuple[list[Any], list[Any], tuple[Any, ...]]:
        """Per axis the samples that the padded grid reads; masks of where it reads 0; its shape."""
        if self.geometry.pointwise:
            return [arange(n) for n in self.shape], [], self.shape
        indices, masks = [], []
        for axis, (first, count, hole) in enumerate(self._places()):
            index, mask = self._read(arange(count) + first, hole, self.shape[axis])
            indices.append(index)
            if mask is not None:
                masks.append(mask.reshape((-1,) + (1,) * (self.geometry.rank - 1 - axis)))
        return indices, masks, tuple(count for _, count, _ in self._places())

    @property
    def is_affine(self) -> bool:
        """Whether P of a window is a sum of the maps of :meth:`basis`."""
        return len(self.coords.along_axes) == len(self.coords)

    def basis(self, arange: Callable[[Any], Any], xp: Any) -> Any:
        """For each channel a ramp, and a constant: two grids ``(2, n, *padded shape)``.

        A coordinate that runs along an axis is ``a * ramp + b`` in every window, with a ramp that
        all windows have. So P is a sum of the maps of these, each channel alone: of
        :meth:`maps`, of which :meth:`coefficients` has the factors.
        """
        coords = Coordinates(
            self.coords.channels, units="pixels", align="start", outside=self.coords.outside
        )
        indices, masks, shape = self._padded(arange)
        ramps = channel_values(coords, indices, self.shape, xp.sqrt)
        ones = [ramp * 0 + 1 for ramp in ramps]
        return xp.stack([stacked(_masked(grid, masks), shape, xp) for grid in (ramps, ones)])

    def maps(self, basis: Any, convolve: Callable[[int, Any], Any]) -> list[Any]:
        """What each channel's ramp and constant give, ``2n`` maps ``(out, *lengths)``.

        ``convolve(channel, grids)`` is the convolution of several grids with that channel alone,
        ``(2, 1, *padded shape)``. To convolve all channels at once, of which all but one are zero,
        takes ten times as long: libraries are slow at a batch of a few channels.
        """
        pairs = [convolve(c, basis[:, c : c + 1]) for c in range(len(self.coords))]
        return [pair[i] for pair in pairs for i in (0, 1)]

    def coefficients(self, arange: Callable[[Any], Any], xp: Any, frame: Frame) -> Any:
        """How much of each of :meth:`maps` is in P of each sample, ``(N, 2n)``."""
        shape, channels = self.shape, self.coords.channels
        ends = [arange(2) * n for n in shape]  # far apart, so that their difference is good
        places, lengths = in_frame(self.coords, frame, ends, shape)
        axes = [self.geometry.rank - 1 - AXES.index(token) for token in channels]
        pairs = [
            ramp(self.coords, token, places[axis], lengths, xp.sqrt, True)
            for token, axis in zip(channels, axes, strict=True)
        ]
        values = [
            each
            for pair, axis in zip(pairs, axes, strict=True)
            for each in ((pair[:, 1] - pair[:, 0]) / shape[axis], pair[:, 0])
        ]
        zero = sum(value[-1:] * 0 for value in values)
        for value in values:  # one axis may have a window for each sample, and another for all
            zero = zero + value * 0
        return xp.stack([value + zero for value in values], 1)

    def _places(self) -> list[tuple[Any, Any, int]]:
        """Per axis, the first place that a tap reaches, the number of places, and the hole.

        A place is a sample or between two samples: from one sample to the next are ``hole`` places.
        """
        geometry, places = self.geometry, []
        for n, m, (before, after), k, s, d, _, hole in zip(
            self.shape, self.lengths, geometry.pads(self.shape), *geometry.per_axis, strict=True
        ):
            reach = d * (k - 1)
            if geometry.transposed:
                places.append((before - reach, m + reach, s))
            elif geometry.padding_mode == "zeros":
                places.append((-before, (n - 1) * hole + 1 + before + after, hole))
            else:  # these modes copy samples, before holes are made between them
                places.append((-before * hole, (n + before + after - 1) * hole + 1, hole))
        return places

    def _read(self, place: Any, hole: int, n: Any) -> tuple[Any, Any]:
        """The sample that is read at each place of an axis, and 1 or 0 for whether there is one.

        None for the second says that there always is. Numbers for it, since not every framework
        multiplies by truth values.
        """
        index, mask = place, None
        if hole > 1:
            index, mask = place // hole, 1 - (place % hole).clip(0, 1)
        if self.coords.outside == "extend":
            return index, mask
        mode = self.geometry.padding_mode
        if mode == "circular":
            return index % n, mask
        if mode == "reflect":
            around = 2 * n - 2 + 1 // n  # at least 1: an axis of one sample reflects that
            return n - 1 - abs(n - 1 - abs(index) % around), mask
        clipped = index.clip(0, n - 1)
        if mode == "replicate":
            return clipped, mask
        inside = 1 - abs(clipped - index).clip(0, 1)
        return clipped, inside if mask is None else inside * mask


def _masked(values: Sequence[Any], masks: Sequence[Any]) -> Sequence[Any]:
    """The channels, 0 where padding reads 0."""
    for mask in masks:
        values = [value * mask for value in values]
    return values


POINTWISE = {rank: ConvGeometry((1,) * rank) for rank in (1, 2, 3)}


def plain(coords: Coordinates, shape: Sequence[Any]) -> MapPlan:
    """The plan of a pointwise convolution, whose padded grid is the grid of the input itself."""
    return MapPlan(POINTWISE[len(shape)], coords, tuple(shape), tuple(shape))


def of_each(function: Callable[[Any], Any], made: Any) -> Any:
    """What a function makes of an array, or of each in a list."""
    return [function(array) for array in made] if isinstance(made, list) else function(made)


def computed(
    method: Callable[..., Any], plan: MapPlan, dtype: type[np.floating[Any]] = np.float32
) -> Any:
    """What a method of :class:`MapPlan` makes, for a known shape and without a window.

    Computed in float64 and rounded once; read-only.

    Example:
        >>> plan = MapPlan(ConvGeometry((3,), padding=1), Coordinates("x"), (3,), (3,))
        >>> computed(MapPlan.padded_grid, plan)
        array([[ 0., -1.,  0.,  1.,  0.]], dtype=float32)
    """

    def rounded(array: Array) -> Array:
        return frozen((array + 0.0).astype(dtype))  # padding reads 0, not -0

    return of_each(rounded, method(plan, np.arange, np))


# As `computed`, of which the last few are kept.
known = lru_cache(maxsize=64)(computed)
