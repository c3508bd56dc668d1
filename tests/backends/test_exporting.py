"""Every compiler and exporter of each framework: one program for all sizes, and right at each.

Errors are in units of the bound of ``coordconv.parity.bounds``: 1 is the most that float32
arithmetic may be off. Run with ``-s`` the table of docs/deployment.md is printed at the end. What
``test_onnx.py`` shows of ONNX, in exact arithmetic and option by option, is not shown again.
"""

from __future__ import annotations

import shutil
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import channels_first, channels_last, normal

from coordconv import (
    Coordinates,
    available_backends,
    backends,
    coordinate_grid,
    networks,
    position_bias,
)
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Flatten, Network, ReLU
from coordconv.parity.bounds import COORDINATE_ROUNDINGS, PRECISIONS, Expected, expected
from coordconv.parity.compare import likely_error, longest_axis
from coordconv.reference import Reference

pytestmark = pytest.mark.filterwarnings("ignore")

IN, OUT = 4, 6
FLOAT32 = PRECISIONS["float32"]

# Batch and spatial shape, of which a layer of fewer axes takes the last. The first is exported.
SIZES = ((2, 8, 16, 20), (3, 3, 17, 90), (1, 5, 5, 3), (4, 1, 1, 7), (5, 4, 33, 33))
# What torch.export takes for granted: no axis is a single sample, before a convolution or after it.
FROM_TWO = (*SIZES[:3], (4, 5, 6, 7), SIZES[4])


# --- what is exported, and what it must compute ---------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A CoordConv, or, without a geometry, an AddCoords."""

    geometry: ConvGeometry | None
    coords: Coordinates
    rank: int

    @property
    def network(self) -> Network:
        conv = Conv("conv", IN, OUT, self.geometry, self.coords)
        return Network("layer", (IN, *(9,) * self.rank), (conv,))

    def module(self, backend: str) -> Any:
        load = backends.load(backend)
        if self.geometry is None:
            return load.AddCoords(self.coords, rank=self.rank)
        return load.build(self.network, networks.initial_weights(self.network))

    def expected(self, x: Any, dy: Any = None) -> dict[str, Expected]:
        if self.geometry is not None:
            weights = networks.initial_weights(self.network)
            return expected(self.network, weights, x, dy)
        concatenate = Reference(ConvGeometry((1,) * self.rank), self.coords)
        value, size = (concatenate.padded(x, magnitudes=sizes)[:, 0] for sizes in (False, True))
        size[:, :IN] = 0  # the features are as they were
        return {"y": Expected(value, FLOAT32.error(size, COORDINATE_ROUNDINGS, 0))}


def described(rank: int) -> dict[str, Case]:
    conv = partial(ConvGeometry, (3,) * rank, padding=1)
    axes = "xyz"[:rank]
    given: dict[str, tuple[ConvGeometry | None, Any]] = {
        "axes": (conv(), axes),
        "radius": (conv(), f"{axes}r"),
        "groups and stride": (conv(groups=2, stride=2), axes),
        "edges": (conv(), Coordinates(axes, align="edges")),
        "extend": (conv(), Coordinates(axes, outside="extend")),
        "transposed": (conv(stride=2, transposed=True), axes),
        "transposed, extend": (conv(transposed=True), Coordinates(f"{axes}r", outside="extend")),
        "AddCoords": (None, f"{axes}r"),
    }
    if rank == 2:
        by_axis = {"x": (0, 4), "y": (1, -1)}
        given["paddledetection"] = (conv(), Coordinates.named("paddledetection"))
        given["longer"] = (
            conv(stride=2),
            Coordinates("xr", span=by_axis, align="start", aspect="longer"),
        )
        given["diagonal"] = (conv(), Coordinates("yx", aspect="diagonal"))
        given["pixels"] = (conv(), Coordinates("xr", units="pixels"))
    return {
        name: Case(geometry, Coordinates.resolve(coords, rank), rank)
        for name, (geometry, coords) in given.items()
    }


CASES = {rank: described(rank) for rank in (1, 2, 3)}
FEW = ("radius", "groups and stride", "transposed, extend")  # where a compiler takes long


