"""Models side by side: what each computes of the same inputs, and where it differs."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any, TypeAlias

import numpy as np

from coordconv.grid import Array
from coordconv.recording import GRADIENT, OUTPUT

ModelFunction: TypeAlias = Callable[..., Array | Mapping[str, Array]]
Bound: TypeAlias = (
    float | Array | Mapping[str, float | Array] | Callable[[str, Array], float | Array] | None
)

_WIDTH = 100
_NAME_WIDTH = 40
_TAPS = 9  # a 3x3 convolution sums so many times its channels
_LARGEST_SHARE = 1 / 32


@dataclass(frozen=True)
class ComparisonRow:
    """One array of one model beside the reference's array of the same name.

    Args:
        model: the model's name.
        name: the array's name.
        shape: the shape that the model gave it.
        error: the largest absolute difference; inf where the shapes differ, or where one array has
            NaN or an infinity and the other has not.
        ulps: the largest difference in units in the last place, of the coarser of the two types.
        of_bound: the largest difference in units of its bound; more than 1 is a difference.
        argmax: the share of samples and places at which both arrays have the largest channel (axis
            1) at the same index; None where there are not two channels.
        note: what the numbers do not say, such as that the shapes differ.
    """

    model: str
    name: str
    shape: tuple[int, ...]
    error: float
    ulps: float
    of_bound: float
    argmax: float | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the difference is within the bound."""
        return self.of_bound <= 1


