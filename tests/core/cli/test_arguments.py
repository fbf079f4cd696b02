"""What stands after `--` becomes the program's input."""

from __future__ import annotations

from pathlib import Path

import pytest

from pie_core.cli.arguments import program_input, trailing_arguments, typed
from pie_core.cli.outcomes import UsageProblem


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--prompt", "Hi there"], {"prompt": "Hi there"}),
        (["--max-tokens", "5"], {"max_tokens": 5}),
        (["--max-tokens=5", "--a=", "--b=x=y"], {"max_tokens": 5, "a": "", "b": "x=y"}),
        (["-k", "3", "-v"], {"k": 3, "v": True}),
        (["--greedy", "--deep", "1"], {"greedy": True, "deep": 1}),
        (["--offset", "-5", "--rate", "-.5"], {"offset": -5, "rate": -0.5}),
        (["some", "text", "7"], {"_positional": ["some", "text", 7]}),
        (["--a", "1", "--", "--b", "c"], {"a": 1, "_positional": ["--b", "c"]}),
        (["--flag", "--", "x"], {"flag": True, "_positional": ["x"]}),
        (["--tag", "a", "--tag", "b", "--tag", "3"], {"tag": ["a", "b", 3]}),
        (["--text", "two\nlines"], {"text": "two\nlines"}),
        (["-"], {"_positional": ["-"]}),
        (["--prompt", "--prompt"], {"prompt": [True, True]}),
    ],
)
def test_names_values_flags_and_positionals(arguments: list[str], expected: dict[str, object]) -> None:
    assert trailing_arguments(arguments) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("+3", 3),
        ("-3", -3),
        ("3.0", 3.0),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("true", True),
        ("False", False),
        ("nan", "nan"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("none", "none"),
        ("", ""),
        ("3 ", "3 "),
    ],
)
def test_a_value_is_a_whole_number_a_number_true_or_false_or_text(text: str, value: object) -> None:
    found = typed(text)
    assert (found, type(found)) == (value, type(value))


def test_arguments_go_over_the_input_and_a_file_can_hold_it(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text('{"a": 1, "b": 2}')
    assert program_input(f"@{tmp_path}/in.json", ["--b", "3"]) == {"a": 1, "b": 3}
    assert program_input(None, []) == {}


def test_an_endless_number_stays_usable_as_text() -> None:
    assert typed("1e999") == "1e999"
    assert typed("9" * 5000) == "9" * 5000


def test_an_input_that_is_no_object_is_refused() -> None:
    with pytest.raises(UsageProblem, match="must be a JSON object"):
        program_input("3", [])
