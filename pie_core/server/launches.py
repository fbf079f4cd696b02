"""Programs that the programs of a server launch: processes like others, in the lists of whoever launched the first."""

from __future__ import annotations

from pie_core.host_api.guest_state import ProgramState
from pie_core.ids import ProcessId
from pie_core.processes.launches import StartedProgram
from pie_core.programs import ProgramSource
from pie_core.server.processes import ServerProcess
from pie_core.server.session import Service


class ServerPrograms:
    """Satisfies `processes.launches.ProgramHost`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def find(self, program: str) -> ProgramSource:
        return await self._service.programs.find(program)

    def start(self, parent: ProgramState, program: str, source: ProgramSource, given: str) -> StartedProgram:
        processes = self._service.processes
        principal = processes.of_program(parent).principal
        process = processes.launch(
            principal,
            program,
            source,
            given,
            keep_printed=False,
            priority=parent.priority,
            traceparent=parent.traceparent,
            parent=parent,
        )
        return _ServerProgram(process)


class _ServerProgram:
    def __init__(self, process: ServerProcess) -> None:
        self.process: ProcessId = process.id
        self._process = process

    async def result(self) -> str | None:
        return await self._process.result_as_json()

    def cancel(self) -> None:
        self._process.terminate("the program that launched it ended it")