@dataclass(frozen=True)
class Report:
    """What :func:`compare` found; ``print`` shows it as a table.

    Args:
        reference: the name of the reference.
        models: the names of the models that are held to the reference.
        rows: a row for each model and each array that model and reference have in common, in the
            order of the reference's arrays.
        missing: for each model, the arrays that only the reference has.
        extra: for each model, the arrays that only the model has.
    """

    reference: str
    models: tuple[str, ...]
    rows: tuple[ComparisonRow, ...]
    missing: Mapping[str, tuple[str, ...]]
    extra: Mapping[str, tuple[str, ...]]

    @property
    def ok(self) -> bool:
        """Whether every array that was compared is within its bound."""
        return all(row.ok for row in self.rows)

    @property
    def first_difference(self) -> dict[str, str | None]:
        """For each model, the name of the first array that is beyond its bound, or None."""
        wrong = {row.model: row.name for row in reversed(self.rows) if not row.ok}
        return {model: wrong.get(model) for model in self.models}

    def raise_if_different(self) -> None:
        """Raise an AssertionError that shows the table, unless :attr:`ok`."""
        if not self.ok:
            raise AssertionError(str(self))

    def to_json(self) -> str:
        """The report as JSON, in which a number that is not finite is null."""
        rows = [{**asdict(row), "ok": row.ok} for row in self.rows]
        content = {
            "ok": self.ok,
            "reference": self.reference,
            "first_difference": self.first_difference,
            "missing": dict(self.missing),
            "extra": dict(self.extra),
            "rows": [{k: None if v == math.inf else v for k, v in row.items()} for row in rows],
        }
        return json.dumps(content, indent=2, allow_nan=False)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture of every array's error in units of its bound; needs matplotlib."""
        from matplotlib.figure import Figure  # only the picture needs it

        names = list(dict.fromkeys(row.name for row in self.rows))
        shares = [row.of_bound for row in self.rows if 0 < row.of_bound < math.inf]
        # A logarithmic axis has no place for 0 and infinity: they are shown at its two ends.
        low, high = min([0.1, *shares]) / 3, max([10.0, *shares]) * 3
        ticks = [_escaped(_shortened(name)) for name in names]
        # In inches: a place for each array, and below the axes one for the longest name.
        size = 2.5 + max(6.0, 0.28 * len(names)), 4.0 + 0.08 * max(map(len, ticks))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        style: dict[str, Any] = {"markersize": 5, "fillstyle": "none", "linewidth": 1}
        for model, marker in zip(self.models, cycle("osD^v"), strict=False):
            rows = [row for row in self.rows if row.model == model]
            shown = {names.index(r.name): float(np.clip(r.of_bound, low, high)) for r in rows}
            style |= {"marker": marker, "label": _escaped(model)}
            (line,) = axes.plot(list(shown), list(shown.values()), **style)
            if (first := self.first_difference[model]) is not None:
                at = names.index(first)
                axes.annotate(
                    f"differs at {ticks[at]}",
                    (at, shown[at]),
                    (0, 8),
                    textcoords="offset points",
                    color=line.get_color(),
                    fontsize=9,
                    ha="left" if 2 * at < len(names) else "right",
                )
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--", label="bound")
        axes.axhline(low, color="grey", linewidth=0.5)
        right = axes.get_yaxis_transform()
        axes.text(0.995, low, "equal", color="grey", ha="right", transform=right)
        axes.set_xticks(range(len(names)), ticks, rotation=90, fontsize=8)
        # Some of the height stays free on top, for the text above the highest point.
        axes.set(yscale="log", ylim=(low / 1.5, high * (high / low) ** 0.12))
        axes.set(title=f"error against {_escaped(self.reference)}", ylabel="error / bound")
        axes.legend()
        figure.savefig(path, dpi=110)

    def __str__(self) -> str:
        return "\n\n".join("\n".join(self._table(model)) for model in self.models)

    def _table(self, model: str) -> list[str]:
        rows = [row for row in self.rows if row.model == model]
        name_width = min(max(len(row.name) for row in rows), _NAME_WIDTH)
        shape_width = max(5, *(len(_shape(row.shape)) for row in rows))

        def line(mark: str, name: str, shape: str, *cells: str) -> str:
            numbers = "  ".join(f"{cell:>8}" for cell in cells[:3])
            found = f"{mark} {name:{name_width}}  {shape:{shape_width}}  {numbers}  {cells[3]:>6}"
            return found.rstrip()

        first = next((row for row in rows if not row.ok), None)
        if first is None:
            verdict = f"agrees with {self.reference} in all of {len(rows)} arrays"
        else:
            error, share = _formatted(first.error), _formatted(first.of_bound)
            what = first.note or f"error {error}, {share} times the bound"
            verdict = f"differs from {self.reference} at {first.name}: {what}"
        lines = [
            f"{model} {verdict}",
            line(" ", "", "shape", "error", "ULPs", "of bound", "argmax"),
        ]
        for row in rows:
            numbers = map(_formatted, (row.error, row.ulps, row.of_bound))
            argmax = "" if row.argmax is None else f"{math.floor(row.argmax * 1000) / 10:g}%"
            mark = " " if row.ok else "*"
            lines.append(line(mark, _shortened(row.name), _shape(row.shape), *numbers, argmax))
            if row.note:
                lines.append(f"      {row.note}")
        for owner, names in ((self.reference, self.missing[model]), (model, self.extra[model])):
            # A gradient is not listed where the array that it belongs to is.
            implied = {GRADIENT + name for name in names}
            listed = [name for name in names if name not in implied]
            if listed:
                text = f"only in {owner}: {', '.join(listed)}"
                lines += textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ")
        return lines


