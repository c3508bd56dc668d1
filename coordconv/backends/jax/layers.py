"""What the layers of NNX and of Linen share: how they see their base class, and draw a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp


class Replaced:
    """A layer with some attributes replaced, as the ``__call__`` of its base class is to see it.

    So that class computes with one part of the kernel, and the layer itself stays as it is.
    """

    def __init__(self, layer: Any, **replaced: Any) -> None:
        vars(self).update(replaced, _layer=layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def masked(kernel: jax.Array, mask: Any) -> jax.Array:
    """The kernel over features and coordinates, masked.

    Raises:
        ValueError: a mask of another shape.
    """
    if mask is None:
        return kernel
    if mask.shape != kernel.shape:
        raise ValueError(
            "mask must have the shape of the kernel over features and coordinates, "
            f"{kernel.shape}, got {mask.shape}"
        )
    return kernel * mask


def kernel_init(init: Callable[..., Any], coord_init: str, n: int, axis: int) -> Callable[..., Any]:
    """What draws a kernel over features and coordinates, as ``coord_init`` says.

    Args:
        init: what draws a plain convolution's kernel, ``init(key, shape, dtype)``, in a box of
            metadata or not.
        coord_init: ``"fan_in"`` has it draw the whole kernel, ``"zeros"`` the features' part.
        n: the number of coordinate channels, the last of ``axis``.
        axis: the axis of the input channels.

    Raises:
        ValueError: when it draws, if ``init`` returns another shape than it was asked for.
    """

    def draw(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        asked, zeros = list(shape), list(shape)
        zeros[axis] = n if coord_init == "zeros" else 0
        asked[axis] -= zeros[axis]

        def complete(kernel: Any) -> Any:
            if np.shape(kernel) != tuple(asked):
                raise ValueError(
                    "kernel_init must return a kernel of the shape that it is asked for, "
                    f"{tuple(asked)}, got {np.shape(kernel)}"
                )
            if not zeros[axis]:
                return kernel
            return jnp.concatenate([kernel, jnp.zeros(zeros, kernel.dtype)], axis)

        drawn = init(key, tuple(asked), dtype)
        if isinstance(drawn, nnx.VariableMetadata):  # NNX's box, which is no tree as Linen's is
            return replace(drawn, raw_value=complete(drawn.raw_value))
        return jax.tree.map(complete, drawn)

    return draw
