"""Who gets in, what their keys are good for, and that they see their own only."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from pie_core.client import Client
from pie_core.errors import AccessDenied, Disconnected, LimitExceeded, NotFound, Unauthenticated
from pie_core.server import messages as m
from pie_core.server.credentials import (
    DEFAULT_SCOPES,
    SCOPES,
    add_api_key,
    add_public_key,
    remove,
)
from tests.flow.server.conftest import Pie
from tests.flow.server.wire import Wire, sample, wire

OnServer = Callable[..., Any]
GUARDED = [kind for kind in m.REQUESTS if kind.scope is not None]
AUTH = {"auth": "enabled: true"}


def key_of(pie: Pie, user: str, *scopes: str, tenant: str | None = None) -> str:
    """A fresh API key; a running server takes it at once."""
    return add_api_key(pie.credentials_file, user, "key", scopes or DEFAULT_SCOPES, tenant)


def signer_of(pie: Pie, user: str) -> ed25519.Ed25519PrivateKey:
    private = ed25519.Ed25519PrivateKey.generate()
    text = private.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    add_public_key(pie.credentials_file, user, "laptop", text.decode(), DEFAULT_SCOPES, None)
    return private


async def refused(connection: Wire, kind: type[m.Request], code: str) -> None:
    """Said with the corr_id where an answer to the message has one."""
    corr_id = 0 if kind is m.McpResponse else 7
    await connection.send(sample(kind))
    answer = await connection.receive()
    assert (answer["corr_id"], answer["ok"], answer["error_code"]) == (corr_id, False, code), kind


def test_every_message_needs_a_login(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with wire(pie.server.socket_url) as connection:
            for kind in GUARDED:
                await refused(connection, kind, "unauthenticated")
            assert not (await connection.ask("auth_by_token", token="pie-wrong"))["ok"]
            for kind in GUARDED:
                await refused(connection, kind, "unauthenticated")

    on_server(scenario, **AUTH)


def test_every_message_is_refused_once_the_key_is_revoked(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        key = key_of(pie, "alice", *SCOPES)
        async with wire(pie.server.socket_url) as connection:
            for kind in GUARDED:
                assert (await connection.ask("auth_by_token", token=key))["ok"]
                remove(pie.credentials_file, "alice", None)
                await refused(connection, kind, "unauthenticated")
                key = key_of(pie, "alice", *SCOPES)

    on_server(scenario, **AUTH)


def test_every_message_needs_its_scope(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        for scope in SCOPES:
            key = add_api_key(pie.credentials_file, "alice", scope, (scope,), None)
            async with wire(pie.server.socket_url) as connection:
                assert (await connection.ask("auth_by_token", token=key))["ok"]
                for kind in GUARDED:
                    if kind.scope != scope:
                        await refused(connection, kind, "access-denied")

    on_server(scenario, **AUTH)


def test_every_path_but_those_for_load_balancers_needs_a_key(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        routes = {**pie.server.http.routes, "/nothing": "run"}
        key, narrow = key_of(pie, "alice"), key_of(pie, "bob", "models")
        async with aiohttp.ClientSession(pie.server.url) as http:

            async def status(path: str, token: str | None, method: str = "GET") -> int:
                headers = {} if token is None else {"Authorization": f"Bearer {token}"}
                async with http.request(method, path, headers=headers) as answer:
                    assert answer.content_type == "application/json" or answer.ok
                    return answer.status

            for path, scope in routes.items():
                found = [await status(path, token) for token in (None, "pie-wrong", narrow, key)]
                expected = 404 if path == "/nothing" else 200
                assert found == ([200] * 4 if scope is None else [401, 401, 403, expected]), path
                assert await status(path, None, "POST") == (405 if scope is None else 401)
            remove(pie.credentials_file, "alice", "key")
            assert await status("/metrics", key) == 401
            assert await status("/", None) == 401  # no WebSocket
            async with http.get("/models") as answer:
                assert "/models needs an API key" in await answer.text()

    on_server(scenario, **AUTH)


def test_a_challenge_is_good_once_and_for_its_connection_only(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        private = signer_of(pie, "alice")

        def signed(challenge: dict[str, Any]) -> str:
            return base64.b64encode(private.sign(base64.b64decode(challenge["result"]))).decode()

        async with wire(pie.server.socket_url) as first, wire(pie.server.socket_url) as second:
            signature = signed(await first.ask("auth_identify", username="alice"))
            await second.ask("auth_identify", username="alice")
            assert (await second.ask("auth_prove", signature=signature))["error_code"] == "unauthenticated"
            assert (await first.ask("auth_prove", signature=signature))["ok"]
            assert (await first.ask("auth_prove", signature=signature))["error_code"] == "protocol"
            await first.ask("auth_identify", username="alice")
            assert (await first.ask("auth_prove", signature=signature))["error_code"] == "unauthenticated"
            assert (await first.ask("ping"))["error_code"] == "unauthenticated"

    on_server(scenario, **AUTH)


def test_a_challenge_expires(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        private = signer_of(pie, "alice")
        async with wire(pie.server.socket_url) as connection:
            challenge = (await connection.ask("auth_identify", username="alice"))["result"]
            signature = base64.b64encode(private.sign(base64.b64decode(challenge))).decode()
            answer = await connection.ask("auth_prove", signature=signature)
            assert (answer["error_code"], "older than" in answer["result"]) == ("unauthenticated", True)

    on_server(scenario, auth="enabled: true, challenge_s: 0.000001")


def test_nobody_learns_which_users_exist(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        signer_of(pie, "alice")
        async with wire(pie.server.socket_url) as connection:
            for user in ("alice", "nobody"):
                challenge = await connection.ask("auth_identify", username=user)
                assert challenge["ok"]
                assert len(base64.b64decode(challenge["result"])) == 48
                answer = await connection.ask("auth_prove", signature=base64.b64encode(b"x" * 64).decode())
                assert (
                    answer["result"].replace(user, "USER") == "no key of the user 'USER' made this signature"
                )

    on_server(scenario, **AUTH)


def test_guessing_is_slowed_down(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        key = key_of(pie, "alice")
        async with wire(pie.server.socket_url) as connection:
            codes = [
                (await connection.ask("auth_by_token", token=f"pie-{n}"))["error_code"] for n in range(5)
            ]
            assert codes == ["unauthenticated"] * 3 + ["limit-exceeded"] * 2
        with pytest.raises(LimitExceeded, match="too many failed attempts"):
            async with pie.client(api_key=key):
                pass

    on_server(scenario, auth="enabled: true, failures_per_minute: 3")


def test_a_revoked_key_ends_its_connections_and_leaves_the_processes(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install(
            "waits", "from inferlet import session\nasync def main(input):\n    await session.receive()\n"
        )
        key = key_of(pie, "alice")
        async with pie.client(api_key=key, reconnect=False) as client:
            process = await client.launch("waits")
            remove(pie.credentials_file, "alice", "key")
            with pytest.raises(Disconnected):
                await process.result()
        async with pie.client(api_key=key_of(pie, "alice")) as client:
            again = await client.attach(process.id)
            await again.close_input()
            assert await again.result() is None

    on_server(scenario, **AUTH)


def test_users_see_their_own_processes_only(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install(
            "waits", "from inferlet import session\nasync def main(input):\n    await session.receive()\n"
        )
        keys = key_of(pie, "alice"), key_of(pie, "bob")
        async with pie.client(api_key=keys[0]) as alice, pie.client(api_key=keys[1]) as bob:
            mine = await alice.launch("waits")
            assert await bob.processes(include_ended=True) == []
            for kind in (
                *("attach_process", "detach_process", "terminate_process", "close_input"),
                *("signal_process", "transfer_file"),
            ):
                fields = sample(next(each for each in m.REQUESTS if m.wire_name(each) == kind))
                del fields["type"], fields["corr_id"]
                with pytest.raises(NotFound, match="you have no process"):
                    await bob.request(kind, **{**fields, "process_id": mine.id})
            with pytest.raises(NotFound, match="you have no process"):
                await bob.query("process_status", mine.id)
            assert [each["id"] for each in await alice.processes()] == [mine.id]
            await mine.close_input()
            await mine.result()

    on_server(scenario, **AUTH)


SNAPSHOTS = """
    from inferlet import Context, Model

    async def main(input):
        if input["act"] == "save":
            context = Context(Model.load())
            context.user("a secret")
            await context.flush()
            context.save("mine")
            return None
        if input["act"] == "delete":
            Context.delete(Model.load(), "mine")
            return None
        return Context.open(Model.load(), "mine") is not None
