"""The variants in JAX, jitted.

The layers are Linen's: ``apply`` is a function of arrays, so what is timed is XLA's program alone.
An NNX layer traces to the same program and adds the handling of its state in Python to each call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from common import (
    CONCAT,
    MAP,
    OURS,
    PLAIN,
    TRAINING,
    Array,
    Call,
    Shape,
    data,
    wall_seconds,
)
from coordconv.backends import jax as adapter
from coordconv.backends.linen import CoordConv


class Concat(nn.Module):
    """The definition; XLA fuses the repetition of the grid with the concatenation."""

    conv: nn.Conv
    grid: jax.Array  # (*size, n)

    def __call__(self, x: jax.Array) -> jax.Array:
        groups = self.conv.feature_group_count
        grouped = x.reshape(*x.shape[:-1], groups, -1)
        grid = jnp.broadcast_to(
            self.grid[..., None, :], (*x.shape[:-1], groups, self.grid.shape[-1])
        )
        z = jnp.concatenate([grouped, grid], -1)
        return self.conv(z.reshape(*x.shape[:-1], -1))


def position_bias(layer: Any, shape: Shape) -> Callable[[Any, jax.Array], jax.Array]:
    """The map alone: the one place that knows how the adapter makes it."""
    geometry = adapter.geometry(layer, shape.size)

    def run(variables: Any, x: jax.Array) -> jax.Array:
        kernel = variables["params"]["coord_kernel"]
        bias = adapter.position_bias(kernel, geometry, layer.coords, shape.size)
        return bias.astype(x.dtype)

    return run


class Jax:
    """See :class:`common.Framework`."""

    def __init__(self, device: str) -> None:
        self.device = jax.devices(device)[0]

    def calls(self, shape: Shape, mode: str) -> dict[str, Call]:
        jax.clear_caches()  # programs of the shapes before, and the memory that they hold
        given, dtype = data(shape), jnp.dtype(shape.dtype)
        options: dict[str, Any] = {
            "kernel_size": (shape.kernel,) * shape.rank,
            "strides": shape.stride,
            "padding": shape.kernel // 2,
            "feature_group_count": shape.groups,
            "dtype": dtype,
            "param_dtype": dtype,
        }
        plain, ours = nn.Conv(shape.out, **options), CoordConv(shape.out, **options)
        grid = jnp.asarray(np.moveaxis(given.grid, 0, -1), dtype)
        concat = Concat(nn.Conv(shape.out, **options), grid)
        functions: dict[str, tuple[Any, Any]] = {
            PLAIN: (plain.apply, _params(given.plain)),
            CONCAT: (concat.apply, {"conv": _params(given.fused)}),
            OURS: (ours.apply, _params(given.ours)),
        }
        if mode == TRAINING and shape.groups > 1 and self.device.platform == "cpu":
            del functions[CONCAT]  # XLA takes minutes for one gradient of such a kernel
        if mode == MAP:
            functions = {
                PLAIN: functions[PLAIN],
                MAP: (position_bias(ours, shape), functions[OURS][1]),
            }
        put: Any = partial(
            jax.tree.map, lambda a: jax.device_put(jnp.asarray(a, dtype), self.device)
        )
        x = put(np.moveaxis(given.x, 1, -1))
        rng, out_shape = np.random.default_rng(1), shape.geometry.output_shape(shape.size)
        dy = put(rng.standard_normal((shape.batch, *out_shape, shape.out), np.float32))
        calls: dict[str, Call] = {}
        for name, (function, params) in functions.items():
            variables = {"params": put(params)}
            if mode == TRAINING:
                call = partial(jax.jit(partial(_step, function)), variables, x, dy)
            else:
                call = partial(jax.jit(function), variables, x)
            # On a CPU calls in flight would run side by side, and not one after another.
            calls[name] = partial(_finished, call) if self.device.platform == "cpu" else call
        return calls

    def seconds(self, call: Call, loops: int) -> float:
        return wall_seconds(call, loops, jax.block_until_ready)  # JAX offers no device events

    def array(self, output: jax.Array, shape: Shape) -> Array:
        return np.moveaxis(np.asarray(output.astype(jnp.float32), np.float64), -1, 1)


def _params(weights: dict[str, Array]) -> dict[str, Array]:
    return adapter.to_params(weights)


def _step(function: Any, variables: Any, x: jax.Array, dy: jax.Array) -> Any:
    """The output and all gradients; were it not returned, XLA would leave the forward pass out."""
    y, pull = jax.vjp(function, variables, x)
    return y, pull(dy)


def _finished(call: Call) -> Any:
    return jax.block_until_ready(call())


def framework(name: str, device: str) -> Jax:
    return Jax(device)
