"""Coordinates for the convolutions of an NNX network that exists, in place or in a copy, and back.

``converting.py`` has how one layer changes; which of them do is decided before any does.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx

from coordconv.backends.flax import converting, graph
from coordconv.backends.flax.layers import CoordConv, CoordConvTranspose
from coordconv.backends.flax.recording import watched
from coordconv.backends.jax import changing, options
from coordconv.changing import ALREADY, Change, Changes, Choice, Unfit, check_ties, plan
from coordconv.coordinates import Coordinates, CoordinatesLike, check_coord_init
from coordconv.grid import Array
from coordconv.layers import CoordLayer

_CLASSES: dict[type, Any] = {nnx.Conv: CoordConv, nnx.ConvTranspose: CoordConvTranspose}
_PLAIN = {ours: plain for plain, ours in _CLASSES.items()}


@dataclass(frozen=True)
class _Kernel:
    """A kernel that changed."""

    names: frozenset[str]  # under which the network has it
    variable: Any
    axis: int
    n: int

    def fitted(self, values: Any) -> Any:
        """Values of the shape of before in the shape of the kernel as it is now, or None."""
        shape = [*converting.raw(self.variable).shape]
        width = shape[self.axis]
        if np.ndim(values) != len(shape) or tuple(values.shape) == tuple(shape):
            return None
        shape[self.axis] = values.shape[self.axis]
        if tuple(values.shape) != tuple(shape) or abs(width - shape[self.axis]) != self.n:
            return None
        return changing.fitted(values, self.axis, width, self.n)


@dataclass
class FlaxChanges(Changes):
    """:class:`coordconv.changing.Changes`, and what states and optimizers of before need."""

    _kernels: list[_Kernel] = field(default_factory=list, repr=False)

    def fit(self, state: Any) -> Any:
        """A state of the network before, such as a checkpoint's, for the network as it is now.

        Args:
            state: an ``nnx.State`` or nested dicts of arrays, which are not changed. The
                coordinates' part of its kernels will be zero; after :meth:`undo` a state with
                coordinates loses them. What has the shapes of now stays.

        Raises:
            ValueError: the state has none of the kernels, or one of another shape.

        Example:
            >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)))
            >>> state = nnx.state(model)
            >>> nnx.update(model, add_coords(model).fit(state))
        """
        fitted = _mapped(state, self._fitted(state, "state"))
        return nnx.State(fitted) if isinstance(state, nnx.State) else fitted

    def update_optimizer(self, optimizer: nnx.Optimizer) -> None:  # type: ignore[type-arg]
        """Fit what an optimizer that was made before keeps for the kernels that changed.

        Momenta stay, and those of the coordinates' part start at zero; after :meth:`undo` that part
        is dropped. Without it the next update raises a TypeError, but for kernels of one feature in
        a group, whose momenta JAX would repeat for the coordinates: of these ``add_coords`` warns.

        Raises:
            ValueError: the optimizer keeps nothing for the kernels under their names in the network
                that was changed, or something of a shape that is neither a kernel's nor a number's,
                as Adafactor may: make a new one.

        Example:
            >>> import optax
            >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)))
            >>> optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
            >>> add_coords(model).update_optimizer(optimizer)
            >>> optimizer.opt_state[0].mu["layers"][0]["kernel"].shape
            (3, 3, 5, 8)
        """
        states = _states(optimizer)
        fitted = self._fitted(states, "optimizer") if states else {}
        for _, leaf in _leaves(states):
            if id(leaf) in fitted:
                converting.set_raw(leaf, fitted[id(leaf)])

    def _fitted(self, tree: Any, argument: str) -> dict[int, Any]:
        """New values for the leaves of a tree that are of a kernel and of the shape of before."""
        kernels = {name: kernel for kernel in self._kernels for name in kernel.names}
        found, wrong, reached = dict[int, Any](), [], False
        for name, leaf in _leaves(tree):
            kernel, value = kernels.get(name), _value(leaf)
            if kernel is None or not hasattr(value, "shape"):
                continue
            reached, shape = True, converting.raw(kernel.variable).shape
            fitted = kernel.fitted(value)
            if fitted is not None:
                found[id(leaf)] = fitted
            elif value.shape != shape and np.size(value) > 1:
                wrong.append(f"{name} of shape {value.shape} for a kernel of shape {shape}")
        if wrong:
            raise ValueError(f"{argument} has {', '.join(wrong)}: make a new one")
        if not reached:
            raise ValueError(
                f"{argument} has none of the kernels that changed, which are "
                f"{', '.join(sorted(kernels))} in the network"
            )
        return found


def add_coords(
    model: nnx.Module,
    coords: CoordinatesLike = "xy",
    *,
    layers: Choice = None,
    exclude: Choice = None,
    init: str = "zeros",
    rngs: nnx.Rngs | None = None,
) -> FlaxChanges:
    """Give the convolutions of a network coordinates, in place.

    Another module takes the place of each, wherever the network holds it, with all its attributes:
    take your own references to the old ones anew. The kernel stays the same Variable, with further
    input channels. With ``init="zeros"`` the network computes what it computed, uncompiled to the
    bit: for this the layers are ``map_only``. A compiler may round sums in another order.

    Args:
        model: the network.
        coords: the coordinates of all layers: tokens, a :class:`~coordconv.Coordinates`, or None
            for all axes of each layer.
        layers: which convolutions: names, such as ``"blocks.0.conv"``, whole or the end of them, of
            layers or of blocks, which are all convolutions in them; a compiled regular expression
            that matches the whole name; a function of name and module; several of these; None for
            every ``nnx.Conv`` and ``nnx.ConvTranspose``.
        exclude: those to leave out, in the same way.
        init: ``"zeros"``, or ``"fan_in"``: the coordinates' part as NNX draws a kernel over
            features and coordinates by default; the features' part stays.
        rngs: what ``init="fan_in"`` draws with.

    Returns:
        What changed and what was left and why: to be printed, kept as JSON, or undone; it fits
        states and optimizers of before. A layer that has coordinates is left.

    Raises:
        TypeError: ``model`` is no module; ``layers`` or ``exclude`` of another type.
        ValueError: nothing matches; coordinates beyond the rank of a layer that was asked for;
            ``model`` is itself a convolution; a layer in an ``nnx.WeightNorm`` or
            ``nnx.SpectralNorm``, or with a ``conv_general_dilated`` or a Variable that computes
            its kernel; a kernel that is shared with another layer, or spread over several devices
            that more channels cannot be divided by. All is said before anything changes.

    Source:
        The start at zero is that of a residual branch: Goyal et al., 2017, section 5.1.

    Example:
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.relu)
        >>> print(add_coords(model))
        layer     from  to               parameters added
        layers.0  Conv  CoordConv('xy')  144
    """
    check_coord_init(init, "init")
    Coordinates.resolve(coords, 3)
    nodes = _nodes(model)
    computed = _computed(nodes)

    def examine(name: str, conv: Any) -> Unfit | None:
        if isinstance(conv, CoordLayer):
            return Unfit(f"{ALREADY}, {conv.coords}")
        if type(conv) not in _CLASSES:
            return Unfit(f"{type(conv).__name__} is a subclass, and may compute something else")
        unfit = computed.get(id(conv)) or converting.unfit(conv)
        if unfit:
            return unfit
        try:
            resolved(conv)
        except ValueError as error:
            return Unfit(str(error))
        return None

    def resolved(conv: Any) -> Coordinates:
        return Coordinates.resolve(coords, len(options.kernel_size(conv)))

    chosen, skipped = plan(nodes, _is_convolution, examine, layers, exclude)
    names = _check_kernels(chosen, nodes, resolved)
    new, kernels, values = dict[int, Any](), [], dict[int, Any]()
    for name, conv in chosen.items():
        kernel: Any = conv.kernel
        if id(kernel) not in values:
            try:
                values[id(kernel)] = converting.with_coordinates(conv, resolved(conv), init, rngs)
            except ValueError as error:  # several devices may not divide more channels
                raise ValueError(f"{name}: {error}") from error
            axis, n = options.input_axis(conv), len(resolved(conv))
            kernels.append(_Kernel(names[id(kernel)], kernel, axis, n))
        new[id(conv)] = converting.become(conv, _CLASSES[type(conv)], resolved(conv), init)
    _warn_of_optimizers(kernels)
    rows = [
        Change(name, type(conv).__name__, _shown(new[id(conv)]), _added(conv, new[id(conv)]))
        for name, conv in chosen.items()
    ]
    # All that could fail is behind us, and now all changes.
    for kernel in kernels:
        converting.set_raw(kernel.variable, values[id(kernel.variable)])
    graph.replace(model, new)
    made = [new[id(conv)] for conv in chosen.values()]
    return FlaxChanges(tuple(rows), skipped, lambda: _undo(model, made), kernels)


def with_coords(model: nnx.Module, *args: Any, **kwargs: Any) -> tuple[Any, FlaxChanges]:
    """A copy of a network whose convolutions have coordinates, and what changed.

    What is shared in the network is shared in the copy. Arguments and errors are those of
    :func:`add_coords`.

    Example:
        >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
        >>> new, changes = with_coords(model, "xyr")
        >>> type(new.layers[0]).__name__, type(model.layers[0]).__name__
        ('CoordConv', 'Conv')
    """
    _nodes(model)
    copied = nnx.clone(model)
    return copied, add_coords(copied, *args, **kwargs)


def remove_coords(
    model: nnx.Module, inputs: Any = None, *, layers: Choice = None, exclude: Choice = None
) -> FlaxChanges:
    """Make the CoordConvs of a network plain convolutions, in place: the coordinates' part is lost.

    Args:
        model: the network.
        inputs: a batch, or a tuple of all arguments, on which to measure first how much of what
            each layer computes is the coordinates': the variance of the coordinates' part P of the
            output, over this and the variance of the rest, each over batch and positions and summed
            over channels. A copy of the network is run. None measures nothing.
        layers: which layers, as in :func:`add_coords`.
        exclude: those to leave out, in the same way.

    Returns:
        What changed, with each layer's ``variance_share``. A layer that only runs inside a
        transformation, such as a scan, counts as not reached.

    Raises:
        TypeError, ValueError: as :func:`add_coords`; there is no CoordConv.

    Example:
        >>> layer = CoordConv(3, 8, (3, 3), coord_init="zeros", rngs=nnx.Rngs(0))
        >>> print(remove_coords(nnx.Sequential(layer, nnx.relu), jax.numpy.ones((2, 16, 16, 3))))
        layer     from             to    parameters added  variance share
        layers.0  CoordConv('xy')  Conv  -144              0.00%
    """
    nodes = _nodes(model)
    computed = _computed(nodes)

    def examine(name: str, layer: Any) -> Unfit | None:
        if type(layer) not in _PLAIN:
            return Unfit(f"it is a {type(layer).__name__}, a class of its own", fatal=True)
        return computed.get(id(layer)) or converting.unfit(layer)

    chosen, skipped = plan(nodes, lambda m: isinstance(m, CoordLayer), examine, layers, exclude)
    names = _check_kernels(chosen, nodes, lambda layer: layer.coords)
    shares = {} if inputs is None else _variance_shares(model, chosen, inputs)
    plain = {id(layer): _plain(layer) for layer in chosen.values()}
    kernels = {
        id(layer.kernel): _Kernel(
            names[id(layer.kernel)], layer.kernel, options.input_axis(layer), len(layer.coords)
        )
        for layer in chosen.values()
    }
    rows = []
    for name, layer in chosen.items():
        conv = plain[id(layer)]
        added = _added(layer, conv)
        rows.append(Change(name, _shown(layer), type(conv).__name__, added, shares.get(name)))
    _remove(model, [*chosen.values()], plain)
    return FlaxChanges(tuple(rows), skipped, None, [*kernels.values()])


def _nodes(model: Any) -> dict[str, Any]:
    """All in a network by name; an error if there is no place for another module."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax.nnx.Module, got {type(model).__name__}")
    if isinstance(model, tuple(_CLASSES)):
        raise ValueError(
            f"model must have modules that others can take the place of, got a "
            f"{type(model).__name__} alone: CoordConv.from_conv makes a CoordConv of a convolution"
        )
    return graph.named(model)


