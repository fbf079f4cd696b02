"""The JavaScript client has every verb, event kind and error of the Python client, by the same names."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from pie_core.client import Client, Process
from pie_core.client.keys import PrivateKey
from pie_core.server import messages, status

SOURCES = Path(__file__).parents[2] / "sdk/javascript-client/src"

# What a language does in its own way: PrivateKey reads no files in a browser, and Process talks to its client.
OWN_WAY = {Client: {"installFile"}, Process: set(), PrivateKey: {"read"}}


def camel(name: str) -> str:
    return re.sub("_(.)", lambda match: match[1].upper(), name)


@pytest.mark.parametrize(("kind", "file"), [(Client, "client"), (Process, "process"), (PrivateKey, "keys")])
def test_every_public_method_is_there(kind: type, file: str) -> None:
    methods = {name for name, _ in inspect.getmembers(kind, inspect.isroutine) if not name.startswith("_")}
    wanted = {camel(name) for name in methods} - OWN_WAY[kind]
    found = set(
        re.findall(r"^  (?:static )?(?:async )?(\w+)\(", (SOURCES / f"{file}.ts").read_text(), re.MULTILINE)
    )
    assert wanted - found == set()


def test_every_kind_of_reply_is_read() -> None:
    text = (SOURCES / "messages.ts").read_text()
    for kind in messages.REPLIES:
        assert f'type: "{messages.wire_name(kind)}"' in text
        for field in kind.__struct_fields__:
            assert re.search(rf"\b{field}\??:", text), f"{kind.__name__}.{field}"


def test_every_part_of_a_status_has_the_same_fields() -> None:
    text = (SOURCES / "status.ts").read_text()
    for kind in status.PARTS:
        (body,) = re.findall(rf"^export type {kind.__name__} = {{(.*?)}};$", text, re.MULTILINE | re.DOTALL)
        assert tuple(re.findall(r"(\w+): ", body)) == kind.__struct_fields__


def test_it_speaks_the_same_version_in_chunks_of_the_same_size() -> None:
    text = (SOURCES / "messages.ts").read_text()
    assert f"PROTOCOL = {messages.PROTOCOL};" in text
    (chunk,) = re.findall(r"CHUNK_BYTES = (\d+) \* (\d+);", text)
    assert int(chunk[0]) * int(chunk[1]) == messages.CHUNK_BYTES
