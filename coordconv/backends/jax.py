"""What both Flax adapters stand on: options, the position bias, layouts, evaluation and training.

Flax keeps channels last, in arrays ``(N, *S, C)`` and in kernels ``(*kernel_size, in, out)``.
"""

from __future__ import annotations

import errno
import glob
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp
from jax.extend.core import get_opaque_trace_state

from coordconv import networks
from coordconv import position_bias as core
from coordconv.coordinates import Coordinates, CoordinatesLike
from coordconv.geometry import ConvGeometry, check_input
from coordconv.grid import Array, coordinate_grid
from coordconv.recording import (
    OUTPUT,
    Model,
    Names,
    Recording,
    given_gradients,
    in_order,
    input_names,
    mapped,
)
from coordconv.weights import Weights, checked

Params: TypeAlias = dict[str, Any]  # a layer's arrays by Flax's names; a network's by layer, too
Apply: TypeAlias = Callable[..., Any]  # of parameters and (N, *S, C)
See: TypeAlias = Callable[[str, Any], Any]  # what goes on in place of what a module returned

_NAMES = {"weight": "kernel", "coord_weight": "coord_kernel", "bias": "bias"}
_PADDING_MODES = {"CIRCULAR": "circular", "REFLECT": "reflect"}
_HIGHEST = lax.Precision.HIGHEST  # else accelerators multiply float32 in bfloat16 or TF32
_geometry = lru_cache(maxsize=256)(ConvGeometry)


def kernel_size(conv: Any) -> tuple[int, ...]:
    """The kernel's length on each axis; Flax takes an int for one axis."""
    return _per_axis(conv.kernel_size, 1)


def geometry(conv: Any, shape: tuple[int, ...]) -> ConvGeometry:
    """The geometry of a Flax convolution, of either kind, for an input of spatial ``shape``."""
    if is_transposed(conv):
        return _transposed_geometry(conv, shape)
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


