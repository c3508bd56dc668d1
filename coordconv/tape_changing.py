"""``add_coords``, ``remove_coords`` and ``from_conv`` in a framework that records a tape.

A layer stays the same object and changes its class, as torch's own parametrizations and lazy
modules do: so its hooks, its flags, its names and all that refers to it stay. Its kernel stays the
same parameter, too, and changes its shape: so ties and an optimizer's list of parameters stay. What
an optimizer keeps for a kernel has the old shape, and some optimizers would read beyond it without
a word: so each is asked at its step.
"""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np

from coordconv.changing import (
    ALREADY,
    Change,
    Changes,
    Choice,
    Shares,
    Unfit,
    check_class,
    check_ties,
    plan,
    shown,
)
from coordconv.coordinates import Coordinates, CoordinatesLike, check_coord_init
from coordconv.tape import Tape, to_numpy, zeros
from coordconv.weights.kernels import KernelLayout


@dataclass(frozen=True)
class Conversion:
    """What a framework has to say about one convolution that becomes a CoordConv, and back."""

    framework: Any  # the package itself
    unfit: Callable[[Any], Unfit | None]  # why a convolution cannot become a CoordConv, or lose it
    layout: Callable[[Any, Coordinates], KernelLayout]  # of a convolution with these coordinates
    plain_class: Callable[[Any], Any]  # the framework's own class of a layer
    draw: Callable[[Any, int], Any]  # the kernel of a new convolution over that many channels
    like: Callable[[Any, Any], Any]  # values in memory of their own, in the format of a kernel
    # resize(parameter, values, gradient): the parameter gets values of another shape.
    resize: Callable[[Any, Any, Any], None]
    # From now on, let :func:`refuse_stale` see what an optimizer keeps for these parameters.
    watch: Callable[[list[Any]], None]
    optimizer: type  # what all optimizers of the framework are
    held: Callable[[Any], Iterable[Any]]  # an optimizer's parameters
    # states(optimizer, kernel): what the optimizer keeps for a kernel, by name.
    states: Callable[[Any, Any], Mapping[str, Any]]
    # put(optimizer, kernel, name, values): let the optimizer keep these values instead.
    put: Callable[[Any, Any, str, Any], None]

    def with_coordinates(self, kernel: Any, conv: Any, layout: KernelLayout, init: str) -> Any:
        """A plain convolution's kernel over its features and, as ``init`` says, coordinates."""
        concatenate = self.framework.concat
        with self.framework.no_grad():
            kernel = kernel.detach()
            joined = layout.fitted(kernel, concatenate, zeros)
            if init == "fan_in":
                drawn = self.draw(conv, layout.channels + layout.groups * len(layout.coords))
                joined = layout.join(kernel, layout.split(drawn)[1], concatenate)
            return self.like(joined, kernel)

    def resize_all(self, kernels: list[tuple[Any, Any, Any]], coordinates: bool) -> None:
        """Resize the kernels of a network, for which there may be optimizers.

        ``coordinates`` says whether the kernels have some from now on.
        """
        self.watch([kernel for kernel, *_ in kernels])
        for kernel, values, gradient in kernels:
            if id(kernel) not in _resized:
                _resized[id(kernel)] = _Resized()
                weakref.finalize(kernel, _resized.pop, id(kernel), None)
            _resized[id(kernel)].resize(tuple(kernel.shape), coordinates)
            self.resize(kernel, values, gradient)

    def without_coordinates(self, kernel: Any, layout: KernelLayout) -> Any:
        """The features' part of a kernel."""
        return self.like(layout.split(kernel.detach())[0], kernel)

    def from_conv(self, cls: Any, conv: Any, coords: CoordinatesLike, init: str) -> Any:
        """A copy of a convolution as a layer of a class of ours."""
        check_class(cls, conv, f"{self.framework.__name__}.nn")
        found, coords = self.unfit(conv), Coordinates.resolve(coords, cls.rank)
        if found:
            raise ValueError(f"conv cannot be given coordinates: {found.reason}")
        conv = copy.deepcopy(conv)
        values = self.with_coordinates(conv.weight, conv, self.layout(conv, coords), init)
        self.resize(conv.weight, values, None)
        become(conv, cls, coords, init)
        return conv

    def remove(self, layers: Mapping[str, Any]) -> None:
        """Make layers plain convolutions."""
        for name, layer in layers.items():
            unfit = self.unfit(layer)
            if unfit:
                raise ValueError(
                    f"{name or 'the layer'} cannot lose its coordinates: {unfit.reason}"
                )
        kernels: dict[int, Any] = {}  # by identity: several layers may have one
        for layer in layers.values():
            kernel, layout = layer.weight, layer.layout
            gradient = kernel.grad
            if gradient is not None:
                gradient = self.without_coordinates(gradient, layout)
            kernels[id(kernel)] = kernel, self.without_coordinates(kernel, layout), gradient
        self.resize_all([*kernels.values()], False)
        for layer in layers.values():
            appending = isinstance(layer, Appending)
            layer.__class__ = layer.subclass if appending else self.plain_class(layer)
            for name in ("coords", "coord_init", "map_only"):
                vars(layer).pop(name, None)


