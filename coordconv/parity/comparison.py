"""What a network must compute, and by how much arithmetic of a precision may miss it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from coordconv.geometry import ConvGeometry
from coordconv.grid import Array
from coordconv.networks import Conv, Flatten, Linear, Network, ReLU
from coordconv.reference import Reference


@dataclass(frozen=True)
class Precision:
    """A floating-point type, and how frameworks sum in it.

    Sums are accumulated in float32 at least. In 16 bits, what comes of it is rounded once more to
    the type itself, and so is every later addition to it.

    Args:
        dtype: the type's name.
        unit: the unit roundoff that sums are accumulated with.
        rounding: the unit roundoff of the type, if that is coarser, else 0.
        tiny: what a rounding to the type is off by at most where it underflows.
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
            size: the sum of its terms' absolute values.
            terms: the number of its terms, with what is rounded before they are summed.
            roundings: the number of times that it, or a part of it, is rounded to 16 bits.

        Source:
            Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd edition, lemma 3.1; for
            16 bits, where that lemma allows few terms, Jeannerod and Rump, *Improved error bounds
            for inner products in floating-point arithmetic*, 2013.
        """
        relative = terms * self.unit / (1 - terms * self.unit)
        if self.dtype == "float64":
            return 2 * relative * size  # the reference is off by as much
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
    """A value in float64, and a bound on what arithmetic in any order may be off by."""

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
        """Whether ``found`` is the value to the last bit (a zero's sign aside)."""
        return found.shape == self.value.shape and bool(np.array_equal(found, self.value))


def expected(
    network: Network,
    weights: Mapping[str, Array],
    x: Array,
    dy: Array | None,
    precision: Precision = PRECISIONS["float32"],
) -> dict[str, Expected]:
    """The output ``"y"`` and, for its gradient ``dy``, those of ``"x"`` and of every weight.

    Each sum's error is bounded as :meth:`Precision.error` says; what a layer's input is off by
    already goes through the layer's absolute weights, and a ReLU's gradient counts as unknown
    where the error may have changed the sign.

    The number of terms covers the position bias, too: an output passes ``C / groups * taps``
    roundings in the convolution and one more for the bias and the map each; an element of the map
    passes one for a step's coordinate, one for its product, and one per addition, fewer than
    ``n * taps``; and then for each axis one for the middle tap's coordinate, one for the product
    with it, and one to add the steps. The coordinate kernel's gradient passes the same backwards,
    with an addition for each position along each axis, and then one for each product of functions
    that a tap has a share in, of fewer than ``2 * k`` for each axis.

    To 16 bits, an output is rounded four times: the convolution, the bias added to it, the map,
    and the sum of both. Where a convolution is a matrix product for each tap, a transposed one's
    output and the input's gradient are rounded for each tap, and that for each place to which
    padding copies an input. Kernels' gradients are rounded for each sample of the batch; the
    bias's, a plain sum, for each term.
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
    layer takes it as it is: so errors cancel as they do, and a ReLU's sign changes where it does.

    Args:
        network: what is run.
        weights: its weights, in float64 as they are.
        x: the input.
        loss: for an output, the loss and its gradient, with what that may be off by.
        rng: what the signs are drawn with; None for no error at all.
        precision: of the arithmetic.

    Returns:
        The loss, and the gradient of each weight, with a bound of its own last sum alone: that
        is not in the value yet.

    Example:
        >>> from coordconv.networks import get, initial_weights
        >>> network = get("plain_cnn")
        >>> square = lambda y: (float((y**2).sum()), Expected(2 * y, np.zeros_like(y)))
        >>> x = np.ones((1, 3, 32, 32))
        >>> _, gradients = simulated(network, initial_weights(network), x, square)
        >>> gradients.keys() == network.weight_shapes().keys()
        True
    """

    def drawn(value: Array, bound: Array) -> Array:
        if rng is None or not bound.any():
            return value
        return value + np.where(rng.random(value.shape) < 0.5, -bound, bound)

    inputs = []
    value = x.astype(np.float64)
    for layer in network.layers:
        inputs.append(value)
        value = drawn(*_forward(layer, weights, value, np.zeros(value.shape), precision))
    lost, wanted = loss(value)
    grad = drawn(wanted.value, wanted.bound)
    found: dict[str, Expected] = {}
    for layer, value in reversed(list(zip(network.layers, inputs, strict=True))):
        gradients, passed = _backward(
            layer, weights, value, np.zeros(value.shape), grad, np.zeros(grad.shape), precision
        )
        found |= {f"{layer.name}.{name}": gradient for name, gradient in gradients.items()}
        grad = drawn(*passed)
    return lost, found


def _weights(
    layer: Conv | Linear, weights: Mapping[str, Array]
) -> tuple[Array, Array | None, Array | None]:
    def get(name: str) -> Array | None:
        return weights.get(f"{layer.name}.{name}")

    return weights[f"{layer.name}.weight"], get("coord_weight"), get("bias")


def _forward(
    layer: Conv | Linear | ReLU | Flatten,
    weights: Mapping[str, Array],
    x: Array,
    e: Array,
    precision: Precision,
) -> tuple[Array, Array]:
    if isinstance(layer, ReLU):
        return np.maximum(x, 0), e
    if isinstance(layer, Flatten):
        return x.reshape(len(x), -1), e.reshape(len(e), -1)
    weight, coord_weight, bias = _weights(layer, weights)
    if isinstance(layer, Linear):
        offset = np.zeros(layer.out_features) if bias is None else bias.astype(np.float64)
        w = weight.T.astype(np.float64)
        size = (np.abs(x) + e) @ np.abs(w) + np.abs(offset)
        return x @ w + offset, precision.error(size, layer.in_features + 1, 2) + e @ np.abs(w)
    reference = Reference(layer.geometry, layer.coords)
    size = reference.forward(np.abs(x) + e, weight, coord_weight, bias, magnitudes=True)
    passed_on = Reference(layer.geometry).forward(e, weight, magnitudes=True) if e.any() else 0
    y = reference.forward(x, weight, coord_weight, bias)
    roundings = 4 + (layer.geometry.taps - 1 if layer.geometry.transposed else 0)
    terms = layer.fan_in + (3 * layer.geometry.rank + 2 if layer.coords else 1)
    return y, precision.error(size, terms, roundings) + passed_on


def _backward(
    layer: Conv | Linear | ReLU | Flatten,
    weights: Mapping[str, Array],
    x: Array,
    e: Array,
    dy: Array,
    f: Array,
    precision: Precision,
) -> tuple[dict[str, Expected], tuple[Array, Array]]:
    """The gradients of the layer's weights, and of its input with its error."""
    if isinstance(layer, ReLU):
        unknown, positive = (np.abs(x) <= e) & (e > 0), x > 0
        return {}, (dy * positive, np.where(unknown, np.abs(dy) + f, f * positive))
    if isinstance(layer, Flatten):
        return {}, (dy.reshape(x.shape), f.reshape(x.shape))
    weight, _, bias = _weights(layer, weights)
    larger_x, larger_dy = np.abs(x) + e, np.abs(dy) + f
    if isinstance(layer, Linear):
        w = weight.astype(np.float64)
        terms_x, roundings_x, terms_w, of_map = layer.out_features, 1, len(x), 0
        dx, dx_size, dx_passed = dy @ w, larger_dy @ np.abs(w), f @ np.abs(w)
        values = {"weight": dy.T @ x, "bias": dy.sum(axis=0)}
        exact = {"weight": np.abs(dy).T @ np.abs(x), "bias": np.abs(dy).sum(axis=0)}
        sizes = {"weight": larger_dy.T @ larger_x, "bias": larger_dy.sum(axis=0)}
    else:
        reference = Reference(layer.geometry, layer.coords)
        shape = x.shape[2:]
        # Not taps times outputs: padding that copies has one sample read several times.
        ones = np.ones_like(dy[:1]), np.ones_like(weight)
        terms_x = int(reference.input_gradient(*ones, shape).max())
        roundings_x = layer.geometry.taps * _copies(layer.geometry, shape)
        terms_w = len(x) * math.prod(dy.shape[2:])
        of_map = sum(n + 2 for n in dy.shape[2:]) + math.prod(2 * k for k in layer.geometry.kernel)
        dx = reference.input_gradient(dy, weight, shape)
        dx_size = reference.input_gradient(larger_dy, weight, shape, magnitudes=True)
        dx_passed = np.zeros_like(dx)
        if f.any():
            dx_passed = reference.input_gradient(f, weight, shape, magnitudes=True)
        values = reference.weight_gradients(x, dy)
        sizes = reference.weight_gradients(larger_x, larger_dy, magnitudes=True)
        exact = sizes
        if e.any() or f.any():
            exact = reference.weight_gradients(x, dy, magnitudes=True)
    gradients = {
        name: Expected(
            value,
            precision.error(
                sizes[name],
                terms_w + (of_map + 2 if name == "coord_weight" else 0),
                terms_w if name == "bias" else len(x),
            )
            + (sizes[name] - exact[name]),
        )
        for name, value in values.items()
        if name != "bias" or bias is not None
    }
    return gradients, (dx, precision.error(dx_size, terms_x, roundings_x) + dx_passed)


def _copies(geometry: ConvGeometry, shape: tuple[int, ...]) -> int:
    """To how many places padding copies a sample at most, its own included."""
    if geometry.padding_mode == "zeros":
        return 1
    ones = (1,) * geometry.rank
    padding = ConvGeometry(ones, padding=geometry.pads(shape), padding_mode=geometry.padding_mode)
    dy = np.ones((1, 1, *padding.output_shape(shape)))
    return int(Reference(padding).input_gradient(dy, np.ones((1, 1, *ones)), shape).max())
