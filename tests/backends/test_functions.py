"""Functions and given maps as channels, in every backend: against the definition, and traced."""

from typing import Any

import numpy as np
import pytest

from coordconv import Coordinates, Function, Given, backends, fourier
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Network
from coordconv.parity.bounds import expected
from coordconv.weights import Weights

SHAPE = 9, 5


def ridge(y: Any, x: Any) -> Any:
    return y * y + x


RIDGE = Function("ridge", "yx", ridge)
MAPS = (
    Given("lat", np.linspace(-1, 1, 9) ** 2, "y"),
    Given("mask", np.arange(45).reshape(SHAPE) % 2),
)
COORDS = {
    "functions": Coordinates(["x", RIDGE, *fourier("x", 2), "r"]),
    "maps": Coordinates([MAPS[0], "y", MAPS[1]]),
    "extend": Coordinates([RIDGE, "x"], outside="extend", align="start"),
}
GEOMETRIES = {
    "plain": ConvGeometry((3, 3), padding=1),
    "stride": ConvGeometry((3, 3), stride=2),
    "transposed": ConvGeometry((3, 3), stride=2, transposed=True),
    "circular": ConvGeometry((3, 3), padding=1, padding_mode="circular"),
    "pointwise": ConvGeometry((1, 1)),
}


def layer(coords: Coordinates, geometry: ConvGeometry) -> Network:
    return Network("layer", (4, *SHAPE), (Conv("conv", 4, 6, geometry, coords),))


def data(network: Network) -> tuple[Weights, Any, Any]:
    rng = np.random.default_rng(3)
    shapes = network.weight_shapes()
    arrays = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    *_, (_, _, output) = network.shapes()
    x, dy = (rng.standard_normal((2, *s)).astype(np.float32) for s in (network.input_shape, output))
    return Weights.of(network, arrays), x, dy


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("coords", COORDS)
def test_outputs_and_gradients(backend, coords, geometry):
    network, load = layer(COORDS[coords], GEOMETRIES[geometry]), backends.load(backend)
    weights, x, dy = data(network)
    y, gradients = load.evaluate(load.build(network, weights), weights, x, dy)
    wanted = expected(network, weights, x, dy)
    for name, found in {"y": y, **gradients}.items():
        assert wanted[name].error(found) <= 1, name


def test_a_given_map_has_one_size(backend):
    network, load = layer(COORDS["maps"], GEOMETRIES["plain"]), backends.load(backend)
    weights, x, _ = data(network)
    module = load.build(network, weights)
    with pytest.raises(ValueError, match="a given map has one size"):
        load.evaluate(module, weights, x[:, :, :8])