def _is_convolution(module: Any) -> bool:
    return isinstance(module, tuple(_CLASSES))


def _computed(nodes: Mapping[str, Any]) -> dict[int, Unfit]:
    """Why modules whose kernels another one computes do not change, by id."""
    return {
        id(inner): Unfit(
            f"{name or 'model'} ({type(node).__name__}) computes its kernel", fatal=True
        )
        for name, node in nodes.items()
        if isinstance(node, graph.COMPUTING)
        for inner in graph.named(node).values()
        if _is_convolution(inner)
    }


def _check_kernels(
    chosen: Mapping[str, Any], nodes: Mapping[str, Any], coords: Any
) -> dict[int, frozenset[str]]:
    """The names of each kernel, by id; ValueError if a layer that does not change alike has it."""
    ids = {id(module.kernel) for module in chosen.values()}
    kernels = {name: node for name, node in nodes.items() if id(node) in ids}

    def layout(module: Any) -> Any:
        return options.input_axis(module), coords(module)

    check_ties(chosen, nodes, kernels, layout)
    names: dict[int, frozenset[str]] = {}
    for name, kernel in kernels.items():
        names[id(kernel)] = names.get(id(kernel), frozenset()) | {name}
    return names


def _shown(layer: Any) -> str:
    return f"{type(layer).__name__}({layer.coords.channels!r})"


