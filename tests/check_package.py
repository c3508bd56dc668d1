"""The package as it is published: built, checked, installed into empty environments, and run.

Not part of the ordinary run, since it builds and installs: tox's ``package`` environment names it.
"""

import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FRAMEWORKS = ("torch", "paddle", "jax", "flax")


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command away from the source tree, with nothing of ours on its path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0 or not check, f"{command} exited {done.returncode}:\n{done.stdout}"
    return done


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory, dist: dict[str, Path]) -> Path:
    """The folder of the programs of an environment that holds nothing but the wheel."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    install(programs, str(dist["wheel"]))
    return programs


def install(programs: Path, requirement: str) -> None:
    constraints = ("-c", ROOT / "constraints.txt")
    run(programs / "python", "-m", "pip", "install", *constraints, requirement, cwd=programs)


def test_sdist_has_what_its_tests_need(dist: dict[str, Path]) -> None:
    with tarfile.open(dist["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {
        str(path.relative_to(ROOT)).replace(os.sep, "/")
        for folder in ("coordconv", "tests", "docs")
        for path in (ROOT / folder).rglob("*.py")
    }
    usual = {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "tox.ini"}
    assert tracked | usual <= names
    site = {Path(name).suffix for name in names if name.startswith("docs/")}
    assert site == {".md", ".py", ".png", ".css", ".svg"}, "what a build made"


def test_wheel_has_the_package_and_nothing_else(dist: dict[str, Path]) -> None:
    with zipfile.ZipFile(dist["wheel"]) as archive:
        names = set(archive.namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "coordconv").rglob("*.py")}
    top = {name.partition("/")[0] for name in names}
    assert {name.replace(os.sep, "/") for name in modules} | {"coordconv/py.typed"} <= names
    assert {name.split("-")[0] for name in top} == {
        "coordconv",
        "coordconv_layers",
    }  # and its dist-info
    assert not any("tests" in name for name in names)


def test_metadata(dist: dict[str, Path]) -> None:
    with zipfile.ZipFile(dist["wheel"]) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        raw = archive.read(name)
    metadata = Metadata.from_email(raw, validate=True)
    assert metadata.name == "coordconv-layers"
    assert str(metadata.requires_python) == PROJECT["requires-python"]
    assert metadata.license_expression == "MIT"
    assert metadata.license_files == ["LICENSE"]
    assert metadata.description_content_type == "text/markdown"
    assert BytesParser().parsebytes(raw).get_payload(decode=True).decode() == (
        (ROOT / "README.md").read_text(encoding="utf-8")
    )
    always = {r.name for r in metadata.requires_dist or () if r.marker is None}
    assert always == {"numpy", "safetensors"}
    assert set(metadata.provides_extra or ()) == set(PROJECT["optional-dependencies"])


def pinned(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") for pin in found)
    return {pin.name: next(iter(pin.specifier)).version for pin in found}


def dependencies(*extras: str) -> list[Requirement]:
    optional = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in optional[extra])]
    return [each for line in lines if (each := Requirement(line)).name != PROJECT["name"]]


def test_every_direct_dependency_is_pinned() -> None:
    versions = pinned("constraints.txt")
    for requirement in dependencies(*PROJECT["optional-dependencies"]):
        assert requirement.specifier.contains(versions[requirement.name]), requirement


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    versions = pinned("constraints-oldest.txt")
    # Not for all: Paddle and Python set the lower bound of these two.
    versions |= {"safetensors": "0.4.0", "setuptools": "65"}
    for requirement in dependencies("torch", "paddle", "flax"):
        (lower,) = requirement.specifier
        assert lower.operator == ">="
        assert Version(lower.version) == Version(versions[requirement.name]), requirement


def test_bare_install_imports_without_a_framework(empty: Path, tmp_path: Path) -> None:
    code = (
        "import coordconv, sys; "
        "print(coordconv.__version__, coordconv.available_backends(), coordconv.__file__); "
        f"assert not set({FRAMEWORKS}) & set(sys.modules); "
        "assert coordconv.coordinate_grid((2, 3)).shape == (2, 2, 3)"
    )
    done = run(empty / "python", "-c", code, cwd=tmp_path)
    assert done.stdout.startswith(f"{version()} () ")
    assert str(empty.parent) in done.stdout


def test_command_of_a_bare_install_says_what_to_install(empty: Path, tmp_path: Path) -> None:
    for command in ((empty / "coordconv",), (empty / "python", "-m", "coordconv")):
        done = run(*command, "info", cwd=tmp_path, check=False)
        if done.returncode:  # without typer and rich it may do without them, or say what is missing
            assert "Traceback" not in done.stdout
            assert "coordconv-layers[cli]" in done.stdout


def test_info_with_the_command_line_extra(
    empty: Path, dist: dict[str, Path], tmp_path: Path
) -> None:
    install(empty, f"{dist['wheel']}[cli]")
    for command in ((empty / "coordconv",), (empty / "python", "-m", "coordconv")):
        done = run(*command, "info", cwd=tmp_path)
        for backend in ("torch", "paddle", "flax", "linen"):
            assert backend in done.stdout
        assert version() in done.stdout


def version() -> str:
    source = (ROOT / "coordconv" / "__init__.py").read_text()
    (line,) = (s for s in source.splitlines() if s.startswith("__version__"))
    return line.split('"')[1]