def inputs(rank: int, size: tuple[int, ...]) -> Any:
    return normal(size[0], IN, *size[-rank:], seed=sum(size))


# --- the table ------------------------------------------------------------------------------------


@dataclass
class Row:
    """What was found of one exporter."""

    sizes: set[tuple[int, ...]] = field(default_factory=set)
    error: float = 0.0
    programs: int = 0
    remarks: dict[str, None] = field(default_factory=dict)  # each once, in their order


ROWS: dict[str, Row] = {}


def note(title: str, size: tuple[int, ...], error: float) -> float:
    row = ROWS.setdefault(title, Row())
    row.sizes.add(size)
    row.error = max(row.error, error)
    return error


def remark(title: str, text: str) -> None:
    ROWS.setdefault(title, Row()).remarks[text] = None


@pytest.fixture(scope="module", autouse=True)
def table() -> Any:
    """Print what was found, in Markdown; pytest shows it with ``-s``."""
    yield
    print("\n\n| exporter | sizes in 1-D, 2-D, 3-D | largest error, of the bound | programs | |")
    print("| --- | --- | --- | --- | --- |")
    for title, row in ROWS.items():
        ranks = Counter(len(size) - 1 for size in row.sizes)
        sizes = ", ".join(str(ranks[rank] or "-") for rank in CASES)
        remarks = "; ".join(row.remarks)
        print(f"| {title} | {sizes} | {row.error:.2f} | {row.programs} | {remarks} |")


def hold(title: str, cases: dict[str, Case], run: Any, sizes: Any = SIZES) -> None:
    """Whether a program that has all the cases in it is right at each of the sizes."""
    ROWS.setdefault(title, Row()).programs += 1
    (rank,) = {case.rank for case in cases.values()}
    for size in sizes:
        x = inputs(rank, size)
        for (name, case), y in zip(cases.items(), run(x), strict=True):
            error = case.expected(x)["y"].error(np.asarray(y))
            assert note(title, (size[0], *size[-rank:]), error) <= 1, (name, x.shape)


# --- PyTorch --------------------------------------------------------------------------------------


@pytest.fixture
def torch() -> Any:
    found = pytest.importorskip("torch")
    found.compiler.reset()
    yield found
    found.compiler.reset()


def torch_model(torch: Any, modules: Any) -> Any:
    """A module that returns what each of the modules makes of the same input."""

    class All(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.each = torch.nn.ModuleList(modules)

        def forward(self, x: Any) -> Any:
            return tuple(module(x) for module in self.each)

    return All().eval()


def torch_open(torch: Any, axes: Any) -> Any:
    if not hasattr(torch.export.Dim, "DYNAMIC"):
        pytest.skip("the exporter of this torch must be told how sizes depend on each other")
    return (dict.fromkeys(axes, torch.export.Dim.DYNAMIC),)


def torch_export(torch: Any, model: Any, x: Any, axes: Any, *, strict: bool) -> Any:
    unknown = torch_open(torch, axes)
    return torch.export.export(model, (x,), dynamic_shapes=unknown, strict=strict).module()


def torch_fx(torch: Any, model: Any, x: Any, axes: Any) -> Any:
    if not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("torch.fx of this torch traces no range of unknown length")
    return torch.fx.symbolic_trace(model)


def torch_make_fx(torch: Any, model: Any, x: Any, mode: str) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    parameters = dict(model.named_parameters())

    def call(parameters: Any, x: Any) -> Any:
        return torch.func.functional_call(model, parameters, (x,))

    return partial(make_fx(call, tracing_mode=mode)(parameters, x), parameters)


def onnx_program(
    torch: Any, model: Any, x: Any, axes: Any, *, dynamo: bool, folder: Any, outputs: int
) -> Any:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")
    path, names = str(folder / "model.onnx"), {axis: f"axis{axis}" for axis in axes}
    options = {"input_names": ["x"], "output_names": [f"y{i}" for i in range(outputs)]}
    if dynamo:
        torch.onnx.export(
            model, (x,), path, dynamo=True, dynamic_shapes=(names,), verbose=False, **options
        )
    else:
        torch.onnx.export(model, (x,), path, dynamo=False, dynamic_axes={"x": names}, **options)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})


def has_compiler() -> bool:
    return any(map(shutil.which, ("c++", "g++", "clang++")))


