"""Windows in Paddle: in a program that ``to_static`` traces, the numbers of one may be frozen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import paddle
from paddle import Tensor

from coordconv import windows
from coordconv.windows import Window


class _Entered(threading.local):
    traced = False  # whether the window was entered as a program was traced


_entered = _Entered()


def window_of(given: Window | None, x: Tensor, rank: int) -> Window | None:
    """The window of an input, checked; None if there is none, or one that is the whole frame."""
    window = windows.current(given)
    if window is None:
        return None
    if given is None and not paddle.in_dynamic_mode() and not _entered.traced:
        raise ValueError(
            "a window that was entered outside of to_static would be frozen in the program: enter "
            "it inside, with its arrays among the arguments"
        )
    window.check(rank, x.shape[0] if x.shape[0] >= 0 else None)
    return None if window.is_whole(rank) else window


@contextmanager
def _remembered(_: Window | None) -> Iterator[None]:
    before, _entered.traced = _entered.traced, not paddle.in_dynamic_mode()
    try:
        yield
    finally:
        _entered.traced = before


windows.LISTENERS.append(_remembered)
paddle.jit.ignore_module([windows])  # whose code to_static would write anew, and not understand
