"""The command ``modgraft log check``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modgraft.cli.log import Bib, Json
from modgraft.cli.log_show import show_problems
from modgraft.core.errors import ModgraftError

if TYPE_CHECKING:
    from modgraft.log import Diagnostic

SEVERITIES = ("error", "warning", "info")


def check(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Notes and folders; none: the whole log.")
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Mend what can be mended, asking before each.")
    ] = False,
    code: Annotated[
        list[str] | None,
        typer.Option(help="With --fix: mend these without asking; all: every one."),
    ] = None,
    least: Annotated[
        str, typer.Option(help="From which severity on problems are shown.")
    ] = "warning",
    as_json: Json = False,
    bib: Bib = None,
) -> None:
    """Check notes: dead links, missing keys, wrong arithmetic, mojibake, broken entries.

    One line a problem: file:line: severity code message. The status is 1 where one is an error.

    [bold]Examples[/bold]

      modgraft log check

      modgraft log check log/fusion.md --least info

      modgraft log check --fix --code mojibake --code near-key
    """
    from modgraft.log.check import apply_fixes
    from modgraft.log.check import check as found_in
    from modgraft.log.index.bibliography import Bibliography
    from modgraft.log.settings import settings

    if least not in SEVERITIES:
        raise typer.BadParameter(f"--least {least}: take one of {', '.join(SEVERITIES)}")
    if code and not fix:
        raise typer.BadParameter("--code says what --fix mends: add --fix")
    sources = Bibliography.read(bib) if bib else None
    checked = paths or list(settings().folders)
    problems = found_in(checked, sources)
    if fix:
        codes = None if not code or "all" in code else code
        mended = apply_fixes(problems, codes, ask=None if code else _confirm)
        for one in mended:
            typer.echo(f"{one.note}:{one.line}: mended {one.code}", err=as_json)
        problems = found_in(checked, sources)
    shown = SEVERITIES[: SEVERITIES.index(least) + 1]
    show_problems([one for one in problems if one.severity in shown], as_json)
    if any(one.severity == "error" for one in problems):
        raise typer.Exit(1)


def _confirm(problem: "Diagnostic") -> bool:
    """Ask whether to apply the fix of a problem."""
    assert problem.fix is not None  # noqa: S101  (only those are asked about)
    if not sys.stdin.isatty():
        raise ModgraftError(
            "--fix asks before each, and there is nobody to ask: say what to mend, as "
            f"--fix --code {problem.code}, or --code all"
        )
    return typer.confirm(f"{problem}\n  {problem.fix.what}?")