def compare(
    models: Mapping[str, ModelFunction],
    inputs: Array | Sequence[Array],
    *,
    reference: str | ModelFunction | None = None,
    bound: Bound = None,
) -> Report:
    """Give every model the same inputs, and compare what each computes with the reference.

    ``recorded`` in ``coordconv.backends.torch``, ``.paddle``, ``.flax`` and ``.linen`` turns a
    framework's module into such a model, which returns an array for each module inside. In a test,
    ``compare(...).raise_if_different()`` is all it takes.

    Args:
        models: by name, functions from arrays to an array or to a mapping of arrays by name, in
            the order of computation. An array alone is called ``"model output"``.
        inputs: the array that every model is given, or a sequence of several.
        reference: the name of the model that the others are held to, or another function; the
            first model if None.
        bound: by how much an array may differ from the reference's: a number or an array for
            all, a mapping from names to them, with the default for the names that it lacks, or a
            function of an array's name and the reference's values. 0 asks for equality.

            The default is for what rounding does: ``2 * sqrt(k * n) * u * m``, but at most
            ``m / 32``, with ``u`` the unit roundoff of the coarser of the two types, ``m`` the
            largest magnitude in the reference's array, ``k`` the number of arrays so far, and ``n``
            nine times the longest axis of these arrays and of the inputs, the first axis left out.
            bfloat16, which comes as float32, needs a bound of its own, as
            ``lambda name, reference: 2**-5 * abs(reference).max()``.

    Returns:
        A report. NaN agrees with NaN, and an infinity with the same infinity.

    Raises:
        TypeError: the inputs are no NumPy arrays, or a model returns something else.
        ValueError: an input is empty; there are no models, or none beside the reference; there is
            no model called ``reference``; a bound is negative, for no array that is compared, or of
            another shape; a model and the reference have no array in common, or both have outputs
            and none in common, as where one returns a tuple.

    Source:
        The default bound: ``k`` layers round ``k * n`` times where each sums ``n`` terms, as a 3x3
        convolution over ``n / 9`` channels does, and the errors of ``s`` roundings in a row amount
        to ``sqrt(s)`` times one of them (Higham and Mary, *A New Approach to Probabilistic Rounding
        Error Analysis*, 2019); twice, since both models round. This bound is no proof:
        ``docs/parity.md`` says what it misses and where it raises false alarms.

    Example:
        >>> x = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
        >>> def right(x):
        ...     return {"doubled": x + x, "model output": np.tanh(x + x)}
        >>> def wrong(x):
        ...     return {"doubled": 2 * x, "model output": np.tanh(2 * x[:, ::-1])}
        >>> report = compare({"right": right, "wrong": wrong}, x)
        >>> report.ok, report.first_difference
        (False, {'wrong': 'model output'})
        >>> print(report)
        wrong differs from right at model output: error 0.584, 6.92e+05 times the bound
                        shape     error      ULPs  of bound  argmax
          doubled       2x3           0         0         0    100%
        * model output  2x3       0.584  1.18e+07  6.92e+05      0%
    """
    arrays, others = _arrays(inputs), dict(models)
    if not others:
        raise ValueError("there are no models to compare")
    if reference is None:
        reference = next(iter(others))
    if isinstance(reference, str):
        if reference not in others:
            raise ValueError(f"reference must be one of {', '.join(others)}, got {reference!r}")
        name, function = reference, others.pop(reference)
    elif callable(reference):
        name, function = "reference", reference
    else:
        raise TypeError(
            f"reference must be a model's name or a function, got {type(reference).__name__}"
        )
    if not others:
        raise ValueError(f"there is nothing to compare {name} with: give a second model")
    wanted = _run(name, function, arrays)
    rows: list[ComparisonRow] = []
    missing, extra = {}, {}
    for model, function in others.items():
        found = _run(model, function, arrays)
        if found.keys().isdisjoint(wanted):
            raise ValueError(
                f"{model} and {name} have no array of one name: {', '.join(found)} and "
                f"{', '.join(wanted)}"
            )
        outputs = [[n for n in made if n.startswith(OUTPUT)] for made in (found, wanted)]
        if all(outputs) and {*outputs[0]}.isdisjoint(outputs[1]):
            theirs, ours = map(", ".join, outputs)
            raise ValueError(
                f"{model} and {name} have no output of one name, so that none would be compared: "
                f"{theirs} and {ours}: let both return the like"
            )
        longest = longest_axis(map(_sample_shape, arrays))
        for layers, (each, array) in enumerate(wanted.items(), 1):
            longest = max(longest, longest_axis([_sample_shape(array)]))
            if each in found:
                allowed = _allowed(bound, each, found[each], array, layers, longest)
                rows.append(_row(model, each, found[each], array, allowed))
        missing[model] = tuple(each for each in wanted if each not in found)
        extra[model] = tuple(each for each in found if each not in wanted)
    if isinstance(bound, Mapping):
        unknown = sorted(set(bound) - {row.name for row in rows})
        if unknown:
            raise ValueError(f"bound has {unknown}, which no model and the reference both have")
    return Report(name, tuple(others), tuple(rows), missing, extra)


