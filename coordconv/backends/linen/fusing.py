"""Variables of Linen for inference alone: of each CoordConv the features' part, and a map.

In inference P does not change, so that :func:`fuse` splits each kernel once and keeps P. That is
asked for by the user, since what is kept no longer follows the kernel. A Linen module holds no
variables, so that it stays as it is: a layer finds its maps among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.core import DenyList, meta, unfreeze
from jax import numpy as jnp

from coordconv.backends.jax import adding, fusing, options
from coordconv.backends.jax.layers import masked
from coordconv.fusing import FusedLayer, FuseReport, Poison
from coordconv.layers import FixedCoords

MAPS = "coordconv"  # the collection: of each fused layer a map for each size, under its name


def size_name(shape: Sequence[Any]) -> str:
    """The name of the map for an input's spatial shape, such as ``"32x48"``."""
    return "x".join(map(str, shape))


def map_for(maps: Mapping[str, jax.Array], shape: Sequence[Any]) -> jax.Array:
    """The map of a fused layer for an input's spatial shape."""
    if size_name(shape) not in maps:
        raise ValueError(
            f"input must have a size that was fused, {' or '.join(maps)}, got {size_name(shape)}"
        )
    return maps[size_name(shape)]


def fuse(
    model: nn.Module,
    variables: Mapping[str, Any],
    *inputs: Any,
    batch_norm: bool = True,
    **kwargs: Any,
) -> tuple[dict[str, Any], FuseReport]:
    """Variables with which a trained network computes the same, with plain convolutions and maps.

    Args:
        model: the network.
        variables: those that it was trained to. They are not changed, and still serve training.
        inputs: an example of all arguments. The network is run a few times to see the size at each
            layer and what follows it; of each size that a layer saw it gets a map.
        batch_norm: whether to fold the batch normalization after a CoordConv into it, where the
            runs show that nothing else takes the layer's output. It then does nothing.
        kwargs: what ``model.apply`` takes besides, such as ``train=False`` or ``rngs``.

    Returns:
        The variables, for inputs of the same size, and a :class:`coordconv.fusing.FuseReport`, to
        be printed. The maps are in the collection ``"coordconv"``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no CoordConv was called, or one cannot be split before its call: it has a
            ``__call__`` or a ``conv_general_dilated`` of its own; a batch normalization is in
            training; the variables are fused ones. When a fused network is applied, an input of
            another size.

    Example:
        >>> from coordconv.backends.linen import CoordConv
        >>> norm = nn.BatchNorm(use_running_average=True)
        >>> net, x = nn.Sequential([CoordConv(8, (3, 3)), norm]), jnp.ones((2, 16, 20, 3))
        >>> variables = net.init(jax.random.key(0), x)
        >>> fused, report = fuse(net, variables, x)
        >>> print(report)
        layers_0  CoordConv  one map for 16x20  folded layers_1
        >>> bool(jnp.allclose(net.apply(fused, x), net.apply(variables, x), atol=1e-5))
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a flax.linen.Module, got {type(model).__name__}")
    if MAPS in variables:
        raise ValueError(f"variables are fused: they have a collection {MAPS!r}")
    seen, found = fusing.Seen(), _Stored(variables)

    def note(name: str, module: Any, call: Any, *_: Any) -> Any:
        found.note(name, module)
        return call()

    def poisoned(pairs: Mapping[str, str], poison: Poison, names: set[str]) -> Any:
        changes = {*pairs, *pairs.values()}
        changed = found.changed(changes, lambda a: fusing.poison_like(a, poison))
        output, state = _run(
            model,
            changed,
            inputs,
            kwargs,
            lambda name, module, call, *_: seen.poisoned(name, pairs, poison, call),
        )
        flat = traverse_util.flatten_dict(unfreeze(state))
        return output, [leaf for key, leaf in flat.items() if ".".join(key[1:-1]) not in names]

    _run(model, variables, inputs, kwargs, seen.watch)
    sizes = seen.sizes()
    if not sizes:
        raise ValueError("model has no CoordConv to fuse, or called none")
    found.paths = {name: calls[0][0].path for name, calls in seen.calls.items()}
    _run(model, found.changed({*seen.calls}, _other), inputs, kwargs, note)
    modules = {name: calls[0][0] for name, calls in seen.calls.items()}
    layers = {name: modules[name] for name in sizes if found.is_plain(name)}
    for name, layer in layers.items():
        fusing.check_layer(layer, found[name]["kernel"], name)
    notes = tuple(
        f"{name} is left: a transformation stands between the variables and the layer"
        for name in sizes
        if name not in layers
    )
    pairs, more = seen.alone(
        {
            name: norm
            for name, norm in seen.pairs().items()
            if batch_norm
            and name in layers
            and found.is_plain(norm)
            and _folds(layers[name], found[name], modules[norm], found[norm])
        },
        poisoned,
    )
    rows = []
    for name, layer in layers.items():
        params = found[name] | {"kernel": masked(found[name]["kernel"], layer.mask)}
        if name in pairs:
            norm = modules[pairs[name]]
            params = fusing.folded_params(layer, params, found[pairs[name]], norm.epsilon)
            found.replace(pairs[name], _identity(norm, found[pairs[name]]))
        features, coordinates = adding.split(layer, params["kernel"])
        x = seen.calls[name][0][1]
        kernel = layer.promote_dtype(x, coordinates, None, dtype=layer.dtype)[1]
        shift = None if layer.use_bias else params.pop("bias", None)
        found.replace(name, params | {"kernel": features})
        for size in sizes[name]:
            geometry = options.geometry(layer, size)
            made = fusing.made_map(geometry, layer.coords, size, kernel)
            found.add_map(name, size, made if shift is None else made + shift.astype(made.dtype))
            rows.append(FusedLayer(name, type(layer).__name__, size, pairs.get(name)))
    return found.variables(), FuseReport(tuple(rows), (*notes, *more))


def _other(array: jax.Array) -> jax.Array:
    """Values that are no fixed point of what computes weights, as trained ones may be."""
    return (1.37 * array + 0.61).astype(array.dtype)


class _Stored:
    """The variables of a network by module, and which modules use them as they are."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        given: Any = variables
        self._flat = traverse_util.flatten_dict(unfreeze(given), keep_empty_nodes=True)
        self._plain: dict[str, bool] = {}
        self.paths: dict[str, tuple[str, ...]] = {}

    def __getitem__(self, name: str) -> dict[str, Any]:
        """The arrays of a module, of all collections."""
        return {key[-1]: meta.unbox(self._flat[key]) for key in self._keys(name)}

    def _keys(self, name: str) -> list[tuple[str, ...]]:
        return [key for key in self._flat if key[1:-1] == self.paths[name]]

    def changed(self, names: set[str], change: Callable[[jax.Array], jax.Array]) -> Any:
        """The variables with others for those of some modules."""
        keys = {key for name in names for key in self._keys(name)}
        flat = {
            key: jax.tree.map(change, leaf) if key in keys else leaf
            for key, leaf in self._flat.items()
        }
        return traverse_util.unflatten_dict(flat)

    def note(self, name: str, module: Any) -> None:
        """Whether a module sees, in all its calls, its variables as :func:`_other` changed them."""
        flat = traverse_util.flatten_dict(unfreeze(meta.unbox(module.variables)))
        seen, wanted = {key[-1]: leaf for key, leaf in flat.items()}, self[name]
        plain = seen.keys() == wanted.keys() and all(
            not isinstance(seen[key], jax.core.Tracer)
            and np.array_equal(seen[key], _other(jnp.asarray(array)))
            for key, array in wanted.items()
        )
        self._plain[name] = plain and self._plain.get(name, True)

    def is_plain(self, name: str) -> bool:
        """Whether no transformation stands between the variables and a module."""
        return self._plain[name]

    def replace(self, name: str, arrays: Mapping[str, Any]) -> None:
        """Arrays for a module's own, in the boxes of those."""
        for key in self._keys(name):
            self._flat[key] = meta.replace_boxed(self._flat[key], arrays[key[-1]])

    def add_map(self, name: str, size: tuple[int, ...], made: jax.Array) -> None:
        self._flat[MAPS, *self.paths[name], size_name(size)] = made

    def variables(self) -> Any:
        return traverse_util.unflatten_dict(self._flat)


