"""`pie doctor`: what is here, what is missing, and whether the sandbox works on this machine."""

from __future__ import annotations

import typer

from pie_core.cli.diagnosis import Verdict, findings
from pie_core.cli.examples import examples
from pie_core.cli.outcomes import FAILED, reporting


def add_to(app: typer.Typer) -> None:
    app.command(epilog=examples("pie doctor"))(doctor)


@reporting
def doctor() -> None:
    """Look at everything that a run needs; exits with 1 if something is broken."""
    broken = 0
    for finding in findings():
        typer.echo(f"{finding.verdict}  {finding.subject:<10} {finding.text}")
        broken += finding.verdict is Verdict.BAD
    if broken:
        raise typer.Exit(FAILED)