class TestTorch:
    @pytest.fixture
    def torch(self):
        return pytest.importorskip("torch")

    def layer(self, torch, coords, **options):
        torch.manual_seed(0)
        load = backends.load("torch")
        made = load.CoordConv2d(4, 6, 3, padding=1, coords=COORDS[coords], **options).eval()
        return made, torch.randn(2, 4, *SHAPE)

    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("coords", ["functions", "maps", "extend"])
    def test_compiled_at_every_size(self, torch, coords, groups):
        module, _ = self.layer(torch, coords, groups=groups)
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        for size in (SHAPE, *[(7, 6), (4, 5)] * (coords != "maps")):
            given = torch.randn(2, 4, *size)
            torch.testing.assert_close(compiled(given), module(given), rtol=1e-5, atol=1e-5)

    def test_compiled_append_at_every_size(self, torch):
        add = backends.load("torch").AddCoords(COORDS["functions"])
        torch._dynamo.reset()
        compiled = torch.compile(add, backend="aot_eager", fullgraph=True)
        for shape in ((2, 4, 9, 5), (3, 4, 7, 6), (3, 4, 4, 5), (4, 9, 5)):
            x = torch.randn(shape)
            assert torch.equal(compiled(x), add(x))

    @pytest.mark.parametrize("kind", ["append", "map", "AddCoords", "PositionBias2d", "fused"])
    def test_layers_that_differ_in_these_alone_share_no_program(self, torch, kind):
        square, sine = Function("f", "y", np.square), Function("f", "y", np.sin)
        one, other = (Given("m", np.full(SHAPE, value)) for value in (1, 2))
        each = [Coordinates([channel]) for channel in (square, sine, one, other)]
        each += [Coordinates([square], span=(0, 1)), Coordinates([square])]
        load, graphs, x = backends.load("torch"), [], torch.randn(2, 4, *SHAPE)

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        torch._dynamo.reset()
        for coords in each:
            torch.manual_seed(0)
            if kind == "AddCoords":
                module = load.AddCoords(coords)
            elif kind == "PositionBias2d":
                module = load.PositionBias2d(4, coords)
            else:
                module = load.CoordConv2d(4, 6, 3, padding=1, coords=coords).eval()
                module.map_only = kind == "map"
                module = module.fuse() if kind == "fused" else module
            found = torch.compile(module, backend=backend, fullgraph=True)(x)
            torch.testing.assert_close(found, module(x), rtol=1e-5, atol=1e-5)
        if torch.__version__ >= "2.5":  # before, no two modules shared a program
            assert len(graphs) == len(each) - 1

    @pytest.mark.parametrize("strict", [True, False])
    def test_exported_at_one_size(self, torch, strict):
        if not strict and not hasattr(torch.compiler, "is_exporting"):
            pytest.skip("this torch loses constants of a program that is not strict")
        module, x = self.layer(torch, "functions")
        program = torch.export.export(module, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-5)

    def test_not_exported_at_open_sizes(self, torch):
        module, x = self.layer(torch, "functions")
        height = {2: torch.export.Dim("height")}
        with pytest.raises(Exception, match="onstrain"):
            torch.export.export(module, (x,), dynamic_shapes=(height,), strict=True)

    @pytest.mark.parametrize("tracer", ["jit", "fx"])
    def test_tracers_that_would_fix_the_size(self, torch, tracer):
        module, x = self.layer(torch, "functions")
        with pytest.raises(ValueError, match="torch.export"):
            torch.jit.trace(module, (x,)) if tracer == "jit" else torch.fx.symbolic_trace(module)

    def test_a_state_with_other_channels_is_refused_by_name(self, torch):
        module, _ = self.layer(torch, "functions")
        again, _ = self.layer(torch, "functions")
        again.load_state_dict(module.state_dict())
        other, _ = self.layer(torch, "maps")
        with pytest.raises(RuntimeError, match="ridge"):
            other.load_state_dict(module.state_dict())

    def test_fused(self, torch):
        module, x = self.layer(torch, "functions")
        for fused in (module.fuse(), module.fuse(SHAPE)):
            torch.testing.assert_close(fused(x), module(x), rtol=1e-5, atol=1e-5)


def test_paddle_programs(tmp_path):
    paddle = pytest.importorskip("paddle")
    load = backends.load("paddle")
    module = load.CoordConv2D(4, 6, 3, padding=1, coords=COORDS["functions"])
    module.eval()
    x = paddle.randn([2, 4, *SHAPE])
    fixed = paddle.static.InputSpec([None, 4, *SHAPE], "float32")
    paddle.jit.save(module, str(tmp_path / "net"), input_spec=[fixed])
    found = paddle.jit.load(str(tmp_path / "net"))(x)
    np.testing.assert_allclose(found.numpy(), module(x).numpy(), rtol=1e-5, atol=1e-5)
    open_ = paddle.static.InputSpec([None, 4, None, None], "float32")
    with pytest.raises(ValueError, match="for a size that is known"):
        paddle.jit.save(module, str(tmp_path / "open"), input_spec=[open_])


def test_jax_programs():
    jax = pytest.importorskip("jax")
    pytest.importorskip("flax")
    from flax import nnx
    from jax import export

    load = backends.load("flax")
    module = load.CoordConv(4, 6, (3, 3), coords=COORDS["functions"], rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)

    def call(x):
        return nnx.merge(graph, state)(x)

    x = jax.numpy.ones((2, *SHAPE, 4))
    program = export.export(jax.jit(call))(jax.ShapeDtypeStruct(x.shape, x.dtype))
    np.testing.assert_allclose(program.call(x), call(x), rtol=1e-5, atol=1e-5)
    open_shape = export.symbolic_shape("n, h, w, 4")
    with pytest.raises(ValueError, match="for a size that is known"):
        export.export(jax.jit(call))(jax.ShapeDtypeStruct(open_shape, x.dtype))
