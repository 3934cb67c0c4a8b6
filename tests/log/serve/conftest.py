"""The log that the tests of the page read, and a client of its page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from log.serve.page_client import client_of, write_page_log


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page_log(tmp_path_factory.mktemp("page") / "log")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with client_of(folder, folder.parent / "index.sqlite") as made:
        yield made
