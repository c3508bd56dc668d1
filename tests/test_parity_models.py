"""Models of any kind side by side: what is recorded of each, and where they part."""

import collections
import copy
import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from coordconv import available_backends, backends, networks
from coordconv.parity import Report, compare
from coordconv.parity.models import ulp_distance
from coordconv.recording import Recording, mapped

X = np.arange(12, dtype=np.float32).reshape(2, 3, 2)


def doubled(x):
    return {"double": 2 * x, "model output": 2 * x + 1}


def test_equal_models_agree():
    report = compare({"a": doubled, "b": doubled}, X, bound=0)
    report.raise_if_different()
    assert report.ok
    assert report.reference == "a"
    assert report.parts == {"b": None}
    assert [row.name for row in report.rows] == ["double", "model output"]
    assert all(row.error == row.ulps == row.of_bound == 0 for row in report.rows)
    assert "b agrees with a in all of 2 arrays" in str(report)


def test_the_first_array_beyond_its_bound_is_named_in_the_reference_s_order():
    def wrong(x):
        found = doubled(x)
        return {"model output": found["model output"] + 1, "double": found["double"] * 1.5}

    report = compare({"right": doubled, "also": doubled, "wrong": wrong}, X)
    assert report.parts == {"also": None, "wrong": "double"}
    with pytest.raises(AssertionError, match="wrong parts from right at double: error 11") as info:
        report.raise_if_different()
    assert str(info.value) == str(report)
    assert max(map(len, str(report).splitlines())) <= 100


def test_an_array_alone_is_the_output():
    report = compare({"a": doubled, "b": lambda x: 2 * x + 1}, X)
    assert report.ok
    assert report.missing == {"b": ("double",)}
    assert "only in a: double" in str(report)
    back = compare({"a": doubled, "b": lambda x: 2 * x + 1}, X, reference="b")
    assert back.extra == {"a": ("double",)}
    assert "only in a: double" in str(back)


def test_the_reference_may_be_a_function_in_float64():
    report = compare({"float32": lambda x: x / 3}, X, reference=lambda x: x.astype(np.float64) / 3)
    (row,) = report.rows
    assert (report.reference, row.model) == ("reference", "float32")
    assert row.ulps == 0  # in float32, to whose nearest number the reference is rounded
    assert 0 < row.error < 2**-22
    assert row.ok


def test_several_inputs_and_a_model_that_writes_to_them():
    def add(x, y):
        x += y
        return x

    inputs = [X.copy(), X.copy()]
    assert compare({"a": add, "b": lambda x, y: x + y}, inputs, bound=0).ok
    assert np.array_equal(inputs[0], X)


def test_another_shape_is_a_difference_of_its_own():
    report = compare({"a": doubled, "b": lambda x: doubled(x.swapaxes(1, 2))}, X)
    assert report.parts == {"b": "double"}
    assert "double: shape (2, 2, 3), where the reference has (2, 3, 2)" in str(report)
    row = report.rows[0]
    assert row.error == row.ulps == row.of_bound == np.inf
    # Not even where NumPy would broadcast one to the other.
    assert not compare({"a": lambda x: x, "b": lambda x: x[:1]}, X).ok


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i4", "?"])
def test_other_types(dtype):
    x = X.astype(dtype)
    assert compare({"a": lambda x: x, "b": lambda x: x.copy()}, x).ok
    assert not compare({"a": lambda x: x, "b": lambda x: ~x if dtype == "?" else x + 1}, x).ok


def test_integers_must_be_equal():
    (row,) = compare({"a": lambda x: x, "b": lambda x: x + 1}, np.arange(3)).rows
    assert (row.error, row.ulps, row.of_bound) == (1, 1, np.inf)


