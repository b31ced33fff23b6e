"""A decode step compiles for every chip, with its kernel and without a copy of the cache."""

import importlib.util
import subprocess
import sys

import pytest


@pytest.mark.timeout(300)
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_step_compiles_for_every_chip_and_copies_no_cache():
    command = [sys.executable, "-m", "tests.tpu.compile_decode"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {line[0] for line in lines} == {"v5e:1x1", "v5p:2x2x1", "v6e:1x1", "tpu7x:2x2x1"}
    for _, *kernels, spare, cache in lines:
        assert kernels == ["attend_few"]
        assert int(spare) < int(cache) / 2, (spare, cache)
