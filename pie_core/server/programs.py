"""The programs that clients can launch, by name or name@version: those installed here, and those that come with pie.

A path is never taken for a name: clients reach nothing on this machine's disk but what was installed.
"""

from __future__ import annotations

import asyncio
from typing import Any

from pie_core import __version__
from pie_core.errors import NotFound
from pie_core.naming import unknown
from pie_core.program_store import InstalledProgram, ProgramStore, split_label
from pie_core.programs import ProgramSource, find_program, shipped_programs
from pie_core.server.messages import AddProgram, CheckProgram


class Programs:
    """What is installed goes before what is shipped. File work happens on threads."""

    def __init__(self, store: ProgramStore) -> None:
        self._store = store

    async def find(self, inferlet: str) -> ProgramSource:
        """Raises NotFound that names the nearest, or ProgramError."""
        return await asyncio.to_thread(self._find, inferlet)

    async def has(self, wanted: CheckProgram) -> bool:
        """By name and version, and by content where the client gives hashes."""
        return await asyncio.to_thread(self._has, wanted)

    async def add(self, content: bytes, announced: AddProgram) -> InstalledProgram:
        """Raises ProgramError."""
        return await asyncio.to_thread(
            self._store.add_content,
            content,
            announced.manifest or None,  # an artifact brings its own
            expected_hash=announced.program_hash,
            overwrite=announced.force_overwrite,
            source="the upload",
        )

    async def remove(self, name: str, version: str) -> None:
        await asyncio.to_thread(self._store.remove, name, version)

    async def listing(self) -> list[dict[str, Any]]:
        """What is installed and, last, what is shipped."""
        installed = await asyncio.to_thread(self._store.installed)
        found = [
            {"name": each.name, "version": each.version, "hash": each.content_hash} for each in installed
        ]
        return [
            *found,
            *({"name": name, "version": __version__, "shipped": True} for name in shipped_programs()),
        ]

    def _find(self, inferlet: str) -> ProgramSource:
        name, version = split_label(inferlet)
        installed = self._store.find(name, version)
        if installed is not None:
            return self._store.open(installed)
        if name in shipped_programs() and version in (None, __version__):
            return find_program(name)
        known = {*shipped_programs(), *(each.name for each in self._store.installed())}
        if name in known:
            raise NotFound(
                f"there is no version {version} of the program {name}; list_programs names those there are"
            )
        raise NotFound(unknown("program", inferlet, known))

    def _has(self, wanted: CheckProgram) -> bool:
        installed = self._store.find(wanted.name, wanted.version)
        if installed is None:
            is_shipped = wanted.name in shipped_programs() and wanted.version == __version__
            return is_shipped and wanted.wasm_hash is wanted.manifest_hash is None
        return wanted.wasm_hash in (None, installed.content_hash) and wanted.manifest_hash in (
            None,
            installed.manifest_hash,
        )
