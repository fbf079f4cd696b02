"""Names that people type: what they probably meant when a name is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, if any is like it at all."""
    candidates = {candidate.lower().replace("-", "_"): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower().replace("-", "_"), candidates, n=1, cutoff=0.6)
    return candidates[matches[0]] if matches else None


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """'unknown driver `portabel`; did you mean `portable`? Known: dummy, portable'."""
    names = sorted(known)
    guess = nearest(name, names)
    question = f"; did you mean `{guess}`?" if guess is not None else "."
    listing = f" Known: {', '.join(names)}" if names else f" No {kind} is known."
    return f"unknown {kind} `{name}`{question}{listing}"
