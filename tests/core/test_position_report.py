"""The report on position, held to what is known of functions of images, without a framework."""

import itertools
import json

import numpy as np
import pytest

from coordconv.position_report import PositionReport, PositionRow, _Layer, plot, position_report

LENGTH = 16
RAMP = np.linspace(-1, 1, LENGTH)
SIGMAS = 5  # of what chance may do


def images(count=8, channels=1, *size, seed=0):
    shape = (count, channels, *(size or (LENGTH, LENGTH)))
    return np.random.default_rng(seed).random(shape)


def within(x):
    """The variance over positions, as a mean over images and channels."""
    return x.var(axis=tuple(range(2, x.ndim))).mean()


def chance(count, draws):
    """What chance may make of the shuffled share of a network that is blind to position.

    Let z be the mean over the images of a draw, less its mean over positions. For such a network z
    is 0 on average, and the products of two draws are uncorrelated from pair to pair, each with a
    standard deviation of at most the variance of z: that is reached if all positions and channels
    vary as one. That variance is 1 / count of the total.
    """
    return SIGMAS * np.sqrt(2 / (draws * (draws - 1))) / count


def one(function, x, **options):
    """The row of a network that is a function."""
    return position_report(lambda x: {"it": function(x)}, x, **options)["it"]


def row(name, kind="Conv2d", shape=(2, 3, 8, 8), share=0.5, middle=None):
    return PositionRow(name, kind, shape, share, middle, share, middle, np.zeros(shape[2:]))


