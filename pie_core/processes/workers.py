"""The worker processes: each new program goes to the one that runs the fewest, and one that is lost is replaced.

What a program is sent stays here until it asks for it, and what it says comes here, so that clients notice nothing of
workers; when one dies, its programs end with WorkerLost and those of others go on.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pie_core.contracts.driver import Progress, ProgressCallback
from pie_core.errors import PieError, WorkerLost, error_from_code
from pie_core.host_api.guest_state import ProgramState
from pie_core.ids import ModelName, ProcessId
from pie_core.processes.child import Child
from pie_core.processes.messages import Loading
from pie_core.processes.pauses import Pauses
from pie_core.processes.remote_launches import LaunchesOf
from pie_core.processes.worker_messages import (
    AddModel,
    CancelLaunched,
    Counts,
    ForgetLaunched,
    FromWorker,
    Input,
    Launch,
    LaunchProgram,
    ModelAdded,
    Prepare,
    Prepared,
    Raised,
    Reached,
    ReadCounts,
    RemoveModel,
    Returned,
    Said,
    StartWorker,
    Stop,
    Taken,
    Wanted,
)
from pie_core.programs import ComponentProgram, ProgramSource
from pie_core.sandbox.hosting import Pending
from pie_core.sandbox.limits import Limits

_log = logging.getLogger(__name__)

_MODULE = "pie_core.processes.worker"
_TURN_DEADLINE_S = 60.0  # guests give way after milliseconds; a worker that does not turn for so long hangs
_CLOSING_S = 5.0
_COUNTS = "?"  # the key of an answer, where others have the name of a model
_STOPPING_S = 5.0


@dataclass(slots=True)
class Run:
    """A program in a worker, as its client sees it."""

    name: str
    state: ProgramState
    value: asyncio.Future[str | None]
    asked: list[Pending[Any]]
    launches: LaunchesOf

    async def ended(self, patience_s: float) -> None:
        """Returns once the worker has cleaned up behind it, or when that takes too long."""
        await asyncio.wait((self.value,), timeout=patience_s)
        if self.value.done():
            self.value.exception()  # that it was ended is no news

    def settle(self, value: str | None) -> None:
        if not self.value.done():
            self.value.set_result(value)

    def fail(self, error: PieError) -> None:
        if not self.value.done():
            self.value.set_exception(error)


class Worker:
    """One worker process and its programs."""

    def __init__(self, died: Callable[[Worker, str], None], progress: ProgressCallback) -> None:
        self._loop = asyncio.get_running_loop()
        self._progress = progress
        self._child = Child(_MODULE, FromWorker, self._hear, lambda reason: died(self, reason))
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self.engines: dict[str, int] = {}  # process of the last one that took it in, by where it listens
        self.runs: dict[ProcessId, Run] = {}

    @property
    def pid(self) -> int:
        return self._child.pid

    async def start(self, start: StartWorker) -> None:
        await self._child.start()
        self._child.deadline_s = _TURN_DEADLINE_S
        self._child.send(start)

    async def end(self, patience_s: float) -> None:
        await self._child.end(patience_s)

    async def add_model(self, added: AddModel) -> None:
        """Raises WorkerLost."""
        await self._asked(added.model, added)

    async def prepare(self) -> None:
        """Raises what loading the Python guest fails with."""
        prepared = await self._asked("", Prepare())
        if prepared.code is not None:
            raise error_from_code(prepared.code, prepared.message)

    async def counts(self) -> Counts:
        """Raises WorkerLost."""
        counts: Counts = await self._asked(_COUNTS, ReadCounts())
        return counts

    def remove_model(self, model: ModelName) -> None:
        self._child.send(RemoveModel(model))

    async def run(self, launch: Launch, state: ProgramState) -> str | None:
        launches = LaunchesOf(state, self._child.send)
        run = Run(launch.name, state, self._loop.create_future(), [], launches)
        self.runs[launch.process] = run
        self._child.send(launch)
        try:
            return await asyncio.shield(run.value)
        except asyncio.CancelledError:
            self._child.send(Stop(launch.process))
            await run.ended(_STOPPING_S)
            raise
        finally:
            del self.runs[launch.process]
            run.launches.close()
            for pending in run.asked:
                pending.abandon()

    def lose(self, reason: str) -> None:
        """Ends what it runs, and who waits for it, with WorkerLost."""
        error = WorkerLost(f"worker process {self.pid} {reason}; what it ran is gone")
        for run in self.runs.values():
            run.fail(
                WorkerLost(
                    f"program {run.name!r} ran in worker process {self.pid}, which {reason}; "
                    "programs in other workers go on"
                )
            )
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)
                waiting.exception()  # whoever asked may have given up

    async def _asked(self, key: str, question: AddModel | Prepare | ReadCounts) -> Any:
        """The answer. One that is lost while nobody waits any more is nobody's error."""
        waiting = self._waiting.get(key)
        if waiting is None or waiting.done():
            waiting = self._waiting[key] = self._loop.create_future()
            self._child.send(question)
        return await asyncio.shield(waiting)

    # ---- what it says

    def _hear(self, message: FromWorker) -> None:
        match message:
            case Said():
                self._pass_on(message)
            case Wanted():
                self._look_for(message)
            case Returned(process, value) if process in self.runs:
                self.runs[process].settle(value)
            case Raised(process, code, text) if process in self.runs:
                self.runs[process].fail(error_from_code(code, text))
            case LaunchProgram(process) if process in self.runs:
                self.runs[process].launches.launch(message)
            case CancelLaunched(process, number) if process in self.runs:
                self.runs[process].launches.cancel(number)
            case ForgetLaunched(process, number) if process in self.runs:
                self.runs[process].launches.forget(number)
            case _:
                self._hear_of_itself(message)

    def _hear_of_itself(self, message: FromWorker) -> None:
        match message:
            case ModelAdded(model):
                self._waiting[model].set_result(message)
            case Reached(engine_at, pid):
                self.engines[engine_at] = pid
            case Prepared():
                self._waiting[""].set_result(message)
            case Counts():
                self._waiting[_COUNTS].set_result(message)
            case Loading(label, done, total, unit):
                self._progress(Progress(label, done, total, unit))

    def _pass_on(self, said: Said) -> None:
        run = self.runs.get(said.process)
        if run is None:
            return
        taken = _deliver(run.state, said)
        answer = Taken(said.process, len(said.content))
        if taken is None:
            self._child.send(answer)
        else:
            taken.on_done(lambda: self._child.send(answer))

    def _look_for(self, wanted: Wanted) -> None:
        run = self.runs.get(wanted.process)
        if run is None:
            return
        inbox: Any = run.state.messages if wanted.channel == "message" else run.state.files
        pending: Pending[str | bytes | None] = inbox.get()
        run.asked.append(pending)

        def hand_over() -> None:
            run.asked.remove(pending)
            item = pending.result()
            content = item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item
            self._child.send(Input(wanted.process, wanted.channel, content))

        pending.on_done(hand_over)


