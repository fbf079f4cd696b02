"""Ctrl-C at any moment: never an abort, a hang, or a lost one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time

import pytest

# Guests of three kinds run all the time: spinning, stepping through the host as fast as they can, and sleeping.
PROGRAM = """
import asyncio, sys
from pie_core.sandbox.program import Program
from pie_core.sandbox.runtime import Runtime, install_interrupt
from tests.core.sandbox.scenarios import State, interfaces
from tests.core.sandbox.test_guest import SPIN, WAIT, sleeper, spinner
from tests.core.sandbox.wat_guests import run, wat_guest

STEPS = "(loop $l (call $wait (i32.const 0) (i32.const 0) (i32.const 1) (i64.const 1) (i32.const 100)) (br $l))"

async def main():
    loop = asyncio.get_running_loop()
    interrupted = asyncio.Semaphore(0)
    remove = install_interrupt(loop, interrupted.release)
    runtime = Runtime(interfaces())
    wasms = [spinner(), wat_guest(run(STEPS, "unreachable"), ["poll/wait"], WAIT), sleeper(10**13)]
    programs = [await Program.load(runtime, wasm) for wasm in wasms]
    tasks = [asyncio.ensure_future(program.start(State()).call("run", "")) for program in programs for _ in range(3)]
    print("ready", flush=True)
    for count in range(int(sys.argv[1])):
        await interrupted.acquire()
        print("interrupted", flush=True)
    runtime.close()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    print(" ".join(sorted({type(error).__name__ for error in ended})), flush=True)
    remove()

asyncio.run(main())
"""


@pytest.mark.slow
def test_twenty_interrupts_in_a_row_all_arrive_while_guests_run() -> None:
    pauses = random.Random(4)
    with subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", PROGRAM, "20"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(20):
            time.sleep(pauses.uniform(0, 0.03))
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted\n"
        assert process.stdout.readline() == "Cancelled\n"
        assert process.wait(timeout=30) == 0
