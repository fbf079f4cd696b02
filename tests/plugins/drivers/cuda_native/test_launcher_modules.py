"""Extension modules of one name, loaded by several threads, as Triton does with what launches kernels."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pie_plugins.drivers.cuda_native.launcher_modules import keep_apart, unshared

NAME, FILES, LOADS, THREADS = "pie_test_launcher", 6, 120, 8
SOURCE = """
#include <Python.h>
static PyObject *launch(PyObject *self, PyObject *arguments) { return PyLong_FromLong(NUMBER); }
static PyMethodDef METHODS[] = {{"launch", launch, METH_VARARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "pie_test_launcher", NULL, -1, METHODS};
PyMODINIT_FUNC PyInit_pie_test_launcher(void) { return PyModule_Create(&MODULE); }
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Paths of modules whose `launch` returns their place."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    headers = sysconfig.get_paths()["include"]
    if compiler is None or not Path(headers, "Python.h").exists():
        pytest.skip("needs a C compiler and Python's headers")
    paths = []
    for place in range(FILES):
        folder = tmp_path_factory.mktemp("launcher")
        source, target = folder / "launcher.c", folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
        source.write_text(SOURCE)
        command = [
            compiler,
            "-shared",
            "-fPIC",
            f"-DNUMBER={place}",
            f"-I{headers}",
            str(source),
            "-o",
            str(target),
        ]
        subprocess.run(command, check=True)
        paths.append(str(target))
    return paths


def load(name: str, path: str) -> ModuleType:
    """As Triton loads what it built."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launches_of_others(load: Callable[[str, str], Any], paths: list[str]) -> int:
    """How many loads by threads end in the function of another file."""

    def is_wrong(number: int) -> bool:
        place = number * 5 % FILES
        module = load(NAME, paths[place])
        return bool(module.launch() != place)

    with ThreadPoolExecutor(THREADS) as threads:
        return sum(threads.map(is_wrong, range(LOADS)))


def test_modules_of_one_name_are_shared_and_unshared_ones_are_not(built: list[str]) -> None:
    first, second = load(NAME, built[0]), load(NAME, built[1])
    assert load(NAME, built[0]) is second, "what is worked around: drop it once this fails on every Python"
    assert (first.launch(), second.launch()) == (0, 0)
    alone = unshared(load)
    first, second = alone(NAME, built[0]), alone(NAME, built[1])
    alone(NAME, built[0])
    assert (first.launch(), second.launch()) == (0, 1)


def test_threads_get_the_launcher_that_they_load(built: list[str]) -> None:
    assert launches_of_others(unshared(load), built) == 0


def test_what_loads_is_mended_once_and_its_absence_is_fine(built: list[str]) -> None:
    build = SimpleNamespace(_load_module_from_path=load)
    keep_apart(build)
    mended = build._load_module_from_path
    keep_apart(build)
    assert build._load_module_from_path is mended is not load
    assert launches_of_others(mended, built) == 0
    keep_apart(SimpleNamespace())


def test_importing_the_kernels_mends_triton() -> None:
    build = pytest.importorskip("triton.runtime.build")
    pytest.importorskip("pie_plugins.drivers.cuda_native.triton_launches")
    load = getattr(build, "_load_module_from_path", None)
    assert load is None or hasattr(load, "__wrapped__")
