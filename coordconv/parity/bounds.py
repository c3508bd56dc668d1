"""What a network must compute, and by how much arithmetic of a given precision may miss it.

Everything here is float64 NumPy, without any framework.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from coordconv.geometry import ConvGeometry
from coordconv.grid import Array
from coordconv.networks import Conv, Flatten, Layer, Linear, Network, ReLU
from coordconv.reference import Reference
from coordconv.weights import split_kernel

# The roundings of one coordinate, relative to its magnitude (see Reference). Where the grid is
# NumPy's there is one. A ramp that a graph computes in the layer's own type has four: the quotient
# of two exact integers, the product with half the span (a constant that is itself rounded), and the
# sum with the middle. A radius has four more at most: subtracting the centre, a square and two
# additions of squares, which the square root halves, and the square root.
COORDINATE_ROUNDINGS = 8


@dataclass(frozen=True)
class Precision:
    """A floating-point type, and how frameworks sum in it.

    Sums are accumulated in float32 at least. In 16 bits, each finished sum is rounded once more, to
    the type itself, and so is the result of every later addition to that sum.

    Args:
        dtype: the type's name.
        unit: the unit roundoff that sums are accumulated with.
        rounding: the unit roundoff of the type, if that is coarser, else 0.
        tiny: the largest error of a rounding to the type where the type underflows.
        storage: the NumPy type that holds its values; NumPy itself has no bfloat16.
    """

    dtype: str
    unit: float
    rounding: float
    tiny: float
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
        """A bound on the error of a sum.

        Args:
            size: the sum of the absolute values of the terms.
            terms: the number of roundings that a term passes through at most: those before it is
                added, and one for each addition.
            roundings: the number of times that the sum, or a part of it, is rounded to 16 bits.

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
        Precision("float32", 2.0**-24, 0, 0),
        Precision("float64", 2.0**-53, 0, 0, np.float64),
        Precision("bfloat16", 2.0**-24, 2.0**-8, 2.0**-134),
        Precision("float16", 2.0**-24, 2.0**-11, 2.0**-25),
    )
}


@dataclass(frozen=True)
class Expected:
    """A value in float64, and a bound on the error of computing it in any order of summation."""

    value: Array
    bound: Array

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
        return found.shape == self.value.shape and bool(np.array_equal(found, self.value))


