"""The command line, as a user meets it."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from coordconv import available_backends, backends, cli, demo, load_weights, networks
from coordconv.parity import training

installed = pytest.mark.skipif(not available_backends(), reason="no framework is installed")


@pytest.fixture
def run():
    runner = CliRunner()

    def invoke(*arguments):
        return runner.invoke(cli.app, [str(a) for a in arguments])

    return invoke


@pytest.fixture
def no_framework(monkeypatch):
    monkeypatch.setattr(cli, "available_backends", lambda: ())


def test_help_lists_the_commands(run):
    shown = run("--help").output
    commands = "info summary weights convert parity exchange training demo"
    assert all(command in shown for command in commands.split())


def test_python_m_coordconv_is_the_same_command():
    command = [sys.executable, "-m", "coordconv", "summary", "plain_cnn", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout)["parameters"] == 158_913


def test_without_typer_it_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from coordconv.__main__ import main; main()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.strip() == "the coordconv command needs typer: pip install 'coordconv[cli]'"


class TestInfo:
    def test_names_every_backend_and_its_versions(self, run):
        shown = run("info")
        assert shown.exit_code == 0
        for name in backends.BACKENDS:
            assert name in shown.output
        for name in available_backends():
            for version in backends.BACKENDS[name].versions().values():
                assert version in shown.output

    def test_says_how_to_install_what_is_missing(self, run, monkeypatch):
        missing = backends.Backend("jumble", ("no_such_package",), (), "jumble")
        monkeypatch.setitem(backends.BACKENDS, "jumble", missing)
        assert "pip install 'coordconv[jumble]'" in run("info").output


class TestSummary:
    @pytest.mark.parametrize(
        ("name", "parameters", "sizes"),
        [
            ("coord_cnn", 160_065, (0.75, 26.09, 0.61, 27.45)),
            ("plain_cnn", 158_913, (0.75, 25.59, 0.61, 26.95)),
        ],
    )
    def test_the_articles_figures(self, run, name, parameters, sizes):
        found = json.loads(run("summary", name, "--batch", 64, "--json").output)
        assert found["parameters"] == parameters
        keys = ("input_mb", "forward_backward_mb", "parameters_mb", "total_mb")
        assert tuple(round(found[key], 2) for key in keys) == sizes

    def test_table_shows_a_coordconv_as_two_rows_and_fits_a_terminal(self, run):
        shown = run("summary", "coord_cnn").output
        assert re.search(r"conv4\.conv .* 64x66x7x7 .* 38,080", shown)
        assert re.search(r"conv4 .*CoordConv2d.* 64x64x7x7 .* 0 ", shown)
        assert "160,065" in shown
        assert max(map(len, shown.splitlines())) <= 80

    def test_bad_arguments(self, run):
        unknown = run("summary", "no_such_network")
        assert unknown.exit_code == 2
        assert "network must be one of plain_cnn" in unknown.output
        assert "batch must be at least 1, got 0" in run("summary", "coord_cnn", "--batch", 0).output


class TestParity:
    @installed
    def test_table_and_report(self, run, tmp_path):
        name = available_backends()[0]
        report = tmp_path / "new folder" / "parity.json"
        shown = run("parity", "--backends", name, "--cases", 4, "--json", report)
        assert shown.exit_code == 0
        assert re.search(rf"{name} .* 0 ", shown.output)
        assert json.loads(report.read_text())["ok"] is True

    @installed
    def test_exits_with_1_if_a_case_fails(self, run, monkeypatch):
        name = available_backends()[0]
        module = backends.load(name)
        evaluate = module.evaluate

        def wrong(*arguments):
            y, gradients = evaluate(*arguments)
            return y + 1, gradients

        monkeypatch.setattr(module, "evaluate", wrong)
        shown = run("parity", "--backends", name, "--cases", 3)
        assert shown.exit_code == 1
        assert "failed in " + name in shown.output
        assert "Case(network=" in shown.output

    def test_without_a_framework_says_what_to_install(self, run, no_framework):
        shown = run("parity")
        assert shown.exit_code == 2
        for extra in ("torch", "paddle", "flax"):
            assert f"pip install 'coordconv[{extra}]'" in shown.output

    def test_unknown_and_missing_backends(self, run, monkeypatch):
        shown = run("parity", "--backends", "torch,keras")
        assert shown.exit_code == 2
        missing = backends.Backend("torch", ("no_such_package",), (), "torch")
        monkeypatch.setitem(backends.BACKENDS, "torch", missing)
        shown = run("parity", "--backends", "torch")
        assert shown.exit_code == 2
        assert "needs no_such_package: pip install 'coordconv[torch]'" in shown.output

    @installed
    def test_a_report_that_cannot_be_written_is_said_before_the_work(self, run, tmp_path):
        (tmp_path / "file").write_text("")
        shown = run("parity", "--json", tmp_path / "file" / "parity.json")
        assert shown.exit_code == 2
        assert "cannot write to" in shown.output


class TestExchange:
    @installed
    def test_table_and_report(self, run, tmp_path):
        report = tmp_path / "new folder" / "exchange.json"
        shown = run("exchange", "--network", "coord_cnn", "--inputs", 3, "--json", report)
        assert shown.exit_code == 0, shown.output
        found = json.loads(report.read_text())
        assert found["ok"] is True
        assert len(found["pairs"]) == len(available_backends()) ** 2
        for name in available_backends():
            assert re.search(rf"{name} .* 0\.\d+, 3 ", shown.output)
        assert max(map(len, shown.output.splitlines())) <= 80

    @installed
    def test_exits_with_1_if_an_answer_differs(self, run, monkeypatch):
        name = available_backends()[0]
        module = backends.load(name)
        evaluate = module.evaluate
        monkeypatch.setattr(module, "evaluate", lambda *a: (evaluate(*a)[0] + 1, None))
        shown = run("exchange", "--backends", name, "--network", "coord_cnn", "--inputs", 1)
        assert shown.exit_code == 1

    @installed
    def test_unknown_network(self, run):
        shown = run("exchange", "--network", "coord_cnn,no_such_network")
        assert shown.exit_code == 2
        assert "network must be one of plain_cnn" in shown.output


class TestTraining:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        network = dataclasses.replace(networks.get("coord_classifier"), input_shape=(2, 9, 9))
        task = training.Task(network, "adam", 0.001, epsilon=1e-4)
        monkeypatch.setattr(training, "TASKS", (task,))

    @installed
    def test_table_picture_and_report(self, run, tmp_path):
        name = available_backends()[0]
        picture, report = tmp_path / "new folder" / "losses.png", tmp_path / "training.json"
        asked = ("--steps", 20, "--out", picture, "--json", report)
        shown = run("training", "--backends", name, *asked)
        assert shown.exit_code == 0, shown.output
        assert "coord_classifier 9x9, adam" in shown.output
        assert re.search(rf"{name} .* [\d.]+ .* [\d.e-]+ ", shown.output)
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert list(json.loads(report.read_text())["outcomes"][0]["errors"]) == ["10", "20"]

    @installed
    def test_exits_with_1_and_names_the_weight(self, run, monkeypatch, tmp_path):
        name = available_backends()[0]
        module = backends.load(name)
        trainer = module.trainer

        def wrong(*arguments):
            step, export = trainer(*arguments)
            return lambda x, target, rate: step(x, target, 1.01 * rate), export

        monkeypatch.setattr(module, "trainer", wrong)
        picture = tmp_path / "losses.png"
        shown = run("training", "--backends", name, "--steps", 10, "--out", picture)
        assert shown.exit_code == 1
        assert f"failed in {name}: coord_classifier 9x9, adam: conv" in shown.output
        assert picture.exists()


class TestDemo:
    def test_positions_are_the_papers(self):
        data = demo.positions()
        assert len(data.labels) == 3_136
        assert len(np.unique(data.labels)) == 3_136
        assert len(data.trained) == 2_509
        assert set(data.trained).isdisjoint(data.held_out)
        rows, columns = data.labels // 64, data.labels % 64
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 59, 4, 59)
        for found, pixels in zip(data.coordinates.T, (columns, rows), strict=True):
            assert np.array_equal(found, ((2 * pixels - 63) / 63).astype(np.float32))

    def test_inputs_tile_the_position(self):
        data = demo.positions()
        x = data.inputs(np.array([7]), (64, 64))
        assert x.shape == (1, 2, 64, 64)
        assert (x == data.coordinates[7].reshape(1, 2, 1, 1)).all()

    def test_conv_has_at_least_as_many_parameters(self):
        counts = [networks.summary(n).parameters for n in ("coord_classifier", "deconv_classifier")]
        assert counts[0] <= counts[1]

    @installed
    def test_a_short_run_writes_weights_and_a_picture_and_says_that_it_fell_short(
        self, run, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(cli, "DEMO_SECONDS", 0.5)
        whole, few = demo.positions(), np.arange(224)  # to run in every backend
        data = demo.Positions(whole.coordinates[few], whole.labels[few], few[:112], few[112:])
        monkeypatch.setattr(demo, "positions", lambda seed: data)
        shown = run("demo", "--out", tmp_path / "out")
        assert shown.exit_code == 1  # half a second is not enough to learn
        assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
        weights = load_weights(tmp_path / "out" / "coord_classifier.safetensors")
        assert weights.keys() == networks.get("coord_classifier").weight_shapes().keys()
        for name in available_backends():  # half-trained, two logits may be equal but for rounding
            (others,) = re.findall(rf"│ {name}\b.*│ +(\d+) +│", shown.output)
            assert int(others) < len(few) / 2

    @installed
    def test_a_folder_that_cannot_be_written_is_said_before_training(self, run, tmp_path):
        (tmp_path / "file").write_text("")
        shown = run("demo", "--out", tmp_path / "file" / "out")
        assert shown.exit_code == 2
        assert "cannot write to" in shown.output
        assert "training" not in shown.output

    def test_without_a_framework_says_what_to_install(self, run, no_framework, tmp_path):
        shown = run("demo", "--out", tmp_path)
        assert shown.exit_code == 2
        assert "pip install 'coordconv[torch]'" in shown.output
