"""What is special to torch: its compilers and tracers, its transformations, its habits."""

from __future__ import annotations

import copy
import inspect
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from harness import WAYS
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize

from coordconv import Coordinates, coordinate_grid, position_bias
from coordconv.backends import torch as backend
from coordconv.backends.torch import (
    AddCoords,
    CoordConv1d,
    CoordConv2d,
    CoordConvTranspose2d,
    adding,
)
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Network
from coordconv.parity.bounds import PRECISIONS, expected
from coordconv.position_bias import MapPlan
from coordconv.weights import Weights, split_kernel

LAYERS = [f"CoordConv{transpose}{rank}d" for transpose in ("", "Transpose") for rank in (1, 2, 3)]


@pytest.fixture(params=LAYERS)
def name(request):
    return request.param


AXIS_BY_AXIS = "map axis by axis"


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Each way in turn, wherever both are right."""
    forced = request.param
    if forced == AXIS_BY_AXIS:  # as large maps are made
        monkeypatch.setattr(position_bias, "MANY_PRODUCTS", 0)
        forced = position_bias.MAP
    monkeypatch.setattr(position_bias, "FORCED", forced)
    return request.param


def integers(*shape, largest=4):
    return torch.randint(-largest, largest + 1, shape).float()


def fill(layer, largest=4):
    """Small integers for all parameters; and the layer."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(integers(*parameter.shape, largest=largest))
    return layer


def make(name, *arguments, **options):
    """A layer by name, and a batch for it with axes of different lengths."""
    layer = getattr(backend, name)(*arguments, **options)
    return layer, torch.randn(2, 4, *(5, 4, 3)[: layer.rank])


def exact(name, coords=None, largest=4, **options):
    """A layer, a batch and a gradient of the output on which no sum is ever rounded.

    All values are integers, the coordinates of axes of two and three samples too; where only one
    axis is longer than one sample, so is the radius. With ``largest=1`` every sum of absolute
    terms is below 256: exact in bfloat16, too.
    """
    torch.manual_seed(2)
    options = {"padding": 1, **options}
    layer = fill(getattr(backend, name)(4, 6, 3, coords=coords, **options), largest)
    shape = (1, 1, 3) if "r" in layer.coords.channels else (3, 2, 3)
    x = integers(2, 4, *shape[-layer.rank :], largest=largest)
    return layer, x, integers(*layer(x).shape, largest=largest)


def with_gradients(layer, x, dy):
    """Output and gradients by name."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    tensors = {"x": x, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(y, list(tensors.values()), dy)
    return {"y": y.detach(), **dict(zip(tensors, gradients, strict=True))}


def same(found, wanted):
    """Whether tensors by name have the same values, whatever their types."""
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name].double(), wanted[name].double()) for name in wanted
    )


def concatenated(layer, x):
    """The definition in torch itself: what the layer's kernel convolves is concatenated."""
    kind = getattr(nn, type(layer).__name__.removeprefix("Coord"))
    plain = kind(
        layer.in_channels + layer.groups * len(layer.coords),
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        dtype=layer.weight.dtype,
    )
    plain.load_state_dict(layer.state_dict())
    add = AddCoords(layer.coords, rank=layer.rank)
    return plain(torch.cat([add(part) for part in x.chunk(layer.groups, 1)], 1))


# --- compilers, exporters and tracers ------------------------------------------------------------


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize("coords", [None, "rx"])
    def test_in_one_graph_as_eager(self, name, coords, way):
        layer, x, dy = exact(name, coords)
        wanted = with_gradients(layer, x, dy)
        layer.compile(fullgraph=True, backend="aot_eager")
        assert same(with_gradients(layer, x, dy), wanted)

    @pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
    def test_in_inference_as_eager(self, name, way, mode):
        layer, x, _ = exact(name)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        with getattr(torch, mode)():
            assert torch.equal(compiled(x), layer(x))

    @pytest.mark.parametrize(
        ("name", "way"), [("CoordConv2d", "append"), ("CoordConvTranspose2d", "map")], indirect=True
    )
    def test_by_the_default_compiler_as_eager(self, name, way):
        """A few: it takes seconds for each."""
        layer, x, dy = exact(name)
        block = nn.Sequential(layer, nn.ReLU())
        wanted = with_gradients(block, x, dy)
        block.compile(fullgraph=True)
        assert same(with_gradients(block, x, dy), wanted)
        with torch.inference_mode():
            assert torch.equal(block(x), wanted["y"])

    def test_extension_and_16_bits(self):
        for options in ({"coords": Coordinates("yx", outside="extend")}, {"dtype": torch.bfloat16}):
            layer = fill(CoordConv2d(2, 3, 3, padding=1, **options), largest=1)
            x = integers(2, 2, 3, 2, largest=1).to(layer.weight.dtype)
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(x), layer(x))

    @pytest.mark.parametrize("coords", ["xy", Coordinates("xy", outside="extend")], ids=repr)
    @pytest.mark.parametrize("dynamic", [None, True])
    def test_another_size_compiles_nothing_anew(self, dynamic, way, coords):
        layer = fill(CoordConv2d(2, 3, 3, padding=1, coords=coords))
        graphs = []

        def count(graph, inputs):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=count)
        for x in (integers(2, 2, 3, 5), integers(3, 2, 9, 2)):  # what differs becomes dynamic
            assert torch.equal(compiled(x), layer(x))
        before = len(graphs)
        for x in (integers(4, 2, 5, 3), integers(5, 2, 17, 9), integers(9, 2, 2, 33)):
            assert torch.equal(compiled(x), layer(x))
        assert len(graphs) == before <= 2

    def test_a_size_that_is_known_decides(self):
        """As in eager mode; the one graph of all other sizes is made for a usual one."""
        layer, ways = fill(CoordConv2d(16, 16, 3, padding=1)), []

        def note(graph, inputs):
            appends = any("cat" in str(node.target) for node in graph.graph.nodes)
            ways.append(position_bias.APPEND if appends else position_bias.MAP)
            return graph.forward

        compiled = torch.compile(layer, fullgraph=True, backend=note)
        small, large, smaller = (integers(2, 16, n, n) for n in (9, 33, 5))
        for x in (small, large, smaller):
            assert torch.equal(compiled(x), layer(x))
        given = layer.in_channels, layer.out_channels, False
        eager = adding.choose(ConvGeometry((3, 3), padding=1), layer.coords, small, *given)
        assert eager == position_bias.APPEND
        told = eager if torch.__version__ >= "2.8" else position_bias.MAP  # else it does not tell
        assert ways == [told, position_bias.MAP]

    def test_new_weights_count(self, way):
        layer = CoordConv2d(2, 3, 3)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = integers(1, 2, 5, 5)
        compiled(x)
        fill(layer)
        assert torch.equal(compiled(x), layer(x))

    def test_output_size(self, way):
        layer = fill(CoordConvTranspose2d(2, 3, 3, stride=2))
        x = integers(1, 2, 3, 2)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, [8, 5]), layer(x, [8, 5]))