def _transposed_geometry(conv: Any, shape: tuple[int, ...]) -> ConvGeometry:
    """Flax pads the spread input for a kernel that slides; the core cuts off the full output."""
    kernel = kernel_size(conv)
    rank = len(kernel)
    strides, dilation = _per_axis(conv.strides, rank), _per_axis(conv.kernel_dilation, rank)
    pads = []
    for i, (n, k, s, d) in enumerate(zip(shape, kernel, strides, dilation, strict=True)):
        reach = d * (k - 1)
        if conv.padding == "SAME":
            before = reach if s > reach else -(-(reach + s - 1) // 2)
            pads.append((reach - before, before - s + 1))
        elif conv.padding == "VALID":
            pads.append((0, min(reach + 1 - s, 0)))
        elif conv.padding == "CIRCULAR":  # VALID, padded to whole periods that are then summed
            missing = (n * s - ((n - 1) * s + max(reach + 1, s))) % (2 * n * s)
            pads.append((-((missing + (not conv.transpose_kernel)) // 2), 0))
        else:
            given = conv.padding if isinstance(conv.padding, int) else conv.padding[i]
            before, after = (given, given) if isinstance(given, int) else given
            pads.append((reach - before, reach - after))
    return _geometry(
        kernel,
        stride=strides,
        padding=tuple(pads),
        dilation=dilation,
        transposed=True,
        padding_mode="circular" if conv.padding == "CIRCULAR" else "zeros",
    )


def is_transposed(conv: Any) -> bool:
    """Whether a Flax layer is a transposed convolution."""
    return hasattr(conv, "transpose_kernel")


def is_reversed(conv: Any) -> bool:
    """Whether a Flax layer keeps its taps in the reverse of the canonical order.

    A transposed convolution's kernel is one that slides over the spread input, where torch's adds
    to the output, unless ``transpose_kernel`` says that it is the kernel of a convolution.
    """
    return is_transposed(conv) and not conv.transpose_kernel


def input_axis(conv: Any) -> int:
    """Which axis of a Flax kernel is the input channels'."""
    return -1 if is_transposed(conv) and conv.transpose_kernel else -2


def split_kernel(fused: jax.Array, features: int, axis: int) -> tuple[jax.Array, jax.Array]:
    """The two kernels in one whose ``axis`` holds the features and then the coordinates.

    Returns:
        The feature kernel, laid out alike, and the coordinate kernel ``(*kernel_size, n, out)``.
    """
    kernel, coordinates = jnp.split(fused, [features], axis)
    return kernel, coordinates.swapaxes(-1, -2) if axis == -1 else coordinates


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
@partial(jax.jit, static_argnums=(2, 3, 4, 5), inline=True)
def add_position_bias(
    output: jax.Array,
    coord_kernel: jax.Array,
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: tuple[int, ...],
    reverse: bool,
) -> jax.Array:
    """The ``output (..., *output shape, out)`` of a convolution, and its coordinates' share.

    The arguments are those of :func:`position_bias`; the sum is rounded once.
    """
    bias = position_bias(coord_kernel, geometry, coords, shape, reverse)
    batch = math.prod(output.shape[: -bias.ndim])
    if batch > 1:
        # As a product, since the gradient of that is one, too: XLA takes many times as long to sum
        # over the batch, on a CPU. Forward it sees through the product, and just adds.
        ones = jnp.ones((batch, 1), bias.dtype)
        repeated = jnp.matmul(ones, bias.reshape(1, -1), precision=_HIGHEST)
        bias = repeated.reshape(output.shape)
    return (output + bias).astype(output.dtype)


def position_bias(
    coord_kernel: jax.Array,
    geometry: ConvGeometry,
    coords: Coordinates,
    shape: tuple[int, ...],
    reverse: bool = False,
) -> jax.Array:
    """What the coordinates add to the output of a convolution, for every sample alike.

    Args:
        coord_kernel: shape ``(*kernel_size, n, out)``.
        geometry: the convolution.
        coords: its coordinate channels.
        shape: the spatial shape of its input.
        reverse: the kernel's taps are in the reverse of the canonical order.

    Returns:
        An array of shape ``(*output shape, out)``, in the kernel's dtype, in float32 at least.
    """
    info = jnp.finfo(coord_kernel.dtype)
    kernel = coord_kernel if info.bits >= 32 else coord_kernel.astype(jnp.float32)
    if reverse:
        kernel = jnp.flip(kernel, tuple(range(geometry.rank)))
    arrays = core.shares(geometry, coords, shape, np.float64 if info.bits == 64 else np.float32)
    return _fused_map(jnp.moveaxis(kernel, (-1, -2), (0, 1)), arrays)  # type: ignore[no-any-return]


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _fused_map(kernel: jax.Array, arrays: tuple[core.Share, ...]) -> jax.Array:
    return _map(kernel, arrays, fused=True)


@_fused_map.defjvp
def _fused_map_jvp(
    arrays: tuple[core.Share, ...], kernel: tuple[jax.Array], tangent: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # The map is linear in the kernel. The gradient of products is products, which XLA leaves to a
    # library; the gradients of sums it would take one by one.
    return _fused_map(*kernel, arrays), _map(*tangent, arrays, fused=False)


def _map(kernel: jax.Array, arrays: tuple[core.Share, ...], fused: bool) -> jax.Array:
    with jax.default_matmul_precision("highest"):  # else accelerators multiply in fewer digits
        return core.position_bias(  # type: ignore[no-any-return]
            kernel,
            [share.converted(lambda a: jnp.asarray(a, kernel.dtype)) for share in arrays],
            convolve=_convolve,
            channels_last=True,
            fused=fused,
        )


def _convolve(share: core.Share, kernel: jax.Array) -> jax.Array:
    if share.flip:
        kernel = jnp.flip(kernel, tuple(range(2, kernel.ndim)))
    return lax.conv_general_dilated(
        share.padded[None],
        kernel,
        share.stride,
        "VALID",
        rhs_dilation=share.dilation,
    )[0]


def add_coords(inputs: jax.Array, coords: CoordinatesLike) -> jax.Array:
    """``inputs (N, *S, C)`` and the coordinate channels behind; see the adapters' ``AddCoords``."""
    _check_floating(inputs)
    grid = coordinate_grid(inputs.shape[1:-1], coords, dtype=np.float64)
    channels = jnp.asarray(np.moveaxis(grid, 0, -1), inputs.dtype)
    repeated = jnp.broadcast_to(channels, (len(inputs), *channels.shape))
    return jnp.concatenate([inputs, repeated], axis=-1)


def to_params(weights: Mapping[str, Array], *, reverse: bool = False) -> Params:
    """A layer's canonical weights under Flax's names and in its layout, as NumPy arrays.

    The kernel of a transposed convolution is reversed along its spatial axes: torch adds it to
    the output, ``lax.conv_transpose`` slides it (with ``transpose_kernel=False``, the default).
    """
    params = {}
    for name, array in weights.items():
        if array.ndim > 1:
            sides = (0, 1) if reverse and name == "weight" else (1, 0)
            array = np.moveaxis(array, sides, (-2, -1))
            array = np.flip(array, tuple(range(array.ndim - 2))) if reverse else array
        params[_NAMES[name]] = array
    return params


def to_weights(params: Mapping[str, Any], *, reverse: bool = False) -> dict[str, Array]:
    """The inverse of :func:`to_params`; copies, and bfloat16 becomes float32."""
    weights = {}
    for name in (name for name, flax_name in _NAMES.items() if flax_name in params):
        array = _array(params[_NAMES[name]])
        if array.ndim > 1:
            array = np.flip(array, tuple(range(array.ndim - 2))) if reverse else array
            sides = (0, 1) if reverse and name == "weight" else (1, 0)
            array = np.moveaxis(array, (-2, -1), sides)
        weights[name] = np.array(array, order="C")
    return weights


def layer_params(conv: Any, channels: int, out: int, mapping: Mapping[str, Array]) -> Params:
    """A CoordConv's parameters from canonical weights, or one error with all their problems."""
    transposed = is_transposed(conv)
    groups = 1 if transposed else conv.feature_group_count
    geometry = _geometry(kernel_size(conv), groups=groups, transposed=transposed)
    layer = networks.Conv("", channels, out, geometry, conv.coords, conv.use_bias)
    arrays = checked(mapping, layer.weight_shapes(), {"": conv.coords})
    return to_params(arrays, reverse=is_reversed(conv))


def network_params(network: networks.Network, mapping: Mapping[str, Array]) -> Params:
    """A network's parameters from canonical weights, or one error with all their problems."""
    arrays = checked(mapping, network.weight_shapes(), network.coordinates())
    return {
        layer.name: to_params(
            {name: arrays[f"{layer.name}.{name}"] for name in layer.weight_shapes()},
            reverse=_is_reversed(layer),
        )
        for layer in weighted(network)
    }


def network_weights(network: networks.Network, params: Mapping[str, Any]) -> Weights:
    """A network's canonical weights under dotted names."""
    weights = network.weights({})
    for layer in weighted(network):
        arrays = to_weights(params[layer.name], reverse=_is_reversed(layer))
        weights.update({f"{layer.name}.{name}": array for name, array in arrays.items()})
    return weights


def read_state(path: str) -> dict[str, Array]:
    """The arrays of an Orbax checkpoint by dotted name; see :mod:`coordconv.backends`."""
    import orbax.checkpoint as ocp  # slow to import, and only these files need it

    path = os.path.abspath(path)
    try:
        os.stat(os.path.join(path, "_METADATA"))
    except (FileNotFoundError, NotADirectoryError):
        os.stat(path)  # the system's own error, in its own words, if there is nothing at all
        patterns = "*/_METADATA", "*/*/_METADATA"  # a CheckpointManager's items, and of its steps
        inside = [os.path.dirname(f) for p in patterns for f in sorted(glob.glob(p, root_dir=path))]
        raise ValueError(
            f"{path} is not an Orbax checkpoint, a folder with a file _METADATA"
            + (f"; but there is one in it: name {' or '.join(inside[-3:])}" if inside else "")
        ) from None
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            listed = checkpointer.metadata(path).item_metadata
            if listed is None:
                raise ValueError("what it holds is not to be found out")
            # As NumPy, which is on no device, and has float64 whatever JAX is told.
            text = ocp.metadata.StringMetadata
            kind = jax.tree.map(
                lambda leaf: ocp.RestoreArgs(
                    restore_type=str if isinstance(leaf, text) else np.ndarray
                ),
                listed.tree,
            )
            tree = checkpointer.restore(path, restore_args=kind)
    except PermissionError:
        raise
    except Exception as error:  # Orbax and TensorStore have no error of their own for it
        raise ValueError(f"{path} is a damaged Orbax checkpoint: {error}") from error
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(p, simple=True, separator="."): _array(a) for p, a in leaves}
    for name, array in arrays.items():
        if array.dtype.isbuiltin == 2:  # a type that JAX adds to NumPy's: of 8 bits, or fewer
            raise ValueError(
                f"{path} holds what NumPy arrays by name cannot: not floating-point of 16 bits or "
                f"more: {name} is {array.dtype}"
            )
    return arrays


def from_state(network: networks.Network, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Canonical arrays from those of an NNX state, or of Linen's variables or train state.

    What else a train state has besides ``params`` is left out.
    """
    variables = {n.removeprefix("params."): a for n, a in arrays.items() if n.startswith("params.")}
    layers = {layer.name: layer for layer in weighted(network)}
    params: dict[str, Params] = {}
    found = {}
    for name, array in (variables or arrays).items():
        layer, _, param = name.removesuffix(".value").rpartition(".")  # an NNX state's own leaves
        if layer in layers and param in _NAMES.values():
            params.setdefault(layer, {})[param] = array
        else:
            found[name] = array
    for layer, own in params.items():
        canonical = to_weights(own, reverse=_is_reversed(layers[layer]))
        found.update({f"{layer}.{name}": array for name, array in canonical.items()})
    return found


def write_state(path: str, tree: Params) -> None:
    """Write an Orbax checkpoint, whole or not at all.

    Raises:
        OSError: there is something of that name already, or it cannot be written.
    """
    import orbax.checkpoint as ocp

    path = os.path.abspath(path)
    try:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "it exists; remove it or choose another name")
        with tempfile.TemporaryDirectory(".tmp", ".", os.path.dirname(path)) as folder:
            made = os.path.join(folder, "state")
            with ocp.PyTreeCheckpointer() as checkpointer:
                checkpointer.save(made, jax.tree.map(np.ascontiguousarray, tree))
            os.rename(made, path)
    except (OSError, ValueError) as error:  # TensorStore's, of a full disk say, are ValueErrors
        number = getattr(error, "errno", None) or errno.EIO
        reason = getattr(error, "strerror", None) or error
        raise OSError(number, f"cannot write weights: {reason}", path) from error


def weighted(network: networks.Network) -> list[networks.Conv | networks.Linear]:
    """The layers that have weights."""
    return [n for n in network.layers if isinstance(n, (networks.Conv, networks.Linear))]


def _is_reversed(layer: networks.Layer) -> bool:
    return isinstance(layer, networks.Conv) and layer.geometry.transposed


def conv_options(layer: networks.Conv) -> dict[str, Any]:
    """The options of a described convolution, as NNX and Linen both spell them.

    Raises:
        NotImplementedError: Flax's convolutions lack one, or XLA gets it wrong.
    """
    g = layer.geometry
    kernel, strides, dilation, extra, holes = g.per_axis
    common = {"kernel_size": kernel, "strides": strides, "kernel_dilation": dilation}
    padding: Any = g.padding
    if g.transposed:
        if g.groups > 1:
            raise NotImplementedError("Flax transposed convolutions have no groups")
        if g.padding_mode != "zeros":
            raise NotImplementedError("Flax's circular transposed convolutions have other offsets")
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        padding = [(r - p, r - q + e) for r, (p, q), e in zip(reach, padding, extra, strict=True)]
        _check_gradient(strides, padding)
        return {**common, "padding": padding, "use_bias": layer.bias}
    own = _centred(kernel, dilation)
    if padding == "same":  # at stride 1 it is the same for every input
        padding = "SAME" if max(strides) > 1 else own
    if g.padding_mode != "zeros" and padding != ((0, 0),) * g.rank:
        if g.padding_mode not in _PADDING_MODES.values() or padding != own:
            raise NotImplementedError(
                f"Flax convolutions have no padding_mode={g.padding_mode!r}, or not by this much"
            )
        padding = g.padding_mode.upper()
    if isinstance(padding, str) and max(holes) > 1:
        raise NotImplementedError(
            f"Flax convolutions have no padding={padding!r} with input_dilation"
        )
    if not isinstance(padding, str):
        _check_gradient(strides + holes, padding)
    return {
        **common,
        "padding": padding,
        "input_dilation": holes,
        "feature_group_count": g.groups,
        "use_bias": layer.bias,
    }


def _check_gradient(steps: tuple[int, ...], padding: Sequence[tuple[int, int]]) -> None:
    if max(steps) == 1 and any(before < 0 < after for before, after in padding):
        raise NotImplementedError(
            "XLA's gradient of a kernel is wrong where an axis is cut at its start and padded at "
            "its end, without coordinates too"
        )


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


def precision(dtype: str) -> AbstractContextManager[Any]:
    """Within it, JAX has the type ``dtype``: without leave it takes float64 for float32."""
    return jax.enable_x64(True) if dtype == "float64" else nullcontext()


def evaluate(
    apply: Apply, params: Any, x: Array, dy: Array | None, dtype: str, compiled: bool
) -> tuple[Array, Array | None, Any]:
    """The output for ``x`` and, for the output's gradient ``dy``, those of ``x`` and ``params``.

    All but ``params`` is channels first, as in :mod:`coordconv.backends`.
    """
    forward, backward = (_forward, _backward) if compiled else (_apply, _pull_back)
    # Comparisons are of float32: accelerators take shorter products unless told otherwise.
    with jax.default_matmul_precision("highest"):
        if dy is None:
            return _numpy(forward(apply, params, _channels_last(x, dtype))), None, None
        y, (of_params, of_x) = backward(
            apply, params, _channels_last(x, dtype), _channels_last(dy, dtype)
        )
    return _numpy(y), _numpy(of_x), of_params


def _apply(apply: Apply, params: Any, x: jax.Array) -> jax.Array:
    return apply(params, x)


def _pull_back(apply: Apply, params: Any, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, Any]:
    y, pull_back = jax.vjp(apply, params, x)
    return y, pull_back(dy)


_forward = jax.jit(_apply, static_argnums=0)
_backward = jax.jit(_pull_back, static_argnums=0)


def trainer(
    apply: Apply, params: Any, optimizer: str, epsilon: float
) -> tuple[Callable[[Array, Array, float], float], Callable[[], Any]]:
    """A training step, see :mod:`coordconv.backends`, and what returns the parameters it leaves."""
    rules = {"adam": optax.scale_by_adam(eps=epsilon), "sgd": optax.identity()}
    rule = rules[optimizer]
    state = rule.init(params)

    def loss(params: Any, x: jax.Array, target: jax.Array) -> jax.Array:
        y = apply(params, x)
        if jnp.issubdtype(target.dtype, jnp.floating):
            return optax.squared_error(y, target).mean()
        return optax.softmax_cross_entropy_with_integer_labels(y, target).mean()

    @jax.jit
    def update(params: Any, state: Any, rate: jax.Array, *batch: jax.Array) -> tuple[Any, ...]:
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        updates, state = rule.update(gradients, state)
        return value, jax.tree.map(lambda p, u: p - rate * u, params, updates), state

    def step(x: Array, target: Array, learning_rate: float) -> float:
        nonlocal params, state
        batch = _channels_last(x, "float32"), jnp.asarray(target)
        with jax.default_matmul_precision("highest"):
            value, params, state = update(params, state, jnp.float32(learning_rate), *batch)
        return float(value)

    return step, lambda: params


def recorded(
    run: Callable[..., Any],
    names: Names,
    output_gradient: Array | Mapping[str, Array] | None,
    channels_last: bool,
) -> Model:
    """A Flax model as a function on NumPy arrays, see the adapters' ``recorded``.

    Args:
        run: ``run(see, *inputs)`` runs it, and has ``see(name, output)`` in place of what each
            module in it returns. It is run twice if gradients are wanted.
        names: other names for its modules.
        output_gradient: the output's gradient, to have gradients recorded, too.
        channels_last: whether to move channels from axis 1 to the last and back.
    """
    to_jax, to_numpy = (_moved_last, _moved_first) if channels_last else (jnp.asarray, _array)

    def recording_run(*inputs: Array) -> Mapping[str, Array]:
        given = [to_jax(x) for x in inputs]
        recording = Recording(names)
        kept: dict[str, jax.Array] = {}

        def keep(name: str, part: Any) -> Any:
            if _is_array(part):
                kept[name] = part
                recording.keep(name, to_numpy(part))
            return part

        output = run(_untraced(lambda name, part: recording.visit(name, part, keep)), *given)
        intermediates = {name: part for name, part in kept.items() if _is_floating(part)}
        recording.end(output, keep)
        found = recording.found()
        if output_gradient is None:
            return in_order(found)
        ends = [name for name in kept if name not in intermediates and _is_floating(kept[name])]
        gradients = given_gradients(output_gradient, {name: found[name].shape for name in ends})
        points = {i: x for i, x in enumerate(given) if _is_floating(x)}
        reached: set[str] = set()  # not what is traced only where gradients are taken

        def perturbed(
            perturbations: dict[str, jax.Array], points: dict[int, jax.Array]
        ) -> dict[str, jax.Array]:
            again, outputs = Recording(names), {}

            def add(name: str, part: Any) -> Any:
                if name not in perturbations:
                    return part
                reached.add(name)
                return part + perturbations[name]

            def end(name: str, part: Any) -> None:
                if name in gradients:
                    outputs[name] = part

            inputs = [points.get(i, x) for i, x in enumerate(given)]
            output = run(_untraced(lambda name, part: again.visit(name, part, add)), *inputs)
            mapped(end, OUTPUT, output)
            return outputs

        zeros = {name: jnp.zeros_like(part) for name, part in intermediates.items()}
        _, pull_back = jax.vjp(perturbed, zeros, points)
        of_intermediates, of_inputs = pull_back(
            {name: to_jax(g).astype(kept[name].dtype) for name, g in gradients.items()}
        )
        of_all = {
            name: of_inputs[i] for i, name in enumerate(input_names(len(given))) if i in points
        }
        of_all |= {name: of_intermediates[name] for name in intermediates if name in reached}
        return in_order(found, ((name, to_numpy(g)) for name, g in of_all.items()))

    return recording_run


def _untraced(see: See) -> See:
    """``see``, but not inside a scan or a jitted function of the model's own.

    There are no values there, and whether a call is traced once more depends on JAX's caches.
    """
    state = get_opaque_trace_state(convention="flax")  # as Flax itself tells where it runs

    def seen(name: str, output: Any) -> Any:
        here = get_opaque_trace_state(convention="flax") == state
        return see(name, output) if here else output

    return seen


def see_once(running: set[int], module: Any, name: str, see: See, call: Callable[[], Any]) -> Any:
    """What ``module`` returns, as seen; but within its own call, as from super(), only returned."""
    if id(module) in running:
        return call()
    running.add(id(module))
    try:
        output = call()
    finally:
        running.discard(id(module))
    return see(name, output)


def _is_array(part: Any) -> bool:
    """Whether these are numbers, which keys of random numbers are not."""
    return isinstance(part, jax.Array) and not jnp.issubdtype(part.dtype, jax.dtypes.extended)


def _is_floating(part: jax.Array) -> bool:
    return jnp.issubdtype(part.dtype, jnp.floating)


def _moved_last(x: Array) -> jax.Array:
    return jnp.asarray(np.moveaxis(x, 1, -1) if x.ndim > 2 else x)


def _moved_first(x: Any) -> Array:
    array = _array(x)
    return np.array(np.moveaxis(array, -1, 1), order="C") if array.ndim > 2 else array


def _numpy(x: jax.Array) -> Array:
    return np.array(np.moveaxis(_array(x), -1, 1), order="C")


def _array(x: Any) -> Array:
    array = np.asarray(x)
    # NumPy has no bfloat16; float32 holds every value of it
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _channels_last(x: Array, dtype: str) -> jax.Array:
    # In NumPy: outside of a jitted function jnp would compile the transposition for each shape.
    return jnp.asarray(np.moveaxis(x, 1, -1), dtype)
