"""A JAX without the Triton backend of Pallas, whose end is announced: the library loads, and Mosaic takes its place."""

import pathlib
import subprocess
import sys

import jax
import pytest

from pallas_kernels.gpu import plain
from pallas_kernels.gpu.triton import backward, forward
from sparse_attn.attend.backends import TritonKernels
from tests import attend
from tests.backends import needs_triton
from tests.gpu.test_attend import CASES, CHUNK_ROWS, SMALL, with_chunks

ROOT = pathlib.Path(__file__).parents[2]
WITHOUT = "import sys\nsys.modules['jax.experimental.pallas.triton'] = None\n"
PALLAS = """
import importlib, pkgutil
import jax, jax.numpy as jnp, pallas_kernels, sparse_attn
from tests.gpu.compile import h100

for module in pkgutil.walk_packages([*pallas_kernels.__path__], "pallas_kernels."):
    importlib.import_module(module.name)
import experiments.kernels.on_device

def program(dtype):
    shape = jax.ShapeDtypeStruct((1, 256, 2, 64), dtype)
    def attend(*arrays):
        attention = sparse_attn.moba_attention
        return attention(*arrays, block_size=64, top_k=2, is_causal=True, implementation="pallas")
    with h100():
        return jax.jit(attend).trace(shape, shape, shape).lower(lowering_platforms=("cuda",)).as_text()

if jax.__version_info__ >= (0, 11):
    assert "mosaic_gpu" in program(jnp.bfloat16)
try:
    program(jnp.float32)
except NotImplementedError as error:
    assert "no Triton backend" in str(error) and "Mosaic" in str(error), error
else:
    raise AssertionError("float32 is nothing for Mosaic")
"""


@pytest.mark.timeout(120)
def test_the_library_loads_and_pallas_means_mosaic():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + PALLAS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.timeout(120)
def test_the_tests_of_all_backends_can_be_collected():
    run = "import pytest\nsys.exit(pytest.main(['--collect-only', '-q', 'tests/gpu', 'tests/test_attention.py']))"
    done = subprocess.run([sys.executable, "-c", WITHOUT + run], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


@needs_triton
@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_what_mosaic_takes_from_triton_is_the_same_in_plain_jax(case, monkeypatch):
    monkeypatch.setattr(forward, "merge", lambda *call: plain.merge(*call[:6]))
    monkeypatch.setattr(backward, "add_up", lambda *call: plain.add_up(*call[:4]))
    kernels = TritonKernels(with_chunks(case, SMALL, CHUNK_ROWS), interpret=jax.default_backend() != "gpu")
    output, log_sum_exp, gradients = attend.run(case, kernels)
    attend.check_results(case, output, log_sum_exp)
    attend.check_gradients(case, gradients)
