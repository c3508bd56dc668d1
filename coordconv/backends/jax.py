"""What both Flax adapters stand on: options, the position bias, layouts, evaluation and training.

Flax keeps channels last, in arrays ``(N, *S, C)`` and in kernels ``(*kernel_size, in, out)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp

from coordconv import networks
from coordconv import position_bias as core
from coordconv.coordinates import Coordinates, CoordinatesLike
from coordconv.geometry import ConvGeometry, check_input
from coordconv.grid import Array, coordinate_grid
from coordconv.weights import Weights, checked

Params: TypeAlias = dict[str, Any]  # a layer's arrays by Flax's names; a network's by layer, too
Apply: TypeAlias = Callable[..., Any]  # of parameters and (N, *S, C)

_NAMES = {"weight": "kernel", "coord_weight": "coord_kernel", "bias": "bias"}
_PADDING_MODES = {"CIRCULAR": "circular", "REFLECT": "reflect"}
_HIGHEST = lax.Precision.HIGHEST  # else accelerators multiply float32 in bfloat16 or TF32
_geometry = lru_cache(maxsize=256)(ConvGeometry)


def kernel_size(conv: Any) -> tuple[int, ...]:
    """The kernel's length on each axis; Flax takes an int for one axis."""
    return _per_axis(conv.kernel_size, 1)


def geometry(conv: Any, shape: tuple[int, ...]) -> ConvGeometry:
    """The geometry of an ``nnx.Conv`` or ``linen.Conv`` for an input of spatial ``shape``."""
    kernel = kernel_size(conv)
    rank = len(kernel)
    strides, dilation = _per_axis(conv.strides, rank), _per_axis(conv.kernel_dilation, rank)
    holes = _per_axis(conv.input_dilation, rank)
    padding: Any = conv.padding
    mode = "zeros"
    if isinstance(padding, str):  # which Flax refuses to combine with input_dilation
        if padding in _PADDING_MODES:
            padding, mode = _centred(kernel, dilation), _PADDING_MODES[padding]
        elif padding == "CAUSAL":
            padding = ((dilation[0] * (kernel[0] - 1), 0),)
        elif padding.upper() == "SAME_LOWER":
            pads = _geometry(kernel, strides, "same", dilation).pads(shape)
            padding = tuple((before, after) for after, before in pads)
        else:  # lax takes lower case, too
            padding = 0 if padding.upper() == "VALID" else "same"
    elif not isinstance(padding, int):
        padding = tuple(p if isinstance(p, int) else tuple(p) for p in padding)
    return _geometry(
        kernel,
        stride=strides,
        padding=padding,
        dilation=dilation,
        groups=conv.feature_group_count,
        input_dilation=holes,
        padding_mode=mode,
    )


