"""CoordConv for Flax Linen: subclasses of ``flax.linen``'s own convolution.

Each layer takes what its base class takes, in the same order and with the same defaults, and has
one parameter more: ``coord_kernel`` of shape ``(*kernel_size, n, features)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import field
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta
from jax import numpy as jnp

from coordconv import networks
from coordconv.backends import jax as common
from coordconv.coordinates import Coordinates, CoordinatesLike, check_coord_init
from coordconv.grid import Array
from coordconv.recording import Model, Names
from coordconv.weights import Weights

COMPILED = True  # what most users do


class _CoordConv(nn.Module):
    """What every CoordConv adds to the convolution it is mixed into.

    Args:
        coords: the coordinate channels: tokens such as ``"xyr"``, a
            :class:`~coordconv.Coordinates`, or None for all axes. Keyword only.
        coord_init: ``"fan_in"`` has ``kernel_init`` draw one kernel over
            ``C / feature_group_count + n`` channels and divides it; ``"zeros"`` draws the feature
            kernel as the base class does and starts the coordinate kernel at zero. Keyword only.

    A ``mask`` applies to the feature kernel alone, and so does the box that
    ``nn.with_partitioning`` puts around a kernel: the coordinate kernel is on every device. The
    coordinates' share of the output is computed in float32 at least, whatever ``dtype`` and
    ``precision``, and cast once.

    Raises:
        TypeError, ValueError: as :class:`~coordconv.Coordinates`, and when called: inputs that
            are not floating-point, or of the wrong rank, channels or an empty axis.
    """

    coords: CoordinatesLike = field(default=None, kw_only=True)
    coord_init: str = field(default="fan_in", kw_only=True)

    def __post_init__(self) -> None:
        coordinates = Coordinates.resolve(self.coords, len(common.kernel_size(self)))
        object.__setattr__(self, "coords", coordinates)  # a Linen module is frozen
        check_coord_init(self.coord_init)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The convolution of ``inputs (..., *S, C)``, and of the coordinates."""
        conv: Any = self
        channels = inputs.shape[-1] if inputs.ndim else 0
        if self.has_variable("params", "kernel"):  # else the kernel will be made for these inputs
            kernel = meta.unbox(self.get_variable("params", "kernel"))
            channels = kernel.shape[common.input_axis(self)]
            channels *= getattr(self, "feature_group_count", 1)  # ConvTranspose has no groups
        shape = common.spatial_shape(self, inputs, channels)
        # The base class's function itself: as a method of the module it would be recorded apart
        # by capture_intermediates and interceptors.
        output = inspect.unwrap(super().__call__)(self, inputs)  # type: ignore[misc]
        coord_kernel = self.param(
            "coord_kernel",
            nn.initializers.zeros,
            (*common.kernel_size(self), len(conv.coords), conv.features),
            conv.param_dtype,
        )
        geometry = common.geometry(self, shape)
        return common.add_position_bias(
            output, coord_kernel, geometry, conv.coords, shape, common.is_reversed(self)
        )

    @nn.nowrap
    def param(self, name: str, init_fn: Any, *init_args: Any, **kwargs: Any) -> Any:
        """As the base class; with the kernel, its coordinate part is drawn."""
        if name == "kernel" and not self.has_variable("params", name):
            init_fn = self._draw(init_fn)
        return super().param(name, init_fn, *init_args, **kwargs)

    @nn.nowrap
    def _draw(self, kernel_init: Any) -> Callable[..., Any]:
        count = len(self.coords)  # type: ignore[arg-type]  # Coordinates since __post_init__

        def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
            """The kernel that the base class asks for; the coordinate part becomes a parameter."""
            axis = common.input_axis(self)
            fused, features = list(shape), shape[axis]
            fused[axis] += count if self.coord_init == "fan_in" else 0
            drawn = kernel_init(key, tuple(fused), dtype)
            (kernel,) = jax.tree.leaves(drawn)  # out of the box of an nn.with_partitioning
            kernel, coordinate_part = common.split_kernel(kernel, features, axis)
            if self.coord_init == "zeros":
                out = shape[-3 - axis]  # the other of the last two
                coordinate_part = jnp.zeros((*shape[:-2], count, out), kernel.dtype)
            self.put_variable("params", "coord_kernel", coordinate_part)
            return jax.tree.map(lambda _: kernel, drawn)

        return draw

    @nn.nowrap
    def export_weights(self, variables: Mapping[str, Any]) -> Weights:
        """The canonical weights in ``variables``, as ``init`` returns them.

        Returns:
            ``weight``, ``coord_weight`` and, if there is one, ``bias``.
        """
        coordinates: Any = self.coords
        params = meta.unbox(variables["params"])
        arrays = common.to_weights(params, reverse=common.is_reversed(self))
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
        rank = len(common.kernel_size(self))
        axis, groups = (0, 1) if common.is_transposed(self) else (1, conv.feature_group_count)
        in_features = np.shape(weight)[axis] * groups if np.ndim(weight) == rank + 2 else -1
        params = common.layer_params(self, in_features, conv.features, mapping)
        return {"params": jax.tree.map(lambda a: jnp.asarray(a, conv.param_dtype), params)}


