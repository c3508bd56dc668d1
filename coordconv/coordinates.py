"""Coordinates: which coordinate channels, in which order, on which scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, SupportsFloat, SupportsIndex, TypeAlias

AXES = "xyz"  # the last axis first
TOKENS = frozenset(AXES + "r")

CoordinatesLike: TypeAlias = "Coordinates | str | Sequence[str] | None"


class _Convention(NamedTuple):
    """What another implementation appends."""

    channels: Mapping[int, str]  # by rank; with the radius where it has one
    r_center: float = 0.0
    span: tuple[float, float] = (-1.0, 1.0)


_NAMED = {
    "paddle": _Convention({2: "xy"}),
    # arange(w) / ((w - 1) * 2) - 1: its parentheses moved in 2021
    "paddledetection": _Convention({2: "xy"}, span=(-1.0, -0.5)),
    "uber": _Convention({2: "xyr"}),
    "paper": _Convention({2: "xyr"}, 0.5),
    "mkocabas": _Convention({2: "yxr"}, 0.5),
    "walsvid": _Convention({1: "xr", 2: "yxr"}, 0.5),
    "keras": _Convention({1: "x", 2: "yxr", 3: "zyx"}, 0.5),
}


@dataclass(frozen=True)
class Coordinates:
    """Which coordinate channels a layer sees, in which order, and on which scale.

    Args:
        channels: the tokens, in the order in which the channels are appended: a string such as
            ``"xyr"`` or a sequence such as ``("x", "y", "r")``. ``x`` runs along the last axis
            (columns), ``y`` along the one before (rows), ``z`` along the one before that; ``r`` is
            the distance from the centre, ``sqrt(sum((coordinate - r_center) ** 2))`` over all the
            axes of the grid, in coordinate units.
        span: the values at the two ends of an axis, first to last. Any two different finite
            numbers; a decreasing span turns the axis round.
        align: ``"corners"`` puts the ends of ``span`` on the first and the last sample;
            ``"edges"`` on the outer edges of the first and the last sample, so that sample ``i``
            of ``n`` on ``span=(-1, 1)`` reads ``(2 * i + 1) / n - 1``.
        outside: what padding reads. ``"zero"``: what it reads in any other channel, which with
            zero padding is 0. ``"extend"``: the ramp goes on beyond the border, whatever the
            padding mode does to the features.
        r_center: the centre of ``r`` on every axis, in coordinate units.

    With ``align="corners"`` an axis of length 1 has coordinate 0.

    Raises:
        TypeError: ``channels`` is neither a string nor a sequence of strings.
        ValueError: an unknown, repeated or missing token; equal or non-finite span ends; an
            unknown ``align`` or ``outside``; a non-finite ``r_center``.

    Example:
        >>> Coordinates(("y", "x"), span=(0, 1))
        Coordinates('yx', span=(0.0, 1.0))
        >>> Coordinates("xyr") == Coordinates(["x", "y", "r"])
        True

    Source:
        Liu et al., "An Intriguing Failing of Convolutional Neural Networks and the CoordConv
        Solution", NeurIPS 2018, section 3.
    """

    channels: str = "xy"
    span: tuple[float, float] = field(default=(-1.0, 1.0), kw_only=True)
    align: Literal["corners", "edges"] = field(default="corners", kw_only=True)
    outside: Literal["zero", "extend"] = field(default="zero", kw_only=True)
    r_center: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", _checked_channels(self.channels))
        object.__setattr__(self, "span", _checked_span(self.span))
        _check_word("align", self.align, ("corners", "edges"))
        _check_word("outside", self.outside, ("zero", "extend"))
        object.__setattr__(self, "r_center", _finite("r_center", self.r_center))

    def __len__(self) -> int:
        """The number of coordinate channels."""
        return len(self.channels)

    def __repr__(self) -> str:
        _, *options = fields(self)
        given = (f", {o.name}={v!r}" for o in options if (v := getattr(self, o.name)) != o.default)
        return f"Coordinates({self.channels!r}{''.join(given)})"

    def only(self, tokens: str) -> Coordinates:
        """Some of the channels, on the same scale."""
        return Coordinates(  # the compiler of torch 2.4 cannot see into dataclasses.replace
            tokens,
            span=self.span,
            align=self.align,
            outside=self.outside,
            r_center=self.r_center,
        )

    @classmethod
    def resolve(cls, coords: CoordinatesLike, rank: int) -> Coordinates:
        """Turn a layer's ``coords`` argument into Coordinates that fit a grid of ``rank`` axes.

        Args:
            coords: None for all axes (``x``, ``xy``, ``xyz`` by rank), tokens, or Coordinates.
            rank: the number of axes of the grid, 1 to 3.

        Raises:
            TypeError: as the constructor.
            ValueError: as the constructor; a token lies beyond the rank, as ``z`` does in 2-D.

        Example:
            >>> Coordinates.resolve(None, 3)
            Coordinates('xyz')
            >>> Coordinates.resolve("xyz", 2)
            Traceback (most recent call last):
            ...
            ValueError: coords 'xyz' name axis 'z', which a 2-D grid does not have: want xyr
        """
        axes = axis_tokens(rank)
        if not isinstance(coords, cls):
            coords = cls(axes if coords is None else coords)  # type: ignore[arg-type]
        beyond = [token for token in coords.channels if token not in axes + "r"]
        if beyond:
            raise ValueError(
                f"coords {coords.channels!r} name axis {', '.join(map(repr, beyond))}, which a "
                f"{rank}-D grid does not have: want {axes}r"
            )
        return coords

    @classmethod
    def named(cls, name: str, *, rank: int = 2, with_r: bool = False) -> Coordinates:
        """The convention of another implementation, so that its weights mean the same here.

        Args:
            name: ``"paddle"`` (PaddleDetection 2.0 and 2.1, SOLO and SOLOv2, and the article this
                project started from), ``"paddledetection"`` (PaddleDetection since 2.2, whose scale
                is -1 to -0.5), ``"uber"`` (uber-research/CoordConv), ``"paper"`` (the paper's own
                listing, whose radius is measured from 0.5), ``"mkocabas"``, ``"walsvid"`` or
                ``"keras"`` (titu1994/keras-coordconv).
            rank: the number of axes, where that implementation differs by rank.
            with_r: with the radius, where that implementation has one.

        Raises:
            ValueError: an unknown name, or a rank or radius that the implementation lacks.
                walsvid in 3-D is refused because that code mixes its axes.

        Example:
            >>> Coordinates.named("mkocabas", with_r=True)
            Coordinates('yxr', r_center=0.5)
            >>> Coordinates.named("keras", rank=3)
            Coordinates('zyx')
        """
        if name not in _NAMED:
            raise ValueError(f"name must be one of {', '.join(_NAMED)}, got {name!r}")
        convention = _NAMED[name]
        if rank not in convention.channels:
            raise ValueError(
                f"the {name!r} convention has no rank {rank}, only "
                f"{', '.join(map(str, convention.channels))}"
                + (" (its 3-D variant mixes its axes)" if name == "walsvid" else "")
            )
        channels = convention.channels[rank]
        if not with_r:
            return cls(channels.strip("r"), span=convention.span)
        if "r" not in channels:
            raise ValueError(f"the {name!r} convention has no radius in {rank}-D: with_r=False")
        return cls(channels, span=convention.span, r_center=convention.r_center)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; ``Coordinates.from_dict`` reads it back.

        Example:
            >>> Coordinates.from_dict(Coordinates("yx").to_dict())
            Coordinates('yx')
        """
        return {**vars(self), "span": list(self.span)}

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> Coordinates:
        """Read what ``to_dict`` made; errors are the constructor's."""
        return cls(**description)