def torch_aoti(torch: Any, model: Any, x: Any, axes: Any, *, folder: Any) -> Any:
    if not hasattr(torch._inductor, "aoti_load_package"):
        pytest.skip("this torch compiles no packages ahead of time")
    if not has_compiler():
        pytest.skip("there is no C++ compiler")
    program = torch.export.export(model, (x,), dynamic_shapes=torch_open(torch, axes))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    return torch._inductor.aoti_load_package(path)


def run_torch(torch: Any, call: Any) -> Any:
    """The call as a function of arrays."""

    def run(x: Any) -> list[Any]:
        with torch.no_grad():
            found = call(torch.tensor(x))
        return [y if isinstance(y, np.ndarray) else y.numpy() for y in found]

    return run


TORCH = {
    "torch.export, strict": (partial(torch_export, strict=True), FROM_TWO),
    "torch.export, not strict": (partial(torch_export, strict=False), FROM_TWO),
    "torch.jit.trace": (lambda torch, model, x, axes: torch.jit.trace(model, (x,)), SIZES),
    "torch.fx.symbolic_trace": (torch_fx, SIZES),
}


@pytest.mark.parametrize("rank", CASES)
@pytest.mark.parametrize("title", TORCH)
def test_torch_program(torch, title, rank):
    model = torch_model(torch, [case.module("torch") for case in CASES[rank].values()])
    x = torch.tensor(inputs(rank, SIZES[0]))
    export, sizes = TORCH[title]
    call = export(torch, model, x, (0, *range(2, rank + 2)))
    hold(title, CASES[rank], run_torch(torch, call), sizes)


@pytest.mark.parametrize("rank", CASES)
def test_make_fx(torch, rank):
    """Layer by layer: it takes lengths of several kernels that are equal for one unknown."""
    for name, case in CASES[rank].items():
        model, x = torch_model(torch, [case.module("torch")]), torch.tensor(inputs(rank, SIZES[0]))
        call = torch_make_fx(torch, model, x, "symbolic")
        hold("make_fx, symbolic", {name: case}, run_torch(torch, call))


def test_make_fx_of_a_real_size_takes_no_other(torch):
    """A trace of values has that size in it: another is refused, and not computed wrongly."""
    title = "make_fx, real"
    for name, case in CASES[2].items():
        model, x = torch_model(torch, [case.module("torch")]), torch.tensor(inputs(2, SIZES[0]))
        call = torch_make_fx(torch, model, x, "real")
        hold(title, {name: case}, run_torch(torch, call), SIZES[:1])
        for size in SIZES[1:]:
            with pytest.raises(RuntimeError):
                run_torch(torch, call)(inputs(2, size))
    remark(title, "a trace of one size: a RuntimeError at every other")


@pytest.mark.parametrize("strict", [True, False])
def test_torch_export_of_a_known_size(torch, strict):
    """Nothing asks for a size, or is in float64: coordinates are made of literal lengths."""
    if not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("torch 2.4 counts in integers, and makes no graph for dynamic=True")
    model = torch_model(torch, [case.module("torch") for case in CASES[2].values()])
    x = torch.tensor(inputs(2, SIZES[0]))
    program = torch.export.export(model, (x,), strict=strict).run_decompositions()
    values = [node.meta["val"] for node in program.graph.nodes if "val" in node.meta]
    assert all(isinstance(value, torch.Tensor | None) for value in values)
    assert {value.dtype for value in values if value is not None} == {torch.float32}
    assert "linspace" not in program.graph_module.code


