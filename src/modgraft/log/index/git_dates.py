"""Find when lines were written: the first commit in which each appears.

One ``git log`` is read as a stream, from the last commit that was read; ``git blame`` is not used.
A line that is in no commit yet gets the date in the note or in its name, else the file's time.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

_HUNK = re.compile(rb"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")
_PLAIN = [
    *("-c", "core.quotePath=false", "-c", "diff.noprefix=false"),
    *("-c", "diff.mnemonicPrefix=false", "-c", "diff.renames=true"),
    *("-c", "color.ui=false", "-c", "log.showSignature=false"),
]


@dataclass(frozen=True, slots=True)
class AddedLine:
    """A line that a commit added to ``path``; or a renamed file, with its old path and no line."""

    path: str
    line: int
    at: str
    renamed_from: str = ""


class GitError(ValueError):
    """Git failed; the message is its first line of output."""


def fingerprint(line: str | bytes) -> int:
    """Hash a line, without the white space around it, to an integer that SQLite can hold."""
    text = line.decode("utf-8", errors="replace") if isinstance(line, bytes) else line
    digest = blake2b(text.strip().encode("utf-8", errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def find_repository(folder: Path) -> Path | None:
    """Return the root of the working tree around ``folder``; None outside of any."""
    above = (folder, *folder.parents)
    return next((p for p in above if (p / ".git").exists()), None)


def head(root: Path) -> str | None:
    """Return the commit that is checked out; None in a repository without commits.

    Raises:
        GitError: if git is not installed, or refuses the repository.
    """
    done = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if done.returncode not in (0, 1):
        raise GitError(_first_line(done.stderr))
    return done.stdout.decode().strip() or None


def is_ancestor(root: Path, old: str) -> bool:
    """Return whether ``old`` is an ancestor of the current commit, so that history was not
    rewritten."""
    return _git(root, "merge-base", "--is-ancestor", old, "HEAD").returncode == 0


def added_lines(
    root: Path, folders: Iterable[Path], since: str | None = None
) -> Iterator[AddedLine]:
    """Yield every line that a commit after ``since`` added to a note, the oldest first.

    Raises:
        GitError: if git fails.
    """
    paths = [_pathspec(folder.relative_to(root)) for folder in folders]
    command = [
        *_command(root),
        *("log", "--reverse", "--topo-order", "--diff-merges=first-parent", "--format=%x00%aI"),
        *("-p", "-U0", "-M", "--no-ext-diff", "--no-textconv", "--text"),
        *([f"{since}..HEAD"] if since else ["HEAD"]),
        *("--", *paths),
    ]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(  # noqa: S603  (git, with paths of the log)
            command, stdout=subprocess.PIPE, stderr=errors, env=_environment()
        ) as process,
    ):
        yield from _parsed(process.stdout or ())
        if process.wait():
            errors.seek(0)
            raise GitError(_first_line(errors.read()))


def _parsed(stream: Iterable[bytes]) -> Iterator[AddedLine]:
    """Parse the output of git log. Lines of hunks are counted, for a note may hold a diff."""
    at, path, old, left = "", "", "", 0
    for raw in stream:
        if left:
            if raw[:1] == b"+":
                yield AddedLine(path, fingerprint(raw[1:]), at)
            left -= raw[:1] in (b"+", b"-")
        elif raw[:1] == b"\0":
            at = raw[1:20].decode("ascii")
        elif raw.startswith(b"rename from "):
            old = _unquoted(raw[12:].rstrip(b"\n"))
        elif raw.startswith(b"rename to "):
            yield AddedLine(_unquoted(raw[10:].rstrip(b"\n")), 0, at, old)
        elif raw.startswith(b"+++ "):
            name = _unquoted(raw[4:].rstrip(b"\n").removesuffix(b"\t"))
            path = name.removeprefix("b/")
        elif match := _HUNK.match(raw):
            left = sum(1 if n is None else int(n) for n in match.groups())


def _unquoted(name: bytes) -> str:
    """Read a path of git's output, which is quoted as in C where it has unusual characters."""
    if name[:1] == b'"':
        name = name[1:-1].decode("unicode_escape").encode("latin-1")
    return os.fsdecode(name)


def _pathspec(folder: Path) -> str:
    literal = re.sub(r"([\\*?\[])", r"\\\1", folder.as_posix())
    inside = "" if folder == Path() else f"{literal}/"
    return f":(top,glob,icase){inside}**/*.md"


def _command(root: Path) -> list[str]:
    return ["git", "-C", str(root), *_PLAIN]


def _environment() -> dict[str, str]:
    """Return the environment without the variables by which a hook redirects git."""
    return {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"LC_ALL": "C"}


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [*_command(root), *arguments]
    try:
        return subprocess.run(  # noqa: S603  (git, with paths of the log)
            command, capture_output=True, env=_environment(), check=False
        )
    except FileNotFoundError as error:
        raise GitError("git is not installed") from error


def _first_line(errors: bytes) -> str:
    lines = errors.decode(errors="replace").strip().splitlines()
    return lines[0] if lines else "git failed without a word"
