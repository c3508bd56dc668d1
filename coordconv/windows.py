"""Which part of its frame an input shows: crops, tiles and shards.

The coordinates of a layer without a window are those of the whole frame: its first sample is at one
end of the scale, and its last at the other. With a :class:`Window` the input is a part of a larger
frame, and has the coordinates that this part has there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np

from coordconv.coordinates import axis_tokens
from coordconv.functions import AXES

_FORMATS = ("xyxy", "xywh", "yxyx", "yxhw")


class Window:
    """Which part of its frame an input shows, on each axis, for the batch or for each sample.

    With ``n`` samples of the input on an axis, the frame has ``F = n * frame / (stop - start)``
    samples, and sample ``i`` of the input has the coordinate of place ``start / frame * F + i`` of
    the frame. So ``Window(0, 1)`` is the whole frame. Of a flipped input, with ``start`` greater
    than ``stop``, ``F`` counts as positive and the place is ``start / frame * F - 1 - i``. A place
    need not be a whole number, as when the input was resized after it was cut out, and beyond the
    frame the scale goes on. With ``align="edges"`` one window is right at every stride of a
    network. A frame of at most one sample has coordinate 0 with ``align="corners"``, as an axis of
    length 1.

    Args:
        start: where the input starts, as a share of ``frame``: a number for all axes; one for each,
            ``(axes,)`` in the order of the input's, so that the last is ``x``; ``(N, axes)`` for
            each sample of a batch; or a mapping of tokens to a number or an array ``(N,)``, where
            an axis that is not named is whole. Arrays are NumPy's or a framework's, also traced;
            they are copied.
        stop: where it stops, likewise. Less than ``start`` where the input is flipped.
        frame: the length of the frame in the unit of the others, likewise: 1 by default.

    Raises:
        TypeError: what is neither a number nor an array.
        ValueError: a shape of other axes than one to three; numbers that are not finite, ``start``
            and ``stop`` that are equal, a frame that is not positive. A framework's arrays are not
            looked into. Where it is used: samples or axes other than the input's.

    Example:
        >>> from coordconv import Coordinates, coordinate_grid
        >>> left = Window({"x": 0.0}, {"x": 0.5})
        >>> coordinate_grid((1, 4), Coordinates("x", align="edges"), window=left)
        array([[[[-0.875, -0.625, -0.375, -0.125]]]], dtype=float32)
    """

    def __init__(self, start: Any = 0.0, stop: Any = 1.0, *, frame: Any = 1.0) -> None:
        given = {"start": start, "stop": stop, "frame": frame}
        by_axis = {name: _by_axis(name, value) for name, value in given.items()}
        ranks = {rank for rank, _ in by_axis.values() if rank}
        if len(ranks) > 1:
            raise ValueError(f"start, stop and frame must have as many axes, got {sorted(ranks)}")
        self.rank = ranks.pop() if ranks else None  # None: of any
        for token in AXES:
            length = by_axis["frame"][1].get(token, 1.0)
            whole = {"start": 0.0, "stop": length, "frame": length}
            for name, (_, values) in by_axis.items():
                value = _as_array(name, values.get(token, whole[name]))
                if hasattr(value, "clone"):  # of NumPy's it is a copy: a caller may write to boxes
                    value = value.clone()
                setattr(self, f"{name}_{token}", value)
            if not _is_tracing():
                _check_values(token, *self.on(token))
        self.token = _Token()

    @classmethod
    def from_boxes(cls, boxes: Any, frame: Sequence[Any], format: str = "xyxy") -> Window:
        """The window of boxes in pixels, as croppers, tilers and detectors have them.

        Args:
            boxes: ``(4,)`` or ``(N, 4)``: the edges of the part of a frame that was cut out, the
                left edge of the first pixel being 0. A box may reach beyond the frame, where the
                scale goes on.
            frame: height and width of the frame, in pixels: two numbers, or an array ``(N, 2)``.
            format: what a box has: ``"xyxy"``, ``"xywh"``, ``"yxyx"`` or ``"yxhw"``, the latter as
                torchvision's ``RandomResizedCrop.get_params`` has it: top, left, height, width.

        Raises:
            TypeError: a framework's boxes of 8 bits with widths, which would be added in 8 bits.
            ValueError: boxes of another shape, another format; what the constructor refuses.

        Example:
            >>> Window.from_boxes([16, 0, 32, 24], frame=(48, 64)).start_x
            array(16.)
        """
        if format not in _FORMATS:
            raise ValueError(f"format must be one of {_FORMATS}, got {format!r}")
        boxes = _as_array("boxes", boxes)
        if len(boxes.shape) not in (1, 2) or boxes.shape[-1] != 4:
            raise ValueError(f"boxes must have shape (4,) or (N, 4), got {tuple(boxes.shape)}")
        first, second, third, fourth = (boxes[..., i] for i in range(4))
        if format in ("xywh", "yxhw"):
            if str(boxes.dtype).endswith("int8"):  # a framework's; NumPy's are floats by now
                raise TypeError(
                    f"boxes as {format!r} must be of more than 8 bits, since their sums go beyond "
                    f"{boxes.dtype}: make them floats"
                )
            third, fourth = first + third, second + fourth
        one, other = format[0], format[1]
        start, stop = {one: first, other: second}, {one: third, other: fourth}
        sizes = _by_axis("frame", frame)[1]
        return cls(start, stop, frame={token: sizes[token] for token in "xy"})

    @classmethod
    def of_shard(cls, index: Any, count: Any, axis: str) -> Window:
        """The window of one of several equal parts of an input that is split along an axis.

        Args:
            index: which part, from 0 on, as ``jax.lax.axis_index`` or a rank say; may be traced.
            count: how many there are.
            axis: the token of the axis.

        Raises:
            TypeError: an index or a count that is neither a number nor an array.
            ValueError: an axis that is not x, y or z; a count that is not positive; an index beyond
                it, where both are known.

        Example:
            >>> Window.of_shard(1, 2, "y").start_y
            array(1.)
        """
        index, given = _as_array("index", index), index
        known = isinstance(index, np.ndarray) and isinstance(count, (int, float))
        if known and not ((index >= 0) & (index < count)).all():
            raise ValueError(f"index must be from 0 to {count - 1}, got {given}")
        return cls({axis: index}, {axis: index + 1}, frame={axis: count})

    def __repr__(self) -> str:
        def shown(index: int) -> str:
            arrays = {token: self.on(token)[index] for token in AXES[: self.rank or 3]}
            return str(
                {t: a.tolist() if isinstance(a, np.ndarray) else a for t, a in arrays.items()}
            )

        return f"Window({shown(0)}, {shown(1)}, frame={shown(2)})"

    def widened(self, before: Any, after: Any, axis: str, length: int) -> Window:
        """The window of an input to which samples were added at the ends of an axis, as a halo.

        Args:
            before: the number of samples in front.
            after: the number behind.
            axis: the token of the axis.
            length: the number of samples on it before.

        Example:
            >>> half = Window.of_shard(1, 2, "y")
            >>> half.widened(1, 0, "y", 8).start_y  # of 16 rows, from row 7 on
            array(0.875)
        """
        start, stop, frame = self.on(axis)
        step = (stop - start) / length
        names = {t: self.on(t) for t in AXES[: self.rank or 3]}
        names[axis] = (start - before * step, stop + after * step, frame)
        parts = ({t: values[i] for t, values in names.items()} for i in range(3))
        made = Window(next(parts), next(parts), frame=next(parts))
        made.rank = self.rank
        return made

    def on(self, token: str) -> tuple[Any, Any, Any]:
        """Start, stop and frame on an axis, numbers or arrays ``(N,)``."""
        return (
            getattr(self, f"start_{token}"),
            getattr(self, f"stop_{token}"),
            getattr(self, f"frame_{token}"),
        )

    def parts(self) -> tuple[tuple[Any, ...], int | None]:
        """All arrays, and the number of axes: what :meth:`of_parts` takes, unlooked at."""
        return tuple(each for token in AXES for each in self.on(token)), self.rank

    @classmethod
    def of_parts(cls, rank: int | None, parts: Sequence[Any]) -> Window:
        """The inverse of :meth:`parts`, of other arrays maybe."""
        made = cls.__new__(cls)
        made.rank, made.token = rank, _Token()
        names = ((name, token) for token in AXES for name in ("start", "stop", "frame"))
        for (name, token), part in zip(names, parts, strict=True):
            setattr(made, f"{name}_{token}", part)
        return made

    def is_whole(self, rank: int) -> bool:
        """Whether it is known to be the whole frame, on the axes of a grid."""
        numbers = [self.on(token) for token in axis_tokens(rank)]
        return all(
            all(isinstance(each, np.ndarray) for each in values)
            and bool(np.all(values[0] == 0) and np.all(values[1] == values[2]))
            for values in numbers
        )

    def check(self, rank: int, batch: int | None) -> None:
        """Raise ValueError if an input of that many axes and samples cannot have the window."""
        if self.rank not in (None, rank):
            raise ValueError(f"window must have {rank} axes as the input, got {self.rank}")
        if batch is None:
            return
        for token in axis_tokens(rank):
            for values in self.on(token):
                shape: tuple[Any, ...] = getattr(values, "shape", ())
                if shape and shape[0] not in (1, batch):
                    raise ValueError(
                        f"window must be for one sample or for the {batch} of the input, "
                        f"got {shape[0]}"
                    )

    def in_frame(
        self,
        positions: Sequence[Any],
        shape: Sequence[Any],
        convert: Callable[[Any], Any] = lambda each: np.asarray(each, np.float64),
    ) -> tuple[list[Any], list[Any]]:
        """The places in the frame of samples of the input, and the frame's lengths.

        Args:
            positions: per axis the samples' indices ``(m,)``, or ``(taps, m)``.
            shape: the spatial shape of the input.
            convert: makes of a number or an array ``(N,)`` an array of the framework and type that
                are computed with: NumPy's, in float64, by default.

        Returns:
            Per axis places ``(N, m)`` or ``(N, taps, m)``, and lengths ``(N, 1)`` or ``(N, 1, 1)``;
            for a window of the batch ``N`` is 1.
        """
        places, lengths = [], []
        rank = len(shape)
        for axis, (position, n) in enumerate(zip(positions, shape, strict=True)):
            numbers = (convert(each).reshape((-1,)) for each in self.on(AXES[rank - 1 - axis]))
            start, stop, frame = (
                each.reshape((-1,) + (1,) * len(position.shape)) for each in numbers
            )
            share = stop - start
            size = abs(share)
            way = share / size  # 1, or -1 where it is flipped
            places.append(start * n / size - (1 - way) / 2 + way * position)
            lengths.append(frame * n / size)
        return places, lengths


class _Token:
    """Stands for a window where what is compiled is kept; it holds no array."""


@contextmanager
def window(window: Window | None) -> Iterator[None]:
    """Within it every CoordConv that is called in this thread has that window.

    The ``window=`` of a layer's own call comes before it, and a ``with`` inside of another before
    that outside; None is no window. What was made of a network before (an exported program, a
    scripted module) does not see it; a fused layer refuses it.

    In ``torch.compile`` the values may change without a further graph. In JAX, enter it inside of
    the function that is compiled, with the window's arrays among its arguments; entered outside, a
    compiled function is compiled anew for each window. In Paddle the same holds of ``to_static``,
    where a window from outside is refused as it is traced. Gradient checkpoints that compute anew
    after the ``with`` no longer see it: there pass ``window=``.

    Raises:
        TypeError: what is no :class:`Window`.

    Example:
        >>> with window(Window(0, 0.5)):
        ...     pass  # model(left_upper_quarter)
    """
    if window is not None and not isinstance(window, Window):
        raise TypeError(f"window must be a coordconv.Window or None, got {window!r}")
    with ExitStack() as stack:
        for enter in LISTENERS:
            stack.enter_context(enter(window))
        before, _local.window = _entered(), window
        stack.callback(setattr, _local, "window", before)
        yield


# What a framework has to do when a window is entered, for functions that it compiled.
LISTENERS: list[Callable[[Window | None], AbstractContextManager[Any]]] = []


# Of this very class, as the compiler of torch 2.4 knows no subclass of it.
_local = threading.local()


def _entered() -> Window | None:
    """What this thread has entered; a new thread has nothing yet."""
    return getattr(_local, "window", None)


def current(given: Any = None) -> Window | None:
    """The window of a layer's call, or else the one that was entered."""
    if given is None:
        return _entered()
    if not isinstance(given, Window):
        raise TypeError(f"window must be a coordconv.Window or None, got {given!r}")
    return given


