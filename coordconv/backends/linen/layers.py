"""CoordConv for Flax Linen: subclasses of ``flax.linen``'s own convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta
from flax.linen.dtypes import promote_dtype
from jax import numpy as jnp

from coordconv.backends.jax import adding, fusing, options
from coordconv.backends.jax.arrays import layer_arrays, layer_params
from coordconv.backends.jax.layers import KernelInit, coord_conv, masked
from coordconv.backends.linen.fusing import MAPS, map_for
from coordconv.coordinates import Coordinates, CoordinatesLike, check_coord_init
from coordconv.grid import Array
from coordconv.layers import FixedCoords, check_arguments
from coordconv.weights.canonical import Weights, checked
from coordconv.weights.kernels import KernelLayout
from coordconv.windows import Window


class _CoordLayer(FixedCoords, nn.Module):
    """What both layers share; :class:`coordconv.layers.CoordLayer` has the arguments."""

    map_only = False  # no argument: a subclass may change it

    coords: Any = field(default=None, kw_only=True)
    coord_init: str = field(default="fan_in", kw_only=True)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        check_arguments(args, kwargs)  # the __init__ of a dataclass is not to be extended
        return super().__new__(cls)

    def __post_init__(self) -> None:
        coordinates = Coordinates.resolve(self.coords, len(options.kernel_size(self)))
        object.__setattr__(self, "coords", coordinates)  # a Linen module is frozen
        check_coord_init(self.coord_init)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: jax.Array, *, window: Window | None = None) -> jax.Array:
        """The convolution of ``inputs (..., *S, C)`` and their coordinates, maybe of a window."""
        axis, groups = options.input_axis(self), options.groups(self)
        maps = self.variables.get(MAPS, {})  # of a fused layer, whose kernel is the features' part
        n = 0 if maps else len(self.coords)
        made: Any = meta.unbox(self.get_variable("params", "kernel"))
        # Before there is a kernel the features are those of the first input.
        channels = None if made is None else (made.shape[axis] - n) * groups
        adding.check(self, self.coords, inputs, channels)
        shape = [*options.kernel_size(self), self.features, self.features]
        shape[axis] = inputs.shape[-1] // groups + n
        init = KernelInit(self.kernel_init, n if self.coord_init == "zeros" else 0, axis)
        kernel = self.param("kernel", init, tuple(shape), self.param_dtype)
        kernel = kernel if maps else masked(kernel, self.mask)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        arrays = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        made = map_for(maps, fusing.spatial_shape(self, inputs)) if maps else None
        return coord_conv(self, super().__call__, arrays, made=made, window=window)

    @nn.nowrap
    def export_weights(self, variables: Mapping[str, Any]) -> Weights:
        """The canonical weights in ``variables``: ``weight`` and, where there is one, ``bias``.

        Raises:
            ValueError: the variables come from ``fuse``.
        """
        if MAPS in variables:
            raise ValueError(
                "variables must be those from before fuse, which left the features' part alone"
            )
        params = meta.unbox(variables["params"])
        return Weights(layer_arrays(params, reverse=options.is_reversed(self)), {"": self.coords})

    @nn.nowrap
    def import_weights(self, mapping: Mapping[str, Array]) -> dict[str, Any]:
        """The variables ``{"params": ...}`` for canonical weights, in ``param_dtype``.

        Raises:
            ValueError: arrays are missing, unexpected or wrongly shaped, or were made for other
                coordinates; all are listed. The number of input channels is the weight's own.
        """
        weight: Any = mapping.get("weight") if isinstance(mapping, Mapping) else None
        size, n, out = options.kernel_size(self), len(self.coords), self.features
        transposed, groups = options.is_transposed(self), options.groups(self)
        width = np.shape(weight)[0 if transposed else 1] if np.ndim(weight) == len(size) + 2 else 0
        width = max(width, n + 1)  # a kernel that is missing or no kernel should have some feature
        shapes = {"weight": (width, out, *size) if transposed else (out, width, *size)}
        if self.use_bias:
            shapes["bias"] = (out,)
        layout = KernelLayout(self.coords, (width - n) * groups, groups, transposed)
        arrays = checked(mapping, shapes, {"": layout})
        return _variables(arrays, self.param_dtype, options.is_reversed(self))


class CoordConv(_CoordLayer, nn.Conv):
    """``flax.linen.Conv`` that sees its coordinates, on one to three axes.

    Takes every argument of ``flax.linen.Conv``, and inputs ``(..., *S, C)``; keyword-only
    ``coords=None`` and ``coord_init="fan_in"``, the errors and the source are those of
    :class:`coordconv.layers.CoordLayer`. ``kernel_init`` draws, and ``mask`` has, the shape over
    features and coordinates, else there is a ValueError; what a ``conv_general_dilated_cls`` of
    one's own makes is given both, also in 16 bits, and is refused with coordinates that extend
    outside.

    Example:
        >>> layer = CoordConv(8, (3, 3), coords="xyr")
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.zeros((2, 16, 16, 3)))
        >>> y.shape
        (2, 16, 16, 8)
        >>> variables["params"]["kernel"].shape  # over 3 features and 3 coordinates
        (3, 3, 6, 8)
    """


class CoordConvTranspose(_CoordLayer, nn.ConvTranspose):
    """As :class:`CoordConv`, of ``flax.linen.ConvTranspose``; the coordinates are its input's.

    Example:
        >>> layer = CoordConvTranspose(8, (2, 2), strides=(2, 2))
        >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.zeros((2, 16, 16, 3)))
        >>> y.shape
        (2, 32, 32, 8)
    """


class AddCoords(nn.Module):
    """Append the coordinate channels to an input, for layers that have no CoordConv.

    The ``coords`` are tokens, a :class:`~coordconv.Coordinates`, or None for all axes, of which
    there are ``rank``; inputs are ``(..., *S, C)``, with any number of batch axes.

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

    def __call__(self, inputs: jax.Array, *, window: Window | None = None) -> jax.Array:
        """The inputs with the coordinates, maybe of a window, behind their channels."""
        coordinates: Any = self.coords
        return adding.add_coords(inputs, coordinates, self.rank, window)


