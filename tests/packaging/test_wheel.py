"""The wheel is complete, claims no name of others, and runs where there is neither the checkout nor torch."""

from __future__ import annotations

import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.packaging.conftest import build_wheel, call
from tests.rules.source_tree import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DUMMY_CONFIG = "models:\n  - name: dummy\n    driver: {type: dummy}\n"


def plugin_files() -> list[Path]:
    """Sources and data, such as the checkpoint of the dummy driver."""
    found = (ROOT / "pie_plugins").rglob("*")
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]


def names_in(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with nothing but the wheel; its dependencies are borrowed from this one, without torch."""
    folder = tmp_path_factory.mktemp("environment")
    call([sys.executable, "-m", "venv", "--without-pip", folder], cwd=folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(python)]
    call([*pip, "install", "--no-deps", "--no-index", str(wheel)], cwd=folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "torch.py").write_text('raise ImportError("the core must run without torch")\n')
    # Folders named in a .pth file are searched last, and their own .pth files (our editable install) are not read.
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def pie(environment: Path, home: Path, *arguments: str | Path) -> str:
    return call([environment / "bin" / "pie", *arguments], cwd=home, PIE_HOME=str(home), PYTHONPATH="")


def test_the_wheel_claims_only_its_two_packages(wheel: Path) -> None:
    top_level = {name.split("/")[0] for name in names_in(wheel)}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"pie_core", "pie_plugins"}


def test_the_wheel_carries_what_a_checkout_has(wheel: Path) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pie_core").rglob("*.py")}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "pie_core/wit").glob("*.wit")}
    expected |= {path.relative_to(ROOT).as_posix() for path in plugin_files()}
    for folder in ("inferlets", "sdk/python"):
        sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
        assert sources, f"{folder} holds no sources"
        expected |= {f"pie_core/data/{name}" for name in sources}
    expected |= {"pie_core/py.typed", "pie_core/guests/python.wasm"}
    assert expected - names_in(wheel) == set()


def test_the_wheel_carries_nothing_that_was_left_lying_around(wheel: Path) -> None:
    assert not [name for name in names_in(wheel) if "__pycache__" in name or name.endswith((".pyc", ".orig"))]


def test_the_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    call([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path], cwd=ROOT)
    (archive,) = tmp_path.glob("*.tar.gz")
    call(["tar", "-xf", archive], cwd=tmp_path)
    rebuilt = build_wheel(tmp_path / archive.name.removesuffix(".tar.gz"), tmp_path)
    assert names_in(rebuilt) == names_in(wheel)


def test_the_installed_command_knows_its_version_and_its_health(environment: Path, tmp_path: Path) -> None:
    assert "0.1.0" in pie(environment, tmp_path, "--version")
    assert str(environment) in call(
        [environment / "bin" / "python", "-c", "import pie_core; print(pie_core.__file__)"], cwd=tmp_path
    )
    report = pie(environment, tmp_path, "doctor")
    assert "dummy" in report


def test_an_inferlet_runs_from_the_installed_wheel(environment: Path, tmp_path: Path) -> None:
    config = tmp_path / "dummy.yaml"
    config.write_text(DUMMY_CONFIG)
    assert pie(environment, tmp_path, "run", "helloworld", "-c", config).strip()
