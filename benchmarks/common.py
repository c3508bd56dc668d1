"""What the benchmarks share: the shapes, their data, the frameworks, timing, tables and files.

A framework is a module of its own, ``in_torch.py`` and the like, loaded when asked for. Each offers
the same variants of a layer:

- ``plain``: the framework's own convolution with the same output, without coordinates: the limit.
- ``concat``: the definition. The coordinates are made once, outside of what is timed, and each call
  concatenates them to the input and runs one convolution. That is the least work concatenation can
  be; published implementations make the coordinates anew on each call.
- ``ours``: the CoordConv layer, which chooses by itself between append and map.
- ``fused``: the layer fused for its size; inference alone.
- ``append`` and ``map``: the CoordConv layer, made to compute in that way.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from coordconv import Coordinates, available_backends, backends, coordinate_grid, position_bias
from coordconv.geometry import ConvGeometry
from coordconv.position_bias import APPEND, MAP
from coordconv.weights import join_kernel

Array: TypeAlias = npt.NDArray[Any]
Call: TypeAlias = Callable[[], Any]

PLAIN, CONCAT, OURS, FUSED = VARIANTS = "plain", "concat", "ours", "fused"
WAYS = APPEND, MAP  # further variants
INFERENCE, TRAINING = "inference", "training"
_MODULES = {
    "torch-eager": "in_torch",
    "torch-compiled": "in_torch",
    "jax-jit": "in_jax",
    "paddle-eager": "in_paddle",
}
_SAMPLE_SECONDS = 0.005  # of one sample at least: thousands of times what a clock resolves
_WARM_SECONDS = 0.02
_LEAST_ROUNDS = 9
# What takes several times as long as another variant needs no precision: a few rounds will do.
_SLOW, _SLOW_ROUNDS = 5, 3

console = Console(width=112)  # also in a file: wide enough for every table


@dataclass(frozen=True)
class Shape:
    """A layer and its input; padded to the kernel's half, so that stride 1 keeps the size."""

    batch: int
    channels: int
    out: int
    size: tuple[int, ...]
    kernel: int
    stride: int = 1
    groups: int = 1
    dtype: str = "float32"
    channels_last: bool = False  # where the framework leaves the choice
    coord_scale: float = 1.0  # of the kernel's part for coordinates, over that for features

    def __str__(self) -> str:
        parts = [f"{self.batch}, {self.channels}->{self.out}, {'x'.join(map(str, self.size))}"]
        parts.append(f", k{self.kernel}")
        parts += [f" s{self.stride}"] * (self.stride > 1)
        parts += [f" g{self.groups}"] * (self.groups > 1)
        parts += [" bf16"] * (self.dtype == "bfloat16")
        return "".join(parts)

    @property
    def rank(self) -> int:
        return len(self.size)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of a torch or Paddle convolution, beside its channels."""
        return {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.kernel // 2,
            "groups": self.groups,
        }

    @property
    def all_channels(self) -> int:
        """Features and coordinates of all groups: each group sees all the coordinates."""
        return self.channels + self.groups * self.rank

    @cached_property
    def geometry(self) -> ConvGeometry:
        return ConvGeometry(
            (self.kernel,) * self.rank,
            stride=self.stride,
            padding=self.kernel // 2,
            groups=self.groups,
        )

    @property
    def output_over_input(self) -> float:
        """How many numbers the output has for each of the input."""
        outputs = self.out * math.prod(self.geometry.output_shape(self.size))
        return outputs / (self.channels * math.prod(self.size))

    @property
    def map_bytes(self) -> int:
        """The bytes of one map of one sample."""
        samples = math.prod(self.geometry.output_shape(self.size))
        return self.out * samples * (4 if self.dtype == "float32" else 2)


SHAPES = (
    Shape(8, 3, 64, (224, 224), 3),
    Shape(8, 3, 64, (224, 224), 7, stride=2),
    Shape(8, 64, 64, (56, 56), 3),
    Shape(4, 48, 96, (40, 40), 5),
    Shape(64, 64, 64, (7, 7), 3, stride=2),  # the article's
    Shape(16, 2, 32, (64, 64), 1),  # the paper's
    Shape(16, 32, 32, (64, 64), 1),
    Shape(8, 512, 256, (20, 20), 1),  # a detector's neck
    Shape(1, 3, 32, (512, 512), 3),  # an output far larger than the input
    Shape(1, 512, 512, (7, 7), 3),  # a kernel far larger than the input
    Shape(8, 64, 64, (16_000,), 9),
    Shape(1, 1, 32, (64, 64, 64), 3),
    Shape(2, 32, 32, (32, 32, 32), 3),
    Shape(8, 96, 96, (56, 56), 7, groups=96),
)
# On a GPU besides: two channels more than these leave the widths that tensor cores take.
GPU_SHAPES = tuple(
    Shape(32, c, c, (size, size), kernel, dtype="bfloat16", channels_last=True)
    for c, size in ((64, 56), (256, 28))
    for kernel in (3, 1)
)


def shapes(device: str) -> tuple[Shape, ...]:
    """The shapes that the targets are about, on a device."""
    return SHAPES + (GPU_SHAPES if device == "cuda" else ())


@dataclass(frozen=True)
class Data:
    """A layer's input and canonical weights, and the coordinates ``(n, *size)``, in NumPy.

    ``weight`` is the kernel over features and coordinates, ``features`` its part for features.
    Every value of input and weights has 7 bits, and so is the same in every floating-point type.
    """

    x: Array
    weight: Array
    features: Array
    bias: Array
    grid: Array

    def weights(self, variant: str) -> dict[str, Array]:
        """The canonical weights of a variant: all but the plain one have the whole kernel."""
        return {"weight": self.features if variant == PLAIN else self.weight, "bias": self.bias}


def data(shape: Shape, seed: int = 0) -> Data:
    """Data for a layer, the weights about as large as a framework would draw them."""
    rng = np.random.default_rng(seed)
    features, taps = shape.channels // shape.groups, (shape.kernel,) * shape.rank
    scale = 2.0 ** -round(math.log2((features + shape.rank) * math.prod(taps)) / 2)

    def draw(*size: int, scale: float = scale) -> Array:
        return (rng.integers(-127, 128, size) * (scale / 64)).astype(np.float32)

    x = draw(shape.batch, shape.channels, *shape.size, scale=1)
    of_features = draw(shape.out, features, *taps)
    of_coordinates = draw(shape.out, shape.rank, *taps, scale=scale * shape.coord_scale)
    return Data(
        x,
        join_kernel(of_features, of_coordinates, shape.groups),
        of_features,
        draw(shape.out),
        coordinate_grid(shape.size, Coordinates.resolve(None, shape.rank)),
    )


class Framework(Protocol):
    """A framework on a device, as a module ``in_*.py`` of this folder has it."""

    def calls(self, shape: Shape, mode: str, variants: Sequence[str] = VARIANTS) -> dict[str, Call]:
        """What to time, by variant; in inference a call returns the output.

        Where appending, by ``concat`` or by ``append``, takes minutes, that variant is left out.
        """

    def seconds(self, call: Call, loops: int) -> float:
        """The time of one call, from ``loops`` in a row; by device events where there are any."""

    def array(self, output: Any, shape: Shape) -> Array:
        """An output as a float64 array, channels first."""


def framework(name: str, device: str) -> Framework:
    """Load one; ``device`` is ``"cpu"`` or ``"cuda"``."""
    # JAX would take most of a GPU's memory for itself, and leave the others none.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    loaded: Framework = importlib.import_module(_MODULES[name]).framework(name, device)
    return loaded


def forced(variant: str, call: Call) -> Call:
    """The call of a variant, during which layers compute in the way that the variant names.

    A compiler traces a layer in the first call. The later calls are forced as well, since
    ``torch.compile`` would trace anew wherever ``FORCED`` is not what it was.
    """
    if variant not in WAYS:
        return call

    def run() -> Any:
        before, position_bias.FORCED = position_bias.FORCED, variant
        try:
            return call()
        finally:
            position_bias.FORCED = before

    return run


def event_seconds(call: Call, loops: int, start: Any, end: Any) -> float:
    """The time of one call by a device's events, which count in milliseconds."""
    start.record()
    for _ in range(loops):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / loops


