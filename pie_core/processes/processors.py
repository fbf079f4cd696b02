"""How many processors this process may use, and how many workers are worth starting on them."""

from __future__ import annotations

import math
import os
from pathlib import Path

_MOST_WORKERS = 32  # each has some 150 MiB, and a connection to every engine


def automatic_workers(processors: int, engines: int) -> int:
    """One for each processor that the front and the engines leave free."""
    return min(max(processors - 1 - engines, 1), _MOST_WORKERS)


def usable_processors(control_groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Those this process may run on, or as many as its container has the time of."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = _share_of_time(control_groups)
    return allowed if share is None else max(min(allowed, math.ceil(share)), 1)


def _share_of_time(control_groups: Path) -> float | None:
    """How many processors' time a control group has; None: as much as it wants. Of its two versions, either."""
    try:
        quota, period = (control_groups / "cpu.max").read_text().split()
    except (OSError, ValueError):
        folder = control_groups / "cpu"
        try:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
