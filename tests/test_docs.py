"""Every ```python block of the pages runs, in one namespace a page, and every link leads somewhere.

The pages are README, CONTRIBUTING, docs/ and the READMEs of rooms.

A block that cannot run says so in its own fence, with the reason, and the reason is reported:

    ```python skip: needs two GPUs
"""

from __future__ import annotations

import re
import sys
import traceback
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`]*)$")


@dataclass(frozen=True)
class Block:
    """One fenced block: where its first line of code stands, the code, and why it is skipped."""

    line: int
    code: str
    skip: str | None = None


def python_blocks(text: str, name: str) -> list[Block]:
    """Find the Python blocks of a page; any other fence (bash, plain) is passed over."""
    blocks, lines = [], text.splitlines()
    opened: tuple[int, str, str] | None = None
    for number, line in enumerate(lines):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened = (number, fence["info"].strip(), fence["indent"])
        elif opened is not None and fence and not fence["info"].strip():
            start, info, indent = opened
            opened = None
            language, _, rest = info.partition(" ")
            if language not in {"python", "py"}:
                continue
            skip = re.fullmatch(r"skip: *(\S.*)", rest.strip()) if rest.strip() else None
            if rest.strip() and skip is None:
                raise ValueError(
                    f"{name}:{start + 1}: cannot read the fence {info!r}; "
                    "write ```python, or ```python skip: <why it cannot run>"
                )
            code = "\n".join(row.removeprefix(indent) for row in lines[start + 1 : number])
            blocks.append(Block(start + 2, code, skip[1] if skip else None))
    if opened is not None:
        raise ValueError(f"{name}:{opened[0] + 1}: this fence is never closed")
    return blocks


def run_blocks(blocks: list[Block], path: str) -> None:
    """Run blocks in order in one module, so that a traceback shows the page's own line."""
    module = types.ModuleType("modgraft_docs_page")
    sys.modules[module.__name__] = module  # dataclasses look their module up by name
    try:
        for block in blocks:
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, path, "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]


PAGES = {
    str(path.relative_to(ROOT)): python_blocks(path.read_text("utf-8"), path.name)
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("**/*.md")),
        *sorted((ROOT / "src").glob("**/README.md")),
    ]
}


def links(page: Path) -> list[str]:
    """List the relative links of a page; what stands in code is none."""
    text = page.read_text("utf-8")
    text = re.sub(r"^ *```[^`\n]*$.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "code", text, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if "://" not in target]


def anchors(page: Path) -> set[str]:
    """Name the headings of a page as GitHub's links do."""
    heads = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    here = ROOT / page
    for target in links(here):
        path, _, anchor = target.partition("#")
        there = here.parent / path if path else here
        assert there.exists(), f"{page} leads to {target}, which is not there"
        assert not anchor or anchor in anchors(there), f"{page}: no heading {target}"


@pytest.mark.parametrize("page", [name for name, blocks in PAGES.items() if blocks])
def test_every_python_block_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # what a block saves does not land in the repository
    run_blocks([block for block in PAGES[page] if block.skip is None], str(ROOT / page))


def test_the_site_has_every_page() -> None:
    listed = set(
        re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    )
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").glob("**/*.md")}
    assert there <= listed, f"not in the nav of mkdocs.yml: {sorted(there - listed)}"


def test_the_readmes_main_row_is_that_of_the_results() -> None:
    rows = [
        r for r in (ROOT / "README.md").read_text("utf-8").splitlines() if "Two stages, fused" in r
    ]
    assert rows
    assert rows[0] in (ROOT / "docs" / "mmcot.md").read_text("utf-8").splitlines()


SKIPPED = [(f"{name}:{b.line}", b.skip) for name, blocks in PAGES.items() for b in blocks if b.skip]

if SKIPPED:

    @pytest.mark.parametrize(("where", "why"), SKIPPED)
    def test_blocks_that_do_not_run(where: str, why: str) -> None:
        pytest.skip(f"{where}: {why}")


def test_the_harness_shares_a_namespace_and_reports_the_pages_line() -> None:
    page = "# t\n```python\nx = 1\n```\n```bash\nexit 1\n```\n```python\ny = x / 0\n```\n"
    blocks = python_blocks(page, "t.md")
    assert [(b.line, b.code) for b in blocks] == [(3, "x = 1"), (9, "y = x / 0")]
    with pytest.raises(ZeroDivisionError) as error:
        run_blocks(blocks, "t.md")
    last = traceback.extract_tb(error.tb)[-1]
    assert (last.filename, last.lineno) == ("t.md", 9)


def test_a_skipped_block_gives_its_reason() -> None:
    (block,) = python_blocks("```python skip: needs two GPUs\nboom\n```\n", "t.md")
    assert block.skip == "needs two GPUs"
    for fence in ("python no-run", "python skip", "python skip:"):
        with pytest.raises(ValueError, match=r"t\.md:1: cannot read the fence"):
            python_blocks(f"```{fence}\nboom\n```\n", "t.md")
    with pytest.raises(ValueError, match=r"t\.md:1: this fence is never closed"):
        python_blocks("```python\nboom\n", "t.md")