def _per_axis(value: Any, rank: int) -> tuple[int, ...]:
    value = 1 if value is None else value
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _centred(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The padding of Flax's ``CIRCULAR`` and ``REFLECT``, whatever the stride."""
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple((r // 2, r - r // 2) for r in reach)


def spatial_shape(conv: Any, inputs: jax.Array, channels: int) -> tuple[int, ...]:
    """The spatial shape of a layer's ``inputs (..., *S, channels)``, or what is wrong with them."""
    _check_floating(inputs)
    return check_input(
        inputs.shape,
        rank=len(kernel_size(conv)),
        channels=channels,
        coords=len(conv.coords),
        channel_axis=-1,
        batched=-1,
    )


def _check_floating(inputs: jax.Array) -> None:
    if not jnp.issubdtype(inputs.dtype, jnp.inexact):
        raise TypeError(f"input must be floating-point, got {inputs.dtype}")


# Jitted, so that it is one call where the layer is not; inlined, so that it is none where it is.
@partial(jax.jit, static_argnums=(2, 3, 4), inline=True)
def add_position_bias(
    output: jax.Array,
    coord_kernel: jax.Array,
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: tuple[int, ...],
) -> jax.Array:
    """The ``output (..., *output shape, out)`` of a convolution, and its coordinates' share.

    The arguments are those of :func:`position_bias`, which is cast to the output's dtype.
    """
    return output + position_bias(coord_kernel, geometry, coords, shape).astype(output.dtype)


def position_bias(
    coord_kernel: jax.Array, geometry: ConvGeometry, coords: Coordinates, shape: tuple[int, ...]
) -> jax.Array:
    """What the coordinates add to the output of a convolution, for every sample alike.

    Args:
        coord_kernel: shape ``(*kernel_size, n, out)``.
        geometry: the convolution.
        coords: its coordinate channels.
        shape: the spatial shape of its input.

    Returns:
        An array of shape ``(*output shape, out)``, in the kernel's dtype, in float32 at least.
    """
    info = jnp.finfo(coord_kernel.dtype)
    kernel = coord_kernel if info.bits >= 32 else coord_kernel.astype(jnp.float32)
    return core.position_bias(
        jnp.moveaxis(kernel, (-1, -2), (0, 1)),
        core.shares(geometry, coords, shape, np.float64 if info.bits == 64 else np.float32),
        einsum=partial(jnp.einsum, precision=_HIGHEST),
        convolve=_convolve,
        asarray=lambda a: jnp.asarray(a, kernel.dtype),
        channels_last=True,
    )


def _convolve(share: core.Share, padded: jax.Array, kernel: jax.Array) -> jax.Array:
    if share.flip:
        kernel = jnp.flip(kernel, tuple(range(2, kernel.ndim)))
    return lax.conv_general_dilated(
        padded[None],
        kernel,
        share.stride,
        "VALID",
        rhs_dilation=share.dilation,
        precision=_HIGHEST,
    )[0]


def add_coords(inputs: jax.Array, coords: CoordinatesLike) -> jax.Array:
    """``inputs (N, *S, C)`` and the coordinate channels behind; see the adapters' ``AddCoords``."""
    _check_floating(inputs)
    grid = coordinate_grid(inputs.shape[1:-1], coords, dtype=np.float64)
    channels = jnp.asarray(np.moveaxis(grid, 0, -1), inputs.dtype)
    repeated = jnp.broadcast_to(channels, (len(inputs), *channels.shape))
    return jnp.concatenate([inputs, repeated], axis=-1)


def to_params(weights: Mapping[str, Array], *, transposed: bool = False) -> Params:
    """A layer's canonical weights under Flax's names and in its layout, as NumPy arrays.

    The kernel of a transposed convolution is reversed along its spatial axes: torch adds it to
    the output, ``lax.conv_transpose`` slides it (with ``transpose_kernel=False``, the default).
    """
    params = {}
    for name, array in weights.items():
        if array.ndim > 1:
            sides = (0, 1) if transposed and name == "weight" else (1, 0)
            array = np.moveaxis(array, sides, (-2, -1))
            array = np.flip(array, tuple(range(array.ndim - 2))) if transposed else array
        params[_NAMES[name]] = array
    return params


def to_weights(params: Mapping[str, Any], *, transposed: bool = False) -> dict[str, Array]:
    """The inverse of :func:`to_params`; copies, and bfloat16 becomes float32."""
    weights = {}
    for name in (name for name, flax_name in _NAMES.items() if flax_name in params):
        array = np.asarray(params[_NAMES[name]])
        if array.dtype.kind == "V":  # NumPy has no bfloat16; float32 holds every value of it
            array = array.astype(np.float32)
        if array.ndim > 1:
            array = np.flip(array, tuple(range(array.ndim - 2))) if transposed else array
            sides = (0, 1) if transposed and name == "weight" else (1, 0)
            array = np.moveaxis(array, (-2, -1), sides)
        weights[name] = np.array(array, order="C")
    return weights


def layer_params(conv: Any, channels: int, out: int, mapping: Mapping[str, Array]) -> Params:
    """A CoordConv's parameters from canonical weights, or one error with all their problems."""
    kernel = _geometry(kernel_size(conv), groups=conv.feature_group_count)
    layer = networks.Conv("", channels, out, kernel, conv.coords, conv.use_bias)
    return to_params(checked(mapping, layer.weight_shapes(), {"": conv.coords}))


def network_params(network: networks.Network, mapping: Mapping[str, Array]) -> Params:
    """A network's parameters from canonical weights, or one error with all their problems."""
    arrays = checked(mapping, network.weight_shapes(), network.coordinates())
    return {
        layer.name: to_params(
            {name: arrays[f"{layer.name}.{name}"] for name in layer.weight_shapes()},
            transposed=_is_transposed(layer),
        )
        for layer in weighted(network)
    }


def network_weights(network: networks.Network, params: Mapping[str, Any]) -> Weights:
    """A network's canonical weights under dotted names."""
    weights = Weights(coordinates=network.coordinates())
    for layer in weighted(network):
        arrays = to_weights(params[layer.name], transposed=_is_transposed(layer))
        weights.update({f"{layer.name}.{name}": array for name, array in arrays.items()})
    return weights


def weighted(network: networks.Network) -> list[networks.Conv | networks.Linear]:
    """The layers that have weights."""
    return [n for n in network.layers if isinstance(n, (networks.Conv, networks.Linear))]


def _is_transposed(layer: networks.Layer) -> bool:
    return isinstance(layer, networks.Conv) and layer.geometry.transposed


def conv_options(layer: networks.Conv) -> dict[str, Any]:
    """The options of a described convolution, as NNX and Linen both spell them.

    Raises:
        NotImplementedError: Flax's convolutions lack one.
    """
    g = layer.geometry
    kernel, strides, dilation, extra, holes = g.per_axis
    common = {"kernel_size": kernel, "strides": strides, "kernel_dilation": dilation}
    padding: Any = g.padding
    if g.transposed:
        if g.groups > 1:
            raise NotImplementedError(f"Flax transposed convolutions have no groups={g.groups}")
        if layer.coords:
            raise NotImplementedError("coordconv has no CoordConvTranspose for Flax yet")
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        padding = [(r - p, r - q + e) for r, (p, q), e in zip(reach, padding, extra, strict=True)]
        return {**common, "padding": padding, "use_bias": layer.bias}
    own = _centred(kernel, dilation)
    if padding == "same":  # at stride 1 it is the same for every input
        padding = "SAME" if max(strides) > 1 else own
    if g.padding_mode != "zeros" and padding != ((0, 0),) * g.rank:
        if g.padding_mode not in _PADDING_MODES.values() or padding != own:
            raise NotImplementedError(
                f"Flax convolutions have no padding_mode={g.padding_mode!r} by {padding}, only "
                f"'circular' and 'reflect', for this kernel by {own}"
            )
        padding = g.padding_mode.upper()
    if isinstance(padding, str) and max(holes) > 1:
        raise NotImplementedError(
            f"Flax convolutions have no padding={padding!r} with input_dilation={holes}"
        )
    return {
        **common,
        "padding": padding,
        "input_dilation": holes,
        "feature_group_count": g.groups,
        "use_bias": layer.bias,
    }


def run(network: networks.Network, x: jax.Array, find: Callable[[Any], Any]) -> jax.Array:
    """A network's output for ``x (N, *S, C)``; ``find`` returns the module of a layer."""
    for layer in network.layers:
        match layer:
            case networks.ReLU():
                x = jax.nn.relu(x)
            case networks.Flatten():
                x = jnp.moveaxis(x, -1, 1).reshape(len(x), -1)
            case _:
                x = find(layer)(x)
    return x


def evaluate(
    apply: Apply, params: Any, x: Array, dy: Array | None
) -> tuple[Array, Array | None, Any]:
    """The output for ``x`` and, for the output's gradient ``dy``, those of ``x`` and ``params``.

    All but ``params`` is channels first, as in :mod:`coordconv.backends`.
    """
    # Comparisons are of float32: accelerators take shorter products unless told otherwise.
    with jax.default_matmul_precision("highest"):
        if dy is None:
            return _numpy(_forward(apply, params, _channels_last(x))), None, None
        y, (of_params, of_x) = _backward(apply, params, _channels_last(x), _channels_last(dy))
    return _numpy(y), _numpy(of_x), of_params


@partial(jax.jit, static_argnums=0)
def _forward(apply: Apply, params: Any, x: jax.Array) -> jax.Array:
    return apply(params, x)


@partial(jax.jit, static_argnums=0)
def _backward(apply: Apply, params: Any, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, Any]:
    y, pull_back = jax.vjp(apply, params, x)
    return y, pull_back(dy)


def trainer(
    apply: Apply, params: Any
) -> tuple[Callable[[Array, Array, float], float], Callable[[], Any]]:
    """A training step, see :mod:`coordconv.backends`, and what returns the parameters it leaves."""
    adam = optax.scale_by_adam()
    state = adam.init(params)

    def loss(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(apply(params, x), labels)
        return losses.mean()

    @jax.jit
    def update(params: Any, state: Any, rate: jax.Array, *batch: jax.Array) -> tuple[Any, ...]:
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        updates, state = adam.update(gradients, state)
        return value, jax.tree.map(lambda p, u: p - rate * u, params, updates), state

    def step(x: Array, labels: Array, learning_rate: float) -> float:
        nonlocal params, state
        batch = _channels_last(x), jnp.asarray(labels)
        with jax.default_matmul_precision("highest"):
            value, params, state = update(params, state, jnp.float32(learning_rate), *batch)
        return float(value)

    return step, lambda: params


def _numpy(x: jax.Array) -> Array:
    return np.array(np.moveaxis(np.asarray(x), -1, 1), order="C")


def _channels_last(x: Array) -> jax.Array:
    # In NumPy: outside of a jitted function jnp would compile the transposition for each shape.
    return jnp.asarray(np.moveaxis(x, 1, -1))
