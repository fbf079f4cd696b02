"""The JavaScript client in a real browser: a page of this machine talks to a live server."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.flow.server.conftest import Pie
from tests.flow.server.test_javascript_client import ECHO, workplace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

OnServer = Callable[..., Any]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

PAGE = """<!doctype html>
<script type="importmap">
{"imports": {
  "@pie-core/client": "/node_modules/@pie-core/client/dist/index.js",
  "#socket": "/node_modules/@pie-core/client/dist/socket-browser.js",
  "@msgpack/msgpack": "/node_modules/@msgpack/msgpack/dist.esm/index.mjs",
  "@noble/hashes/blake3.js": "/node_modules/@noble/hashes/blake3.js"
}}
</script>
<script type="module">
import { Client, NotFound } from "@pie-core/client";

async function talk() {
  const client = await Client.connect("URL", { username: "page" });
  const running = await client.launch("echo");
  await running.signal("hello");
  await running.closeInput();
  const events = [];
  for await (const event of running) {
    events.push([event.kind, event.value]);
  }
  const missing = await client.launch("nowhere").catch((error) => error instanceof NotFound);
  client.close();
  return { events, missing };
}

const result = await talk().catch((error) => ({ error: String(error) }));
await fetch("/result", { method: "POST", body: JSON.stringify(result) });
</script>
"""

__all__ = ["workplace"]  # the fixture


@pytest.fixture(scope="module")
def browser() -> str:
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    if not found:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)}")
    return found[0]


async def result_of(browser: str, page: str, modules: Path, profile: Path) -> Any:
    """Serves the page and the packages from one port, opens it, and waits for what it posts."""
    posted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def show(_: web.Request) -> web.Response:
        return web.Response(text=page, content_type="text/html")

    async def take(request: web.Request) -> web.Response:
        posted.set_result(json.loads(await request.text()))
        return web.Response()

    app = web.Application()
    app.add_routes([web.get("/", show), web.post("/result", take), web.static("/node_modules", modules)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ]
    quiet = asyncio.subprocess.DEVNULL
    address = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    process = await asyncio.create_subprocess_exec(
        browser, *flags, "--remote-debugging-port=0", address, stdout=quiet, stderr=quiet
    )
    try:
        return await asyncio.wait_for(posted, 120)
    finally:
        process.kill()
        await process.wait()
        await runner.cleanup()


def test_a_page_talks_to_a_program(
    on_server: OnServer, workplace: Path, browser: str, tmp_path: Path
) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("echo", ECHO)
        page = PAGE.replace("URL", pie.server.socket_url)
        result = await result_of(browser, page, workplace / "node_modules", tmp_path / "profile")
        assert result == {
            "events": [["stdout", "ready\n"], ["message", "HELLO"], ["return", {"heard": True}]],
            "missing": True,
        }

    on_server(scenario)
