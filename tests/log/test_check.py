"""`check`: what is wrong with notes, line by line, and fixes that change nothing else."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from log.real_notes import NOTES, needs_notes, notes
from modgraft import ModgraftError
from modgraft.core.errors import MissingFileError, UnknownNameError
from modgraft.log import Bibliography, Diagnostic, Entry, parse
from modgraft.log.check import apply_fixes, check, check_note
from modgraft.log.syntax.calculate import CalculationError, agrees, calculate, corrected
from modgraft.log.syntax.mojibake import mojibake

SMITH = Entry("smithThing2020", "A Thing", ("Ann Smith",), "2020", "", "", "papers.bib", 1)
BIB = """@article{smithThing2020,
  title = {A Thing},
  author = {Smith, Ann},
  year = {2020},
}
@article{broken2021,
  title = {never closed,
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "papers.bib").write_text(BIB)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(found: list[Diagnostic]) -> list[str]:
    return [f"{one.note}:{one.line}: {one.severity} {one.code}" for one in found]


def test_one_line_a_problem_with_file_and_line(folder: Path) -> None:
    (folder / "made.py").touch()
    (folder / "a file.txt").touch()
    (folder / "n.md").write_text(
        "## Log\n"
        "- [skim(@smithThing2020)] [code(x) -> [made.py](made.py#L3)] ok, [t](a%20file.txt)\n"
        "- [skim(@smithThink2020)]\n"
        "- [read(@otherPaper2019)] from @AnnSmith\n"
        "- smithThing2020 without\n"
        "- ![](asset/x.png) and [gone](gone.py)\n"
        "- [calculate(6 * 7) -> 43] [calculate(18432 / 48 = 384)] [calculate(1/0)]\n"
        "- [skimm(@smithThing2020)] [a](https://no.where) [b](#anchor) [c](mailto:x@y.z)\n"
        "- [d](file:///etc/passwd) networkâ€™s\n"
        "\n## Learned\n"
    )
    assert lines(check(folder)) == [
        "n.md:3: error near-key",
        "n.md:4: warning missing-key",
        "n.md:4: info handle",
        "n.md:5: warning key-without-at",
        "n.md:6: error dead-figure",
        "n.md:6: error dead-link",
        "n.md:7: error calculate",
        "n.md:7: warning calculate",
        "n.md:8: warning unknown-action",
        "n.md:9: warning file-link",
        "n.md:9: warning mojibake",
        "n.md:11: info empty-section",
        "papers.bib:6: error bibliography",
    ]
    assert all("\n" not in str(one) for one in check(folder))
    assert lines(check("n.md")) == lines(check(folder))  # a note knows its folder's bibliography


def test_fixes_change_their_bytes_and_nothing_else(folder: Path) -> None:
    note = folder / "n.md"
    before = (
        b"\xef\xbb\xbf## Log\r\n- [skimm(@smithThink2020)]\r- smithThing2020 \xff "
        b"network\xc3\xa2\xe2\x82\xac\xe2\x84\xa2s\n- [calculate(6*7) -> 43]"
    )
    note.write_bytes(before)
    note.chmod(0o640)
    assert apply_fixes(check(folder), codes=()) == []
    asked: list[str] = []
    found = check(folder)
    mended = apply_fixes(
        found, codes=["mojibake", "calculate"], ask=lambda d: not asked.append(d.code)
    )
    assert [one.code for one in mended] == asked == ["mojibake", "calculate"]
    after = before.replace(b"\xc3\xa2\xe2\x82\xac\xe2\x84\xa2", "’".encode()).replace(b"43", b"42")
    assert note.read_bytes() == after
    assert note.stat().st_mode & 0o777 == 0o640
    with pytest.raises(ModgraftError, match="changed since it was checked"):
        apply_fixes(found)
    assert note.read_bytes() == after
    apply_fixes(check(folder))
    apply_fixes(check(folder))  # the key can be seen once the action is right
    assert note.read_bytes() == after.replace(b"skimm(", b"skim(").replace(
        b"smithThink2020", b"smithThing2020"
    ).replace(b"- smithThing", b"- @smithThing")


def test_a_code_that_no_check_reports(folder: Path) -> None:
    with pytest.raises(UnknownNameError, match="no code is named 'mojibke'"):
        apply_fixes([], codes=["mojibke"])


def test_a_link_may_be_relative_to_the_project(folder: Path) -> None:
    (folder / "pyproject.toml").touch()
    (folder / "src").mkdir()
    (folder / "log" / "deep").mkdir(parents=True)
    (folder / "log" / "deep" / "n.md").write_text("- [s](src) [l](deep) [x](none)\n")
    assert [one.message for one in check(folder / "log")] == ["there is no file none"]


@given(notes())
@settings(max_examples=150, deadline=None)
def test_every_fix_leaves_less_to_fix(data: bytes) -> None:
    known = Bibliography({"smithThing2020": SMITH, "abcDefgh2010": SMITH})

    def found(data: bytes) -> list[Diagnostic]:
        return [one for one in check_note(parse(data), Path("n.md"), known) if one.fix]

    problems = found(data)
    for _ in range(40):  # an unknown action hides what is wrong inside it
        if not problems:
            return
        fix = problems[0].fix
        assert fix is not None
        before = data
        data = data[: fix.start] + fix.replacement + data[fix.end :]
        assert data != before
        problems = found(data)
    raise AssertionError(f"{problems[0]} comes back")


def test_a_link_stays_a_link(folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "real" / "n.md").write_text("- networkâ€™s\n")
    (folder / "linked.md").symlink_to(folder / "real" / "n.md")
    assert len(apply_fixes(check(folder / "linked.md"))) == 1
    assert (folder / "linked.md").is_symlink()
    assert (folder / "real" / "n.md").read_text() == "- network’s\n"


def test_paths_that_are_not_there(folder: Path) -> None:
    with pytest.raises(MissingFileError, match="no such note or folder"):
        check(folder / "none")


def test_another_year_is_another_source(folder: Path) -> None:
    (folder / "n.md").write_text("- @smithThing2021, @smithThing2020a, @SmithThing2020\n")
    found = [(one.code, one.severity) for one in check("n.md") if one.note == "n.md"]
    assert found == [("missing-key", "warning"), ("missing-key", "warning"), ("near-key", "error")]
    assert "the nearest is @smithThing2020" in check("n.md")[0].message


def test_keys_in_a_log_without_a_bibliography(tmp_path: Path) -> None:
    (tmp_path / "n.md").write_text("- @smithThing2020, @otherThing2021\n")
    (only,) = check(tmp_path)
    assert (only.severity, only.code) == ("info", "no-bibliography")
    assert only.message.startswith("2 citations")


@needs_notes
def test_the_real_notes_are_not_all_errors() -> None:
    found = check(NOTES)
    assert Counter((one.severity, one.code) for one in found) == {
        ("error", "dead-figure"): 15, ("error", "dead-link"): 5,
        ("warning", "missing-key"): 5, ("warning", "mojibake"): 16,
        ("warning", "key-without-at"): 1, ("info", "handle"): 1, ("info", "empty-section"): 7,
    }  # fmt: skip
    missing = {one.message.split()[0] for one in found if one.code == "missing-key"}
    assert missing == {
        "@andreasNeuralModuleNetworks2017", "@kasirzadehConversationArtificialIntelligence2022",
        "@silPrimeQAPrimeRepository2023", "@sunHowDoesInContext2023",
        "@wangKAdapterInfusingKnowledge2021",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("18432 / 48", 384), ("2^10", 1024), ("1,000 × 3", 3000), ("15% * 200", 30), ("7 % 3", 1),
        ("max(1,200)", 200), ("-(2 + 3) * 4", -20), ("sqrt(16)", 4), ("2 ** -1", 0.5),
    ],
)  # fmt: skip
def test_arithmetic(expression: str, value: float) -> None:
    assert calculate(expression) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')", "(1).real", "().__class__", "[1]*9", "'a'*3", "x", "True",
        "1 if 1 else 2", "9**9**9", "2**9999999", "1/0", "(-8)**0.5", "1e999", "10**400 * 1.0",
        "(" * 400, "1" * 5000, "", "max()", "max(1,2,key=abs)", "1and 2", "lambda: 1", "f(1)",
        "a.b(1)", "3 == 3", "log(0)", "round(1, -10^9)", "2^1000 * 2^1000",
        "round(2, 0.5)", "1if 1else 2", "{1}", "1;2", "1\n2", "√2",
    ],
)  # fmt: skip
def test_what_is_no_arithmetic_is_refused(expression: str) -> None:
    with pytest.raises(CalculationError) as error:
        calculate(expression)
    assert len(str(error.value)) < 200


