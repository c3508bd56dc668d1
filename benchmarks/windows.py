"""What windows cost: a batch of crops, each with its own, beside no window and hand-made grids.

python benchmarks/windows.py --json windows.json

The layer is 64->64, 3x3, on 32 crops of 56x56 of a frame of 224x224. ``none`` is the layer without
a window; ``window`` the layer with one for each sample; ``append`` a plain convolution of the crops
and their coordinates, which are computed for each sample and concatenated, as projects that train
on crops do today. The goal is a window at 1.10 of none at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer

import common
from common import INFERENCE, TRAINING, Spread, console
from coordconv import Window, backends

BATCH, CHANNELS, SIDE, FRAME = 32, 64, 56, 224
NONE, WINDOW, APPEND = VARIANTS = "none", "window", "append"
GOAL = 1.10
_BOXES = np.random.default_rng(0).integers(0, FRAME - SIDE, (BATCH, 2))
BOXES = np.concatenate([_BOXES, _BOXES + SIDE], 1)


@dataclass(frozen=True)
class Cost:
    """What was measured in a framework and mode: ratios to the layer without a window."""

    framework: str
    mode: str
    milliseconds: float  # without a window
    window: Spread
    append: Spread


def _grids(arange: Any, boxes: Any) -> tuple[Any, Any]:
    """The usual formula: x and y of each sample's pixels in its frame, which broadcast."""
    x = (2 * (boxes[:, :1] + arange) - (FRAME - 1)) / (FRAME - 1)
    y = (2 * (boxes[:, 1:2] + arange) - (FRAME - 1)) / (FRAME - 1)
    return x[:, None, None, :], y[:, None, :, None]


def in_torch(mode: str, compiled: bool) -> dict[str, Callable[[], Any]]:
    """The variants in torch."""
    import torch

    torch.manual_seed(0)
    layer = backends.load("torch").CoordConv2d(CHANNELS, CHANNELS, 3, padding=1)
    conv = torch.nn.Conv2d(CHANNELS + 2, CHANNELS, 3, padding=1)
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    boxes = torch.tensor(BOXES, dtype=torch.float32)

    def none(x: Any) -> Any:
        return layer(x)

    def window(x: Any) -> Any:
        return layer(x, window=Window.from_boxes(boxes, (FRAME, FRAME)))

    def append(x: Any) -> Any:
        grids = _grids(torch.arange(SIDE, dtype=torch.float32), boxes)
        shape = BATCH, 1, SIDE, SIDE
        return conv(torch.cat([x, *(grid.expand(shape) for grid in grids)], 1))

    functions: Any = {NONE: none, WINDOW: window, APPEND: append}
    if compiled:
        torch.compiler.reset()
        functions = {n: torch.compile(f, fullgraph=True) for n, f in functions.items()}

    def inference(function: Any) -> Any:
        with torch.inference_mode():
            return function(x)

    given, dy = x.clone().requires_grad_(), torch.randn(BATCH, CHANNELS, SIDE, SIDE)

    def training(function: Any) -> Any:
        parameters = conv.parameters() if function is functions[APPEND] else layer.parameters()
        return torch.autograd.grad(function(given), (given, *parameters), dy)

    step = inference if mode == INFERENCE else training
    return {name: lambda f=f: step(f) for name, f in functions.items()}  # type: ignore[misc]


def in_jax(mode: str) -> dict[str, Callable[[], Any]]:
    """The variants in JAX, compiled, with the boxes as an argument."""
    import jax
    from jax import numpy as jnp

    linen, rng = backends.load("linen"), np.random.default_rng(0)
    layer = linen.CoordConv(CHANNELS, (3, 3))
    x = jnp.asarray(rng.standard_normal((BATCH, SIDE, SIDE, CHANNELS)), jnp.float32)
    variables, boxes = layer.init(jax.random.key(0), x), jnp.asarray(BOXES, jnp.float32)

    def none(variables: Any, x: Any, boxes: Any) -> Any:
        return layer.apply(variables, x)

    def window(variables: Any, x: Any, boxes: Any) -> Any:
        return layer.apply(variables, x, window=Window.from_boxes(boxes, (FRAME, FRAME)))

    def append(variables: Any, x: Any, boxes: Any) -> Any:
        grids = _grids(jnp.arange(SIDE, dtype=jnp.float32), boxes)
        parts = [jnp.broadcast_to(g[:, 0, ..., None], (BATCH, SIDE, SIDE, 1)) for g in grids]
        kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
        joined = jnp.concatenate([x, *parts], -1)
        numbers = ("NHWC", "HWIO", "NHWC")
        return (
            jax.lax.conv_general_dilated(joined, kernel, (1, 1), "SAME", dimension_numbers=numbers)
            + bias
        )

    def compiled(function: Any) -> Callable[[], Any]:
        run = function
        if mode == TRAINING:
            run = jax.grad(lambda v, x, b: (function(v, x, b) ** 2).sum(), argnums=(0, 1))
        run = jax.jit(run)
        return lambda: run(variables, x, boxes)

    return {n: compiled(f) for n, f in zip(VARIANTS, (none, window, append), strict=True)}


