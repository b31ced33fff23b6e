"""A whole training step, sharded over data and heads, compiled for chips that are not here."""

import importlib.util
import json
import subprocess
import sys

import pytest

HBM_OF_V5E = 16 * 2**30


@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_sharded_train_step_fits_a_v5e_chip():
    command = [sys.executable, "-m", "tests.tpu.train_step"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    memory = json.loads(done.stdout.splitlines()[-1])
    assert {"moba_block_means", "moba_route", "attend_backward"} < set(memory["kernels"])
    total = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporary"] + memory["code"]
    assert 0 < memory["temporary"] < total < HBM_OF_V5E, memory
