"""Imports between the files of a program, straight from their text: a guest has no file system to import from."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import PurePosixPath
from types import ModuleType

from inferlet.errors import InferletError

PACKAGE_FILE = "__init__.py"
NAMES_OF_THE_SDK = frozenset({"inferlet", "inferlet_guest", "wit_world", "componentize_py_types"})


class SourceFinder(MetaPathFinder, InspectLoader):
    """Finds modules and packages among (path, text) pairs; names count from the entry file's folder."""

    def __init__(self, files: Mapping[str, str], entry: str) -> None:
        self._files = {str(PurePosixPath(path)): text for path, text in files.items()}
        self.entry = str(PurePosixPath(entry))
        self._root = PurePosixPath(self.entry).parent
        self._refuse_wrong_files()
        for path, text in self._files.items():
            linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)

    @property
    def paths(self) -> frozenset[str]:
        """Every file of the program, as tracebacks name it."""
        return frozenset(self._files)

    def execute_entry(self) -> ModuleType:
        """Runs the entry file as a module of its own name, found by `import` from then on."""
        name = PurePosixPath(self.entry).stem
        name = "__inferlet__" if _is_taken(name) else name
        spec = spec_from_loader(name, self, origin=self.entry)
        assert spec is not None
        module = ModuleType(name)
        module.__spec__, module.__loader__, module.__file__ = spec, self, self.entry
        sys.modules[name] = module
        self.exec_module(module)
        return module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        place = str(self._root.joinpath(*fullname.split(".")))
        if f"{place}/{PACKAGE_FILE}" in self._files:
            return self._spec(fullname, f"{place}/{PACKAGE_FILE}", package=place)
        if f"{place}.py" in self._files:
            return self._spec(fullname, f"{place}.py")
        if any(other.startswith(f"{place}/") and other.endswith(".py") for other in self._files):
            return _namespace(fullname, place)
        return None

    def _spec(self, name: str, path: str, package: str | None = None) -> ModuleSpec:
        spec = ModuleSpec(name, self, origin=path, is_package=package is not None)
        spec.has_location = True
        if package is not None:
            spec.submodule_search_locations = [package]
        return spec

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        path = module.__spec__.origin
        assert path is not None
        exec(compile(self._files[path], path, "exec", dont_inherit=True), module.__dict__)

    def get_source(self, fullname: str) -> str | None:
        spec = self.find_spec(fullname, None)
        return self._files.get(spec.origin or "") if spec is not None else None

    def get_data(self, path: str) -> bytes:
        """The content of a file of the program, for `pkgutil.get_data`."""
        found = self._files.get(str(PurePosixPath(path)))
        if found is None:
            raise FileNotFoundError(path)
        return found.encode()

    def _refuse_wrong_files(self) -> None:
        if self.entry not in self._files:
            raise InferletError(f"{self.entry}: not among the files {sorted(self._files)}", "program")
        for path in sorted(self.paths - {self.entry}):
            name = self._top_level_name(path)
            if name is not None and _is_taken(name):
                raise InferletError(
                    f"{path}: a module named {name!r} exists already; rename the file", "program"
                )

    def _top_level_name(self, path: str) -> str | None:
        place = PurePosixPath(path)
        if place.suffix != ".py" or not place.is_relative_to(self._root):
            return None
        return place.relative_to(self._root).with_suffix("").parts[0]


def _is_taken(name: str) -> bool:
    return name in sys.modules and (name in sys.stdlib_module_names or name in NAMES_OF_THE_SDK)


def _namespace(name: str, place: str) -> ModuleSpec:
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [place]
    return spec
