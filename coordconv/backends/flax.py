"""CoordConv for Flax NNX: subclasses of ``flax.nnx``'s own convolution.

Each layer takes what its base class takes, in the same order and with the same defaults, and has
one parameter more: ``coord_kernel`` of shape ``(*kernel_size, n, out_features)``.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init
from jax import numpy as jnp

from coordconv import networks
from coordconv.backends import jax as common
from coordconv.coordinates import Coordinates, CoordinatesLike, check_coord_init
from coordconv.grid import Array
from coordconv.recording import Model, Names
from coordconv.weights import Weights

COMPILED = True  # what most users do


class _CoordConv(nnx.Module):
    """What every CoordConv adds to the convolution it is mixed into.

    Args:
        coords: the coordinate channels: tokens such as ``"xyr"``, a
            :class:`~coordconv.Coordinates`, or None for all axes. Keyword only.
        coord_init: ``"fan_in"`` has ``kernel_init`` draw one kernel over
            ``in_features / feature_group_count + n`` channels and divides it; ``"zeros"`` draws
            the feature kernel as the base class does and starts the coordinate kernel at zero.
            Keyword only.

    A ``mask`` applies to the feature kernel alone. ``kernel_metadata`` goes to both kernels, but
    for its sharding: the coordinate kernel is on every device. The coordinates' share of the
    output is computed in float32 at least, whatever ``dtype`` and ``precision``, and cast once.

    Raises:
        TypeError, ValueError: as :class:`~coordconv.Coordinates`, and when called: inputs that
            are not floating-point, or of the wrong rank, channels or an empty axis.
    """

    in_features: int
    out_features: int
    kernel_size: tuple[int, ...]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Any,
        *args: Any,
        coords: CoordinatesLike = None,
        coord_init: str = "fan_in",
        kernel_init: Any = default_kernel_init,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        **kwargs: Any,
    ) -> None:
        rank = 1 if isinstance(kernel_size, int) else len(kernel_size)
        coordinates = Coordinates.resolve(coords, rank)
        check_coord_init(coord_init)
        count = len(coordinates)
        axis = -1 if kwargs.get("transpose_kernel") else -2  # of the input channels
        coordinate_part: Any = None

        def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
            """The kernel that the base class asks for; the coordinate part is kept."""
            nonlocal coordinate_part
            fused, features = list(shape), shape[axis]
            fused[axis] += count if coord_init == "fan_in" else 0
            drawn = kernel_init(key, tuple(fused), dtype)
            boxed = isinstance(drawn, nnx.VariableMetadata)  # as nnx.with_partitioning does
            kernel = drawn.raw_value if boxed else drawn
            kernel, coordinate_part = common.split_kernel(kernel, features, axis)
            if coord_init == "zeros":
                coordinate_part = jnp.zeros((*shape[:-2], count, out_features), kernel.dtype)
            if not boxed:
                return kernel
            metadata = _unsharded(drawn.metadata)
            coordinate_part = replace(drawn, raw_value=coordinate_part, metadata=metadata)
            return replace(drawn, raw_value=kernel)

        super().__init__(  # type: ignore[call-arg]  # nnx.Conv's: the next base class
            in_features,
            out_features,
            kernel_size,
            *args,
            kernel_init=draw,
            kernel_metadata=kernel_metadata,
            **kwargs,
        )
        self.coords = coordinates
        self.coord_kernel = nnx.Param(coordinate_part, **_unsharded(kernel_metadata))

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The convolution of ``inputs (..., *S, C)``, and of the coordinates."""
        shape = common.spatial_shape(self, inputs, self.in_features)
        output: jax.Array = super().__call__(inputs, *args, **kwargs)  # type: ignore[misc]
        geometry = common.geometry(self, shape)
        return common.add_position_bias(
            output,
            self.coord_kernel[...],
            geometry,
            self.coords,
            shape,
            common.is_reversed(self),
        )

    def export_weights(self) -> Weights:
        """The canonical weights: ``weight``, ``coord_weight`` and, if there is one, ``bias``."""
        params = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        arrays = common.to_weights(params, reverse=common.is_reversed(self))
        return Weights(arrays, {"": self.coords})

    def import_weights(self, mapping: Mapping[str, Array]) -> None:
        """Take canonical weights.

        Raises:
            ValueError: arrays are missing, unexpected or wrongly shaped, or were made for other
                coordinates; all are listed and nothing is changed.
        """
        _assign(self, common.layer_params(self, self.in_features, self.out_features, mapping))


