"""What int8 in ONNX Runtime costs a trained coord_classifier, in answers of 3,136.

coordconv demo --out demo
python benchmarks/quantization.py demo/coord_classifier.safetensors

Needs onnx, onnxruntime and onnxscript. The network is exported as it is and fused, in float32 and
quantized by onnxruntime.quantization: dynamic, of the weights alone, and static, by channel, with
128 of the positions that it was trained on to calibrate.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import torch
import typer
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

import common
from common import Array, console
from coordconv import load_weights, networks
from coordconv.backends.torch import fuse
from coordconv.cli.demo import CANVAS, Positions, positions

_BATCH = 112
_CALIBRATE = 128


class Reader(CalibrationDataReader):  # type: ignore[misc]  # it has no types
    """Batches to calibrate with."""

    def __init__(self, inputs: Array) -> None:
        self.batches = iter(np.split(inputs, 8))

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"x": batch}


def right(path: Path, data: Positions, inputs: Array) -> int:
    """How many of all positions a program answers rightly."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    batches = np.split(inputs, len(inputs) // _BATCH)
    answers = np.concatenate([session.run(None, {"x": b})[0].argmax(1) for b in batches])
    return int((answers == data.labels).sum())


def main(
    weights: Annotated[
        Path, typer.Argument(help="coord_classifier.safetensors of the demo.", exists=True)
    ],
) -> None:
    """Count the right answers of a trained classifier in float32 and in int8."""
    data = positions()
    network: Any = networks.build("coord_classifier", "torch")
    network.import_weights(load_weights(weights))
    network.eval()
    inputs = data.inputs(np.arange(len(data.labels)), (CANVAS, CANVAS)).astype(np.float32)
    calibration = inputs[data.trained[:_CALIBRATE]]
    table = common.table(f"right answers of {len(inputs):,}", "", "float32", "dynamic", "static")
    with tempfile.TemporaryDirectory() as folder, console.status("exporting and quantizing"):
        plain, dynamic, static = (Path(folder, f"{name}.onnx") for name in ("f", "d", "s"))
        for name, module in (("as it is", network), ("fused", fuse(network, (CANVAS, CANVAS)))):
            torch.onnx.export(
                module,
                (torch.zeros(2, 2, CANVAS, CANVAS),),
                str(plain),
                dynamo=True,
                verbose=False,
                external_data=False,
                input_names=["x"],
                dynamic_shapes=({0: "batch"},),
            )
            quantize_dynamic(plain, dynamic, weight_type=QuantType.QUInt8)
            quantize_static(plain, static, Reader(calibration), per_channel=True)
            found = (right(path, data, inputs) for path in (plain, dynamic, static))
            table.add_row(name, *(f"{count:,}" for count in found))
    console.print(table)
    console.print(common.describe(common.machine("cpu")), soft_wrap=True)


if __name__ == "__main__":
    common.run(main)
