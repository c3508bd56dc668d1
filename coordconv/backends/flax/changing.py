"""Coordinates for the convolutions of an NNX network that exists, in place or in a copy, and back.

``converting.py`` has how one layer changes; which of them do is decided before any does.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from coordconv.backends.flax import converting, graph
from coordconv.backends.flax.layers import CoordConv, CoordConvTranspose
from coordconv.backends.flax.recording import watched
from coordconv.backends.jax import changing, options
from coordconv.changing import (
    ALREADY,
    Change,
    Changes,
    Choice,
    Shares,
    Unfit,
    check_ties,
    plan,
    shown,
)
from coordconv.coordinates import Coordinates, CoordinatesLike, check_coord_init
from coordconv.layers import CoordLayer

_CLASSES: dict[type, Any] = {nnx.Conv: CoordConv, nnx.ConvTranspose: CoordConvTranspose}
_PLAIN = {ours: plain for plain, ours in _CLASSES.items()}


@dataclass(frozen=True)
class _Kernel:
    """A kernel that changed by ``n`` channels, more or fewer, on an axis."""

    variable: Any
    axis: int
    n: int
    features: int  # the channels that it has without coordinates

    def fitted(self, values: Any) -> Any:
        """Values of the shape of before in the shape of the kernel as it is now, or None."""
        shape = list(converting.raw(self.variable).shape)
        width = shape[self.axis]
        shape[self.axis] = 2 * self.features + self.n - width  # without coordinates or with them
        if values.shape == tuple(shape):
            return changing.fitted(values, self.axis, width)
        return None


@dataclass
class FlaxChanges(Changes):
    """:class:`coordconv.changing.Changes`, and what states and optimizers of before need."""

    _kernels: Mapping[str, _Kernel] = field(default_factory=dict, repr=False)  # by all their names

    def fit(self, state: Any) -> Any:
        """A state of the network before, such as a checkpoint's, for the network as it is now.

        Args:
            state: an ``nnx.State`` or nested dicts of arrays, which are not changed. The
                coordinates' part of its kernels will be zero; after ``undo`` a state with
                coordinates loses them. What has the shapes of now stays.

        Raises:
            ValueError: the state has none of the kernels, or one of another shape.

        Example:
            >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)))
            >>> state = nnx.state(model)
            >>> nnx.update(model, add_coords(model).fit(state))
        """
        leaves, structure = _leaves(state)
        new = self._fitted(leaves, "state")
        return structure.unflatten(
            leaf if value is None else leaf.replace(value) if _is_box(leaf) else value
            for (_, leaf), value in zip(leaves, new, strict=True)
        )

    def update_optimizer(self, optimizer: nnx.Optimizer) -> None:  # type: ignore[type-arg]
        """Fit what an optimizer that was made before keeps for the kernels that changed.

        Momenta stay, and those of the coordinates' part start at zero; after ``undo`` that part
        is dropped. Without it the next update raises a TypeError, but for kernels of one feature in
        a group, whose momenta JAX would repeat for the coordinates: of these ``add_coords`` warns,
        and of momenta of other coordinates, which this leaves as they are if their shape fits.

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
        leaves = _kept(optimizer)
        new = self._fitted(leaves, "optimizer") if leaves else []
        for (_, leaf), value in zip(leaves, new, strict=True):
            if value is not None:
                converting.set_raw(leaf, value)

    def _fitted(self, leaves: list[tuple[str, Any]], argument: str) -> list[Any]:
        """A new value for each leaf that is of a kernel and of the shape of before, else None."""
        found, wrong, reached = list[Any](), list[str](), False
        for name, leaf in leaves:
            kernel, value = self._kernels.get(name), _value(leaf)
            found.append(None)
            if kernel is None or not hasattr(value, "shape"):
                continue
            reached, shape = True, converting.raw(kernel.variable).shape
            found[-1] = kernel.fitted(value)
            if found[-1] is None and value.shape != shape and np.size(value) > 1:
                wrong.append(f"{name} of shape {value.shape} for a kernel of shape {shape}")
        if wrong:
            raise ValueError(f"{argument} has {', '.join(wrong)}: make a new one")
        if not reached:
            raise ValueError(
                f"{argument} has none of the kernels that changed, which are "
                f"{', '.join(sorted(self._kernels))} in the network"
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
        What changed and what was left, and why. It is to be printed, kept as JSON, or undone, and
        fits states and optimizers of before. A layer that has coordinates is left.

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
    kernels = _kernels(chosen, nodes, resolved)
    values = dict[int, Any]()
    for name, conv in chosen.items():
        if id(conv.kernel) not in values:
            try:
                new = converting.with_coordinates(conv, resolved(conv), init, rngs)
            except ValueError as error:  # several devices may not divide more channels
                raise ValueError(f"{name}: {error}") from error
            values[id(conv.kernel)] = new
    made = {
        id(conv): converting.become(conv, _CLASSES[type(conv)], resolved(conv), init)
        for conv in chosen.values()
    }
    _warn_of_optimizers(kernels)
    rows = _changed(model, chosen, made, values)
    return FlaxChanges(rows, skipped, lambda: _undo(model, [*made.values()]), kernels)


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
    kernels = _kernels(chosen, nodes, lambda layer: layer.coords)
    shares = Shares() if inputs is None else _variance_shares(model, chosen, inputs)
    return FlaxChanges(_removed(model, chosen, shares), skipped, None, kernels)


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


def _kernels(
    chosen: Mapping[str, Any], nodes: Mapping[str, Any], coords: Callable[[Any], Coordinates]
) -> dict[str, _Kernel]:
    """The kernels by all their names; ValueError if a layer that does not change alike has one."""
    owners = {id(module.kernel): module for module in chosen.values()}
    found = {name: node for name, node in nodes.items() if id(node) in owners}

    def layout(module: Any) -> Any:
        return options.input_axis(module), coords(module)

    check_ties(chosen, nodes, found, layout)
    kernels = {}
    for name, kernel in found.items():
        owner = owners[id(kernel)]
        axis, n = options.input_axis(owner), len(coords(owner))
        features = converting.raw(kernel).shape[axis] - n * isinstance(owner, CoordLayer)
        kernels[name] = _Kernel(kernel, axis, n, features)
    return kernels


def _changed(
    model: nnx.Module,
    layers: Mapping[str, Any],
    new: Mapping[int, Any],
    values: Mapping[int, Any],
    shares: Shares | None = None,
) -> tuple[Change, ...]:
    """Put new modules in place of layers, and new values in their kernels, both by old ids."""
    kernels = {id(layer.kernel): layer.kernel for layer in layers.values()}
    more = {
        each: np.size(values[each]) - np.size(converting.raw(kernels[each])) for each in kernels
    }
    rows = tuple(
        Change(
            name,
            shown(layer),
            shown(new[id(layer)]),
            more[id(layer.kernel)],
            shares.get(name) if shares else None,
        )
        for name, layer in layers.items()
    )
    for each, kernel in kernels.items():
        converting.set_raw(kernel, values[each])
    graph.replace(model, new)
    return rows


def _removed(
    model: nnx.Module, layers: Mapping[str, Any], shares: Shares | None = None
) -> tuple[Change, ...]:
    """Put plain convolutions in place of layers."""
    _lost.update(id(layer.kernel) for layer in layers.values())
    plain = {id(layer): _plain(layer) for layer in layers.values()}
    values = {id(v.kernel): converting.without_coordinates(v) for v in layers.values()}
    return _changed(model, layers, plain, values, shares)


def _plain(layer: Any) -> Any:
    return converting.become_plain(layer, _PLAIN[type(layer)])


def _undo(model: nnx.Module, layers: list[Any]) -> None:
    nodes = graph.named(model)
    computed, ours = _computed(nodes), {*map(id, layers)}
    here = {name: node for name, node in nodes.items() if id(node) in ours}  # others were replaced
    for name, layer in here.items():
        unfit = computed.get(id(layer)) or converting.unfit(layer)
        if unfit:
            raise ValueError(f"{name} cannot lose its coordinates: {unfit.reason}")
    _removed(model, here)


def _variance_shares(model: nnx.Module, layers: Mapping[str, Any], inputs: Any) -> Shares:
    """The coordinates' part of the variance of each layer's output, where inputs reach it."""
    model = nnx.clone(model)  # which a run may change
    nodes, shares = graph.named(model), Shares()
    names = {id(nodes[name]): name for name in layers}

    def watch(layer: Any, _: str, call: Any) -> Any:
        output = call()
        if id(layer) in names and not isinstance(output, jax.core.Tracer):
            conv = _plain(layer)
            conv.kernel = layer.kernel.replace(converting.without_coordinates(layer))
            given = {k: v for k, v in call.keywords.items() if k != "window"}  # ours alone
            shares.add(names[id(layer)], output, conv(*call.args[1:], **given), -1)
        return output

    called: Any = model
    with jax.disable_jit(), watched(model, watch):
        called(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    return shares


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, converting.BOXES)


def _value(leaf: Any) -> Any:
    return converting.raw(leaf) if _is_box(leaf) else leaf


def _leaves(state: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of a state or of nested dicts with dotted names, and the structure."""
    found, structure = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_box)
    name = partial(jax.tree_util.keystr, simple=True, separator=".")
    return [(name(path).removesuffix(".value"), leaf) for path, leaf in found], structure


def _kept(optimizer: Any) -> list[tuple[str, Any]]:
    """What an optimizer keeps for the parameters of its network, by their names."""
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(f"optimizer must be a flax.nnx.Optimizer, got {type(optimizer).__name__}")

    def is_state(node: Any) -> bool:
        return isinstance(node, nnx.State)

    states = filter(is_state, jax.tree.leaves(optimizer.opt_state, is_leaf=is_state))
    return [leaf for state in states for leaf in _leaves(state)[0]]


# By identity, the kernels that had coordinates and lost them. Another Variable may come to have the
# identity of one that is gone, as these take no weak references: then there is a warning too many.
_lost: set[int] = set()


def _warn_of_optimizers(kernels: Mapping[str, _Kernel]) -> None:
    """Warn of an optimizer whose next update would be wrong, and silent.

    JAX repeats momenta of one input channel for more, and those of other coordinates may have the
    shape of the new ones. NNX has no hooks in an update, and an optimizer does not know its
    network: so those that keep such momenta are looked for.
    """
    stale = dict[tuple[str, tuple[int, ...]], str]()
    for name, kernel in kernels.items():
        shape = [*converting.raw(kernel.variable).shape]
        if shape[kernel.axis] == 1:
            stale[name, tuple(shape)] = (
                "which has one feature in a group: its next update would take these for the "
                "coordinates' too, unless you call update_optimizer(optimizer) of the Changes, or "
                "make a new optimizer"
            )
        if id(kernel.variable) in _lost:
            shape[kernel.axis] += kernel.n
            stale[name, tuple(shape)] = (
                "and for the coordinates that it lost: its next update would take these for those "
                "of the new ones, unless you make a new optimizer"
            )
    optimizers = [o for o in gc.get_objects() if stale and issubclass(type(o), nnx.Optimizer)]
    for optimizer in optimizers:
        for name, leaf in _kept(optimizer):
            if why := stale.get((name, np.shape(_value(leaf)))):
                message = f"an optimizer keeps momenta for {name}, {why}"
                warnings.warn(message, stacklevel=3)
                return