class CoordConv(_CoordConv, nnx.Conv):
    """``flax.nnx.Conv`` that sees its coordinates, on one to three axes.

    Takes every argument of ``flax.nnx.Conv``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see the mixin for both.

    Shape:
        inputs ``(..., *S, C)``, any number of batch axes; output as ``flax.nnx.Conv``.

    Example:
        >>> layer = CoordConv(3, 8, (3, 3), coords="xyr", rngs=nnx.Rngs(0))
        >>> layer(jnp.zeros((2, 16, 16, 3))).shape
        (2, 16, 16, 8)
        >>> layer.coord_kernel.shape
        (3, 3, 3, 8)

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """


class CoordConvTranspose(_CoordConv, nnx.ConvTranspose):
    """``flax.nnx.ConvTranspose`` that sees its coordinates, those of its input.

    Takes every argument of ``flax.nnx.ConvTranspose``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see the mixin for both.

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
        coords: tokens, a :class:`~coordconv.Coordinates`, or None for all axes of the input.

    Shape:
        inputs ``(N, *S, C)`` with one to three spatial axes; output ``(N, *S, C + n)``.

    Raises:
        TypeError: the inputs are not floating-point.
        ValueError: the inputs have no spatial axes or an empty one, or lack an axis of ``coords``.

    Example:
        >>> AddCoords("x")(jnp.zeros((1, 3, 1)))[0, :, 1]
        Array([-1.,  0.,  1.], dtype=float32)
    """

    def __init__(self, coords: CoordinatesLike = None) -> None:
        self.coords = coords if coords is None else Coordinates.resolve(coords, 3)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return common.add_coords(inputs, self.coords)


class Network(nnx.Module):
    """A :class:`coordconv.networks.Network` as a module; inputs ``(N, *S, C)``."""

    def __init__(self, network: networks.Network, dtype: str = "float32") -> None:
        self.network = network
        self.dtype = dtype
        rngs = nnx.Rngs(0)  # for nothing: import_weights brings the weights
        for layer in common.weighted(network):
            setattr(self, layer.name, _layer(layer, rngs, dtype))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return common.run(self.network, inputs, lambda layer: getattr(self, layer.name))

    def apply(self, params: common.Params, inputs: jax.Array) -> jax.Array:
        """The output with ``params``, arrays by layer and name, in place of its own."""
        graph, state = nnx.split(self)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(inputs)

    def params(self) -> common.Params:
        """Its parameters, arrays by layer and name."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    def export_weights(self) -> Weights:
        """The canonical weights under dotted names."""
        return common.network_weights(self.network, self.params())

    def import_weights(self, mapping: Mapping[str, Array]) -> None:
        """Take canonical weights; errors as a layer's ``import_weights``, nothing changed."""
        for name, params in common.network_params(self.network, mapping).items():
            _assign(getattr(self, name), params)


def build(
    network: networks.Network, weights: Mapping[str, Array], dtype: str = "float32"
) -> Network:
    """Build a network with these weights."""
    with common.precision(dtype):
        module = Network(network, dtype)
        module.import_weights(weights)
        return module


def evaluate(
    module: Network,
    weights: Mapping[str, Array],
    x: Array,
    dy: Array | None = None,
    *,
    compiled: bool = COMPILED,
) -> tuple[Array, dict[str, Array]]:
    """Output and gradients; see :mod:`coordconv.backends`."""
    with common.precision(module.dtype):
        module.import_weights(weights)
        y, dx, gradients = common.evaluate(
            module.apply, module.params(), x, dy, module.dtype, compiled
        )
        if dx is None:
            return y, {}
        return y, {"x": dx, **common.network_weights(module.network, gradients)}


def trainer(
    module: Network, weights: Mapping[str, Array], optimizer: str = "adam", epsilon: float = 1e-8
) -> tuple[Callable[[Array, Array, float], float], Callable[[], Weights]]:
    """A training step and the weights it leaves; see :mod:`coordconv.backends`."""
    module.import_weights(weights)
    step, trained = common.trainer(module.apply, module.params(), optimizer, epsilon)
    return step, lambda: common.network_weights(module.network, trained())


