"""The program that the README shows runs as it stands there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rules.source_tree import ROOT

DUMMY_CONFIG = "models:\n  - name: dummy\n    driver: {type: dummy}\n"


@pytest.mark.slow
def test_the_readmes_program_runs_and_answers_three_times(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "three.py").write_text(example)
    (tmp_path / "dummy.yaml").write_text(DUMMY_CONFIG)
    command = [sys.executable, "-m", "pie_core", "run", "three.py", "-c", "dummy.yaml", "--quiet"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout)
    assert len(answers) == 3
    assert all(answers)