def in_paddle(mode: str) -> dict[str, Callable[[], Any]]:
    """The variants in Paddle, eager."""
    import paddle

    layer = backends.load("paddle").CoordConv2D(CHANNELS, CHANNELS, 3, padding=1)
    conv = paddle.nn.Conv2D(CHANNELS + 2, CHANNELS, 3, padding=1)
    x = paddle.randn([BATCH, CHANNELS, SIDE, SIDE])
    boxes = paddle.to_tensor(BOXES.astype("float32"))

    def none(x: Any) -> Any:
        return layer(x)

    def window(x: Any) -> Any:
        return layer(x, window=Window.from_boxes(boxes, (FRAME, FRAME)))

    def append(x: Any) -> Any:
        grids = _grids(paddle.arange(SIDE, dtype="float32"), boxes)
        shape = [BATCH, 1, SIDE, SIDE]
        return conv(paddle.concat([x, *(grid.expand(shape) for grid in grids)], 1))

    def inference(function: Any) -> Any:
        with paddle.no_grad():
            return function(x)

    given, dy = x.clone(), paddle.randn([BATCH, CHANNELS, SIDE, SIDE])
    given.stop_gradient = False

    def training(function: Any) -> Any:
        parameters = (conv if function is append else layer).parameters()
        return paddle.grad(function(given), [given, *parameters], dy)

    step = inference if mode == INFERENCE else training
    functions = zip(VARIANTS, (none, window, append), strict=True)
    return {name: lambda f=f: step(f) for name, f in functions}  # type: ignore[misc]


def calls(name: str, mode: str) -> dict[str, Callable[[], Any]]:
    """The variants in a framework."""
    if name.startswith("torch"):
        return in_torch(mode, compiled=name == "torch-compiled")
    return in_jax(mode) if name == "jax-jit" else in_paddle(mode)


def _wait(result: Any) -> None:
    for each in result if isinstance(result, (tuple, list)) else [result]:
        if hasattr(each, "block_until_ready"):
            each.block_until_ready()
        elif isinstance(each, dict):
            for leaf in each["params"].values():
                leaf.block_until_ready()


def main(
    frameworks: common.FrameworksOption = None,
    seconds: Annotated[
        float, typer.Option(help="How long to measure each framework and mode.")
    ] = 20.0,
    json_file: common.JsonOption = None,
) -> None:
    """Time a layer with a window for each sample, without one, and by grids that are appended."""
    names, rows = common.chosen_frameworks(frameworks), []
    console.print(common.describe(common.machine("cpu")), soft_wrap=True)
    with common.progress() as bar:
        task = bar.add_task("", total=2 * len(names))
        for name in names:
            for mode in (INFERENCE, TRAINING):
                bar.update(task, description=f"{name}, {mode}")
                times = common.measure(
                    calls(name, mode), lambda c, n: common.wall_seconds(c, n, _wait), seconds
                )
                ratios = {
                    variant: Spread.of(
                        [t / n for t, n in zip(times[variant], times[NONE], strict=False)]
                    )
                    for variant in (WINDOW, APPEND)
                }
                milliseconds = 1e3 * Spread.of(times[NONE]).median
                rows.append(Cost(name, mode, milliseconds, ratios[WINDOW], ratios[APPEND]))
                bar.advance(task)
    shown = common.table(
        f"{BATCH}, {CHANNELS}->{CHANNELS}, {SIDE}x{SIDE}, k3: time over that without a window",
        "framework",
        "mode",
        "none ms",
        WINDOW,
        APPEND,
        f"goal {GOAL:.2f}",
    )
    for row in rows:
        met = "met" if row.window.median <= GOAL else "missed"
        numbers = f"{row.milliseconds:.1f}", str(row.window), str(row.append)
        shown.add_row(row.framework, row.mode, *numbers, met)
    console.print(shown)
    if json_file is not None:
        common.write_json(json_file, "cpu", rows)


if __name__ == "__main__":
    common.run(main)
