"""Models of any kind side by side: where they differ, by how much, and how that is told."""

import copy
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from coordconv import available_backends, backends, networks
from coordconv.parity import Report, compare
from coordconv.parity.compare import ulp_distance

X = np.arange(12, dtype=np.float32).reshape(2, 3, 2)


def doubled(x):
    return {"double": 2 * x, "model output": 2 * x + 1}


def test_equal_models_agree():
    report = compare({"a": doubled, "b": doubled}, X, bound=0)
    report.raise_if_different()
    assert report.ok
    assert report.reference == "a"
    assert report.first_difference == {"b": None}
    assert [row.name for row in report.rows] == ["double", "model output"]
    assert all(row.error == row.ulps == row.of_bound == 0 for row in report.rows)
    assert "b agrees with a in all of 2 arrays" in str(report)


def test_the_first_array_beyond_its_bound_is_named_in_the_reference_s_order():
    def wrong(x):
        found = doubled(x)
        return {"model output": found["model output"] + 1, "double": found["double"] * 1.5}

    report = compare({"right": doubled, "also": doubled, "wrong": wrong}, X)
    assert report.first_difference == {"also": None, "wrong": "double"}
    with pytest.raises(
        AssertionError, match="wrong differs from right at double: error 11"
    ) as info:
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
    assert report.first_difference == {"b": "double"}
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
    large = np.array([2**53, 2**63 - 2])  # float64 does not tell these from their next
    (row,) = compare({"a": lambda x: x, "b": lambda x: x + 1}, large).rows
    assert row.of_bound == np.inf


def test_models_that_write_to_the_same_memory():
    memory = np.zeros_like(X)
    models = {
        "once": lambda x: np.multiply(x, 1, out=memory),
        "twice": lambda x: np.multiply(x, 2, out=memory),
    }
    assert not compare(models, X).ok


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
        assert report.first_difference == {"b": parts}
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
        assert report.first_difference == {"b": "two" if factor > 1 else None}

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
        assert compare({"exact": exact, "tanh": tanh}, images).first_difference == {"tanh": "1"}

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
        (
            {"a": doubled, "b": lambda x: {"double": 2 * x, "model output[0]": x}},
            {},
            ValueError,
            r"no output of one name, .*: model output\[0\] and model output: let",
        ),
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


def test_inputs_are_not_empty():
    with pytest.raises(ValueError, match=r"inputs must not be empty, got shape \(0, 3, 2\)"):
        compare({"a": doubled, "b": lambda x: x}, X[:0])


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
    assert read["first_difference"] == {"b": "double"}
    assert (read["missing"], read["extra"]) == ({"b": ["model output"]}, {"b": ["extra"]})
    (row,) = read["rows"]
    assert (row["model"], row["name"], row["error"], row["ok"]) == ("b", "double", None, False)
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "report.png")
    compare({"a": doubled, "b": doubled}, X).plot(tmp_path / "report.svg")
    assert (tmp_path / "report.png").stat().st_size > 1000


@pytest.mark.parametrize("first", range(6))
def test_the_picture_has_room_for_what_is_written(first, monkeypatch):
    """Names with dollars, of any length, and a difference anywhere."""
    figure = pytest.importorskip("matplotlib.figure")
    names = [f"$x${i}" + ".encoder" * 12 * (i % 2) for i in range(6)]

    def model(size):
        return lambda x: {name: x + size * (i >= first) for i, name in enumerate(names)}

    figures = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    compare({"$a$": model(0), "$b$": model(1e9)}, X).plot("report.png")
    figures[0].draw_without_rendering()
    axes = figures[0].axes[0]
    box = axes.get_window_extent()
    (text,) = (text for text in axes.texts if text.get_text().startswith("differs at"))
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


def recorded(backend, net, **options):
    if backend in ("flax", "linen"):
        options.setdefault("channels_last", True)
    module = backends.load(backend)
    return module.recorded(*(net if isinstance(net, tuple) else (net,)), **options)


NETWORK = networks.get("coord_cnn")
BATCH = np.random.default_rng(3).standard_normal((2, *NETWORK.input_shape)).astype(np.float32)


def built(backend, weights, **options):
    """The network with these weights, recorded."""
    module = networks.build(NETWORK, backend)
    taken = module.import_weights(weights)  # a Linen module holds no arrays, and returns them
    return recorded(backend, (module, taken) if backend == "linen" else module, **options)


@pytest.fixture
def swapped():
    weights = networks.initial_weights(NETWORK)
    weights["conv3.weight"] = weights["conv3.weight"].swapaxes(2, 3)
    return weights


def test_swapped_axes_are_found_in_their_layer(backend, swapped):
    right = built(backend, networks.initial_weights(NETWORK))
    report = compare({"right": right, "wrong": built(backend, swapped)}, BATCH)
    assert report.first_difference == {"wrong": "conv3"}
    rows = {row.name: row for row in report.rows}
    assert rows["conv1"].error == rows["conv2"].error == 0
    # A layer that calls the convolution it is derived from is recorded once.
    assert not any("#" in name for name in rows)


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
    assert wrong.first_difference == {**dict.fromkeys(names[1:-1]), names[-1]: "conv3"}


def test_the_report_is_data():
    report = compare({"a": doubled, "b": doubled}, X)
    assert report == compare({"a": doubled, "b": doubled}, X)
    assert isinstance(report, Report)
