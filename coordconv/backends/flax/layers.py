"""CoordConv for Flax NNX: subclasses of ``flax.nnx``'s own convolutions.

Their base classes compute with the kernel that they find on a layer. A layer has them find the
whole kernel and an input with coordinates, or the features' part of the kernel and the input alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp

from coordconv.backends.jax import adding, options
from coordconv.backends.jax.arrays import to_flax, to_numpy, to_torch
from coordconv.backends.jax.layers import Replaced, kernel_init, masked
from coordconv.coordinates import Coordinates, CoordinatesLike
from coordconv.grid import Array
from coordconv.layers import CoordLayer
from coordconv.weights.kernels import KernelLayout


class _CoordLayer(CoordLayer):
    """What both layers share; :class:`coordconv.layers.CoordLayer` has the arguments."""

    CHANNELS = CHANNELS_ATTRIBUTE = "in_features"
    GROUPS = "feature_group_count"

    # What the base class has.
    in_features: int
    kernel: Any
    bias: Any
    mask: Any
    dtype: Any
    promote_dtype: Any

    def _rank(self, arguments: Mapping[str, Any]) -> int:
        size = arguments["kernel_size"]
        return 1 if isinstance(size, int) else len(size)

    def _prepare(self, arguments: dict[str, Any]) -> None:
        axis = -1 if arguments.get("transpose_kernel") else -2
        arguments["kernel_init"] = kernel_init(
            arguments["kernel_init"], self.coord_init, len(self.coords), axis
        )

    @property
    def layout(self) -> KernelLayout:
        """Where features and coordinates lie in the canonical kernel."""
        transposed = options.is_transposed(self)
        return KernelLayout(self.coords, self.in_features, options.groups(self), transposed)

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The convolution of ``inputs (..., *S, C)`` and their coordinates."""
        adding.check(self, inputs, self.in_features)
        kernel = masked(self.kernel[...], self.mask)
        bias = None if self.bias is None else self.bias[...]
        arrays = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        own_call: Any = super().__call__  # type: ignore[misc]  # the base class comes next
        base = own_call.__func__  # to be called on another object

        def convolve(inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
            seen = Replaced(
                self,
                kernel=kernel,
                bias=bias,
                mask=None,
                promote_dtype=lambda arrays, dtype: arrays,  # they are promoted already
            )
            return base(seen, inputs, *args, **kwargs)

        return adding.coord_conv(self, arrays, convolve)

    def _canonical(self) -> dict[str, Array]:
        found = {"weight": self.kernel, "bias": self.bias}
        reverse = options.is_reversed(self)
        return {
            name: to_torch(to_numpy(param[...]), reverse=reverse)
            for name, param in found.items()
            if param is not None
        }

    def _assign(self, arrays: Mapping[str, Array]) -> None:
        params = {"weight": self.kernel, "bias": self.bias}
        for name, array in arrays.items():
            values = to_flax(array, reverse=options.is_reversed(self))
            # In place, which keeps metadata and sharding; a copy, as asarray may share memory.
            params[name][...] = jnp.array(values, params[name].dtype)


class CoordConv(_CoordLayer, nnx.Conv):
    """``flax.nnx.Conv`` that sees its coordinates, on one to three axes.

    Takes every argument of ``flax.nnx.Conv``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see :class:`coordconv.layers.CoordLayer`. A ``mask`` has the shape of
    the kernel over features and coordinates. A ``conv_general_dilated`` of one's own is given both.

    Shape:
        inputs ``(..., *S, C)``, any number of batch axes; output as ``flax.nnx.Conv``.

    Raises:
        ValueError: besides, a ``kernel_init`` that returns another shape than it is asked for.

    Example:
        >>> layer = CoordConv(3, 8, (3, 3), coords="xyr", rngs=nnx.Rngs(0))
        >>> layer(jnp.zeros((2, 16, 16, 3))).shape
        (2, 16, 16, 8)
        >>> layer.kernel.shape  # over 3 features and 3 coordinates
        (3, 3, 6, 8)

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """


class CoordConvTranspose(_CoordLayer, nnx.ConvTranspose):
    """``flax.nnx.ConvTranspose`` that sees its coordinates, those of its input.

    Takes every argument of ``flax.nnx.ConvTranspose``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; as :class:`CoordConv`.

    Shape:
        inputs ``(..., *S, C)``, any number of batch axes; output as ``flax.nnx.ConvTranspose``.

    Example:
        >>> layer = CoordConvTranspose(3, 8, (2, 2), strides=(2, 2), rngs=nnx.Rngs(0))
        >>> layer(jnp.zeros((2, 16, 16, 3))).shape
        (2, 32, 32, 8)

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """


class AddCoords(nnx.Module):
    """Append the coordinate channels to an input, for layers that have no CoordConv.

    Args:
        coords: tokens, a :class:`~coordconv.Coordinates`, or None for all axes.
        rank: the number of spatial axes, 1 to 3. Keyword only.

    Shape:
        inputs ``(..., *S, C)``, any number of batch axes; output with ``n`` channels more.

    Raises:
        TypeError: the inputs are not floating-point.
        ValueError: ``coords`` that do not fit the rank; inputs with fewer axes, or an empty one.

    Example:
        >>> AddCoords("x", rank=1)(jnp.zeros((1, 3, 1)))[0, :, 1]
        Array([-1.,  0.,  1.], dtype=float32)
    """

    def __init__(self, coords: CoordinatesLike = None, *, rank: int = 2) -> None:
        self.coords = Coordinates.resolve(coords, rank)
        self.rank = rank

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The inputs with the coordinates behind their channels."""
        return adding.add_coords(inputs, self.coords, self.rank)
