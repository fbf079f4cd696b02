"""`python -m pie_core.config --markdown` prints docs/configuration.md; `--schema` and `--template` the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from pie_core.config.documents import json_schema, markdown, template

_DOCUMENTS: dict[str, Callable[[], str]] = {
    "--markdown": markdown,
    "--schema": lambda: json.dumps(json_schema(), indent=2) + "\n",
    "--template": template,
}


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in _DOCUMENTS:
        sys.stderr.write(f"usage: python -m pie_core.config {'|'.join(_DOCUMENTS)}\n")
        return 2
    sys.stdout.write(_DOCUMENTS[arguments[0]]())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
