"""Networks of NNX and of Linen: what they are made of, their evaluation and training.

A network of either has ``network``, its description, ``dtype``, and ``run(params, x)``, the output
for ``x (N, *S, C)`` where ``params`` has the arrays by layer and by Flax's names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import jax
import optax
from jax import numpy as jnp

from coordconv import networks
from coordconv.backends.jax import options
from coordconv.backends.jax.arrays import channels_first, channels_last
from coordconv.backends.jax.files import from_params, to_params
from coordconv.grid import Array
from coordconv.weights.canonical import Weights, checked, layouts

COMPILED = True


def described(
    network: networks.Network, flax: Any, ours: Any, dtype: str
) -> Iterator[tuple[str, Any, tuple[int, int], dict[str, Any]]]:
    """Of each layer with weights the name, its class, its channels in and out, further arguments.

    ``flax`` is ``flax.nnx`` or ``flax.linen``, and ``ours`` has that one's CoordConv.
    """
    for layer in network.layers:
        if isinstance(layer, networks.Linear):
            kind = flax.Linear if hasattr(flax, "Linear") else flax.Dense
            channels, found = (layer.in_features, layer.out_features), {}
        elif isinstance(layer, networks.Conv):
            name = "ConvTranspose" if layer.geometry.transposed else "Conv"
            kind = getattr(ours, f"Coord{name}") if layer.coords else getattr(flax, name)
            channels = layer.in_channels, layer.out_channels
            found = options.arguments(layer.geometry) | {"use_bias": layer.bias}
            found |= {"coords": layer.coords} if layer.coords else {}
        else:
            continue
        yield layer.name, kind, channels, found | {"dtype": dtype, "param_dtype": dtype}


def imported(network: networks.Network, mapping: Mapping[str, Array], dtype: str) -> dict[str, Any]:
    """The parameters of a network for canonical weights, or one error with all problems."""
    arrays = checked(mapping, network.weight_shapes(), layouts(network))
    return jax.tree.map(lambda array: jnp.array(array, dtype), to_params(network, arrays))


def exported(network: networks.Network, params: Mapping[str, Any]) -> Weights:
    """The canonical weights in the parameters of a network, under dotted names."""
    return Weights.of(network, from_params(network, params))


def output(module: Any, x: jax.Array) -> jax.Array:
    """The output for ``x (N, *S, C)`` of a module that has its layers under their names."""
    for layer in module.network.layers:
        match layer:
            case networks.ReLU():
                x = jax.nn.relu(x)
            case networks.Flatten():
                x = jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)  # len takes no symbol
            case networks.MeanPool():
                x = x.mean(axis=tuple(range(1, x.ndim - 1)))
            case _:
                x = getattr(module, layer.name)(x)
    return x


def precision(dtype: str) -> AbstractContextManager[Any]:
    """Within it, JAX has the type ``dtype``: without leave it takes float64 for float32."""
    if dtype != "float64":
        return nullcontext()
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax import experimental  # JAX before 0.8

    return experimental.enable_x64()  # type: ignore[attr-defined]


def evaluate(
    module: Any,
    weights: Mapping[str, Array],
    x: Array,
    dy: Array | None = None,
    *,
    compiled: bool = COMPILED,
) -> tuple[Array, dict[str, Array]]:
    """Output and gradients; see :class:`coordconv.backends.protocols.Backend`."""
    forward, backward = _functions(module, compiled)
    # Comparisons are of float32: accelerators take shorter products unless told otherwise.
    with precision(module.dtype), jax.default_matmul_precision("highest"):
        params = imported(module.network, weights, module.dtype)
        given = channels_last(x, module.dtype)
        if dy is None:
            return channels_first(forward(params, given)), {}
        y, (of_params, of_x) = backward(params, given, channels_last(dy, module.dtype))
        gradients = from_params(module.network, of_params)
        return channels_first(y), {"x": channels_first(of_x), **gradients}


@lru_cache(maxsize=8)  # so that few networks, and what was compiled of them, outlive their use
def _functions(module: Any, compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The output for parameters and an input, and with a gradient of the output all gradients."""

    def backward(params: Any, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, Any]:
        y, pull_back = jax.vjp(module.run, params, x)
        return y, pull_back(dy)

    return (jax.jit(module.run), jax.jit(backward)) if compiled else (module.run, backward)


def trainer(
    module: Any, weights: Mapping[str, Array], optimizer: str = "adam", epsilon: float = 1e-8
) -> tuple[Callable[[Array, Array, float], float], Callable[[], Weights]]:
    """A training step, and the weights that it leaves; see ``Backend``, as above."""
    rules = {"adam": optax.scale_by_adam(eps=epsilon), "sgd": optax.identity()}
    if optimizer not in rules:
        raise ValueError(f"optimizer must be one of {[*rules]}, got {optimizer!r}")
    rule = rules[optimizer]
    params = imported(module.network, weights, module.dtype)
    state = rule.init(params)

    def loss(params: Any, x: jax.Array, target: jax.Array) -> jax.Array:
        y = module.run(params, x)
        if jnp.issubdtype(target.dtype, jnp.floating):
            return optax.squared_error(y, target).mean()
        return optax.softmax_cross_entropy_with_integer_labels(y, target).mean()

    @jax.jit
    def update(params: Any, state: Any, rate: jax.Array, *batch: jax.Array) -> tuple[Any, ...]:
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        updates, state = rule.update(gradients, state)
        return value, jax.tree.map(lambda p, u: p - rate * u, params, updates), state

    def step(x: Array, target: Array, learning_rate: float) -> float:
        nonlocal params, state
        batch = channels_last(x, "float32"), jnp.asarray(target)
        with jax.default_matmul_precision("highest"):
            value, params, state = update(params, state, jnp.float32(learning_rate), *batch)
        return float(value)

    return step, lambda: exported(module.network, params)
