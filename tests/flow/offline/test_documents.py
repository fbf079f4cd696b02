"""The Python of docs/offline-api.md runs as it stands there, and the manifest of docs/programs.md is one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pie_core.manifest import parse_manifest
from tests.rules.source_tree import ROOT


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_offline_api_is_used_as_its_page_shows(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = request.config.cache.mkdir("aot")
    settings = f"models: [{{name: dummy, driver: {{type: dummy}}}}]\nruntime: {{program_cache: '{cache}'}}\n"
    (tmp_path / "config.yaml").write_text(settings)
    monkeypatch.setenv("PIE_HOME", str(tmp_path))
    names: dict[str, Any] = {}
    for block in blocks("offline-api.md", "python"):
        exec(block, names)
    assert isinstance(names["answer"], str)
    assert names["value"] is None
    assert len(names["answers"]) == 4


def test_the_manifest_that_is_shown_is_good() -> None:
    (text,) = blocks("programs.md", "toml")
    manifest = parse_manifest(text)
    assert manifest.parameters["sentences"].default == 3
    assert manifest.capabilities.limits.memory_mb == 256
