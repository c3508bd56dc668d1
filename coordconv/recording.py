"""What a model's modules return, by name: ``recorded`` of every backend, without a framework."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from coordconv.grid import Array

Names: TypeAlias = Mapping[str, str] | Callable[[str], str] | None
OutputGradient: TypeAlias = Array | Mapping[str, Array] | None
See: TypeAlias = Callable[[str, Any], Any]  # (module, what it returned) -> what goes on instead
Recorded: TypeAlias = Callable[..., Mapping[str, Array]]  # what ``recorded`` returns

# With a space, which no module's name has.
INPUT = "model input"
OUTPUT = "model output"
GRADIENT = "gradient of "  # in front of the name of what it is of


class Recording:
    """Names for what modules return, in the order in which they return it.

    A module's later calls are numbered, as in ``relu#2``; where it returns a tuple, a list or a
    mapping or a dataclass, the parts have their place, key or field in brackets, as in ``lstm[0]``
    or ``head[logits]``: behind a dot, a submodule has such a name.

    Args:
        names: another name for a module by its own, in a mapping or from a function. Modules of
            one name count as one that is called several times.

    Example:
        >>> recording = Recording({"act": "relu"})
        >>> for _ in range(2):
        ...     _ = recording.visit("act", (1.0, 2.0), recording.keep)
        >>> recording.found()
        {'relu[0]': 1.0, 'relu[1]': 2.0, 'relu#2[0]': 1.0, 'relu#2[1]': 2.0}
    """

    def __init__(self, names: Names = None) -> None:
        self._names = names
        self._called: set[str] = set()
        self._calls: Counter[str] = Counter()
        self._found: dict[str, Any] = {}

    def visit(self, module: str, output: Any, leaf: Callable[[str, Any], Any]) -> Any:
        """The ``output`` with ``leaf(name, part)`` in place of each of its parts."""
        self._called.add(module)
        if callable(self._names):
            module = self._names(module)
        elif self._names:
            module = self._names.get(module, module)
        self._calls[module] += 1
        count = self._calls[module]
        return mapped(leaf, module if count == 1 else f"{module}#{count}", output)

    def end(self, output: Any, leaf: Callable[[str, Any], Any]) -> None:
        """Visit what the model itself returned; ``leaf`` keeps its arrays.

        Raises:
            TypeError: there is none.
        """
        before = len(self._found)
        mapped(leaf, OUTPUT, output)
        if len(self._found) == before:
            raise TypeError(
                "the model must return an array of its framework, or a tuple, list, mapping or "
                f"dataclass with one in it, got {type(output).__name__}"
            )

    def keep(self, name: str, part: Any) -> Any:
        """Keep a part under its name."""
        self._found[name] = part
        return part

    def found(self) -> dict[str, Any]:
        """What was kept.

        Raises:
            ValueError: the mapping of names has a module that was not seen.
        """
        if isinstance(self._names, Mapping):
            unknown = sorted(set(self._names) - self._called)
            if unknown:
                called = ", ".join(sorted(self._called))
                raise ValueError(f"names has {unknown}, but the modules seen are: {called}")
        return self._found


def mapped(leaf: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    """The same tuples, lists, mappings and dataclasses with ``leaf(name, part)`` for their parts.

    Example:
        >>> mapped(lambda name, part: name, "lstm", (1, {"h": 2, "c": 3}))
        ('lstm[0]', {'h': 'lstm[1][h]', 'c': 'lstm[1][c]'})
    """
    if isinstance(value, Mapping):
        # A copy is of its own kind, which may have attributes.
        made: Any = copy.copy(value) if isinstance(value, MutableMapping) else {}
        for key, part in value.items():
            made[key] = mapped(leaf, f"{name}[{key}]", part)
        return made
    if isinstance(value, (tuple, list)):
        parts = [mapped(leaf, f"{name}[{i}]", part) for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                part = mapped(leaf, f"{name}[{field.name}]", getattr(value, field.name))
                # Not replace(), which has no place for every kind of field, nor setattr, which a
                # frozen one refuses.
                object.__setattr__(made, field.name, part)
        return made
    return leaf(name, value)


def record(
    run: Callable[[See], Any],
    inputs: Sequence[Any],
    names: Names,
    output_gradient: OutputGradient,
    *,
    numpy: Callable[[Any], Array],
    is_array: Callable[[Any], bool],
    is_floating: Callable[[Any], bool],
    watch: Callable[[Any], tuple[Any, Any]],
    gradients: Callable[[dict[str, Any], dict[str, Any], dict[str, Array]], dict[str, Array]],
) -> dict[str, Array]:
    """What the modules of a model return in one call, and the gradients of that if asked for.

    Args:
        run: ``run(see)`` calls the model, has ``see(name, output)`` look at what each module inside
            it returned, lets the result go on in its place, and returns the model's output.
        inputs: what the model is called with, as its framework's arrays.
        names: other names for the modules, as :class:`Recording` takes them.
        output_gradient: the gradient of the output, an array or arrays by name; None for none.
        numpy: a copy of one of the framework's arrays.
        is_array: whether something is one of the framework's arrays, with values that NumPy has.
        is_floating: whether such an array is floating-point, so that it has a gradient.
        watch: of such an array, what to take the gradient of, and what goes on in its place.
        gradients: of the outputs, of what else is watched, inputs first, and of the gradients of
            the outputs, all by name: those of what is watched, where there is one.

    Returns:
        Intermediates and outputs in the order of the pass forward, then gradients in the order of
        the pass back.

    Raises:
        TypeError: there is no array in the model's output.
        ValueError: ``names`` has a module that was not called, or ``output_gradient`` does not fit.
    """
    recording = Recording(names)
    watched: dict[str, Any] = {}

    def leaf(name: str, part: Any) -> Any:
        if not is_array(part):
            return part
        recording.keep(name, numpy(part))
        if output_gradient is None or not is_floating(part):
            return part
        watched[name], onward = watch(part)
        return onward

    def see(module: str, output: Any) -> Any:
        made = recording.visit(module, output, leaf)
        return output if output_gradient is None else made

    output = run(see)
    inside = dict(watched)
    recording.end(output, leaf)
    found = dict(recording.found())
    if output_gradient is None:
        return found
    ends = {name: part for name, part in watched.items() if name not in inside}
    given = given_gradients(output_gradient, {name: found[name].shape for name in ends})
    named = zip(input_names(len(inputs)), inputs, strict=True)
    starts = {name: x for name, x in named if is_floating(x)}
    backward = gradients(ends, starts | inside, given)
    # Each was recorded before the last, so that its gradient comes after that.
    return found | {f"{GRADIENT}{name}": backward[name] for name in reversed(backward)}


def given_gradients(
    output_gradient: Array | Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Array]:
    """The gradient for each array of a model's output; zeros where none is given.

    Args:
        output_gradient: the gradient of the only array, or gradients by name.
        shapes: the shape of each array by name.

    Raises:
        ValueError: there is no array of that name or shape.
    """
    given = output_gradient if isinstance(output_gradient, Mapping) else {OUTPUT: output_gradient}
    for name, gradient in given.items():
        if shapes.get(name) != np.shape(gradient):
            raise ValueError(
                f"output_gradient must fit {dict(shapes)}, got {name!r} of shape "
                f"{np.shape(gradient)}"
            )
    return {
        name: np.asarray(given[name]) if name in given else np.zeros(shape, np.float32)
        for name, shape in shapes.items()
    }


def input_names(count: int) -> list[str]:
    """What the inputs are called."""
    return [INPUT] if count == 1 else [f"{INPUT}[{i}]" for i in range(count)]