class CoordConv(_CoordConv, nn.Conv):
    """``flax.linen.Conv`` that sees its coordinates, on one to three axes.

    Takes every argument of ``flax.linen.Conv``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see the mixin for both.

    Shape:
        inputs ``(..., *S, C)``, any number of batch axes; output as ``flax.linen.Conv``.

    Example:
        >>> layer = CoordConv(8, (3, 3), coords="xyr")
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.zeros((2, 16, 16, 3)))
        >>> y.shape
        (2, 16, 16, 8)
        >>> variables["params"]["coord_kernel"].shape
        (3, 3, 3, 8)

    Source:
        Liu et al., NeurIPS 2018, section 3.
    """


class CoordConvTranspose(_CoordConv, nn.ConvTranspose):
    """``flax.linen.ConvTranspose`` that sees its coordinates, those of its input.

    Takes every argument of ``flax.linen.ConvTranspose``, and keyword-only ``coords=None`` and
    ``coord_init="fan_in"``; see the mixin for both.

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
        coords: tokens, a :class:`~coordconv.Coordinates`, or None for all axes of the input.

    Shape:
        inputs ``(N, *S, C)`` with one to three spatial axes; output ``(N, *S, C + n)``.

    Raises:
        TypeError: the inputs are not floating-point.
        ValueError: the inputs have no spatial axes or an empty one, or lack an axis of ``coords``.

    Example:
        >>> AddCoords("x").apply({}, jnp.zeros((1, 3, 1)))[0, :, 1]
        Array([-1.,  0.,  1.], dtype=float32)
    """

    coords: CoordinatesLike = None

    def __post_init__(self) -> None:
        if self.coords is not None:
            object.__setattr__(self, "coords", Coordinates.resolve(self.coords, 3))
        super().__post_init__()

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return common.add_coords(inputs, self.coords)


class Network(nn.Module):
    """A :class:`coordconv.networks.Network` as a module; inputs ``(N, *S, C)``."""

    network: networks.Network
    dtype: str = "float32"

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return common.run(self.network, inputs, partial(_layer, dtype=self.dtype))

    @nn.nowrap
    def export_weights(self, variables: Mapping[str, Any]) -> Weights:
        """The canonical weights in ``variables``, under dotted names."""
        return common.network_weights(self.network, variables["params"])

    @nn.nowrap
    def import_weights(self, mapping: Mapping[str, Array]) -> dict[str, Any]:
        """The variables for canonical weights; errors as a layer's ``import_weights``."""
        params = common.network_params(self.network, mapping)
        return {"params": jax.tree.map(lambda a: jnp.asarray(a, self.dtype), params)}


