"""A manifest is read as strictly as a configuration, and what it says about input and capabilities is enforced."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pie_core.config.toml_document import MAX_BYTES, parse_toml
from pie_core.errors import ConfigError, InvalidRequest, LimitExceeded, ProgramError, Unsupported
from pie_core.manifest import (
    AskedLimits,
    Grants,
    Manifest,
    checked_input,
    parse_manifest,
    read_manifest,
    require_granted,
    version_key,
)
from pie_core.programs import shipped_programs

PACKAGE = '[package]\nname = "mine"\nversion = "0.1.0"\n'


def manifest(more: str = "") -> Manifest:
    return parse_manifest(PACKAGE + more)


def complaint(text: str) -> str:
    with pytest.raises(ProgramError) as caught:
        parse_manifest(text)
    return str(caught.value)


def test_a_full_manifest_arrives() -> None:
    read = parse_manifest(
        """
        [package]
        name = "mine"
        version = "1.20.3"
        description = "does it"
        authors = ["Ada"]
        repository = "https://example.com"
        readme = "README.md"
        kind = "service"
        entry = "app/main.py"
        [runtime]
        core = "^0.2.0"
        [parameters]
        prompt = { type = "string", description = "what to say" }
        n = { type = "int", default = 3 }
        [capabilities]
        network = ["example.com:443"]
        files = ["scratch"]
        children = 4
        limits = { memory_mb = 64, wall_s = 2.5 }
        [dependencies]
        """
    )
    assert (read.name, read.version, read.label) == ("mine", "1.20.3", "mine@1.20.3")
    assert (read.package.kind, read.package.entry, read.package.authors) == (
        "service",
        "app/main.py",
        ("Ada",),
    )
    assert read.runtime == {"core": "^0.2.0"}
    assert read.parameters["prompt"].required
    assert read.parameters["n"].default == 3
    assert read.capabilities.network == ("example.com:443",)
    assert (read.capabilities.children, read.capabilities.limits) == (
        4,
        AskedLimits(memory_mb=64, wall_s=2.5),
    )


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["Pie.toml:1: the key `package` is missing"]),
        (
            '[package]\nname = "mine"\nversion = "1.0"\n',
            ["Pie.toml:3: package.version: expected MAJOR.MINOR.PATCH", 'but found "1.0"'],
        ),
        ('[package]\nname = "a b"\nversion = "1.0.0"\n', ["Pie.toml:2: package.name: expected a letter"]),
        (PACKAGE + 'nmae = "x"\n', ["Pie.toml:4: package.nmae: unknown key; did you mean `name`?"]),
        (PACKAGE + 'kind = "daemon"\n', ["expected one of run, http, service", '"daemon"']),
        (PACKAGE + "[capability]\n", ["Pie.toml:4: capability: unknown key; did you mean `capabilities`?"]),
        (
            PACKAGE + '[parameters]\nn = { type = "nit" }\nm = { typ = "int" }\n',
            [
                "Pie.toml:5: parameters.n.type: expected one of string, int",
                "Pie.toml:6: parameters.m.typ: unknown",
            ],
        ),
        (
            PACKAGE + '[parameters]\n[parameters.n]\ntype = "int"\n\ndefault = "3"\n',
            ['Pie.toml:8: parameters.n.default: expected a whole number, but found "3"'],
        ),
        (PACKAGE + "[parameters]\nn = 3\n", ["Pie.toml:5: parameters.n: expected"]),
        (PACKAGE + "[parameters]\nextra = 3\n", ["Pie.toml:5: parameters.extra: expected true or false"]),
        (PACKAGE + "[capabilities]\nchildren = -1\n", ["capabilities.children", "at least 0"]),
        (PACKAGE + '[dependencies]\nother = "1"\n', ["Pie.toml:4: dependencies: found other"]),
        ("[package\n", ["Pie.toml:1:9: not TOML: Expected ']'"]),
        (PACKAGE + "made = 2020-01-01\n", ["Pie.toml:4: package.made: expected text", "date"]),
        (PACKAGE + "made = inf\n", ["expected a finite number"]),
        (PACKAGE + '"""', ["not TOML"]),
        ("\ud800", ["not UTF-8"]),
        ("#" * (MAX_BYTES + 1), ["larger than"]),
    ],
)
def test_every_misfit_is_told_with_its_line(text: str, problems: list[str]) -> None:
    message = complaint(text)
    assert all(problem in message for problem in problems), message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"none\.toml: cannot be read"):
        read_manifest(tmp_path / "none.toml")


def test_every_key_has_its_line_whatever_stands_before_it() -> None:
    text = 'a = """\n[b]\n"""\nl = [ # ]\n  "]",\n  1,\n]\n[b."c.d"]\nx.y = { z = "}" }\n[[t]]\nk = 1\n[[t]]\nk = 2\n'
    lines = parse_toml(text, "f").place.lines
    assert {path: lines[path] for path in lines if path} == {
        ("a",): 1,
        ("l",): 4,
        ("b",): 8,
        ("b", "c.d"): 8,
        ("b", "c.d", "x"): 9,
        ("b", "c.d", "x", "y"): 9,
        ("t",): 10,
        ("t", 0): 10,
        ("t", 0, "k"): 11,
        ("t", 1): 12,
        ("t", 1, "k"): 13,
    }


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab.=[]{}\"'#\n, 1\\", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert all(line <= text.count("\n") + 1 for line in parse_toml(text, "f").place.lines.values())