def called(window: Window | None, function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns within a layer's window, for one that cannot be given it."""
    if window is None:
        return function(*args)
    before, _local.window = _entered(), current(window)
    try:
        return function(*args)
    finally:
        _local.window = before


def check_fused() -> None:
    """Raise ValueError in a fused layer, if a window was entered."""
    if current() is not None:
        raise ValueError("a fused layer has the maps of whole frames, and takes no window")


def _by_axis(name: str, value: Any) -> tuple[int | None, dict[str, Any]]:
    """The number of axes that a value is for, if it says, and an array for each axis."""
    if isinstance(value, Mapping):
        unknown = [token for token in value if token not in tuple(AXES)]
        if unknown:
            raise ValueError(f"{name} must be for the axes x, y and z, got {unknown[0]!r}")
        arrays = {token: _as_array(name, each) for token, each in value.items()}
        for array in arrays.values():
            if len(shape := getattr(array, "shape", ())) > 1:
                raise ValueError(f"{name} of an axis must have shape () or (N,), got {shape}")
        return None, arrays
    if _is_tracing() and isinstance(value, (list, tuple)):
        return len(value), {AXES[len(value) - 1 - axis]: n for axis, n in enumerate(value)}
    array = _as_array(name, value)
    shape = tuple(getattr(array, "shape", ()))
    if not shape:
        return None, dict.fromkeys(AXES, array)
    if len(shape) > 2 or shape[-1] not in (1, 2, 3):
        raise ValueError(
            f"{name} must be a number, or have shape (axes,) or (N, axes) for 1 to 3 axes, "
            f"got {shape}"
        )
    rank = shape[-1]
    return rank, {AXES[rank - 1 - axis]: array[..., axis] for axis in range(rank)}


def _as_array(name: str, value: Any) -> Any:
    """A framework's array as it is, and everything else as NumPy's, of floats.

    Where a compiler looks on numbers stay numbers, since it makes no constants of NumPy's arrays.
    """
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic):
        return value.astype(np.float64) if isinstance(value, np.ndarray) else value
    if _is_tracing() and isinstance(value, (int, float)):
        return value
    try:
        if value is not None:
            return np.asarray(value, np.float64)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name} must be numbers or an array, got {value!r}")


# Ask whether a compiler looks on, which takes no questions to the values of NumPy's arrays.
TRACERS: list[Callable[[], bool]] = []


def _is_tracing() -> bool:
    return any(is_tracing() for is_tracing in TRACERS)


def _check_values(token: str, *values: Any) -> None:
    """Raise ValueError if an axis has no such window."""
    for name, value in zip(("start", "stop", "frame"), values, strict=True):
        if isinstance(value, np.ndarray) and not np.isfinite(value).all():
            raise ValueError(f"{name} on axis {token!r} must be finite, got {value}")
    start, stop, frame = values
    if isinstance(frame, np.ndarray) and (frame <= 0).any():
        raise ValueError(f"frame on axis {token!r} must be positive, got {frame}")
    if isinstance(start, np.ndarray) and isinstance(stop, np.ndarray) and (start == stop).any():
        raise ValueError(
            f"start and stop on axis {token!r} must differ, got {start} and {stop}: an input shows "
            "a part of its frame that is not empty"
        )
