"""CoordConv once more, straight from its definition, and the configurations that tests draw.

One product per term, in exact rational arithmetic, from the options alone: it shares no code with
the package. A convolution gathers: output ``t`` takes tap ``k`` from place ``t * stride +
k * dilation`` of the padded input. A transposed one scatters: sample ``i`` adds tap ``k`` to place
``i * stride + k * dilation`` of the full output. Only for tiny shapes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
from hypothesis import strategies as st

from coordconv.coordinates import Coordinates
from coordconv.geometry import ConvGeometry

UNIT = 2.0**-53  # the unit roundoff of float64


def gamma(n: int, unit: float = UNIT) -> float:
    """The relative error of a sum of ``n`` products, in any order (Higham, section 3.1)."""
    return n * unit / (1 - n * unit)


# --- the definition ------------------------------------------------------------------------------


def padding(g: ConvGeometry, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """The padding before and after each axis; ``same`` by its promise, not by a formula."""
    if g.padding != "same":
        return list(g.padding)
    pairs = []
    for n, k, s, d in zip(shape, g.kernel, g.stride, g.dilation, strict=True):
        total = 0
        while len(places(n + total, k, s, d)) < math.ceil(n / s):
            total += 1
        pairs.append((total // 2, total - total // 2))
    return pairs


def places(padded: int, k: int, s: int, d: int) -> list[int]:
    """Where the kernel can lie on an axis of ``padded`` samples, by its first tap."""
    return [start for start in range(0, padded, s) if start + (k - 1) * d < padded]


def folded(i: int, n: int, mode: str) -> int | None:
    """The sample that padding puts at ``i``, or None where it puts a zero."""
    if mode == "reflect":
        while not 0 <= i < n:
            i = -i if i < 0 else 2 * (n - 1) - i
    elif mode == "circular":
        i %= n
    elif mode == "replicate":
        i = min(max(i, 0), n - 1)
    return i if 0 <= i < n else None


def reads(g: ConvGeometry, shape: tuple[int, ...]) -> list[list[dict[int, int]]]:
    """Per axis and output position, the sample that each tap reads, before padding is applied.

    A tap that meets a hole between spread samples is left out; a sample may lie outside.
    """
    axes = []
    for n, (before, after), k, s, d, extra, hole in zip(
        shape, padding(g, shape), *g.per_axis, strict=True
    ):
        if g.transposed:
            length = (n - 1) * s + (k - 1) * d + 1 + extra - before - after
            if g.padding_mode == "circular":  # what would stick out comes round
                length = n * s
            outputs: list[dict[int, int]] = [{} for _ in range(length)]
            reach = length + abs(before) + (k - 1) * d  # as far out as any tap can come from
            for i in range(-reach, n + reach):
                for tap in range(k):
                    t = i * s + tap * d - before
                    if 0 <= t < length:
                        outputs[t][tap] = i
        elif g.padding_mode == "zeros":  # spread, then pad
            starts = places((n - 1) * hole + 1 + before + after, k, s, d)
            at = [{tap: start + tap * d - before for tap in range(k)} for start in starts]
            outputs = [{t: p // hole for t, p in taps.items() if p % hole == 0} for taps in at]
        else:  # pad by copies, then spread
            starts = places((n + before + after - 1) * hole + 1, k, s, d)
            at = [{tap: start + tap * d for tap in range(k)} for start in starts]
            outputs = [
                {t: p // hole - before for t, p in taps.items() if p % hole == 0} for taps in at
            ]
        axes.append(outputs)
    return axes


def coordinate(
    coords: Coordinates, token: str, place: tuple[int, ...], shape: tuple[int, ...]
) -> Fraction:
    """A coordinate of one sample, exactly (the radius to a hundred digits)."""
    values = axis_coordinates(coords, place, shape)
    if token != "r":
        return values[{"x": -1, "y": -2, "z": -3}[token]]
    return root(sum(((v - Fraction(coords.r_center)) ** 2 for v in values), Fraction(0)))


def magnitude(
    coords: Coordinates, token: str, place: tuple[int, ...], shape: tuple[int, ...]
) -> Fraction:
    """The size of the terms that a coordinate is computed from: they may cancel, their errors not.

    An axis coordinate is a share of half the span, plus the middle of the span.
    """
    values = axis_coordinates(coords, place, shape)
    sizes = [abs(value) for value in values]
    if coords.units == "span":
        unit = axis_coordinates(replace(coords, span=(-1, 1)), place, shape)
        spans = spans_of(coords, len(shape))
        sizes = [
            abs(u * (last - first) / 2) + abs(first + last) / 2
            for u, (first, last) in zip(unit, spans, strict=True)
        ]
    if token != "r":
        return sizes[{"x": -1, "y": -2, "z": -3}[token]]
    return root(sum(((size + abs(Fraction(coords.r_center))) ** 2 for size in sizes), Fraction(0)))


def spans_of(coords: Coordinates, rank: int) -> list[tuple[Fraction, Fraction]]:
    """The span of each axis of a grid, in the order of the axes."""
    by_token = coords.to_dict()["span"]
    if not isinstance(by_token, dict):
        by_token = dict.fromkeys("xyz", by_token)
    numbers = [by_token.get(token, (-1, 1)) for token in "zyx"[-rank:]]  # one is not looked at
    return [(Fraction(first), Fraction(last)) for first, last in numbers]


def largest_end(coords: Coordinates, shape: tuple[int, ...]) -> float:
    """The largest coordinate at the ends of an axis, which others are some multiple of."""
    if coords.units == "pixels":
        return max(shape)
    return float(max(abs(end) for span in spans_of(coords, len(shape)) for end in span))


def axis_coordinates(
    coords: Coordinates, place: tuple[int, ...], shape: tuple[int, ...]
) -> list[Fraction]:
    """The coordinate of one sample on each axis."""
    if coords.units == "pixels":
        return [i + Fraction(1, 2) * (coords.align == "edges") for i in place]
    lengths = [n - 1 if coords.align == "corners" else n for n in shape]
    whole = {"longer": Fraction(max(lengths)), "each": Fraction(0)}
    whole["diagonal"] = root(Fraction(sum(length**2 for length in lengths)))
    values = []
    for i, length, (first, last) in zip(place, lengths, spans_of(coords, len(shape)), strict=True):
        if length == 0:
            values.append(Fraction(0))
            continue
        steps = whole[coords.aspect] or Fraction(length)
        before = {"corners": 0, "edges": Fraction(1, 2), "start": 0}[coords.align]
        from_middle = i + before - Fraction(length, 2)
        values.append((first + last) / 2 + (last - first) * from_middle / steps)
    return values


def root(square: Fraction) -> Fraction:
    shift = 2**400
    numerator = math.isqrt(square.numerator * square.denominator * shift**2)
    return Fraction(numerator, square.denominator * shift)


@dataclass(frozen=True)
class Term:
    """One product of the sum: ``output[o, t] += weight[index] * value``."""

    output: tuple[int, ...]
    index: tuple[int, ...]  # of the one kernel
    source: tuple[int, ...] | None  # of a feature: its index in the input, without the batch
    value: Fraction = Fraction(0)  # of a coordinate
    exact: bool = True  # whether floating point has the coordinate, and what it is computed from


def terms(
    g: ConvGeometry,
    coords: Coordinates | None,
    channels: int,
    out: int,
    shape: tuple[int, ...],
    value_of: Callable[..., Fraction] = coordinate,
) -> Iterator[Term]:
    """Every term of the convolution of one sample."""
    axes = reads(g, shape)
    ins, outs = channels // g.groups, out // g.groups
    width = ins + (len(coords) if coords else 0)
    for t in product(*(range(len(outputs)) for outputs in axes)):
        for tap in product(*(outputs[p] for outputs, p in zip(axes, t, strict=True))):
            place = tuple(outputs[p][k] for outputs, p, k in zip(axes, t, tap, strict=True))
            sample = [folded(i, n, g.padding_mode) for i, n in zip(place, shape, strict=True)]
            inside = None if None in sample else tuple(i for i in sample if i is not None)
            seen = place if coords and coords.outside == "extend" else inside
            values: list[tuple[Fraction, bool]] = []
            if coords and seen is not None:
                ramps = all(map(representable, axis_coordinates(coords, seen, shape)))
                for token in coords.channels:
                    value = value_of(coords, token, seen, shape)
                    values.append((value, representable(value) and (ramps or token != "r")))
            for o in range(out):
                group = o // outs

                def index(j: int, o: int = o, group: int = group, tap: Any = tap) -> Any:
                    return (group * width + j, o % outs, *tap) if g.transposed else (o, j, *tap)

                if inside is not None:
                    for j in range(ins):
                        yield Term((o, *t), index(j), (group * ins + j, *inside))
                for j, (value, exact) in enumerate(values):
                    yield Term((o, *t), index(ins + j), None, value, exact)


def representable(value: Fraction) -> bool:
    return Fraction(float(value)) == value


@dataclass
class Sums:
    """Sums with what bounds the error of computing them in floating point.

    ``magnitude`` has every term's absolute value; ``inexact`` the same of those terms alone whose
    coordinate is no floating-point number, each as the factor of that coordinate's error.
    """

    value: Any
    magnitude: Any
    inexact: Any

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> "Sums":
        return cls(*(np.full(shape, Fraction(0), dtype=object) for _ in range(3)))

    def add(
        self, index: tuple[int, ...], factor: Fraction, value: Fraction, exact: bool = True
    ) -> None:
        self.value[index] += factor * value
        self.magnitude[index] += abs(factor * value)
        if not exact:
            self.inexact[index] += abs(factor)

    def check(self, computed: Any, count: int, coordinate_error: float = 0.0) -> None:
        """Hold a computed array to the bound: of none at all if every term is exact."""
        assert computed.shape == self.value.shape
        rounded = np.vectorize(Fraction, otypes=[object])(computed)
        error = abs(rounded - self.value)
        bound = gamma(count) * self.magnitude + coordinate_error * self.inexact
        bound = np.where(self.inexact == 0, Fraction(0), bound)
        assert np.all(error <= bound), f"off by {float((error - bound).max())} beyond the bound"


def exact(array: Any) -> Any:
    return np.vectorize(Fraction, otypes=[object])(array)


def forward(case: "Case") -> Sums:
    """The output for the case's input and weights."""
    x, weight = exact(case.x), exact(case.weights["weight"])
    y = Sums.zeros((len(x), case.out, *(len(axis) for axis in reads(case.geometry, case.shape))))
    for batch in range(len(x)):
        for term in case.terms():
            value = term.value if term.source is None else x[(batch, *term.source)]
            y.add((batch, *term.output), weight[term.index], value, term.exact)
    if "bias" in case.weights:
        bias = exact(case.weights["bias"]).reshape(-1, *(1,) * len(case.shape))
        y.value, y.magnitude = y.value + bias, y.magnitude + abs(bias)
    return y