PARAMETERS = """
[parameters]
prompt = { type = "string", description = "what to say" }
count = { type = "int", default = 3 }
share = { type = "float", optional = true }
loud = { type = "bool", optional = true }
names = { type = "list", optional = true }
anything = { type = "json", optional = true }
"""


def test_defaults_are_filled_in_and_given_values_stay() -> None:
    assert checked_input(manifest(PARAMETERS), {"prompt": "x"}) == {"prompt": "x", "count": 3}
    full = {"prompt": "", "count": 0, "share": 1, "loud": False, "names": [1], "anything": {"a": None}}
    assert checked_input(manifest(PARAMETERS), full) == full
    assert checked_input(manifest(PARAMETERS), {"prompt": "x", "share": None})["share"] is None


@pytest.mark.parametrize(
    ("given_input", "problem"),
    [
        ({}, "the parameter `prompt` is missing: expected text (what to say)"),
        ({"prompt": 5}, "the parameter `prompt`: expected text, but found 5"),
        ({"prompt": None}, "the parameter `prompt`: expected text, but found null"),
        ({"prompt": "x", "count": True}, "the parameter `count`: expected a whole number, but found true"),
        ({"prompt": "x", "count": 1.5}, "the parameter `count`: expected a whole number, but found 1.5"),
        ({"prompt": "x", "share": "1"}, 'the parameter `share`: expected a number, but found "1"'),
        ({"prompt": "x", "loud": 1}, "the parameter `loud`: expected true or false, but found 1"),
        ({"prompt": "x", "names": "a"}, 'the parameter `names`: expected a list, but found "a"'),
        (
            {"promt": "x", "prompt": ""},
            "unknown parameter `promt`; did you mean `prompt`? Known: anything, count",
        ),
        ({"prompt": "x", "_positional": ["y"]}, 'found the arguments ["y"] without a name'),
    ],
)
def test_input_that_does_not_fit_is_refused_by_name(given_input: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(f"mine@0.1.0: {problem}")):
        checked_input(manifest(PARAMETERS), given_input)


def test_every_problem_of_an_input_is_told_at_once() -> None:
    with pytest.raises(InvalidRequest) as caught:
        checked_input(manifest(PARAMETERS), {"count": "x", "nothing_like_it": 1})
    assert all(name in str(caught.value) for name in ("prompt", "count", "nothing_like_it"))


def test_extra_parameters_pass_where_the_manifest_says_so() -> None:
    open_ended = manifest("[parameters]\nextra = true\n")
    assert checked_input(open_ended, {"whatever": 1}) == {"whatever": 1}
    silent = manifest()  # as many of Pie 0.4: the input is the program's own affair
    assert checked_input(silent, {"whatever": 1}) == {"whatever": 1}
    with pytest.raises(InvalidRequest, match="It takes none"):
        checked_input(manifest("[parameters]\n"), {"whatever": 1})
    named_extra = manifest('[parameters]\nextra = { type = "int" }\n')
    assert checked_input(named_extra, {"extra": 1}) == {"extra": 1}


@pytest.mark.parametrize(
    ("more", "error", "problem"),
    [
        ('kind = "http"\n', Unsupported, "of kind 'http'"),
        ('kind = "service"\n', Unsupported, "the others come later"),
        (
            '[capabilities]\nnetwork = ["a.example"]\n',
            Unsupported,
            "network: a.example; this pie grants none",
        ),
        ('[capabilities]\nfiles = ["scratch"]\n', Unsupported, "files: scratch; this pie grants none"),
        ("[capabilities]\nchildren = 2\n", LimitExceeded, "children: 2 at a time; this pie grants 0"),
        ("[capabilities.limits]\nmemory_mb = 9\n", LimitExceeded, "limits.memory_mb = 9; this pie grants 8"),
        ("[capabilities.limits]\ncpu_s = 2\n", LimitExceeded, "limits.cpu_s = 2.0; this pie grants 1"),
    ],
)
def test_what_is_not_granted_is_refused(more: str, error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=re.escape(problem)):
        require_granted(manifest(more), Grants(limits=AskedLimits(memory_mb=8, cpu_s=1)))


def test_what_is_granted_is_not_refused() -> None:
    asking = manifest(
        'kind = "http"\n[capabilities]\nnetwork = ["a"]\nchildren = 2\nlimits = {memory_mb = 9}\n'
    )
    require_granted(asking, Grants(kinds=("run", "http"), network=("*",), children=2))
    require_granted(manifest(), Grants())


def test_versions_are_ordered_by_their_numbers() -> None:
    assert sorted(["0.10.0", "0.9.1", "0.9.0"], key=version_key) == ["0.9.0", "0.9.1", "0.10.0"]


def test_the_manifests_of_the_shipped_programs_are_good_and_name_their_folders() -> None:
    for name, folder in shipped_programs().items():
        assert read_manifest(folder / "Pie.toml").name == name