def wall_seconds(call: Call, loops: int, wait: Callable[[Any], object]) -> float:
    """The time of one call by the clock; ``wait`` for the last result counts."""
    start = time.perf_counter()
    for _ in range(loops):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / loops


def measure(
    calls: Mapping[str, Call],
    seconds_of: Callable[[Call, int], float],
    budget: float,
    least_rounds: int = _LEAST_ROUNDS,
) -> dict[str, list[float]]:
    """Times in seconds by variant, in the order of the rounds.

    A round runs every variant once, in random order, so that what the machine does meanwhile
    falls on all of them: a ratio within a round is worth more than one of totals.

    Args:
        calls: what to time.
        seconds_of: the time of one call, from a number of calls in a row.
        budget: how long to go on, in seconds.
        least_rounds: how many rounds are run in any case.
    """
    loops = {name: _calibrated(call, seconds_of) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, rng = list(calls), random.Random(0)
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + budget
        rounds = 0
        while rounds < least_rounds or time.perf_counter() < end:
            rounds += 1
            rng.shuffle(order)
            for name in order:
                times[name].append(seconds_of(calls[name], loops[name]))
            if rounds == _SLOW_ROUNDS:
                limit = _SLOW * min(map(min, times.values()))
                order = [name for name in calls if min(times[name]) < limit]
    finally:
        if enabled:
            gc.enable()
    return times


def _calibrated(call: Call, seconds_of: Callable[[Call, int], float]) -> int:
    """How many calls make one sample; on the way it compiles, allocates and fills caches."""
    seconds_of(call, 1)
    taken, done = math.inf, 0.0
    while done < _WARM_SECONDS:
        seconds = seconds_of(call, 1)
        taken, done = min(taken, seconds), done + seconds
    return max(1, math.ceil(_SAMPLE_SECONDS / taken))


@dataclass(frozen=True)
class Spread:
    """The quartiles of what was seen in the rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*np.quantile(values, (0.25, 0.5, 0.75)).tolist())

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Result:
    """What was measured of one layer in one mode.

    ``ratios`` are to the plain convolution in the same round, by variant; those of ours to the
    others are under ``"ours/concat"``, ``"ours/append"`` and ``"ours/map"``.
    """

    framework: str
    shape: str
    mode: str
    rounds: int
    milliseconds: dict[str, Spread]
    ratios: dict[str, Spread]


def timed(
    name: str,
    shape: Shape,
    mode: str,
    framework: Framework,
    budget: float,
    variants: Sequence[str] = VARIANTS,
    least_rounds: int = _LEAST_ROUNDS,
) -> Result:
    """Time the variants of one layer in one mode."""
    if mode == TRAINING:
        variants = [v for v in variants if v != FUSED]
    if shape.dtype != "float32":  # in 16 bits there is one way
        variants = [v for v in variants if v not in WAYS]
    calls = framework.calls(shape, mode, variants)
    if mode == INFERENCE:
        _check_alike({v: framework.array(calls[v](), shape) for v in calls if v != PLAIN})
    times = measure(calls, framework.seconds, budget, least_rounds)
    pairs = {v: (v, PLAIN) for v in calls if v != PLAIN}
    pairs |= {against(v): (OURS, v) for v in calls if v not in (PLAIN, OURS)}
    return Result(
        name,
        str(shape),
        mode,
        len(times[PLAIN]),
        {v: Spread.of([1e3 * t for t in found]) for v, found in times.items()},
        {
            label: Spread.of([a / b for a, b in zip(times[over], times[under], strict=False)])
            for label, (over, under) in pairs.items()
        },
    )


def against(variant: str) -> str:
    """Where a :class:`Result` has the ratios of ours to another variant."""
    return f"{OURS}/{variant}"


def _check_alike(outputs: Mapping[str, Array]) -> None:
    """That all do the same work, to a few percent; ``coordconv parity`` holds them to a bound."""
    ours = outputs[OURS]
    largest = np.abs(ours).max()
    for variant, output in outputs.items():
        difference = np.abs(output - ours).max()
        if not difference <= 0.05 * largest:
            raise AssertionError(f"ours differs from {variant} by {difference} of {largest}")


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean; NaN, if there are no values."""
    if not values:
        return math.nan
    return math.exp(sum(map(math.log, values)) / len(values))


def machine(device: str) -> dict[str, Any]:
    """What was measured on: processor, threads, versions; nothing that names the machine."""
    found: dict[str, Any] = {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    for backend in backends.BACKENDS.values():
        found.update(backend.versions())
    if "torch" in available_backends():
        import torch

        found["torch threads"] = torch.get_num_threads()
        if device == "cuda" and torch.cuda.is_available():
            found["gpu"], found["cuda"] = torch.cuda.get_device_name(), torch.version.cuda
            cudnn: Any = torch.backends.cudnn
            found["cudnn"] = cudnn.version()
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def describe(found: Mapping[str, Any]) -> str:
    """A machine in a line."""
    rest = (f"{name} {value}" for name, value in found.items() if name not in ("cpu", "cores"))
    return f"{found['cores']} cores of {found['cpu']}, {', '.join(rest)}"


def table(title: str, *columns: str) -> Table:
    """A table whose first column is of words and the others of numbers."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        made.add_column(column, justify="left" if column == columns[0] else "right", no_wrap=True)
    return made


def progress() -> Progress:
    """A bar that goes on standard error, so that standard output holds the tables alone."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)


def fail(message: str) -> typer.Exit:
    """Say what is wrong on standard error; to be raised."""
    Console(stderr=True).print(f"[bold red]error:[/] {message}", soft_wrap=True)
    return typer.Exit(2)


def _present(device: str) -> str:
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"must be cpu or cuda, got {device!r}")
    return device


DeviceOption: TypeAlias = Annotated[
    str, typer.Option("--device", callback=_present, help="cpu, or cuda to time by device events.")
]
FrameworksOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--frameworks",
        help=f"Comma-separated: {', '.join(_MODULES)}; all that are installed by default.",
    ),
]
ShapesOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--shapes", help="Only the shapes with this in their names, such as 'k1'."),
]
SecondsOption: TypeAlias = Annotated[
    float, typer.Option(help="How long to measure each shape, mode and framework.")
]
PictureOption: TypeAlias = Annotated[
    Path | None, typer.Option(help="Draw the ratios here, as PNG or SVG.")
]
JsonOption: TypeAlias = Annotated[
    Path | None, typer.Option("--json", help="Write the results and the machine here.")
]


