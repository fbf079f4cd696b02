"""The fake host behind the real sandbox: every function of the WIT, answered by `fake_host`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pie_core.errors import error_from_code
from pie_core.sandbox.hosting import GuestState, Interface, Pending
from pie_core.sandbox.signatures import our_interfaces
from tests.sdk import fake_host

WORLDS = {"imports", "inferlet", "script-runtime", "types"}


class State:
    """What one guest prints."""

    name = "a test's guest"
    tenant = "a test's tenant"

    def __init__(self) -> None:
        self.chunks: list[str] = []
        self.errors = ""

    @property
    def printed(self) -> str:
        return "".join(self.chunks)

    def write_stdout(self, data: bytes) -> Pending[None] | None:
        self.chunks.append(data.decode())
        return None

    def write_stderr(self, data: bytes) -> Pending[None] | None:
        self.errors += data.decode()
        return None

    def close(self) -> None:
        """Nothing is open."""


def fake_interfaces() -> list[Interface]:
    """One for each interface of pie_core/wit."""
    made = []
    for path, signature in our_interfaces().items():
        name = path.split("/")[1]
        if name not in WORLDS:
            own = [resource for resource, key in signature.resources.items() if key.startswith(f"{path}.")]
            made.append(_interface(name, list(signature.functions), own))
    return made


def _interface(name: str, functions: list[str], resources: list[str]) -> Interface:
    interface = Interface(name)
    for resource in resources:
        interface.resource(resource, fake_host.CONTENTS[name][_class_name(resource)])
    for label in functions:
        spelled = label.removeprefix("[static]").removeprefix("[method]")
        interface.function(spelled)(_answering(_target(name, spelled)))
    return interface


def _target(interface: str, label: str) -> Callable[..., Any]:
    contents = fake_host.CONTENTS[interface]
    if label.startswith("[constructor]"):
        made: Callable[..., Any] = contents[_class_name(label.removeprefix("[constructor]"))]
        return made
    owner, _, method = label.rpartition(".")
    place = contents[_class_name(owner)] if owner else contents
    found: Callable[..., Any] = (
        getattr(place, method.replace("-", "_")) if owner else contents[label.replace("-", "_")]
    )
    return found


def _answering(target: Callable[..., Any]) -> Callable[..., Any]:
    def answer(guest: GuestState, *arguments: Any) -> Any:
        try:
            return target(*arguments)
        except fake_host.Err as refusal:
            raise error_from_code(refusal.value.code, refusal.value.message) from None

    return answer


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("-"))