def test_torch_export_takes_an_axis_for_longer_than_one(torch):
    """As it says of its ranges, of a convolution, too: where that matters, it refuses the axis."""
    case, plain = CASES[2]["groups and stride"], torch.nn.Conv2d(IN, OUT, 3, 2, 1, groups=2)
    for layer in (case.module("torch"), plain):
        x = torch.tensor(inputs(2, SIZES[0]))
        program = torch.export.export(layer, (x,), dynamic_shapes=torch_open(torch, (0, 2, 3)))
        lowest = {int(constraint.lower) for constraint in program.range_constraints.values()}
        assert lowest == {2}
        with pytest.raises(AssertionError, match="Guard failed"):
            program.module()(torch.tensor(inputs(2, (4, 1, 7))))
    for title in ("torch.export, strict", "torch.export, not strict", "AOTInductor package"):
        remark(title, "two samples of an axis at least, as of a convolution")


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(torch, dynamo, tmp_path):
    cases, axes = CASES[2], (0, 2, 3)
    model = torch_model(torch, [case.module("torch") for case in cases.values()])
    x = torch.tensor(inputs(2, SIZES[0]))
    options = {"dynamo": dynamo, "folder": tmp_path, "outputs": len(cases)}
    call = onnx_program(torch, model, x, axes, **options)
    hold(f"torch.onnx.export, dynamo={dynamo}", cases, run_torch(torch, call))


def test_aot_inductor(torch, tmp_path):
    cases = {name: CASES[2][name] for name in FEW}
    model = torch_model(torch, [case.module("torch") for case in cases.values()])
    x = torch.tensor(inputs(2, SIZES[0]))
    call = torch_aoti(torch, model, x, (0, 2, 3), folder=tmp_path)
    hold("AOTInductor package", cases, run_torch(torch, call), FROM_TWO)


def test_torch_compile_to_reduce_overhead(torch):
    if not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("torch 2.4 counts in integers, and makes no graph for dynamic=True")
    if not has_compiler():
        pytest.skip("there is no C++ compiler")
    title, cases = "torch.compile, reduce-overhead", {name: CASES[2][name] for name in FEW}
    model = torch_model(torch, [case.module("torch") for case in cases.values()])
    call = torch.compile(model, fullgraph=True, dynamic=True, mode="reduce-overhead")
    hold(title, cases, run_torch(torch, call), TWENTY[:5])
    remark(title, "on a CPU, where there are no CUDA graphs")


# Batch, height and width. Of a length of one torch makes a graph of its own, of a convolution too.
TWENTY = [(2 + i % 5, 7 + 7 * i % 13, 8 + 11 * i % 17) for i in range(20)]
ONES = [(1, 9, 12), (6, 1, 7), (6, 7, 1), (1, 1, 1)]


def counted(torch: Any, model: Any, **options: Any) -> tuple[Any, list[Any]]:
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return torch.compile(model, fullgraph=True, backend=count, **options), graphs


def trained(torch: Any, model: Any, cases: dict[str, Case], size: tuple[int, ...]) -> list[float]:
    """The largest error of each case's output and of all its gradients."""
    x = torch.tensor(inputs(2, size), requires_grad=True)
    errors = []
    for case, layer, y in zip(cases.values(), model.each, model(x), strict=True):
        dy = torch.tensor(normal(*y.shape, seed=1))
        parameters = dict(layer.named_parameters())
        found = torch.autograd.grad(y, [x, *parameters.values()], dy)
        if case.geometry is None:  # whose gradient is the output's, of the features
            assert torch.equal(found[0], dy[:, :IN])
            errors.append(case.expected(x.detach().numpy())["y"].error(y.detach().numpy()))
            continue
        names = ["y", "x", *parameters]
        wanted = case.expected(x.detach().numpy(), dy.numpy())
        arrays = dict(zip(names, (y.detach(), *found), strict=True))
        errors.append(max(wanted[name].error(array.numpy()) for name, array in arrays.items()))
    return errors


def inferred(torch: Any, model: Any, cases: dict[str, Case], size: tuple[int, ...]) -> list[float]:
    x = inputs(2, size)
    with torch.no_grad():
        found = [y.numpy() for y in model(torch.tensor(x))]
    return [case.expected(x)["y"].error(y) for case, y in zip(cases.values(), found, strict=True)]


STEPS = {"training": trained, "inference": inferred}


@pytest.mark.parametrize("step", STEPS)
def test_torch_compiles_no_graph_after_the_second_size(torch, step):
    """Of all the layers in one model, of which any would make the compiler begin anew."""
    cases, title = CASES[2], f"torch.compile, {step}"
    model = torch_model(torch, [case.module("torch") for case in cases.values()])
    call, graphs = counted(torch, model)
    for i, size in enumerate(TWENTY + ONES):
        for name, error in zip(cases, STEPS[step](torch, call, cases, size), strict=True):
            assert note(title, size, error) <= 1, (name, size)
        if size in TWENTY:
            assert len(graphs) <= min(i + 1, 2), size
            ROWS[title].programs = len(graphs)
    remark(title, "graphs of a model for all of them")
    assert len(graphs) <= graphs_of_plain(step == "training")