def dynamic(*axes):
    """These axes as unknown to an exporter; torch 2.4 has no word for that, and asks for names."""
    unknown = getattr(torch.export.Dim, "DYNAMIC", None)
    return {axis: unknown or torch.export.Dim(f"axis{axis}", min=3 * (axis > 0)) for axis in axes}


needs_unknown_sizes = pytest.mark.skipif(
    not hasattr(torch.export.Dim, "DYNAMIC"),
    reason="the exporter of this torch must be told how sizes depend on each other",
)
needs_ranges = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"),
    reason="torch.fx of this torch traces no range of unknown length",
)


class TestExport:
    @needs_unknown_sizes
    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("gradients", [True, False])
    def test_with_any_batch_height_and_width(self, way, strict, gradients):
        for layer in (
            CoordConv2d(3, 4, 3, padding=1, coords="xyr"),
            CoordConv2d(4, 4, 3, stride=2, groups=2),
            CoordConvTranspose2d(3, 4, 3, stride=2, padding=1),
        ):
            fill(layer)
            with torch.set_grad_enabled(gradients):
                program = torch.export.export(
                    layer,
                    (integers(3, layer.in_channels, 9, 5),),
                    dynamic_shapes={"input": dynamic(0, 2, 3)},
                    strict=strict,
                )
                for shape in ((1, 9, 5), (2, 5, 9), (5, 17, 33)):
                    x = integers(shape[0], layer.in_channels, *shape[1:])
                    found, wanted = program.module()(x), layer(x)
                    if "r" in layer.coords.channels:  # whose squares are not exact
                        assert (found - wanted).abs().max() <= 2**-20 * wanted.abs().max()
                    else:
                        assert torch.equal(found, wanted)

    @needs_unknown_sizes
    @pytest.mark.parametrize(
        "options",
        [
            {"coords": Coordinates("yx", outside="extend")},
            {"padding_mode": "reflect"},
            {"padding_mode": "circular"},
            {"padding_mode": "replicate"},
            {"padding": "same", "dilation": 2},
            {"padding": "valid"},
            {"dtype": torch.bfloat16},
        ],
        ids=str,
    )
    def test_options(self, way, options):
        layer = fill(CoordConv2d(2, 3, 3, **{"padding": 1, **options}), largest=1)
        program = torch.export.export(
            layer,
            (integers(3, 2, 9, 5, largest=1).to(layer.weight.dtype),),
            dynamic_shapes={"input": dynamic(0, 2, 3)},
        )
        x = integers(2, 2, 5, 17, largest=1).to(layer.weight.dtype)
        assert torch.equal(program.module()(x), layer(x))

    @needs_unknown_sizes
    @pytest.mark.parametrize("rank", [1, 3])
    @pytest.mark.parametrize("transposed", ["", "Transpose"])
    def test_other_ranks(self, way, rank, transposed):
        layer = fill(getattr(backend, f"CoordConv{transposed}{rank}d")(2, 3, 3))
        axes = dynamic(0, *range(2, rank + 2))
        x = integers(3, 2, *(9, 5, 5)[:rank])
        program = torch.export.export(layer, (x,), dynamic_shapes={"input": axes})
        for shape in ((2, 2, 5, 9, 5), (1, 2, 17, 5, 9)):
            x = integers(*shape[: rank + 2])
            assert torch.equal(program.module()(x), layer(x))

    def test_a_saved_program(self, way, tmp_path):
        layer, x = fill(CoordConv2d(2, 3, 3)), integers(1, 2, 5, 9)
        torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
        assert torch.equal(torch.export.load(tmp_path / "layer.pt2").module()(x), layer(x))


class TestTracers:
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_jit_trace_at_another_size(self, name, way):
        layer, x, _ = exact(name)
        traced = torch.jit.trace(layer, (x,))
        for shape in ((1, 4, 5, 3, 2), (3, 4, 2, 9, 5)):
            x = integers(*shape[: layer.rank + 2])
            assert torch.equal(traced(x), layer(x))

    @needs_ranges
    def test_fx_at_another_size(self, way):
        for layer in (
            CoordConv1d(4, 6, 3, padding=1),
            CoordConv2d(4, 6, 3, padding=1, groups=2),
            CoordConvTranspose2d(4, 6, 3, stride=2),
            CoordConv2d(4, 6, 3, padding=1, coords=Coordinates("xy", outside="extend")),
        ):
            block = nn.Sequential(fill(layer), nn.ReLU())
            traced = torch.fx.symbolic_trace(block)
            for shape in ((1, 4, 5, 3), (3, 4, 2, 9)):
                x = integers(*shape[: layer.rank + 2])
                assert torch.equal(traced(x), block(x))

    @needs_ranges
    def test_fx_in_16_bits(self):
        layer = fill(CoordConv2d(1, 2, 1, dtype=torch.bfloat16), largest=1)
        traced, x = torch.fx.symbolic_trace(layer), torch.zeros(1, 1, 300, 300).bfloat16()
        assert torch.equal(traced(x), layer(x))

    @pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
    def test_make_fx(self, way, mode):
        from torch.fx.experimental.proxy_tensor import make_fx

        layer, _, _ = exact("CoordConv2d")
        parameters = dict(layer.named_parameters())

        def call(parameters, x):
            return torch.func.functional_call(layer, parameters, (x,))

        x = integers(2, 4, 9, 5)  # a size of the kernel would be taken for the kernel's
        graph = make_fx(call, tracing_mode=mode)(parameters, x)
        sizes = [(5, 9), (17, 33)] if mode == "symbolic" else [x.shape[2:]]
        for size in sizes:
            x = integers(2, 4, *size)
            assert torch.equal(graph(parameters, x), layer(x))

    def test_fake_tensors_first_then_eager(self, way):
        from torch._subclasses.fake_tensor import FakeTensorMode

        layer, x, dy = exact("CoordConv2d")
        wanted = with_gradients(layer, x, dy)
        _forget()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            for given in (mode.from_tensor(x), x):
                y = layer(given)
                assert type(y) is type(mode.from_tensor(x))
                assert y.shape == wanted["y"].shape
        assert same(with_gradients(layer, x, dy), wanted)

    def test_a_default_device_first_then_eager(self, way):
        layer, x, dy = exact("CoordConv2d")
        wanted = with_gradients(layer, x, dy)
        _forget()
        with torch.device("meta"):
            layer(x)
        assert same(with_gradients(layer, x, dy), wanted)


