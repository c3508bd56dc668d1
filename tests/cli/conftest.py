"""What the tests of the commands share: a runner, and the names of installed backends."""

import pytest

from coordconv import available_backends


@pytest.fixture
def run():
    """Run a command in this process; the result has exit_code, stdout, stderr and output."""
    pytest.importorskip("typer")
    pytest.importorskip("matplotlib")
    from typer.testing import CliRunner

    from coordconv.cli import app

    def invoke(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return invoke


@pytest.fixture
def first_backend():
    """The name of an installed backend; which one does not matter to the command."""
    if not available_backends():
        pytest.skip("no framework is installed")
    return available_backends()[0]


@pytest.fixture
def no_framework(run, monkeypatch):
    """Hide all frameworks from the commands."""
    from coordconv.cli import common

    monkeypatch.setattr(common, "available_backends", lambda: ())