@cache
def graphs_of_plain(training: bool) -> int:
    """How many graphs a convolution has of all the sizes."""
    import torch

    torch.compiler.reset()
    call, graphs = counted(torch, torch.nn.Conv2d(IN, OUT, 3, padding=1))
    for size in TWENTY + ONES:
        call(torch.tensor(inputs(2, size), requires_grad=training))
    return len(graphs)


@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic"])
def test_torch_compiles_one_graph_if_told(torch, how):
    """``mark_dynamic`` is an error where a graph has one of the sizes in it."""
    if not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("torch 2.4 counts in integers, and makes no graph for dynamic=True")
    cases, title = CASES[2], f"torch.compile, {how}"
    model = torch_model(torch, [case.module("torch") for case in cases.values()])
    options = {"dynamic": True} if how == "dynamic=True" else {}
    call, graphs = counted(torch, model, **options)

    def run(x: Any) -> Any:
        x = torch.tensor(x)
        if how == "mark_dynamic":
            for axis in (0, 2, 3):
                torch._dynamo.mark_dynamic(x, axis)
        return [y.detach().numpy() for y in call(x)]

    hold(title, cases, run, TWENTY)
    assert len(graphs) == 1


# --- Paddle ---------------------------------------------------------------------------------------


@pytest.fixture
def paddle() -> Any:
    return pytest.importorskip("paddle")