def _forget():
    """Empty the caches, which other tests have filled."""
    for each in vars(adding).values():
        if hasattr(each, "cache_clear"):
            each.cache_clear()


# --- transformations and derivatives -------------------------------------------------------------


@pytest.mark.parametrize("way", [*WAYS, AXIS_BY_AXIS], indirect=True)
class TestTransformations:
    @pytest.mark.parametrize("coords", [None, "rx"])
    def test_per_sample_gradients(self, name, coords, way):
        layer, x, dy = exact(name, coords)
        parameters = dict(layer.named_parameters())

        def loss(parameters, x, dy):
            return (torch.func.functional_call(layer, parameters, (x,)) * dy).sum()

        each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, dy)
        for key, gradient in torch.func.grad(loss)(parameters, x, dy).items():
            assert torch.equal(each[key].sum(0), gradient)
            assert each[key].any()

    def test_an_ensemble_under_vmap(self, name, way):
        layer, x, _ = exact(name, "rx")
        states = [{k: integers(*p.shape) for k, p in layer.named_parameters()} for _ in range(3)]
        stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}

        def call(state):
            return torch.func.functional_call(layer, state, (x,))

        for y, state in zip(torch.func.vmap(call)(stacked), states, strict=True):
            assert torch.equal(y, call(state))

    def test_jacobians(self, way):
        """A layer is linear in its input: its Jacobian applied to x is the output without P."""
        layer, x, _ = exact("CoordConv2d")
        constant = layer(torch.zeros_like(x))
        for jacobian in (torch.func.jacrev(layer)(x), torch.func.jacfwd(layer)(x)):
            product = torch.einsum("abcdefgh,efgh->abcd", jacobian, x)
            assert torch.equal(product + constant, layer(x))

    @pytest.mark.parametrize("frozen", [True, False])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_forward_mode(self, name, way, frozen, batch):
        """A layer is linear in input and kernel together: its derivative is a layer's output."""
        layer, x, _ = exact(name)
        x = x[:batch]
        dx, dw = integers(*x.shape), integers(*layer.weight.shape)
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            twin.weight.copy_(dw)
        twin.bias = None
        linear = copy.deepcopy(layer)
        linear.bias = None
        wanted = linear(dx) - linear(torch.zeros_like(dx)) + twin(x)
        layer.requires_grad_(not frozen)
        with forward_ad.dual_level():
            kernel, given = forward_ad.make_dual(layer.weight, dw), forward_ad.make_dual(x, dx)
            y = torch.func.functional_call(layer, {"weight": kernel}, (given,))
            assert torch.equal(forward_ad.unpack_dual(y).tangent, wanted)

    def test_double_backward(self, name, way):
        """The output is linear in the kernel: the curvature of its square is that of a product."""
        layer, x, _ = exact(name)
        direction = integers(*layer.weight.shape)
        (slope,) = torch.autograd.grad(layer(x).square().sum(), [layer.weight], create_graph=True)
        (found,) = torch.autograd.grad((slope * direction).sum(), [layer.weight])
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            twin.weight.copy_(direction)
            twin.bias.zero_()
        wanted = with_gradients(layer, x, 2 * twin(x).detach())["weight"]
        assert torch.equal(found, wanted)

    def test_numerical_derivatives(self, way):
        layer = CoordConv2d(2, 2, 2, padding=1, coords="xyr", dtype=torch.float64)
        x = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)

        def call(x, weight, bias):
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

        inputs = (x, layer.weight, layer.bias)
        assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call, inputs)

    @pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
    def test_first_then_eager(self, way, dtype):
        """No tensor of a transformation is kept for later."""
        layer = fill(CoordConv2d(2, 3, 3, padding=1)).to(dtype)
        x = integers(2, 2, 5, 3).to(dtype)
        wanted = layer(x)
        _forget()
        transformed = (
            torch.func.vmap(layer)(x),
            torch.func.vjp(layer, x)[0],
            torch.func.jvp(layer, (x,), (x,))[0],
            torch.func.functionalize(layer)(x),
        )
        assert all(torch.equal(y, wanted) for y in transformed)
        assert torch.equal(layer(x), wanted)
        for transform in (torch.func.vmap, torch.func.functionalize):
            _forget()
            assert torch.equal(transform(layer)(x), wanted)
            assert torch.equal(layer(x), wanted)
        _forget()
        torch.func.jvp(layer, (x,), (x,))
        assert torch.equal(layer(x), wanted)
        _forget()
        torch.func.vjp(layer, x)
        layer(x).real.sum().backward()
        assert layer.weight.grad.abs().sum() > 0

    def test_inference_mode_first_then_training(self, name, way):
        layer, x, dy = exact(name)
        wanted = with_gradients(layer, x, dy)
        _forget()
        with torch.inference_mode():
            assert torch.equal(layer(x), wanted["y"])
        assert same(with_gradients(layer, x, dy), wanted)

    @pytest.mark.parametrize("frozen", ["weight", "bias"])
    def test_a_frozen_parameter_gets_no_gradient_while_others_do(self, name, way, frozen):
        layer, x = make(name, 4, 6, 3)
        layer.get_parameter(frozen).requires_grad_(False)
        layer(x).square().sum().backward()
        for key, parameter in layer.named_parameters():
            assert (parameter.grad is None) == (key == frozen)
            assert key == frozen or parameter.grad.any()
        layer.requires_grad_(False)
        assert not layer(x).requires_grad


