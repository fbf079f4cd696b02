"""`pie config set` changes one key in the text and leaves everything else as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from pie_core.config import parse_config, read_config
from pie_core.config.documents import template
from pie_core.config.editing import parse_key, set_in_file, set_in_text
from pie_core.errors import ConfigError


def changed(text: str, key: str, value: str) -> str:
    return set_in_text(text, parse_key(key), value, "pie.yaml")


@pytest.mark.parametrize(
    ("text", "key", "value", "expected"),
    [
        ("runtime:\n  cpu_s: 1 # why\n", "runtime.cpu_s", "2.5", "runtime:\n  cpu_s: 2.5 # why\n"),
        ("", "runtime.cpu_s", "2", "runtime:\n  cpu_s: 2\n"),
        ("# note", "auth.user", "ada", "# note\nauth:\n  user: ada\n"),
        (
            "auth:\n  user: ada\n\nruntime: {}\n",
            "auth.tenant",
            "lab",
            "auth:\n  user: ada\n  tenant: lab\n\nruntime: {}\n",
        ),
        ("runtime: {}\n", "runtime.cpu_s", "2", "runtime: {cpu_s: 2}\n"),
        ("runtime: {cpu_s: 1}\n", "runtime.cpu_s", "2", "runtime: {cpu_s: 2}\n"),
        ("auth:  # who\nruntime:\n", "auth.user", "ada", "auth:  # who\n  user: ada\nruntime:\n"),
        ("auth:\n  user:\n", "auth.user", "ada", "auth:\n  user: ada\n"),
        ("auth:\n  user: ada", "auth.tenant", "null", "auth:\n  user: ada\n  tenant: null\n"),
        (
            "models:\n- name: a\n  driver:\n    device:\n    - cpu\n  scheduler:\n",
            "models.0.driver.device",
            "[x, y]",
            'models:\n- name: a\n  driver:\n    device: ["x", "y"]\n  scheduler:\n',
        ),
        (
            "models:\n  - name: a\n",
            "models[0].driver.options.total_pages",
            "64",
            "models:\n  - name: a\n    driver:\n      options:\n        total_pages: 64\n",
        ),
        ("models:\n- name: a\n", "models[0].name", "12", 'models:\n- name: "12"\n'),
        ("auth: {user: a}\n", "auth.user", "a: b, #c", 'auth: {user: "a: b, #c"}\n'),
    ],
)
def test_one_key_changes_and_all_else_stays(text: str, key: str, value: str, expected: str) -> None:
    assert changed(text, key, value) == expected


def test_every_default_of_the_template_can_be_set() -> None:
    text = template()
    for key, value in [
        ("runtime.memory_mb", "9"),
        ("auth.user", "ada"),
        ("telemetry.log_level", "info"),
        ("models[0].driver.type", "dummy"),
        ("models[0].driver.options.seed", "3"),
        ("models[0].scheduler.max_batch_tokens", "5"),
        ("models[0].path", "weights"),
    ]:
        text = changed(text, key, value)
    config = parse_config(text, "pie.yaml", Path("/f"))
    (model,) = config.models
    assert (config.runtime.memory_mb, config.auth.user, config.telemetry.log_level) == (9, "ada", "info")
    assert (model.driver.type, dict(model.driver.options), model.path) == (
        "dummy",
        {"seed": 3},
        Path("/f/weights"),
    )
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        line for line in template().splitlines() if line.startswith("#")
    ]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("runtime.memory_mbs", "1", "unknown key; did you mean `memory_mb`?"),
        ("runtime.memory_mb", "much", "expected a whole number from 1 to 4096"),
        ("models[4].name", "x", "models[4].name: the list has no such item"),
        ("runtime..cpu_s", "1", "is not a key; write it like"),
        ("", "1", "is not a key"),
    ],
)
def test_a_bad_change_is_refused_and_the_file_stays(
    tmp_path: Path, key: str, value: str, problem: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(template())
    with pytest.raises(ConfigError) as caught:
        set_in_file(file, key, value)
    assert problem in str(caught.value)
    assert file.read_text() == template()
    assert list(tmp_path.iterdir()) == [file]


def test_a_missing_file_is_begun_and_its_folder_made(tmp_path: Path) -> None:
    file = tmp_path / "new" / "config.yaml"
    set_in_file(file, "runtime.memory_mb", "11")
    assert read_config(file).runtime.memory_mb == 11
