"""What every test shares: a backend that an environment promises must be there."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one of a process for each core, before NumPy is there
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import platform
import shutil
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

from coordconv.backends import BACKENDS, BackendInfo

# What an environment can promise: the backends, the command line, and a browser for the site.
PROMISES = {
    **BACKENDS,
    "cli": BackendInfo("cli", ("typer", "rich", "matplotlib"), ()),
    "browser": BackendInfo("browser", ("playwright",), ()),
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NO_BROWSER = (
    f"none of {', '.join(BROWSERS)} is there: install Debian's package chromium, or Google Chrome, "
    "or name one in COORDCONV_BROWSER"
)


def find_browser() -> str | None:
    """The path of a browser that Playwright can drive; none is downloaded."""
    named = os.environ.get("COORDCONV_BROWSER")
    return next(filter(None, map(shutil.which, (named,) if named else BROWSERS)), None)


def pytest_configure(config: pytest.Config) -> None:
    """Turn "backend missing" from a skip into a failure where COORDCONV_REQUIRE names it.

    Much of a JAX test's time is compilation: so XLA optimizes little, unless
    JAX_DISABLE_MOST_OPTIMIZATIONS is 0, and what one run compiled, the next one loads.
    """
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
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
        if name == "browser" and not find_browser():
            raise pytest.UsageError(f"COORDCONV_REQUIRE names {name!r}: {NO_BROWSER}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what tests counted, and keep the versions for docs/versions.py.

    The versions are kept where COORDCONV_VERSIONS says.
    """
    counted: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        counted.update({name: n for name, n in report.user_properties if isinstance(n, int)})
    if counted:
        terminalreporter.write_line(", ".join(f"{n} {name}" for name, n in counted.items()))
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


@pytest.fixture(scope="session")
def browser() -> str:
    """The path of the system's Chromium, skipped if there is none."""
    return find_browser() or pytest.skip(NO_BROWSER)
