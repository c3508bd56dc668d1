"""CoordConv for Flax NNX: subclasses of ``flax.nnx``'s own convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp

from coordconv.backends.flax import converting
from coordconv.backends.flax.fusing import FusedCoordConv
from coordconv.backends.jax import adding, options
from coordconv.backends.jax.arrays import layer_arrays, layer_params
from coordconv.backends.jax.layers import KernelInit, coord_conv, masked
from coordconv.coordinates import Coordinates, CoordinatesLike, check_coord_init
from coordconv.grid import Array
from coordconv.layers import CanonicalLayer, CoordLayer, PositionLayer, check_channels
from coordconv.weights.kernels import KernelLayout
from coordconv.windows import Window

_LECUN, _ZEROS = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()


class _NnxWeights(CanonicalLayer):
    """A layer whose parameters are ``kernel`` and ``bias``, which may be None."""

    def _canonical(self) -> dict[str, Array]:
        params = {"kernel": self.kernel, "bias": self.bias}
        arrays = {name: param[...] for name, param in params.items() if param is not None}
        return layer_arrays(arrays, reverse=options.is_reversed(self))

    def _assign(self, arrays: Mapping[str, Array]) -> None:
        for name, values in layer_params(arrays, reverse=options.is_reversed(self)).items():
            param = getattr(self, name)
            # In place, which keeps metadata and sharding; a copy, as asarray may share memory.
            param[...] = jnp.array(values, param.dtype)


class _CoordLayer(_NnxWeights, CoordLayer):
    """What both layers share; :class:`coordconv.layers.CoordLayer` has the arguments."""

    CHANNELS = CHANNELS_ATTRIBUTE = "in_features"
    GROUPS = "feature_group_count"

    def _rank(self, arguments: Mapping[str, Any]) -> int:
        return len(options.per_axis(arguments["kernel_size"], 1))

    def _prepare(self, arguments: dict[str, Any]) -> None:
        zeros = len(self.coords) if self.coord_init == "zeros" else 0
        axis = -1 if arguments.get("transpose_kernel") else -2
        arguments["kernel_init"] = KernelInit(arguments["kernel_init"], zeros, axis)

    @property
    def layout(self) -> KernelLayout:
        """Where features and coordinates lie in the canonical kernel."""
        transposed = options.is_transposed(self)
        return KernelLayout(self.coords, self.in_features, options.groups(self), transposed)

    def __call__(
        self, inputs: jax.Array, *args: Any, window: Window | None = None, **kwargs: Any
    ) -> jax.Array:
        """The convolution of ``inputs (..., *S, C)`` and their coordinates, maybe of a window."""
        adding.check(self, self.coords, inputs, self.in_features)
        kernel = masked(self.kernel[...], self.mask)
        if kernel.shape != tuple(self.kernel_shape):
            axis = options.input_axis(self)
            raise ValueError(
                f"kernel must have {self.kernel_shape[axis]} input channels, features and "
                f"coordinates, in shape {tuple(self.kernel_shape)}, got shape {kernel.shape}: "
                "a state of before add_coords is fitted by the fit of what that returned"
            )
        bias = None if self.bias is None else self.bias[...]
        arrays = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        return coord_conv(self, super().__call__, arrays, *args, window=window, **kwargs)

    @classmethod
    def from_conv(
        cls,
        conv: Any,
        coords: CoordinatesLike = None,
        *,
        init: str = "zeros",
        rngs: nnx.Rngs | None = None,
    ) -> Any:
        """A layer from a copy of NNX's own convolution, with the weights of that.

        Args:
            conv: an ``nnx.Conv``, or for a transposed layer an ``nnx.ConvTranspose``.
            coords: the coordinate channels: tokens, a :class:`~coordconv.Coordinates`, or None for
                all axes.
            init: ``"zeros"``: the layer computes what ``conv`` computes, and is ``map_only``;
                ``"fan_in"``: the coordinates' part is drawn as in a new layer.
            rngs: what ``"fan_in"`` draws with.

        Raises:
            TypeError: ``conv`` is of another class.
            ValueError: ``coords`` beyond the rank; another ``init``; ``conv`` has a
                ``conv_general_dilated`` of its own, or a Variable that computes its kernel.

        Example:
            >>> conv, x = nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), jnp.ones((2, 16, 20, 3))
            >>> bool((CoordConv.from_conv(conv, "xyr")(x) == conv(x)).all())
            True
        """
        return converting.from_conv(cls, conv, coords, init, rngs)

    def fuse(self, size: Sequence[int] | None = None) -> FusedCoordConv:
        """For inference: a plain convolution and one constant map, or maps as inputs come.

        Args:
            size: the spatial shape of all inputs to come; None for any.

        Raises:
            ValueError: a ``size`` that does not fit the layer; a layer that cannot be split before
                its call: with a ``__call__`` or a ``conv_general_dilated`` of its own, or that a
                scan or vmap made.

        Example:
            >>> layer = CoordConv(3, 8, (3, 3), rngs=nnx.Rngs(0))
            >>> layer.fuse((16, 20))(jnp.zeros((2, 16, 20, 3))).shape
            (2, 16, 20, 8)
        """
        return FusedCoordConv(self, size)


class CoordConv(_CoordLayer, nnx.Conv):
    """``flax.nnx.Conv`` that sees its coordinates, on one to three axes.

    Takes every argument of ``flax.nnx.Conv``, and inputs ``(..., *S, C)``; keyword-only
    ``coords=None`` and ``coord_init="fan_in"``, the errors and the source are those of
    :class:`coordconv.layers.CoordLayer`. ``kernel_init`` draws, and ``mask`` has, the shape over
    features and coordinates, else there is a ValueError; a ``conv_general_dilated`` of one's own is
    given both, also in 16 bits, and is refused with coordinates that extend outside.

    Example:
        >>> layer = CoordConv(3, 8, (3, 3), coords="xyr", rngs=nnx.Rngs(0))
        >>> layer(jnp.zeros((2, 16, 16, 3))).shape
        (2, 16, 16, 8)
        >>> layer.kernel.shape  # over 3 features and 3 coordinates
        (3, 3, 6, 8)
    """


class CoordConvTranspose(_CoordLayer, nnx.ConvTranspose):
    """As :class:`CoordConv`, of ``flax.nnx.ConvTranspose``; the coordinates are its input's.

    Example:
        >>> layer = CoordConvTranspose(3, 8, (2, 2), strides=(2, 2), rngs=nnx.Rngs(0))
        >>> layer(jnp.zeros((2, 16, 16, 3))).shape
        (2, 32, 32, 8)
    """


class AddCoords(nnx.Module):
    """Append the coordinate channels to an input, for layers that have no CoordConv.

    The ``coords`` are tokens, a :class:`~coordconv.Coordinates`, or None for all axes, of which
    there are ``rank``; inputs are ``(..., *S, C)``, with any number of batch axes.

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

    def __call__(self, inputs: jax.Array, *, window: Window | None = None) -> jax.Array:
        """The inputs with the coordinates, maybe of a window, behind their channels."""
        return adding.add_coords(inputs, self.coords, self.rank, window)