class TestNotFinite:
    values = np.array([[1, np.nan, np.inf, -np.inf]], np.float32)

    def test_the_same_places_agree_and_are_told_of(self):
        report = compare({"a": lambda x: x, "b": lambda x: x.copy()}, self.values, bound=0)
        assert report.ok
        assert report.rows[0].note == (
            "NaN at 1 of 4, in the reference at 1; infinite at 2 of 4, in the reference at 2"
        )

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.0])
    @pytest.mark.parametrize("place", range(4))
    def test_anything_else_there_is_a_difference(self, place, value):
        other = self.values.copy()
        other[0, place] = value
        report = compare({"a": lambda x: x, "b": lambda x: other}, self.values, bound=1e30)
        same = np.array_equal(other, self.values, equal_nan=True)
        assert report.ok == (same or (place, value) == (0, 3.0))


class TestBound:
    @staticmethod
    def above(x):
        return {name: array + 0.5 for name, array in doubled(x).items()}

    @pytest.mark.parametrize(
        ("bound", "parts"),
        [
            (0.5, None),
            (0.49, "double"),
            (np.full((2, 3, 2), 0.5), None),
            ({"double": 0.5}, "model output"),
            ({"double": 0.5, "model output": [[0.5], [1], [1]]}, None),
            (lambda name, reference: 0.5 if name == "double" else 0 * reference, "model output"),
        ],
    )
    def test_kinds(self, bound, parts):
        report = compare({"a": doubled, "b": self.above}, X, bound=bound)
        assert report.parts == {"b": parts}
        assert report.rows[0].error == 0.5

    @pytest.mark.parametrize("factor", [0.5, 2])
    @pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
    def test_default(self, dtype, factor):
        """The one that the docstring states, at the second array."""
        x = np.full((2, 8, 2), 3, dtype)
        unit = float(np.finfo(dtype).eps) / 2
        by = factor * min(2 * np.sqrt(2 * 9 * 8) * unit, 1 / 32) * 3
        report = compare(
            {
                "a": lambda x: {"one": x, "two": x},
                "b": lambda x: {"one": x, "two": x.astype("f8") + by},
            },
            x,
        )
        # Not closer, since there are few steps of float64 between the two.
        assert report.rows[1].of_bound == pytest.approx(factor, rel=0.1)
        assert report.parts == {"b": "two" if factor > 1 else None}

    @pytest.mark.parametrize("size", [1, 100])
    def test_default_counts_no_samples_and_no_elements(self, size):
        """Of 9 and of 900 terms."""
        for shape in ((7, size), (1000, size, 1), (7, size, size)):
            (row,) = compare(
                {"a": lambda x: x, "b": lambda x: x + 2**-20}, np.ones(shape, "f4")
            ).rows
            assert row.of_bound == pytest.approx(2**4 / (2 * 3 * np.sqrt(size)))

    def test_default_is_never_much_of_the_array(self):
        """In float16 a long axis would allow all of it."""
        x = np.random.default_rng(0).standard_normal((2, 3, 4096)).astype("f2")
        (row,) = compare({"a": lambda x: x, "b": np.zeros_like}, x).rows
        assert row.of_bound == 32

    def test_default_tells_two_gelus_apart_behind_a_large_image(self):
        torch = pytest.importorskip("torch")
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 64, 4, stride=4)
        exact, tanh = (
            recorded("torch", torch.nn.Sequential(conv, torch.nn.GELU(each)))
            for each in ("none", "tanh")
        )
        images = np.random.default_rng(0).standard_normal((1, 3, 512, 512)).astype("f4")
        assert compare({"exact": exact, "tanh": tanh}, images).parts == {"tanh": "1"}

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("size", [8, 64])
    def test_default_is_no_hard_one_for_a_right_model(self, size, training):
        torch = pytest.importorskip("torch")
        nn = torch.nn
        torch.manual_seed(0)
        channels = (3, 8, 16, 16)
        blocks = (
            (nn.Conv2d(*pair, 3, padding=1), nn.BatchNorm2d(pair[1]), nn.SiLU())
            for pair in itertools.pairwise(channels)
        )
        net = nn.Sequential(*itertools.chain(*blocks), nn.Flatten(), nn.Linear(16 * size**2, 10))
        net.train(training)
        rng = np.random.default_rng(0)
        x, dy = (rng.standard_normal(s).astype("f4") for s in ((4, 3, size, size), (4, 10)))
        models = {
            "f8": recorded("torch", copy.deepcopy(net).double(), output_gradient=dy),
            "f4": recorded("torch", net, output_gradient=dy),
        }
        assert max(row.of_bound for row in compare(models, x).rows) < 0.5

    @pytest.mark.parametrize(
        ("bound", "message"),
        [
            (-1, "must not be negative or NaN, got -1"),
            (np.nan, "must not be negative or NaN"),
            ({"tripled": 1}, r"bound has \['tripled'\]"),
            (np.ones(5), r"must fit its shape \(2, 3, 2\), got \(5,\)"),
        ],
    )
    def test_wrong(self, bound, message):
        with pytest.raises(ValueError, match=message):
            compare({"a": doubled, "b": self.above}, X, bound=bound)


