"""What is generated from the typed tree is current, complete and itself a good configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pie_core.config import Config, parse_config
from pie_core.config.annotations import key_paths, settings_of
from pie_core.config.documents import as_data, json_schema, markdown, template

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_about_configuration_is_what_the_tree_generates() -> None:
    command = [sys.executable, "-m", "pie_core.config", "--markdown"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert (ROOT / "docs/configuration.md").read_text() == printed


def test_every_key_has_help_and_stands_in_the_page_and_in_the_template() -> None:
    page, file = markdown(), template()
    names = [str(path[-1]) for path in key_paths(Config)]
    assert len(names) > 25
    for name in names:
        assert f"`{name}" in page or f"{name}[]`" in page or f".{name}`" in page
        assert f"{name}:" in file
    assert all(setting.help for setting in settings_of(Config))


def test_the_template_changes_nothing() -> None:
    assert parse_config(template(), "template", Path("/")) == Config()


def test_every_commented_line_of_the_template_is_a_good_key_with_its_default() -> None:
    lines = template().splitlines()
    body = lines[next(index for index, line in enumerate(lines) if line.endswith(":")) :]
    uncommented = "\n".join(
        line.removeprefix("# ") for line in body if ":" in line and not line.startswith("# M")
    )
    text = "\n".join(line for line in uncommented.splitlines() if not line[:1].isupper())
    assert parse_config(text, "template", Path("/")) == Config()


def test_the_effective_configuration_reads_back_as_itself() -> None:
    import yaml

    assert parse_config(yaml.safe_dump(as_data(Config())), "shown", Path("/")) == Config()


def test_the_schema_knows_every_section_and_allows_no_other_key() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == {setting.name for setting in settings_of(Config)}
    assert schema["additionalProperties"] is False
    assert all(section["additionalProperties"] is False for section in schema["$defs"].values())
    device = schema["$defs"]["DriverConfig"]["properties"]["device"]
    assert {option["type"] for option in device["anyOf"]} == {"string", "array"}
    assert schema["$defs"]["SchedulerConfig"]["properties"]["speculation_depth"]["maximum"] == 64