class Workers:
    """All of them. The first model starts them; `close` ends them."""

    def __init__(self, count: int, start: StartWorker, progress: ProgressCallback) -> None:
        self._count = count
        self._start = start
        self._progress = progress
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._sockets = itertools.count(1)
        self._folder = Path(tempfile.mkdtemp(prefix="pie-"))
        self._models: dict[ModelName, AddModel] = {}
        self._workers: list[Worker] = []
        self._replacing: set[asyncio.Task[None]] = set()
        self._change = asyncio.Event()
        self._is_prepared = False
        self._is_closed = False
        self.restarts = 0

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    @property
    def live_guests(self) -> int:
        return sum(len(worker.runs) for worker in self._workers)

    async def counts(self, patience_s: float) -> list[tuple[int, int, Counts | None]]:
        """Of each worker its process id, how many programs it runs, and its counts if it answers in time."""
        workers = list(self._workers)
        answers = await asyncio.gather(*(_in_time(worker.counts(), patience_s) for worker in workers))
        return [
            (worker.pid, len(worker.runs), answer) for worker, answer in zip(workers, answers, strict=True)
        ]

    def reach(self, engine_at: str, pid: int | None) -> bool:
        """Whether programs in all of them can use the engine of this process."""
        return all(worker.engines.get(engine_at) == pid for worker in self._workers)

    def new_socket(self) -> str:
        """Where an engine is to listen for workers."""
        return str(self._folder / f"{next(self._sockets)}.sock")

    async def add_model(self, added: AddModel) -> None:
        """Programs find it once this returns. Raises LoadError when no worker can be started."""
        self._models[added.model] = added
        missing = self._count - len(self._workers) - len(self._replacing)
        try:
            await asyncio.gather(*(_unless_lost(worker.add_model(added)) for worker in self._workers))
            await asyncio.gather(*(self._launch(Pauses()) for _ in range(missing)))
        except BaseException:
            self.remove_model(added.model)
            raise

    def remove_model(self, model: ModelName) -> None:
        self._models.pop(model, None)
        for worker in self._workers:
            worker.remove_model(model)

    async def prepare(self) -> None:
        """Loads the Python guest everywhere, also in those that come later."""
        self._is_prepared = True
        await asyncio.gather(*(_unless_lost(worker.prepare()) for worker in self._workers))

    async def run(
        self, source: ProgramSource, inputs: str, limits: Limits, state: ProgramState
    ) -> str | None:
        """Like ProgramRunner.run, in a worker. Raises WorkerLost as well."""
        try:
            worker = await self._least_loaded(source.name)
            return await worker.run(_launch_message(source, inputs, limits, state), state)
        finally:
            state.close_input()  # its engines hear of its end from the worker, or of the worker's

    async def close(self) -> None:
        self._is_closed = True
        for task in list(self._replacing):
            task.cancel()
            await asyncio.wait((task,))
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.lose("was closed")
        await asyncio.gather(*(worker.end(_CLOSING_S) for worker in workers))
        shutil.rmtree(self._folder, ignore_errors=True)  # sockets that ended engines have left

    async def _least_loaded(self, program: str) -> Worker:
        while not self._workers:
            if self._is_closed:
                raise WorkerLost(f"program {program!r} has no process to run in: the workers were closed")
            self._change.clear()
            await self._change.wait()
        return min(self._workers, key=lambda worker: len(worker.runs))

    # ---- one process after another

    async def _launch(self, pauses: Pauses) -> None:
        worker = Worker(lambda lost, reason: self._has_died(lost, reason, pauses), self._progress)
        await worker.start(msgspec.structs.replace(self._start, worker=next(self._numbers)))
        try:
            if self._is_prepared:
                await worker.prepare()
            await self._add_models(worker)
        except BaseException:
            await worker.end(0)
            raise
        pauses.begin()
        self._workers.append(worker)
        self._change.set()

    async def _add_models(self, worker: Worker) -> None:
        """Those there are once this returns; meanwhile some may come and others go."""
        told: set[ModelName] = set()
        while missing := [added for name, added in self._models.items() if name not in told]:
            told.add(missing[0].model)
            await worker.add_model(missing[0])
        for name in told - self._models.keys():
            worker.remove_model(name)

    def _has_died(self, worker: Worker, reason: str, pauses: Pauses) -> None:
        worker.lose(reason)
        if worker not in self._workers:  # it never worked, and who started it is told
            return
        self._workers.remove(worker)
        _log.error(
            "worker process %d %s; it ran %s; another takes its place",
            worker.pid,
            reason,
            _listed(worker.runs),
        )
        task = self._loop.create_task(self._replace(worker, pauses))
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)

    async def _replace(self, lost: Worker, pauses: Pauses) -> None:
        await lost.end(0)
        while True:
            await asyncio.sleep(pauses.next_s())
            try:
                await self._launch(pauses)
            except (PieError, OSError) as error:
                _log.error("no worker could be started: %s", error)
            else:
                self.restarts += 1
                return


