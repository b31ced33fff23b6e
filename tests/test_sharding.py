"""On a mesh of eight devices, rows and heads split by plain jit: the same numbers, and no collective."""

import functools
import json
import os
import subprocess
import sys

import pytest

from tests.every_system import NAMES
from tests.sharded import CACHED, IN_SHARD_MAP

# Heads choose together: the devices that share them have to speak.
HEADS_TOGETHER = ("adaspa", "block_bert", "proxy_attention")
FUNCTIONS = ("moba, segments", "moba, lengths, reference", "a choice given", "window", "window of several parts")
CACHES = [f"{name}, cached" for name in CACHED]
pytestmark = pytest.mark.timeout(400)


@functools.cache
def results():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.sharded"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", [*FUNCTIONS, *NAMES, *CACHES])
def test_split_rows_and_heads_give_the_same_numbers_without_a_collective(name, kind):
    difference, collectives = results()[name][kind]
    assert difference < 1e-5
    # XLA cannot split `lax.top_k`, which the reference calls as it stands.
    if name not in HEADS_TOGETHER and (name, kind) != ("moba, lengths, reference", "Auto"):
        assert collectives == []


@pytest.mark.parametrize("name", [*IN_SHARD_MAP, "moba, cached"])
def test_shard_map_takes_the_functions_under_its_default_check(name):
    difference, _ = results()[f"{name}, in shard_map"]["Manual"]
    assert difference < 1e-5


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_transformer_adds_up_the_gradients_of_its_rows_and_speaks_no_more(kind):
    difference, collectives = results()["transformer"][kind]
    assert difference < 1e-5
    assert set(collectives) == {"all-reduce"}