# --- types, devices and memory -------------------------------------------------------------------


class TestTypes:
    @pytest.mark.parametrize("coords", [None, "rx"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_exact_data_are_the_same_in_any(self, name, dtype, coords, way):
        layer, x, dy = exact(name, coords, largest=1)
        twin = copy.deepcopy(layer).to(dtype)
        assert twin(x.to(dtype)).dtype == dtype
        found = with_gradients(twin, x.to(dtype), dy.to(dtype))
        assert same(found, with_gradients(layer, x, dy))

    @pytest.mark.parametrize("coords", [None, "rx"])
    def test_autocast(self, name, coords, way):
        layer, x, dy = exact(name, coords, largest=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        y.backward(dy.bfloat16())
        found = {"y": y.detach()}
        for key, parameter in layer.named_parameters():
            assert parameter.grad.dtype == torch.float32
            found[key] = parameter.grad
        wanted = with_gradients(layer, x, dy)
        del wanted["x"]
        assert same(found, wanted)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_autocast_leaves_the_map_alone(self, way, compiled):
        """The coordinates of 400 samples are no numbers of bfloat16."""
        layer = CoordConv2d(1, 4, 1, bias=False)
        with torch.no_grad():
            layer.weight[:, 0] = 0
        x = torch.zeros(1, 1, 400, 400)
        call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = call(x)
        assert y.dtype == torch.bfloat16
        assert (y.float() - layer(x)).abs().max() <= 2**-8 * layer(x).abs().max()
        spacing = 2.0**-8 * layer(x).abs()
        assert ((y.float() - layer(x)).abs() <= spacing + 1e-6).all()

    def test_autocast_takes_no_part_in_float64(self, way):
        layer = CoordConv2d(2, 3, 3, padding=1, coords="xyr", dtype=torch.float64)
        x = torch.randn(1, 2, 7, 9, dtype=torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.float64
        assert torch.equal(y, layer(x))

    def test_float64_after_float32(self, name, way):
        """Constants of float32 may be kept, and must not be used."""
        layer, x = make(name, 4, 6, 3, coords="rx")
        layer(x)
        layer.double()
        y = layer(x.double())
        assert y.dtype == torch.float64
        geometry = ConvGeometry((3,) * layer.rank, transposed="Transpose" in name)
        network = Network("n", tuple(x.shape[1:]), (Conv("conv", 4, 6, geometry, layer.coords),))
        weights = {f"conv.{key}": array for key, array in layer.export_weights().items()}
        wanted = expected(network, weights, x.double().numpy(), None, PRECISIONS["float64"])["y"]
        assert wanted.error(y.detach().numpy()) <= 1

    @pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
    @pytest.mark.parametrize(("coords", "shape"), [("xy", (5, 3)), ("xyr", (1, 5))])
    def test_complex_weights(self, coords, shape, way):
        layer = CoordConv2d(2, 3, 3, padding=1, coords=coords, dtype=torch.complex64)
        with torch.no_grad():
            for parameter in layer.parameters():
                parts = integers(*parameter.shape), integers(*parameter.shape)
                parameter.copy_(torch.complex(*parts))
        x = torch.complex(integers(1, 2, *shape), integers(1, 2, *shape))
        y = layer(x)
        assert y.dtype == torch.complex64
        assert torch.equal(y, concatenated(layer, x))
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), y)

    def test_bfloat16_travels_as_float32(self):
        layer, other = (CoordConv2d(2, 3, 3, dtype=torch.bfloat16) for _ in range(2))
        exported = layer.export_weights()
        assert {array.dtype for array in exported.values()} == {np.dtype(np.float32)}
        other.import_weights(exported)
        assert torch.equal(layer.weight, other.weight)

    def test_takes_device_and_dtype(self):
        layer = CoordConv2d(2, 3, 3, device="meta", dtype=torch.float16, bias=False)
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}
        assert layer(torch.empty(1, 2, 5, 5, device="meta", dtype=torch.float16)).shape[1] == 3

    def test_meta_device(self, name, way):
        options = {"stride": 2, "padding": 1, "device": "meta"}
        layer, x = make(name, 4, 6, 3, coords="rx", **options)
        plain = getattr(nn, name.removeprefix("Coord"))(4, 6, 3, **options)
        y = layer(x.to("meta"))
        assert y.is_meta
        assert y.shape == plain(x.to("meta")).shape
        layer.to_empty(device="cpu")
        torch.manual_seed(4)
        layer.reset_parameters()
        torch.manual_seed(4)
        fresh, _ = make(name, 4, 6, 3, coords="rx", stride=2, padding=1)
        assert torch.equal(layer(x), fresh(x))

    @pytest.mark.parametrize("coord_init", ["fan_in", "zeros"])
    def test_skip_init(self, name, coord_init):
        kind = getattr(backend, name)
        assert "device" in inspect.signature(kind).parameters
        layer = nn.utils.skip_init(kind, 4, 6, 3, coord_init=coord_init)
        assert {p.device.type for p in layer.parameters()} == {"cpu"}
        assert layer.in_channels == 4

    @pytest.mark.parametrize("name", [name for name in LAYERS if "1d" not in name])
    def test_channels_last_memory(self, name, way):
        layer, x, dy = exact(name)
        memory = {2: torch.channels_last, 3: torch.channels_last_3d}[layer.rank]
        twin, given = copy.deepcopy(layer).to(memory_format=memory), x.to(memory_format=memory)
        assert twin(given).is_contiguous(memory_format=memory)
        assert same(with_gradients(twin, given, dy), with_gradients(layer, x, dy))

    def test_an_empty_batch(self, name, way):
        layer, x, _ = exact(name)
        assert layer(x[:0]).shape == (0, *layer(x).shape[1:])

    def test_the_kept_arrays_are_bounded(self, way):
        layer = CoordConv1d(1, 1, 3)
        for n in range(3, 200):
            layer(torch.zeros(1, 1, n))
        infos = [f.cache_info() for f in vars(adding).values() if hasattr(f, "cache_info")]
        assert infos
        assert all(info.currsize <= info.maxsize < 197 for info in infos)


# --- what a layer computes in more than one way --------------------------------------------------


class TestOwnWays:
    """What torch's hand does beside the plain append and map computes the same."""

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("name", ["CoordConv1d", "CoordConv2d", "CoordConv3d"])
    def test_several_samples_of_a_pointwise_layer(self, name, bias, monkeypatch):
        torch.manual_seed(4)
        layer = fill(getattr(backend, name)(5, 7, 1, bias=bias))
        shape = (2, 3, 5)[-layer.rank :]
        x, dy = integers(3, 5, *shape), integers(3, 7, *shape)
        calls, product = [], adding.product
        monkeypatch.setattr(adding, "product", lambda *a: calls.append(a) or product(*a))
        found = with_gradients(layer, x, dy)
        assert calls
        monkeypatch.setattr(position_bias, "FORCED", "append")
        calls.clear()
        assert same(found, with_gradients(layer, x, dy))
        assert not calls

    @pytest.mark.parametrize(
        "options",
        [{"kernel_size": 3}, {"stride": 2}, {"padding": 1}, {"groups": 2}, {"in_channels": 65}],
    )
    def test_what_is_no_product_or_slower_as_one(self, options, monkeypatch):
        monkeypatch.setattr(adding, "product", None)
        layer = CoordConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 1, **options})
        layer(torch.zeros(3, layer.in_channels, 5, 5))

    def test_inputs_that_are_no_product(self, monkeypatch):
        monkeypatch.setattr(adding, "product", None)
        layer, x = CoordConv2d(4, 4, 1), torch.zeros(3, 4, 5, 5)
        with pytest.raises(TypeError):
            layer(x)
        layer(x[0])
        layer(x[:1])
        layer(x.to(memory_format=torch.channels_last))
        copy.deepcopy(layer).bfloat16()(x.bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)

    @pytest.mark.parametrize("coords", ["yx", "xyr", "r", Coordinates("xy", outside="extend")])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_one_large_map(self, coords, transposed):
        """Large enough to be made axis by axis, without anything being forced."""
        torch.manual_seed(3)
        kind = CoordConvTranspose2d if transposed else CoordConv2d
        layer = fill(kind(1, 64, 3, padding=1, coords=coords), largest=1)
        x, dy = integers(1, 1, 257, 129, largest=1), integers(1, 64, 257, 129, largest=1)
        geometry = ConvGeometry((3, 3), padding=1, transposed=transposed)
        divided = MapPlan(geometry, layer.coords, (257, 129), (257, 129)).divided(64)
        assert (divided[0] is None) == (layer.coords.channels == "r")
        network = Network("n", (1, 257, 129), (Conv("conv", 1, 64, geometry, layer.coords),))
        weights = {f"conv.{key}": array for key, array in layer.export_weights().items()}
        wanted = expected(network, weights, x.numpy(), dy.numpy())
        found = with_gradients(layer, x, dy)
        for key, value in wanted.items():
            assert value.error(found[key.removeprefix("conv.")].numpy()) <= 1, key
        with torch.inference_mode():
            for y in (layer(x), layer(x[0])[None]):
                assert wanted["y"].error(y.numpy()) <= 1