def _run(
    model: nn.Module, variables: Any, inputs: Any, kwargs: Any, see: Callable[..., Any]
) -> tuple[Any, Any]:
    """The output and the state, where ``see(name, module, call, args, kwargs)`` calls modules."""

    def intercept(call: Any, args: Any, options: Any, context: Any) -> Any:
        module, called = context.module, lambda: call(*args, **options)
        convolves = isinstance(module, FixedCoords) and isinstance(
            module, (nn.Conv, nn.ConvTranspose)
        )
        ours = convolves or isinstance(module, nn.BatchNorm)
        if context.method_name != "__call__" or not ours:
            return called()
        return see(".".join(module.path), module, called, args, options)

    with jax.disable_jit(), nn.intercept_methods(intercept):
        # All but the parameters, so that what modules sow is seen as well.
        found: Any = model.apply(variables, *inputs, mutable=DenyList("params"), **kwargs)
    return found  # type: ignore[no-any-return]


def _folds(layer: Any, params: Any, norm: Any, statistics: Mapping[str, Any]) -> bool:
    # That class alone, as a subclass may compute anything.
    known = type(norm) is nn.BatchNorm and _identity(norm, statistics) is not None
    return known and fusing.folds(layer, params["kernel"], norm, statistics.values())


def _identity(norm: Any, statistics: Mapping[str, jax.Array]) -> Any:
    """Statistics with which a norm computes its input, to the bit; None if there are none."""
    ones = jnp.ones_like(statistics["var"])
    variance = ones - norm.epsilon
    if not bool((variance + norm.epsilon == ones).all()):
        return None
    found = {"mean": ones - 1, "var": variance}
    return found | {
        name: jnp.full_like(statistics[name], value)
        for name, value in (("scale", 1), ("bias", 0))
        if name in statistics
    }