def expected(
    network: Network,
    weights: Mapping[str, Array],
    x: Array,
    dy: Array | None,
    precision: Precision = PRECISIONS["float32"],
) -> dict[str, Expected]:
    """What a network computes, and how far arithmetic of a precision may be from it.

    Args:
        network: what is run.
        weights: its canonical weights.
        x: the input, shape ``(N, C, *S)``.
        dy: the gradient of the output, or None for no gradients.
        precision: of the arithmetic.

    Returns:
        The output ``"y"`` and, if there is a ``dy``, the gradients of ``"x"`` and of every weight.

    **How the error of one layer is bounded.** :meth:`Precision.error` needs the number of roundings
    that a term of a sum passes through. With ``c`` features and ``n`` coordinates to a group,
    ``taps`` to a kernel and ``COORDINATE_ROUNDINGS`` to a coordinate, an output element sums
    ``fan_in = (c + n) * taps`` products:

    - appended: one rounding for the product, at most ``fan_in - 1`` for additions, one for the
      bias: ``fan_in + 1``;
    - with a map: a feature's term passes one for the product, ``c * taps - 1`` for additions, one
      for the bias and one for adding the map, a coordinate's term ``n * taps`` and the same two:
      at most ``fan_in + 1``, since both ``c`` and ``n`` are at least 1;
    - either way, a coordinate's term passes the roundings of the coordinate itself.

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
    steps = []
    value, error = x.astype(np.float64), np.zeros(x.shape)
    for layer in network.layers:
        steps.append((value, error))
        value, error = _forward(layer, weights, value, error, precision)
    found = {"y": Expected(value, error)}
    if dy is None:
        return found
    grad, grad_error = dy.astype(np.float64), np.zeros(dy.shape)
    for layer, (value, error) in reversed(list(zip(network.layers, steps, strict=True))):
        gradients, (grad, grad_error) = _backward(
            layer, weights, value, error, grad, grad_error, precision
        )
        found |= {f"{layer.name}.{name}": gradient for name, gradient in gradients.items()}
    return found | {"x": Expected(grad, grad_error)}


def simulated(
    network: Network,
    weights: Mapping[str, Array],
    x: Array,
    loss: Callable[[Array], tuple[float, Expected]],
    rng: np.random.Generator | None = None,
    precision: Precision = PRECISIONS["float32"],
) -> tuple[float, dict[str, Expected]]:
    """One outcome that arithmetic of a precision may have, where :func:`expected` bounds them all.

    Through many layers the sum of the worst of each is far from anything that happens. Here every
    sum is off by as much as its own rounding allows, upwards or downwards at random, and the next
    layer takes that sum as it is: errors cancel as they do in a framework, and a ReLU's sign
    changes where it would.

    Args:
        network: what is run.
        weights: its weights, taken to be exact.
        x: the input.
        loss: for an output, the loss and its gradient, with a bound on that gradient's error.
        rng: what the signs of the errors are sampled with; None for no errors at all.
        precision: of the arithmetic.

    Returns:
        The loss, and the gradient of each weight. The bound of such a gradient is that of its own
        last sum alone, which is not in the value yet.

    Example:
        >>> from coordconv.networks import get, initial_weights
        >>> network = get("plain_cnn")
        >>> square = lambda y: (float((y**2).sum()), Expected(2 * y, np.zeros_like(y)))
        >>> x = np.ones((1, 3, 32, 32))
        >>> _, gradients = simulated(network, initial_weights(network), x, square)
        >>> gradients.keys() == network.weight_shapes().keys()
        True
    """

    def perturbed(value: Array, bound: Array) -> Array:
        if rng is None or not bound.any():
            return value
        return value + np.where(rng.random(value.shape) < 0.5, -bound, bound)

    inputs = []
    value = x.astype(np.float64)
    for layer in network.layers:
        inputs.append(value)
        value = perturbed(*_forward(layer, weights, value, np.zeros(value.shape), precision))
    found_loss, loss_gradient = loss(value)
    grad = perturbed(loss_gradient.value, loss_gradient.bound)
    found: dict[str, Expected] = {}
    for layer, value in reversed(list(zip(network.layers, inputs, strict=True))):
        gradients, input_gradient = _backward(
            layer, weights, value, np.zeros(value.shape), grad, np.zeros(grad.shape), precision
        )
        found |= {f"{layer.name}.{name}": gradient for name, gradient in gradients.items()}
        grad = perturbed(*input_gradient)
    return found_loss, found


def _forward(
    layer: Layer, weights: Mapping[str, Array], x: Array, x_error: Array, precision: Precision
) -> tuple[Array, Array]:
    """The layer's output and a bound on its error, for an input and a bound on the input's."""
    if isinstance(layer, ReLU):
        return np.maximum(x, 0), x_error
    if isinstance(layer, Flatten):
        return x.reshape(len(x), -1), x_error.reshape(len(x_error), -1)
    weight, bias = weights[f"{layer.name}.weight"], weights.get(f"{layer.name}.bias")
    if isinstance(layer, Linear):
        offset = np.zeros(layer.out_features) if bias is None else bias.astype(np.float64)
        w = weight.T.astype(np.float64)
        size = (np.abs(x) + x_error) @ np.abs(w) + np.abs(offset)
        error = precision.error(size, layer.in_features + 1, 2)
        return x @ w + offset, error + x_error @ np.abs(w)
    reference = Reference(layer.geometry, layer.coords)
    y = reference.forward(x, weight, bias)
    size = reference.forward(np.abs(x) + x_error, weight, bias, magnitudes=True)
    terms = layer.fan_in + 1 + (COORDINATE_ROUNDINGS if layer.coords else 0)
    roundings = 4 + (layer.geometry.taps - 1 if layer.geometry.transposed else 0)
    error = precision.error(size, terms, roundings)
    if x_error.any():
        features = _features(layer, weight)
        error = error + Reference(layer.geometry).forward(x_error, features, magnitudes=True)
    return y, error


def _features(layer: Conv, weight: Array) -> Array:
    """The part of a kernel that reads the layer's input."""
    if layer.coords is None:
        return weight
    g = layer.geometry
    features, _ = split_kernel(weight, layer.coords, g.groups, g.transposed)
    return features


