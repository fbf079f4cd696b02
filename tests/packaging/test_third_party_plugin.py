"""Somebody else's package, installed beside the wheel, is used from YAML alone; one that is broken is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pie_core.cli.plugins import Kind, write_plugin
from pie_core.testing.any_architecture import write_checkpoint
from tests.packaging.conftest import build_wheel, call
from tests.rules.source_tree import ROOT

EXAMPLE = ROOT / "examples/third_party_plugin"
TEXT_FILES = ROOT / "plugins/drivers/dummy/checkpoint"

CONFIG = """
models:
  - name: copying
    path: {text}
    driver: {{type: copycat, options: {{page_size: 32}}}}
  - name: seed
    path: {seed}
    driver: {{type: portable, options: {{dtype: float32, kv_memory_mb: 8}}}}
server: {{port: 0}}
auth: {{enabled: false}}
"""

RIVAL = """
from pie_copycat import DECLARATION
from pie_core.hookspecs import hookimpl

@hookimpl
def pie_drivers():
    return [DECLARATION]
"""

TALK = """
import sys
from pie_core.client import SyncClient

with SyncClient(sys.argv[1]) as client:
    assert [model["name"] for model in client.models()] == ["copying", "seed"]
    for model in ("copying", "seed"):
        print(client.run("ask", {"model": model}))
"""

ASK = """
from inferlet import Context, Model, Sampler

async def main(input):
    context = Context(Model.load(input["model"]))
    context.append(list(range(65, 91)) * 2 + [65])
    return await context.generate(Sampler.argmax(), max_tokens=5, auto_flush=False).collect_tokens()
"""


def test_the_driver_of_the_example_is_what_the_template_makes(tmp_path: Path) -> None:
    write_plugin(Kind.DRIVER, "copycat", tmp_path / "made")
    for file in (
        "pie_copycat/__init__.py",
        "pie_copycat/options.py",
        "pie_copycat/driver.py",
        "tests/test_driver.py",
    ):
        assert (EXAMPLE / file).read_text() == (tmp_path / "made" / file).read_text(), file


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with both wheels; what they need is borrowed from this one."""
    folder = tmp_path_factory.mktemp("third-party")
    sources = folder / "sources"
    shutil.copytree(EXAMPLE, sources, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "wheels").mkdir()
    example = build_wheel(sources, folder / "wheels")
    call([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], cwd=folder)
    python = folder / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(python)]
    call([*pip, "install", "--no-deps", "--no-index", str(wheel), str(example)], cwd=folder)
    (site_packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture(scope="module")
def config(site: Path) -> Path:
    """Both plugins in use: tiny random Seed-OSS weights, and the text files of the pretended model."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        from pie_seed_oss import DECLARATION  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(EXAMPLE))
    shutil.copytree(TEXT_FILES, site / "text")
    shutil.copytree(TEXT_FILES, site / "seed", ignore=shutil.ignore_patterns("config.json"))
    tiny = {
        "model_type": "seed_oss",
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
    }
    write_checkpoint(site / "seed", DECLARATION, tiny)
    file = site / "pie.yaml"
    file.write_text(CONFIG.format(text=site / "text", seed=site / "seed"))
    (site / "ask").mkdir()
    manifest = '[package]\nname = "ask"\nversion = "1.0.0"\n[parameters]\nmodel = { type = "string" }\n'
    (site / "ask/Pie.toml").write_text(manifest)
    (site / "ask/main.py").write_text(ASK)
    return file


def environment(site: Path) -> dict[str, str]:
    return {**os.environ, "PIE_HOME": str(site / "home"), "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}


def pie(site: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [site / "venv/bin/pie", *arguments]
    return subprocess.run(
        command, cwd=site, env=environment(site), capture_output=True, text=True, check=False
    )


@contextmanager
def serving(site: Path, config: Path) -> Iterator[str]:
    """A server in the environment; gives the address for clients, and stops it by SIGTERM."""
    command: list[str | Path] = [site / "venv/bin/pie", "serve", "-c", config]
    server = subprocess.Popen(command, cwd=site, env=environment(site), stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        address = server.stdout.readline().split()[-1]
        assert server.stdout.readline() == "ready: copying, seed\n"
        yield address.replace("http", "ws", 1)
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.communicate()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_both_plugins_are_listed_with_where_they_are_from(site: Path) -> None:
    listed = pie(site, "plugins", "list")
    assert listed.returncode == 0, listed.stderr
    rows = {row.split()[0]: row for row in listed.stdout.splitlines()}
    assert "driver copycat" in rows["copycat"]
    assert "architecture seed_oss" in rows["seed_oss"]
    assert all("pie-example-plugins 0.3.0" in rows[name] for name in ("copycat", "seed_oss"))
    assert pie(site, "plugins", "doctor").returncode == 0
    for kind in Kind:  # the templates travel with the wheel
        assert pie(site, "plugins", "new", kind, f"new-{kind}").returncode == 0
        assert list((site / f"new-{kind}").glob("tests/test_*.py"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_yaml_alone_runs_and_serves_models_on_them(site: Path, config: Path) -> None:
    ran = pie(site, "run", "./ask", "--quiet", "-c", config, "--", "--model", "copying")
    assert (ran.returncode, json.loads(ran.stdout)) == (0, [66, 67, 68, 69, 70]), ran.stderr
    assert pie(site, "install", "ask").returncode == 0
    with serving(site, config) as address:
        talked = call([site / "venv/bin/python", "-c", TALK, address], cwd=site, PYTHONPATH="")
    copied, computed = (json.loads(line) for line in talked.splitlines())
    assert copied == [66, 67, 68, 69, 70]
    assert len(computed) == 5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_own_tests_run_our_contract_suites_there(site: Path) -> None:
    command: list[str | Path] = [
        site / "venv/bin/python",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        site / "sources",
    ]
    run = call(command, cwd=site, PYTHONPATH="", OMP_NUM_THREADS="1")
    assert " passed" in run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_broken_plugin_is_refused_where_it_is_needed_and_a_rival_by_name(site: Path, config: Path) -> None:
    (site_packages,) = (site / "venv").glob("lib/python*/site-packages")
    for name, source in (("broken", "raise ZeroDivisionError('at import')\n"), ("rival", RIVAL)):
        (site_packages / f"pie_{name}.py").write_text(source)
        info = site_packages / f"pie_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pie-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[pie.plugins]\n{name} = pie_{name}\n")
        if name == "broken":
            skipped = pie(site, "run", "./ask", "--quiet", "-c", config, "--", "--model", "copying")
            assert skipped.returncode == 0, skipped.stderr
            assert "the plugin broken of pie-broken is left out: ZeroDivisionError" in skipped.stderr
            (site / "broken.yaml").write_text("models: [{name: m, driver: {type: broken}}]\n")
            needed = pie(site, "run", "./ask", "-c", site / "broken.yaml", "--", "--model", "m")
            assert needed.returncode == 2
            assert "plugin 'broken' of pie-broken is broken: ZeroDivisionError: at import" in needed.stderr
    refused = pie(site, "run", "./ask", "-c", config, "--", "--model", "copying")
    assert refused.returncode == 1
    assert "driver 'copycat' is claimed by both" in refused.stderr
    assert "(pie-example-plugins 0.3.0)" in refused.stderr
    assert "(pie-rival 1.0)" in refused.stderr
    examined = pie(site, "plugins", "doctor")
    assert examined.returncode == 1
    assert "!!  broken" in examined.stdout
