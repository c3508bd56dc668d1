"""What a :class:`coordconv.Window` is to JAX: a tree of arrays, and a part of what jit knows by.

A function that was compiled without a window, or with another one, must not be used again where one
is entered around its call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
from jax import numpy as jnp

from coordconv import windows
from coordconv.windows import Window

# JAX has had contexts of a user's own, on which compiled functions depend, since 0.8.
_CONTEXT: Any = (
    jax.make_user_context(default_value=None) if hasattr(jax, "make_user_context") else None
)


def window_of(given: Window | None, inputs: jax.Array, rank: int) -> Window | None:
    """The window of some inputs, checked; None if there is none, or one that is the whole frame."""
    window = windows.current(given)
    if window is None:
        return None
    batch = inputs.shape[: -1 - rank]
    if len(batch) > 1 and any(part.shape for part in window.parts()[0]):
        raise ValueError(f"window must be one for all samples where the batch has axes {batch}")
    known = all(isinstance(n, int) for n in batch)
    window.check(rank, math.prod(batch) if known else None)
    return None if window.is_whole(rank) else window


def _entered(window: Window | None) -> AbstractContextManager[Any]:
    if _CONTEXT is not None:
        return _CONTEXT(None if window is None else window.token)  # type: ignore[no-any-return]
    return _forgetting()


@contextmanager
def _forgetting() -> Iterator[None]:
    """Let JAX compile everything anew, where it has no such contexts."""
    if isinstance(jnp.zeros(()), jax.core.Tracer):  # what is compiled is compiled with the window
        yield
        return
    jax.clear_caches()
    try:
        yield
    finally:
        jax.clear_caches()


windows.LISTENERS.append(_entered)
jax.tree_util.register_pytree_node(
    Window, lambda window: window.parts(), lambda rank, parts: Window.of_parts(rank, parts)
)
