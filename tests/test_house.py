"""The rooms of ``src/modgraft``: which may import which, and where the public names are listed."""

from __future__ import annotations

import ast
import importlib.util
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import modgraft
import modgraft.log

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "modgraft"


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh process that imports this checkout."""
    environment = os.environ | {"PYTHONPATH": str(SOURCES.parent)}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def public_names() -> dict[str, str]:
    """Map each name of ``__init__.pyi`` to the module that it is imported from there."""
    stub = ast.parse((SOURCES / "__init__.pyi").read_text("utf-8"))
    return {
        alias.asname or alias.name: f"modgraft.{node.module}" if node.module else "modgraft"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


PUBLIC = public_names()


def test_rooms_import_one_way_and_in_no_circle() -> None:
    """The contracts stand in pyproject.toml, under ``[tool.importlinter]``."""
    run = "from importlinter.cli import lint_imports_command as lint; lint()"
    done = python(run, "--no-cache", "--no-logo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_file_stands_in_a_room() -> None:
    files = sorted(path.name for path in SOURCES.glob("*.py"))
    assert len(files) <= 3, f"move them to a room: {', '.join(files)}"


def test_the_former_name_of_the_log_tells_the_new_one() -> None:
    with pytest.raises(ImportError, match=r"modgraft\.log"):
        importlib.import_module("modgraft.trajectory")


def test_every_public_name_comes_from_its_home() -> None:
    assert sorted(modgraft.__all__) == sorted(PUBLIC)
    assert {*PUBLIC, "__version__", "__doc__"} <= {*dir(modgraft)}
    for name, home in PUBLIC.items():
        assert getattr(modgraft, name) is getattr(importlib.import_module(home), name), name


def test_no_room_imports_the_whole() -> None:
    """The list of public names is the root's, and imports every room: below, only names are read.

    ``core/config.py`` asks it for the class of a name in a folder, and others for the version.
    """
    for path in SOURCES.rglob("*.py"):
        where = path.relative_to(SOURCES).as_posix()
        if where.startswith(("cli/", "recipes/")):  # which use the library as a stranger does
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "modgraft":
                assert [alias.name for alias in node.names] == ["__version__"], where
            elif isinstance(node, ast.Import) and "modgraft" in [a.name for a in node.names]:
                assert where in ("core/config.py", "store/card.py"), where
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                assert not ast.unparse(node.args[0]).startswith(("'modgraft", "f'modgraft")), where


@pytest.mark.parametrize("package", ["modgraft", "modgraft.log", "modgraft.report"])
def test_a_module_that_fails_is_not_taken_for_a_name_that_is_missing(package: str) -> None:
    code = (
        "import importlib, sys\n"
        "package = importlib.import_module(sys.argv[1])\n"
        "find = importlib.import_module\n"
        "def broken(name, *rest):\n"
        "    raise AttributeError('this version has no f')\n"
        "importlib.import_module = broken\n"
        "try:\n"
        "    hasattr(package, package.__all__[-1])\n"
        "except ImportError as error:\n"
        "    assert 'this version has no f' in str(error), error\n"
        "    assert not hasattr(package, 'nothing')\n"
        "    print('told')"
    )
    done = python(code, package)
    assert done.stdout == "told\n", done.stderr


def test_to_import_draws_no_random_number() -> None:
    code = (
        "import random, sys\n"
        "before = random.getstate()\n"
        "import modgraft\n"
        "import torch\n"
        "drawn = torch.get_rng_state()\n"
        "for name in modgraft.__all__:\n"
        "    getattr(modgraft, name)\n"
        "    assert random.getstate() == before, name\n"
        "assert torch.equal(torch.get_rng_state(), drawn)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_public_names_are_listed_once() -> None:
    """No room lists a public name again, in ``__all__`` or by importing it in ``__init__.py``."""
    for path in SOURCES.rglob("*.py"):
        again = set()
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ImportFrom) and path.name == "__init__.py":
                again |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Assign) and "__all__" in map(ast.unparse, node.targets):
                again |= {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
        assert not again & PUBLIC.keys(), path.relative_to(ROOT)


def test_no_module_of_the_log_imports_torch() -> None:
    for package in ("mcp", "pygls", "starlette", "uvicorn"):  # of the extra `log`
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    names = [m.name for m in pkgutil.walk_packages(modgraft.log.__path__, "modgraft.log.")]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert not {'torch', 'transformers'} & sys.modules.keys(), name"
    )
    done = python(code, "modgraft.log", *names)
    assert done.returncode == 0, done.stderr
    assert len(names) > 30
