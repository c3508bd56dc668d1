"""What every test shares: a backend that an environment promises must be there."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one of a process for each core, before NumPy is there
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import platform
from importlib import metadata
from pathlib import Path

import pytest

from coordconv.backends import BACKENDS, BackendInfo

# What an environment can promise: the backends, and the command line.
PROMISES = {
    **BACKENDS,
    "cli": BackendInfo("cli", ("typer", "rich", "matplotlib"), ()),
}


def pytest_configure(config: pytest.Config) -> None:
    """Turn "backend missing" from a skip into a failure where COORDCONV_REQUIRE names it.

    Most of a JAX test's time is compilation: what one run compiled, the next one loads, in other
    environments, too.
    """
    if config.pluginmanager.has_plugin("cacheprovider"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    for name in filter(None, os.environ.get("COORDCONV_REQUIRE", "").split(",")):
        if name not in PROMISES:
            raise pytest.UsageError(f"COORDCONV_REQUIRE names {name!r}, want {list(PROMISES)}")
        if PROMISES[name].missing:
            raise pytest.UsageError(
                f"COORDCONV_REQUIRE names {name!r}, which needs {PROMISES[name].missing}"
            )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Keep what ran with which versions, for docs/versions.py, where COORDCONV_VERSIONS says."""
    kept = os.environ.get("COORDCONV_VERSIONS")
    if not kept or "PYTEST_XDIST_WORKER" in os.environ:  # which knows of its own part alone
        return
    versions = {"python": platform.python_version()}
    for name in ("numpy", "safetensors", "torch", "paddlepaddle", "jax", "flax"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    counts = {
        outcome: len(terminalreporter.stats.get(outcome, []))
        for outcome in ("passed", "failed", "error", "skipped")
    }
    Path(kept).parent.mkdir(parents=True, exist_ok=True)
    Path(kept).write_text(json.dumps({"versions": versions, "tests": counts}), encoding="utf-8")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend in turn, skipped if it is not installed."""
    if BACKENDS[request.param].missing:
        pytest.skip(f"{request.param} is not installed")
    return request.param
