"""The programs that clients can launch, by name or name@version: those installed here, and those that come with pie.

A path is never taken for a name: clients reach nothing on this machine's disk but what was installed.
"""

from __future__ import annotations

import asyncio
from typing import Any

from pie_core.program_store import InstalledProgram, ProgramStore
from pie_core.programs import ProgramSource, find_installable, shipped_programs, shipped_version
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
            *(
                {"name": name, "version": shipped_version(name), "shipped": True}
                for name in shipped_programs()
            ),
        ]

    def _find(self, inferlet: str) -> ProgramSource:
        return find_installable(inferlet, self._store)

    def _has(self, wanted: CheckProgram) -> bool:
        installed = self._store.find(wanted.name, wanted.version)
        if installed is None:
            is_shipped = wanted.version == shipped_version(wanted.name)
            return is_shipped and wanted.wasm_hash is wanted.manifest_hash is None
        return wanted.wasm_hash in (None, installed.content_hash) and wanted.manifest_hash in (
            None,
            installed.manifest_hash,
        )
