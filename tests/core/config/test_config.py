"""A configuration file is read strictly, and every complaint says where, what was found and what was expected."""

from __future__ import annotations

import contextlib
import json
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import annotated_types
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pie_core.config import (
    Config,
    Misfit,
    Options,
    Place,
    load_config,
    parse_config,
    parse_options,
    read_config,
)
from pie_core.config.document import MAX_BYTES, MAX_DEPTH, parse_document
from pie_core.errors import ConfigError

FOLDER = Path("/folder")


def parsed(text: str) -> Config:
    return parse_config(text, "pie.yaml", FOLDER)


def complaint(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    return str(caught.value)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "{}", "server:\nruntime:\nauth:\n"])
def test_an_empty_file_and_empty_headings_mean_the_defaults(text: str) -> None:
    assert parsed(text) == Config()


def test_the_default_is_the_default_model_on_the_portable_driver_on_the_cpu() -> None:
    (model,) = Config().models
    assert (model.name, model.path, model.repo) == ("default", None, None)
    assert (model.driver.type, model.driver.device, dict(model.driver.options)) == ("portable", ("cpu",), {})


def test_every_key_of_a_full_file_arrives() -> None:
    config = parsed(
        """
        server: {max_message_bytes: 10}
        auth: {user: ada, tenant: lab}
        telemetry: {log_level: debug}
        runtime:
          workers: 0
          memory_mb: 64
          cpu_s: 2
          wall_s: 1.5
          output_bytes: 1000
          program_cache: programs
          max_program_bytes: 2000
          compile_s: 3
          compile_memory_mb: 1024
        models:
          - name: one
            path: weights/one.gguf
            driver: {type: dummy, device: [a, b], options: {vocab_size: 10}}
            scheduler: {speculation_depth: 0, max_batch_tokens: 5, max_batch_requests: 6}
          - {name: two, repo: org/two, revision: main}
        """
    )
    assert (config.server.max_message_bytes, config.auth.user, config.auth.tenant) == (10, "ada", "lab")
    assert (config.telemetry.log_level, config.runtime.cpu_s, config.runtime.wall_s) == ("debug", 2.0, 1.5)
    assert config.runtime.program_cache == FOLDER / "programs"
    one, two = config.models
    assert one.path == FOLDER / "weights/one.gguf"
    assert (one.driver.type, one.driver.device, dict(one.driver.options)) == (
        "dummy",
        ("a", "b"),
        {"vocab_size": 10},
    )
    assert (one.scheduler.max_batch_tokens, one.scheduler.max_batch_requests) == (5, 6)
    assert (two.repo, two.revision) == ("org/two", "main")


def test_nothing_of_a_configuration_can_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().runtime.memory_mb = 3  # type: ignore[misc]  # that it is refused is the point


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "runtime:\n  memory_mbs: 3\n",
            "pie.yaml:2: runtime.memory_mbs: unknown key; did you mean `memory_mb`? Known here: calls_per_s_",
        ),
        (
            "memory_mb: 3\n",
            "pie.yaml:1: memory_mb: unknown key; did you mean `runtime.memory_mb`? Known here: auth,",
        ),
        (
            "zebra: 3\n",
            "pie.yaml:1: zebra: unknown key. Known here: auth, models, runtime, server, telemetry",
        ),
        (
            '\nruntime:\n  memory_mb: "512"',
            "pie.yaml:3: runtime.memory_mb: "
            'expected a whole number from 1 to 4096, but found "512" (remove the quotes)',
        ),
        ("runtime: {memory_mb: 1.5}", "expected a whole number from 1 to 4096, but found 1.5"),
        ("runtime: {memory_mb: true}", "expected a whole number from 1 to 4096, but found true"),
        ("runtime: {memory_mb: null}", "expected a whole number from 1 to 4096, but found null"),
        ("runtime: {memory_mb: [1]}", "expected a whole number from 1 to 4096, but found a list of 1"),
        ("runtime: {memory_mb: 5000}", "expected a whole number from 1 to 4096, but found 5000"),
        ("runtime: {wall_s: 0}", "runtime.wall_s: expected a number above 0 or null, but found 0"),
        ("runtime: 3", "pie.yaml:1: runtime: expected a section of keys, but found 3"),
        ("- a", "pie.yaml:1: expected a section of keys, but found a list of 1"),
        ("auth: {user: 3}", "auth.user: expected text (not empty) or null, but found 3 (put it in quotes)"),
        (
            "telemetry: {log_level: loud}",
            'expected one of debug, info, warning, error, but found "loud"',
        ),
        (
            "models: []",
            "models: expected a list, each item a section of keys (not empty), but found an empty list",
        ),
        (
            "models: {name: a}",
            "found a section with the keys name (begin each item with `- `)",
        ),
        ("models:\n- path: x\n", "pie.yaml:2: models[0]: the key `name` is missing: expected text"),
        (
            "models: [{name: a b}]",
            'models[0].name: expected text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$, but found "a b"',
        ),
        (
            "models: [{name: a, driver: {device: 3}}]",
            "models[0].driver.device: expected a device name or a list of them",
        ),
        (
            "models: [{name: a, driver: {device: []}}]",
            "expected a device name or a list of them, but found an empty list",
        ),
        (
            "models: [{name: a, driver: {device: [1]}}]",
            "models[0].driver.device[0]: expected text (not empty), but found 1",
        ),
        (
            "models:\n- name: a\n  path: x\n  repo: y\n",
            "pie.yaml:4: models[0].repo: expected one of `path` and `repo`, but found both (x and y)",
        ),
        ("models: [{name: a, revision: x}]", "models[0].revision: expected `repo` beside it"),
        (
            "models:\n- name: a\n- name: b\n- name: a\n",
            "pie.yaml:4: models[2].name: the name `a` is taken by models[0]",
        ),
    ],
)
def test_a_misfit_names_line_key_what_was_found_and_what_was_expected(text: str, problem: str) -> None:
    assert problem in complaint(text)


