"""What models return by name, in every backend, and the names themselves."""

import collections
import dataclasses
from typing import Any

import numpy as np
import pytest

from coordconv import Coordinates, backends, networks
from coordconv.geometry import ConvGeometry
from coordconv.networks import Conv, Flatten, Linear, Network, ReLU
from coordconv.recording import Calls, mapped

X = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Parts:
    logits: Any
    rest: Any = None
    count: int = dataclasses.field(default=0, init=False)


class TestNames:
    def test_a_part_is_no_child(self):
        found = []
        for name, output in (("enc.0", 1), ("enc", (2, {"0": 3})), ("enc.1.0", [Parts(4)])):
            mapped(lambda name, part: found.append(name), name, output)
        assert found[:4] == ["enc.0", "enc[0]", "enc[1][0]", "enc.1.0[0][logits]"]

    def test_calls_are_numbered_by_the_names_that_are_given(self):
        calls = Calls({"act": "relu", "relu1": "relu"})
        named = [calls.name(module) for module in ("act", "conv", "relu1", "act")]
        assert named == ["relu", "conv", "relu#2", "relu#3"]

    def test_what_holds_the_parts_is_kept(self):
        pair = collections.namedtuple("pair", "x y")
        value = [pair(1, (2,)), collections.OrderedDict(a=3), Parts(4, [5])]
        made = mapped(lambda name, part: -part, "it", value)
        assert made == [pair(-1, (-2,)), {"a": -3}, Parts(-4, [-5])]
        assert [*map(type, made)] == [*map(type, value)]
        assert value[2] == Parts(4, [5])
        assert mapped(lambda name, part: part, "it", Parts) is Parts


def torch_net():
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.relu = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(4, 3, 1)
            self.unused = nn.Linear(1, 1)

        def forward(self, x, scale=1.0):
            x = self.relu(self.norm(self.conv1(x)))
            y = self.conv2(self.relu(x - 0.1))
            return {"logits": scale * y.mean((2, 3)), "rest": (y, "text")}

    torch.manual_seed(0)
    return Net().train()


def paddle_net():
    import paddle
    from paddle import nn

    class Net(nn.Layer):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2D(2, 4, 3, padding=1)
            self.norm = nn.BatchNorm2D(4)
            self.relu = nn.ReLU()
            self.conv2 = nn.Conv2D(4, 3, 1)
            self.unused = nn.Linear(1, 1)

        def forward(self, x, scale=1.0):
            x = self.relu(self.norm(self.conv1(x)))
            y = self.conv2(self.relu(x - 0.1))
            return {"logits": scale * y.mean((2, 3)), "rest": (y, "text")}

    paddle.seed(0)
    return Net()


