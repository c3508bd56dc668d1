"""A kernel of Flax given channels for coordinates, and without them: what NNX and Linen share.

The coordinates are the last of a group's input channels, whose axis is counted from the end: so a
kernel may have further axes in front, as those of a scan or a vmap have.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.nn import initializers


def resized(kernel: Any, axis: int, n: int, filled: Any = 0) -> Any:
    """A kernel, or what has its shape, with ``n`` more channels, or fewer, at the end of an axis.

    Its type and sharding stay; one that is abstract stays so. ValueError if it is spread over
    devices that cannot divide the channels.
    """
    shape = list(kernel.shape)
    shape[axis] += n
    abstract = jax.ShapeDtypeStruct(tuple(shape), kernel.dtype, sharding=kernel.sharding)
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return abstract
    if _spread(kernel) is not None:
        kernel.sharding.shard_shape(abstract.shape)  # which may raise
    widths = [(0, 0, 0)] * kernel.ndim
    widths[axis] = (0, n, 0)  # a negative number cuts off
    return _like(jax.lax.pad(kernel, jnp.asarray(filled, kernel.dtype), widths), kernel)


def drawn(kernel: Any, axis: int, n: int, key: jax.Array) -> Any:
    """A kernel with ``n`` channels more, these as Flax draws a new one by default."""
    more = resized(kernel, axis, n)
    new = initializers.lecun_normal()(key, more.shape, more.dtype)
    kept = np.arange(more.shape[axis]) < kernel.shape[axis]
    return _like(jnp.where(kept.reshape(-1, *(1,) * (-1 - axis)), more, new), kernel)


def fitted(values: Any, axis: int, width: int) -> Any:
    """What has the shape of a kernel of before, such as momenta, with ``width`` channels.

    More channels are zero, or of what is one number throughout, that number.
    """
    filled: Any = 0
    if not isinstance(values, jax.ShapeDtypeStruct):
        first = values.reshape(-1)[0]
        filled = jnp.where((values == first).all(), first, 0)
    return resized(values, axis, width - values.shape[axis], filled)


def _like(values: Any, kernel: Any) -> Any:
    """Values as a kernel is spread over several devices."""
    return values if _spread(kernel) is None else jax.device_put(values, kernel.sharding)


def _spread(kernel: Any) -> Any:
    """The sharding of an array that several devices hold."""
    sharding = None if isinstance(kernel, jax.core.Tracer) else getattr(kernel, "sharding", None)
    return None if sharding is None or len(sharding.device_set) == 1 else sharding
