"""Every kernel compiles for Hopper without spilling registers; no GPU is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.plugins.drivers.cuda_native.both_kernels import needs_triton


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_without_spills() -> None:
    """In a process of its own: where kernels are interpreted they cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu_compile"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(run.stdout.splitlines()) >= 25
