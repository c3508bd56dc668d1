"""What a network must compute, and by how much float32 may miss it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from coordconv.grid import Array
from coordconv.networks import Conv, Flatten, Linear, Network, ReLU
from coordconv.reference import Reference

UNIT_ROUNDOFF = 2.0**-24  # of float32


@dataclass(frozen=True)
class Expected:
    """A value in float64, and a bound on what float32 arithmetic in any order may be off by."""

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


def gamma(terms: int) -> float:
    """The relative error of a sum of products with ``terms`` roundings on the way of each.

    Source:
        Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd edition, lemma 3.1.
    """
    return terms * UNIT_ROUNDOFF / (1 - terms * UNIT_ROUNDOFF)


def expected(
    network: Network, weights: Mapping[str, Array], x: Array, dy: Array
) -> dict[str, Expected]:
    """The output ``"y"`` and the gradients, by name: of ``"x"`` and of every weight.

    Each sum's error is bounded by gamma of its number of terms times the sum of its absolute
    terms; what a layer's input is off by already goes through the layer's absolute weights, and
    a ReLU's gradient counts as unknown where the error may have changed the sign.

    The number of terms covers the position bias, too: an output passes ``C / groups * taps``
    roundings in the convolution and one more for the bias and the map each; an element of the map
    passes one for the coordinate, one for its product (the other factors of it are 0 or 1), and
    one per addition, fewer than ``n * taps``.
    """
    steps = []
    value, error = x.astype(np.float64), np.zeros(x.shape)
    for layer in network.layers:
        steps.append((value, error))
        value, error = _forward(layer, weights, value, error)
    found = {"y": Expected(value, error)}
    grad, grad_error = dy.astype(np.float64), np.zeros(dy.shape)
    for layer, (value, error) in reversed(list(zip(network.layers, steps, strict=True))):
        gradients, (grad, grad_error) = _backward(layer, weights, value, error, grad, grad_error)
        found |= {f"{layer.name}.{name}": gradient for name, gradient in gradients.items()}
    return found | {"x": Expected(grad, grad_error)}


def _weights(
    layer: Conv | Linear, weights: Mapping[str, Array]
) -> tuple[Array, Array | None, Array | None]:
    def get(name: str) -> Array | None:
        return weights.get(f"{layer.name}.{name}")

    return weights[f"{layer.name}.weight"], get("coord_weight"), get("bias")


def _forward(
    layer: Conv | Linear | ReLU | Flatten, weights: Mapping[str, Array], x: Array, e: Array
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
        return x @ w + offset, gamma(layer.in_features + 1) * size + e @ np.abs(w)
    reference = Reference(layer.geometry, layer.coords)
    size = reference.forward(np.abs(x) + e, weight, coord_weight, bias, magnitudes=True)
    passed_on = Reference(layer.geometry).forward(e, weight, magnitudes=True)
    y = reference.forward(x, weight, coord_weight, bias)
    return y, gamma(layer.fan_in + 1) * size + passed_on


def _backward(
    layer: Conv | Linear | ReLU | Flatten,
    weights: Mapping[str, Array],
    x: Array,
    e: Array,
    dy: Array,
    f: Array,
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
        terms_x, terms_w = layer.out_features, len(x)
        dx, dx_size, dx_passed = dy @ w, larger_dy @ np.abs(w), f @ np.abs(w)
        values = {"weight": dy.T @ x, "bias": dy.sum(axis=0)}
        exact = {"weight": np.abs(dy).T @ np.abs(x), "bias": np.abs(dy).sum(axis=0)}
        sizes = {"weight": larger_dy.T @ larger_x, "bias": larger_dy.sum(axis=0)}
    else:
        reference = Reference(layer.geometry, layer.coords)
        shape = x.shape[2:]
        # Not taps times outputs: padding that copies has one sample read several times.
        ones = np.ones_like(dy), np.ones_like(weight)
        terms_x = int(reference.input_gradient(*ones, shape).max())
        # two more for the coordinates: their own rounding and the product with them
        terms_w = len(x) * int(np.prod(dy.shape[2:])) + 2
        dx = reference.input_gradient(dy, weight, shape)
        dx_size = reference.input_gradient(larger_dy, weight, shape, magnitudes=True)
        dx_passed = reference.input_gradient(f, weight, shape, magnitudes=True)
        values = reference.weight_gradients(x, dy)
        exact = reference.weight_gradients(x, dy, magnitudes=True)
        sizes = reference.weight_gradients(larger_x, larger_dy, magnitudes=True)
    gradients = {
        name: Expected(value, gamma(terms_w) * sizes[name] + (sizes[name] - exact[name]))
        for name, value in values.items()
        if name != "bias" or bias is not None
    }
    return gradients, (dx, gamma(terms_x) * dx_size + dx_passed)
