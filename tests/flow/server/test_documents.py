"""What docs/server.md shows is what runs."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pie_core.client import Client, Process
from pie_core.server.credentials import DEFAULT_SCOPES, SCOPES, add_api_key
from tests.flow.server.conftest import Pie
from tests.rules.source_tree import ROOT

PAGE = (ROOT / "docs/server.md").read_text()


def test_the_program_of_the_page_runs(on_server: Callable[..., Any], tmp_path: Path) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

    async def scenario(pie: Pie) -> None:
        (tmp_path / "alice.key").write_text(
            add_api_key(pie.credentials_file, "alice", "default", DEFAULT_SCOPES, None) + "\n"
        )
        assert "ws://127.0.0.1:8080" in source
        program = source.replace("ws://127.0.0.1:8080", pie.server.socket_url)
        run = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, cwd=tmp_path, stdout=asyncio.subprocess.PIPE
        )
        said, _ = await run.communicate()
        assert run.returncode == 0
        assert said.strip()

    on_server(scenario, auth="enabled: true")


def test_the_calls_of_the_page_exist() -> None:
    rows = re.findall(r"^\| (`.*`) \| ", PAGE.split("## Users")[0], re.MULTILINE)
    called = re.findall(r"(process\.)?(\w+)(?=\(|`)", " ".join(rows))
    names = {name for _, name in called} - {"after", "arguments", "process", "event"}
    assert len(names) > 15
    missing = [name for name in names if not hasattr(Client, name) and not hasattr(Process, name)]
    assert not missing


def test_the_page_lists_every_scope() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE.split("## Users")[1], re.MULTILINE) == list(SCOPES)
