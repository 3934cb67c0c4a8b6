"""The package as a stranger gets it: wheel and sdist, checked, installed and run on each Python.

    python -m benchmarks.dist [python3.11 python3.12 …]

`build` and `twine` come into an environment of their own. For each interpreter, the wheel (for the
first, the sdist too) is installed in a clean environment, without make and without the pins, and
`python -m modgraft mmcot train` runs as small as it can, in a folder that is no clone. Without
arguments, each of 3.11 to 3.13 that is on PATH is tried. Installing needs a package index.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = ("python3.11", "python3.12", "python3.13")
TRAIN = "mmcot train --quick 0.02 --steps 30 --batch 8 --jobs 1 --set d_model=32 --set d_ff=32 "
TRAIN += "--set layers=1 --set steps_eye=20"
ANYWHERE = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command outside of the clone; stop with what it printed if it fails."""
    done = subprocess.run(
        command, cwd=cwd, env=ANYWHERE, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\nit ended with {done.returncode}")
    return done.stdout


def environment(python: str, folder: Path) -> Path:
    """Make a clean environment; return its interpreter."""
    run(python, "-m", "venv", folder, cwd=folder.parent)
    return folder / "bin" / "python"


def contents(wheel: Path, sdist: Path) -> None:
    """Compare the wheel with the files of the package that git knows, and list the sdist."""
    listed = run("git", "ls-files", "src/modgraft", cwd=ROOT).split()
    wanted = {name.removeprefix("src/") for name in listed}
    with zipfile.ZipFile(wheel) as archive:
        found = {n for n in archive.namelist() if ".dist-info/" not in n}
    if wanted != found:
        sys.exit(f"wheel: lacks {sorted(wanted - found)}, has more {sorted(found - wanted)}")
    with tarfile.open(sdist) as archive:
        names = [Path(n).relative_to(Path(n).parts[0]) for n in archive.getnames()]
    folders = sorted({n.parts[0] for n in names if n.parts})
    print(f"{wheel.name}: {len(found)} files, {wheel.stat().st_size / 1e6:.1f} MB, as in git")
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.1f} MB: {', '.join(folders)}")


def is_there(python: str) -> bool:
    """Return whether a Python runs; pyenv has a command for each that it knows, and not for all."""
    found = shutil.which(python)
    return (
        found is not None
        and not subprocess.run([found, "--version"], capture_output=True).returncode
    )


def main() -> None:
    """Build, check, install and run."""
    wanted = sys.argv[1:] or [name for name in VERSIONS if is_there(name)]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        tools = environment(sys.executable, scratch / "tools")
        run(tools, "-m", "pip", "install", "--quiet", "build", "twine", cwd=scratch)
        run(tools, "-m", "build", "--outdir", scratch / "dist", ROOT, cwd=scratch)
        wheel, sdist = (next((scratch / "dist").glob(p)) for p in ("*.whl", "*.tar.gz"))
        print(run(tools, "-m", "twine", "check", "--strict", wheel, sdist, cwd=scratch).strip())
        contents(wheel, sdist)
        for place, python in enumerate(wanted):
            ways = (wheel, sdist) if python == wanted[0] else (wheel,)
            for number, package in enumerate(ways):
                start = time.monotonic()
                home = scratch / f"{place}-{Path(python).name}-{number}"  # of one name, maybe
                own = environment(python, home)
                run(own, "-m", "pip", "install", "--quiet", package, cwd=scratch)
                (elsewhere := scratch / f"elsewhere-{home.name}").mkdir()
                run(own, "-m", "modgraft", *TRAIN.split(), cwd=elsewhere)
                run(home / "bin" / "modgraft", "inspect", "--help", cwd=elsewhere)
                report = elsewhere / "runs" / "mmcot" / "report.html"
                if not report.is_file():
                    sys.exit(f"{python}: {report} is not there")
                version = run(own, "-V", cwd=scratch).strip()
                took = time.monotonic() - start
                print(
                    f"{version}: {package.suffix} installed, trained and reported in {took:.0f} s"
                )
                shutil.rmtree(home)
        shutil.rmtree(ROOT / "dist", ignore_errors=True)
        shutil.copytree(scratch / "dist", ROOT / "dist")
    print(f"They lie in {ROOT / 'dist'}")


if __name__ == "__main__":
    main()