class TestShares:
    def test_what_a_network_draws_is_no_position(self):
        rng, x = np.random.default_rng(1), images()
        found = one(lambda x: x + rng.standard_normal(x.shape), x)
        # Products of independent draws, as many as there are numbers.
        assert abs(found.constant) < 4 / np.sqrt(x.size)
        assert abs(found.shuffled) < chance(len(x), 16)

    def test_a_network_that_writes_to_its_input_and_to_its_last_output(self):
        memory, x = np.empty((8, 1, LENGTH, LENGTH)), images()

        def network(x):
            x += RAMP
            memory[:] = x
            return memory

        wanted = one(lambda x: x + RAMP, x.copy())
        given = x.copy()
        found = one(network, given)
        assert (found.constant, found.shuffled) == (wanted.constant, wanted.shuffled)
        assert np.array_equal(given, x)

    def test_the_middle_has_a_rounding_of_its_own(self):
        """In float16 a border of large numbers hides nothing of what varies in the middle."""
        ramp = np.linspace(-0.1, 0.1, LENGTH)[None] * np.ones((LENGTH, 1))
        ramp[0] = 150

        def network(x):
            return (0 * x + ramp).astype(np.float16)

        assert one(network, images()).constant_middle > 0.99

    @pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 0.1), (0.1, 1), (3, 0), (0, 2)])
    @pytest.mark.parametrize("count", [1, 8])
    def test_of_a_mixture_are_its_share_of_the_variance(self, a, b, count):
        x, draws = images(count), 8
        row = one(lambda x: a * x + b * RAMP, x, draws=draws)
        content, position = a**2 * within(x), b**2 * RAMP.var()
        share = position / (position + content)
        assert row.constant == pytest.approx(share, abs=1e-12)
        # What is shuffled meets the ramp by chance, and itself in other draws: the standard
        # deviations of the mean products, exactly, of permutations of so many numbers.
        places = LENGTH**2 - 1
        ramp = 2 * np.sqrt(position * content / (places * count * draws))
        pairs = content / count * np.sqrt(2 / (places * draws * (draws - 1)))
        total = position + content
        assert abs(row.shuffled - share) <= SIGMAS * (ramp + pairs) / (total - SIGMAS * ramp) + 1e-9

    def test_of_the_middle_are_those_of_its_own_variances(self):
        x = images()
        row = one(lambda x: x + RAMP, x)
        cut = slice(LENGTH // 4, LENGTH - LENGTH // 4)
        # The content is less its mean over the image, not over the middle.
        content = x - x.mean((2, 3), keepdims=True)
        position, rest = RAMP[cut].var(), within(content[:, :, cut, cut])
        assert row.constant_middle == pytest.approx(position / (position + rest), abs=1e-12)

    def test_of_position_alone_are_one(self):
        row = one(lambda x: np.zeros_like(x) + RAMP[:, None] ** 2, images())
        numbers = row.constant, row.constant_middle, row.shuffled, row.shuffled_middle
        assert numbers == pytest.approx([1, 1, 1, 1], abs=1e-12)

    def test_of_a_padded_sum_are_those_of_its_border(self):
        """Each end sees two of three, so that of a constant m there is a step of -m at two ends."""
        x = images(8, 1, LENGTH)

        def network(x):
            padded = np.pad(x, ((0, 0), (0, 0), (1, 1)))
            return padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]

        mean, ends = x.mean(2, keepdims=True), 2 / LENGTH
        position = float(np.mean(mean**2)) * ends * (1 - ends)
        row = one(network, x)
        share = position / (position + within(network(x - mean)))
        assert row.constant == pytest.approx(share, abs=1e-12)
        assert row.constant_middle == 0
        assert row.shuffled > chance(8, 16) >= abs(row.shuffled_middle)
        assert (row.map != 0).tolist() == [True, *[False] * (LENGTH - 2), True]

    def test_chance_is_bounded_and_the_bound_reached(self):
        """By the two orders of two pixels, which vary as one: over all that four draws may be."""
        orders = [np.array([[[a, 1 - a]]]) for a in (0.0, 1.0)]
        found = []
        for drawn in itertools.product(orders, repeat=4):
            layer = _Layer(*orders, orders[1])
            for output in drawn:
                layer.add(output)
            found.append(layer.shuffled()[0])
        report = PositionReport((row("it", shape=(1, 1, 2)),), {}, 4)
        assert np.mean(found) == pytest.approx(0, abs=1e-12)
        assert np.std(found) == pytest.approx(report.chance)
        assert chance(1, 4) == pytest.approx(SIGMAS * report.chance)
        more = PositionReport((row("it", shape=(8, 1, 2)),), {}, 16)
        assert chance(8, 16) == pytest.approx(SIGMAS * more.chance)

    def test_the_estimate_has_no_bias(self):
        """Over all pairs of orders of three pixels its mean is the variance due to position."""
        x, own = np.array([0.0, 1.0, 5.0]), np.array([0.3, 0.0, -1.0])
        orders = [x[list(order)] for order in itertools.permutations(range(3))]
        outputs = [(own + order + own * order**2)[None, None] for order in orders]
        found = []
        for first, second in itertools.product(outputs, outputs):
            layer = _Layer(first, second, second)
            layer.add(first)
            layer.add(second)
            found.append(layer.shuffled()[0] * layer.totals[0] / 2)
        assert np.mean(found) == pytest.approx(np.mean(outputs, 0).var(), rel=1e-12)
        assert np.std(found) > 0.1

    def test_images_of_opposite_signs_do_not_hide_a_border(self):
        """Which the mean over all images does, as it is no function of position alone."""
        x = images(4)
        edge = np.abs(RAMP) == 1
        row = one(lambda x: np.where(edge, 0, x), np.concatenate([x, -x]), draws=32)
        assert row.constant > 0.1
        assert abs(row.shuffled) <= chance(8, 32)

    def test_of_a_stride_that_does_not_divide_a_circle(self):
        """The pixels beside the seam share an input that others do not, which a square shows."""

        def network(x):
            x = x - 0.5
            first = sum(np.roll(x, -i, 2) for i in range(3))[..., ::2]
            return {"first": first, "second": (first + np.roll(first, -1, 2)) ** 2}

        for length, seen in ((8, False), (9, True)):
            report = position_report(network, images(64, 1, length), draws=64)
            assert all(row.constant < 1e-20 for row in report.rows)
            assert abs(report["first"].shuffled) <= chance(64, 64)
            assert (report["second"].shuffled > chance(64, 64)) == seen

    @pytest.mark.parametrize(
        ("size", "middle"), [((8,), 1), ((3, 8), 0), ((2, 8), 0), ((1, 8), 1), ((4, 4, 4), 1)]
    )
    def test_the_middle_is_left_out_where_it_is_the_whole(self, size, middle):
        row = one(np.tanh, images(2, 1, *size))
        assert (row.constant_middle is not None) == (row.shuffled_middle is not None) == middle
        assert row.map.shape == size

    def test_what_rounding_leaves_of_the_middle_is_nothing(self):
        """In float32, 1e7 and a number below 1 is 1e7 or the next number."""
        edge = np.abs(RAMP) == 1
        row = one(lambda x: (1e7 + x + 1e3 * edge).astype(np.float32), images())
        assert row.constant > 0.99
        assert row.constant_middle == row.shuffled_middle == 0

    def test_the_same_seed_gives_the_same(self):
        first, again, other = (one(np.exp, images(), seed=seed) for seed in (3, 3, 4))
        assert first == again
        assert first != other

    def test_the_input_stays(self):
        x = images()
        before = x.copy()

        def network(x):
            x += 1
            return {"it": x}

        position_report(lambda x: network(x.copy()), x)
        assert np.array_equal(x, before)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_the_network_gets_the_type_of_the_input(self, dtype):
        seen = set()

        def network(x):
            seen.add(x.dtype)
            return x

        one(network, images().astype(dtype))
        assert seen == {np.dtype(dtype)}

    def test_shuffling_keeps_the_channels_of_a_pixel_together(self):
        x = images(2, 3)
        seen = []
        one(lambda x: (seen.append(x), x)[1], x, draws=2)
        _, constant, _, _, _, *shuffled = seen  # constant again, and two longer ones
        assert np.allclose(constant, x.mean((2, 3), keepdims=True))
        for array in shuffled:
            for image, before in zip(array, x, strict=True):
                rows, wanted = (sorted(each.reshape(3, -1).T.tolist()) for each in (image, before))
                assert rows == wanted
        orders = [image[0].ravel().argsort().tolist() for array in shuffled for image in array]
        assert len(set(map(tuple, orders))) == 4