def build(
    network: networks.Network, weights: Mapping[str, Array], dtype: str = "float32"
) -> Network:
    """Build a network; ``weights`` are checked, and ``import_weights`` makes variables of them."""
    module = Network(network, dtype)
    with common.precision(dtype):
        module.import_weights(weights)
    for layer in common.weighted(network):
        _layer(layer, dtype, parent=None)  # options that Flax lacks are told of now
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
        variables = module.import_weights(weights)
        y, dx, gradients = common.evaluate(module.apply, variables, x, dy, module.dtype, compiled)
        return y, {} if dx is None else {"x": dx, **module.export_weights(gradients)}


def trainer(
    module: Network, weights: Mapping[str, Array], optimizer: str = "adam", epsilon: float = 1e-8
) -> tuple[Callable[[Array, Array, float], float], Callable[[], Weights]]:
    """A training step and the weights it leaves; see :mod:`coordconv.backends`."""
    step, trained = common.trainer(module.apply, module.import_weights(weights), optimizer, epsilon)
    return step, lambda: module.export_weights(trained())


read_state = common.read_state
from_state = common.from_state


def write_state(path: str, network: networks.Network, weights: Mapping[str, Array]) -> None:
    """Write the variables ``{"params": ...}`` as an Orbax checkpoint."""
    common.write_state(path, {"params": common.network_params(network, weights)})


def recorded(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    names: Names = None,
    output_gradient: Array | Mapping[str, Array] | None = None,
    channels_last: bool = False,
    **kwargs: Any,
) -> Model:
    """The module as a function on NumPy arrays that returns what each module in it returned.

    It makes models for :func:`coordconv.parity.compare`; see :mod:`coordconv.backends`. What runs
    inside a scan, a ``jit`` or another transformation of the model's own is not recorded. Every
    collection but the parameters may change in the course of a call; ``variables`` do not.

    Args:
        module: any module.
        variables: its variables, as ``init`` returns them.
        names: other names for the modules inside it, by their paths, with dots.
        output_gradient: the output's gradient, to have gradients recorded, too.
        channels_last: whether the module's channels are on the last axis where those of the
            inputs, and of all models that it is compared with, are on axis 1; arrays of three and
            more axes are then turned round on the way in and out.
        kwargs: what ``module.apply`` is called with beside the inputs.

    Example:
        >>> net = nn.Sequential([CoordConv(8, (3, 3)), nn.relu])
        >>> x = np.ones((1, 3, 5, 5), np.float32)
        >>> variables = net.init(jax.random.key(0), np.moveaxis(x, 1, -1))
        >>> run = recorded(net, variables, names={"layers_0": "conv"}, channels_last=True)
        >>> {name: array.shape for name, array in run(x).items()}
        {'conv': (1, 8, 5, 5), 'model output': (1, 8, 5, 5)}
    """
    mutable = [collection for collection in variables if collection != "params"]

    def run(see: common.See, *inputs: jax.Array) -> Any:
        running: set[int] = set()

        def intercept(call: Any, args: Any, options: Any, context: Any) -> Any:
            path = context.module.path
            if (
                context.method_name != "__call__" or not path
            ):  # its own output is recorded elsewhere
                return call(*args, **options)
            return common.see_once(
                running, context.module, ".".join(path), see, lambda: call(*args, **options)
            )

        with nn.intercept_methods(intercept):
            output, _ = module.apply(variables, *inputs, mutable=mutable, **kwargs)
        return output

    return common.recorded(run, names, output_gradient, channels_last)


_KINDS: dict[bool, tuple[Any, Any]] = {
    False: (nn.Conv, CoordConv),
    True: (nn.ConvTranspose, CoordConvTranspose),
}


def _layer(layer: networks.Conv | networks.Linear, dtype: str, **options: Any) -> nn.Module:
    options |= {"dtype": dtype, "param_dtype": dtype}
    if isinstance(layer, networks.Linear):
        return nn.Dense(layer.out_features, name=layer.name, **options)
    options |= common.conv_options(layer)
    kind, coord_kind = _KINDS[layer.geometry.transposed]
    if layer.coords:
        kind, options["coords"] = coord_kind, layer.coords
    return kind(layer.out_channels, name=layer.name, **options)