def paddle_model(paddle: Any, modules: Any) -> Any:
    class All(paddle.nn.Layer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.each = paddle.nn.LayerList(modules)

        def forward(self, x: Any) -> Any:
            return [module(x) for module in self.each]

    model = All()
    model.eval()
    return model


def paddle_saved(paddle: Any, model: Any, path: Any, shape: Any) -> str:
    paddle.jit.save(model, str(path), [paddle.static.InputSpec(shape, "float32", "x")])
    return str(path)


def paddle_load(paddle: Any, path: str) -> Any:
    program = paddle.jit.load(path)
    return lambda x: [y.numpy() for y in listed(program(paddle.to_tensor(x)))]


def listed(found: Any) -> Any:
    return found if isinstance(found, list | tuple) else [found]


def paddle_inference(paddle: Any, path: str) -> Any:
    from paddle import inference

    config = inference.Config(f"{path}.json", f"{path}.pdiparams")
    config.disable_gpu()
    config.disable_glog_info()
    predictor = inference.create_predictor(config)

    def run(x: Any) -> Any:
        given = predictor.get_input_handle(predictor.get_input_names()[0])
        given.reshape(x.shape)
        given.copy_from_cpu(x)
        predictor.run()
        names = predictor.get_output_names()
        return [predictor.get_output_handle(name).copy_to_cpu() for name in names]

    return run


def paddle_static(paddle: Any, path: str) -> Any:
    def run(x: Any) -> Any:
        paddle.enable_static()
        try:
            with paddle.static.scope_guard(paddle.static.Scope()):
                executor = paddle.static.Executor(paddle.CPUPlace())
                program, fed, fetched = paddle.static.load_inference_model(path, executor)
                return executor.run(program, feed={fed[0]: x}, fetch_list=fetched)
        finally:
            paddle.disable_static()

    return run


PADDLE = {
    "paddle.jit.save and load": paddle_load,
    "paddle.inference": paddle_inference,
    "paddle.static.Executor": paddle_static,
}


@pytest.mark.parametrize("rank", CASES)
def test_paddle_program(paddle, rank, tmp_path):
    model = paddle_model(paddle, [case.module("paddle") for case in CASES[rank].values()])
    path = paddle_saved(paddle, model, tmp_path / "model", [None, IN, *[None] * rank])
    for title, load in PADDLE.items():
        hold(title, CASES[rank], load(paddle, path))
    remark("paddle.inference", "it loads no program without parameters, as of AddCoords alone")


@pytest.mark.parametrize("coord_init", ["fan_in", "zeros"])
def test_paddle_lazily_made(paddle, coord_init, tmp_path):
    """Exported as a layer is that was made at once."""
    load, geometry = backends.load("paddle"), ConvGeometry((3, 3), padding=1)
    with paddle.LazyGuard():
        layer = load.CoordConv2D(IN, OUT, 3, padding=1, coord_init=coord_init)
    for parameter in layer.parameters():
        parameter.initialize()
    case = Case(geometry, layer.coords, 2)
    weights = {f"conv.{name}": array for name, array in layer.export_weights().items()}
    path = paddle_saved(paddle, layer, tmp_path / "model", [None, IN, None, None])
    for title, loaded in PADDLE.items():
        run = loaded(paddle, path)
        for size in SIZES:
            x = inputs(2, size)
            error = expected(case.network, weights, x, None)["y"].error(run(x)[0])
            assert note(title, (size[0], *size[-2:]), error) <= 1


@pytest.mark.parametrize("coords", ["xy", "xyr", Coordinates("xyr", outside="extend")], ids=repr)
@pytest.mark.parametrize("add", [False, True], ids=["CoordConv2D", "AddCoords"])
def test_paddle_program_has_no_grid_in_it(paddle, coords, add, tmp_path):
    """Paddle keeps constants as text: of a grid of 608x608 samples megabytes of it."""
    load, sizes = backends.load("paddle"), {}
    layers = {"plain": paddle.nn.Conv2D(3, 8, 3, padding=1)}
    layers["ours"] = (
        load.AddCoords(coords) if add else load.CoordConv2D(3, 8, 3, padding=1, coords=coords)
    )
    for name, layer in layers.items():
        path = paddle_saved(paddle, layer, tmp_path / name, [None, 3, 608, 608])
        sizes[name] = (tmp_path / f"{name}.json").stat().st_size
    assert sizes["plain"] < 5_000
    assert sizes["ours"] < sizes["plain"] + 20_000
    program = paddle.jit.load(path).program()
    found = Counter(op.name().removeprefix("pd_op.") for op in program.global_block().ops)
    # The ramps are made of their literal lengths; nothing asks for a shape, or is in float64.
    assert not found.keys() & {"shape", "shape64", "cast", "linspace", "meshgrid", "floor_divide"}
    assert found["arange"] == 2
    assert "f64" not in str(program)


@pytest.mark.parametrize("rank", CASES)
def test_paddle_has_no_float64_at_open_sizes(paddle, rank, tmp_path):
    model = paddle_model(paddle, [case.module("paddle") for case in CASES[rank].values()])
    path = paddle_saved(paddle, model, tmp_path / "model", [None, IN, *[None] * rank])
    program = paddle.jit.load(path).program()
    assert "f32" in str(program)
    assert "f64" not in str(program)


def test_paddle2onnx(paddle, tmp_path):
    converter, onnx = pytest.importorskip("paddle2onnx"), pytest.importorskip("onnx")
    runtime, cases = pytest.importorskip("onnxruntime"), CASES[2]
    model = paddle_model(paddle, [case.module("paddle") for case in cases.values()])
    path = paddle_saved(paddle, model, tmp_path / "model", [None, IN, None, None])
    # Its optimizer would install packages.
    files = f"{path}.json", f"{path}.pdiparams", f"{path}.onnx"
    converter.export(*files, opset_version=17, optimize_tool="None")
    doubles = [t.name for t in onnx.load(files[-1]).graph.initializer if t.data_type == 11]
    assert not doubles
    session = runtime.InferenceSession(files[-1], providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    hold("paddle2onnx", cases, lambda x: session.run(None, {name: x}))


# --- JAX ------------------------------------------------------------------------------------------


@pytest.fixture
def jax() -> Any:
    pytest.importorskip("flax")
    import jax.export

    return jax


def jax_call(backend: str, case: Case) -> Any:
    """The case as a function of ``x (N, *S, C)``."""
    module = case.module(backend)
    if backend == "flax":
        return module
    weights = networks.initial_weights(case.network) if case.geometry else None
    variables = module.import_weights(weights) if weights else {}
    return partial(module.apply, variables)


def jax_exported(jax: Any, call: Any, shape: str) -> Any:
    """Exported with an open shape, written and read again."""
    pytest.importorskip("flatbuffers")  # with which jax.export writes programs
    spec = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), np.float32)
    return jax.export.deserialize(jax.export.export(jax.jit(call))(spec).serialize())