def flax_net():
    from flax import nnx

    class Relu(nnx.Module):
        def __call__(self, x):
            return nnx.relu(x)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv1 = nnx.Conv(2, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.relu = Relu()
            self.conv2 = nnx.Conv(4, 3, (1, 1), rngs=rngs)
            self.unused = nnx.Linear(1, 1, rngs=rngs)

        def __call__(self, x, scale=1.0):
            x = self.relu(self.norm(self.conv1(x)))
            y = self.conv2(self.relu(x - 0.1))
            return {"logits": scale * y.mean((1, 2)), "rest": (y, "text")}

    return Net(nnx.Rngs(0))


def linen_net():
    import jax
    from flax import linen as nn

    class Relu(nn.Module):
        def __call__(self, x):
            return nn.relu(x)

    class Net(nn.Module):
        def setup(self):
            self.conv1 = nn.Conv(4, (3, 3))
            self.norm = nn.BatchNorm(use_running_average=False)
            self.relu = Relu()
            self.conv2 = nn.Conv(3, (1, 1))

        def __call__(self, x, scale=1.0):
            x = self.relu(self.norm(self.conv1(x)))
            y = self.conv2(self.relu(x - 0.1))
            return {"logits": scale * y.mean((1, 2)), "rest": (y, "text")}

    net = Net()
    return net, net.init(jax.random.key(0), np.ones((1, 5, 6, 2), np.float32))


def state(backend, net):
    """Everything that a call might change, as something to compare."""
    if backend == "linen":
        import jax

        return jax.tree.map(np.array, net[1])
    if backend == "flax":
        from flax import nnx

        found = [(path, m) for path, m in nnx.iter_graph(net) if isinstance(m, nnx.Module)]
        attributes = {path: sorted(vars(m)) for path, m in found}
        calls = {type(m): vars(type(m)).get("__call__") for _, m in found}
        return attributes, calls, nnx.to_pure_dict(nnx.state(net)), net.norm.use_running_average
    if backend == "torch":
        modules = [(m.training, len(m._forward_hooks)) for m in net.modules()]
        gradients = [p.grad for p in net.parameters()]
    else:
        modules = [(m.training, len(m._forward_post_hooks)) for m in net.sublayers(True)]
        gradients = [p.grad for p in net.parameters()]
    return modules, gradients, {k: v.numpy().copy() for k, v in net.state_dict().items()}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return np.array_equal(a, b) if hasattr(a, "shape") else a == b


@pytest.fixture
def net(backend):
    return {"torch": torch_net, "paddle": paddle_net, "flax": flax_net, "linen": linen_net}[
        backend
    ]()


def recorded(backend, net, **options):
    if backend in ("flax", "linen"):
        options.setdefault("channels_last", True)
    module = backends.load(backend)
    return module.recorded(*(net if isinstance(net, tuple) else (net,)), **options)


IMAGES = np.random.default_rng(1).standard_normal((2, 2, 5, 6)).astype(np.float32)
OUTPUTS = ["model output[logits]", "model output[rest][0]"]
FORWARD = ["conv1", "norm", "relu", "relu#2", "conv2", *OUTPUTS]


class TestRecorded:
    def test_names_in_the_order_of_the_calls_and_channels_first(self, backend, net):
        found = recorded(backend, net)(IMAGES)
        assert list(found) == FORWARD
        assert found["conv1"].shape == (2, 4, 5, 6)
        assert found["conv2"].shape == found["model output[rest][0]"].shape == (2, 3, 5, 6)
        assert found["model output[logits]"].shape == (2, 3)
        assert all(array.dtype == np.float32 for array in found.values())
        # What a module wrote to later is recorded as it was.
        assert (found["norm"] < 0).any()
        assert (found["relu"] >= 0).all()

    def test_the_model_is_left_as_it_was(self, backend, net):
        before = state(backend, net)
        dy = {"model output[logits]": np.ones((2, 3), np.float32)}
        first = recorded(backend, net, output_gradient=dy)(IMAGES)
        assert same(state(backend, net), before)
        again = recorded(backend, net)(IMAGES)
        assert all(np.array_equal(again[name], first[name]) for name in FORWARD)
        with pytest.raises(Exception):  # noqa: B017, PT011  # each framework has its own
            recorded(backend, net)(IMAGES[:, :1])
        assert same(state(backend, net), before)

    def test_arguments_go_to_the_model(self, backend, net):
        once, twice = (recorded(backend, net, scale=scale)(IMAGES) for scale in (1.0, 2.0))
        name = "model output[logits]"
        assert np.array_equal(twice[name], 2 * once[name])

    def test_other_names(self, backend, net):
        found = recorded(backend, net, names={"norm": "bn", "conv2": "conv1"})(IMAGES)
        assert list(found)[:5] == ["conv1", "bn", "relu", "relu#2", "conv1#2"]
        assert "CONV1" in recorded(backend, net, names=str.upper)(IMAGES)
        with pytest.raises(ValueError, match=r"names has \['norn'\], but .* conv1, conv2, "):
            recorded(backend, net, names={"norn": "bn"})(IMAGES)

    def test_gradients_are_those_of_finite_differences(self, backend, net):
        """In the direction of the gradient itself, the slope is its length, squared."""
        name = "model output[logits]"
        dy = np.random.default_rng(2).standard_normal((2, 3)).astype(np.float32)
        found = recorded(backend, net, output_gradient={name: dy})(IMAGES)
        backward = ["conv2", "relu#2", "relu", "norm", "conv1", "model input"]
        assert list(found) == FORWARD + [f"gradient of {each}" for each in backward]
        assert all(
            found[each].shape == found[f"gradient of {each}"].shape for each in backward[:-1]
        )
        gradient = found["gradient of model input"]
        run, step = recorded(backend, net), 1e-2
        ends = [(run(IMAGES + s * step * gradient)[name] * dy).sum(dtype="f8") for s in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx((gradient.astype("f8") ** 2).sum(), rel=0.02)
        # Of the mean over 30 places, and of a ReLU.
        of_conv2 = np.broadcast_to(dy[..., None, None] / 30, (2, 3, 5, 6))
        assert np.allclose(found["gradient of conv2"], of_conv2)
        open_gate = found["relu"] > 0
        after_relu = found["gradient of relu"]
        assert np.array_equal(found["gradient of norm"], np.where(open_gate, after_relu, 0))

    def test_a_gradient_that_does_not_fit(self, backend, net):
        for dy in (np.ones((2, 3)), {"model output[logits]": np.ones((2, 4))}, {"norm": 1}):
            with pytest.raises(ValueError, match="output_gradient must fit .*logits.*got"):
                recorded(backend, net, output_gradient=dy)(IMAGES)


NETWORK = Network(
    "small",
    (2, 5, 6),
    (
        Conv("conv1", 2, 3, ConvGeometry((3, 3), padding=1), Coordinates("xyr")),
        ReLU(),
        Conv("conv2", 3, 2, ConvGeometry((1, 2)), Coordinates("yx")),
        Flatten("flatten"),
        Linear("linear", 50, 1),
    ),
)
BATCH = np.random.default_rng(3).standard_normal((2, *NETWORK.input_shape)).astype(np.float32)


def built(backend, weights, **options):
    """A network of ours with these weights, recorded."""
    module = networks.build(NETWORK, backend)
    taken = module.import_weights(weights)
    return recorded(backend, (module, taken) if backend == "linen" else module, **options)


def test_gradients_are_those_of_the_adapters(backend):
    weights = networks.initial_weights(NETWORK)
    dy = np.random.default_rng(4).standard_normal((2, 1)).astype(np.float32)
    found = built(backend, weights, output_gradient=dy)(BATCH)
    # A layer that calls the convolution it is derived from is recorded once.
    assert not any("#" in name for name in found)
    assert {"conv1", "conv2", "linear", "gradient of conv2"} <= found.keys()
    module = networks.build(NETWORK, backend)
    y, gradients = backends.load(backend).evaluate(module, weights, BATCH, dy)
    assert np.allclose(found["model output"], y, atol=1e-6)
    wanted = gradients["x"]
    assert np.allclose(found["gradient of model input"], wanted, atol=1e-5 * np.abs(wanted).max())


def embedding(backend):
    """Whole numbers in, an embedding, a linear layer."""
    if backend == "torch":
        import torch

        net = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 2))
        return net, {"0": "embed", "1": "head"}
    if backend == "paddle":
        import paddle

        net = paddle.nn.Sequential(paddle.nn.Embedding(5, 4), paddle.nn.Linear(4, 2))
        return net, {"0": "embed", "1": "head"}
    if backend == "flax":
        from flax import nnx

        rngs = nnx.Rngs(0)
        net = nnx.Sequential(nnx.Embed(5, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs))
        return net, {"layers.0": "embed", "layers.1": "head"}
    import jax
    from flax import linen as nn

    net = nn.Sequential([nn.Embed(5, 4), nn.Dense(2)])
    variables = net.init(jax.random.key(0), np.zeros((1, 3), np.int32))
    return (net, variables), {"layers_0": "embed", "layers_1": "head"}