@dataclass
class _Resized:
    """What happened to a parameter."""

    former: set[tuple[int, ...]] = field(default_factory=set)  # the shapes that it had
    times: int = 0  # how often
    coordinates: int = 0  # which time it was given the coordinates that it has, 0 for never or none

    def resize(self, former: tuple[int, ...], coordinates: bool) -> None:
        self.former.add(former)
        self.times += 1
        self.coordinates = self.times if coordinates else 0


# By identity of the parameter. For each optimizer, which coordinates a parameter had at its last
# step: what it keeps for others may have the shape of those of now.
_resized: dict[int, _Resized] = {}
_NEVER = _Resized()
_stepped: weakref.WeakKeyDictionary[Any, dict[int, int]] = weakref.WeakKeyDictionary()


def note_step(optimizer: Any, parameters: Iterable[Any]) -> None:
    """Remember that what an optimizer keeps is for these parameters as they are now."""
    steps = _stepped.setdefault(optimizer, {})
    for each in parameters:
        steps[id(each)] = _resized.get(id(each), _NEVER).coordinates


def _has_others(optimizer: Any, parameter: Any) -> bool:
    """Whether a parameter has coordinates, and had others or none as an optimizer took a step."""
    now = _resized.get(id(parameter), _NEVER).coordinates
    return bool(now) and _stepped.get(optimizer, {}).get(id(parameter), now) != now


def refuse_stale(optimizer: Any, kept: Sequence[tuple[Any, Iterable[Any]]]) -> None:
    """Raise RuntimeError if an optimizer keeps something for a parameter as it was before.

    ``kept`` has its parameters, and what it keeps for each: tensors, of which some may be several
    of the parameter's shape in one, and anything else.
    """
    for parameter, states in kept:
        shape = tuple(parameter.shape)
        former = _resized.get(id(parameter), _NEVER).former - {shape}
        if _has_others(optimizer, parameter):
            former.add(shape)
        if former and any(
            tuple(getattr(state, "shape", ()))[-len(shape) :] in former for state in states
        ):
            raise RuntimeError(
                "the optimizer keeps momenta for kernels as they were before their layers were "
                "given coordinates, or lost them: call update_optimizer(optimizer) of the Changes "
                "that add_coords returned, or make a new optimizer"
            )
    note_step(optimizer, [parameter for parameter, _ in kept])


def become(conv: Any, cls: Any, coords: Coordinates, init: str) -> None:
    """Make a convolution a layer of a class of ours; its kernel is changed apart."""
    conv.__class__ = cls
    conv.coords = coords
    conv.coord_init = init
    conv.map_only = init == "zeros"


def replaced_forward(conv: Any, *names: str) -> Unfit | None:
    """Why a convolution whose ``forward`` is its own, and not that of its class, is not changed.

    Paddle's ``to_static`` leaves one in each layer of a program, which knows the kernel's shape.
    """
    for name in ("forward", *names):
        if name in vars(conv):
            by = "by hand or by to_static: change the network before that"
            return Unfit(f"its {name} was replaced on the instance, {by}", fatal=True)
    return None