def run_jax(call: Any) -> Any:
    return lambda x: [channels_first(y) for y in call(channels_last(x))]


@pytest.mark.parametrize("rank", CASES)
@pytest.mark.parametrize("backend", ["flax", "linen"])
def test_jax_export(jax, backend, rank):
    calls = [jax_call(backend, case) for case in CASES[rank].values()]
    shape = ", ".join(("b", *"dhw"[-rank:], str(IN)))
    exported = jax_exported(jax, lambda x: tuple(call(x) for call in calls), shape)
    assert "f32" in exported.mlir_module()
    assert "f64" not in exported.mlir_module()
    hold(f"jax.export, {backend}", CASES[rank], run_jax(exported.call))


@pytest.mark.parametrize("backend", ["flax", "linen"])
def test_jax_of_a_known_size_makes_no_coordinates(jax, backend):
    """They are constants: nothing counts, converts or computes with integers."""
    for name, case in CASES[2].items():
        call = jax_call(backend, case)
        spec = jax.ShapeDtypeStruct((2, 16, 20, IN), np.float32)
        text = jax.export.export(jax.jit(call))(spec).mlir_module()
        for forbidden in ("iota", "f64", "stablehlo.sqrt", "stablehlo.convert", "tensor<i32>"):
            assert forbidden not in text, (name, forbidden)


@pytest.mark.parametrize("backend", ["flax", "linen"])
def test_jax_jit_traces_each_size_once(jax, backend):
    title, cases, traces = f"jax.jit, {backend}", {n: CASES[2][n] for n in FEW}, []
    calls = [jax_call(backend, case) for case in cases.values()]

    @jax.jit
    def compiled(x: Any) -> Any:
        traces.append(x.shape)
        return tuple(call(x) for call in calls)

    for _ in range(2):
        hold(title, cases, run_jax(compiled))
    assert len(traces) == len(set(traces)) == len(SIZES)
    ROWS[title].programs = len(traces)
    remark(title, "one for each size, as of any function")


@pytest.mark.parametrize("backend", ["flax", "linen"])
def test_jax_keeps_no_more_than_a_grid(jax, backend):
    """Of a large map, beside what the compiler keeps of any function."""
    call = jax_call(backend, CASES[2]["radius"])
    x = jax.numpy.zeros((1, 500, 608, IN))
    position_bias.known.cache_clear()
    before = sum(array.nbytes for array in jax.live_arrays())
    tracemalloc.start()
    try:
        jax.jit(call)(x).block_until_ready()
        ours = tracemalloc.Filter(True, str(Path(position_bias.__file__).parent / "*"))
        kept = tracemalloc.take_snapshot().filter_traces([ours]).statistics("filename")
    finally:
        tracemalloc.stop()
    assert sum(each.size for each in kept) < 1.1 * 3 * 4 * 502 * 610  # padded, in float32
    on_device = sum(array.nbytes for array in jax.live_arrays()) - before
    assert on_device < 10_000  # the parameters as constants of the function, and no coordinates


# --- networks, by everything that deploys them ----------------------------------------------------


def network_by_torch(network: Network, weights: Any, folder: Any, export: Any) -> Any:
    torch = pytest.importorskip("torch")
    torch.compiler.reset()
    model = torch_model(torch, [backends.load("torch").build(network, weights)])
    x = torch.zeros(2, *network.input_shape)
    run = run_torch(torch, export(torch, model, x, (0,), folder))
    return lambda x: run(x)[0]


def network_by_paddle(network: Network, weights: Any, folder: Any) -> Any:
    paddle = pytest.importorskip("paddle")
    model = backends.load("paddle").build(network, weights)
    model.eval()
    path = paddle_saved(paddle, model, folder / "model", [None, *network.input_shape])
    run = paddle_inference(paddle, path)
    return lambda x: run(x)[0]


