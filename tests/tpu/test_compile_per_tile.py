"""The router and the per-tile kernels compile for every chip."""

import importlib.util
import subprocess
import sys

import pytest

KERNELS = {
    "attend_tiles_d_key_value",
    "attend_tiles_d_query",
    "attend_tiles_forward",
    "moba_block_means",
    "moba_route",
}


@pytest.mark.timeout(300)
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_kernels_compile_for_every_chip():
    command = [sys.executable, "-m", "tests.tpu.compile_per_tile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = {line.split()[0]: set(line.split()[1:]) for line in done.stdout.splitlines()}
    assert compiled.keys() == {"v5e:2x2", "v5p:2x2x1", "v6e:1x1", "tpu7x:2x2x1"}
    assert all(kernels == KERNELS for kernels in compiled.values()), compiled