def likely_error(wanted: Array, layers: int, longest: int, unit: float) -> float:
    """The default bound of :func:`compare`: the largest error that rounding makes likely.

    ``wanted`` is the reference's array, computed by so many ``layers`` whose longest axis is
    ``longest``, see :func:`longest_axis`; ``unit`` is the unit roundoff.

    Example:
        >>> likely_error(np.array([1.0, -3.0, np.inf]), 4, 16, 2**-11)
        0.0703125
    """
    finite = np.abs(wanted[np.isfinite(wanted)].astype(np.float64))
    share = 2 * math.sqrt(layers * _TAPS * longest) * unit
    return min(share, _LARGEST_SHARE) * float(finite.max(initial=0))


def longest_axis(shapes: Iterable[tuple[int, ...]]) -> int:
    """The longest axis in shapes of single samples, at least 1."""
    return max([1, *(length for shape in shapes for length in shape)])


def ulp_distance(a: Array, b: Array) -> Array:
    """How many steps from one floating-point number to the next lie between ``a`` and ``b``.

    The steps are those of the coarser of the two types, as unsigned integers: 0 from NaN to NaN,
    and the largest integer from NaN to anything else. Steps are counted through zero, whose two
    signs are one number; an infinity is one step beyond the largest number.

    Example:
        >>> one = np.array([1, 0, -1], np.float32)
        >>> ulp_distance(one, np.nextafter(one, np.float32(2)))
        array([1, 1, 1], dtype=uint32)
    """
    dtype = _coarser(a.dtype, b.dtype)
    signed, unsigned = (np.dtype(f"{kind}{dtype.itemsize}") for kind in "iu")

    def ordered(x: Array) -> Array:
        with np.errstate(over="ignore"):
            bits = np.ascontiguousarray(x, dtype).view(signed)
        # Behind the sign bit the numbers are in the order of their magnitude.
        return np.where(bits < 0, np.iinfo(signed).min - bits, bits)

    x, y = ordered(a), ordered(b)
    distance: Array = np.maximum(x, y).view(unsigned) - np.minimum(x, y).view(unsigned)
    nan = np.isnan(a), np.isnan(b)
    distance[nan[0] | nan[1]] = np.iinfo(unsigned).max
    distance[nan[0] & nan[1]] = 0
    return distance


def _coarser(*dtypes: np.dtype[Any]) -> np.dtype[Any]:
    """The coarsest of the types; float64 where all are integers, which have no rounding."""
    floating = [dtype for dtype in dtypes if dtype.kind == "f"]
    return min([np.dtype(np.float64), *floating], key=lambda dtype: dtype.itemsize)


def _arrays(inputs: Array | Sequence[Array]) -> list[Array]:
    """The inputs as a list."""
    arrays = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    for array in arrays:
        if not isinstance(array, (np.ndarray, np.generic)):
            within = f" in a {type(inputs).__name__}" if array is not inputs else ""
            raise TypeError(
                "inputs must be a NumPy array, or a list or tuple of such arrays, got "
                f"{type(array).__module__}.{type(array).__qualname__}{within}"
            )
        if not array.size:  # on it all models agree
            raise ValueError(f"inputs must not be empty, got shape {array.shape}")
    return [np.asarray(array) for array in arrays]


def _run(model: str, function: ModelFunction, inputs: list[Array]) -> dict[str, Array]:
    """What a model computes of the inputs, by name."""
    try:
        made = function(*(x.copy() for x in inputs))  # copies, since a model may write to its input
    except Exception as error:
        error.add_note(f"raised by the model {model!r}")
        raise
    found = dict(made) if isinstance(made, Mapping) else {OUTPUT: made}
    for name, array in found.items():
        if not isinstance(name, str):
            raise TypeError(f"{model} must return a mapping from strings, got the key {name!r}")
        if not isinstance(array, (np.ndarray, np.generic)) or array.dtype.kind not in "fiub":
            kind = f" of {array.dtype}" if isinstance(array, np.ndarray) else ""
            raise TypeError(
                f"{model} must return an array of real numbers, or a mapping from names to such "
                f"arrays, got {type(array).__name__}{kind} for {name!r}"
            )
    # Copies, since a model may write its next answer, or another's, to the same memory.
    return {name: np.array(array) for name, array in found.items()}


