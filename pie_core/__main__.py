"""The entry of the command `pie`, and of `python -m pie_core`: takes Ctrl-C from the first moment on.

Until a command has its own handling, the default would be a traceback out of whatever module is being imported.
"""

from __future__ import annotations

import os
import signal


def main() -> None:
    """The console script."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    from pie_core import cli  # here, because importing it takes a while

    cli.main()


if __name__ == "__main__":
    main()