# --- modules -------------------------------------------------------------------------------------


class TestModule:
    def test_a_lazy_layers_arguments_are_torchs_and_two_more(self, name):
        plain = inspect.signature(getattr(nn, f"Lazy{name.removeprefix('Coord')}"))
        found = inspect.signature(getattr(backend, f"Lazy{name}"))
        *rest, coords, coord_init = found.parameters.values()
        assert [str(p) for p in rest] == [str(p) for p in plain.parameters.values()]
        assert [p.name for p in (coords, coord_init)] == ["coords", "coord_init"]

    def test_repr(self):
        assert repr(CoordConv2d(2, 3, 3, padding=1, coords="xyr")) == (
            "CoordConv2d(2, 3, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), "
            "coords=Coordinates('xyr'))"
        )

    def test_options_changed_on_the_layer_count(self, way):
        """Dilating a trained backbone by hand is a habit of segmentation code."""
        layer = fill(CoordConv2d(2, 3, 3, padding=1))
        layer(torch.zeros(1, 2, 9, 5))  # nothing of the options may be kept from here
        layer.dilation, layer.padding = (2, 2), (2, 2)
        x = integers(1, 2, 9, 5)
        assert torch.equal(layer(x), concatenated(layer, x))

    def test_every_way_is_the_concatenation(self, name, way):
        layer, x, _ = exact(name, groups=2)
        assert torch.equal(layer(x), concatenated(layer, x))

    @pytest.mark.parametrize("size", [(9, 7), (10, 7), (10, 8), (2, 3, 10, 8)])
    def test_output_size_is_output_padding(self, size, way):
        layer = CoordConvTranspose2d(2, 3, 3, stride=2, padding=1, coords="yr")
        x = torch.randn(2, 2, 5, 4)
        other = copy.deepcopy(layer)
        other.output_padding = (size[-2] - 9, size[-1] - 7)
        assert layer(x, output_size=size).shape[2:] == size[-2:]
        assert torch.equal(layer(x, output_size=size), other(x))
        assert torch.equal(layer(x[0], output_size=size[-2:]), other(x[0]))

    def test_reset_parameters_draws_all_anew(self, name):
        for coord_init in ("fan_in", "zeros"):
            layer, _ = make(name, 4, 6, 3, coord_init=coord_init)
            fresh = copy.deepcopy(layer)
            fill(layer)
            torch.manual_seed(7)
            layer.reset_parameters()
            torch.manual_seed(7)
            fresh.reset_parameters()
            assert same(dict(layer.named_parameters()), dict(fresh.named_parameters()))
            parts = split_kernel(
                layer.weight.detach().numpy(), layer.coords, 1, "Transpose" in name
            )
            assert parts[1].any() == (coord_init == "fan_in")

    def test_each_parameter_is_listed_once(self, name):
        module = nn.Sequential(make(name, 4, 6, 3)[0], nn.ReLU())
        assert [n for n, _ in module.named_parameters()] == ["0.weight", "0.bias"]
        assert len(set(module.parameters())) == 2

    def test_weight_decay_of_kernels_alone(self, name):
        layer, x = make(name, 4, 6, 3)
        before = {key: p.clone() for key, p in layer.named_parameters()}
        kernels = [p for p in layer.parameters() if p.ndim > 1]
        others = [p for p in layer.parameters() if p.ndim <= 1]
        groups = [{"params": kernels, "weight_decay": 0.5}, {"params": others}]
        optimizer = torch.optim.SGD(groups, lr=0.5)
        y = layer(x)
        y.backward(torch.zeros_like(y))
        optimizer.step()
        for key, parameter in layer.named_parameters():
            factor = 1 if key == "bias" else 0.75  # by learning rate and decay
            assert torch.equal(parameter, before[key] * factor)

    def test_initialisers_of_torchs_class_set_the_whole_kernel(self, name):
        layer, _ = make(name, 4, 6, 3)

        def initialise(module):
            if isinstance(module, getattr(nn, name.removeprefix("Coord"))):
                nn.init.constant_(module.weight, 0.5)
                nn.init.zeros_(module.bias)

        nn.Sequential(layer, nn.ReLU()).apply(initialise)
        assert (layer.weight == 0.5).all()
        assert not layer.bias.any()

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("kernel", [1, 3])
    def test_a_parametrized_weight_is_computed_once(self, kernel, compiled, way):
        layer, calls = CoordConv2d(4, 4, kernel), []

        class Count(nn.Module):
            def forward(self, weight):
                calls.append(weight.shape)
                return weight

        parametrize.register_parametrization(layer, "weight", Count())
        calls.clear()
        if compiled:
            torch.compiler.reset()
            layer.compile(backend="eager")
        layer(torch.zeros(3, 4, 5, 5))
        assert len(calls) == 1

    @pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
    def test_parametrizations_hold_for_the_whole_kernel(self, name, kind, way):
        layer, x = make(name, 4, 6, 3, coords="rx")
        layer.eval()
        getattr(parametrizations, kind)(layer)
        twin, _ = make(name, 4, 6, 3, coords="rx")
        with torch.no_grad():
            twin.weight.copy_(layer.weight)
            twin.bias.copy_(layer.bias)
        assert torch.equal(layer(x), twin(x))

    @pytest.mark.parametrize("kernel", [1, 3])
    def test_a_subclass_with_another_step_is_obeyed(self, kernel, way):
        class Doubled(CoordConv2d):
            def _conv_forward(self, input, weight, bias):
                return super()._conv_forward(input, 2 * weight, bias)

        class Squashed(CoordConv2d):
            def _conv_forward(self, input, weight, bias):
                return torch.sigmoid(super()._conv_forward(input, weight, bias))

        x = integers(4, 2, 3, 5)
        layer = fill(Doubled(2, 3, kernel))
        plain = CoordConv2d(2, 3, kernel)
        plain.load_state_dict(layer.state_dict())
        with torch.no_grad():
            plain.weight *= 2
        assert torch.equal(layer(x), plain(x))
        assert torch.equal(layer(x), torch.cat([layer(x[:1]), layer(x[1:])]))
        squashed = Squashed(2, 3, kernel)
        squashed.load_state_dict(plain.state_dict())
        assert torch.equal(squashed(x), torch.sigmoid(plain(x)))
        squashed(x).sum().backward()

    @pytest.mark.parametrize("step", ["forward", "_conv_forward"])
    def test_a_base_whose_step_would_be_left_out_is_refused(self, step):
        def scaled(self, *args):
            return 2 * getattr(super(scaled_conv, self), step)(*args)

        scaled_conv = type("Scaled", (nn.Conv2d,), {step: scaled})
        with pytest.raises(TypeError, match=f"must have Scaled, which has a {step} of its own"):
            type("Both", (CoordConv2d, scaled_conv), {})
        both, one = type("Both", (scaled_conv, CoordConv2d), {})(2, 3, 3), CoordConv2d(2, 3, 3)
        one.load_state_dict(fill(both).state_dict())
        x = integers(1, 2, 3, 5)
        assert torch.equal(both(x), 2 * one(x))

    def test_shared_weights(self, way):
        one, other = (fill(CoordConv2d(2, 3, 3)) for _ in range(2))
        other.weight = one.weight
        x = integers(2, 2, 5, 3)
        other.bias = one.bias
        assert torch.equal(one(x), other(x))
        assert len(list(nn.ModuleList([one, other]).parameters())) == 2

    def test_hooks_are_called_once(self, way):
        layer, seen = CoordConv2d(2, 3, 3), []
        layer.register_forward_hook(
            lambda m, i, y: seen.append((tuple(i[0].shape), tuple(y.shape)))
        )
        layer(torch.zeros(1, 2, 5, 5))
        assert seen == [((1, 2, 5, 5), (1, 3, 3, 3))]

    def test_threads(self, way):
        from concurrent.futures import ThreadPoolExecutor

        layer = fill(CoordConv2d(2, 3, 3, padding=1))
        _forget()
        inputs = [integers(1, 2, 3, n) for n in (2, 3, 5, 9) for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(layer, inputs))
        assert all(torch.equal(y, layer(x)) for x, y in zip(inputs, found, strict=True))


