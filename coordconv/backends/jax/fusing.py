"""What ``fuse`` of NNX and of Linen share: the constant map, and which norm is a layer's alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax import numpy as jnp

from coordconv.backends.jax import adding, options
from coordconv.backends.jax.arrays import layer_arrays, layer_params, to_numpy
from coordconv.coordinates import Coordinates
from coordconv.fusing import Poison, folded, followed_alone
from coordconv.geometry import ConvGeometry, is_int
from coordconv.grid import Array
from coordconv.layers import FixedCoords

STATISTICS = ("mean", "var", "scale", "bias")  # of a batch normalization; the last two are optional


def check_layer(layer: Any, kernel: jax.Array, name: str = "") -> None:
    """ValueError if a layer cannot be split into a convolution and a map before its call."""
    what = f"{name!r} ({type(layer).__name__})" if name else type(layer).__name__
    if not type(layer).__call__.__module__.startswith("coordconv."):
        raise ValueError(
            f"{what} has a __call__ of its own, which would be lost: use the CoordConv inside a "
            "module instead"
        )
    if adding.has_own_step(layer):
        raise ValueError(
            f"{what} has a conv_general_dilated of its own, which is given features and "
            "coordinates: it cannot be fused"
        )
    rank = len(options.kernel_size(layer))
    if kernel.ndim != rank + 2:
        raise ValueError(
            f"{what} must have a kernel of {rank + 2} axes, got {kernel.shape}: what a scan or "
            "vmap made of a layer cannot be fused"
        )


def checked_size(size: Any, rank: int) -> tuple[int, ...]:
    """A spatial shape as a tuple of ints."""
    if not isinstance(size, Sequence):
        raise TypeError(f"size must be a spatial shape, got {size!r}")
    given = tuple(size)
    if len(given) != rank or not all(is_int(n) and n > 0 for n in given):
        raise ValueError(f"size must have {rank} lengths of at least 1, got {given}")
    return tuple(map(int, given))


def made_map(
    geometry: ConvGeometry, coords: Coordinates, shape: Sequence[Any], kernel: jax.Array
) -> jax.Array:
    """P for an input of ``shape``, checked, as in :func:`adding.position_bias`."""
    if all(map(is_int, shape)):
        geometry.output_shape(tuple(shape))  # which says what does not fit
    return adding.position_bias(geometry, coords, shape, kernel)


def spatial_shape(conv: Any, inputs: Any) -> tuple[Any, ...]:
    """The spatial shape of ``inputs (..., *S, C)``."""
    return tuple(inputs.shape[-1 - len(options.kernel_size(conv)) : -1])


def folds(layer: Any, kernel: jax.Array, norm: Any, statistics: Iterable[jax.Array]) -> bool:
    """Whether a norm is over the channels alone, and leaves the type of the layer's output."""
    return (
        norm.axis == -1
        and norm.dtype == layer.dtype
        and all(array.dtype == kernel.dtype for array in statistics)
        and getattr(layer, "preferred_element_type", None) is None
        and getattr(norm, "promote_dtype", layer.promote_dtype) == layer.promote_dtype
    )


def folded_params(
    layer: Any, params: Mapping[str, Any], statistics: Mapping[str, Any], epsilon: float
) -> dict[str, jax.Array]:
    """A layer's kernel and bias, with the batch normalization after the layer folded in."""
    weights = layer_arrays(params, reverse=options.is_reversed(layer))
    given = {"scale": jnp.ones_like(statistics["mean"]), "bias": jnp.zeros_like(statistics["mean"])}
    values = [to_numpy({**given, **statistics}[name]) for name in STATISTICS]
    found = folded(weights, values, epsilon, transposed=options.is_transposed(layer))
    arrays = layer_params(found, reverse=options.is_reversed(layer))
    return {name: jnp.array(array, params["kernel"].dtype) for name, array in arrays.items()}


@dataclass
class Seen:
    """The calls of CoordConvs and of batch normalizations in one run of a network, by name.

    Of each the module, its first argument, and its output.
    """

    calls: dict[str, list[tuple[Any, Any, Any]]] = field(default_factory=dict)

    def watch(self, name: str, module: Any, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        """The output of ``call()``, which is noted; ValueError for a norm in training."""
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(module, FixedCoords):
            given = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
            given = module.use_running_average if given is None else given
            if not given:
                raise ValueError(training(name))
        output = call()
        self.calls.setdefault(name, []).append((module, x, output))
        return output

    def sizes(self) -> dict[str, list[tuple[int, ...]]]:
        """The spatial shapes that each layer saw, each once."""
        return {
            name: list(dict.fromkeys(spatial_shape(module, x) for module, x, _ in calls))
            for name, calls in self.calls.items()
            if isinstance(calls[0][0], FixedCoords)
        }

    def pairs(self) -> dict[str, str]:
        """The norm that was given the very array that a layer returned, each called once."""
        # Not inside a transformation, whose values are none outside of it.
        once = {
            name: calls[0]
            for name, calls in self.calls.items()
            if len(calls) == 1 and not isinstance(calls[0][2], jax.core.Tracer)
        }
        layers = {
            id(output): name
            for name, (module, _, output) in once.items()
            if isinstance(module, FixedCoords)
        }
        return {
            layers[id(x)]: name
            for name, (module, x, _) in once.items()
            if not isinstance(module, FixedCoords) and id(x) in layers
        }

    def alone(
        self,
        pairs: Mapping[str, str],
        outputs: Callable[[Mapping[str, str], Poison, set[str]], Any],
    ) -> tuple[dict[str, str], tuple[str, ...]]:
        """Of ``pairs`` those whose layer and norm nothing else uses, and notes about the others.

        ``outputs(poisoned, poison, names)`` runs the network with poison for the parameters of the
        layers and norms in ``poisoned``, whose calls :meth:`poisoned` makes. It returns the output,
        and the state of all modules but those in ``names``. Poison is so what a use inside a
        transformation finds as well, that of a cached trace included.
        """
        if not pairs:
            return {}, ()

        names = {*pairs, *pairs.values()}

        def arrays(poisoned: Mapping[str, str], poison: Poison) -> list[Array]:
            with jax.debug_nans(False):
                leaves = jax.tree.leaves(outputs(poisoned, poison, names))
            return [to_numpy(leaf) for leaf in leaves if _is_array(leaf)]

        found = followed_alone(pairs, arrays)
        notes = (
            f"{norm} is left: it could not be shown that nothing else takes the output of {name}"
            for name, norm in pairs.items()
            if name not in found
        )
        return found, tuple(notes)

    def poisoned(
        self, name: str, poisoned: Mapping[str, str], poison: Poison, call: Callable[[], Any]
    ) -> Any:
        """What a module returns in a run with poison: norms what they returned before."""
        if name in poisoned.values():
            return self.calls[name][0][2]
        output = call()
        return poison_like(output, poison) if name in poisoned else output


def poison_like(array: Any, poison: Poison) -> jax.Array:
    """Poison of an array's shape and type."""
    return jnp.asarray(poison(array.shape)).astype(array.dtype)


def training(name: str) -> str:
    """What is wrong with a batch normalization in training."""
    return (
        "model must be in evaluation mode, with use_running_average=True in each batch "
        f"normalization: {name!r} is not"
    )


def _is_array(leaf: Any) -> bool:
    """Whether these are numbers, which keys of random numbers are not."""
    return isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
