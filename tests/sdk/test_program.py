"""Loading and running programs from source text, natively."""

from __future__ import annotations

import gc
import json
import linecache
import re
import sys
from collections.abc import Iterator
from textwrap import dedent
from typing import Any

import pytest
from inferlet_guest.program import Program, ProgramFailed


@pytest.fixture(autouse=True)
def _leave_no_modules_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test is a process of its own as far as imports are concerned."""
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]
    linecache.clearcache()


def run(
    source: str, given: Any = None, *, entry: str = "main.py", others: dict[str, str] | None = None
) -> Any:
    """The result of a program whose entry is `source`."""
    files = [(path, dedent(text)) for path, text in (others or {}).items()]
    program = Program([(entry, dedent(source)), *files], entry)
    program.load()
    result = program.run(json.dumps(given))
    return None if result is None else json.loads(result)


def failure(source: str, given: Any = None, **options: Any) -> ProgramFailed:
    with pytest.raises(ProgramFailed) as caught:
        run(source, given, **options)
    return caught.value


@pytest.mark.parametrize("keyword", ["", "async "])
def test_main_takes_the_input_and_returns_json(keyword: str) -> None:
    assert run(f"{keyword}def main(input): return [input, 1, 'ü']", {"a": None}) == [{"a": None}, 1, "ü"]
    assert run(f"{keyword}def main(): return 'no input'", {"a": 1}) == "no input"
    assert run(f"{keyword}def main(input): pass") is None


def test_a_value_set_on_the_way_is_returned_unless_main_returns_one() -> None:
    assert run("import inferlet\ndef main(): inferlet.set_return('set')") == "set"
    assert (
        run("import inferlet\ndef main():\n  inferlet.set_return('set')\n  return 'returned'") == "returned"
    )


def test_leaving_with_success_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("import sys\nasync def main(): sys.exit()") is None
    gc.collect()
    assert capsys.readouterr().err == ""  # asyncio complains about forgotten errors when a task is collected
    assert run("import sys, inferlet\ndef main():\n  inferlet.set_return('x')\n  sys.exit(0)") == "x"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("import sys\ndef main():\n    sys.exit('no prompt')", "no prompt"),
        ("import sys\nasync def main():\n    sys.exit(3)", "the program left with status 3"),
        ("raise SystemExit('not today')", "not today"),
    ],
)
def test_leaving_with_a_failure_says_the_last_words_only(source: str, text: str) -> None:
    failed = failure(source)
    assert (failed.code, failed.text) == ("guest", text)


def test_a_folder_of_files_is_imported_by_name() -> None:
    assert run(
        """
            import tools_of_mine
            from shapes import Square
            from shapes.round import Circle
            from plain.deep import VALUE

            def main():
                return [tools_of_mine.double(2), Square().name, Circle().name, VALUE, __name__, __file__]
            """,
        others={
            "tools_of_mine.py": "def double(x): return 2 * x",
            "shapes/__init__.py": "from .square import Square",
            "shapes/square.py": "from .base import Shape\nclass Square(Shape): name = 'square'",
            "shapes/round.py": "from shapes.base import Shape\nclass Circle(Shape): name = 'circle'",
            "shapes/base.py": "class Shape: pass",
            "plain/deep.py": "VALUE = 7",
        },
    ) == [4, "square", "circle", 7, "main", "main.py"]


def test_names_count_from_the_entrys_folder() -> None:
    assert (
        run("import near\ndef main(): return near.X", entry="src/main.py", others={"src/near.py": "X = 1"})
        == 1
    )


def test_a_program_reads_its_own_files() -> None:
    program = Program(
        [
            ("main.py", "import pkgutil\ndef main(): return pkgutil.get_data('main', 'words.txt').decode()"),
            ("words.txt", "some words"),
        ],
        "main.py",
    )
    program.load()
    assert program.run("null") == '"some words"'


def test_dataclasses_and_pickles_find_their_module() -> None:
    assert (
        run(
            """
        from __future__ import annotations
        import dataclasses, pickle

        @dataclasses.dataclass
        class Point:
            x: int = 3

        def main():
            return pickle.loads(pickle.dumps(Point())).x
        """
        )
        == 3
    )


def test_a_traceback_has_the_programs_files_and_lines_only() -> None:
    failed = failure(
        """
        import deeper

        async def main(input):
            deeper.fail(input)
        """,
        {"n": 1},
        others={"deeper.py": "def fail(input):\n    raise ValueError('wrong')  # here"},
    )
    assert failed.code == "guest"
    lines = failed.text.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert [line for line in lines if line.startswith("  File")] == [
        '  File "main.py", line 5, in main',
        '  File "deeper.py", line 2, in fail',
    ]
    assert "    raise ValueError('wrong')  # here" in lines
    assert lines[-1] == "ValueError: wrong"


def test_causes_keep_their_frames() -> None:
    text = failure(
        """
        def main():
            try:
                {}["k"]
            except KeyError as missing:
                raise RuntimeError("no k") from missing
        """
    ).text
    assert text.count('File "main.py"') == 2
    assert "direct cause" in text
    assert "inferlet_guest" not in text


def test_a_refusal_of_the_host_ends_at_the_programs_line_and_keeps_its_code() -> None:
    failed = failure("from inferlet import Model\ndef main():\n    Model.load('other')")
    assert failed.code == "not-found"
    assert [line for line in failed.text.splitlines() if "File" in line] == [
        '  File "main.py", line 3, in main'
    ]
    assert "NotFound: no model named 'other'" in failed.text


def test_an_exception_group_shows_its_members_places() -> None:
    text = failure(
        """
        import asyncio

        async def fail(n):
            raise ValueError(n)

        async def main():
            async with asyncio.TaskGroup() as group:
                group.create_task(fail(1))
                group.create_task(fail(2))
        """
    ).text
    assert text.count('File "main.py", line 5, in fail') == 2


def test_a_syntax_error_names_file_and_line() -> None:
    failed = failure("def main(:\n    pass")
    assert failed.code == "program"
    assert 'File "main.py", line 1' in failed.text
    assert "SyntaxError" in failed.text
    assert "Traceback" not in failed.text
    assert (
        'File "other.py", line 2'
        in failure("import other\ndef main(): pass", others={"other.py": "\n("}).text
    )


def test_a_deadlock_names_the_line_that_waits() -> None:
    failed = failure("import asyncio\nasync def main():\n    await asyncio.Event().wait()")
    assert failed.code == "guest"
    assert "main.py:3 in main" in failed.text


@pytest.mark.parametrize(
    ("source", "code", "text"),
    [
        ("x = 1", "program", "main.py defines no function main"),
        ("main = 3", "program", "main.py defines no function main"),
        ("1 / 0", "guest", "ZeroDivisionError"),
        ("import nonesuch", "guest", "No module named 'nonesuch'"),
        (
            "def main(): return {'a': [object()]}",
            "guest",
            "TypeError: main returned what JSON cannot hold: a object;",
        ),
        ("def main(): return {1, 2}", "guest", "a set;"),
        ("def main():\n  x = []\n  x.append(x)\n  return x", "guest", "Circular"),
        ("def main(): raise ValueError('\\ud800')", "guest", r"ValueError: \\ud800"),
    ],
)
def test_failures_say_what_happened(source: str, code: str, text: str) -> None:
    failed = failure(source)
    assert failed.code == code
    assert re.search(text, failed.text), failed.text


def test_input_that_is_no_json_is_refused() -> None:
    program = Program([("main.py", "def main(): pass")], "main.py")
    program.load()
    with pytest.raises(ProgramFailed, match="not JSON") as caught:
        program.run("{")
    assert caught.value.code == "invalid-request"


def test_files_that_hide_existing_modules_are_refused() -> None:
    assert failure("def main(): pass", others={"queue.py": ""}).text == (
        "queue.py: a module named 'queue' exists already; rename the file"
    )
    assert run("import test\ndef main(): return test.X", others={"test/__init__.py": "X = 1"}) == 1
    assert "inferlet" in failure("def main(): pass", others={"inferlet/__init__.py": ""}).text
    assert run("def main(): return __name__", entry="code.py") == "__inferlet__"


def test_an_entry_that_is_missing_is_refused() -> None:
    with pytest.raises(ProgramFailed, match=r"main.py: not among the files \['other.py'\]"):
        Program([("other.py", "")], "main.py")
