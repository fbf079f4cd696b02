"""What a user of the published client `pie-client` 0.4.0 does; run by test_published_client.py beside that package.

Arguments: the server's URL, the private key, and the files of a component and an artifact, each with its manifest.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from pie_client import Event, ParsedPrivateKey, PieClient  # type: ignore[import-not-found]  # installed by the test


async def events_of(process: Any) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    while not found or found[-1][0] not in ("return", "error"):
        event, value = await process.recv()
        found.append((event.value, value))
    return found


async def main(
    url: str, key: str, component: str, component_toml: str, artifact: str, artifact_toml: str
) -> None:
    async with PieClient(url) as client:
        await client.authenticate("alice", ParsedPrivateKey.from_file(key))
        await client.ping()
        await programs(client, component, component_toml, artifact, artifact_toml)
        await processes(client)
        await refusals(client)
    async with PieClient(url) as client:
        await client.authenticate("alice", ParsedPrivateKey.from_file(key))
        await attaching(client)


async def programs(
    client: Any, component: str, component_toml: str, artifact: str, artifact_toml: str
) -> None:
    assert not await client.check_program("returns@0.1.0")
    await client.install_program(component, component_toml)
    assert await client.check_program("returns@0.1.0", component, component_toml)
    assert not await client.check_program("returns@0.1.0", artifact, component_toml)
    await client.install_program(artifact, artifact_toml)
    await client.install_program(artifact, artifact_toml, force_overwrite=True)


async def processes(client: Any) -> None:
    process = await client.launch_process("returns@0.1.0", input={"n": 0})
    assert await process.recv() == (Event.Return, '{"n":0}')
    results = await client.run_processes("returns@0.1.0", [{"n": 1}, {"n": 2}])
    assert results == ['{"n":1}', '{"n":2}']
    many = await client.launch_processes("returns@0.1.0", [{"n": 3}, {"n": 4}])
    assert [await each.recv() for each in many] == [(Event.Return, '{"n":3}'), (Event.Return, '{"n":4}')]

    process = await client.launch_process("talks@1.0.0")
    assert await process.recv() == (Event.Stdout, "ready\n")
    await process.signal("hello")
    await process.transfer_file(bytes(range(256)) * 2048)
    assert await events_of(process) == [
        ("message", "HELLO"),
        ("file", (bytes(range(256)) * 2048)[::-1]),
        ("return", "done"),
    ]


async def refusals(client: Any) -> None:
    refusal = ""
    try:
        await client.launch_process("nothing@9.9.9")
    except Exception as error:  # the published client raises nothing more precise
        refusal = str(error)
    assert "unknown program" in refusal
    assert await client.query("no such subject", "") == (
        False,
        "nothing is known about 'no such subject'; ask for model_status or process_status",
    )
    ok, status = await client.query("model_status", "")
    assert ok
    assert "first.kv_pages_total" in status


async def attaching(client: Any) -> None:
    process = await client.launch_process("talks@1.0.0", capture_outputs=True)
    (listed,) = await client.list_processes()
    assert (listed["id"], listed["username"], listed["program"]) == (
        process.process_id,
        "alice",
        "talks@1.0.0",
    )
    again = await client.attach_process(process.process_id)
    await again.terminate()
    assert (await events_of(again))[-1] == ("error", "its client ended it")


asyncio.run(main(*sys.argv[1:]))
