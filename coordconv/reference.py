"""CoordConv by its definition, in NumPy float64: the oracle that every backend is held to.

Nothing here is fast, and nothing here uses the position bias: the coordinates are concatenated,
each group is given all of them, the input is padded, and the taps are summed one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from coordconv.coordinates import Coordinates, axis_tokens
from coordconv.geometry import ConvGeometry
from coordconv.grid import Array, evaluate, in_frame, scale, steps_of
from coordconv.windows import Window

# The sample that padding copies to index ``i`` of an axis of ``n``; zeros are put where it is none.
_COPIED: dict[str, Callable[[Array, int], Array]] = {
    "zeros": lambda i, n: i,
    "reflect": lambda i, n: n - 1 - abs(n - 1 - abs(i)),
    "replicate": lambda i, n: np.clip(i, 0, n - 1),
    "circular": lambda i, n: i % n,
}


@dataclass(frozen=True)
class Reference:
    """A convolution, with coordinates or without, and its gradients.

    All arrays are canonical: ``x (N, C, *S)``, ``weight (out, C / groups + n, *kernel)``, of a
    transposed convolution ``(C + groups * n, out / groups, *kernel)``, ``bias (out,)``. In each
    group the coordinates come after the features.

    Without ``coords`` it is a plain convolution. The ``window`` says what part of its frame ``x``
    shows.

    Example:
        >>> layer = Reference(ConvGeometry((1,)), Coordinates("x"))
        >>> layer.forward(np.ones((1, 1, 3)), np.array([[[1.0], [10.0]]]))
        array([[[-9.,  1., 11.]]])

    Source:
        Liu et al., NeurIPS 2018, section 3; for groups every group sees all the coordinates.
    """

    geometry: ConvGeometry
    coords: Coordinates | None = None
    window: Window | None = None

    def forward(
        self, x: Array, weight: Array, bias: Array | None = None, *, magnitudes: bool = False
    ) -> Array:
        """The output, shape ``(N, out, *S_out)``.

        With ``magnitudes`` every term of every sum is replaced by its absolute value: the result is
        the ``Conv(|x|; |w|) + |bias|`` that error bounds are made of. A coordinate is replaced by
        the sum of the absolute values that it is computed from, which may cancel.
        """
        z = self.padded(x, magnitudes=magnitudes)
        kernel = self._by_group(weight, magnitudes)
        out_shape = self.geometry.output_shape(x.shape[2:])
        groups, out, _ = kernel.shape[:3]
        y = np.zeros((len(x), groups, out, int(np.prod(out_shape))))
        for tap, window in self._windows(out_shape):
            y += kernel[tap] @ _flat(z[window])
        y = y.reshape(len(x), groups * out, *out_shape)
        if bias is not None:
            y += _float64(bias, magnitudes).reshape(-1, *(1,) * self.geometry.rank)
        return y

    def input_gradient(
        self, dy: Array, weight: Array, shape: tuple[int, ...], *, magnitudes: bool = False
    ) -> Array:
        """The gradient with respect to ``x``, shape ``(N, C, *shape)``, for the output's ``dy``."""
        dy, kernel = self._outputs_by_group(dy, magnitudes), self._by_group(weight, magnitudes)
        kernel = kernel[:, :, : kernel.shape[2] - len(self.coords or ())]
        matrices = self._padding_matrices(shape)
        dz = np.zeros((*dy.shape[:2], kernel.shape[2], *(len(m) for m in matrices)))
        for tap, window in self._windows(dy.shape[3:]):
            term = kernel[tap].swapaxes(1, 2) @ _flat(dy)
            dz[window] += term.reshape(*term.shape[:3], *dy.shape[3:])
        dz = _multiplied(dz, [m.T for m in matrices], 3)
        return dz.reshape(len(dy), dz.shape[1] * dz.shape[2], *shape)

    def weight_gradients(
        self, x: Array, dy: Array, *, magnitudes: bool = False
    ) -> dict[str, Array]:
        """The gradients of ``weight`` and ``bias``."""
        z, grouped = self.padded(x, magnitudes=magnitudes), self._outputs_by_group(dy, magnitudes)
        kernel = np.zeros((grouped.shape[1], grouped.shape[2], z.shape[2], *self.geometry.kernel))
        for tap, window in self._windows(dy.shape[2:]):
            read = _flat(z[window]).swapaxes(2, 3)
            kernel[tap] = (_flat(grouped) @ read).sum(axis=0)
        if self.geometry.transposed:
            kernel = _turned(kernel).swapaxes(1, 2)
        return {
            "weight": kernel.reshape(-1, *kernel.shape[2:]),
            "bias": grouped.sum(axis=(0, *range(3, grouped.ndim))).reshape(-1),
        }

    def padded(self, x: Array, *, magnitudes: bool = False) -> Array:
        """What the kernel slides over: ``(N, groups, C / groups + n, *padded shape)``."""
        batch, channels, *lengths = x.shape
        shape, groups = tuple(lengths), self.geometry.groups
        z = _float64(x, magnitudes).reshape(batch, groups, channels // groups, *shape)
        matrices = self._padding_matrices(shape)
        z = _multiplied(z, matrices, 3)
        if self.coords is None:
            return z
        positions: Sequence[Array] = [np.arange(n) for n in shape]
        if self.coords.outside == "extend":  # the ramp itself, at every place but the holes
            positions, holes = zip(*self._samples(shape), strict=True)
            matrices = [np.diag(~hole).astype(np.float64) for hole in holes]
        grid = _multiplied(self._grid(positions, shape, magnitudes), matrices, 2)[:, None]
        return np.concatenate([z, np.broadcast_to(grid, (batch, groups, *grid.shape[2:]))], axis=2)

    def _by_group(self, weight: Array, magnitudes: bool) -> Array:
        """``(groups, out / groups, C / groups + n, *kernel)``, a transposed kernel turned."""
        weight = _float64(weight, magnitudes)
        kernel = weight.reshape(self.geometry.groups, -1, *weight.shape[1:])
        if self.geometry.transposed:
            kernel = _turned(kernel.swapaxes(1, 2))
        return kernel

    def _outputs_by_group(self, dy: Array, magnitudes: bool) -> Array:
        dy = _float64(dy, magnitudes)
        groups = self.geometry.groups
        return dy.reshape(len(dy), groups, dy.shape[1] // groups, *dy.shape[2:])

    def _windows(self, out_shape: tuple[int, ...]) -> Iterator[tuple[Any, Any]]:
        """The index of each tap, and of the part of the padded input that it reads."""
        kernel, stride, dilation, _, _ = self.geometry.per_axis
        if self.geometry.transposed:
            stride = (1,) * self.geometry.rank
        for tap in product(*map(range, kernel)):
            window = (
                slice(k * d, k * d + (m - 1) * s + 1, s)
                for k, d, m, s in zip(tap, dilation, out_shape, stride, strict=True)
            )
            yield (..., *tap), (..., *window)

    def _samples(self, shape: tuple[int, ...]) -> list[tuple[Array, Array]]:
        """Per axis, of each place of the padded input: its sample, and whether it is a hole.

        Samples beyond the border have indices there; holes are the zeros between samples.
        """
        g, samples = self.geometry, []
        for n, (before, after), k, s, d, extra, hole in zip(
            shape, g.pads(shape), *g.per_axis, strict=True
        ):
            reach = d * (k - 1)
            if g.transposed and g.padding_mode == "circular":  # the holes go round, too
                before, after, hole = reach - before, before + s - 1, s
            elif g.transposed:
                before, after, hole = reach - before, reach - after + extra, s
            elif g.padding_mode != "zeros":  # samples are copied before there are holes
                before, after = before * hole, after * hole
            index, rest = np.divmod(np.arange(-before, (n - 1) * hole + 1 + after), hole)
            samples.append((index, rest > 0))
        return samples

    def _padding_matrices(self, shape: tuple[int, ...]) -> list[Array]:
        """Per axis the matrix of zeros and ones that pads: ``(padded length, length)``."""
        copied = _COPIED[self.geometry.padding_mode]
        return [
            ((copied(index, n)[:, None] == np.arange(n)) & ~hole[:, None]).astype(np.float64)
            for n, (index, hole) in zip(shape, self._samples(shape), strict=True)
        ]

    def _grid(self, positions: Sequence[Array], shape: tuple[int, ...], magnitudes: bool) -> Array:
        """The coordinates at some positions; or the magnitudes of what they are computed from.

        Shape ``(N, n, *positions)``, ``N`` being 1 where all samples have the same. An axis
        coordinate is a quotient within the span -1 to 1, times the half of the span, plus the
        middle: where these two cancel, the rounding of each remains.
        """
        assert self.coords is not None
        coords, frame = self.coords, self.window.in_frame if self.window else None
        grid = evaluate(coords, positions, shape, frame)
        grid = grid if frame else grid[None]
        if not magnitudes:
            return grid
        axes = axis_tokens(self.geometry.rank)
        sizes = self._sizes_in_frame(positions, shape) if frame else self._sizes(positions, shape)
        found = dict(zip(axes, sizes, strict=True))
        found["r"] = np.sqrt(sum((size + abs(coords.r_center)) ** 2 for size in sizes))
        return np.stack(
            [
                np.broadcast_to(found[channel], grid[:, 0].shape)
                if isinstance(channel, str)
                else np.abs(grid[:, place])  # of NumPy's own
                for place, channel in enumerate(coords.channels)
            ],
            1,
        )

    def _sizes(self, positions: Sequence[Array], shape: tuple[int, ...]) -> list[Array]:
        """The magnitude of each axis coordinate, ``(1, *positions)``."""
        assert self.coords is not None
        axes = axis_tokens(self.geometry.rank)
        if self.coords.units == "pixels":
            return [
                np.abs(each)[None] for each in evaluate(self.coords.only(axes), positions, shape)
            ]
        unscaled = replace(self.coords, channels=axes, span=(-1.0, 1.0))
        scales = [scale(self.coords, token) for token in axes]
        return [
            np.abs(quotient * half)[None] + abs(middle)
            for quotient, (half, middle) in zip(
                evaluate(unscaled, positions, shape), scales, strict=True
            )
        ]

    def _sizes_in_frame(self, positions: Sequence[Array], shape: tuple[int, ...]) -> list[Array]:
        """The magnitude of each axis coordinate of a window, as an array that broadcasts.

        By a map it is ``(c(n) - c(0)) * (i / n) + c(0)``, of the coordinates ``c`` at both ends;
        each is the quotient of a place and of the frame's length, which may cancel. That is no less
        than the magnitude of the coordinate at ``i`` itself.
        """
        assert self.coords is not None
        assert self.window is not None
        coords, rank, sizes = self.coords, len(shape), []
        ends = [np.array([0, n]) for n in shape]
        places, lengths = in_frame(coords, self.window.in_frame, ends, shape)
        for behind, token in enumerate(axis_tokens(rank)):
            axis = rank - 1 - behind
            half, middle = 1.0, 0.0
            steps = np.ones_like(lengths[axis])
            if coords.units == "span":
                half, middle = scale(coords, token)
                steps = steps_of(coords, lengths[axis], lengths, places[axis], np.sqrt, True)
            size = (2 * np.abs(places[axis]) + 1 + lengths[axis]) / steps * abs(half) + abs(middle)
            first, last = size[:, :1], size[:, 1:]
            along = (last + first) * np.abs(positions[axis] / shape[axis]) + first
            sizes.append(along.reshape(len(along), *(1,) * axis, -1, *(1,) * behind))
        return sizes


def _float64(array: Array, magnitudes: bool) -> Array:
    array = np.asarray(array, np.float64)
    return np.abs(array) if magnitudes else array


def _flat(array: Array) -> Array:
    """``(N, groups, channels, *S)`` with the spatial axes flattened into one."""
    return array.reshape(*array.shape[:3], int(np.prod(array.shape[3:])))


def _turned(kernel: Array) -> Array:
    """A kernel of three axes and the spatial ones with its taps in the reverse order."""
    return np.flip(kernel, tuple(range(3, kernel.ndim)))


def _multiplied(array: Array, matrices: Sequence[Array], first: int) -> Array:
    """``matrix @ array`` along one axis after another, from the ``first`` on."""
    for axis, matrix in enumerate(matrices, first):
        array = np.moveaxis(np.tensordot(matrix, array, axes=(1, axis)), 0, axis)
    return array
