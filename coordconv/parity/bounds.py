"""What a network must compute, and by how much arithmetic of a given precision may miss it.

Everything here is float64 NumPy, without any framework.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from coordconv import windows
from coordconv.coordinates import Coordinates
from coordconv.geometry import ConvGeometry
from coordconv.grid import Array
from coordconv.networks import Conv, Flatten, Layer, Linear, MeanPool, Network, ReLU
from coordconv.reference import Reference
from coordconv.weights import split_kernel

# The roundings of one coordinate, relative to its magnitude (see Reference). Where the grid is
# NumPy's there is one. A ramp that a graph computes in the layer's own type has four: the quotient
# of two exact integers, the product with half the span (a constant that is itself rounded), and the
# sum with the middle. A radius has four more at most: subtracting the centre, a square and two
# additions of squares, which the square root halves, and the square root. The length of a diagonal,
# by which a ramp is divided, has as many as a radius without a centre.
COORDINATE_ROUNDINGS = 8
DIAGONAL_ROUNDINGS = 3
# A place in a window's frame has seven: the size of the window, two for where it starts, three more
# for the place of a sample; the frame's length has three, of which the coordinate's own formula
# makes two uses. By a map there are further the difference of two coordinates and the product with
# a ramp, and the sum over a ramp and a constant for each channel.
WINDOW_ROUNDINGS = 16


@dataclass(frozen=True)
class Precision:
    """A floating-point type, and how frameworks sum in it.

    Sums are accumulated in float32 at least, with the roundoff ``unit``. In 16 bits, each finished
    sum is rounded once more, to the type itself with its roundoff ``rounding`` (0 elsewhere), and
    so is the result of every later addition to that sum. ``tiny`` is the largest error of a
    rounding where the type underflows, and ``storage`` the NumPy type that holds its values: NumPy
    itself has no bfloat16.
    """

    dtype: str
    unit: float
    rounding: float = 0
    tiny: float = 0
    storage: type[np.floating[Any]] = np.float32

    def rounded(self, array: Array) -> Array:
        """The nearest values that the type has, in ``storage``."""
        array = np.asarray(array, self.storage)
        if self.dtype == "float16":
            return array.astype(np.float16).astype(np.float32)
        if self.dtype == "bfloat16":  # the upper half of a float32; ties go to even
            bits = array.view(np.uint32)
            bits = bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))
            return (bits & np.uint32(0xFFFF0000)).view(np.float32)
        return array

    def error(self, size: Array, terms: float, roundings: int) -> Array:
        """A bound on the error of a sum, the absolute values of whose terms sum to ``size``.

        A term passes through ``terms`` roundings at most: those before it is added, and one for
        each addition. The sum, or a part of it, is rounded to 16 bits ``roundings`` times.

        Source:
            Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd edition, lemma 3.1; for
            16 bits, where that lemma allows few terms, Jeannerod and Rump, *Improved error bounds
            for inner products in floating-point arithmetic*, 2013.
        """
        relative = terms * self.unit / (1 - terms * self.unit)
        if self.dtype == "float64":
            return 2 * relative * size  # the float64 reference may be off by as much
        if not self.rounding:
            return relative * size
        relative += (1 + relative) * roundings * self.rounding
        return relative * size + roundings * self.tiny * (size > 0)


PRECISIONS = {
    precision.dtype: precision
    for precision in (
        Precision("float32", 2.0**-24),
        Precision("float64", 2.0**-53, storage=np.float64),
        Precision("bfloat16", 2.0**-24, 2.0**-8, 2.0**-134),
        Precision("float16", 2.0**-24, 2.0**-11, 2.0**-25),
    )
}


@dataclass(frozen=True)
class Expected:
    """A value in float64, and a bound on the error of computing it in any order of summation."""

    value: Array
    bound: Array

    @classmethod
    def exact(cls, value: Array) -> Expected:
        """A value that is known."""
        return cls(value.astype(np.float64), np.zeros(value.shape))

    @property
    def largest(self) -> Array:
        """The largest magnitude that there may be, which every bound of a product starts from."""
        return np.abs(self.value) + self.bound

    def reshape(self, *shape: int) -> Expected:
        """The same in another shape."""
        return Expected(self.value.reshape(shape), self.bound.reshape(shape))

    def widened(self, by: Array | float) -> Expected:
        """The same value with a larger bound."""
        return Expected(self.value, self.bound + by)

    def error(self, found: Array) -> float:
        """The largest error of ``found`` in units of the bound; inf where nothing bounds it.

        An element whose bound is 0 must be exact.
        """
        if found.shape != self.value.shape or not np.isfinite(found).all():
            return np.inf
        error = np.abs(found - self.value)
        if (error[self.bound == 0] > 0).any():
            return np.inf
        return float(np.max(error / np.where(self.bound == 0, 1, self.bound), initial=0))

    def equals(self, found: Array) -> bool:
        """Whether ``found`` equals the value to the last bit (the sign of a zero aside)."""
        return bool(np.array_equal(found, self.value))


def expected(
    network: Network,
    weights: Mapping[str, Array],
    x: Array,
    dy: Array | None,
    precision: Precision = PRECISIONS["float32"],
) -> dict[str, Expected]:
    """What a network computes, and how far arithmetic of a precision may be from it.

    Inside of :func:`coordconv.window` the input has that window.

    The output ``"y"`` for an input ``x (N, C, *S)`` and, unless the output's gradient ``dy`` is
    None, the gradients of ``"x"`` and of every weight.

    **One layer.** :meth:`Precision.error` needs the number of roundings that a term of a sum passes
    through. With ``c`` features and ``n`` coordinates to a group and ``taps`` to a kernel, an
    output element sums ``fan_in = (c + n) * taps`` products:

    - appended: one rounding for the product, at most ``fan_in - 1`` for additions, one for the
      bias: ``fan_in + 1``;
    - with a map: a feature's term passes one for the product, ``c * taps - 1`` for additions, one
      for the bias and one for adding the map, a coordinate's term ``n * taps`` and the same two:
      at most ``fan_in + 1``, since both ``c`` and ``n`` are at least 1;
    - either way, a coordinate's term passes the :func:`coordinate_roundings` of itself.

    An element of the kernel's gradient sums one product for each sample and output position,
    ``N * positions``. With a map the coordinates' part sums over the samples first and over the
    positions then: ``N - 1 + positions`` roundings, which are no more. Again those of the
    coordinate itself are added. The input's gradient has no coordinates in it.

    **To 16 bits**, an output is rounded four times at most: the convolution, the bias added to it,
    the map, and the sum of both. Where a convolution is one matrix product for each tap, a
    transposed convolution's output and the input's gradient are rounded once for each tap, and the
    input's gradient as often again for each place to which padding copies a sample. Kernels'
    gradients are rounded once for each sample of the batch; the bias's, a plain sum, for each term.

    **Through several layers**, the error of a layer's input passes through the layer's absolute
    weights. The gradient of a ReLU counts as unknown where the error may have changed the sign.
    """
    gradient = None if dy is None else Expected.exact(dy)
    return propagated(network, weights, x, lambda _: gradient, precision, lambda value: value)


def coordinate_roundings(coords: Coordinates | None) -> int:
    """The roundings of one coordinate, relative to its magnitude."""
    if coords is None:
        return 0
    roundings = COORDINATE_ROUNDINGS + DIAGONAL_ROUNDINGS * (coords.aspect == "diagonal")
    if windows.current() is not None:
        roundings += WINDOW_ROUNDINGS + 2 * len(coords)
    return roundings


def propagated(
    network: Network,
    weights: Mapping[str, Array],
    x: Array,
    output_gradient: Callable[[Array], Expected | None],
    precision: Precision,
    passed_on: Callable[[Expected], Expected],
) -> dict[str, Expected]:
    """Output and gradients as in :func:`expected`, for any bound on the error of a layer's input.

    ``passed_on`` makes of what a layer computed what the next layer takes; ``output_gradient`` is
    given the output.
    """
    inputs, value = [], Expected.exact(x)
    for layer in network.layers:
        inputs.append(value)
        value = passed_on(_forward(layer, weights, value, precision))
    found, gradient = {"y": value}, output_gradient(value.value)
    if gradient is None:
        return found
    gradient = passed_on(gradient)
    for layer, value in zip(reversed(network.layers), reversed(inputs), strict=True):
        gradients, gradient = _backward(layer, weights, value, gradient, precision)
        gradient = passed_on(gradient)
        found |= {f"{layer.name}.{name}": each for name, each in gradients.items()}
    return found | {"x": gradient}


def _forward(
    layer: Layer, weights: Mapping[str, Array], x: Expected, precision: Precision
) -> Expected:
    """The layer's output."""
    if isinstance(layer, ReLU):
        return Expected(np.maximum(x.value, 0), x.bound)
    if isinstance(layer, Flatten):
        return x.reshape(len(x.value), -1)
    if isinstance(layer, MeanPool):
        return _mean(x, precision)
    conv, weight, bias = _as_convolution(layer, weights)
    z, g, reference = (
        _with_places(x),
        conv.geometry,
        Reference(conv.geometry, conv.coords, windows.current()),
    )
    y = reference.forward(z.value, weight, bias)
    size = reference.forward(z.largest, weight, bias, magnitudes=True)
    terms = conv.fan_in + 1 + coordinate_roundings(conv.coords)
    # A product of matrices is rounded with its bias; a layer in parts, and with a map, more often.
    roundings = 2 if isinstance(layer, Linear) else 4 + (g.taps - 1 if g.transposed else 0)
    error = precision.error(size, terms, roundings)
    if z.bound.any():
        if conv.coords is not None:
            weight, _ = split_kernel(weight, conv.coords, g.groups, g.transposed)
        error = error + Reference(g).forward(z.bound, weight, magnitudes=True)
    return Expected(y, error).reshape(*y.shape[: x.value.ndim])