@given(st.text("0123456789+-*/%^().,e ", max_size=30))
def test_any_expression_has_a_value_or_is_refused(expression: str) -> None:
    with suppress(CalculationError):  # and nothing else
        assert isinstance(calculate(expression), (int, float))


@pytest.mark.parametrize(
    ("value", "written", "right"),
    [
        (1 / 3, "0.33", True), (1 / 3, "0.34", False), (0.333, "33%", True),
        (18432, "~18,000", True), (18432, "18,000", False), (2.5e6, "2.5e6", True),
        (3, "$3/month", True), (3, "three", None),
        (0.1 + 0.2, "0.3", True), (128, "128 heads", True), (-2, "−2", True), (384, "= 384", True),
        (40, "40%", True), (0.4, "41 % of all", False), (18_000, "18k", True),
        (1_234_000, "1.2M weights", True), (1_234_000, "1.3M weights", False),
        (7e9, "7 billion", True), (1.5 * 2**30, "1.5 GiB", True), (152, "152 MB", True),
        (152_000_000, "152 MB", True), (5, "0 MB", False), (5e6, "5 Mbit", False),
        (3, "3 km", True), (1, "1e999", False), (2**1000, "3", False), (1, "1e-999", False),
    ],
)  # fmt: skip
def test_a_value_is_compared_as_it_is_rounded(
    value: float, written: str, right: bool | None
) -> None:
    assert agrees(value, written) is right