@pytest.mark.parametrize(
    ("models", "options", "error", "message"),
    [
        ({}, {}, ValueError, "there are no models"),
        ({"a": doubled}, {}, ValueError, "nothing to compare a with"),
        ({"a": doubled}, {"reference": "b"}, ValueError, "must be one of a, got 'b'"),
        ({"a": doubled}, {"reference": 1}, TypeError, "a model's name or a function, got int"),
        ({"a": doubled, "b": list}, {}, TypeError, "b must return .* got list for 'model output'"),
        (
            {"a": doubled, "b": lambda x: {"double": x.tolist()}},
            {},
            TypeError,
            "b must return .* got list for 'double'",
        ),
        ({"a": doubled, "b": lambda x: x.astype("U")}, {}, TypeError, "got ndarray of <U"),
        ({"a": doubled, "b": lambda x: {"c": x}}, {}, ValueError, "b and a have no array of one"),
        ({"a": doubled, "b": lambda x: {0: x}}, {}, TypeError, "from strings, got the key 0"),
    ],
)
def test_bad_arguments(models, options, error, message):
    with pytest.raises(error, match=message):
        compare(models, X, **options)


@pytest.mark.parametrize("inputs", [X.tolist(), 1.0, [X, 1.0], "x", {"x": X}, iter([X])])
def test_inputs_are_numpy_arrays(inputs):
    with pytest.raises(TypeError, match="inputs must be a NumPy array, or a list .* got builtins"):
        compare({"a": doubled, "b": doubled}, inputs)


def test_inputs_are_no_tensors():
    torch = pytest.importorskip("torch")
    for inputs in (torch.ones(2), [torch.ones(2)]):
        with pytest.raises(TypeError, match="inputs must be a NumPy array.* got torch.Tensor"):
            compare({"a": doubled, "b": doubled}, inputs)


def test_a_model_that_raises_is_named():
    with pytest.raises(ZeroDivisionError) as info:
        compare({"a": doubled, "b": lambda x: 1 / 0}, X)
    assert info.value.__notes__ == ["raised by the model 'b'"]


def test_argmax_is_over_axis_one():
    scores = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1]], np.float32)
    (row,) = compare({"a": lambda x: x, "b": lambda x: x[[0, 1, 2, 0]]}, scores).rows
    assert row.argmax == 0.75
    assert compare({"a": lambda x: x, "b": lambda x: x}, scores[:, :1]).rows[0].argmax is None


def test_json_and_the_picture(tmp_path):
    report = compare({"a": doubled, "b": lambda x: {"double": x[:1], "extra": x}}, X)
    read = json.loads(report.to_json())
    assert read["ok"] is False
    assert read["parts"] == {"b": "double"}
    assert (read["missing"], read["extra"]) == ({"b": ["model output"]}, {"b": ["extra"]})
    (row,) = read["rows"]
    assert (row["model"], row["name"], row["error"], row["ok"]) == ("b", "double", None, False)
    pytest.importorskip("matplotlib")
    report.draw(tmp_path / "report.png")
    compare({"a": doubled, "b": doubled}, X).draw(tmp_path / "report.svg")
    assert (tmp_path / "report.png").stat().st_size > 1000


