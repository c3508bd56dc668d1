"""ConvGeometry: the arithmetic of a convolution's shapes, without a framework."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

Pairs: TypeAlias = tuple[tuple[int, int], ...]


class PerAxis(NamedTuple):
    """The options that have one int per axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    input_dilation: tuple[int, ...]


@dataclass(frozen=True)
class ConvGeometry:
    """Kernel, stride, padding, dilation and groups of a convolution of one to three axes.

    Args:
        kernel: the kernel's length on each axis; its number of items is the rank.
        stride: one int for all axes or one per axis, likewise below.
        padding: an int, one int per axis, one ``(before, after)`` pair per axis, or ``"same"`` for
            an output of ``ceil(input / stride)`` samples, the odd sample of padding behind. Of a
            transposed convolution, what is cut off its full output.
        dilation: the distance between the kernel's taps.
        groups: the number of groups that input and output channels are divided into.
        transposed: the transposed convolution, whose output is ``stride`` times the input.
        output_padding: samples added behind the output of a transposed convolution.
        input_dilation: the distance between input samples, zeros in between (JAX's
            ``lhs_dilation``).
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``; of a transposed
            convolution ``"zeros"``, or ``"circular"`` for an output of ``stride`` times the input
            that goes round, shifted by the padding before (Flax's ``CIRCULAR``).

    Attributes:
        per_axis: kernel, stride, dilation, output_padding and input_dilation, one int per axis.
        pointwise: whether each output sample is a matrix times its own input sample, and no more.

    Raises:
        TypeError: a value that is not an int, or not one per axis.
        ValueError: a value out of range, an unknown padding mode, or options that exclude one
            another.

    Example:
        >>> ConvGeometry((3, 3), stride=2, padding=1).output_shape((7, 7))
        (4, 4)
        >>> ConvGeometry((3,), stride=2, transposed=True).output_shape((4,))
        (9,)
    """

    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | Pairs | Literal["same"] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    transposed: bool = False
    output_padding: int | tuple[int, ...] = 0
    input_dilation: int | tuple[int, ...] = 1
    padding_mode: str = "zeros"

    # Kept, since a layer asks in every call.
    per_axis: PerAxis = field(init=False, repr=False, compare=False)
    pointwise: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, Sequence):
            raise TypeError(f"kernel must be one int per axis, got {self.kernel!r}")
        rank = len(self.kernel)
        if not 1 <= rank <= 3:
            raise ValueError(f"kernel must have 1, 2 or 3 axes, got {self.kernel}")
        for name in PerAxis._fields:
            least = 0 if name == "output_padding" else 1
            object.__setattr__(self, name, _per_axis(name, getattr(self, name), rank, least))
        per_axis = PerAxis(*(getattr(self, name) for name in PerAxis._fields))
        object.__setattr__(self, "per_axis", per_axis)
        if self.padding != "same":
            pairs = _pairs(self.padding, rank)
            object.__setattr__(self, "padding", pairs)
            copies = self.padding_mode != "zeros" and not self.transposed
            if copies and min(map(min, pairs)) < 0:
                raise ValueError(f"{self.padding_mode} padding must not be negative, got {pairs}")
        if not is_int(self.groups):
            raise TypeError(f"groups must be an int, got {self.groups!r}")
        if self.groups < 1:
            raise ValueError(f"groups must be positive, got {self.groups}")
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(
                f"padding_mode must be one of {PADDING_MODES}, got {self.padding_mode!r}"
            )
        if self.transposed and (
            self.padding == "same"
            or self.padding_mode not in ("zeros", "circular")
            or max(self.per_axis.input_dilation) > 1
        ):
            raise ValueError(
                "a transposed convolution takes explicit zero or circular padding and no "
                "input_dilation"
            )
        if not self.transposed and any(self.per_axis.output_padding):
            raise ValueError("output_padding belongs to a transposed convolution")
        object.__setattr__(self, "pointwise", self._is_pointwise())

    @property
    def rank(self) -> int:
        """The number of spatial axes."""
        return len(self.kernel)

    @property
    def taps(self) -> int:
        """The number of taps of the kernel."""
        return math.prod(self.kernel)

    def _is_pointwise(self) -> bool:
        steps = self.per_axis.stride + self.per_axis.input_dilation
        return (
            self.taps == self.groups == max(steps) == 1
            and not self.transposed
            and (self.padding == "same" or not any(map(any, self.padding)))  # type: ignore[arg-type]
        )

    def pads(self, shape: Sequence[int]) -> Pairs:
        """The ``(before, after)`` padding of each axis for an input of spatial ``shape``."""
        if self.padding != "same":
            return self.padding  # type: ignore[return-value]  # pairs since __post_init__
        pairs = []
        for n, k, s, d in zip(shape, *self.per_axis[:3], strict=True):
            reach = (k - 1) * d
            # At stride 1 the length does not matter, which may be symbolic.
            total = reach if s == 1 else max((-(-n // s) - 1) * s + reach + 1 - n, 0)
            pairs.append((total // 2, total - total // 2))
        return tuple(pairs)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The spatial shape of the output for an input of spatial ``shape``.

        Raises:
            ValueError: ``shape`` has another rank or an empty axis, reflect padding is not
                narrower than its axis, or the output would be empty.
        """
        shape = tuple(shape)
        if len(shape) != self.rank:
            raise ValueError(f"input must have {self.rank} spatial axes, got shape {shape}")
        if min(shape) < 1:
            raise ValueError(f"input must have no empty axis, got spatial shape {shape}")
        pads = self.pads(shape)
        if self.padding_mode == "reflect" and any(
            max(pair) >= n for pair, n in zip(pads, shape, strict=True)
        ):
            raise ValueError(
                f"reflect padding {pads} is too wide for an input of spatial shape {shape}: "
                "it must be narrower than the axis"
            )
        lengths = self.lengths(shape)
        if min(lengths) < 1:
            raise ValueError(
                f"output would be empty, of spatial shape {lengths}: kernel {self.kernel} "
                f"with dilation {self.dilation} does not fit an input of spatial shape {shape} "
                f"padded by {pads}"
            )
        return lengths

    def lengths(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The output's shape by arithmetic alone: without a check, and of symbolic lengths, too."""
        lengths = []
        for n, (before, after), k, s, d, extra, hole in zip(
            shape, self.pads(shape), *self.per_axis, strict=True
        ):
            reach = d * (k - 1) + 1
            if self.transposed and self.padding_mode == "circular":
                lengths.append(n * s)
            elif self.transposed:
                lengths.append((n - 1) * s + reach + extra - before - after)
            elif self.padding_mode == "zeros":
                lengths.append(((n - 1) * hole + 1 + before + after - reach) // s + 1)
            else:  # these modes copy samples, so they pad before the holes are made
                lengths.append(((n + before + after - 1) * hole + 1 - reach) // s + 1)
        return tuple(lengths)


def check_input(
    shape: Sequence[int],
    *,
    rank: int,
    channels: int | None,
    coords: int,
    channel_axis: int,
    batched: int,
) -> tuple[int, ...]:
    """The spatial shape of a layer's input of that ``shape``, or a ValueError: what is wrong.

    ``channels`` are the features that the layer was made for, None for any number; ``coords`` is
    the number of its coordinates, to recognise an input that has them already; ``channel_axis`` is
    ``-1`` or ``-1 - rank``; ``batched`` is 1 for exactly one batch axis, 0 for one or none, -1 for
    any number.
    """
    shape = tuple(shape)
    batch_axes = len(shape) - rank - 1
    if batch_axes < 0 or (batched == 1 and batch_axes != 1) or (batched == 0 and batch_axes > 1):
        space = ", ".join("DHW"[-rank:]) if rank > 1 else "L"
        form = f"C, {space}" if channel_axis != -1 else f"{space}, C"
        wanted = {1: f"(N, {form})", 0: f"(N, {form}) or ({form})", -1: f"(..., {form})"}[batched]
        raise ValueError(f"input must have shape {wanted}, got {shape}")
    if channels is not None and shape[channel_axis] != channels:
        problem = f"input must have {channels} channels, got {shape[channel_axis]} in shape {shape}"
        if shape[channel_axis] == channels + coords:
            problem += ": pass the features alone, the layer adds the coordinates itself"
        raise ValueError(problem)
    spatial = shape[-rank - 1 : -1] if channel_axis == -1 else shape[-rank:]
    if 0 in spatial:
        raise ValueError(f"input must have no empty axis, got shape {shape}")
    return spatial


def _per_axis(name: str, value: Any, rank: int, least: int) -> tuple[int, ...]:
    values = (value,) * rank if is_int(value) else value
    if not _are_ints(values, rank):
        raise TypeError(f"{name} must be an int or {rank} ints, got {value!r}")
    if min(values) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return tuple(map(int, values))


def _pairs(value: Any, rank: int) -> Pairs:
    values = (value,) * rank if is_int(value) else value
    items = values if isinstance(values, Sequence) else ()
    pairs = [(item, item) if is_int(item) else item for item in items]
    if len(pairs) != rank or not all(_are_ints(pair, 2) for pair in pairs):
        raise TypeError(
            f"padding must be 'same', an int, {rank} ints or {rank} (before, after) pairs, "
            f"got {value!r}"
        )
    return tuple((int(before), int(after)) for before, after in pairs)


def _are_ints(values: Any, count: int) -> bool:
    return isinstance(values, Sequence) and len(values) == count and all(map(is_int, values))


def is_int(value: Any) -> bool:
    """Whether it is an integer of any library, and no truth value."""
    # First what a compiler of torch 2.4 can tell of a symbolic size.
    return type(value) is int or (hasattr(value, "__index__") and not isinstance(value, bool))
