"""Somebody's own loop in two processes (gloo): the same links in both, or one sentence in both and nothing sealed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("peers")]  # the processes are started once
Seen = dict[str, tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Scene -> what process 0 and process 1 have seen."""
    folder = tmp_path_factory.mktemp("peers")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.cola.loop_worker", str(folder)]
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
            env={**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        first, second = (json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in processes)
    finally:
        for process in processes:
            process.kill()
    return {scene: (first[scene], second[scene]) for scene in first}


@pytest.mark.parametrize("scene", ["wrapped", "pissa", "by hand", "accelerate"])
def test_wrapped_again_after_every_extend_they_stay_the_same(seen: Seen, scene: str) -> None:
    """In bf16, where ties round stochastically."""
    first, second = seen[scene]
    assert len(first["links"]) == 3
    assert first == second
    assert [note.split(":")[1] for note in first["notes"]] == [" wrap chain.model again after every extend()."] * 2


def test_a_link_that_was_not_shared_is_not_tied(seen: Seen) -> None:
    first, second = seen["apart"]
    assert first == second
    assert "Process 1 has trained another link 1 than process 0, and nothing was tied" in first["refusal"]
    assert "wrap chain.model again after every extend()" in first["refusal"]
    assert (first["links"], first["open"], first["unchanged"], first["on disk"]) == (1, True, True, 1)


def test_seeds_of_their_own_are_no_chain(seen: Seen) -> None:
    assert all("attach with the same arguments everywhere" in process["refusal"] for process in seen["seeds"])


def test_one_process_writes_for_all(seen: Seen) -> None:
    first, second = seen["one"]
    assert first["refusal"] is None
    assert "Process 1 of 2 was to write to" in second["refusal"]
    assert "call save() only where torch.distributed.get_rank() is 0" in second["refusal"]
    assert first["again"] == second["again"]
    assert "could not be written" in first["failed"]
    assert first["failed"] == second["failed"]
    assert first["sealed"] == second["sealed"] == 1
    assert first["same"]
    assert second["same"]


def test_a_tie_in_one_process_alone_is_told_of(seen: Seen) -> None:
    first, second = seen["only one"]
    assert first["refusal"] == "Not all of the 2 processes came to tie() within 1 s: call it in each of them."
    assert first["links"] == second["links"] == 0