def network_by_jax(network: Network, weights: Any, folder: Any) -> Any:
    pytest.importorskip("flax")
    import jax.export

    channels, *spatial = network.input_shape
    shape = ", ".join(map(str, ("b", *spatial, channels)))
    exported = jax_exported(jax, backends.load("flax").build(network, weights), shape)
    return lambda x: np.asarray(exported.call(channels_last(x)))


DEPLOYED = {
    "torch.export, not strict": partial(
        network_by_torch,
        export=lambda torch, model, x, axes, folder: torch_export(
            torch, model, x, axes, strict=False
        ),
    ),
    "torch.onnx.export, dynamo=True": partial(
        network_by_torch,
        export=lambda torch, model, x, axes, folder: onnx_program(
            torch, model, x, axes, dynamo=True, folder=folder, outputs=1
        ),
    ),
    "AOTInductor package": partial(
        network_by_torch,
        export=lambda torch, model, x, axes, folder: torch_aoti(
            torch, model, x, axes, folder=folder
        ),
    ),
    "paddle.inference": network_by_paddle,
    "jax.export, flax": network_by_jax,
}
SLOW = "AOTInductor package"  # which is given the classifier alone


@pytest.mark.parametrize("name", networks.NETWORKS)
@pytest.mark.parametrize("title", [title for title in DEPLOYED if title != SLOW])
def test_network(title, name, tmp_path):
    """Within the bound, which grows with every layer, and within what rounding makes likely."""
    network = networks.get(name)
    weights = networks.initial_weights(network)
    run = DEPLOYED[title](network, weights, tmp_path)
    longest = longest_axis(shape for _, *shapes in network.shapes() for shape in shapes)
    for batch in (1, 3):
        x = normal(batch, *network.input_shape)
        y, wanted = run(x), expected(network, weights, x, None)["y"]
        assert wanted.error(y) <= 1
        likely = likely_error(wanted.value, len(network.layers), longest, FLOAT32.unit)
        assert np.abs(y - wanted.value).max() <= likely


CANVAS = 64
POINTWISE, WIDE = ConvGeometry((1, 1)), 16
CLASSIFIER = Network(
    "classifier",
    (2, CANVAS, CANVAS),
    (
        Conv("conv1", 2, WIDE, POINTWISE, Coordinates()),
        ReLU(),
        Conv("conv2", WIDE, WIDE, POINTWISE),
        ReLU(),
        Conv("conv3", WIDE, WIDE, POINTWISE),
        ReLU(),
        Conv("conv4", WIDE, 1, POINTWISE),
        Flatten(),
    ),
)


@pytest.fixture(scope="module")
def positions() -> Any:
    """The task of ``coordconv demo``: the centre of a square as two numbers, and its pixel."""
    centres = np.arange(4, CANVAS - 4)
    rows, columns = (index.ravel() for index in np.meshgrid(centres, centres, indexing="ij"))
    return coordinate_grid((CANVAS, CANVAS))[:, rows, columns].T, rows * CANVAS + columns


def canvases(centres: Any) -> Any:
    return np.tile(centres[..., None, None], (1, 1, CANVAS, CANVAS))


@pytest.fixture(scope="module")
def classifier(positions) -> Any:
    """The weights of a small network, trained in whichever framework there is."""
    if not available_backends():
        pytest.skip("no framework is installed")
    load, weights = backends.load(available_backends()[0]), networks.initial_weights(CLASSIFIER)
    step, export = load.trainer(load.build(CLASSIFIER, weights), weights)
    (centres, labels), rng, steps = positions, np.random.default_rng(0), 300
    for i in range(steps):
        batch = rng.choice(len(labels), 8, replace=False)
        step(canvases(centres[batch]), labels[batch], 0.01 * (1 - i / steps))
    return export()


@pytest.mark.parametrize("title", DEPLOYED)
def test_trained_classifier(title, classifier, positions, tmp_path):
    """It names every pixel wherever it runs."""
    (centres, labels), run = positions, DEPLOYED[title](CLASSIFIER, classifier, tmp_path)
    found = [run(canvases(each)).argmax(axis=1) for each in np.split(centres, 28)]
    assert (np.concatenate(found) == labels).sum() == len(labels) == 3136
    remark(title, "a trained classifier right at 3,136 of 3,136 positions")
