"""Processor time and memory of a process, as the system counts them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    cpu_s: float  # of all its threads, in user and system mode
    resident_bytes: int


def usage_of(pid: int) -> ProcessUsage | None:
    """None where the system does not tell, or the process is gone."""
    folder = Path("/proc", str(pid))
    try:
        # The name in parentheses may hold anything; the fields behind it are numbers.
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        pages = int((folder / "statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    ticks = int(fields[11]) + int(fields[12])
    return ProcessUsage(ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGESIZE"))
