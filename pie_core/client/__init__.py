"""The Python client of a pie server.

    async with Client("ws://127.0.0.1:8080", api_key=key) as client:
        process = await client.launch("text-completion", {"prompt": "What is the capital of France?"})
        async for event in process:
            print(event.text, end="")
        print(await process.result())

`SyncClient` is the same without `async` and `await`.
"""

from __future__ import annotations

from pie_core.client.client import Client
from pie_core.client.keys import PrivateKey
from pie_core.client.process import Event, Process
from pie_core.client.synchronous import SyncClient, SyncProcess

__all__ = ["Client", "Event", "PrivateKey", "Process", "SyncClient", "SyncProcess"]