def _added(before: Any, after: Any) -> int:
    """How many numbers a kernel has more, of all that a vmap or a scan stacked."""
    stacked = np.prod(converting.raw(before.kernel).shape[: -len(before.kernel_shape)] or (1,))
    more = np.prod(after.kernel_shape) - np.prod(before.kernel_shape)
    return int(stacked * more)


def _plain(layer: Any) -> Any:
    return converting.become_plain(layer, _PLAIN[type(layer)])


def _remove(model: nnx.Module, layers: list[Any], plain: Mapping[int, Any]) -> None:
    """Put plain convolutions in place of layers."""
    kernels = {id(layer.kernel): layer for layer in layers}
    values = {each: converting.without_coordinates(layer) for each, layer in kernels.items()}
    for each, layer in kernels.items():
        converting.set_raw(layer.kernel, values[each])
    graph.replace(model, plain)


def _undo(model: nnx.Module, layers: list[Any]) -> None:
    nodes = graph.named(model)
    here = {id(node) for node in nodes.values()}
    layers = [layer for layer in layers if id(layer) in here]  # the user may have replaced others
    computed = _computed(nodes)
    for layer in layers:
        unfit = computed.get(id(layer)) or converting.unfit(layer)
        if unfit:
            raise ValueError(f"a layer cannot lose its coordinates: {unfit.reason}")
    _remove(model, layers, {id(layer): _plain(layer) for layer in layers})


