"""Where a network gets its position from: what each layer's output owes to position alone.

:func:`position_report` stands on what ``recorded`` of every backend returns, without a framework.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from coordconv.geometry import is_int
from coordconv.grid import Array
from coordconv.recording import OUTPUT

Run: TypeAlias = Callable[[Array], Mapping[str, Array]]

_WIDTH = 100
_TICKS = 24  # as many names fit below a picture
_NUMBERS = ("constant", "constant_middle", "shuffled", "shuffled_middle")


@dataclass(frozen=True)
class PositionRow:
    """What one layer's output owes to position: shares from 0, nothing, to 1, all of it.

    Variances are those over the positions of an image, as means over images and channels, so that
    channels of large values count for more.

    Args:
        name: the layer's name, as ``recorded`` has it.
        kind: the layer's class, or "".
        shape: the output's shape ``(N, C, *S)``.
        constant: ``A / (A + B)``, with ``A`` the variance of the response to constant images, each
            of the mean color of one image, and ``B`` the variance of what the image itself adds. In
            a network that draws random numbers chance is no part of ``A``, which may be below 0.
        constant_middle: the same over the middle half of each axis alone; None where an axis has
            two or three positions, of which none is cut off.
        shuffled: of the variance of the response to shuffled images, the share that its mean over
            all images and draws has. The mean's variance is estimated without bias, so that it
            may be below 0 where there is nothing: :attr:`PositionReport.chance` says how far.
        shuffled_middle: the same over the middle, as above.
        map: the response ``(*S)`` to a constant image, in the image and channel where it varies
            most, less its median, in units of the root of the layer's mean ``A + B``.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    constant: float
    constant_middle: float | None
    shuffled: float
    shuffled_middle: float | None
    map: Array = field(repr=False, compare=False)


@dataclass(frozen=True)
class PositionReport:
    """What :func:`position_report` found; ``print`` shows it as a table.

    Args:
        rows: a row for each layer that was measured, in the order of the calls.
        left_out: the layers that were not measured, and why.
        draws: how many times every image was shuffled.
        note: what could not be checked, or "".
    """

    rows: tuple[PositionRow, ...]
    left_out: Mapping[str, str]
    draws: int
    note: str = ""

    @property
    def chance(self) -> float:
        """The largest standard deviation of ``shuffled`` where there is no position.

        It falls with images times draws, and is less where positions or channels vary apart.
        """
        # Products of two draws, in images' means: each varies by the variance of one at most, and
        # one pair's product is uncorrelated with another's.
        return float(np.sqrt(2 / (self.draws * (self.draws - 1))) / self.rows[0].shape[0])

    def __getitem__(self, name: str) -> PositionRow:
        """The row of a layer; KeyError, which says why, if there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name}: {self.left_out.get(name, 'no layer of that name was seen')}")

    def to_json(self) -> str:
        """The report without its maps, as JSON."""
        fields = ("name", "kind", "shape", *_NUMBERS)
        rows = [{name: getattr(row, name) for name in fields} for row in self.rows]
        left = dict(self.left_out)
        content = {"draws": self.draws, "rows": rows, "left_out": left, "note": self.note}
        return json.dumps(content, indent=2)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture of the shares through the depth, and of some maps; needs matplotlib."""
        plot({"": self}, path)

    def __str__(self) -> str:
        kinds = [_shortened(row.kind, 16) for row in self.rows]
        shapes = ["x".join(map(str, row.shape)) for row in self.rows]
        room = _WIDTH - 40 - max(5, *map(len, kinds)) - max(5, *map(len, shapes))
        names = [_shortened(row.name, room) for row in self.rows]
        widths = [max(5, *map(len, column)) for column in (names, kinds, shapes)]

        def line(*cells: str) -> str:
            words = (f"{cell:{width}}" for cell, width in zip(cells, widths, strict=False))
            return "  ".join([*words, *(f"{cell:>7}" for cell in cells[3:])]).rstrip()

        lines = [
            line("", "", "", "constant", "", "shuffled", ""),
            line("layer", "kind", "shape", "all", "middle", "all", "middle"),
        ]
        for row, *words in zip(self.rows, names, kinds, shapes, strict=True):
            lines.append(line(*words, *(_percent(getattr(row, each)) for each in _NUMBERS)))
        reasons: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            reasons.setdefault(why, []).append(name)
        notes = [f"left out, {why}: {', '.join(names)}" for why, names in reasons.items()]
        legend = [
            "constant: the share in the variance over positions that images without content have",
            "shuffled: the share that the mean over shuffled images has; by chance up to "
            f"±{_percent(self.chance)} (1 sigma)",
            "middle: of the middle half of each axis alone, which padding reaches last",
        ]
        for text in [*legend, *notes, self.note]:
            lines += textwrap.wrap(text, _WIDTH, subsequent_indent="  ")
        return "\n".join(lines)


