"""`python -m pie_core.guests.build`: builds the generic Python guest if its sources changed, and prints its path."""

from __future__ import annotations

import sys

from pie_core.errors import ProgramError
from pie_core.guests.python_component import build_if_stale


def main() -> int:
    try:
        print(build_if_stale())
    except ProgramError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
