"""Coordinates: which coordinate channels, in which order, on which scale."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple, SupportsFloat, SupportsIndex, TypeAlias

from coordconv.functions import (
    AXES,
    TOKENS,
    Channel,
    Function,
    Given,
    described,
    from_description,
    name_of,
)

_SPAN = (-1.0, 1.0)
_LARGEST = (2 - 2.0**-23) * 2.0**127  # of float32
_LATER = {"aspect": "each", "units": "span"}  # options that the first files do not have

CoordinatesLike: TypeAlias = "Coordinates | str | Sequence[Channel] | None"


class _Convention(NamedTuple):
    """What another implementation appends."""

    channels: Mapping[int, str]  # by rank; with the radius where it has one
    r_center: float = 0.0
    span: tuple[float, float] = _SPAN


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
            axes of the grid, in coordinate units. In a sequence a
            :class:`~coordconv.Function` of the coordinates or a :class:`~coordconv.Given` map may
            stand for a token.
        span: the values at the two ends of an axis, first to last. Any two different finite
            numbers; a decreasing span turns the axis round. Or such a pair for each axis, as
            ``{"x": (0, 4), "y": (0, 1)}``.
        align: ``"corners"`` puts the ends of ``span`` on the first and the last sample;
            ``"edges"`` on the outer edges of the first and the last sample, so that sample ``i``
            of ``n`` on ``span=(-1, 1)`` reads ``(2 * i + 1) / n - 1``; ``"start"`` on the first
            sample and on the one that would follow the last, so that it reads ``2 * i / n - 1``.
        outside: what padding reads. ``"zero"``: what it reads in any other channel, which with
            zero padding is 0. ``"extend"``: the ramp goes on beyond the border, whatever the
            padding mode does to the features.
        r_center: the centre of ``r`` on every axis, in coordinate units.
        aspect: ``"each"`` axis spans ``span``. With ``"longer"`` the longest axis does, with
            ``"diagonal"`` the diagonal, and the other axes less, around the middle of their span,
            so that a step between samples is as long on each axis.
        units: ``"span"``, or ``"pixels"``: sample ``i`` reads ``i``, with ``align="edges"``
            ``i + 0.5``.

    With ``align="corners"`` an axis of length 1 has coordinate 0.

    Raises:
        TypeError: ``channels`` is neither a string nor a sequence of tokens, functions and maps;
            ``span`` is neither a pair of numbers nor one for each axis.
        ValueError: an unknown, repeated or missing token; two channels of one name; a given map
            with ``outside="extend"``, as it does not go on beyond the border; equal or non-finite
            span ends, or an axis without a span; an unknown ``align``, ``outside``, ``aspect`` or
            ``units``; a non-finite ``r_center``; pixels with a ``span`` or an ``aspect``, which
            they do not have.

    Example:
        >>> Coordinates(("y", "x"), span=(0, 1))
        Coordinates('yx', span=(0.0, 1.0))
        >>> Coordinates("xy", span={"x": (0, 4), "y": (0, 1)}).span_of("x")
        (0.0, 4.0)
        >>> Coordinates("xyr") == Coordinates(["x", "y", "r"])
        True

    Source:
        Liu et al., "An Intriguing Failing of Convolutional Neural Networks and the CoordConv
        Solution", NeurIPS 2018, section 3.
    """

    channels: Any = "xy"  # a string, or a tuple if there are functions or maps in it
    # That of each axis is kept as ``(("x", (0.0, 4.0)), ("y", (0.0, 1.0)))``, which can be hashed.
    span: Any = field(default=_SPAN, kw_only=True)
    align: Literal["corners", "edges", "start"] = field(default="corners", kw_only=True)
    outside: Literal["zero", "extend"] = field(default="zero", kw_only=True)
    r_center: float = field(default=0.0, kw_only=True)
    aspect: Literal["each", "longer", "diagonal"] = field(default="each", kw_only=True)
    units: Literal["span", "pixels"] = field(default="span", kw_only=True)

    # Of coordinates with functions or maps a string that no others have, for compilers: these see
    # a change of a string, and none of what NumPy computes. Else it is empty.
    own_key: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", _checked_channels(self.channels))
        object.__setattr__(self, "span", _checked_spans(self.span))
        _check_word("align", self.align, ("corners", "edges", "start"))
        _check_word("outside", self.outside, ("zero", "extend"))
        object.__setattr__(self, "r_center", _finite("r_center", self.r_center))
        _check_word("aspect", self.aspect, ("each", "longer", "diagonal"))
        _check_word("units", self.units, ("span", "pixels"))
        if self.units == "pixels" and (self.span != _SPAN or self.aspect != "each"):
            raise ValueError(
                'units="pixels" have no span and no aspect, got '
                f"span={_shown(self.span)}, aspect={self.aspect!r}"
            )
        self._check_spans(self._named_axes)
        given = [each.name for each in self.channels if isinstance(each, Given)]
        if given and self.outside == "extend":
            raise ValueError(
                f'outside="extend" goes on beyond the border, where the map {given[0]!r} has no '
                'values: want outside="zero"'
            )
        object.__setattr__(self, "own_key", _own_key(self) if self.own else "")

    def __len__(self) -> int:
        """The number of coordinate channels."""
        return len(self.channels)

    def __repr__(self) -> str:
        _, *options = fields(self)
        given = (
            f", {o.name}={_shown(v)}" for o in options if (v := getattr(self, o.name)) != o.default
        )
        return f"Coordinates({self.channels!r}{''.join(given)})"

    @property
    def names(self) -> tuple[str, ...]:
        """The token or the name of each channel."""
        return tuple(map(name_of, self.channels))

    @property
    def own(self) -> tuple[Any, ...]:
        """The channels that are functions or given maps."""
        return tuple(each for each in self.channels if not isinstance(each, str))

    @property
    def along_axes(self) -> str:
        """The tokens of the channels that run along one axis, which the radius does not."""
        return "".join(c for c in self.channels if isinstance(c, str) and c != "r")

    @property
    def _named_axes(self) -> str:
        """The axes that tokens and functions name."""
        tokens = [
            c if isinstance(c, str) else c.axes for c in self.channels if type(c) is not Given
        ]
        return "".join(tokens).replace("r", "")

    def only(self, tokens: str | Sequence[Channel]) -> Coordinates:
        """Some of the channels, on the same scale."""
        return Coordinates(  # the compiler of torch 2.4 cannot see into dataclasses.replace
            tokens,
            span=self.span,
            align=self.align,
            outside=self.outside,
            r_center=self.r_center,
            aspect=self.aspect,
            units=self.units,
        )

    def span_of(self, token: str) -> tuple[float, float]:
        """The values at the two ends of an axis: of ``"x"``, ``"y"`` or ``"z"``."""
        by_axis = _is_by_axis(self.span)
        return dict(self.span)[token] if by_axis else self.span  # type: ignore[no-any-return]

    def _check_spans(self, tokens: str) -> None:
        """Raise ValueError if one of these axes has no span."""
        if _is_by_axis(self.span):
            for token in tokens:
                if token not in dict(self.span):
                    raise ValueError(
                        f"span must have a pair of numbers for axis {token!r}, "
                        f"got {dict(self.span)}"
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
            coords = cls(axes if coords is None else coords)
        used = "".join(c if isinstance(c, str) else c.axes or "" for c in coords.channels)
        beyond = [token for token in dict.fromkeys(used) if token not in axes + "r"]
        if beyond:
            raise ValueError(
                f"coords {coords.channels!r} name axis {', '.join(map(repr, beyond))}, which a "
                f"{rank}-D grid does not have: want {axes}r"
            )
        if "r" in coords.channels:
            coords._check_spans(axes)
        for each in coords.own:
            if each.axes is None and each.array is not None and each.array.ndim != rank:
                raise ValueError(
                    f"the map {each.name!r} must have the {rank} axes of the grid, got shape "
                    f'{each.array.shape}: say which of them it has, as axes="y"'
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
        span = dict(self.span) if _is_by_axis(self.span) else list(self.span)
        channels = [described(c) for c in self.channels] if self.own else self.channels
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        found |= {"channels": channels, "span": span}
        for name, usual in _LATER.items():  # so that files say what they always said
            if found[name] == usual:
                del found[name]
        return found

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> Coordinates:
        """Read what ``to_dict`` made; errors are the constructor's.

        Functions and maps have their names alone, but for those of :func:`~coordconv.fourier`.
        """
        channels = description.get("channels", "xy")
        if isinstance(channels, list):
            channels = [from_description(each) for each in channels]
        return cls(**{**description, "channels": channels})


@lru_cache(maxsize=64)
def _own_key(coords: Coordinates) -> str:
    """A string that equal coordinates alone have, in all processes."""
    return uuid.uuid4().hex


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


def _checked_channels(channels: object) -> Any:
    kinds = (str, Function, Given)
    if not isinstance(channels, Sequence) or not all(isinstance(t, kinds) for t in channels):
        raise TypeError(
            f"coords must be a string or a sequence of the tokens x, y, z, r, got {channels!r}"
        )
    if isinstance(channels, str) and channels in _NAMED:
        raise ValueError(
            f"coords must be tokens, got the name {channels!r}: "
            f'write coords=Coordinates.named("{channels}")'
        )
    names = [*map(name_of, channels)]
    for place, (channel, name) in enumerate(zip(channels, names, strict=True)):
        if isinstance(channel, str) and channel not in TOKENS:
            raise ValueError(f"coords {channels!r}: unknown token {channel!r}, want x, y, z or r")
        if name in names[place + 1 :]:  # the compiler of torch 2.4 does not count
            what = "token" if isinstance(channel, str) else "name"
            raise ValueError(f"coords {channels!r}: repeated {what} {name!r}")
    if not channels:
        raise ValueError("coords must name at least one of x, y, z, r, got none")
    return "".join(names) if all(isinstance(c, str) for c in channels) else tuple(channels)


def _is_by_axis(span: Any) -> bool:
    """Whether a span that was checked is one for each axis."""
    return isinstance(span, tuple) and isinstance(span[0], tuple)


def _shown(value: Any) -> str:
    return repr(dict(value) if _is_by_axis(value) else value)


def _checked_spans(span: Any) -> Any:
    """A pair of floats, or pairs of an axis and such a pair, in the order x, y, z."""
    if isinstance(span, tuple) and span and isinstance(span[0], tuple):  # as it was checked
        span = dict(span)
    if not isinstance(span, Mapping):
        return _checked_span(span)
    unknown = [token for token in span if token not in tuple(AXES)]
    if unknown or not span:
        raise ValueError(f"span must be for the axes x, y and z, got {dict(span)!r}")
    return tuple((token, _checked_span(span[token])) for token in AXES if token in span)


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
    if not -_LARGEST <= number <= _LARGEST:  # nor NaN; torch.compile traces no math.isfinite
        raise ValueError(f"{name} must be finite, got {number}: float32 goes to 3.4e38")
    return number