def test_several_misfits_are_told_together_in_the_order_of_the_file() -> None:
    lines = complaint("runtime:\n  cpu_s: a\nports: 1\nmodels:\n- {name: a, pat: b}\n").splitlines()
    assert [line.split(" ")[0] for line in lines] == ["pie.yaml:2:", "pie.yaml:3:", "pie.yaml:5:"]


def test_workers_are_a_number_or_auto() -> None:
    assert parsed("runtime: {workers: 2}").runtime.workers == 2
    assert parsed("runtime: {workers: auto}").runtime.workers == "auto"
    assert parsed("").runtime.workers == 0
    text = complaint("runtime: {workers: many}")
    assert 'runtime.workers: expected a whole number from 0 to 1024 or one of auto, but found "many"' in text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "server:\nauth:\nserver:\n",
            "pie.yaml:3: the key `server` stands here a second time (first in line 1)",
        ),
        ("auth: {}\n---\nserver: {}\n", "pie.yaml:2:1: a second document begins here"),
        ("runtime:\n  memory_mb: [1\n", "pie.yaml:3:1: not YAML:"),
        ("a: 1\n\tb: 2", "not YAML: found character '\\t'"),
        ("a: 1\nb: &b [*b]", "this alias stands within what it repeats, which begins in line 2"),
        ("a: *nowhere", "not YAML: found undefined alias 'nowhere'"),
        ("1: a", "a key must be text, and this is 1"),
        ("yes: a\n? [1, 2]\n: b", "a key must be text, and this is a list or mapping"),
        ("a: !!python/object:os.system {}", "is not supported; write the value without it"),
        ("a: !!int abc", "the tag `tag:yaml.org,2002:int` does not fit `abc`"),
        ("a: .inf", "expected a finite number, but found .inf"),
        ("a: 1e999", "expected a finite number, but found 1e999"),
        ("a: " + "9" * 50, "this number is too long"),
        ("a: \x01", "pie.yaml: character 3 is not text"),
        ("a: " + "[" * 70 + "]" * 70, f"nested too deeply; at most {MAX_DEPTH} levels"),
        ("[" * 5000, "nested too deeply"),
        ('a: "\\UFFFFFFFF"', "not YAML"),
        ('auth: {user: "\\ud800"}', "auth"),
        ("<<: 3", "`<<` merges mappings"),
    ],
)
def test_what_is_no_plain_single_document_is_refused(text: str, problem: str) -> None:
    assert problem in complaint(text)


def test_aliases_that_grow_without_bound_are_refused() -> None:
    levels = [f"l{n + 1}: &l{n + 1} [{', '.join([f'*l{n}'] * 10)}]" for n in range(9)]
    assert "more than 100000 values" in complaint("l0: &l0 [x]\n" + "\n".join(levels))


def test_anchors_and_merges_save_repetition() -> None:
    config = parsed(
        "models:\n"
        "- &base {name: a, driver: &cpu {type: dummy}}\n"
        "- {<<: *base, name: b}\n"
        "- {name: c, driver: *cpu}\n"
    )
    assert [(model.name, model.driver.type) for model in config.models] == [
        ("a", "dummy"),
        ("b", "dummy"),
        ("c", "dummy"),
    ]


def test_words_that_look_like_other_types_stay_text() -> None:
    config = parsed("auth: {user: no, tenant: 12:30}")
    assert (config.auth.user, config.auth.tenant) == ("no", "12:30")


