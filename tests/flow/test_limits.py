"""What programs are told when they use more than they may."""

from __future__ import annotations

import asyncio

from tests.flow.conftest import DUMMY, StartPie

BUSY = """
import asyncio
from inferlet import Context, Model, errors, runtime

async def patiently(call):
    while True:
        try:
            return call()
        except errors.LimitExceeded:
            await asyncio.sleep(0.05)

async def main(input):
    ctx = await patiently(lambda: Context(Model.load()))
    refused = None
    for number in range(input["calls"]):
        asyncio.get_running_loop().time()  # cannot fail: counted, and always answered
        try:
            ctx.append([number % 100])
        except errors.LimitExceeded as error:
            refused = refused or error.message
    await patiently(lambda: ctx.truncate(0))
    return refused
"""


def test_a_program_that_calls_too_often_is_refused_until_it_has_waited(start_pie: StartPie) -> None:
    async def scenario() -> None:
        async with start_pie(DUMMY, runtime=", calls_per_s_per_program: 400") as pie:
            refused = await pie.run(BUSY, calls=5000)
            assert "runtime.calls_per_s_per_program allows 400 in a second" in refused
            assert await pie.run(BUSY, calls=20) is None
            await pie.check_nothing_is_left()
            assert pie.app.runtime.host_calls > 400

    asyncio.run(scenario())


def test_the_programs_of_a_tenant_share_their_calls_and_leave_others_theirs(start_pie: StartPie) -> None:
    async def scenario() -> None:
        async with start_pie(DUMMY, runtime=", calls_per_s_per_tenant: 400") as pie:
            of_tenant = [pie.run(BUSY, calls=2000) for _ in range(2)]
            other = pie.run(BUSY, pie.state(user="bob"), calls=20)
            *refused, fine = await asyncio.gather(*of_tenant, other)
            assert all("runtime.calls_per_s_per_tenant allows 400" in each for each in refused)
            assert fine is None
            await pie.check_nothing_is_left()

    asyncio.run(scenario())
