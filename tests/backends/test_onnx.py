"""Exported to ONNX by both of torch's exporters, and run by ONNX Runtime at the sizes to come."""

import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from torch import nn

from coordconv import Coordinates
from coordconv.backends.torch import (
    AddCoords,
    CoordConv1d,
    CoordConv2d,
    CoordConv3d,
    CoordConvTranspose2d,
    PositionBias2d,
    fuse,
)

pytestmark = pytest.mark.filterwarnings("ignore")

# Of these lengths every coordinate is a multiple of a power of two, so that all sums are exact.
SIZES = ((9, 5, 3), (5, 9, 17), (3, 17, 9), (33, 3, 5), (5, 5, 5))

MODELS = {
    "1-D": (1, lambda: CoordConv1d(3, 4, 3, padding=1)),
    "2-D": (2, lambda: CoordConv2d(3, 4, 3, padding=1, coords="yx")),
    "3-D": (3, lambda: CoordConv3d(3, 4, 3, padding=1)),
    "stride": (2, lambda: CoordConv2d(3, 4, 3, padding=1, stride=2)),
    "radius": (2, lambda: CoordConv2d(3, 4, 3, padding=1, coords="xyr")),
    "edges": (2, lambda: CoordConv2d(3, 4, 3, padding=1, coords=Coordinates("xy", align="edges"))),
    "extend": (
        2,
        lambda: CoordConv2d(3, 4, 3, padding=1, coords=Coordinates("xy", outside="extend")),
    ),
    "reflect": (2, lambda: CoordConv2d(3, 4, 3, padding=1, padding_mode="reflect")),
    "circular": (2, lambda: CoordConv2d(3, 4, 3, padding=1, padding_mode="circular")),
    "groups": (2, lambda: CoordConv2d(3, 3, 3, padding=1, groups=3)),
    "transposed": (2, lambda: CoordConvTranspose2d(3, 4, 3, stride=2, padding=1)),
    "AddCoords": (2, lambda: AddCoords("xy")),
    "PositionBias": (2, lambda: PositionBias2d(3)),
    "network": (
        2,
        lambda: nn.Sequential(
            CoordConv2d(3, 4, 3, padding=1),
            nn.ReLU(),
            CoordConv2d(4, 2, 1),
            CoordConvTranspose2d(2, 2, 3),
        ),
    ),
}
# Not exact: a square root, or thirds.
ROUNDED = ("radius", "edges")

# What makes coordinates in a graph: at a size that is known there is none of it.
MAKES_COORDINATES = {"Range", "Shape", "Div", "Sqrt", "Mod", "Cast", "Where", "NonZero"}


def model_of(name):
    rank, make = MODELS[name]
    torch.manual_seed(2)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    return rank, model


def inputs(rank, size, batch):
    return torch.randint(-2, 3, (batch, 3, *size[:rank])).float()


def exported(model, x, dynamo, dynamic):
    """The bytes of the program."""
    names = {0: "batch", **{axis: f"axis{axis}" for axis in range(2, x.dim())}}
    file = io.BytesIO()
    options = {"dynamo": dynamo, "input_names": ["x"]}
    if dynamic and dynamo:
        options["dynamic_shapes"] = (names,)
    elif dynamic:
        options["dynamic_axes"] = {"x": names}
    if dynamo:
        program = torch.onnx.export(model, (x,), verbose=False, **options)
        return program.model_proto.SerializeToString()
    torch.onnx.export(model, (x,), file, **options)
    return file.getvalue()


def operators(program):
    return {node.op_type for node in onnx.load_from_string(program).graph.node}


def holds(name, program, model, x):
    session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        wanted = model(x).numpy()
    if name in ROUNDED:
        return bool(np.abs(found - wanted).max() <= 2**-20 * np.abs(wanted).max())
    return np.array_equal(found, wanted)


@pytest.mark.parametrize("dynamo", [True, False], ids=["export", "trace"])
@pytest.mark.parametrize("name", MODELS)
def test_at_every_size(name, dynamo):
    rank, model = model_of(name)
    program = exported(model, inputs(rank, (9, 17, 5), 2), dynamo, dynamic=True)
    for batch, size in enumerate(SIZES, 1):
        assert holds(name, program, model, inputs(rank, size, batch)), size
    doubles = {
        tensor.name
        for tensor in onnx.load_from_string(program).graph.initializer
        if tensor.data_type == onnx.TensorProto.DOUBLE
    }
    assert not doubles
    assert "Einsum" not in operators(program)  # which not every tool has


@pytest.mark.parametrize("dynamo", [True, False], ids=["export", "trace"])
@pytest.mark.parametrize("name", MODELS)
def test_at_a_known_size_the_coordinates_are_constants(name, dynamo):
    rank, model = model_of(name)
    x = inputs(rank, (9, 17, 5), 2)
    program = exported(model, x, dynamo, dynamic=False)
    assert holds(name, program, model, x)
    if dynamo:  # the older exporter folds some constants, and not others
        assert not operators(program) & MAKES_COORDINATES


@pytest.mark.parametrize("dynamo", [True, False], ids=["export", "trace"])
def test_fused_it_is_convolutions_and_sums(dynamo):
    rank, model = model_of("network")
    x = inputs(rank, (9, 17, 5), 2)
    program = exported(fuse(model, x), x, dynamo, dynamic=False)
    assert holds("network", program, model, x)
    assert operators(program) <= {"Conv", "ConvTranspose", "Add", "Relu", "Constant"}
