"""The command as a whole, ``info`` and ``summary``, as a user meets them."""

import json
import re
import subprocess
import sys

import pytest

from coordconv import available_backends, backends

COMMANDS = ("info", "summary", "weights", "convert", "parity", "exchange", "training", "demo")


def test_help_lists_the_commands(run):
    shown = run("--help").output
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run, command):
    shown = run(command, "--help")
    assert shown.exit_code == 0
    assert max(map(len, shown.output.splitlines())) <= 80
    assert "--way" not in shown.output  # for developers alone


def test_python_m_coordconv_is_the_same_command():
    pytest.importorskip("typer")
    command = [sys.executable, "-m", "coordconv", "summary", "plain_cnn", "--json", "-"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout)["parameters"] == 158_913


def test_without_typer_it_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from coordconv.__main__ import main; main()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1
    assert (
        found.stderr.strip()
        == "the coordconv command needs typer: pip install 'coordconv-layers[cli]'"
    )


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
        missing = backends.BackendInfo("jumble", ("no_such_package",), (), ("jumble>=1",))
        monkeypatch.setitem(backends.BACKENDS, "jumble", missing)
        assert "pip install 'jumble>=1'" in run("info").output

    def test_names_the_other_coordconv(self, run, monkeypatch):
        monkeypatch.setattr(backends, "other_coordconv", lambda: "another is here")
        assert "another is here" in run("info").output


class TestSummary:
    @pytest.mark.parametrize(
        ("name", "parameters", "sizes"),
        [
            ("coord_cnn", 160_065, (0.75, 26.09, 0.61, 27.45)),
            ("plain_cnn", 158_913, (0.75, 25.59, 0.61, 26.95)),
        ],
    )
    def test_the_articles_figures(self, run, name, parameters, sizes):
        found = json.loads(run("summary", name, "--batch", 64, "--json", "-").stdout)
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


class TestJson:
    """The convention of ``--json``, on the command that needs the least."""

    def test_on_standard_output_it_is_alone_and_the_table_is_on_standard_error(self, run):
        shown = run("summary", "plain_cnn", "--json", "-")
        assert json.loads(shown.stdout)["network"] == "plain_cnn"
        assert "conv1" in shown.stderr

    def test_in_a_file_whose_folder_need_not_exist_beside_the_table(self, run, tmp_path):
        file = tmp_path / "new folder" / "summary.json"
        shown = run("summary", "plain_cnn", "--json", file)
        assert shown.exit_code == 0
        assert json.loads(file.read_text())["network"] == "plain_cnn"
        assert "conv1" in shown.stdout
        assert not shown.stderr
        alone = run("summary", "plain_cnn", "--json", "-").stdout
        assert alone.rstrip("\n") == file.read_text()

    def test_a_folder_in_the_place_of_the_file(self, run, tmp_path):
        shown = run("summary", "plain_cnn", "--json", tmp_path)
        assert shown.exit_code == 2
        assert "it is a folder; name a file in it" in shown.stderr
        assert not shown.stdout

    def test_a_file_in_the_place_of_a_folder(self, run, tmp_path):
        (tmp_path / "file").write_text("")
        shown = run("summary", "plain_cnn", "--json", tmp_path / "file" / "summary.json")
        assert shown.exit_code == 2
        assert "cannot write to" in shown.stderr
        assert not shown.stdout