class TestLeftOut:
    def test_each_with_its_reason(self):
        calls = itertools.count()

        def network(x):
            call = next(calls)
            last = np.moveaxis(x, 1, -1)
            nan = np.where(x > 0.5, np.nan, x)
            late = x if call < 5 else x[..., 1:]
            gone = {"gone": x} if call < 4 else {}
            dead = {"dead": x * 0, "rounding": (1e7 + x).astype(np.float32)}
            pooled = x.mean((2, 3), keepdims=True)
            tokens = last.reshape(len(x), -1, 1)
            attention = np.einsum("ncl,ncm->nclm", tokens[..., 0][:, None], tokens[..., 0][:, None])
            odd = {"weight": images(), "attention": attention}
            more = {"pool": pooled, "tokens": tokens, "last": last, "nan": nan, "late": late}
            return {
                "it": x,
                "index": x > 0.5,
                **more,
                **odd,
                **gone,
                **dead,
                "mean": pooled[:, :, 0, 0],
            }

        kinds = {"it": "Conv", "never": "Linear"}
        report = position_report(network, images(), kinds=kinds)
        assert [row.name for row in report.rows] == ["it"]
        shape = "not (N, C, *S) as the input's (8, 1, 16, 16)"
        axes = "of other axes than (N, C, *S), as images of twice the length show"
        changed = "not of the same shape for other values of the input"
        assert report.left_out == {
            "index": "of type bool",
            "tokens": shape,
            "pool": "of one position",
            "mean": shape,
            **dict.fromkeys(("last", "weight", "attention"), axes),
            "nan": "has NaN or infinities",
            "dead": "alike at all positions",
            "rounding": "alike at all positions",
            "late": changed,
            "gone": changed,
            "never": "no output was seen",
        }
        assert report.note == ""
        with pytest.raises(KeyError, match="pool: of one position"):
            report["pool"]
        with pytest.raises(KeyError, match="conv1: no layer of that name was seen"):
            report["conv1"]

    def test_a_network_of_one_size_is_not_checked(self):
        def network(x):
            if x.shape[2] != LENGTH:
                raise RuntimeError("want 16\nand no other")
            return {"it": x + RAMP}

        report = position_report(network, images())
        assert report.note.endswith("by images of twice the length: RuntimeError: want 16")
        assert report["it"].constant > 0.5

    def test_no_layer_at_all(self):
        with pytest.raises(ValueError, match=r"can be measured:\n  it: not \(N, C, \*S\)"):
            one(lambda x: x.mean((2, 3)), images())

    def test_the_layers_asked_for_are_the_rows(self):
        def network(x):
            return {"a": x, "b": 2 * x, "c": x.mean((2, 3))}

        options = {"kinds": {"a": "A", "never": "N"}}
        report = position_report(network, images(), layers=("c", "b"), **options)
        assert [row.name for row in report.rows] == ["b"]
        assert list(report.left_out) == ["c"]
        assert position_report(network, images(), layers="b").rows == report.rows
        for wrong in (["d", "a"], []):
            with pytest.raises(ValueError, match=r"layers has .*, but the outputs seen are: a, b"):
                position_report(network, images(), layers=wrong)

    def test_later_calls_and_parts_are_of_the_kind_of_their_module(self):
        def network(x):
            return {"relu": x, "relu#2": x + RAMP, "lstm[0]": x, "model output[logits]": x}

        kinds = {"relu": "ReLU", "lstm": "LSTM", "unused": "Linear"}
        report = position_report(network, images(), kinds=kinds)
        assert [row.kind for row in report.rows] == ["ReLU", "ReLU", "LSTM", ""]
        assert list(report.left_out) == ["unused"]