def _backward(
    layer: Layer, weights: Mapping[str, Array], x: Expected, dy: Expected, precision: Precision
) -> tuple[dict[str, Expected], Expected]:
    """The gradients of the layer's weights, and that of its input."""
    if isinstance(layer, ReLU):
        unknown, positive = (np.abs(x.value) <= x.bound) & (x.bound > 0), x.value > 0
        error = np.where(unknown, dy.largest, dy.bound * positive)
        return {}, Expected(dy.value * positive, error)
    if isinstance(layer, Flatten):
        return {}, dy.reshape(*x.value.shape)
    if isinstance(layer, MeanPool):
        return {}, _spread(dy, x.value.shape, precision)
    conv, weight, bias = _as_convolution(layer, weights)
    z, dy, g = _with_places(x), _with_places(dy), conv.geometry
    reference = Reference(g, conv.coords, windows.current())
    batch, shape = len(z.value), z.value.shape[2:]

    def input_gradient(dy: Array, magnitudes: bool) -> Array:
        return reference.input_gradient(dy, weight, shape, magnitudes=magnitudes)

    terms = _most_reads(g, shape) * conv.out_channels // g.groups
    roundings = g.taps * _most_copies(g, shape)
    error = precision.error(input_gradient(dy.largest, True), terms, roundings)
    if dy.bound.any():
        error = error + input_gradient(dy.bound, True)
    dx = Expected(input_gradient(dy.value, False), error).reshape(*x.value.shape)

    values = reference.weight_gradients(z.value, dy.value)
    sizes = exact_sizes = reference.weight_gradients(z.largest, dy.largest, magnitudes=True)
    if z.bound.any() or dy.bound.any():
        exact_sizes = reference.weight_gradients(z.value, dy.value, magnitudes=True)
    terms = batch * math.prod(dy.value.shape[2:])
    own_errors = {
        "weight": precision.error(
            sizes["weight"], terms + coordinate_roundings(conv.coords), batch
        ),
        "bias": precision.error(sizes["bias"], terms, terms),
    }
    gradients = {
        name: Expected(values[name], error + (sizes[name] - exact_sizes[name]))
        for name, error in own_errors.items()
        if name == "weight" or bias is not None
    }
    if isinstance(layer, Linear):
        gradients["weight"] = gradients["weight"].reshape(*weight.shape[:2])
    return gradients, dx


