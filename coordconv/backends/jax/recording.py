"""What the modules of a model of JAX return, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
from flax.core.tracers import current_trace
from jax import numpy as jnp

from coordconv.backends.jax import arrays
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

# (module, its name, its call) -> what it returned, or what goes on instead
Watch: TypeAlias = Callable[[Any, str, Callable[[], Any]], Any]


def recorded(
    run: Callable[..., Any], names: Names, output_gradient: OutputGradient, channels_last: bool
) -> Recorded:
    """A model as a function on NumPy arrays; see ``recorded`` of NNX and of Linen.

    ``run(watch, *inputs)`` has ``watch`` call each module in the model, and returns the model's
    output. It runs twice if gradients are wanted.
    """
    to_jax: Any = arrays.channels_last if channels_last else jnp.asarray
    numpy = arrays.channels_first if channels_last else arrays.to_numpy

    def called(*inputs: Array) -> Mapping[str, Array]:
        given = dict(zip(input_names(len(inputs)), map(to_jax, inputs), strict=True))

        def gradients(
            outputs: dict[str, Any], watched: dict[str, Any], dys: dict[str, Array]
        ) -> dict[str, Array]:
            """Those of the inputs, and of zeros that a second call adds to what modules return."""
            reached = set(given)  # not what is traced only where gradients are taken

            def perturbed(points: dict[str, jax.Array]) -> dict[str, jax.Array]:
                calls, ends = Calls(names), dict[str, Any]()

                def add(name: str, part: Any) -> Any:
                    if name not in points:
                        return part
                    reached.add(name)
                    return part + points[name]

                watch = _watching(lambda name, output: mapped(add, calls.name(name), output))
                output = run(watch, *(points.get(name, x) for name, x in given.items()))
                mapped(ends.setdefault, OUTPUT, output)
                return {name: ends[name] for name in outputs}

            points = {n: x if n in given else jnp.zeros_like(x) for n, x in watched.items()}
            _, pull_back = jax.vjp(perturbed, points)
            dy = {name: to_jax(dys[name]).astype(output.dtype) for name, output in outputs.items()}
            (found,) = pull_back(dy)
            return {name: numpy(found[name]) for name in watched if name in reached}

        return record(
            lambda see: run(_watching(see), *given.values()),
            [*given.values()],
            names,
            output_gradient,
            numpy=numpy,
            is_array=_is_array,
            is_floating=lambda part: jnp.issubdtype(part.dtype, jnp.floating),
            watch=lambda part: (part, part),
            gradients=gradients,
        )

    return called


def _watching(see: See) -> Watch:
    """A ``watch`` that has ``see`` look at what modules return.

    But not inside a module's own call, as from super(), nor inside a scan or a jitted function of
    the model's own: there are no values there, and whether a call is traced once more depends on
    JAX's caches.
    """
    outside, running = current_trace(), set()

    def watch(module: Any, name: str, call: Callable[[], Any]) -> Any:
        if id(module) in running:
            return call()
        running.add(id(module))
        try:
            output = call()
        finally:
            running.discard(id(module))
        return see(name, output) if current_trace() == outside else output

    return watch


def _is_array(part: Any) -> bool:
    """Whether these are numbers, which keys of random numbers are not."""
    return isinstance(part, jax.Array) and not jnp.issubdtype(part.dtype, jax.dtypes.extended)