def _listed(runs: Mapping[ProcessId, Run]) -> str:
    """The programs by name, each with how many there were."""
    counted = Counter(run.name for run in runs.values())
    named = [f"{name!r} ({number})" if number > 1 else repr(name) for name, number in counted.most_common(10)]
    others = [f"{len(counted) - 10} others"] if len(counted) > 10 else []
    return ", ".join([*named, *others]) or "no program"


async def _unless_lost(told: Coroutine[Any, Any, None]) -> None:
    """A worker that dies meanwhile does not matter: the next one is told from its start."""
    with suppress(WorkerLost):
        await told


async def _in_time(answer: Coroutine[Any, Any, Counts], patience_s: float) -> Counts | None:
    try:
        return await asyncio.wait_for(answer, patience_s)
    except (WorkerLost, TimeoutError):
        return None


def _deliver(state: ProgramState, said: Said) -> Pending[None] | None:
    match said.channel:
        case "message":
            return state.client.on_message(said.content.decode("utf-8", "surrogatepass"))
        case "file":
            return state.client.on_file(said.content)
        case "stdout":
            return state.client.on_stdout(said.content)
        case "stderr":
            return state.client.on_stderr(said.content)


def _launch_message(source: ProgramSource, inputs: str, limits: Limits, state: ProgramState) -> Launch:
    return Launch(
        process=state.process,
        username=state.username,
        tenant=state.tenant,
        name=source.name,
        component=str(source.path) if isinstance(source, ComponentProgram) else None,
        files=() if isinstance(source, ComponentProgram) else source.files,
        entry="" if isinstance(source, ComponentProgram) else source.entry,
        inputs=inputs,
        limits=limits,
        priority=state.priority,
        traceparent=state.traceparent,
    )
