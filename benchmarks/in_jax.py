"""The variants in JAX, jitted.

The layers are Linen's: ``apply`` is a function of arrays, so what is timed is XLA's program alone.
An NNX layer traces to the same program and adds the handling of its state in Python to each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp

from common import (
    CONCAT,
    FUSED,
    PLAIN,
    TRAINING,
    VARIANTS,
    Array,
    Call,
    Data,
    Shape,
    data,
    forced,
    wall_seconds,
)
from coordconv.backends.linen import CoordConv, fuse
from coordconv.position_bias import APPEND


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


def layer(variant: str, shape: Shape, given: Data) -> nn.Module:
    """A variant."""
    dtype = jnp.dtype(shape.dtype)
    options: dict[str, Any] = {
        "kernel_size": (shape.kernel,) * shape.rank,
        "strides": shape.stride,
        "padding": shape.kernel // 2,
        "feature_group_count": shape.groups,
        "dtype": dtype,
        "param_dtype": dtype,
    }
    if variant == CONCAT:
        grid = jnp.asarray(np.moveaxis(given.grid, 0, -1), dtype)
        return Concat(nn.Conv(shape.out, **options), grid)
    return (nn.Conv if variant == PLAIN else CoordConv)(shape.out, **options)


def params(variant: str, given: Data) -> dict[str, Any]:
    """A variant's weights, in Flax's names and layout; all variants have the same."""
    weights = given.weights(variant)
    kernel = np.moveaxis(weights["weight"], (1, 0), (-2, -1))
    own = {"kernel": kernel, "bias": weights["bias"]}
    return {"conv": own} if variant == CONCAT else own


class Jax:
    """See :class:`common.Framework`."""

    def __init__(self, device: str) -> None:
        self.device = jax.devices(device)[0]

    def calls(self, shape: Shape, mode: str, variants: Sequence[str] = VARIANTS) -> dict[str, Call]:
        jax.clear_caches()  # programs of the shapes before, and the memory that they hold
        given, dtype = data(shape), jnp.dtype(shape.dtype)
        on_cpu = self.device.platform == "cpu"
        if mode == TRAINING and shape.groups > 1 and on_cpu:
            # XLA takes minutes for one gradient of a kernel over features and coordinates.
            variants = [v for v in variants if v not in (CONCAT, APPEND)]
        put: Any = partial(
            jax.tree.map, lambda a: jax.device_put(jnp.asarray(a, dtype), self.device)
        )
        x = put(np.moveaxis(given.x, 1, -1))
        rng, out_shape = np.random.default_rng(1), shape.geometry.output_shape(shape.size)
        dy = put(rng.standard_normal((shape.batch, *out_shape, shape.out), np.float32))
        calls: dict[str, Call] = {}
        for name in variants:
            apply = layer(name, shape, given).apply
            variables = {"params": put(params(name, given))}
            if name == FUSED:
                variables, _ = fuse(layer(name, shape, given), variables, x)
            # A new function for each variant: to JAX, methods of equal layers may be the same one,
            # and what it traced for one way would then be run for the other.
            if mode == TRAINING:
                call = partial(jax.jit(partial(_step, apply)), variables, x, dy)
            else:
                call = partial(jax.jit(partial(apply)), variables, x)
            # On a CPU calls in flight would run side by side, and not one after another.
            calls[name] = forced(name, partial(_finished, call) if on_cpu else call)
        return calls

    def seconds(self, call: Call, loops: int) -> float:
        return wall_seconds(call, loops, jax.block_until_ready)  # JAX offers no device events

    def array(self, output: jax.Array, shape: Shape) -> Array:
        return np.moveaxis(np.asarray(output.astype(jnp.float32), np.float64), -1, 1)


def _step(function: Any, variables: Any, x: jax.Array, dy: jax.Array) -> Any:
    """The output and all gradients; were it not returned, XLA would leave the forward pass out."""
    y, pull = jax.vjp(function, variables, x)
    return y, pull(dy)


def _finished(call: Call) -> Any:
    return jax.block_until_ready(call())


def framework(name: str, device: str) -> Jax:
    return Jax(device)
