"""The commands ``weights`` and ``convert``, as a user meets them."""

import inspect
import json
import re
from dataclasses import asdict

import numpy as np
import pytest

from coordconv import convert, load_weights, networks, save_weights
from coordconv.weights import Weights, join_kernel, split_kernel


def initial(name):
    return Weights.of(networks.get(name), networks.initial_weights(name))


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


class TestWeights:
    def test_table_and_json(self, run, tmp_path):
        weights = initial("coord_cnn")
        weights["conv1.bias"][:2] = np.nan
        weights["conv1.bias"][2] = -np.inf
        path = tmp_path / "w.safetensors"
        save_weights(path, weights, {"trained_on": "squares"})
        shown = run("weights", path)
        assert shown.exit_code == 0
        assert re.search(r"conv4\.weight .* 64x66x3x3 .* float32 .* 38,016 ", shown.output)
        assert "not finite in conv1.bias: 2 NaN, 1 inf" in shown.output
        assert "coordinates of conv4: Coordinates('xy')" in shown.output
        assert "metadata: network: coord_cnn" in shown.output
        assert "metadata: trained_on: squares" in shown.output
        assert "parameters: 160,065" in shown.output
        table = [line for line in shown.output.splitlines() if "│" in line]
        assert max(map(len, table)) <= 80
        described = json.loads(json.dumps(asdict(convert.describe(path))))
        assert json.loads(run("weights", path, "--json", "-").stdout) == described

    def test_shows_what_a_terminal_would_obey(self, run, tmp_path):
        path = tmp_path / "w.safetensors"
        save_weights(path, {"\x1b[2J": np.ones(1)}, {"[bold]": "\x1b]0;title\x07\n"})
        shown = run("weights", path)
        assert shown.exit_code == 0
        assert "\x1b" not in shown.output
        assert "\x07" not in shown.output
        assert "[bold]" in shown.output

    def test_shows_whole_names(self, run, tmp_path):
        names = [f"backbone.blocks.{'inner.' * 9}conv{i}.weight" for i in range(2)]
        shape = (1,) * 12 + (1234567,)
        path = tmp_path / "w.safetensors"
        save_weights(path, {name: np.zeros(shape, np.float16) for name in names})
        rows = [line.split("│")[1:-1] for line in run("weights", path).output.splitlines()]
        columns = [
            "".join(map(str.strip, column)) for column in zip(*filter(None, rows), strict=True)
        ]
        assert columns[:3] == ["".join(names), "x".join(map(str, shape)) * 2, "float16" * 2]
        assert "…" not in "".join(columns)


@pytest.mark.parametrize("command", ["weights", "convert"])
def test_help_keeps_its_lines(run, command):
    from coordconv.cli import files

    shown = run(command, "--help").output
    for line in inspect.getdoc(getattr(files, command)).splitlines():
        assert f" {line} " in shown
    assert not re.search(r"Of (IN|OUT): One", shown)


class TestConvert:
    def test_warns_of_what_is_not_finite(self, run, tmp_path):
        source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
        weights = initial("coord_cnn")
        weights["conv1.bias"][0] = np.nan
        save_weights(source, dict(weights))  # which does not name the network
        shown = run("convert", source, target)
        assert shown.exit_code == 0, shown.output
        assert "warning: NaN or infinity in conv1.bias" in shown.stderr
        assert "coord_cnn, 160,065 parameters: " in shown.stdout
        with pytest.warns(UserWarning, match="NaN or infinity"):
            same(load_weights(target), weights)

    def test_names_formats_and_network(self, run, backend, tmp_path):
        source, target = tmp_path / "a.safetensors", tmp_path / "weights"
        weights = initial("coord_classifier")
        save_weights(source, weights)
        asked = ("convert", source, target, "--network", "coord_classifier", "--to", backend)
        shown = run(*asked)
        assert shown.exit_code == 0, shown.output
        if backend != "paddle":  # whose pickle is not read back
            back = tmp_path / "back.safetensors"
            assert run("convert", target, back, "--from", backend).exit_code == 0
            same(load_weights(back), weights)

    def test_coordinates_before_the_features(self, run, tmp_path):
        weights = initial("coord_cnn")
        coords = weights.coordinates["conv4"]
        first = join_kernel(*split_kernel(weights["conv4.weight"], coords), position="first")
        assert not np.array_equal(first, weights["conv4.weight"])
        source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
        save_weights(source, {**weights, "conv4.weight": first})
        shown = run("convert", source, target, "--network", "coord_cnn", "--position", "first")
        assert shown.exit_code == 0, shown.output
        same(load_weights(target), weights)
        assert run("convert", source, target, "--position", "middle").exit_code == 2

    def test_says_what_is_wrong_without_what_a_terminal_would_obey(self, run, tmp_path):
        path = tmp_path / "\x1b[2J.safetensors"
        save_weights(path, {"\x1b]0;title\x07\u202e[bold]": np.ones(1)})
        shown = run("convert", path, tmp_path / "out.safetensors", "--network", "coord_cnn")
        assert shown.exit_code == 2
        assert all(c.isprintable() or c == "\n" for c in shown.stderr)
        assert r"\x1b]0;title\x07\u202e[bold], shape (1,)" in shown.stderr
        assert r"\x1b[2J.safetensors: cannot import weights:" in shown.stderr
        assert len(shown.stderr.splitlines()) > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "a.safetensors", "a.safetensors"), "are the same file"),
        (("convert", "a.safetensors", "b.weird"), "name it (--from, --to or --format)"),
        (("convert", "a.weird", "b.safetensors"), "name it (--from, --to or --format)"),
        (("convert", "none.safetensors", "b.safetensors"), "No such file or directory"),
        (("convert", "a.safetensors", "none/b.safetensors"), "cannot write weights: No such file"),
        (("convert", "a.safetensors", "b.safetensors", "--to", "keras"), "got 'keras'"),
        (("convert", "a.safetensors", "b.safetensors", "--network", "x"), "got 'x'"),
        (
            ("convert", "a.safetensors", "b.safetensors", "--network", "coord_classifier"),
            "unexpected: linear1.weight",
        ),
        (("weights", "none.safetensors"), "No such file or directory"),
        (("weights", "a.weird"), "name it (--from, --to or --format)"),
        (("weights", "text.safetensors"), "not a safetensors file, or is damaged"),
    ],
)
def test_they_say_what_is_wrong(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_weights("a.safetensors", initial("coord_cnn"))
    (tmp_path / "text.safetensors").write_text("text, and no weights at all")
    shown = run(*arguments)
    assert shown.exit_code == 2
    assert shown.stderr.startswith("error: ")
    assert message in shown.stderr
    assert not (tmp_path / "b.safetensors").exists()