class PositionBias(_NnxWeights, PositionLayer, nnx.Module):
    """``x + P(S)`` for inputs ``(..., *S, C)``; :class:`.PositionLayer` has what P is.

    Args:
        features: the channels of input and output.
        coords: the coordinate channels: tokens such as ``"xyr"``, a
            :class:`~coordconv.Coordinates`, or None for all axes.
        rank: the number of axes, 1 to 3: those before are the batch's.
        use_bias: whether P has a constant for each channel, too.
        coord_init: ``"fan_in"``, by which the two initializers draw, or ``"zeros"``.
        dtype, param_dtype, kernel_init, bias_init, rngs: as ``flax.nnx.Conv`` takes them; it makes
            the parameters, of a pointwise kernel ``(1, ..., n, C)``.

    Example:
        >>> layer = PositionBias(8, "xyr", rngs=nnx.Rngs(0))
        >>> layer(jnp.zeros((2, 16, 20, 8))).shape
        (2, 16, 20, 8)
        >>> layer.kernel.shape
        (1, 1, 3, 8)
    """

    def __init__(
        self,
        features: int,
        coords: CoordinatesLike = None,
        *,
        rank: int = 2,
        use_bias: bool = True,
        coord_init: str = "fan_in",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = _LECUN,
        bias_init: Any = _ZEROS,
        rngs: nnx.Rngs,
    ) -> None:
        check_channels("features", features)
        check_coord_init(coord_init)
        self.coords = Coordinates.resolve(coords, rank)
        self.features, self.rank, self.coord_init = features, rank, coord_init
        self.dtype = dtype
        if coord_init == "zeros":
            kernel_init = bias_init = _ZEROS
        given = {"use_bias": use_bias, "param_dtype": param_dtype, "rngs": rngs}
        inits = {"kernel_init": kernel_init, "bias_init": bias_init}
        plain = nnx.Conv(len(self.coords), features, (1,) * rank, **given, **inits)
        self.kernel, self.bias, self.promote_dtype = plain.kernel, plain.bias, plain.promote_dtype

    def __call__(self, inputs: jax.Array, *, window: Window | None = None) -> jax.Array:
        """The inputs and P at each of their positions, maybe of a window."""
        adding.check_pointwise(self.coords, self.rank, inputs, self.features)
        bias = None if self.bias is None else self.bias[...]
        arrays = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        return adding.add_pointwise(self.coords, self.rank, arrays, window)