read_state = common.read_state
from_state = common.from_state


def write_state(path: str, network: networks.Network, weights: Mapping[str, Array]) -> None:
    """Write the pure dict of an NNX state as an Orbax checkpoint."""
    common.write_state(path, common.network_params(network, weights))


def recorded(
    module: nnx.Module,
    *,
    names: Names = None,
    output_gradient: Array | Mapping[str, Array] | None = None,
    channels_last: bool = False,
    **kwargs: Any,
) -> Model:
    """The module as a function on NumPy arrays that returns what each module in it returned.

    It makes models for :func:`coordconv.parity.compare`; see :mod:`coordconv.backends`. What runs
    inside a scan, a ``jit`` or another transformation of the model's own is not recorded. A copy
    of the module is run, so that it keeps its state.

    Args:
        module: any module.
        names: other names for the modules inside it, by their paths, with dots.
        output_gradient: the output's gradient, to have gradients recorded, too.
        channels_last: whether the module's channels are on the last axis where those of the
            inputs, and of all models that it is compared with, are on axis 1; arrays of three and
            more axes are then turned round on the way in and out.
        kwargs: what ``module`` is called with beside the inputs.

    Example:
        >>> import numpy as np
        >>> net = nnx.Sequential(CoordConv(3, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
        >>> run = recorded(net, names={"layers.0": "conv"}, channels_last=True)
        >>> x = np.ones((1, 3, 5, 5), np.float32)
        >>> {name: array.shape for name, array in run(x).items()}
        {'conv': (1, 8, 5, 5), 'model output': (1, 8, 5, 5)}
    """

    def run(see: common.See, *inputs: jax.Array) -> Any:
        copied = nnx.clone(module)
        paths = {id(m): ".".join(map(str, path)) for path, m in nnx.iter_modules(copied)}
        running = {id(copied)}  # its own output is recorded elsewhere

        def seen(call: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(call)
            def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
                if id(self) not in paths:  # another model's module, of the same class
                    return call(self, *args, **kwargs)
                name = paths[id(self)]
                return common.see_once(
                    running, self, name, see, lambda: call(self, *args, **kwargs)
                )

            return wrapper

        kinds = {type(m) for _, m in nnx.iter_modules(copied) if callable(m)}
        with _PATCHING, ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(_patched(kind, seen(kind.__call__)))
            return copied(*inputs, **kwargs)

    return common.recorded(run, names, output_gradient, channels_last)


_PATCHING = threading.RLock()


@contextmanager
def _patched(kind: Any, call: Callable[..., Any]) -> Iterator[None]:
    """Within it, modules of this class, and of those derived from it, are called by ``call``."""
    own = vars(kind).get("__call__")
    kind.__call__ = call
    try:
        yield
    finally:
        if own is None:
            del kind.__call__
        else:
            kind.__call__ = own


_KINDS: dict[bool, tuple[Any, Any]] = {
    False: (nnx.Conv, CoordConv),
    True: (nnx.ConvTranspose, CoordConvTranspose),
}


def _layer(layer: networks.Conv | networks.Linear, rngs: nnx.Rngs, dtype: str) -> nnx.Module:
    options: dict[str, Any] = {"kernel_init": nnx.initializers.zeros, "rngs": rngs}
    options |= {"dtype": dtype, "param_dtype": dtype}
    if isinstance(layer, networks.Linear):
        return nnx.Linear(layer.in_features, layer.out_features, **options)
    options |= common.conv_options(layer)
    kind, coord_kind = _KINDS[layer.geometry.transposed]
    if layer.coords:
        kind, options["coords"] = coord_kind, layer.coords
    return kind(layer.in_channels, layer.out_channels, **options)


def _assign(module: nnx.Module, params: common.Params) -> None:
    for name, array in params.items():
        param = getattr(module, name)
        param[...] = jnp.asarray(array, param.dtype)  # which keeps the parameter's sharding


def _unsharded(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A kernel's metadata for its coordinate part: few meshes divide two or three channels."""
    names = ("out_sharding", "sharding", "sharding_names")  # one thing; the last two are old
    return {name: value for name, value in metadata.items() if name not in names}