"""


def test_snapshots_are_shared_within_a_tenant_only(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        pie.install("snapshots", SNAPSHOTS, parameters='act = {type = "string"}')
        tenants = {"alice": "research", "bob": None, "carol": "research"}
        keys = {user: key_of(pie, user, tenant=tenant) for user, tenant in tenants.items()}

        async def act(user: str, act: str) -> Any:
            async with pie.client(api_key=keys[user]) as client:
                return await client.run("snapshots", {"act": act})

        await act("alice", "save")
        assert await act("carol", "open")
        with pytest.raises(NotFound, match="mine"):
            await act("bob", "open")
        await act("carol", "delete")

    on_server(scenario, **AUTH)


def test_a_key_without_the_scope_is_told_which_it_needs(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        async with pie.client(api_key=key_of(pie, "alice", "run")) as client:
            with pytest.raises(AccessDenied, match="unload_model needs a key with the scope 'models'"):
                await client.unload_model("first")

    on_server(scenario, **AUTH)


def test_a_client_without_credentials_is_told_what_to_give(on_server: OnServer) -> None:
    async def scenario(pie: Pie) -> None:
        with pytest.raises(Unauthenticated, match="give api_key, or username and private_key"):
            async with Client(pie.server.socket_url):
                pass

    on_server(scenario, **AUTH)


@pytest.mark.parametrize(
    ("origin", "is_allowed"),
    [
        ("http://localhost:3000", True),
        ("https://chat.example.org", True),
        ("https://evil.example.org", False),
        ("null", False),
        ("http://[broken", False),
    ],
)
def test_a_web_page_connects_only_if_it_may(on_server: OnServer, origin: str, is_allowed: bool) -> None:
    async def scenario(pie: Pie) -> None:
        if is_allowed:
            async with wire(pie.server.socket_url, "alice", headers={"Origin": origin}) as connection:
                assert (await connection.ask("ping"))["ok"]
        else:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
                async with wire(pie.server.socket_url, headers={"Origin": origin}):
                    pass
            assert refusal.value.status == 403

    on_server(scenario, server='allowed_origins: ["https://chat.example.org"]')
