"""A minute of the fuzzer, always the same cases. `python -m tests.fuzz` searches for longer."""

from __future__ import annotations

import pytest

from .material import made
from .scenes import SCENES, World, play

CASES = {
    "run_folder": 40,
    "writes": 12,
    "kills": 12,
    "model_files": 16,
    "data_files": 16,
    "configurations": 24,
    "adapters": 24,
}
ENDINGS = {"kills": {0}, "configurations": {2}}  # what is damaged at random is hardly ever a configuration still

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return made(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("scene", SCENES)
def test_one_sentence_or_the_same_result(scene: str, world: World) -> None:
    endings = set()
    for seed in range(CASES[scene]):
        found = play(world, scene, seed)
        assert found.fault is None, f"{scene} {seed}: {found.fault}: {found.what}\n{found.outcome.said[-3000:]}"
        endings.add(found.outcome.code)
    assert endings >= ENDINGS.get(scene, {0, 2}), "the cases are all of one kind"