def test_a_function_that_names_nothing_is_refused():
    with pytest.raises(TypeError, match="run must return arrays by name, got a ndarray"):
        position_report(np.tanh, images())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"input": [[1.0]]}, TypeError, "input must be a floating-point array of NumPy, got list"),
        ({"input": np.ones((1, 1, 4), int)}, TypeError, "input must be .* got ndarray int64"),
        ({"input": np.ones((4, 4))}, ValueError, r"input must be \(N, C, \*S\) .*, got \(4, 4\)"),
        ({"input": np.ones((0, 1, 4))}, ValueError, r"input must be .*, got \(0, 1, 4\)"),
        ({"input": np.full((1, 1, 4), np.nan)}, ValueError, "input must be finite"),
        ({"input": np.ones((2, 3, 4))}, ValueError, "input must vary over positions"),
        ({"input": np.arange(6.0).reshape(2, 3, 1)}, ValueError, "input must vary over positions"),
        ({"draws": 1}, ValueError, "draws must be an integer of at least 2, got 1"),
        ({"draws": 2.0}, ValueError, r"draws must be an integer of at least 2, got 2\.0"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0, got -1"),
        ({"seed": None}, ValueError, "seed must be an integer of at least 0, got None"),
    ],
)
def test_what_is_refused_before_the_network_runs(change, error, match):
    def network(x):
        raise AssertionError("it ran")

    with pytest.raises(error, match=match):
        position_report(network, **{"input": images(), **change})


class TestTable:
    def test_fits_the_width_and_says_all(self):
        long = "backbone.encoder." * 4 + "conv1"
        rows = (row(long, "Conv" * 9, (16, 2048, 100, 100, 100)), row("relu", share=-0.0004))
        left = {f"head.{i}.fc": "of one position" for i in range(20)} | {"index": "of type int64"}
        text = str(PositionReport(rows, left, 16, "not checked: " + "long " * 30))
        lines = text.splitlines()
        assert max(map(len, lines)) <= 100
        assert "encoder.conv1  …" in lines[2]
        assert "ConvConv  16x2048x100x100x100" in lines[2]
        assert lines[3].split()[-4:] == ["0.0%", "-", "0.0%", "-"]
        assert "left out, of one position: head.0.fc, head.1.fc" in text
        assert "left out, of type int64: index" in text
        assert "not checked: long long" in text

    def test_json(self):
        report = PositionReport((row("a"),), {"b": "of one position"}, 16, "note")
        numbers = {"constant": 0.5, "constant_middle": None, "shuffled": 0.5}
        first = {"name": "a", "kind": "Conv2d", "shape": [2, 3, 8, 8], **numbers}
        assert json.loads(report.to_json()) == {
            "draws": 16,
            "rows": [first | {"shuffled_middle": None}],
            "left_out": {"b": "of one position"},
            "note": "note",
        }


class TestPicture:
    @pytest.mark.parametrize("size", [(9,), (6, 7), (4, 5, 6)])
    @pytest.mark.parametrize("layers", [1, 3, 60])
    def test_of_every_rank_and_depth(self, size, layers, tmp_path):
        pytest.importorskip("matplotlib")
        rows = tuple(row(f"block$x${i}" + ".conv" * 9, shape=(2, 3, *size)) for i in range(layers))
        PositionReport(rows, {}, 16).plot(tmp_path / "report.png")
        assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")

    def test_what_is_drawn(self, monkeypatch):
        figure = pytest.importorskip("matplotlib.figure")
        figures = []
        monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: figures.append(self))
        rows = (row("a", share=0.25, middle=0.125), row("b", share=0.75), row("c", share=0))
        plot(
            {"first": PositionReport(rows, {}, 16), "second": PositionReport(rows[:1], {}, 16)}, "x"
        )
        curves, _, second, _ = figures[0].axes
        drawn = {line.get_label(): list(line.get_ydata()) for line in curves.lines}
        assert set(drawn) == {
            f"{name}: {region}" for name in ("constant", "shuffled") for region in ("all", "middle")
        }
        assert drawn["shuffled: all"] == [25, 75, 0]
        assert drawn["constant: middle"][0] == 12.5
        assert np.isnan(drawn["constant: middle"][1:]).all()
        assert [tick.get_text() for tick in curves.get_xticklabels()] == ["a", "b", "c"]
        assert [axes.get_title(loc="left") for axes in (curves, second)] == ["first", "second"]
