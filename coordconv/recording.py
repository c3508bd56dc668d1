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


class Calls:
    """Names for the calls of modules.

    A later call is numbered, as in ``relu#2``. ``names`` has another name for a module by its own;
    modules of one name count as one that is called several times.
    """

    def __init__(self, names: Names = None) -> None:
        self._names = names
        self._called: set[str] = set()
        self._counts: Counter[str] = Counter()

    def name(self, module: str) -> str:
        """The name of a module's next call."""
        self._called.add(module)
        if callable(self._names):
            module = self._names(module)
        elif self._names:
            module = self._names.get(module, module)
        self._counts[module] += 1
        count = self._counts[module]
        return module if count == 1 else f"{module}#{count}"

    def check(self) -> None:
        """Raise ValueError if the mapping of names has a module that was not called."""
        if isinstance(self._names, Mapping):
            unknown = sorted(set(self._names) - self._called)
            if unknown:
                called = ", ".join(sorted(self._called))
                raise ValueError(f"names has {unknown}, but the modules seen are: {called}")


def mapped(leaf: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    """The same tuples, lists, mappings and dataclasses with ``leaf(name, part)`` for their parts.

    The place, key or field is in brackets: behind a dot, a submodule has such a name.

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

    The order is that of the pass forward, then of the pass back. The errors are those of
    :attr:`coordconv.backends.protocols.Backend.recorded`.

    Args:
        run: ``run(see)`` calls the model, lets ``see(name, output)`` go on in place of what each
            module inside it returned, and returns the model's output.
        inputs: what the model is called with, as its framework's arrays.
        names: other names for the modules, as :class:`Calls` takes them.
        output_gradient: the gradient of the output, an array or arrays by name; None for none.
        numpy: a copy of one of the framework's arrays.
        is_array: whether something is such an array, with values that NumPy has.
        is_floating: whether such an array is floating-point, so that it has a gradient.
        watch: of such an array, what to take the gradient of, and what goes on in its place.
        gradients: of the outputs, of what else is watched, inputs first, and of the outputs'
            gradients, all by name: the gradients of what is watched, where there are any.
    """
    calls = Calls(names)
    found: dict[str, Array] = {}
    watched: dict[str, Any] = {}

    def leaf(name: str, part: Any) -> Any:
        if not is_array(part):
            return part
        found[name] = numpy(part)
        if output_gradient is None or not is_floating(part):
            return part
        watched[name], onward = watch(part)
        return onward

    def see(module: str, output: Any) -> Any:
        made = mapped(leaf, calls.name(module), output)
        return output if output_gradient is None else made

    output = run(see)
    inside, before = dict(watched), len(found)
    mapped(leaf, OUTPUT, output)
    if len(found) == before:
        raise TypeError(
            "the model must return an array of its framework, or a tuple, list, mapping or "
            f"dataclass with one in it, got {type(output).__name__}"
        )
    calls.check()
    if output_gradient is None:
        return found
    ends = {name: part for name, part in watched.items() if name not in inside}
    given = _given_gradients(output_gradient, {name: found[name].shape for name in ends})
    named = zip(input_names(len(inputs)), inputs, strict=True)
    starts = {name: x for name, x in named if is_floating(x)}
    backward = gradients(ends, starts | inside, given)
    # Each was recorded before the last, so that its gradient comes after that.
    return found | {f"{GRADIENT}{name}": backward[name] for name in reversed(backward)}


def _given_gradients(
    output_gradient: Array | Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Array]:
    """The gradient for each array of a model's output; zeros where none is given."""
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
