"""NNX layers and networks for inference alone: a plain convolution, and a map made once.

In inference P does not change, so that :func:`fuse` splits the kernel once and keeps P. That is
asked for by the user, since what is kept no longer follows the kernel.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from coordconv.backends.flax import converting, graph
from coordconv.backends.flax.recording import watched
from coordconv.backends.jax import adding, fusing, options
from coordconv.backends.jax.layers import masked
from coordconv.fusing import FusedLayer, FuseReport, Poison, example
from coordconv.layers import CoordLayer
from coordconv.windows import check_fused


class Constant(nnx.Variable):  # type: ignore[type-arg]
    """What a fused layer keeps beside its convolution; no optimizer of ``nnx.Param`` trains it."""


class FusedCoordConv(nnx.Module):
    """What a CoordConv computes in inference: ``conv``, a plain convolution, and P, a constant map.

    Made by the layer's ``fuse(size)``. With a ``size`` the ``map (*output size, out)`` is a
    ``Constant``; without, ``coordinates``, that part of the kernel, is one, and each call, or
    program that is compiled, makes its map. Fuse a layer in the type that it is to run in.

    Shape:
        as the layer, with inputs of ``size`` alone if there is one.

    Raises:
        ValueError: as for the layer's ``fuse``; at the call, an input of another size than
            ``size``, or of a wider type than the map.
    """

    def __init__(
        self,
        layer: Any,
        size: Sequence[int] | None = None,
        params: Mapping[str, jax.Array] | None = None,
    ) -> None:
        params = _params(layer) if params is None else params
        rank = len(options.kernel_size(layer))
        self.map: Constant | None
        self.coordinates: Constant | None
        self.coords = layer.coords
        self.size = None if size is None else fusing.checked_size(size, rank)
        features, coordinates = adding.split(layer, params["kernel"])
        self.conv = _plain(layer, features, params.get("bias"))
        if self.size is None:
            self.coordinates, self.map = Constant(coordinates), None
        else:
            made = self._made(self.size, self._promoted(coordinates, coordinates))
            self.coordinates, self.map = None, Constant(made)

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The layer's output."""
        check_fused()
        conv = self.conv
        adding.check(conv, self.coords, inputs, conv.in_features)
        shape = fusing.spatial_shape(conv, inputs)
        if self.size is not None and shape != self.size:
            raise ValueError(f"input must have the size that was fused, {self.size}, got {shape}")
        if self.map is not None:
            return adding.add_made(conv(inputs, *args, **kwargs), self.map[...])
        coordinates: Any = self.coordinates
        added = self._made(shape, self._promoted(inputs, coordinates[...]))
        return adding.add(conv(inputs, *args, **kwargs), added)

    def _made(self, shape: tuple[Any, ...], kernel: jax.Array) -> jax.Array:
        geometry = options.geometry(self.conv, shape)
        return fusing.made_map(geometry, self.coords, shape, kernel)

    def _promoted(self, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        """The kernel in the type that the convolution computes in."""
        return self.conv.promote_dtype((inputs, kernel, None), dtype=self.conv.dtype)[1]  # type: ignore[no-any-return]


class Folded(nnx.Module):
    """What stands where a batch normalization stood that was folded into a layer."""

    def __call__(self, x: jax.Array, *_: Any, **__: Any) -> jax.Array:
        """The input."""
        return x


def _params(layer: Any, name: str = "") -> dict[str, jax.Array]:
    """The masked kernel and the bias of a layer that can be fused."""
    for which in ("kernel", "bias"):
        variable = getattr(layer, which)
        if isinstance(variable, nnx.Variable) and converting.is_computed(variable):
            raise ValueError(
                f"{which} of {name or type(layer).__name__} must hold its values, and computes "
                "them when it is read, so that a part of it would be computed by itself: fuse a "
                "layer with its values in a plain nnx.Param"
            )
    kernel = masked(layer.kernel[...], layer.mask)
    fusing.check_layer(layer, kernel, name)
    has_bias = layer.use_bias and layer.bias is not None  # which may have been set since
    return {"kernel": kernel} | ({"bias": layer.bias[...]} if has_bias else {})


def _plain(layer: Any, features: jax.Array, bias: jax.Array | None) -> Any:
    """NNX's own convolution with a layer's options and the features' part of its kernel."""
    kind = nnx.ConvTranspose if options.is_transposed(layer) else nnx.Conv
    # A convolution keeps what it is constructed with, but the functions that draw its parameters.
    names = inspect.signature(kind.__init__).parameters.keys() & vars(layer).keys()
    kept = {name: getattr(layer, name) for name in names if not name.endswith("_init")}
    zeros: Any = nnx.initializers.zeros
    kept |= {"use_bias": bias is not None, "mask": None, "kernel_init": zeros}
    conv: Any = kind(**kept, rngs=nnx.Rngs(0))
    conv.kernel = layer.kernel.replace(features)  # with its metadata, such as a sharding
    if bias is not None:
        conv.bias = nnx.Param(bias) if layer.bias is None else layer.bias.replace(bias)
    return conv


def fuse(model: nnx.Module, size: Any = None, batch_norm: bool = True) -> Any:
    """A copy of a trained network, with each CoordConv as a plain convolution and a constant map.

    Args:
        model: the network, in evaluation mode: ``use_running_average`` is True in each
            ``nnx.BatchNorm``.
        size: the spatial shape of the network's input, or an example of its input (an array, or a
            tuple of all arguments): the network is run a few times to see the size at each layer,
            and a layer that saw one size keeps one map. Others make theirs as inputs come, in
            each program that is compiled.
        batch_norm: whether to fold the batch normalization after a CoordConv into it. With a
            ``size`` the runs tell which one comes after it, and that nothing else takes the
            layer's output; without, the neighbours in a network that is an ``nnx.Sequential``, and
            in those right in it, do.

    Returns:
        The copy; its ``fuse_report`` is a :class:`coordconv.fusing.FuseReport`, to be printed.

    Raises:
        TypeError: ``model`` is no module; another ``size``.
        ValueError: there is no CoordConv, or one cannot be split before its call, as in an
            ``nnx.WeightNorm`` or of a Variable that computes its value; a batch normalization is in
            training.

    Example:
        >>> from coordconv.backends.flax import CoordConv
        >>> rngs = nnx.Rngs(0)
        >>> net = nnx.Sequential(CoordConv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs))
        >>> net.eval()
        >>> fused = fuse(net, size=(16, 20))
        >>> print(fused.fuse_report)
        layers.0  CoordConv  one map for 16x20  folded layers.1
        >>> x = jnp.ones((2, 16, 20, 3))
        >>> bool(jnp.allclose(fused(x), net(x), atol=1e-5))
        True
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax.nnx.Module, got {type(model).__name__}")
    model = nnx.clone(model)
    modules: dict[str, Any] = {".".join(map(str, p)): m for p, m in nnx.iter_graph(model)}
    layers = {name: m for name, m in modules.items() if isinstance(m, CoordLayer)}
    norms = {name: m for name, m in modules.items() if isinstance(m, nnx.BatchNorm)}
    if not layers:
        raise ValueError("model has no CoordConv to fuse")
    for name, module in modules.items():
        inside = nnx.iter_graph(module) if isinstance(module, graph.COMPUTING) else ()
        if any(isinstance(each, CoordLayer) for _, each in inside):
            raise ValueError(
                f"{name!r} ({type(module).__name__}) computes the kernel of a CoordConv at each "
                "call: use the CoordConv without it"
            )
    params = {name: _params(layer, name) for name, layer in layers.items()}
    for name, norm in norms.items():
        if norm.use_running_average is False:
            raise ValueError(f"{fusing.training(name)}: call model.eval()")
    noise = partial(_noise, model, size)
    inputs = None if size is None else example(size, (jax.Array, np.ndarray), noise)
    seen, notes = fusing.Seen(), tuple[str, ...]()
    if inputs is not None:
        _run(nnx.clone(model), inputs, seen.watch)
    found = seen.pairs() if inputs else dict(_neighbours(modules))
    pairs = {
        name: norm
        for name, norm in found.items()
        if batch_norm and _folds(layers[name], params[name], norms[norm])
    }
    if inputs is not None:
        pairs, notes = seen.alone(pairs, lambda *given: _poisoned(model, inputs, seen, *given))
    elif batch_norm and norms:
        notes = (
            "batch normalizations in other modules than nnx.Sequential are left: no size was given",
        )
    sizes = seen.sizes()
    if inputs is not None and "" in layers:
        sizes[""] = [fusing.spatial_shape(model, inputs[0])]
    new, rows = dict[int, nnx.Module](), []
    for name, layer in layers.items():
        if name in pairs:
            norm = norms[pairs[name]]
            statistics = _statistics(norm)
            params[name] = fusing.folded_params(layer, params[name], statistics, norm.epsilon)
            new[id(norm)] = Folded()
        seen_sizes = sizes.get(name, [])
        fused = FusedCoordConv(layer, seen_sizes[0] if len(seen_sizes) == 1 else None, params[name])
        new[id(layer)] = fused
        rows.append(FusedLayer(name, type(layer).__name__, fused.size, pairs.get(name)))
    copied: Any = new.get(id(model), model)
    if copied is model:
        graph.replace(model, new)
    copied.fuse_report = FuseReport(tuple(rows), notes)
    return copied


def _noise(model: nnx.Module, size: Any) -> jax.Array:
    """Noise of a spatial shape, with the features of the layer that takes the input.

    Which one that is, the order of attributes does not tell, as a transformation such as
    ``nnx.jit`` sorts them: so it is tried.
    """
    modules: Any = [m for _, m in nnx.iter_graph(model) if hasattr(m, "kernel")]
    layers = [m for m in modules if isinstance(getattr(m, "in_features", None), (int, np.integer))]
    draw, errors = np.random.default_rng(0).standard_normal, dict[int, Exception]()
    for features, dtype in {m.in_features: m.kernel.dtype for m in layers}.items():
        noise = jnp.asarray(draw((1, *size, features)), dtype)
        run: Any = nnx.clone(model)
        try:
            run(noise)
        except Exception as error:  # noqa: BLE001  # it runs the user's code
            errors[features] = error
        else:
            return noise
    tried = "".join(f"\n  {features} features: {error}" for features, error in errors.items())
    raise ValueError(f"size must be an example of the input: the network takes no noise of{tried}")


def _run(model: Any, inputs: tuple[Any, ...], see: Callable[..., Any]) -> Any:
    """The output, where ``see(name, module, call, args, kwargs)`` calls our layers and norms."""

    def watch(module: Any, name: str, call: Any) -> Any:
        if not isinstance(module, (CoordLayer, nnx.BatchNorm)):
            return call()
        return see(name, module, call, call.args[1:], call.keywords)

    with jax.disable_jit(), watched(model, watch):
        return model(*inputs)


def _poisoned(
    model: Any,
    inputs: tuple[Any, ...],
    seen: fusing.Seen,
    poisoned: Mapping[str, str],
    poison: Poison,
    names: set[str],
) -> Any:
    """The output of a run with poison for some parameters, and the state of all but ``names``."""
    model, changed = nnx.clone(model), {*poisoned, *poisoned.values()}
    for path, variable in [*nnx.iter_graph(model)]:
        if isinstance(variable, nnx.Variable) and _parent(path) in changed:
            variable[...] = fusing.poison_like(variable[...], poison)

    def see(name: str, _: Any, call: Callable[[], Any], *__: Any) -> Any:
        return seen.poisoned(name, poisoned, poison, call)

    output = _run(model, inputs, see)
    return output, nnx.to_pure_dict(nnx.state(model, lambda path, _: _parent(path) not in names))


def _parent(path: Sequence[Any]) -> str:
    return ".".join(map(str, path[:-1]))


def _statistics(norm: Any) -> dict[str, jax.Array]:
    found = {name: getattr(norm, name) for name in fusing.STATISTICS}
    return {name: variable[...] for name, variable in found.items() if variable is not None}


def _folds(layer: Any, params: Mapping[str, jax.Array], norm: Any) -> bool:
    # That class alone, as a subclass may compute anything.
    known = type(norm) is nnx.BatchNorm
    return known and fusing.folds(layer, params["kernel"], norm, _statistics(norm).values())


def _is_module(each: Any) -> bool:
    """Whether it is a module, and not a list of some, as a sequence has."""
    return isinstance(each, nnx.Module) and not isinstance(each, MutableSequence)


def _neighbours(modules: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What stands right behind each CoordConv in an ``nnx.Sequential``, both there alone.

    The network is such a sequence, and all modules around that one are.
    """
    names = {id(module): name for name, module in modules.items()}
    children = (child for m in modules.values() for _, child in graph.children(m))
    times = Counter(map(id, children))
    for path, module in modules.items():
        parts = path.split(".") if path else []
        around = [modules.get(".".join(parts[:i])) for i in range(len(parts))]
        kinds = {type(each) for each in (*around, module) if _is_module(each)}
        # Another module may run the parts of a sequence by itself, to take what is in between.
        if kinds == {nnx.Sequential} and type(module) is nnx.Sequential:
            for layer, norm in pairwise(module.layers):
                ours = isinstance(layer, CoordLayer) and isinstance(norm, nnx.BatchNorm)
                if ours and times[id(layer)] == times[id(norm)] == 1:
                    yield names[id(layer)], names[id(norm)]
