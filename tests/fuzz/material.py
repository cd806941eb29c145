"""The random model and the task of the tests, without pytest."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import datasets  # noqa: F401  (children are forked, and find everything imported)
import torch
import transformers

from ..conftest import make_task_files, make_tiny_folder
from .scenes import World, make_world

torch.set_num_threads(1)


def made(folder: Path) -> World:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    (folder / "made").mkdir()
    return make_world(folder, make_tiny_folder(folder / "made"), make_task_files(folder / "made"))