def gradients(case: "Case", dy: Any) -> dict[str, Sums]:
    """The gradients of ``sum(dy * output)``: each term's derivative, added up."""
    x, dy, weight = exact(case.x), exact(dy), exact(case.weights["weight"])
    shapes = {"x": x.shape, **{name: array.shape for name, array in case.weights.items()}}
    sums = {name: Sums.zeros(shape) for name, shape in shapes.items()}
    for batch in range(len(x)):
        for term in case.terms():
            back = dy[(batch, *term.output)]
            if term.source is None:
                sums["weight"].add(term.index, back, term.value, term.exact)
            else:
                source = (batch, *term.source)
                sums["weight"].add(term.index, back, x[source])
                sums["x"].add(source, back, weight[term.index])
    if "bias" in case.weights:
        sums["bias"].value = dy.sum(axis=(0, *range(2, dy.ndim)))
    return sums


# --- configurations ------------------------------------------------------------------------------


@dataclass
class Case:
    """A convolution with an input and weights: small integers, so that sums of them are exact."""

    geometry: ConvGeometry
    coords: Coordinates | None
    channels: int
    out: int
    shape: tuple[int, ...]
    x: Any
    weights: dict[str, Any]
    value_of: Callable[..., Fraction] = coordinate

    def terms(self) -> Iterator[Term]:
        sizes = self.channels, self.out, self.shape
        return terms(self.geometry, self.coords, *sizes, self.value_of)

    def absolute(self) -> "Case":
        """The same with every factor's size for the factor, which error bounds are made of."""
        weights = {name: abs(array) for name, array in self.weights.items()}
        return replace(self, x=abs(self.x), weights=weights, value_of=magnitude)

    @property
    def count(self) -> int:
        """How many terms a sum has at most, with a few roundings more for what made them."""
        seen = self.channels + (len(self.coords) if self.coords else 0)
        return seen * math.prod(self.geometry.kernel) + 8