def _sample_shape(array: Array) -> tuple[int, ...]:
    """The shape without the samples' axis; an only axis may be another one, so it is kept."""
    return array.shape[array.ndim > 1 :]


def _allowed(
    bound: Bound, name: str, found: Array, wanted: Array, layers: int, longest: int
) -> Array:
    """The bound on the difference from ``wanted``, for each element."""
    if isinstance(bound, Mapping):
        bound = bound.get(name)
    elif callable(bound):
        bound = bound(name, wanted)
    if bound is None:
        floating = [array.dtype for array in (found, wanted) if array.dtype.kind == "f"]
        unit = float(np.finfo(_coarser(*floating)).eps) / 2 if floating else 0.0
        bound = likely_error(wanted, layers, longest, unit)
    allowed = np.asarray(bound, np.float64)
    if not (allowed >= 0).all():
        raise ValueError(f"a bound must not be negative or NaN, got {bound} for {name!r}")
    try:
        return np.broadcast_to(allowed, wanted.shape)
    except ValueError:
        raise ValueError(
            f"the bound for {name!r} must fit its shape {wanted.shape}, got {allowed.shape}"
        ) from None


def _row(model: str, name: str, found: Array, wanted: Array, allowed: Array) -> ComparisonRow:
    if found.shape != wanted.shape:
        note = f"shape {found.shape}, where the reference has {wanted.shape}"
        return ComparisonRow(model, name, found.shape, math.inf, math.inf, math.inf, None, note)
    x, y = found.astype(np.float64), wanted.astype(np.float64)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    same &= (found == wanted) | (np.isnan(found) & np.isnan(wanted))  # whole numbers beyond 2**53
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.where(same, 0, np.abs(x - y))
        error[np.isnan(error)] = math.inf  # NaN and a number
        of_bound = np.where(same, 0, error / allowed)
        of_bound[np.isnan(of_bound)] = math.inf  # inf / inf
    floating = "f" in (found.dtype.kind, wanted.dtype.kind)
    steps = ulp_distance(found, wanted) if floating else error
    argmax = None
    if wanted.ndim > 1 and wanted.shape[1] > 1 and wanted.size:
        argmax = float(np.mean(found.argmax(axis=1) == wanted.argmax(axis=1)))
    largest, ulps, share = (float(each.max(initial=0)) for each in (error, steps, of_bound))
    return ComparisonRow(model, name, found.shape, largest, ulps, share, argmax, _not_finite(x, y))


def _not_finite(found: Array, wanted: Array) -> str:
    """The note on NaN and infinities, if there are any."""
    parts = []
    for word, test in (("NaN", np.isnan), ("infinite", np.isinf)):
        counts = [int(test(array).sum()) for array in (found, wanted)]
        if any(counts):
            parts.append(f"{word} at {counts[0]} of {found.size}, in the reference at {counts[1]}")
    return "; ".join(parts)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) if shape else "scalar"


def _shortened(name: str) -> str:
    """The name, or the end of a long one; the prefix of a gradient's name stays."""
    prefix = GRADIENT if name.startswith(GRADIENT) else ""
    room = _NAME_WIDTH - len(prefix) - 1
    return name if len(name) <= _NAME_WIDTH else f"{prefix}…{name[-room:]}"


def _escaped(text: str) -> str:
    """The text with its dollars escaped: to matplotlib they would start a formula."""
    return text.replace("$", r"\$")


def _formatted(number: float) -> str:
    """At most eight characters, and whole numbers whole."""
    if number >= 10**6:
        return f"{number:.2e}"
    return f"{number:.0f}" if number == int(number) else f"{number:.3g}"