class TestLazy:
    @pytest.mark.parametrize("coord_init", ["fan_in", "zeros"])
    def test_its_first_input_makes_it_the_layer(self, name, coord_init, way):
        options = {"groups": 2, "coords": "rx", "coord_init": coord_init}
        lazy = getattr(backend, "Lazy" + name)(6, 3, **options)
        layer, x = make(name, 4, 6, 3, **options)
        torch.manual_seed(0)
        y = lazy(x)
        assert type(lazy) is type(layer)
        assert lazy.in_channels == 4
        torch.manual_seed(0)
        layer.reset_parameters()
        assert torch.equal(y, layer(x))
        assert repr(lazy) == repr(layer)

    def test_a_state_before_its_first_input(self, name, way):
        lazy = getattr(backend, "Lazy" + name)(6, 3, groups=2, coords="rx")
        layer, x = make(name, 4, 6, 3, groups=2, coords="rx")
        lazy.load_state_dict(layer.state_dict())
        assert torch.equal(lazy(x), layer(x))
        assert type(lazy) is type(layer)
        assert lazy.in_channels == 4

    @pytest.mark.parametrize("groups", [1, 2])
    def test_a_state_of_another_order(self, name, groups):
        lazy = getattr(backend, "Lazy" + name)(6, 3, groups=groups, coords="xr", padding=1)
        layer, x, _ = exact(name, "rx", groups=groups)
        lazy.load_state_dict(layer.state_dict())
        assert torch.equal(lazy(x), layer(x))

    def test_copies_and_states(self, name):
        lazy = getattr(backend, "Lazy" + name)(6, 3, coords="rx")
        twin = copy.deepcopy(lazy)
        assert twin.has_uninitialized_params()
        assert "Coordinates('rx')" in repr(twin)
        twin.load_state_dict(lazy.state_dict())
        assert twin.has_uninitialized_params()
        _, x = make(name, 4, 6, 3)
        assert twin(x).shape == lazy(x).shape

    def test_an_input_of_another_rank_leaves_it_lazy(self, name):
        lazy = getattr(backend, "Lazy" + name)(6, 3)
        for x in (torch.zeros(4), torch.zeros(1, 4, *[5] * (lazy.rank + 1))):
            with pytest.raises(ValueError, match="input must have shape"):
                lazy(x)
            assert lazy.has_uninitialized_params()
        with pytest.raises(TypeError, match="input must be floating-point"):
            lazy(torch.zeros(1, 4, *[5] * lazy.rank).int())
        assert lazy.has_uninitialized_params()
        assert lazy(torch.zeros(1, 4, *[5] * lazy.rank)).shape[1] == 6

    def test_groups_that_do_not_divide_the_channels(self, name):
        lazy = getattr(backend, "Lazy" + name)(6, 3, groups=2)
        with pytest.raises(ValueError, match="in_channels must be divisible by groups"):
            lazy(torch.zeros(1, 3, *[5] * lazy.rank))

    def test_weights_before_its_first_input(self, name):
        lazy = getattr(backend, "Lazy" + name)(6, 3)
        with pytest.raises(ValueError, match="uninitialized"):
            lazy.export_weights()