def test_whole_numbers_have_no_gradient(backend):
    net, names = embedding(backend)
    options = {"channels_last": False} if backend in ("flax", "linen") else {}
    dy = np.ones((2, 3, 2), np.float32)
    run = recorded(backend, net, names=names, output_gradient=dy, **options)
    found = run(np.array([[0, 1, 2], [3, 4, 0]], np.int32))
    forward = ["embed", "head", "model output"]
    assert list(found) == [*forward, "gradient of head", "gradient of embed"]
    assert found["gradient of embed"].shape == found["embed"].shape == (2, 3, 4)


def test_an_embedding_alone_has_no_gradients(backend):
    kept = {}
    if backend == "torch":
        import torch

        net = torch.nn.Embedding(5, 4)
    elif backend == "paddle":
        import paddle

        net = paddle.nn.Embedding(5, 4)
    elif backend == "flax":
        from flax import nnx

        net = nnx.Embed(5, 4, rngs=nnx.Rngs(0))
        kept["channels_last"] = False
    else:
        import jax
        from flax import linen as nn

        module = nn.Embed(5, 4)
        net = module, module.init(jax.random.key(0), np.zeros(1, np.int32))
        kept["channels_last"] = False
    run = recorded(backend, net, output_gradient=np.ones((2, 4), "f4"), **kept)
    assert list(run(np.array([0, 3], np.int32))) == ["model output"]