@pytest.mark.parametrize("first", range(6))
def test_the_picture_has_room_for_what_is_written(first, monkeypatch):
    """Names with dollars, of any length, and a difference anywhere."""
    figure = pytest.importorskip("matplotlib.figure")
    names = [f"$x${i}" + ".encoder" * 12 * (i % 2) for i in range(6)]

    def model(size):
        return lambda x: {name: x + size * (i >= first) for i, name in enumerate(names)}

    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    compare({"$a$": model(0), "$b$": model(1e9)}, X).draw("report.png")
    drawn[0].draw_without_rendering()
    axes = drawn[0].axes[0]
    box = axes.get_window_extent()
    (text,) = (text for text in axes.texts if text.get_text().startswith("parts at"))
    at = text.get_window_extent()
    assert box.x0 <= at.x0 < at.x1 <= box.x1
    assert at.y1 < box.y1
    assert box.height > 200
    ticks = axes.get_xticklabels()
    assert all(tick.get_window_extent().y0 >= 0 for tick in ticks)
    texts = (text, axes.title, *ticks, *axes.get_legend().get_texts())
    assert not any(each._preprocess_math(each.get_text())[1] for each in texts)


def test_long_names_are_cut_on_the_left():
    name = "encoder." * 12 + "attention"
    report = compare(dict.fromkeys("ab", lambda x: {name: x, f"gradient of {name}": x}), X)
    lines = str(report).splitlines()[2:]
    assert max(map(len, lines)) <= 100
    assert "er.attention  2x3x2" in lines[0]
    assert lines[1].startswith("  gradient of …")
    assert "er.attention  2x3x2" in lines[1]


@dataclasses.dataclass(frozen=True)
class Parts:
    logits: Any
    rest: Any = None
    count: int = dataclasses.field(default=0, init=False)


class TestNames:
    def test_a_part_is_no_child(self):
        recording = Recording()
        for name, output in (("enc.0", 1), ("enc", (2, {"0": 3})), ("enc.1.0", 4)):
            recording.visit(name, output, recording.keep)
        recording.end([5, Parts(6)], recording.keep)
        found = recording.found()
        assert list(found)[:4] == ["enc.0", "enc[0]", "enc[1][0]", "enc.1.0"]
        assert list(found)[4:6] == ["model output[0]", "model output[1][logits]"]
        assert [*found.values()][:6] == [1, 2, 3, 4, 5, 6]

    def test_what_holds_the_parts_is_kept(self):
        pair = collections.namedtuple("pair", "x y")
        value = [pair(1, (2,)), collections.OrderedDict(a=3), Parts(4, [5])]
        made = mapped(lambda name, part: -part, "it", value)
        assert made == [pair(-1, (-2,)), {"a": -3}, Parts(-4, [-5])]
        assert [*map(type, made)] == [*map(type, value)]
        assert value[2] == Parts(4, [5])
        assert mapped(lambda name, part: part, "it", Parts) is Parts


floats = hnp.arrays(np.float32, 8, elements=st.floats(width=32))


class TestUlpDistance:
    @given(floats, floats)
    def test_is_a_distance(self, a, b):
        distance = ulp_distance(a, b)
        assert np.array_equal(distance, ulp_distance(b, a))
        assert np.array_equal(distance == 0, (a == b) | (np.isnan(a) & np.isnan(b)))

    @pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
    @given(
        start=st.sampled_from([0.0, -0.0, 1.0, -1.0, 6e4, 1e-8, -6e-8, 0.5]),
        steps=st.integers(0, 20),
        up=st.booleans(),
    )
    def test_counts_steps(self, dtype, start, steps, up):
        a = b = np.array([start], dtype)
        for _ in range(steps):
            b = np.nextafter(b, np.array(np.inf if up else -np.inf, dtype))
        assert ulp_distance(a, b) == steps

    @given(floats)
    def test_through_zero(self, a):
        a = np.where(np.isnan(a), 0, a)
        assert np.array_equal(ulp_distance(a, -a), 2 * ulp_distance(a, np.zeros_like(a)))

    def test_in_the_coarser_type(self):
        third = np.array([1 / 3])
        assert ulp_distance(third, third.astype("f4")) == 0
        assert ulp_distance(third.astype("f2"), third) == 0

    def test_ends(self):
        largest = np.array([np.finfo("f8").max])
        assert ulp_distance(largest, np.array([np.inf])) == 1
        assert ulp_distance(-largest, largest) == 2 * 0x7FEFFFFFFFFFFFFF


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

        attributes = {path: sorted(vars(m)) for path, m in nnx.iter_modules(net)}
        calls = {type(m): vars(type(m)).get("__call__") for _, m in nnx.iter_modules(net)}
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


