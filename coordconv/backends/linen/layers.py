"""CoordConv for Flax Linen: subclasses of ``flax.linen``'s own convolutions.

Their base classes compute with the kernel that ``self.param`` returns. A layer asks for the whole
kernel itself, and has its base class find that and an input with coordinates, or the features' part
and the input alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import field
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta
from jax import numpy as jnp

from coordconv.backends.jax import adding, options
from coordconv.backends.jax.arrays import to_flax, to_numpy, to_torch
from coordconv.backends.jax.layers import Replaced, kernel_init, masked
from coordconv.coordinates import Coordinates, CoordinatesLike, check_coord_init
from coordconv.grid import Array
from coordconv.weights.canonical import Weights, checked
from coordconv.weights.kernels import KernelLayout

_NAMES = {"weight": "kernel", "bias": "bias"}  # of parameters, canonical and Flax's


class _CoordLayer(nn.Module):
    """What both layers share.

    Args:
        coords: as :class:`coordconv.layers.CoordLayer`. Keyword only.
        coord_init: likewise.
    """

    coords: CoordinatesLike = field(default=None, kw_only=True)
    coord_init: str = field(default="fan_in", kw_only=True)

    def __post_init__(self) -> None:
        coordinates = Coordinates.resolve(self.coords, len(options.kernel_size(self)))
        object.__setattr__(self, "coords", coordinates)  # a Linen module is frozen
        check_coord_init(self.coord_init)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The convolution of ``inputs (..., *S, C)`` and their coordinates."""
        conv: Any = self
        adding.check(self, inputs, self._channels())
        axis, n = options.input_axis(self), len(conv.coords)
        shape = [*options.kernel_size(self), conv.features, conv.features]
        shape[axis] = inputs.shape[-1] // options.groups(self) + n
        init = kernel_init(conv.kernel_init, self.coord_init, n, axis)
        kernel = masked(self.param("kernel", init, tuple(shape), conv.param_dtype), conv.mask)
        bias = None
        if conv.use_bias:
            bias = self.param("bias", conv.bias_init, (conv.features,), conv.param_dtype)
        arrays = conv.promote_dtype(inputs, kernel, bias, dtype=conv.dtype)
        # The base class's function itself: as a method of the module it would be recorded apart by
        # capture_intermediates and interceptors.
        base = inspect.unwrap(super().__call__)  # type: ignore[misc]

        def convolve(inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
            params = {"kernel": kernel, "bias": bias}
            seen = Replaced(
                self,
                param=lambda name, *init: params[name],
                mask=None,
                promote_dtype=lambda *arrays, dtype: arrays,  # they are promoted already
            )
            return base(seen, inputs)

        return adding.coord_conv(self, arrays, convolve)

    @nn.nowrap
    def _channels(self) -> int | None:
        """The features that the kernel is made for, or None before there is one."""
        if not self.has_variable("params", "kernel"):
            return None
        kernel = meta.unbox(self.get_variable("params", "kernel"))
        width = kernel.shape[options.input_axis(self)] - len(self.coords)  # type: ignore[arg-type]
        return width * options.groups(self)

    @nn.nowrap
    def export_weights(self, variables: Mapping[str, Any]) -> Weights:
        """The canonical weights in ``variables``, as ``init`` returns them.

        Returns:
            ``weight`` and, if the layer has one, ``bias``.
        """
        coordinates: Any = self.coords
        params, reverse = meta.unbox(variables["params"]), options.is_reversed(self)
        arrays = {
            name: to_torch(to_numpy(params[own]), reverse=reverse)
            for name, own in _NAMES.items()
            if own in params
        }
        return Weights(arrays, {"": coordinates})

    @nn.nowrap
    def import_weights(self, mapping: Mapping[str, Array]) -> dict[str, Any]:
        """The variables ``{"params": ...}`` for canonical weights, in ``param_dtype``.

        Raises:
            ValueError: arrays are missing, unexpected or wrongly shaped, or were made for other
                coordinates; all are listed. The number of input channels is the weight's own.
        """
        conv: Any = self
        weight: Any = mapping.get("weight") if isinstance(mapping, Mapping) else None
        size, n = options.kernel_size(self), len(conv.coords)
        transposed, groups = options.is_transposed(self), options.groups(self)
        axis = 0 if transposed else 1
        width = np.shape(weight)[axis] if np.ndim(weight) == len(size) + 2 else 0
        width = max(width, n + 1)  # a kernel that is missing or no kernel should have some feature
        shape = (width, conv.features, *size) if transposed else (conv.features, width, *size)
        shapes = {"weight": shape} | ({"bias": (conv.features,)} if conv.use_bias else {})
        layout = KernelLayout(conv.coords, (width - n) * groups, groups, transposed)
        return {
            "params": {
                _NAMES[name]: jnp.array(  # a copy: asarray may share memory with the mapping
                    to_flax(array, reverse=options.is_reversed(self)), conv.param_dtype
                )
                for name, array in checked(mapping, shapes, {"": layout}).items()
            }
        }


class CoordConv(_CoordLayer, nn.Conv):
    """``flax.linen.Conv`` that sees its coordinates, on one to three axes.

    Takes every argument of ``flax.linen.Conv``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see :class:`coordconv.layers.CoordLayer`. A ``mask`` has the shape of
    the kernel over features and coordinates. A ``conv_general_dilated_cls`` of one's own makes a
    function that is given both.

    Shape:
        inputs ``(..., *S, C)``, any number of batch axes; output as ``flax.linen.Conv``.

    Raises:
        ValueError: besides, a ``kernel_init`` that returns another shape than it is asked for.

    Example:
        >>> layer = CoordConv(8, (3, 3), coords="xyr")
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.zeros((2, 16, 16, 3)))
        >>> y.shape
        (2, 16, 16, 8)
        >>> variables["params"]["kernel"].shape  # over 3 features and 3 coordinates
        (3, 3, 6, 8)

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """


class CoordConvTranspose(_CoordLayer, nn.ConvTranspose):
    """``flax.linen.ConvTranspose`` that sees its coordinates, those of its input.

    Takes every argument of ``flax.linen.ConvTranspose``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; as :class:`CoordConv`.

    Shape:
        inputs ``(..., *S, C)``, any number of batch axes; output as ``flax.linen.ConvTranspose``.

    Example:
        >>> layer = CoordConvTranspose(8, (2, 2), strides=(2, 2))
        >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.zeros((2, 16, 16, 3)))
        >>> y.shape
        (2, 32, 32, 8)

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """


class AddCoords(nn.Module):
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
        >>> AddCoords("x", rank=1).apply({}, jnp.zeros((1, 3, 1)))[0, :, 1]
        Array([-1.,  0.,  1.], dtype=float32)
    """

    coords: CoordinatesLike = None
    rank: int = field(default=2, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "coords", Coordinates.resolve(self.coords, self.rank))
        super().__post_init__()

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The inputs with the coordinates behind their channels."""
        coordinates: Any = self.coords
        return adding.add_coords(inputs, coordinates, self.rank)