class Appending:
    """A user's subclass of a framework's convolution, with the coordinates appended to its input.

    Of such a class no more is known than what it is called with. A framework's mixin has
    ``_appended``, and follows this one in the bases.
    """

    subclass: type  # what it was
    _appended: Callable[[Any], Any]  # an input that was checked, with the coordinates of the layer

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        return self.subclass.forward(self, self._appended(input), *args, **kwargs)  # type: ignore[attr-defined]

    def __reduce__(self) -> Any:  # pickle finds no class that is made at run time
        mixin = type(self).__mro__[1]
        return _empty, (mixin, self.subclass, self.rank), self.__dict__  # type: ignore[attr-defined]


def _empty(mixin: type, subclass: type, rank: int) -> Any:
    cls = _appending(mixin, subclass, rank)
    return cls.__new__(cls)


@cache  # one class of ours for each of the user's
def _appending(mixin: Any, subclass: Any, rank: int) -> Any:
    space = {"subclass": subclass, "__module__": subclass.__module__}
    bases, name = (mixin, subclass), f"Coord{subclass.__name__}"
    return types.new_class(name, bases, {"rank": rank}, lambda names: names.update(space))


@dataclass
class TapeChanges(Changes):
    """:class:`coordconv.changing.Changes`, and what an optimizer made before needs."""

    _kernels: list[tuple[Any, KernelLayout]] = field(default_factory=list, repr=False)
    _conversion: Conversion = field(kw_only=True, repr=False, compare=False)

    def update_optimizer(self, optimizer: Any) -> None:
        """Fit what an optimizer that was made before keeps for the kernels that changed.

        Momenta stay, and those of the coordinates' part start at zero; after ``undo`` that part
        is dropped. Until then such an optimizer raises a RuntimeError at its next step.

        Raises:
            TypeError: no optimizer of the framework's: of a wrapper give what is in it.
            ValueError: the optimizer has none of the kernels, or keeps something of a shape that is
                neither a kernel's nor a number's, as LBFGS, PyTorch's Adafactor and Paddle's ASGD
                do, or, in Paddle, master weights of kernels of 16 bits: make a new one.

        Example: at the head of ``coordconv.backends.torch.changing`` and of Paddle's.
        """
        conversion, kind = self._conversion, self._conversion.optimizer
        if not isinstance(optimizer, kind):
            wanted = f"{kind.__module__.rpartition('.')[0]}.{kind.__name__}"
            raise TypeError(f"optimizer must be a {wanted}, got {type(optimizer).__name__}")
        held = {*map(id, conversion.held(optimizer))}
        if held.isdisjoint(id(kernel) for kernel, _ in self._kernels):
            raise ValueError("optimizer has none of the kernels that changed")
        updates = []
        for kernel, layout in self._kernels:
            shape = tuple(kernel.shape)
            widths = {layout.width, layout.plain_width} - {shape[layout.axis]}
            (width,) = widths
            before = (*shape[: layout.axis], width, *shape[layout.axis + 1 :])
            for name, state in conversion.states(optimizer, kernel).items():
                number = len(state.shape) < 2 and _size(state) == 1
                fits = tuple(state.shape) == shape
                if number or (fits and not _has_others(optimizer, kernel)):
                    continue
                if not fits and tuple(state.shape) != before:
                    raise ValueError(
                        f"optimizer keeps {name!r} of shape {tuple(state.shape)} for a kernel of "
                        f"shape {shape}: make a new {type(optimizer).__name__}"
                    )
                updates.append((kernel, name, self._fitted(state, kernel, layout)))
        for update in updates:
            conversion.put(optimizer, *update)
        note_step(optimizer, [kernel for kernel, _ in self._kernels])

    def _fitted(self, state: Any, kernel: Any, layout: KernelLayout) -> Any:
        """What was for a kernel of before, in the shape of the kernel as it is now.

        The coordinates' part is zero, or of what is one number throughout, that number.
        """
        if state.shape[layout.axis] == layout.width:
            state = layout.split(state)[0]
        if kernel.shape[layout.axis] == layout.plain_width:
            return self._conversion.like(state, kernel)

        def filled(shape: tuple[int, ...], like: Any) -> Any:
            number = state.reshape([-1])[0]
            return zeros(shape, like) + (number if (state == number).all() else 0)

        joined = layout.fitted(state, self._conversion.framework.concat, filled)
        return self._conversion.like(joined, kernel)