def returning(backend, make):
    """A network whose output is ``make`` of its input, which it may write to."""
    if backend == "torch":
        import torch

        kind = torch.nn.Module
    elif backend == "paddle":
        import paddle

        kind = paddle.nn.Layer
    elif backend == "flax":
        from flax import nnx

        kind = nnx.Module
    else:
        from flax import linen

        class Linen(linen.Module):
            def __call__(self, x):
                return make(x)

        return Linen(), {}
    call = "__call__" if backend == "flax" else "forward"
    return type("Net", (kind,), {call: lambda self, x: make(x)})()


def test_an_output_that_is_a_dataclass(backend):
    net = returning(backend, lambda x: Parts(2 * x, [x + 1]))
    dy = np.random.default_rng(0).standard_normal(X.shape).astype("f4")
    found = recorded(backend, net, output_gradient={"model output[logits]": dy})(X)
    assert list(found)[:2] == ["model output[logits]", "model output[rest][0]"]
    assert np.array_equal(found["gradient of model input"], 2 * dy)


@pytest.mark.parametrize("made", [None, {"loss": 1.0}, ()])
def test_an_output_without_arrays(backend, made):
    run = recorded(backend, returning(backend, lambda x: made))
    with pytest.raises(TypeError, match=f"must return an array .* got {type(made).__name__}"):
        run(X)


def test_a_model_that_writes_to_its_input(backend):
    if backend in ("flax", "linen"):
        pytest.skip("JAX's arrays cannot be written to")

    def make(x):
        x[:, 0] = 0
        x *= 3
        return x

    run = recorded(backend, returning(backend, make), output_gradient=np.ones_like(X))
    found = run(X)
    wanted = np.full_like(X, 3)
    wanted[:, 0] = 0
    assert np.array_equal(found["model output"], X * wanted)
    assert np.array_equal(found["gradient of model input"], wanted)


def test_sixteen_bits_are_recorded_as_float32():
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1)).bfloat16()
    found = recorded("torch", net, output_gradient=np.ones((2, 3, 5, 6)))(IMAGES)
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}


def test_what_a_model_transforms_itself_is_not_recorded():
    nnx = pytest.importorskip("flax.nnx")
    nn = pytest.importorskip("flax.linen")
    import jax

    class Net(nnx.Module):
        def __init__(self):
            self.inner = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.outer = nnx.Linear(4, 4, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.outer(nnx.jit(lambda m, x: m(x))(self.inner, x))

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="outer")(nn.jit(nn.Dense)(4, name="inner")(x))

    x = np.ones((2, 4), np.float32)
    linen = Linen()
    models = [("flax", Net()), ("linen", (linen, linen.init(jax.random.key(0), x)))]
    for backend, net in models:
        found = recorded(backend, net, output_gradient=x)(x)
        assert list(found)[:2] == ["outer", "model output"]
        assert list(found)[-2:] == ["gradient of outer", "gradient of model input"]


def test_what_is_traced_is_not_counted_as_a_call():
    nn = pytest.importorskip("flax.linen")
    import jax

    class Inner(nn.Module):
        def setup(self):
            self.dense = nn.Dense(4)

        def __call__(self, x):
            return self.dense(x)

        @nn.jit
        def jitted(self, x):
            return self.dense(x)

    class Net(nn.Module):
        def setup(self):
            self.inner = Inner()

        def __call__(self, x):
            return self.inner(self.inner.jitted(x))

    x = np.ones((2, 4), np.float32)
    net = Net()
    variables = net.init(jax.random.key(0), x)
    run = recorded("linen", (net, variables), output_gradient=x)
    names = ["inner.dense", "inner", "model output"]
    backward = [f"gradient of {name}" for name in ("inner", "inner.dense", "model input")]
    for _ in range(2):  # JAX traces it the first time only
        found = run(x)
        assert list(found) == names + backward
        assert found["gradient of inner.dense"].any()


