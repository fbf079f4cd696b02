"""The build hook: compiles the generic Python guest, which the wheel carries as package data."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GuestBuildHook(BuildHookInterface[Any]):
    """Runs `python -m pie_core.guests.build` before a wheel is packed."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return  # scripts/install builds the guest in the checkout, where it can be seen and cached
        environment = {**os.environ, "PYTHONPATH": self.root}
        command = [sys.executable, "-m", "pie_core.guests.build"]
        subprocess.run(command, cwd=self.root, env=environment, check=True)