NETWORK = networks.get("coord_cnn")
BATCH = np.random.default_rng(3).standard_normal((2, *NETWORK.input_shape)).astype(np.float32)


def built(backend, weights, **options):
    module = networks.build(NETWORK, backend)
    if backend == "linen":
        return recorded(backend, (module, module.import_weights(weights)), **options)
    module.import_weights(weights)
    return recorded(backend, module, **options)


@pytest.fixture
def swapped():
    weights = networks.initial_weights(NETWORK)
    weights["conv3.weight"] = weights["conv3.weight"].swapaxes(2, 3)
    return weights


def test_swapped_axes_are_found_in_their_layer(backend, swapped):
    right = built(backend, networks.initial_weights(NETWORK))
    report = compare({"right": right, "wrong": built(backend, swapped)}, BATCH)
    assert report.parts == {"wrong": "conv3"}
    rows = {row.name: row for row in report.rows}
    assert rows["conv1"].error == rows["conv2"].error == 0
    # A layer that calls the convolution it is derived from is recorded once.
    assert not any("#" in name for name in rows)


def test_gradients_are_those_of_the_adapters(backend):
    weights = networks.initial_weights(NETWORK)
    dy = np.random.default_rng(4).standard_normal((2, 1)).astype(np.float32)
    found = built(backend, weights, output_gradient=dy)(BATCH)
    module = networks.build(NETWORK, backend)
    y, gradients = backends.load(backend).evaluate(module, weights, BATCH, dy)
    assert np.allclose(found["model output"], y, atol=1e-6)
    wanted = gradients["x"]
    assert np.allclose(found["gradient of model input"], wanted, atol=1e-5 * np.abs(wanted).max())


def test_all_frameworks_agree_and_the_wrong_one_is_found(swapped):
    names = available_backends()
    if len(names) < 2:
        pytest.skip("there are not two frameworks")
    dy = np.array([[1.5], [-0.5]], np.float32)
    weights = networks.initial_weights(NETWORK)
    models = {name: built(name, weights, output_gradient=dy) for name in names}
    report = compare(models, BATCH)
    report.raise_if_different()
    assert {"conv1", "conv4", "gradient of conv1"} <= {row.name for row in report.rows}
    wrong = compare({**models, names[-1]: built(names[-1], swapped)}, BATCH)
    assert wrong.parts == {**dict.fromkeys(names[1:-1]), names[-1]: "conv3"}


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

    def test_a_scripted_module_is_not_recorded(self, nn):
        import torch

        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
        x = np.ones((2, 4), np.float32)
        found = recorded("torch", nn.Sequential(scripted, nn.Linear(4, 4)))(x)
        assert list(found) == ["1", "model output"]
        assert list(recorded("torch", scripted)(x)) == ["model output"]

    def test_what_is_not_trained_is_left_as_it_was(self, nn):
        import torch

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("late", None)
                self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)

            def forward(self, x):
                if self.late is None:
                    self.late = x.mean(0)
                self.frozen += 1
                return x + self.frozen

        net = Net()
        x = np.ones((2, 4), np.float32)
        first = recorded("torch", net)(x)["model output"]
        assert net.late is None
        assert not net.frozen.any()
        assert np.array_equal(recorded("torch", net)(x)["model output"], first)

    def test_a_lazy_module(self, nn):
        x = np.ones((2, 4), np.float32)
        found = recorded("torch", nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()))(x)
        assert list(found) == ["0", "1", "model output"]


def test_the_report_is_data():
    report = compare({"a": doubled, "b": doubled}, X)
    assert report == compare({"a": doubled, "b": doubled}, X)
    assert isinstance(report, Report)
