"""What belongs to a GPU that has faulted, kept until the process ends.

Torch asks the GPU about pinned memory that is freed, and throws where nobody can catch it: freeing one such tensor
behind a fault aborts the process. So whoever notices the loss hands over all that it holds, errors and the frames that
they passed among it. None of it is freed, not even when the interpreter takes its modules apart.
"""

from __future__ import annotations

import ctypes

_kept: list[object] = []


def keep_until_exit(*owned: object) -> None:
    if not _kept:  # a reference that the interpreter's own ending does not drop
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_kept))
    _kept.extend(owned)