def test_files_that_cannot_be_configurations_are_refused(tmp_path: Path) -> None:
    binary, huge, latin = tmp_path / "model.gguf", tmp_path / "huge.yaml", tmp_path / "latin.yaml"
    binary.write_bytes(b"GGUF\x03\x00\x00\x00")
    huge.write_bytes(b"#" * (MAX_BYTES + 1))
    latin.write_bytes(b"auth:\n  user: J\xf6rg\n")
    for file, problem in [
        (binary, "character 4 is not text; is this a YAML file?"),
        (huge, "larger than 1048576 bytes"),
        (latin, "latin.yaml:2: byte 15 is not UTF-8 text"),
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "none.yaml", "no such file; `pie config init` writes one"),
    ]:
        with pytest.raises(ConfigError, match="^" + str(file).replace(".", "[.]")) as caught:
            read_config(file)
        assert problem in str(caught.value)


def test_without_a_file_the_one_of_pie_home_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIE_HOME", str(tmp_path))
    assert load_config() == Config()
    (tmp_path / "config.yaml").write_text("runtime: {memory_mb: 7}\n")
    assert load_config().runtime.memory_mb == 7


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!#|>'\"\n ?,%<1.~\t\\"), max_size=40))
def test_any_text_is_data_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        json.dumps(parse_document(text, "pie.yaml").data, allow_nan=False)


@dataclass(frozen=True)
class Spec:
    drafts: Annotated[int, annotated_types.Ge(0), annotated_types.Le(32)] = 4


@dataclass(frozen=True, slots=True)
class DriverOptions:
    """The options of a made-up driver, plain dataclasses as a plugin writes them."""

    total_pages: int = field(default=1024, metadata={"help": "Pages of KV cache."})
    dtype: Literal["float32", "bfloat16"] = "float32"
    share: float = 0.9
    spec: Spec = field(default_factory=Spec)
    swap_pages: int | None = None

    def __post_init__(self) -> None:
        if self.swap_pages is not None and self.swap_pages > self.total_pages:
            raise Misfit(
                f"expected at most total_pages ({self.total_pages}), found {self.swap_pages}", "swap_pages"
            )


def options_from(text: str) -> Options:
    return parsed(text).models[0].driver.options


def test_driver_options_become_the_drivers_own_type() -> None:
    options = options_from(
        "models: [{name: a, driver: {options: {total_pages: 8, share: 1, spec: {drafts: 2}}}}]"
    )
    assert parse_options(DriverOptions, options) == DriverOptions(total_pages=8, share=1.0, spec=Spec(2))


def test_driver_options_are_refused_with_the_same_care_as_settings() -> None:
    options = options_from(
        "models:\n"
        "- name: a\n"
        "  driver:\n"
        "    options:\n"
        "      total_page: 8\n"
        "      dtype: float16\n"
        "      swap_pages: 2.5\n"
        "      spec:\n"
        "        drafts: 99\n"
    )
    with pytest.raises(ConfigError) as caught:
        parse_options(DriverOptions, options)
    place = "models[0].driver.options"
    assert str(caught.value).splitlines() == [
        f"pie.yaml:5: {place}.total_page: unknown key; did you mean `total_pages`?"
        " Known here: dtype, share, spec, swap_pages, total_pages",
        f'pie.yaml:6: {place}.dtype: expected one of float32, bfloat16, but found "float16"',
        f"pie.yaml:7: {place}.swap_pages: expected a whole number or null, but found 2.5",
        f"pie.yaml:9: {place}.spec.drafts: expected a whole number from 0 to 32, but found 99",
    ]


def test_options_that_do_not_go_together_are_refused_at_their_key() -> None:
    with pytest.raises(ConfigError, match=r"^test: swap_pages: expected at most total_pages \(4\), found 5$"):
        parse_options(DriverOptions, {"total_pages": 4, "swap_pages": 5}, Place("test"))


@pytest.mark.parametrize(
    ("device", "replicas", "each"),
    [
        ("cpu", 1, [("cpu",)]),
        ("cpu", 3, [("cpu",)] * 3),
        ("[a, b, c, d]", 1, [("a", "b", "c", "d")]),
        ("[a, b, c, d]", 2, [("a", "b"), ("c", "d")]),
        ("[a, b, c, d]", 4, [("a",), ("b",), ("c",), ("d",)]),
    ],
)
def test_devices_are_dealt_out_to_replicas(device: str, replicas: int, each: list[tuple[str, ...]]) -> None:
    config = parsed(f"models: [{{name: m, replicas: {replicas}, driver: {{device: {device}}}}}]")
    assert list(config.models[0].devices_of_replicas) == each


def test_devices_that_cannot_be_dealt_out_are_refused() -> None:
    text = complaint("models:\n- name: m\n  replicas: 2\n  driver: {device: [a, b, c]}\n")
    assert "pie.yaml:3: models[0].replicas: expected a number by which the 3 devices" in text