class TestStateDict:
    """What only torch's state dicts carry: the Coordinates, in the metadata."""

    @staticmethod
    def saved(module):
        """The state as a file gives it back."""
        stream = io.BytesIO()
        torch.save(module.state_dict(), stream)
        stream.seek(0)
        return torch.load(stream)

    @pytest.mark.parametrize("groups", [1, 2])
    def test_another_order_is_permuted(self, name, groups):
        one, other = (make(name, 4, 6, 3, coords=c, groups=groups)[0] for c in ("xr", "rx"))
        nn.Sequential(other).load_state_dict(self.saved(nn.Sequential(one)))
        parts, wanted = (
            split_kernel(each.weight.detach().numpy(), "xr", groups, "Transpose" in name)
            for each in (other, one)
        )
        assert np.array_equal(parts[0], wanted[0])
        assert np.array_equal(parts[1], wanted[1][:, ::-1])

    @pytest.mark.parametrize(
        "coords", ["xr", Coordinates("xy", span=(0, 1)), Coordinates("xy", outside="extend")]
    )
    def test_other_coordinates_are_refused(self, coords):
        layer, other = CoordConv2d(2, 3, 3), CoordConv2d(2, 3, 3, coords=coords)
        before = {key: p.clone() for key, p in layer.named_parameters()}
        with pytest.raises(RuntimeError) as error:
            nn.Sequential(layer).load_state_dict(self.saved(nn.Sequential(other)))
        wanted = f"0.weight was made for {other.coords}, want Coordinates('xy')"
        assert wanted in str(error.value)
        assert same(dict(layer.named_parameters()), before)

    def test_a_state_without_metadata_is_taken_by_its_shapes(self):
        layer, other = CoordConv2d(2, 3, 3), CoordConv2d(2, 3, 3, coords="xr")
        layer.load_state_dict(dict(other.state_dict()))
        assert torch.equal(layer.weight, other.weight)

    def test_further_keys_there_are_none(self, name):
        assert list(make(name, 4, 6, 3)[0].state_dict()) == ["weight", "bias"]

    def test_adapting_keeps_what_a_state_carries(self):
        one, other = CoordConv2d(2, 3, 3, coords="xy"), CoordConv2d(2, 3, 3, coords="yx")
        state = backend.adapt_state_dict(other, one.state_dict())
        other.load_state_dict(state)
        assert torch.equal(other.weight[:, 2:], one.weight[:, [3, 2]])
        refusing = CoordConv2d(2, 3, 3, coords="xr")
        with pytest.raises(RuntimeError, match="was made for"):
            refusing.load_state_dict(backend.adapt_state_dict(refusing, one.state_dict()))

    @pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
    def test_of_a_parametrized_layer(self, kind):
        one, other, turned = (
            getattr(parametrizations, kind)(CoordConv2d(2, 3, 3, coords=coords)).eval()
            for coords in ("xy", "xy", "yx")
        )
        other.load_state_dict(self.saved(one))
        assert torch.equal(other.weight, one.weight)
        with pytest.raises(RuntimeError, match="was made for"):
            turned.load_state_dict(self.saved(one))

    @pytest.mark.filterwarnings("ignore:.*weight_norm")
    @pytest.mark.parametrize("of", [parametrizations.weight_norm, nn.utils.weight_norm])
    def test_of_a_layer_with_a_computed_weight(self, of):
        layer = of(CoordConv2d(2, 3, 3))
        weight = layer.weight.detach().clone()
        with pytest.raises(ValueError, match="weight must be a parameter|imported before a param"):
            layer.import_weights(CoordConv2d(2, 3, 3).export_weights())
        layer(torch.zeros(1, 2, 3, 3))
        assert torch.equal(layer.weight, weight)

    def test_a_part_of_a_state(self):
        layer = CoordConv2d(2, 3, 3)
        state = self.saved(CoordConv2d(2, 3, 3))
        del state["weight"]
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
            layer.load_state_dict(state)
        assert layer.load_state_dict(state, strict=False).missing_keys == ["weight"]
        assert torch.equal(layer.bias, state["bias"])

    def test_assigned(self, name):
        with torch.device("meta"):
            layer, _ = make(name, 4, 6, 3, coords="xr")
        other, x = make(name, 4, 6, 3, coords="rx")
        layer.load_state_dict(self.saved(other), assign=True)
        y, wanted = layer(x), other(x)
        assert (y - wanted).abs().max() <= 2**-20 * wanted.abs().max()

    def test_a_layer_with_a_conv_inside_keeps_it(self):
        """Names under ``conv.`` are then its own."""
        layer = CoordConv2d(2, 3, 1)
        layer.conv = nn.Conv2d(1, 1, 1)
        other = copy.deepcopy(fill(layer))
        CoordConv2d(2, 3, 1)
        fresh = CoordConv2d(2, 3, 1)
        fresh.conv = nn.Conv2d(1, 1, 1)
        fresh.load_state_dict(other.state_dict())
        assert same(dict(fresh.named_parameters()), dict(other.named_parameters()))

    def test_the_callers_state_is_left_alone(self):
        state = {"conv.weight": torch.ones(3, 2, 1, 1), "conv.bias": torch.ones(3)}
        CoordConv2d(2, 3, 1).load_state_dict(state)
        assert list(state) == ["conv.weight", "conv.bias"]

    def test_canonical_weights_of_other_coordinates(self):
        layer = CoordConv2d(2, 3, 3)
        weights = Weights(layer.export_weights(), {"": Coordinates("yr")})
        with pytest.raises(ValueError, match="other coordinates: weight was made for"):
            layer.import_weights(weights)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """A process group of this process alone."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch has no distributed package")
    if not hasattr(pytest.importorskip("torch.distributed.tensor"), "DTensor"):
        pytest.skip("DTensor is not public in this torch")
    store = tmp_path_factory.mktemp("gloo") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    from torch.distributed.device_mesh import init_device_mesh

    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


class TestDistributed:
    @pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded batch"])
    @pytest.mark.parametrize("kind", [CoordConv2d, CoordConvTranspose2d])
    @pytest.mark.parametrize("kernel", [1, 3])
    def test_as_a_plain_tensor(self, mesh, sharded, way, kind, kernel):
        from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

        layer = fill(kind(2, 3, kernel))
        x, dy = integers(2, 2, 5, 3), None
        dy = integers(*layer(x).shape)
        wanted = with_gradients(layer, x, dy)
        placements = [Shard(0) if sharded else Replicate()]
        spread = distribute_module(copy.deepcopy(layer), mesh)
        given = distribute_tensor(x, mesh, placements)
        y = spread(given)
        y.backward(distribute_tensor(dy, mesh, y.placements))
        assert torch.equal(y.full_tensor(), wanted["y"])
        for key, parameter in spread.named_parameters():
            assert torch.equal(parameter.grad.full_tensor(), wanted[key])

    def test_add_coords(self, mesh):
        from torch.distributed.tensor import Replicate, distribute_tensor

        x = integers(2, 2, 5, 3)
        y = AddCoords()(distribute_tensor(x, mesh, [Replicate()]))
        assert torch.equal(y.full_tensor(), AddCoords()(x))


class TestAddCoords:
    @needs_ranges
    def test_traced_at_another_size(self):
        layer = AddCoords("yx")
        x = torch.randn(2, 3, 5, 4)
        traced = torch.fx.symbolic_trace(layer)
        program = torch.export.export(layer, (x,), dynamic_shapes={"input": dynamic(0, 2, 3)})
        for shape in ((1, 3, 5, 4), (3, 3, 9, 7), (2, 3, 320, 17)):
            x = torch.randn(*shape)
            grid = torch.tensor(np.array(coordinate_grid(shape[2:], "yx")))
            wanted = torch.cat([x, grid.expand(shape[0], *grid.shape)], 1)
            for y in (layer(x), traced(x), program.module()(x)):
                assert torch.equal(y, wanted)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_graph_is_rounded_once_in_16_bits(self, dtype):
        """Which have not all of the whole numbers that samples are counted with."""
        layer, x = AddCoords("x", rank=1), torch.zeros(2, 1, 5000, dtype=dtype)
        wanted = torch.tensor(np.array(coordinate_grid((5000,), "x"))).to(dtype)
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", dynamic=True, fullgraph=True)
        program = torch.export.export(layer, (x,), dynamic_shapes={"input": dynamic(2)})
        for call in (layer, compiled, program.module(), torch.jit.trace(layer, x)):
            y = call(x)
            assert y.dtype == dtype
            assert torch.equal(y[0, 1:], wanted)

    def test_gradients_and_types(self):
        x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
        y = AddCoords()(x)
        assert y.dtype == torch.float64
        y.sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x))
        assert AddCoords()(torch.zeros(1, 1, 2, 2).bfloat16()).dtype == torch.bfloat16