class PositionBias(FixedCoords, nn.Module):
    """``x + P(S)`` for inputs ``(..., *S, C)``, as :class:`coordconv.layers.PositionLayer` has it.

    Args:
        coords: the coordinate channels: tokens such as ``"xyr"``, a
            :class:`~coordconv.Coordinates`, or None for all axes.
        rank: the number of axes, 1 to 3: those before are the batch's.
        use_bias: whether P has a constant for each channel, too.
        coord_init: ``"fan_in"``, by which the two initializers draw, or ``"zeros"``.
        dtype, param_dtype, kernel_init, bias_init: as ``flax.linen.Conv`` takes them, for a
            pointwise kernel ``(1, ..., n, C)``.

    Example:
        >>> layer = PositionBias("xyr")
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.zeros((2, 16, 20, 8)))
        >>> y.shape
        (2, 16, 20, 8)
        >>> variables["params"]["kernel"].shape
        (1, 1, 3, 8)
    """

    coords: Any = None
    rank: int = field(default=2, kw_only=True)
    use_bias: bool = field(default=True, kw_only=True)
    coord_init: str = field(default="fan_in", kw_only=True)
    dtype: Any = field(default=None, kw_only=True)
    param_dtype: Any = field(default=jnp.float32, kw_only=True)
    kernel_init: Any = field(default=nn.initializers.lecun_normal(), kw_only=True)
    bias_init: Any = field(default=nn.initializers.zeros_init(), kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "coords", Coordinates.resolve(self.coords, self.rank))
        check_coord_init(self.coord_init)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: jax.Array, *, window: Window | None = None) -> jax.Array:
        """The inputs and P at each of their positions, maybe of a window."""
        made: Any = meta.unbox(self.get_variable("params", "kernel"))
        channels = None if made is None else made.shape[-1]
        adding.check_pointwise(self.coords, self.rank, inputs, channels)
        zeros, features = self.coord_init == "zeros", inputs.shape[-1]
        kernel_init, bias_init = (
            nn.initializers.zeros if zeros else init for init in (self.kernel_init, self.bias_init)
        )
        shape = (*(1,) * self.rank, len(self.coords), features)
        kernel, bias = self.param("kernel", kernel_init, shape, self.param_dtype), None
        if self.use_bias:
            bias = self.param("bias", bias_init, (features,), self.param_dtype)
        arrays = promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        return adding.add_pointwise(self.coords, self.rank, arrays, window)

    @nn.nowrap
    def export_weights(self, variables: Mapping[str, Any]) -> Weights:
        """The canonical weights in ``variables``: ``weight`` and, where there is one, ``bias``."""
        params = meta.unbox(variables["params"])
        return Weights(layer_arrays(params, reverse=False), {"": self.coords})

    @nn.nowrap
    def import_weights(self, mapping: Mapping[str, Array]) -> dict[str, Any]:
        """The variables ``{"params": ...}`` for canonical weights, in ``param_dtype``.

        Raises:
            ValueError: arrays are missing, unexpected or wrongly shaped, or were made for other
                coordinates; all are listed. The number of channels is the weight's own.
        """
        weight: Any = mapping.get("weight") if isinstance(mapping, Mapping) else None
        channels = np.shape(weight)[0] if np.ndim(weight) else 1
        shapes: dict[str, tuple[int, ...]] = {
            "weight": (channels, len(self.coords), *(1,) * self.rank)
        }
        if self.use_bias:
            shapes["bias"] = (channels,)
        arrays = checked(mapping, shapes, {"": KernelLayout(self.coords, 0)})
        return _variables(arrays, self.param_dtype)


def _variables(arrays: Mapping[str, Array], dtype: Any, reverse: bool = False) -> dict[str, Any]:
    """A layer's variables for canonical arrays; copies, since asarray may share memory."""
    params = layer_params(arrays, reverse=reverse)
    return {"params": {name: jnp.array(array, dtype) for name, array in params.items()}}
