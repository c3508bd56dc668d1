"""What the modules of a model of JAX return, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

# Public, but without a promise: nothing else tells inside which transformation JAX is.
from jax.extend.core import get_opaque_trace_state

from coordconv.backends.jax.arrays import to_numpy
from coordconv.grid import Array
from coordconv.recording import (
    OUTPUT,
    Calls,
    Names,
    OutputGradient,
    Recorded,
    See,
    input_names,
    mapped,
    record,
)


def recorded(
    call: Callable[..., Any], names: Names, output_gradient: OutputGradient, channels_last: bool
) -> Recorded:
    """A model as a function on NumPy arrays; see ``recorded`` of NNX and of Linen.

    Args:
        call: ``call(see, *inputs)`` calls the model, lets ``see(name, output)`` go on in place of
            what each module in it returned, and returns the model's output. It runs twice if
            gradients are wanted.
        names: other names for its modules.
        output_gradient: the output's gradient, to have gradients recorded, too.
        channels_last: whether to move channels from axis 1 to the last and back.
    """
    to_jax, numpy = (_moved_last, _moved_first) if channels_last else (jnp.asarray, to_numpy)

    def run(*inputs: Array) -> Mapping[str, Array]:
        given = dict(zip(input_names(len(inputs)), map(to_jax, inputs), strict=True))

        def gradients(
            outputs: dict[str, Any], watched: dict[str, Any], dys: dict[str, Array]
        ) -> dict[str, Array]:
            """Those of the inputs, and of zeros that a second call adds to what modules return."""
            reached = set(given)  # not what is traced only where gradients are taken

            def perturbed(points: dict[str, jax.Array]) -> dict[str, jax.Array]:
                calls, ends = Calls(names), {}

                def add(name: str, part: Any) -> Any:
                    if name not in points:
                        return part
                    reached.add(name)
                    return part + points[name]

                def end(name: str, part: Any) -> None:
                    if name in outputs:
                        ends[name] = part

                see = _untraced(lambda name, output: mapped(add, calls.name(name), output))
                output = call(see, *(points.get(name, x) for name, x in given.items()))
                mapped(end, OUTPUT, output)
                return ends

            points = {n: x if n in given else jnp.zeros_like(x) for n, x in watched.items()}
            _, pull_back = jax.vjp(perturbed, points)
            dy = {name: to_jax(dys[name]).astype(output.dtype) for name, output in outputs.items()}
            (found,) = pull_back(dy)
            return {name: numpy(found[name]) for name in watched if name in reached}

        return record(
            lambda see: call(_untraced(see), *given.values()),
            [*given.values()],
            names,
            output_gradient,
            numpy=numpy,
            is_array=_is_array,
            is_floating=lambda part: jnp.issubdtype(part.dtype, jnp.floating),
            watch=lambda part: (part, part),
            gradients=gradients,
        )

    return run


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


def _moved_last(x: Array) -> jax.Array:
    return jnp.asarray(np.moveaxis(x, 1, -1) if x.ndim > 2 else x)


def _moved_first(x: Any) -> Array:
    array = to_numpy(x)
    return np.array(np.moveaxis(array, -1, 1), order="C") if array.ndim > 2 else array