def axis_tokens(rank: int) -> str:
    """The axis tokens of a grid of 1, 2 or 3 axes, last axis first: ``x``, ``xy``, ``xyz``."""
    if rank not in (1, 2, 3):
        raise ValueError(f"a grid has 1, 2 or 3 axes, got {rank}")
    return AXES[:rank]


def check_coord_init(coord_init: str, argument: str = "coord_init") -> None:
    """Raise ValueError if how a kernel starts is neither of the two words."""
    _check_word(argument, coord_init, ("fan_in", "zeros"))


def _check_word(name: str, value: object, words: tuple[str, ...]) -> None:
    """Raise ValueError if an argument is none of the words that it may be."""
    if value not in words:
        raise ValueError(f"{name} must be one of {words}, got {value!r}")


def _checked_channels(channels: object) -> str:
    if not isinstance(channels, Sequence) or not all(isinstance(t, str) for t in channels):
        raise TypeError(
            f"coords must be a string or a sequence of the tokens x, y, z, r, got {channels!r}"
        )
    if isinstance(channels, str) and channels in _NAMED:
        raise ValueError(
            f"coords must be tokens, got the name {channels!r}: "
            f'write coords=Coordinates.named("{channels}")'
        )
    for token in channels:
        if token not in TOKENS:
            raise ValueError(f"coords {channels!r}: unknown token {token!r}, want x, y, z or r")
        if channels.count(token) > 1:
            raise ValueError(f"coords {channels!r}: repeated token {token!r}")
    if not channels:
        raise ValueError("coords must name at least one of x, y, z, r, got none")
    return "".join(channels)


def _checked_span(span: object) -> tuple[float, float]:
    if not isinstance(span, Sequence) or isinstance(span, str) or len(span) != 2:
        raise TypeError(f"span must be a pair of numbers, got {span!r}")
    first, last = (_finite("span", end) for end in span)
    if first == last:
        raise ValueError(f"span must have two different ends, got {span!r}")
    return first, last


def _finite(name: str, value: object) -> float:
    if not isinstance(value, (SupportsFloat, SupportsIndex)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond every float
        number = math.inf
    if not -math.inf < number < math.inf:  # nor NaN; torch.compile traces no math.isfinite
        raise ValueError(f"{name} must be finite, got {number}")
    return number
