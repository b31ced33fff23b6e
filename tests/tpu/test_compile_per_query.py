"""The per-query kernels compile for every chip."""

import importlib.util
import subprocess
import sys

import pytest


@pytest.mark.timeout(300)
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_kernels_compile_for_every_chip():
    command = [sys.executable, "-m", "tests.tpu.compile_per_query"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {line[0] for line in lines} == {"v5e:1x1", "v5p:2x2x1", "v6e:1x1", "tpu7x:2x2x1"}
    assert all(line[1:] == ["attend_backward", "attend_fixed", "attend_running", "cut_tiles"] for line in lines), lines