def _variance_shares(model: nnx.Module, layers: Mapping[str, Any], inputs: Any) -> dict[str, float]:
    """The coordinates' part of the variance of each layer's output, where inputs reach it."""
    model = nnx.clone(model)  # which a run may change
    nodes, sums = graph.named(model), dict[str, Array]()
    names = {id(nodes[name]): name for name in layers}

    def watch(layer: Any, _: str, call: Any) -> Any:
        output = call()
        if id(layer) not in names or isinstance(output, jax.core.Tracer):
            return output
        conv = _plain(layer)
        conv.kernel = layer.kernel.replace(converting.without_coordinates(layer))
        rest = np.asarray(conv(*call.args[1:], **call.keywords)).astype(np.float64)
        parts = np.asarray(output).astype(np.float64) - rest, rest
        axes = tuple(range(rest.ndim - 1))
        found = np.array([part.var(axes).sum() for part in parts])
        name = names[id(layer)]
        sums[name] = sums.get(name, np.zeros(2)) + found
        return output

    called: Any = model
    with jax.disable_jit(), watched(model, watch):
        called(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    return {name: float(p / (p + rest)) if p else 0.0 for name, (p, rest) in sums.items()}


def _states(optimizer: Any) -> list[Any]:
    """What an optimizer keeps in the structure of the network's parameters."""
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(f"optimizer must be a flax.nnx.Optimizer, got {type(optimizer).__name__}")
    leaves = jax.tree.leaves(optimizer.opt_state, is_leaf=lambda node: isinstance(node, nnx.State))
    return [leaf for leaf in leaves if isinstance(leaf, nnx.State)]


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a state, of nested dicts, or of each in a list of such, by dotted names."""
    if isinstance(tree, list):
        for each in tree:
            yield from _leaves(each)
    elif isinstance(tree, Mapping):
        for key, each in tree.items():
            yield from _leaves(each, f"{name}.{key}" if name else str(key))
    else:
        yield name.removesuffix(".value"), tree


def _mapped(tree: Any, new: Mapping[int, Any]) -> Any:
    """Nested dicts with other values for leaves, by their ids."""
    if isinstance(tree, Mapping):
        return {key: _mapped(each, new) for key, each in tree.items()}
    if id(tree) not in new:
        return tree
    return tree.replace(new[id(tree)]) if _value(tree) is not tree else new[id(tree)]


def _value(leaf: Any) -> Any:
    return converting.raw(leaf) if isinstance(leaf, converting.BOXES) else leaf


def _warn_of_optimizers(kernels: list[_Kernel]) -> None:
    """Warn of an optimizer whose next update would be wrong, and silent.

    JAX repeats momenta of one input channel for more. NNX has no hooks in an update, and an
    optimizer does not know its network: so those that keep such momenta are looked for.
    """
    alone = {
        name: converting.raw(kernel.variable).shape
        for kernel in kernels
        if converting.raw(kernel.variable).shape[kernel.axis] == 1
        for name in kernel.names
    }
    optimizers = [o for o in gc.get_objects() if alone and issubclass(type(o), nnx.Optimizer)]
    for optimizer in optimizers:
        for name, leaf in _leaves(_states(optimizer)):
            if name in alone and np.shape(_value(leaf)) == alone[name]:
                warnings.warn(
                    f"an optimizer keeps momenta for {name}, which has one feature in a group: its "
                    "next update would take these for the coordinates' too, unless you call "
                    "update_optimizer(optimizer) of the Changes, or make a new optimizer",
                    stacklevel=3,
                )
                return