def position_report(
    run: Run,
    input: Array,
    *,
    draws: int = 16,
    seed: int = 0,
    layers: Collection[str] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> PositionReport:
    """How much of each layer's output is a function of position alone.

    A network that is blind to position answers a constant image alike at all positions, and, as
    every pixel of a shuffled image is as likely to be anywhere, shuffled images alike on average.
    What differs from position to position comes from padding, where it starts at the border and
    creeps inwards from layer to layer, so that at first the middle has none, or from coordinates
    and position embeddings, which the middle has at once. :class:`PositionRow` has the measures.

    What it cannot tell: what a fully connected layer knows of position, as its output has no
    positions; tokens ``(N, L, C)``; what a network does to real images and not to noise, which
    shuffled images are. A transposed convolution's checkerboard counts as position, everywhere; an
    instance normalization magnifies what little varies in the response to a constant image. With
    circular padding there is nothing, but for a thousandth or so where a stride does not divide a
    length: the samples on the two sides of the seam then share more of the image than others.

    Args:
        run: the network: what ``recorded`` of a backend returns, or another function from an array
            to arrays by name.
        input: images ``(N, C, *S)``, floating-point, as the network takes them.
        draws: how many times each image's pixels are shuffled, its channels together.
        seed: of the shuffling.
        layers: the names of the layers to report on, as in the report; all if None.
        kinds: the classes of the layers by name, for the report.

    Returns:
        A report, a row for each array of the network that has positions, and why others have none.

    Raises:
        TypeError: ``input`` is no floating-point array; ``run`` returns no arrays by name.
        ValueError: ``input`` is not ``(N, C, *S)``, not finite, or has no image that varies;
            ``draws`` below 2; a negative ``seed``; ``layers`` that were not seen; no layer that
            can be measured.

    Source:
        Padding as a source of position: Islam, Jia and Bruce, *How Much Position Information Do
        Convolutional Neural Networks Encode?*, ICLR 2020; Kayhan and van Gemert, *On Translation
        Invariance in CNNs: Convolutional Layers Can Exploit Absolute Spatial Location*, CVPR 2020.
        The shares are our own.

    Example:
        >>> images = np.random.default_rng(0).random((4, 1, 16, 16))
        >>> def network(x):
        ...     moved = np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1)))[..., 1:, 1:]
        ...     ramp = np.linspace(-1, 1, x.shape[3])
        ...     return {"move": moved, "add": moved + ramp, "mean": moved.mean((2, 3))}
        >>> print(position_report(network, images))
                                 constant           shuffled
        layer  kind   shape          all   middle      all   middle
        move          4x1x16x16    28.5%     0.0%    28.1%     0.1%
        add           4x1x16x16    83.0%    55.2%    82.7%    52.9%
        constant: the share in the variance over positions that images without content have
        shuffled: the share that the mean over shuffled images has; by chance up to ±2.3% (1 sigma)
        middle: of the middle half of each axis alone, which padding reaches last
        left out, not (N, C, *S) as the input's (4, 1, 16, 16): mean
    """
    _check(input, draws, seed)
    kinds = kinds or {}
    rng = np.random.default_rng(seed)
    axes = tuple(range(2, input.ndim))
    run = _copying(run)
    found = run(input)
    mean = input.mean(axes, keepdims=True, dtype=np.float64).astype(input.dtype)
    constant = np.broadcast_to(mean, input.shape).copy()
    blank, again = run(constant), run(constant)
    names = _chosen(found, layers)
    longer, note = _longer(run, input)

    left: dict[str, str] = {}
    measured: dict[str, _Layer] = {}
    for name in names:
        shape = found[name].shape
        why = _unfit(found[name], input, [shapes.get(name) for shapes in longer])
        why = why or _changed(blank.get(name), shape) or _changed(again.get(name), shape)
        if not why:
            measured[name] = _Layer(found[name], blank[name], again[name])
            why = measured[name].unfit
        if why:
            left[name] = why
    del found, blank, again  # they are large
    for _ in range(draws):
        seen = run(_shuffled(input, rng))
        for name in [name for name in measured if name not in left]:
            if why := _changed(seen.get(name), measured[name].shape):
                left[name] = why
            else:
                measured[name].add(seen[name])
    called = {_module(name) for name in names}
    if layers is None:
        left |= {name: "no output was seen" for name in kinds if name not in called}
    rows = [
        layer.row(name, kinds.get(_module(name), ""))
        for name, layer in measured.items()
        if name not in left
    ]
    if not rows:
        reasons = "".join(f"\n  {name}: {why}" for name, why in left.items())
        raise ValueError(f"no layer has an output (N, C, *S) that can be measured:{reasons}")
    return PositionReport(tuple(rows), left, draws, note)


def plot(reports: Mapping[str, PositionReport], path: str | os.PathLike[str]) -> None:
    """Write a picture of reports by their titles, one below the other; needs matplotlib.

    On the left the shares through the depth of the network, on the right the maps of some layers.
    """
    from matplotlib.figure import Figure  # only the picture needs it

    # For a narrow screen: in inches, with letters of a size that stays legible there.
    figure = Figure(figsize=(8.5, 3.3 * len(reports) + 0.5), layout="constrained")
    grid = figure.subplots(len(reports), 2, width_ratios=[1.25, 1], squeeze=False)
    for (title, report), (curves, right) in zip(reports.items(), grid, strict=True):
        places = np.arange(len(report.rows))
        for region, color in (("", "C0"), ("_middle", "C1")):
            for name, style in (
                ("constant", {"linewidth": 6, "alpha": 0.3}),
                ("shuffled", {"linewidth": 1.5, "marker": "o", "markersize": 4}),
            ):
                shares = [getattr(row, name + region) for row in report.rows]
                values = [np.nan if share is None else 100 * share for share in shares]
                label = f"{name}: {region[1:] or 'all'}"
                curves.plot(places, values, color=color, label=label, **style)
        shown = places[:: -(-len(places) // _TICKS)]
        names = [_escaped(_shortened(report.rows[place].name, 16)) for place in shown]
        curves.set_xticks(shown, names, rotation=90)
        curves.set_title(_escaped(title), fontsize=14, loc="left")
        curves.set_ylabel("due to position, %", fontsize=12)
        curves.set(ylim=(-5, 105), yticks=range(0, 101, 25))
        _draw_maps(right, report)
    grid[0][0].legend(fontsize=11)
    figure.savefig(path, dpi=110)


def _draw_maps(panel: Any, report: PositionReport) -> None:
    """The maps of a few layers from first to last, in a square of four; red is more, blue less."""
    panel.set_axis_off()
    chosen = np.unique(np.linspace(0, len(report.rows) - 1, 4).round().astype(int))
    for i, place in enumerate(chosen):
        row = report.rows[place]
        axes = panel.inset_axes((i % 2 * 0.5, 0.54 - i // 2 * 0.58, 0.5, 0.47))
        values = row.map
        if values.ndim == 1:
            axes.plot(values)
            axes.set(ylim=(-3, 3))
        else:
            while values.ndim > 2:
                values = values[len(values) // 2]
            axes.imshow(values, cmap="RdBu_r", vmin=-3, vmax=3)
        axes.set(xticks=[], yticks=[])
        axes.set_title(_escaped(_shortened(row.name, 16)), fontsize=11)


class _Layer:
    """What is summed up of a layer's output: over all positions, and over the middle ones."""

    def __init__(self, found: Array, blank: Array, again: Array) -> None:
        """From the output for the images, and two for constant ones: chance is apart in each."""
        self.shape = found.shape
        middle = tuple(slice(n // 4, n - n // 4) for n in self.shape[2:])
        self.parts: list[Any] = [...]
        # Where nothing is cut off an axis, its middle is no other place than its border.
        if all(n == 1 or n > 3 for n in self.shape[2:]):
            self.parts.append((..., *middle))
        # Of each part the variance of what rounding alone may do to numbers of this size.
        eps = float(np.finfo(found.dtype).eps)
        self.least = [(eps * float(np.abs(found[part]).max())) ** 2 for part in self.parts]
        found, blank, again = (each.astype(np.float64) for each in (found, blank, again))
        self.constant: list[float] = []
        totals: list[float] = []
        for part, least in zip(self.parts, self.least, strict=True):
            position = _product(blank[part], again[part])
            totals.append(position + _product((found - blank)[part], (found - again)[part]))
            self.constant.append(_share(position, totals[-1], least))
        self.unfit = "" if totals[0] > self.least[0] else "alike at all positions"
        response = _centred((blank + again) / 2)
        sizes = np.sum(response**2, axis=tuple(range(2, found.ndim)))
        most = np.unravel_index(sizes.argmax(), sizes.shape)
        shown = response[most] - np.median(response[most])
        self.map = (shown / np.sqrt(totals[0] or 1)).astype(np.float32)
        self.draws, self.sum = 0, np.zeros(self.shape[1:])
        self.squares, self.totals = np.zeros((2, len(self.parts)))

    def add(self, output: Array) -> None:
        """One more draw: the output for the images when shuffled."""
        output = output.astype(np.float64)
        mean = output.mean(0)
        self.draws, self.sum = self.draws + 1, self.sum + mean
        for i, part in enumerate(self.parts):
            self.squares[i] += np.mean(_centred(mean[part], 1) ** 2)
            self.totals[i] += np.mean(_centred(output[part]) ** 2)

    def shuffled(self) -> list[float]:
        """The shares of position in the variances of the outputs for shuffled images.

        The variance of the mean over the draws holds chance as well as position. Draws are
        independent, so that the mean product of two different draws has the expectation of
        position alone, whatever ties the positions of one draw together: with ``s`` the sum of
        ``k`` draws, ``(s**2 - sum of squares) / (k * (k - 1))``.
        """
        pairs = self.draws * (self.draws - 1)
        return [
            _share(
                float(np.mean(_centred(self.sum[part], 1) ** 2) - squares) / pairs,
                total / self.draws,
                least,
            )
            for part, squares, total, least in zip(
                self.parts, self.squares, self.totals, self.least, strict=True
            )
        ]

    def row(self, name: str, kind: str) -> PositionRow:
        """What was found, by now."""
        constant, shuffled = _pair(self.constant), _pair(self.shuffled())
        return PositionRow(name, kind, self.shape, *constant, *shuffled, self.map)


def _share(part: float, total: float, least: float) -> float:
    return part / total if total > least else 0.0


def _pair(shares: list[float]) -> tuple[float, float | None]:
    """Of all positions, and of the middle ones, if there are any apart."""
    return shares[0], shares[1] if len(shares) > 1 else None


def _product(first: Array, second: Array) -> float:
    return float(np.mean(_centred(first) * _centred(second)))


def _centred(array: Array, first: int = 2) -> Array:
    """Less the mean over positions, which are the axes from the ``first`` on."""
    centred: Array = array - array.mean(tuple(range(first, array.ndim)), keepdims=True)
    return centred


def _copying(run: Run) -> Run:
    """The same network with copies, since one may write to its input, or to its last outputs."""

    def copied(x: Array) -> Mapping[str, Array]:
        found = run(x.copy())
        if not isinstance(found, Mapping):
            raise TypeError(f"run must return arrays by name, got a {type(found).__name__}")
        return {name: np.array(array) for name, array in found.items()}

    return copied


def _check(input: Array, draws: int, seed: int) -> None:
    if not isinstance(input, np.ndarray) or input.dtype.kind != "f":
        what = f"{type(input).__name__} {getattr(input, 'dtype', '')}".rstrip()
        raise TypeError(f"input must be a floating-point array of NumPy, got {what}")
    if input.ndim < 3 or not input.size:
        raise ValueError(f"input must be (N, C, *S) with axes of positions, got {input.shape}")
    if not np.isfinite(input).all():
        raise ValueError("input must be finite, got NaN or infinities")
    if not np.ptp(input.reshape(*input.shape[:2], -1), axis=2).any():
        raise ValueError(
            "input must vary over positions: constant images stay as they are when shuffled"
        )
    for name, value, least in (("draws", draws, 2), ("seed", seed, 0)):
        if not is_int(value) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _chosen(found: Mapping[str, Array], layers: Collection[str] | None) -> list[str]:
    """The names to report on, in the order of the calls."""
    if layers is None:
        return [*found]
    wanted = [layers] if isinstance(layers, str) else [*layers]
    unknown = [name for name in wanted if name not in found]
    if unknown or not wanted:
        raise ValueError(f"layers has {unknown}, but the outputs seen are: {', '.join(found)}")
    return [name for name in found if name in wanted]


def _longer(run: Run, input: Array) -> tuple[list[dict[str, tuple[int, ...]]], str]:
    """The shapes of the outputs for images of twice the length, on each axis of positions in turn.

    They tell axes apart. Without any there is a note on why.
    """
    few = input[:1] if len(input) > 1 else np.concatenate([input] * 2)  # another batch than input's
    found = []
    try:
        for axis in range(2, input.ndim):
            outputs = run(np.concatenate([few] * 2, axis=axis))
            found.append({name: output.shape for name, output in outputs.items()})
    except Exception as error:  # noqa: BLE001  # a network of one size may raise anything
        said = (str(error).splitlines() or [""])[0]
        return found, (
            "not checked, that axes are (N, C, *S), by images of twice the length: "
            f"{type(error).__name__}: {said}"
        )
    return found, ""


def _unfit(output: Array, input: Array, longer: list[tuple[int, ...] | None]) -> str:
    """Why an output has no share of position, or ""."""
    if output.dtype.kind != "f":
        return f"of type {output.dtype}"
    if output.ndim != input.ndim or len(output) != len(input):
        return f"not (N, C, *S) as the input's {input.shape}"
    if not output.shape[1]:
        return "without channels"
    if output[0, 0].size < 2:
        return "of one position"
    # Else these are channels on the last axis, kernels that a module computes, maps of attention.
    batch = 1 if len(input) > 1 else 2
    for axis, shape in enumerate(longer, 2):
        wanted = (batch, *output.shape[1:])
        if (
            shape is not None
            and shape[:axis] + shape[axis + 1 :] != wanted[:axis] + wanted[axis + 1 :]
        ):
            return "of other axes than (N, C, *S), as images of twice the length show"
    return "" if np.isfinite(output).all() else "has NaN or infinities"


def _changed(output: Array | None, shape: tuple[int, ...]) -> str:
    """Why an output for another input cannot be compared, or ""."""
    if output is None or output.shape != shape:
        return "not of the same shape for other values of the input"
    return "" if np.isfinite(output).all() else "has NaN or infinities"


def _shuffled(input: Array, rng: np.random.Generator) -> Array:
    """Every image with its positions in an order of its own, drawn at random."""
    flat = input.reshape(*input.shape[:2], -1)
    order = rng.permuted(np.tile(np.arange(flat.shape[2]), (len(flat), 1)), axis=1)
    return np.take_along_axis(flat, order[:, None], 2).reshape(input.shape)


def _module(name: str) -> str:
    """The module's name, of that of a later call or of a part of what a module returned."""
    return name if name == OUTPUT else re.split(r"[#\[]", name)[0]


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"…{text[1 - width :]}"


def _escaped(text: str) -> str:
    """The text with its dollars escaped: to matplotlib they would start a formula."""
    return text.replace("$", r"\$")


def _percent(share: float | None) -> str:
    """In percent; no minus sign for what rounds to zero."""
    return "-" if share is None else f"{round(100 * share, 1) + 0.0:.1f}%"