def _backward(
    layer: Layer,
    weights: Mapping[str, Array],
    x: Array,
    x_error: Array,
    dy: Array,
    dy_error: Array,
    precision: Precision,
) -> tuple[dict[str, Expected], tuple[Array, Array]]:
    """The gradients of the layer's weights; that of its input, and a bound on its error."""
    if isinstance(layer, ReLU):
        unknown, positive = (np.abs(x) <= x_error) & (x_error > 0), x > 0
        error = np.where(unknown, np.abs(dy) + dy_error, dy_error * positive)
        return {}, (dy * positive, error)
    if isinstance(layer, Flatten):
        return {}, (dy.reshape(x.shape), dy_error.reshape(x.shape))
    weight, bias = weights[f"{layer.name}.weight"], weights.get(f"{layer.name}.bias")
    # The largest that input and gradient may be, which every bound of a product starts from.
    most_x, most_dy = np.abs(x) + x_error, np.abs(dy) + dy_error
    if isinstance(layer, Linear):
        w = weight.astype(np.float64)
        dx, dx_size, dx_passed_on = dy @ w, most_dy @ np.abs(w), dy_error @ np.abs(w)
        dx_terms, dx_roundings = layer.out_features, 1
        weight_terms = bias_terms = len(x)
        values = {"weight": dy.T @ x, "bias": dy.sum(axis=0)}
        sizes = {"weight": most_dy.T @ most_x, "bias": most_dy.sum(axis=0)}
        exact_sizes = {"weight": np.abs(dy).T @ np.abs(x), "bias": np.abs(dy).sum(axis=0)}
    else:
        reference = Reference(layer.geometry, layer.coords)
        shape = x.shape[2:]
        dx = reference.input_gradient(dy, weight, shape)
        dx_size = reference.input_gradient(most_dy, weight, shape, magnitudes=True)
        dx_passed_on = np.zeros_like(dx)
        if dy_error.any():
            dx_passed_on = reference.input_gradient(dy_error, weight, shape, magnitudes=True)
        out_per_group = layer.out_channels // layer.geometry.groups
        dx_terms = _most_reads(layer.geometry, shape) * out_per_group
        dx_roundings = layer.geometry.taps * _most_copies(layer.geometry, shape)
        bias_terms = len(x) * math.prod(dy.shape[2:])
        weight_terms = bias_terms + (COORDINATE_ROUNDINGS if layer.coords else 0)
        values = reference.weight_gradients(x, dy)
        sizes = exact_sizes = reference.weight_gradients(most_x, most_dy, magnitudes=True)
        if x_error.any() or dy_error.any():
            exact_sizes = reference.weight_gradients(x, dy, magnitudes=True)
    own_errors = {
        "weight": precision.error(sizes["weight"], weight_terms, len(x)),
        "bias": precision.error(sizes["bias"], bias_terms, bias_terms),
    }
    gradients = {
        name: Expected(values[name], error + (sizes[name] - exact_sizes[name]))
        for name, error in own_errors.items()
        if name == "weight" or bias is not None
    }
    return gradients, (dx, precision.error(dx_size, dx_terms, dx_roundings) + dx_passed_on)


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
    ones = (1,) * geometry.rank
    padding = ConvGeometry(ones, padding=geometry.pads(shape), padding_mode=geometry.padding_mode)
    dy = np.ones((1, 1, *padding.output_shape(shape)))
    return int(Reference(padding).input_gradient(dy, np.ones((1, 1, *ones)), shape).max())
