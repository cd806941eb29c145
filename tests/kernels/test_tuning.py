"""Which configuration a launch takes, and the command that measures them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from cola_kernels import backend, tuning
from cola_kernels.tuning import Shape

from .conftest import DEVICE

pytest.importorskip("triton")
from cola_kernels import matmul, skinny, tune

SHAPE = Shape(torch.device("cpu"), torch.bfloat16, 8192, 4096, 16, True)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder of tables, and no memory of earlier choices."""
    monkeypatch.setattr(backend, "CACHE", tmp_path)
    lookup = tuning._lookup
    lookup.cache_clear()
    yield tmp_path
    lookup.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [16, 32, 64, 128])
@pytest.mark.parametrize("m", [16, 2048, 8192, 65536])
def test_few_distinct_candidates(m, rank, dtype):
    shape = SHAPE._replace(m=m, rank=rank, dtype=dtype, dropout=False)
    lists = [skinny.project_configs(shape), skinny.factor_grad_configs(shape)]
    for hopper in (True, False):
        lists += [skinny.output_grads_configs(shape, hopper), matmul.seed_configs(shape, hopper)]
        lists += [matmul.gemm_configs(shape, hopper)]
    for candidates in lists:
        assert 1 <= len(candidates) <= 8
        assert len({json.dumps(c) for c in candidates}) == len(candidates)


@pytest.mark.parametrize(("m", "bucket"), [(1, 16), (16, 16), (17, 32), (8192, 8192), (8193, 16384), (10**6, 65536)])
def test_tokens_come_in_buckets(m, bucket):
    assert tuning.bucket(m) == bucket


def test_rule_then_table_then_switch(cache, monkeypatch):
    rule = skinny.project_configs(SHAPE)[0]
    assert tuning.choose("project", skinny.project_configs, SHAPE) == rule
    tuned = {"BM": 64, "BK": 64, "num_warps": 4, "num_stages": 3}
    tune.write_table(cache, "cpu", {SHAPE.key("project"): tuned, SHAPE.key("gemm"): None}, {})
    tuning._lookup.cache_clear()
    assert tuning.choose("project", skinny.project_configs, SHAPE) == tuned
    assert tuning.choose("gemm", lambda shape: [{"BM": 1}], SHAPE) is None
    assert tuning.choose("project", skinny.project_configs, SHAPE._replace(columns=8)) == rule
    tuning._lookup.cache_clear()
    monkeypatch.setattr(backend, "TUNED", False)
    assert tuning.choose("project", skinny.project_configs, SHAPE) == rule


def test_a_table_grows_and_is_named_after_the_gpu(cache):
    tune.write_table(cache, "NVIDIA H200", {"a": {"BM": 1}}, {"a": 1.0})
    path = tune.write_table(cache, "NVIDIA H200", {"b": None}, {"b": 2.0})
    assert path == cache / "nvidia_h200.json"
    assert tuning.table("NVIDIA H200") == {"a": {"BM": 1}, "b": None}
    assert os.listdir(cache) == [path.name]


def test_tuning_finds_the_fastest_and_the_launchers_ask_for_its_keys(cache, monkeypatch):
    """With a made-up clock: the last candidate wins everywhere, and a forward and backward then launch just those."""
    inputs = tune.make_inputs(tune.Problem(20, 24, 40, 4, torch.float16), torch.device(DEVICE))
    entries = {}
    for job in tune.jobs(inputs):
        ticks = iter(range(len(job.candidates), 0, -1))

        def timer(call, ticks=ticks):
            call()
            return float(next(ticks))

        entries[job.key] = tune.fastest(job, timer)[0]
        assert entries[job.key] == job.candidates[-1]
    asked = set()
    monkeypatch.setattr(tuning, "_lookup", lambda kernel, shape: (asked.add(shape.key(kernel)), (False, None))[1])
    i = inputs
    for dropout, seed in ((0.0, None), (0.1, i.seed)):
        skinny.launch_project(i.x, i.lora_a, 1.0, dropout, seed)
        skinny.launch_factor_grad(i.s, i.x, dropout, seed, i.x.dtype)
        matmul.launch_seeded_matmul(i.dy, i.weight, i.s, i.lora_a, 1.0, None, dropout, seed)
    skinny.launch_output_grads(i.dy, i.lora_b, i.s, 1.0, i.dy.dtype)
    matmul.launch_seeded_matmul(i.x, i.weight.t(), i.s, i.lora_b.t(), 1.0, None, 0.0, None)
    untuned = {key for key in asked if key.startswith("gemm") and key.endswith("dropout")}  # one candidate only
    assert asked - untuned == set(entries)


def test_noise_does_not_replace_the_rule():
    job = tune.Job("key", [{"BM": 1}, {"BM": 2}], lambda config: None, 0)
    times = iter((1.0, 0.99))
    assert tune.fastest(job, lambda call: next(times)) == ({"BM": 1}, 1.0)


def run_tune(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "cola_kernels.tune", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **environment}, check=False
    )


def test_the_command_compiles_in_processes_and_writes_a_table(tmp_path):
    small = ("--layers", "24x40", "--tokens", "20", "--ranks", "4", "--dtype", "float16", "--jobs", "2")
    result = run_tune(*small, "--output", str(tmp_path), "--seconds", "100")
    assert result.returncode == 0, result.stderr
    entries = json.loads((tmp_path / tuning.table_name(tuning.gpu_name(torch.device(DEVICE)))).read_text())["entries"]
    assert {key.split("/")[0] for key in entries} == {"project", "factor_grad", "output_grads", "seed", "gemm"}
    assert {key.split("/")[1] for key in entries if key.startswith("gemm")} == {"N", "T"}


def test_tuning_stops_when_its_time_is_up():
    problems = [tune.Problem(20, 24, 40, 4, torch.float32)] * 3
    assert list(tune.tune(problems, torch.device(DEVICE), lambda call: 1.0, seconds=0.0)) == []


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU to tune")
def test_tune_without_a_gpu_says_so():
    result = run_tune(TRITON_INTERPRET="0")
    assert result.returncode == 2
    assert "no GPU is visible" in result.stderr