def test_what_only_gradients_trace_has_no_gradient_of_zero():
    nn = pytest.importorskip("flax.linen")
    import jax

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            call = nn.custom_vjp(
                lambda module, x: module(x),
                forward_fn=lambda module, x: nn.vjp(lambda m, x: m(x), module, x),
                backward_fn=lambda pull_back, dy: pull_back(dy),
            )
            return nn.Dense(4, name="after")(call(nn.Dense(4, name="within"), x))

    x = np.ones((2, 4), np.float32)
    net = Net()
    run = recorded("linen", (net, net.init(jax.random.key(0), x)), output_gradient=x)
    found = run(x)
    assert all(found[name].any() for name in found if name.startswith("gradient of "))
    assert "gradient of after" in found


@pytest.mark.parametrize("backend", ["torch", "paddle"])
def test_what_is_not_trained_is_left_as_it_was(backend):
    """Whatever a call does to it: write to it, replace it, make it."""
    framework = pytest.importorskip(backend)
    kind = framework.nn.Module if backend == "torch" else framework.nn.Layer

    class Net(kind):
        def __init__(self):
            super().__init__()
            self.inner = framework.nn.Linear(4, 4)
            self.inner.register_buffer("shared", framework.zeros([4]))
            for name in ("written", "replaced", "same"):
                self.register_buffer(name, framework.zeros([4]))
            self.register_buffer("also", self.inner.shared)
            self.register_buffer("again", self.inner.shared)
            self.register_buffer("late", None)
            self.inner.weight.requires_grad = False

        def forward(self, x):
            if self.late is None:
                self.late = x.mean(0)
            if not hasattr(self, "made"):
                self.register_buffer("made", x + 1)
            self.written += 1
            self.again += 1
            self.replaced = self.replaced + 1
            with framework.no_grad():
                self.inner.weight.copy_(self.inner.weight * 2)
            return self.inner(x) + self.written + self.replaced + self.again

    net = Net()
    weight = net.inner.weight.detach().numpy().copy()
    buffers = {name: getattr(net, name) for name in ("written", "replaced", "same", "also")}
    x = np.ones((2, 4), np.float32)
    first = recorded(backend, net)(x)["model output"]
    assert net.late is None
    assert not hasattr(net, "made")
    assert all(getattr(net, name) is buffer for name, buffer in buffers.items())
    assert net.again is net.also is net.inner.shared
    assert not any(buffer.numpy().any() for buffer in (*buffers.values(), net.again))
    assert np.array_equal(net.inner.weight.detach().numpy(), weight)
    assert np.array_equal(recorded(backend, net)(x)["model output"], first)


class TestTorchOnly:
    @pytest.fixture(autouse=True)
    def nn(self):
        return pytest.importorskip("torch").nn

    def test_tensors_without_values_for_numpy_are_skipped(self, nn):
        import torch

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.outer, self.same = nn.Linear(4, 4), nn.Linear(4, 4), nn.Identity()

            def forward(self, x):
                for layout in (torch.strided, torch.jagged):
                    parts = [torch.ones(2), torch.ones(3)]
                    self.same(torch.nested.nested_tensor(parts, layout=layout))
                self.same(x.to_sparse())
                return self.outer(torch.vmap(self.inner)(x))

        x = np.ones((2, 4), np.float32)
        found = recorded("torch", Net(), output_gradient=x)(x)
        assert list(found)[:2] == ["outer", "model output"]
        assert list(found)[2:] == ["gradient of outer", "gradient of model input"]

    def test_a_module_that_returns_its_input_has_the_gradient_of_its_own_output(self, nn):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.same = nn.Linear(1, 1), nn.Identity()

            def forward(self, x):
                y = self.first(x)
                return 3 * y + self.same(y)

        x = np.ones((1, 1), np.float32)
        found = recorded("torch", Net(), output_gradient=x)(x)
        assert [found[f"gradient of {name}"].item() for name in ("same", "first")] == [1, 4]

    def test_a_scripted_module_is_not_recorded(self, nn):
        import torch

        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
        x = np.ones((2, 4), np.float32)
        found = recorded("torch", nn.Sequential(scripted, nn.Linear(4, 4)))(x)
        assert list(found) == ["1", "model output"]
        assert list(recorded("torch", scripted)(x)) == ["model output"]

    def test_a_lazy_module(self, nn):
        x = np.ones((2, 4), np.float32)
        found = recorded("torch", nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()))(x)
        assert list(found) == ["0", "1", "model output"]
