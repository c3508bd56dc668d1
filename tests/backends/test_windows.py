"""Windows in every backend: crops, flips and deep networks, traced and compiled."""

from typing import Any

import numpy as np
import pytest

import coordconv
from coordconv import Coordinates, Window, backends, fourier
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Network, ReLU, initial_weights
from coordconv.parity import check_layers, generate
from coordconv.parity.bounds import Expected, expected

FRAME = 17, 33  # coordinates of corners are multiples of a power of two
BOXES = [[4, 2, 12, 10], [20, 5, 28, 13], [0, 9, 8, 17]]
WINDOW = Window.from_boxes(BOXES, FRAME)


def integers(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


def crops(x: Any, boxes: Any = BOXES) -> Any:
    """The crop of each sample, ``(N, C, *S)``."""
    return np.stack(
        [each[:, y0:y1, x0:x1] for each, (x0, y0, x1, y1) in zip(x, boxes, strict=True)]
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_random_layers_with_random_windows(backend, seed):
    report = check_layers(generate(12, seed, windows=True), [backend])
    assert report.ok, report.tallies[0].failures
    assert report.tallies[0].layers > 4


@pytest.mark.parametrize("coords", ["xy", "x", "yxr"])
def test_a_crop_is_the_whole_cut_out(backend, coords):
    """Where no padding reaches, to the bit: all numbers are exact."""
    coords = Coordinates(coords, outside="extend", span=(-16, 16))
    if "r" in coords.channels:
        coords = Coordinates(coords.channels, outside="extend", units="pixels", align="edges")
    conv = Conv("conv", 2, 3, ConvGeometry((3, 3)), coords)
    load, weights = backends.load(backend), None
    whole = Network("whole", (2, *FRAME), (conv,))
    small = Network("small", (2, 8, 8), (conv,))
    arrays = {name: integers(*s) for name, s in whole.weight_shapes().items()}
    weights = coordconv.weights.Weights.of(whole, arrays)
    x = integers(3, 2, *FRAME, seed=1)
    wanted, _ = load.evaluate(load.build(whole, weights), weights, x)
    with coordconv.window(WINDOW):
        found, _ = load.evaluate(load.build(small, weights), weights, crops(x))
    inside = [[x0, y0, x1 - 2, y1 - 2] for x0, y0, x1, y1 in BOXES]
    if "r" in coords.channels:  # a radius is no such number
        np.testing.assert_allclose(found, crops(wanted, inside), rtol=1e-5)
    else:
        assert np.array_equal(found, crops(wanted, inside))


def deep(side: int) -> Network:
    """Five layers with strides 1, 2 and 4 of the input, with coordinates in each."""
    coords = Coordinates("xyr", align="edges", outside="extend")
    layers: list[Any] = []
    for place, (stride, ins, outs) in enumerate(
        [(1, 2, 4), (2, 4, 4), (1, 4, 4), (2, 4, 4), (1, 4, 3)]
    ):
        geometry = ConvGeometry((3, 3), stride=stride, padding=1)
        layers += [Conv(f"conv{place}", ins, outs, geometry, coords), ReLU()]
    return Network("deep", (2, side, side), tuple(layers[:-1]))


def test_a_crop_through_five_layers(backend):
    load, whole, small = backends.load(backend), deep(96), deep(64)
    weights = initial_weights(whole, 3)
    x = np.random.default_rng(0).standard_normal((2, 2, 96, 96)).astype(np.float32)
    boxes = [[24, 16, 88, 80], [4, 32, 68, 96]]  # at multiples of the last stride
    cut = crops(x, boxes)
    with coordconv.window(Window.from_boxes(boxes, (96, 96))):
        y, _ = load.evaluate(load.build(small, weights), weights, cut)
        bound = expected(small, weights, cut, None)["y"].bound
    of_whole = expected(whole, weights, x, None)["y"].value
    wanted = crops(of_whole, np.array(boxes) // 4)
    inside = (..., slice(4, -4), slice(4, -4))  # where no padding reaches
    assert Expected(wanted[inside], 1.01 * bound[inside]).error(y[inside]) <= 1
    assert Expected(wanted, 1.01 * bound).error(y) > 1  # and elsewhere it does


def test_a_flipped_crop(backend):
    """Through taps that are mirrored, too: the same output, mirrored."""
    coords = Coordinates("xy", outside="extend", span=(-16, 16))
    conv = Conv("conv", 2, 3, ConvGeometry((3, 3)), coords)
    network = Network("flipped", (2, 8, 8), (conv,))
    arrays = {name: integers(*s) for name, s in network.weight_shapes().items()}
    mirrored = {**arrays, "conv.weight": arrays["conv.weight"][..., ::-1].copy()}
    load, x = backends.load(backend), integers(1, 2, 8, 8, seed=2)

    def run(arrays, x, box):
        weights = coordconv.weights.Weights.of(network, arrays)
        with coordconv.window(Window.from_boxes([box], FRAME)):
            return load.evaluate(load.build(network, weights), weights, x)[0]

    found = run(mirrored, x[..., ::-1].copy(), [12, 2, 4, 10])
    assert np.array_equal(found[..., ::-1], run(arrays, x, [4, 2, 12, 10]))


def test_the_whole_frame_is_today(backend):
    network = deep(16)
    weights, x = initial_weights(network, 1), integers(2, 2, 16, 16)
    load = backends.load(backend)
    module = load.build(network, weights)
    wanted, _ = load.evaluate(module, weights, x)
    with coordconv.window(Window(0, 1)):
        found, _ = load.evaluate(module, weights, x)
    assert np.array_equal(found, wanted)
    with coordconv.window(Window(0, 0.5)):
        other, _ = load.evaluate(module, weights, x)
    assert not np.array_equal(other, wanted)
    again, _ = load.evaluate(module, weights, x)
    assert np.array_equal(again, wanted)


def test_windows_that_do_not_fit(backend):
    network = deep(16)
    weights, x = initial_weights(network, 1), integers(2, 2, 16, 16)
    load = backends.load(backend)
    module = load.build(network, weights)
    for given, message in (
        (Window(np.zeros((3, 2)), 0.5), "for one sample or for the 2 of the input, got 3"),
        (Window([0.0], [0.5]), "must have 2 axes as the input, got 1"),
    ):
        with coordconv.window(given), pytest.raises(ValueError, match=message):
            load.evaluate(module, weights, x)


COORDS = [Coordinates("xy"), Coordinates("xyr"), Coordinates("yx", outside="extend")]


class TestTorch:
    @pytest.fixture(autouse=True)
    def torch(self):
        return pytest.importorskip("torch")

    @pytest.mark.parametrize("coords", COORDS, ids=repr)
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("given", ["numpy", "tensor"])
    def test_one_graph_for_all_windows(self, torch, coords, training, given):
        if not hasattr(torch.compiler, "is_exporting"):
            pytest.skip("the compiler of this torch does not see what a thread has, and says so")
        load, graphs = backends.load("torch"), []

        def count(graph, inputs):
            graphs.append(graph)
            return graph.forward

        net = torch.nn.Sequential(
            load.CoordConv2d(2, 4, 3, coords=coords),
            torch.nn.ReLU(),
            load.CoordConvTranspose2d(4, 2, 3, coords=coords),
        ).train(training)
        torch._dynamo.reset()
        compiled = torch.compile(net, backend=count, fullgraph=True)
        x = torch.randn(3, 2, 8, 8, requires_grad=training)
        for step in range(4):
            boxes: Any = np.array(BOXES) + step
            boxes = boxes if given == "numpy" else torch.tensor(boxes, dtype=torch.float32)
            with coordconv.window(Window.from_boxes(boxes, (32, 64))):
                found, wanted = compiled(x), net(x)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert len(graphs) == 1
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("map_only", [False, True])
    def test_compiled_windows_of_several_samples_of_one_image(self, torch, map_only):
        layer = backends.load("torch").CoordConv2d(2, 4, 3)
        layer.map_only = map_only
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="eager")
        for shape in ((1, 2, 8, 8), (2, 8, 8)):
            with pytest.raises(ValueError, match="for the 1 of the input, got 4"):
                compiled(torch.zeros(shape), window=Window(np.zeros((4, 2)), 0.5))

    def test_exported_with_the_boxes_as_an_input(self, torch):
        if not hasattr(torch.compiler, "is_exporting"):
            pytest.skip("the compiler of this torch does not see what a thread has, and says so")
        load = backends.load("torch")

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = load.CoordConv2d(2, 4, 3, coords="xyr")

            def forward(self, x, boxes):
                with coordconv.window(Window.from_boxes(boxes, FRAME)):
                    return self.conv(x)

        net, x = Net(), torch.randn(3, 2, 8, 8)
        boxes = torch.tensor(BOXES, dtype=torch.float32)
        program = torch.export.export(net, (x, boxes), strict=False).module()
        moved = boxes + 2
        torch.testing.assert_close(program(x, moved), net(x, moved), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_16_bits(self, torch, dtype):
        """As exact as with float32's coordinates, rounded once."""
        layer = backends.load("torch").CoordConv2d(2, 4, 3, dtype=getattr(torch, dtype))
        x = torch.randn(3, 2, 8, 8, dtype=layer.weight.dtype)
        wide = backends.load("torch").CoordConv2d(2, 4, 3)
        wide.load_state_dict({k: v.float() for k, v in layer.state_dict().items()})
        # Windows that are so small that 16 bits would not tell their samples apart.
        given = Window(np.full((3, 2), 0.7), np.full((3, 2), 0.701))
        one, other = layer(x, window=given).float(), wide(x.float(), window=given)
        unit = torch.finfo(layer.weight.dtype).eps
        assert (one - other).abs().max() <= 4 * unit * other.abs().max()

    def test_other_inputs(self, torch):
        load = backends.load("torch")
        layer = load.CoordConv2d(2, 4, 3, coords="xyr", groups=2)
        x, given = torch.randn(3, 2, 8, 8), Window.from_boxes(BOXES, FRAME)
        for i, box in enumerate(BOXES):  # without a batch
            alone = layer(x[i], window=Window.from_boxes(box, FRAME))
            torch.testing.assert_close(alone, layer(x, window=given)[i], rtol=1e-5, atol=1e-5)
        added = load.AddCoords("xy")(x, window=given)
        grid = coordconv.coordinate_grid((8, 8), "xy", window=given)
        assert np.array_equal(added[:, 2:].numpy(), grid)

    def test_boxes_may_be_written_to_afterwards(self, torch):
        boxes = torch.tensor(BOXES, dtype=torch.float32)
        windows = Window.from_boxes(boxes, FRAME), Window(boxes[:, :2], boxes[:, 2:], frame=FRAME)
        wanted = [window.on("x")[0].clone() for window in windows]
        boxes /= 8
        for window, start in zip(windows, wanted, strict=True):
            assert torch.equal(window.on("x")[0], start)

    def test_boxes_of_8_bits_have_no_sums(self, torch):
        boxes = torch.tensor([[200, 0, 100, 50]], dtype=torch.uint8)  # to column 300
        for format in ("xywh", "yxhw"):
            with pytest.raises(TypeError, match="must be of more than 8 bits.* torch.uint8"):
                Window.from_boxes(boxes, (400, 400), format)
        assert Window.from_boxes(boxes.short(), (400, 400), "xywh").stop_x == 300
        Window.from_boxes(boxes, (400, 400))

    def test_gradients_of_the_box(self, torch):
        """Where it is a parameter, as where a network attends."""
        layer = backends.load("torch").CoordConv2d(2, 4, 3, dtype=torch.float64)
        x = torch.randn(2, 2, 5, 5, dtype=torch.float64)

        def run(start, stop):
            return layer(x, window=Window(start, stop))

        start = torch.rand(2, 2, dtype=torch.float64) * 0.3
        stop = start + 0.4
        inputs = start.requires_grad_(), stop.detach().requires_grad_()
        assert torch.autograd.gradcheck(run, inputs)

    def test_a_graph_of_fx_takes_no_window(self, torch):
        if not hasattr(torch.compiler, "is_exporting"):
            pytest.skip("torch.fx of this torch traces no range of unknown length")
        traced = torch.fx.symbolic_trace(backends.load("torch").CoordConv2d(2, 4, 3))
        traced.graph.eliminate_dead_code()
        traced.recompile()
        with pytest.raises(ValueError, match="window must be entered where"):
            traced(torch.randn(3, 2, 8, 8), window=WINDOW)

    def test_a_fused_layer_refuses_one(self, torch):
        fused, x = (
            backends.load("torch").CoordConv2d(2, 4, 3).eval().fuse(),
            torch.zeros(1, 2, 5, 5),
        )
        with coordconv.window(Window(0, 0.5)), pytest.raises(ValueError, match="fused layer"):
            fused(x)


class TestPaddle:
    @pytest.fixture(autouse=True)
    def paddle(self):
        return pytest.importorskip("paddle")

    @pytest.mark.parametrize("coords", COORDS, ids=repr)
    def test_a_program_takes_the_boxes(self, paddle, coords):
        load = backends.load("paddle")

        class Net(paddle.nn.Layer):
            def __init__(self):
                super().__init__()
                self.conv = load.CoordConv2D(2, 4, 3, coords=coords)

            def forward(self, x, boxes):
                with coordconv.window(Window.from_boxes(boxes, FRAME)):
                    return self.conv(x)

        net = Net()
        net.eval()
        specs = [paddle.static.InputSpec(s, "float32") for s in ([None, 2, None, None], [None, 4])]
        program = paddle.jit.to_static(net, full_graph=True, input_spec=specs)
        for boxes, side in ((np.array(BOXES), 8), (np.array(BOXES) + 1, 6)):
            x = paddle.randn([3, 2, side, side])
            found = program(x, paddle.to_tensor(boxes.astype("float32")))
            wanted = net.conv(x, window=Window.from_boxes(boxes, FRAME))
            np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-4, atol=1e-5)

    def test_a_window_from_outside_of_a_program_is_refused(self, paddle):
        layer = backends.load("paddle").CoordConv2D(2, 4, 3)
        program = paddle.jit.to_static(layer, full_graph=True)
        with coordconv.window(WINDOW), pytest.raises(ValueError, match="would be frozen"):
            program(paddle.randn([3, 2, 8, 8]))

    def test_channels_last(self, paddle):
        load = backends.load("paddle")
        for coords in COORDS:
            layer = load.CoordConv2D(2, 4, 3, coords=coords)
            last = load.CoordConv2D(2, 4, 3, coords=coords, data_format="NHWC")
            last.set_state_dict(layer.state_dict())
            x = paddle.randn([3, 2, 8, 8])
            found = last(x.transpose([0, 2, 3, 1]), window=WINDOW).transpose([0, 3, 1, 2])
            wanted = layer(x, window=WINDOW).numpy()
            np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)

    def test_a_fused_layer_refuses_one(self, paddle):
        layer = backends.load("paddle").CoordConv2D(2, 4, 3)
        layer.eval()
        fused = layer.fuse()
        with coordconv.window(Window(0, 0.5)), pytest.raises(ValueError, match="fused layer"):
            fused(paddle.zeros([1, 2, 5, 5]))


class TestJax:
    @pytest.fixture(autouse=True)
    def jax(self):
        pytest.importorskip("flax")
        return pytest.importorskip("jax")

    def modules(self, coords):
        from flax import nnx

        return backends.load("flax").CoordConv(2, 4, (3, 3), coords=coords, rngs=nnx.Rngs(0))

    @pytest.mark.parametrize("coords", COORDS, ids=repr)
    def test_a_compiled_function_takes_the_window(self, jax, coords):
        from flax import nnx

        layer, x = self.modules(coords), jax.numpy.ones((3, 8, 8, 2))
        graph, state = nnx.split(layer)
        traces = []

        @jax.jit
        def run(state, x, given):
            traces.append(1)
            with coordconv.window(given):
                return nnx.merge(graph, state)(x)

        for step in range(3):
            given = Window.from_boxes(np.array(BOXES) + step, FRAME)
            wanted = layer(x, window=given)
            np.testing.assert_allclose(run(state, x, given), wanted, rtol=1e-4, atol=1e-5)
        assert len(traces) == 1

    def test_a_window_around_a_compiled_function(self, jax):
        """It is not that with which the function was compiled before."""
        linen = backends.load("linen")
        layer, x = linen.CoordConv(4, (3, 3)), jax.numpy.ones((3, 8, 8, 2))
        variables = layer.init(jax.random.key(0), x)
        run = jax.jit(layer.apply)
        without = run(variables, x)
        for step in (0, 1):
            given = Window.from_boxes(np.array(BOXES) + step, FRAME)
            with coordconv.window(given):
                found = run(variables, x)
            wanted = layer.apply(variables, x, window=given)
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
        assert np.array_equal(run(variables, x), without)

    def test_functions_of_a_traced_window_are_refused(self, jax):
        layer = self.modules(Coordinates(["y", *fourier("x", 1)]))
        x = jax.numpy.ones((3, 8, 8, 2))
        layer(x, window=WINDOW)
        with pytest.raises(ValueError, match="let the arrays of a window be NumPy's"):
            jax.jit(lambda given: layer(x, window=given))(WINDOW)

    def test_exported_at_open_sizes(self, jax):
        from flax import nnx
        from jax import export

        for coords in COORDS:
            layer = self.modules(coords)
            graph, state = nnx.split(layer)

            def run(x, start, stop, graph=graph, state=state):
                return nnx.merge(graph, state)(x, window=Window(start, stop))

            scope = export.SymbolicScope()
            x = jax.ShapeDtypeStruct(export.symbolic_shape("n, h, w, 2", scope=scope), "float32")
            ends = jax.ShapeDtypeStruct(export.symbolic_shape("n, 2", scope=scope), "float32")
            program = export.export(jax.jit(run))(x, ends, ends)
            for size in ((3, 8, 8, 2), (2, 5, 7, 2)):
                given = (
                    np.full((size[0], 2), 0.25, "float32"),
                    np.full((size[0], 2), 0.75, "float32"),
                )
                inputs = jax.numpy.ones(size)
                wanted = layer(inputs, window=Window(*given))
                found = program.call(inputs, *given)
                np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)

    def test_one_window_for_several_batch_axes(self, jax):
        layer, x = self.modules("xy"), jax.numpy.ones((2, 3, 8, 8, 2))
        one = layer(x, window=Window(0, 0.5))
        assert np.array_equal(one[0, 0], layer(x[0, :1], window=Window(0, 0.5))[0])
        with pytest.raises(ValueError, match="one for all samples where the batch has axes"):
            layer(x, window=WINDOW)

    def test_a_fused_layer_refuses_one(self, jax):
        fused = self.modules("xy").fuse()
        with coordconv.window(Window(0, 0.5)), pytest.raises(ValueError, match="fused layer"):
            fused(jax.numpy.zeros((1, 5, 5, 2)))


@pytest.mark.parametrize("coords", ["yx", "r"])
def test_an_input_of_nnx_without_a_batch(coords):
    nnx = pytest.importorskip("flax.nnx")
    layer = backends.load("flax").CoordConv(2, 3, (3, 3), coords=coords, rngs=nnx.Rngs(0))
    layer.map_only = True
    x, window = np.moveaxis(integers(1, 2, 8, 8), 1, -1), Window({"x": 0.5}, {"x": 1.0})
    np.testing.assert_allclose(
        layer(x[0], window=window), layer(x, window=window)[0], rtol=1e-5, atol=1e-5
    )