@pytest.mark.parametrize(
    ("line", "mended"),
    [
        ("calculate(6*7) -> 43 heads", "42 heads"), ("calculate(0.3) -> 40 %", "30 %"),
        ("calculate(12 * 2^20) -> ≈ 13.0 MiB", "≈ 12.0 MiB"), ("calculate(1/3) -> 0.34", "0.33"),
        ("calculate(6*7) -> $43/month", "$42/month"), ("calculate(1537+1) -> 1537 kB", "1538 kB"),
        ("calculate(5e9 * 2) -> 9 billion", "10 billion"), ("calculate(2/3 = 1.5e0)", "0.666667"),
        ("calculate(2.0^1000) -> 1e999", "1.07151e+301"), ("calculate(0*1) -> 5k", "0k"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_mended_with_its_decimals_and_its_unit(line: str, mended: str) -> None:
    data = f"- [{line}] and so on".encode()
    (one,) = parse(data).diagnostics
    assert one.fix is not None
    right = data[: one.fix.start] + one.fix.replacement + data[one.fix.end :]
    assert f"{mended}{')' * ('->' not in line)}] and so on".encode() in right
    assert not [d for d in parse(right).diagnostics if d.severity == "error"]


@given(
    st.one_of(st.integers(-(10**9), 10**9), st.floats(-1e12, 1e12)),
    st.from_regex(r"[~$]?-?\d{1,4}(\.\d{1,3})?(e\d{1,3})?( ?(%|k|MiB|B|million))?", fullmatch=True),
)
def test_what_was_mended_agrees(value: float, written: str) -> None:
    if agrees(value, written) is False:
        assert agrees(value, corrected(value, written))


@pytest.mark.parametrize(
    "text", ["Spaß“ CAFÉ… « café…» MENÜ“", "naïve 你好 ’ → 💡", "é»", "Ã", "\u00e2\u0080", "ÅŸ"]
)
def test_what_people_write_is_no_mojibake(text: str) -> None:
    assert list(mojibake(text.encode())) == []


@given(st.sampled_from("’“”–—…→↓≤💡éüñ×°").map(lambda sign: sign * 2))
def test_what_was_broken_is_repaired(signs: str) -> None:
    table = {byte: bytes([byte]).decode("cp1252", "replace") for byte in range(256)}
    broken = "".join(chr(b) if table[b] == "\ufffd" else table[b] for b in signs.encode())
    (found,) = mojibake(f"- so {broken} it is".encode())
    assert (found.broken, found.repaired) == (broken, signs)
    note = parse(f"- so {broken} it is".encode())
    assert broken in note.text