def scales(rank: int) -> st.SearchStrategy[dict[str, Any]]:
    """What says how long a step between samples is."""
    pairs = st.sampled_from([(-1, 1), (0, 1), (1, -1), (-3, 5), (0.25, 0.5), (-1, -0.5)])
    by_axis = st.fixed_dictionaries(dict.fromkeys("xyz"[:rank], pairs))
    aspects = st.sampled_from(["each", "each", "longer", "diagonal"])
    spans = st.fixed_dictionaries({"span": pairs | by_axis, "aspect": aspects})
    return spans | st.just({"units": "pixels"})


coordinates_of_rank = {
    rank: st.builds(
        lambda tokens, scale, **options: Coordinates(tokens, **scale, **options),
        st.permutations("zyx"[-rank:] + "r").flatmap(
            lambda tokens: st.integers(1, len(tokens)).map(lambda n: tuple(tokens[:n]))
        ),
        scales(rank),
        align=st.sampled_from(["corners", "edges", "start"]),
        outside=st.sampled_from(["zero", "extend"]),
        r_center=st.sampled_from([0, 0.5, -2]),
    )
    for rank in (1, 2, 3)
}


@st.composite
def geometries(draw: st.DrawFn, shape: tuple[int, ...], groups: int = 1) -> ConvGeometry:
    """Any convolution that fits the shape."""
    rank = len(shape)

    def ints(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * rank))

    kernel = ints(1, 3 if rank < 3 else 2)
    stride, dilation = ints(1, 3), ints(1, 2)
    kind = draw(st.sampled_from(["zeros", "zeros", "transposed", "same", "copies"]))
    if kind == "transposed":
        pads = [
            draw(st.tuples(st.integers(-1, 1 + (k > 2)), st.integers(-1, 1 + (k > 2))))
            for k in kernel
        ]
        extra = ints(0, 2)
        lengths = (
            (n - 1) * s + (k - 1) * d + 1 + e - before - after
            for n, s, k, d, e, (before, after) in zip(
                shape, stride, kernel, dilation, extra, pads, strict=True
            )
        )
        if min(lengths) < 1:
            pads = [(0, 0)] * rank
        circular = draw(st.integers(0, 2)) == 0
        return ConvGeometry(
            kernel,
            stride=stride,
            padding=tuple(pads),
            dilation=dilation,
            groups=groups,
            transposed=True,
            output_padding=0 if circular else extra,
            padding_mode="circular" if circular else "zeros",
        )
    mode, holes = "zeros", ints(1, 2)
    if kind == "same":
        mode = draw(st.sampled_from(["zeros", "zeros", "replicate"]))
        pads = "same"
    elif kind == "copies":
        mode = draw(st.sampled_from(["reflect", "replicate", "circular"]))
        limit = {"reflect": -1, "replicate": 2, "circular": 2}[mode]
        pads = [draw(st.tuples(*[st.integers(0, n + limit)] * 2)) for n in shape]
    else:
        pads = [draw(st.tuples(*[st.integers(-1, 3)] * 2)) for _ in shape]
    options = {
        "stride": stride,
        "padding": pads if pads == "same" else tuple(pads),
        "dilation": dilation,
        "groups": groups,
        "input_dilation": holes,
        "padding_mode": mode,
    }
    if any(not axis for axis in reads(ConvGeometry(kernel, **options), shape)):
        options["padding"] = tuple((k * d, k * d) for k, d in zip(kernel, dilation, strict=True))
        options["padding_mode"] = "zeros"
    return ConvGeometry(kernel, **options)


@st.composite
def cases(draw: st.DrawFn, *, with_coords: bool = True) -> Case:
    """Any CoordConv, on a tiny shape, with integers for an input and weights."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    shape = draw(st.tuples(*[st.integers(1, {1: 9, 2: 5, 3: 3}[rank])] * rank))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    geometry = draw(geometries(shape, groups))
    coords = draw(coordinates_of_rank[rank]) if with_coords else None
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def integers(*size: int) -> Any:
        return rng.integers(-4, 5, size).astype(np.float64)

    n = len(coords) if coords else 0
    weights = {
        "weight": integers(channels + groups * n, out // groups, *geometry.kernel)
        if geometry.transposed
        else integers(out, channels // groups + n, *geometry.kernel)
    }
    if draw(st.booleans()):
        weights["bias"] = integers(out)
    x = integers(draw(st.integers(1, 2)), channels, *shape)
    return Case(geometry, coords, channels, out, shape, x, weights)