def run(main: Callable[..., None]) -> None:
    """A script's ``main`` as a command."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()


def chosen_frameworks(wanted: str | None) -> tuple[str, ...]:
    """Those in ``wanted``, or all that are installed."""
    found = set(available_backends())
    needs = {"in_torch": "torch", "in_jax": "linen", "in_paddle": "paddle"}
    installed = tuple(name for name, module in _MODULES.items() if needs[module] in found)
    names = tuple(wanted.split(",")) if wanted else installed
    for name in names:
        if name not in installed:
            raise fail(f"--frameworks: {name!r} is not among {', '.join(installed)}")
    return names


def timed_all(
    names: Sequence[str],
    device: str,
    cases: Sequence[tuple[Shape, str]],
    budget: float,
    variants: Sequence[str] = VARIANTS,
) -> Iterator[tuple[str, list[Result]]]:
    """Time every case in every framework, one framework after another, behind a bar."""
    console.print(describe(machine(device)), soft_wrap=True)
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.5:
        # Threads that wait for one another then wait for the scheduler, by milliseconds.
        console.print(f"[yellow]load {load:.1f}: something else runs, these times mislead[/]")
    with progress() as bar:
        task = bar.add_task("", total=len(names) * len(cases))
        for name in names:
            loaded, results = framework(name, device), []
            for shape, mode in cases:
                bar.update(task, description=f"{name}, {mode}: {shape}")
                results.append(timed(name, shape, mode, loaded, budget, variants))
                bar.advance(task)
            yield name, results


def chosen_shapes(wanted: str | None, device: str) -> tuple[Shape, ...]:
    """Those with ``wanted`` in their names, or the error that there are none."""
    chosen = tuple(s for s in shapes(device) if (wanted or "") in str(s))
    if not chosen:
        names = "\n  ".join(map(str, shapes(device)))
        raise fail(f"no shape has {wanted!r} in its name; there are\n  {names}")
    return chosen


def write_json(path: Path, device: str, results: Sequence[Any]) -> None:
    """Write results, each a dataclass, and the machine."""
    contents = {"machine": machine(device), "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(contents, indent=1) + "\n")
