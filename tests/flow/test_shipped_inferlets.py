"""The shipped inferlets, each in its guest on a whole pie with the dummy driver."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pie_core.errors import InvalidRequest
from pie_core.programs import find_program
from pie_core.testing.recording_client import RecordingClient
from tests.flow.conftest import Pie, StartPie
from tests.rules.source_tree import ROOT


def run_shipped(
    start_pie: StartPie, name: str, *messages: str, times: int = 1, **arguments: Any
) -> tuple[Any, str]:
    """What the last of `times` runs returned, and what all of them printed."""

    async def scenario(pie: Pie) -> tuple[Any, str]:
        client = RecordingClient()
        result = None
        for _ in range(times):
            state = pie.state(client)
            for message in messages:
                state.messages.put(message)
            state.messages.close()
            result = await pie.app.run(find_program(name), arguments, state)
        return result, client.stdout.decode()

    async def main() -> tuple[Any, str]:
        async with start_pie() as pie:
            return await scenario(pie)

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("text-completion", {"prompt": "Hello", "system": "Be brief.", "max_tokens": 12, "temperature": 0.0}),
        ("raw-completion", {"prompt": "Hello", "max_tokens": 12}),
        ("parallel-generation", {"max_tokens": 12}),
        ("chat", {"max_tokens": 12}),
        ("helloworld", {}),
    ],
)
def test_programs_that_print_return_nothing(
    start_pie: StartPie, name: str, arguments: dict[str, Any]
) -> None:
    result, printed = run_shipped(start_pie, name, "first", "second", **arguments)
    assert result is None
    assert printed.strip()
    assert printed.endswith("\n")


def test_best_of_n_returns_a_candidate_that_it_printed(start_pie: StartPie) -> None:
    best, printed = run_shipped(start_pie, "best-of-n", num_candidates=3, max_tokens=12)
    assert printed.count("(agreement ") == 3
    assert best in printed


def test_prefix_caching_finds_the_prefix_in_the_second_run(start_pie: StartPie) -> None:
    _, printed = run_shipped(start_pie, "prefix-caching", times=2, max_tokens=12)
    assert [line.split()[0] for line in printed.splitlines()] == ["computed", "opened"]


def test_sampler_suite_finds_no_contradiction(start_pie: StartPie) -> None:
    result, printed = run_shipped(start_pie, "sampler-suite")
    assert printed.count("ok: ") == 8
    assert len(result["top"]) == 8


def test_legacy_completion_returns_text(start_pie: StartPie) -> None:
    result, printed = run_shipped(start_pie, "legacy-completion", prompt="Hello", max_tokens=12)
    assert isinstance(result, str)
    assert printed == ""


def test_the_tour_of_the_documentation_runs(start_pie: StartPie) -> None:
    report, _ = run_shipped(start_pie, str(ROOT / "docs" / "examples" / "tour.py"), question="Why?")
    assert report["refused"] == "invalid-request"
    assert len(report["conversation"]) == 2


def test_a_missing_prompt_is_asked_for_without_a_traceback(start_pie: StartPie) -> None:
    with pytest.raises(InvalidRequest, match="`prompt` is missing"):
        run_shipped(start_pie, "text-completion")


def test_launch_caller_collects_what_its_children_return(start_pie: StartPie) -> None:
    (answer,), _ = run_shipped(start_pie, "launch-caller", prompts=["Name a river."], max_tokens=12)
    returned, _ = run_shipped(start_pie, "launch-callee", prompt="Name a river.", max_tokens=12)
    assert answer == returned
    answers, printed = run_shipped(start_pie, "launch-caller", max_tokens=4)
    assert len(answers) == len(printed.strip().splitlines()) == 3