def _mean(x: Expected, precision: Precision) -> Expected:
    """The mean over the positions: a sum, whose quotient is rounded, or its factor and product."""
    axes = tuple(range(2, x.value.ndim))
    positions = math.prod(x.value.shape[2:])
    error = precision.error(x.largest.mean(axes), positions + 2, 2)
    return Expected(x.value.mean(axes), error + x.bound.mean(axes))


def _spread(dy: Expected, shape: tuple[int, ...], precision: Precision) -> Expected:
    """The gradient of such a mean: the same share for every position."""
    positions = math.prod(shape[2:])
    value, largest = dy.value / positions, dy.largest / positions
    found = Expected(value, precision.error(largest, 2, 2) + dy.bound / positions)
    found = found.reshape(*shape[:2], *(1,) * len(shape[2:]))
    return Expected(*(np.broadcast_to(a, shape) for a in (found.value, found.bound)))


def _as_convolution(
    layer: Conv | Linear, weights: Mapping[str, Array]
) -> tuple[Conv, Array, Array | None]:
    """The layer with its weights; a Linear is a convolution of a single place."""
    weight, bias = weights[f"{layer.name}.weight"], weights.get(f"{layer.name}.bias")
    if isinstance(layer, Conv):
        return layer, weight, bias
    conv = Conv(layer.name, layer.in_features, layer.out_features, ConvGeometry((1,)))
    return conv, weight[..., None], bias


def _with_places(x: Expected) -> Expected:
    """Features ``(N, C)`` as ``(N, C, 1)``, and a map ``(N, C, *S)`` as it is."""
    return x.reshape(*x.value.shape, 1) if x.value.ndim == 2 else x


def _most_reads(geometry: ConvGeometry, shape: tuple[int, ...]) -> int:
    """How often one sample is read at most, by any tap for any output position.

    That may be more than the number of taps, since padding may copy a sample.
    """
    single = replace(geometry, groups=1)
    dy = np.ones((1, 1, *single.output_shape(shape)))
    kernel = np.ones((1, 1, *single.kernel))
    return int(Reference(single).input_gradient(dy, kernel, shape).max())


def _most_copies(geometry: ConvGeometry, shape: tuple[int, ...]) -> int:
    """The largest number of places to which padding copies a sample, its own included."""
    if geometry.padding_mode == "zeros":
        return 1
    pads, mode = geometry.pads(shape), geometry.padding_mode
    one_tap = ConvGeometry((1,) * geometry.rank, padding=pads, padding_mode=mode)
    return _most_reads(one_tap, shape)
