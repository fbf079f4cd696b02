"""`python -m pie_core` is `pie`."""

from __future__ import annotations

from pie_core.cli import main

if __name__ == "__main__":
    main()
