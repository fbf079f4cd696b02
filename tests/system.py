"""What the system says of a process, for tests that look for what is left behind; Linux tells it under /proc."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_TRIES = 100


def children_of(pid: int | str = "self") -> set[int]:
    """Of all its threads. If one ends meanwhile its children are another's, so everything is read again."""
    for _ in range(_TRIES):
        with suppress(FileNotFoundError, ProcessLookupError):
            tasks = Path(f"/proc/{pid}/task").iterdir()
            return {int(child) for task in tasks for child in (task / "children").read_text().split()}
    raise AssertionError(f"threads of process {pid} ended in each of {_TRIES} looks, or it is not there")


def sockets_and_pipes() -> set[str]:
    """Among this process's file descriptors."""
    links = set()
    for each in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the folder's own
            links.add(f"{each.name} {each.readlink()}")
    return {link for link in links if "socket:" in link or "pipe:" in link}


def processor_ns(pid: int) -> int:
    """What its threads have spent on a processor; one that ends meanwhile is left out."""
    spent = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            spent += int((task / "schedstat").read_text().split()[0])
    return spent