@dataclass(frozen=True)
class NetworkConversion:
    """What a framework has to say about networks whose convolutions become CoordConvs, and back."""

    conversion: Conversion
    tape: Tape
    layer: type  # what all CoordConvs of the framework are
    classes: Mapping[type, Any]  # the class of ours for each of the framework's convolutions
    appending: type  # the mixin for a user's subclass of one of those
    # All modules by name, one that is used twice under each; an error if one wraps a network.
    modules: Callable[[Any], dict[str, Any]]

    def add_coords(
        self,
        model: Any,
        coords: CoordinatesLike = "xy",
        *,
        layers: Choice = None,
        exclude: Choice = None,
        init: str = "zeros",
        subclasses: bool = False,
    ) -> TapeChanges:
        """Give the convolutions of a network coordinates, in place.

        A layer stays the same object and keeps its hooks, flags and ties, and its kernel stays the
        same parameter of the same name, with further input channels. With ``init="zeros"`` the
        network computes what it computed, in float32 on one device to the bit: for this the layers
        are ``map_only``. A state dict of the network before loads into the network after; in Paddle
        by :func:`~coordconv.backends.paddle.adapt_state_dict`, without which Paddle leaves out the
        kernels and warns.

        Args:
            model: the network, as it is before it is wrapped, compiled, or traced by Paddle.
            coords: the coordinates of all layers: tokens, a :class:`~coordconv.Coordinates`, or
                None for all axes of each layer.
            layers: which convolutions: names of layers or of blocks, which are all convolutions in
                them, whole or, if no name is the whole of it, the end of names; a compiled regular
                expression that matches the whole name; a function of name and module; several of
                these; None for every convolution of the framework's own classes.
            exclude: those to leave out, in the same way.
            init: ``"zeros"``, or ``"fan_in"``: the coordinates' part as the framework draws a
                convolution over features and coordinates; the features' part stays.
            subclasses: whether to change subclasses of the framework's convolutions, too. The
                coordinates are appended to their input; a subclass that then computes something
                else, as one that standardizes its kernel, is left. This is found by running it on
                random numbers.

        Returns:
            What changed and what was left, and why. It is to be printed, kept as JSON, or undone,
            see :class:`~coordconv.tape_changing.TapeChanges`. A layer that has coordinates is left.

        Raises:
            TypeError: ``model`` is no module; ``layers`` or ``exclude`` of another type.
            ValueError: nothing matches; coordinates beyond the rank of a layer that was asked for;
                a wrapper, or what is inside of one for distributed training; a quantized layer; a
                kernel that is not initialized yet, one that others compute, as in a
                parametrization, pruning or ``weight_norm``, or one that is shared with another
                layer; in Paddle also static mode, and what ``to_static`` traced. All is said before
                anything changes.

        Source:
            The start at zero is that of a residual branch: Goyal et al., 2017, section 5.1.

        Example: at the head of ``coordconv.backends.torch.changing`` and of Paddle's.
        """
        check_coord_init(init, "init")
        Coordinates.resolve(coords, 3)
        modules, conversion = self.modules(model), self.conversion

        def examine(name: str, conv: Any) -> Unfit | None:
            if isinstance(conv, self.layer):
                return Unfit(f"{ALREADY}, {conv.coords}")  # type: ignore[attr-defined]
            unfit = conversion.unfit(conv)
            if unfit:
                return unfit
            try:
                resolved(conv)
            except ValueError as error:
                return Unfit(str(error))
            if type(conv) in self.classes:
                return None
            return self._unfit_subclass(conv, resolved(conv), subclasses)

        def resolved(conv: Any) -> Coordinates:
            return Coordinates.resolve(coords, self._coord_class(conv).rank)

        def is_convolution(module: Any) -> bool:
            return isinstance(module, tuple(self.classes))

        chosen, skipped = plan(modules, is_convolution, examine, layers, exclude)
        layouts = {id(conv): conversion.layout(conv, resolved(conv)) for conv in chosen.values()}
        check_ties(chosen, modules, _parameters(model), lambda conv: layouts[id(conv)])
        kernels: dict[int, Any] = {}
        for conv in chosen.values():
            kernel, layout = conv.weight, layouts[id(conv)]
            if id(kernel) not in kernels:
                values = conversion.with_coordinates(kernel, conv, layout, init)
                gradient = kernel.grad
                if gradient is not None:
                    gradient = conversion.with_coordinates(gradient, conv, layout, "zeros")
                kernels[id(kernel)] = kernel, layout, values, gradient
        # All that could fail is behind us, and now all changes.
        rows, sizes = [], {name: _size(conv.weight) for name, conv in chosen.items()}
        conversion.resize_all(
            [(kernel, values, gradient) for kernel, _, values, gradient in kernels.values()], True
        )
        for name, conv in chosen.items():
            before = type(conv).__name__
            become(conv, self._coord_class(conv), layouts[id(conv)].coords, init)
            rows.append(Change(name, before, shown(conv), _size(conv.weight) - sizes[name]))
        of_kernels = [(kernel, layout) for kernel, layout, *_ in kernels.values()]
        undo = partial(conversion.remove, chosen)
        return TapeChanges(tuple(rows), skipped, undo, of_kernels, _conversion=conversion)

    def remove_coords(
        self, model: Any, inputs: Any = None, *, layers: Choice = None, exclude: Choice = None
    ) -> TapeChanges:
        """Make a network's CoordConvs plain convolutions, in place: the coordinates' part is lost.

        Args:
            model: the network.
            inputs: a batch, or a tuple of all arguments, on which to measure first how much of what
                each layer computes is the coordinates': the variance of the coordinates' part P of
                the output, over this and the variance of the rest, each over batch and positions
                and summed over channels. None measures nothing. The model runs in the mode that it
                is in, and its buffers, such as batch statistics, stay what they are.
            layers: which layers, as in :func:`add_coords`.
            exclude: those to leave out, in the same way.

        Returns:
            What changed, with each layer's ``variance_share``.

        Raises:
            TypeError, ValueError: as :func:`add_coords`; there is no CoordConv.

        Example: at the head of ``coordconv.backends.torch.changing`` and of Paddle's.
        """
        modules, conversion = self.modules(model), self.conversion

        def examine(name: str, layer: Any) -> Unfit | None:
            if type(layer) not in self.classes.values() and not isinstance(layer, Appending):
                return Unfit(f"it is a {type(layer).__name__}, a class of its own", fatal=True)
            return conversion.unfit(layer)

        def is_ours(module: Any) -> bool:
            return isinstance(module, self.layer)

        chosen, skipped = plan(modules, is_ours, examine, layers, exclude)
        check_ties(chosen, modules, _parameters(model), lambda layer: layer.layout)
        shares = Shares() if inputs is None else self._variance_shares(model, chosen, inputs)
        before = {name: (shown(layer), _size(layer.weight)) for name, layer in chosen.items()}
        kernels = {id(layer.weight): (layer.weight, layer.layout) for layer in chosen.values()}
        conversion.remove(chosen)
        rows = []
        for name, layer in chosen.items():
            was, size = before[name]
            more = _size(layer.weight) - size
            rows.append(Change(name, was, type(layer).__name__, more, shares.get(name)))
        of_kernels = [*kernels.values()]
        return TapeChanges(tuple(rows), skipped, None, of_kernels, _conversion=conversion)

    def _coord_class(self, conv: Any) -> Any:
        """The class of ours that a convolution becomes."""
        kind: Any = type(conv)
        base = next(base for base in kind.__mro__ if base in self.classes)
        cls = self.classes[base]
        return cls if kind is base else _appending(self.appending, kind, cls.rank)

    def _unfit_subclass(self, conv: Any, coords: Coordinates, subclasses: bool) -> Unfit | None:
        """Why a user's subclass of a convolution does not become a CoordConv, by running it."""
        cls: Any = type(conv)
        kind, base = cls.__name__, next(each for each in cls.__mro__ if each in self.classes)
        if not subclasses:
            return Unfit(
                f"{kind} is a subclass of {base.__name__} and may compute something else; "
                "subclasses=True finds out whether it goes together with coordinates"
            )
        if coords.outside == "extend":
            return Unfit(
                f"{kind} pads the coordinates as it pads the features, so that they end at the "
                f'border: want outside="zero", got {coords}'
            )
        if not self.tape.is_array(conv.weight):
            return Unfit(f"{kind} has a kernel without values, and cannot be run to find out")
        framework = self.conversion.framework
        try:
            one = copy.deepcopy(conv).to(dtype=framework.float64)
            ours, layout = self._coord_class(one), self.conversion.layout(one, coords)
            # Odd, so that some coordinates are zero.
            shape = [9 + 2 * length for length in one.weight.shape[2:]]
            shape = [2, *shape, layout.channels] if _is_last(one) else [2, layout.channels, *shape]
            draw = np.random.default_rng(0).normal  # the user's draws stay
            # Small beside the coordinates: what takes a maximum of its input then shows it.
            x = self.tape.tensor(draw(size=shape) / 16, one.weight)
            with framework.no_grad():
                # Where a scale starts at zero, the output would tell nothing of the kernel.
                for parameter in one.parameters():
                    parameter.copy_(self.tape.tensor(draw(size=parameter.shape), parameter))
                wanted = to_numpy(cls.forward(one, x))  # without hooks
                values = self.conversion.with_coordinates(one.weight, one, layout, "zeros")
                self.conversion.resize(one.weight, values, None)
                become(one, ours, coords, "zeros")
                found = to_numpy(ours.forward(one, x))
        except Exception as error:  # noqa: BLE001  # it runs the user's code: it may raise anything
            return Unfit(f"{kind} fails with coordinates ({type(error).__name__}: {error})")
        # Half of the digits of float64: rounding is far below, and another computation far above.
        largest = 2**-26 * float(abs(wanted).max())
        if found.shape == wanted.shape and np.allclose(found, wanted, rtol=2**-26, atol=largest):
            return None
        return Unfit(f"{kind} computes something else once its kernel has channels for coordinates")

    def _variance_shares(self, model: Any, layers: Mapping[str, Any], inputs: Any) -> Shares:
        """The coordinates' part of the variance of each layer's output, where inputs reach it."""
        shares = Shares()
        plains = copy.deepcopy(dict(layers))
        self.conversion.remove(plains)

        def measured(name: str, layer: Any, plain: Any) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                output = type(layer).forward(layer, *args, **kwargs)
                kwargs.pop("window", None)  # which plain convolutions do not take
                rest = to_numpy(type(plain).forward(plain, *args, **kwargs))
                channels = -1 if _is_last(layer) else -1 - layer.rank
                shares.add(name, to_numpy(output), rest, channels)
                return output

            return forward

        for name, layer in layers.items():
            layer.forward = measured(name, layer, plains[name])
        try:
            with self.conversion.framework.no_grad(), self.tape.restored(model):
                model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
        finally:
            for layer in layers.values():
                del layer.forward
        return shares


def _is_last(conv: Any) -> bool:
    """Whether the channels are the last axis: Paddle's layers may have them there."""
    return str(getattr(conv, "_data_format", "")).endswith("C")


def _size(tensor: Any) -> int:
    return int(np.prod(tuple(tensor.shape)))


def _parameters(model: Any) -> dict[str, Any]:
    return dict(model.named_parameters(remove_duplicate=False))
