"""Joins host functions to what a component imports, and makes the C callbacks through which guests reach them.

No exception leaves a callback: wasmtime would abort the process. An error becomes the function's WIT result where it
has one, and otherwise the end of that one guest.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import wasmtime
from wasmtime.component import Linker

from pie_core.errors import PieError, ProgramError, Unsupported
from pie_core.sandbox.converters import Converters, Refused, Writer, ok_kind_of, result_parts
from pie_core.sandbox.fibers import AsyncCallback, Destructor, LinkerNames, SyncCallback, new_error
from pie_core.sandbox.guest import Complete, CurrentGuest
from pie_core.sandbox.hosting import HostFunction, Interface, Pending
from pie_core.sandbox.memory import MEMORY
from pie_core.sandbox.quick_calls import (
    ARGUMENTS,
    RESULTS,
    QuickCalls,
    QuickFunction,
    Serve,
    largest_ok,
    masks_of,
)
from pie_core.sandbox.reflection import ComponentShape, ImportedInstance
from pie_core.sandbox.signatures import our_interfaces
from pie_core.sandbox.wasi import registry
from pie_core.sandbox.wasi.cli import ProgramExited
from pie_core.sandbox.wit_types import (
    Enum,
    Function,
    Handle,
    InterfaceSignature,
    ListOf,
    OptionOf,
    Record,
    ResultOf,
    same_function,
)

log = logging.getLogger(__name__)

OURS = "inferlet:api"


class HostFault(PieError):
    """A host function failed in a way that it did not mean to; the guest learns no more than that."""

    code = "internal"


Refuse = Callable[
    [Any, BaseException], Any
]  # (guest, error) -> the payload of the error side; raises if there is none


class HostLinker:
    """The host functions of one runtime; callbacks are made on first use and shared by all programs."""

    def __init__(
        self, interfaces: Iterable[Interface], current: CurrentGuest, quick: QuickCalls | None = None
    ) -> None:
        self._quick = quick
        self._hosts = {f"{interface.package}/{interface.name}": interface for interface in interfaces}
        self._wasi = {
            f"{interface.package}/{interface.name}": interface for interface in registry.IMPLEMENTED
        }
        self._current = current
        self._type_ids: dict[str, int] = {}
        self.converters = Converters(self._type_id)
        self._callbacks: dict[tuple[str, str], Any] = {}
        self._refusals: dict[tuple[str, str, str], Any] = {}
        self._destructor = _destructor(current)

    def link(self, engine: wasmtime.Engine, shape: ComponentShape, program: str) -> Linker:
        """A linker for a component of this shape. Raises ProgramError for what this host does not offer."""
        linker = Linker(engine)
        if shape.bare:
            raise ProgramError(
                f"{program} imports the function {shape.bare[0]!r} outside any interface: no host has it"
            )
        with linker.root() as root:
            for wanted in shape.imports:
                with LinkerNames(root, wanted.name) as names:
                    self._link_instance(names, wanted, program)
        return linker

    def _link_instance(self, names: LinkerNames, wanted: ImportedInstance, program: str) -> None:
        package = wanted.path.partition("/")[0]
        if wanted.asynchronous:
            raise ProgramError(
                f"{program} imports {wanted.name}.{min(wanted.asynchronous)} as an async func: this host serves plain "
                "functions, build it against pie's own WIT package"
            )
        if package == OURS:
            self._link_known(names, wanted, program, our_interfaces(), self._hosts)
        elif wanted.path in self._wasi:
            self._link_known(names, wanted, program, registry.wasi_interfaces(), self._wasi)
        elif package in registry.REFUSED:
            self._link_refused(names, wanted)
        elif wanted.functions or wanted.resources:
            offered = sorted([*our_interfaces(), *self._wasi, *(f"{name}/*" for name in registry.REFUSED)])
            raise ProgramError(
                f"{program} imports {wanted.name}, which this host does not offer; it offers {', '.join(offered)}"
            )

    def _link_known(
        self,
        names: LinkerNames,
        wanted: ImportedInstance,
        program: str,
        signatures: Any,
        hosts: dict[str, Interface],
    ) -> None:
        signature = signatures.get(wanted.path)
        if signature is None:
            raise ProgramError(
                f"{program} imports {wanted.name}, unknown here; known: {', '.join(sorted(signatures))}"
            )
        if not compatible(wanted.version, signature.version):
            raise ProgramError(f"{program} imports {wanted.name}; this host has version {signature.version}")
        for resource in wanted.resources:
            self._define_resource(names, wanted, resource, signature, program)
        for name, function in wanted.functions.items():
            ours = _check_function(program, wanted, name, function, signature)
            host = hosts[wanted.path].functions.get(ours.name) if wanted.path in hosts else None
            if host is None:
                raise ProgramError(
                    f"{program} imports {wanted.name}.{name}, which this build of pie does not implement"
                )
            self._link_function(names, wanted.path, name, ours, host)

    def _link_function(
        self, names: LinkerNames, path: str, name: str, function: Function, host: HostFunction
    ) -> None:
        callback = self._callback(path, function, host)
        if isinstance(callback, QuickFunction):
            names.native_function(name, callback.callback, callback.data)
        else:
            names.function(name, callback)

    def _define_resource(
        self,
        names: LinkerNames,
        wanted: ImportedInstance,
        resource: str,
        signature: InterfaceSignature,
        program: str,
    ) -> None:
        key = signature.resources.get(resource)
        if key is None:
            raise ProgramError(
                f"{program} imports the resource {wanted.name}.{resource}; "
                f"{signature.path} has {', '.join(signature.resources) or 'none'}"
            )
        names.resource(resource, self._type_id(key), self._destructor)

    def _link_refused(self, names: LinkerNames, wanted: ImportedInstance) -> None:
        for resource in wanted.resources:
            names.resource(resource, self._type_id(_refused_key(resource)), self._destructor)
        for name, wanted_function in wanted.functions.items():
            function = _with_key(wanted_function)
            key = (wanted.path, name, str(function))
            if key not in self._refusals:
                self._refusals[key] = self._sync_callback(
                    function, refusal_of(wanted.path, function), for_sandbox=True
                )
            names.function(name, self._refusals[key])

    def _type_id(self, resource: str) -> int:
        return self._type_ids.setdefault(resource or "unknown", len(self._type_ids) + 1)

    def _callback(self, path: str, function: Function, host: HostFunction) -> Any:
        key = (path, function.import_name)
        if key not in self._callbacks:
            for_sandbox = path in self._wasi
            make = self._async_callback if host.suspends else self._sync_callback
            masks = masks_of(function) if host.suspends and not for_sandbox else None
            if self._quick is not None and masks is not None:
                self._callbacks[key] = self._quick.function(
                    masks, self._served(function, host, masks), ok_kind_of(function)
                )
            else:
                self._callbacks[key] = make(function, host, for_sandbox)
        return self._callbacks[key]

    # --- callbacks -----------------------------------------------------------------------------------------------

    # Functions of host_api get the guest's state, those of the sandbox the guest.

    def _sync_callback(self, function: Function, host: HostFunction, for_sandbox: bool) -> Any:
        read = self.converters.arguments([kind for _, kind in function.params], host.arrays)
        write, write_error = self._result_writers(function)
        refuse = _refuser(self._current, function, host)
        current, call, can_fail = self._current, host.call, _has_error(function)

        def run(
            data: Any, context: Any, kind: Any, arguments: int, count: int, results: int, result_count: int
        ) -> int | None:
            guest: Any = current.guest
            try:
                try:
                    given = read(
                        arguments, guest
                    )  # whatever becomes of the call: it gives borrowed handles back
                    guest.calls_left -= 1
                    if guest.calls_left < 0 and can_fail:
                        guest.grant_calls()
                    subject = guest if for_sandbox else guest.state
                    write(results, call(subject, *given), guest)
                except BaseException as error:  # see the top
                    write_error(results, refuse(guest, error), guest)
            except BaseException:
                return new_error("the host refused the call")
            return None

        return SyncCallback(run)

    def _async_callback(self, function: Function, host: HostFunction, for_sandbox: bool) -> Any:
        read = self.converters.arguments([kind for _, kind in function.params], host.arrays)
        write, write_error = self._result_writers(function)
        refuse = _refuser(self._current, function, host)
        complete = _completer(write, write_error, refuse)
        current, call, can_fail = self._current, host.call, _has_error(function)

        def run(
            data: Any,
            context: Any,
            kind: Any,
            arguments: int,
            count: int,
            results: int,
            result_count: int,
            failure: int,
            continuation: int,
        ) -> None:
            guest: Any = current.guest
            try:
                MEMORY[continuation : continuation + 24] = guest.continuation  # or else wasmtime aborts
                guest.flag.value = 0
                try:
                    given = read(arguments, guest)
                    guest.calls_left -= 1
                    if guest.calls_left < 0 and can_fail:
                        guest.grant_calls()
                    subject = guest if for_sandbox else guest.state
                    answer = call(subject, *given)
                    if isinstance(answer, Pending):
                        if not answer.done:
                            guest.suspend(answer, complete, results)
                            return
                        complete(results, answer, guest)
                    else:
                        write(results, answer, guest)
                except BaseException as error:  # see the top
                    write_error(results, refuse(guest, error), guest)
                guest.flag.value = 1
            except BaseException:
                ctypes.c_uint64.from_address(failure).value = new_error("the host refused the call")

        return AsyncCallback(run)

    def _served(self, function: Function, host: HostFunction, masks: Sequence[int]) -> Serve:
        """What an async callback does, for a call that was noted down."""
        write, write_error = self._result_writers(function)
        refuse = _refuser(self._current, function, host)
        complete, call = _completer(write, write_error, refuse), host.call
        largest = largest_ok(function)
        places = [(ARGUMENTS + place, mask == 0) for place, mask in enumerate(masks)]

        def serve(guest: Any, record: Any) -> bool:
            results, objects = record[RESULTS], guest.handles.objects
            try:
                guest.calls_left -= 1
                if guest.calls_left < 0:
                    guest.grant_calls()
                answer = call(
                    guest.state, *[objects[record[at]] if held else record[at] for at, held in places]
                )
                if isinstance(answer, Pending):
                    if not answer.done:
                        guest.suspend(answer, complete, results, largest)
                        return False
                    complete(results, answer, guest)
                else:
                    write(results, answer, guest)
            except BaseException as error:  # see the top
                write_error(results, refuse(guest, error), guest)
            return True

        return serve

    def _result_writers(self, function: Function) -> tuple[Writer, Writer]:
        """(for the value, for the error side)."""
        result = function.result
        if isinstance(result, ResultOf):
            return result_parts(result, self.converters)
        if result is None:
            return _write_nothing, _write_nothing
        return self.converters.writer(result), _write_nothing


def _write_nothing(address: int, value: Any, owner: Any) -> None:
    """A function without a result."""


def _completer(write: Writer, write_error: Writer, refuse: Refuse) -> Complete:
    def complete(results: int, pending: Pending[Any], guest: Any) -> None:
        try:
            write(results, pending.value if pending.error is None else pending.result(), guest)
        except BaseException as error:  # see the top
            write_error(results, refuse(guest, error), guest)

    return complete


def _has_error(function: Function) -> bool:
    """Whether its callers can be told one of our errors."""
    side = function.result.err if isinstance(function.result, ResultOf) else None
    return isinstance(side, Record) and [name for name, _ in side.fields] == ["code", "message"]


def _refuser(current: CurrentGuest, function: Function, host: HostFunction) -> Refuse:
    """Turns an exception into the payload of the function's error side, or raises it as the guest's end."""
    has_side = isinstance(function.result, ResultOf)
    is_error = _has_error(function)
    shown = f"{host.call.__module__}.{getattr(host.call, '__name__', host.name)}"

    def refuse(guest: Any, error: BaseException) -> Any:
        if has_side and isinstance(error, Refused):
            return error.payload
        if is_error and isinstance(error, PieError):
            return (error.code, str(error))
        if not isinstance(error, Exception):
            current.interrupt = error
        elif not isinstance(error, (PieError, ProgramExited)):
            log.error("host function %s failed", shown, exc_info=error)
            error = HostFault(f"{type(error).__name__} in {host.name}; the server's log has the details")
            if is_error:
                return (error.code, str(error))
        guest.fail(error)
        raise error

    return refuse


def _destructor(current: CurrentGuest) -> Any:
    def drop(data: Any, context: Any, number: int) -> None:
        try:
            guest = current.guest
            if guest is not None:
                guest.handles.drop(number)
        except BaseException:
            log.exception("dropping handle %d", number)

    return Destructor(drop)


# --- matching ------------------------------------------------------------------------------------------------------


def compatible(wanted: str, offered: str) -> bool:
    """Semantic versions: the same major version, and below 1.0 the same minor version too."""
    wants, has = (version.split("-")[0].split(".") for version in (wanted, offered))
    return wants[:1] == has[:1] and (has[0] != "0" or wants[:2] == has[:2])


def _check_function(
    program: str, wanted: ImportedInstance, name: str, function: Function, signature: InterfaceSignature
) -> Function:
    ours = signature.functions.get(name)
    if ours is None:
        raise ProgramError(
            f"{program} imports {wanted.name}.{name}, which version {signature.version} here does not have; "
            f"it has {', '.join(signature.functions)}"
        )
    if not same_function(function, ours):
        raise ProgramError(f"{program} imports {wanted.name}.{name} as {function}; this host has {ours}")
    return ours


def _refused_key(resource: str) -> str:
    return registry.wasi_resources().get(resource, f"wasi:refused.{resource}")


def _with_key(function: Function) -> Function:
    if isinstance(function.result, Handle):
        return replace(function, result=Handle(_refused_key(function.result.resource), True))
    return function


class RefusedResource:
    """Stands where a guest insists on a handle before it can be refused anything, such as a network."""


def refusal_of(path: str, function: Function) -> HostFunction:
    """Answers every call with the package's own "access denied", with nothing, or with a handle that leads nowhere."""
    result = function.result

    def refuse(guest: Any, *arguments: Any) -> Any:
        if isinstance(result, ResultOf) and isinstance(result.err, Enum):
            raise Refused(
                next(
                    (code for code in registry.REFUSAL_CODES if code in result.err.cases), result.err.cases[0]
                )
            )
        if isinstance(result, ListOf):
            return []
        if isinstance(result, OptionOf):
            return None
        if isinstance(result, Handle):
            return RefusedResource()
        raise Unsupported(f"{path}.{function.name} is not available to programs on this host")

    return HostFunction(f"{path}.{function.name}", refuse, suspends=False, arrays=False)
