"""Which backend runs is settled for the devices that a program is compiled for, wherever it is traced."""

import importlib.util
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn
from sparse_attn.attend import backends, platform
from sparse_attn.attend.backends import TpuKernels, resolve
from sparse_attn.attend.choice import PerTile
from sparse_attn.attend.platform import ByPlatform
from sparse_attn.grammar.attend import attend_levels
from sparse_attn.layout import whole_rows
from sparse_attn.selection import LevelMap
from tests import cases, oracle

OPTIONS = {"block_size": 128, "top_k": 2, "is_causal": True}
SHAPE = jax.ShapeDtypeStruct((1, 512, 2, 128), jnp.bfloat16)


def program(platforms, implementation=None, dtype=jnp.bfloat16, gradient=False):
    """The text of MoBA exported for the platforms, from here."""
    shape = jax.ShapeDtypeStruct(SHAPE.shape, dtype)

    def attend(*arrays):
        return sparse_attn.moba_attention(*arrays, **OPTIONS, implementation=implementation)

    def differentiate(*arrays):
        return jax.grad(lambda *arrays: attend(*arrays).astype(jnp.float32).sum(), (0, 1, 2))(*arrays)

    return jax.export.export(jax.jit(differentiate if gradient else attend), platforms=platforms)(*[shape] * 3)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_program_for_a_tpu_has_kernels_by_name_alone(gradient):
    for implementation in ("pallas",) if gradient else ("pallas", TpuKernels()):
        assert "tpu_custom_call" in program(["tpu"], implementation, gradient=gradient).mlir_module()
    for implementation in (None, "xla"):
        assert "tpu_custom_call" not in program(["tpu"], implementation, gradient=gradient).mlir_module()


def test_on_verified_kinds_of_devices_alone_kernels_are_the_default(monkeypatch):
    """For an exported program the kinds are those of this process's devices of the platform."""
    monkeypatch.setattr(backends, "VERIFIED", {"TPU v9": "pallas"})
    local = jax.devices()
    kinds = []

    def devices(name=None):
        return [types.SimpleNamespace(device_kind=kind) for kind in kinds] if name == "tpu" else local

    monkeypatch.setattr(jax, "devices", devices)
    for there, is_kernel in (((), False), (("TPU v9",), True), (("TPU v8",), False), (("TPU v9", "TPU v8"), False)):
        kinds[:] = there
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ("tpu_custom_call" in program(["tpu"]).mlir_module()) == is_kernel
        assert "tpu_custom_call" not in program(["tpu"], dtype=jnp.float16).mlir_module()  # refused, hence XLA


@pytest.mark.timeout(120)
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_kinds_are_those_of_the_devices_compiled_for():
    command = [sys.executable, "-m", "tests.tpu.lower_by_kind"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(("implementation", "name"), [("pallas", "TpuKernels"), (TpuKernels(), "TpuKernels")])
def test_a_kernel_by_name_comes_with_one_warning(implementation, name):
    """Router, forward and backward pass share it."""
    platform._warn_unproven.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program(["tpu"], implementation, gradient=True)
    (message,) = (str(warning.message) for warning in caught if "experiments verify" in str(warning.message))
    assert name in message


def test_a_kernel_by_name_needs_no_warning_where_it_is_verified(monkeypatch):
    platform._warn_unproven.cache_clear()
    monkeypatch.setattr(backends, "VERIFIED", {"TPU v9": "pallas"})
    local, chip = jax.devices(), types.SimpleNamespace(device_kind="TPU v9")
    monkeypatch.setattr(jax, "devices", lambda name=None: [chip] if name == "tpu" else local)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program(["tpu"], "pallas")


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm"])
def test_a_program_for_another_platform_has_none(platform, monkeypatch):
    monkeypatch.setattr(backends, "VERIFIED", {jax.devices()[0].device_kind: "pallas"})
    assert "custom_call @tpu" not in program([platform]).mlir_module()


def test_one_program_serves_several_platforms():
    everywhere = ByPlatform((TpuKernels(), *backends.XLA.backends))
    exported = program(["cpu", "tpu", "cuda"], everywhere, dtype=jnp.float32)
    assert "tpu_custom_call" in exported.mlir_module()
    arrays = np.random.default_rng(0).standard_normal((3, *SHAPE.shape)).astype(np.float32)
    cases.assert_close(exported.call(*arrays), oracle.moba(*arrays, **OPTIONS), "float32")  # on a CPU


def test_the_host_does_not_decide(monkeypatch):
    """On a machine that has a TPU, a computation placed on its CPU runs there, and CPU programs have no kernels."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    everywhere = ByPlatform((TpuKernels(), *backends.XLA.backends))
    assert "tpu_custom_call" not in program(["cpu"], everywhere).mlir_module()
    query, key, value = np.random.default_rng(0).standard_normal((3, 1, 48, 2, 64)).astype(np.float32)
    options = {"block_size": 16, "top_k": 2, "is_causal": True}
    output = jax.jit(lambda *arrays: sparse_attn.moba_attention(*arrays, **options))(query, key, value)
    cases.assert_close(output, oracle.moba(query, key, value, **options), "float32")


def test_what_a_kernel_by_name_refuses_is_an_error():
    with pytest.raises(NotImplementedError, match="float16"):
        program(["tpu"], "pallas", dtype=jnp.float16)
    with pytest.raises(NotImplementedError, match="TpuKernels cannot run on cpu"):
        program(["cpu"], TpuKernels())


def test_tracing_on_a_cpu_imports_no_kernels():
    code = """
    import sys, jax, jax.numpy as jnp, sparse_attn
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)
    jax.jit(lambda x: sparse_attn.moba_attention(x, x, x, block_size=64, top_k=2, is_causal=True)).lower(x)
    print([name for name in sys.modules if name.startswith(("pallas_kernels.tpu", "pallas_kernels.gpu"))])
    """
    code = "\n".join(line.strip() for line in code.strip().splitlines())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.timeout(120)
def test_tiles_and_their_gradients_run_through_the_kernels(interpret):
    random = np.random.default_rng(0)
    query, d_output = random.standard_normal((2, 1, 25, 1, 64)).astype(np.float32)
    key, value = random.standard_normal((2, 1, 32, 1, 64)).astype(np.float32)
    levels = LevelMap(jnp.array([[[[1, 0], [0, 1]]]], jnp.int8), 16, 16)
    blocks = whole_rows(query, key, block_size=16, is_causal=True)
    backend = TpuKernels(interpret=interpret)

    def attend(query, key, value):
        return attend_levels(query, key, value, levels, blocks, scale=0.2, implementation=backend).output()

    output, pull_back = jax.vjp(attend, query, key, value)
    chosen = np.asarray(levels.to_mask())
    mask = chosen.repeat(16, 2).repeat(16, 3)[:, :, :25] & (np.arange(32) <= np.arange(25)[:, None] + 7)
    want, want_gradients = oracle.attention(query, key, value, mask, scale=0.2, d_output=d_output)
    cases.assert_close(output, want, "float32")
    for actual, expected in zip(pull_back(d_output), want_gradients, strict=True):
        cases.assert_close(actual, expected, "float32")


def test_tiles_take_the_kernels_for_a_tpu_and_xla_for_what_they_refuse():
    everywhere = ByPlatform((TpuKernels(), *backends.XLA.backends))
    shape = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)

    def compiled(block_size, **weight):
        def attend(query, key, value):
            number = 256 // block_size
            levels = LevelMap(jnp.ones((1, 2, number, number), jnp.int8), block_size, block_size)
            blocks = whole_rows(query, key, block_size=block_size, is_causal=True)
            options = {"scale": 0.2, "implementation": everywhere, **weight}
            return attend_levels(query, key, value, levels, blocks, **options).output()

        return jax.export.export(jax.jit(attend), platforms=["tpu"])(shape, shape, shape).mlir_module()

    assert "tpu_custom_call" in compiled(64)
    assert "tpu_custom_call" not in compiled(8)
    assert "tpu_custom_call" not in compiled(64, key_log_weight=jnp.zeros((1, 256, 2)))


def test_a_backend_says_beforehand_what_it_refuses_for_both_passes():
    array = jnp.zeros((1, 64, 1, 48))
    choice = PerTile(jnp.ones((1, 1, 8, 8), bool), whole_rows(array, array, block_size=8, is_causal=True), None, 8)
    arrays = array, array, array
    assert "key_block_size=8" in TpuKernels().refuses(arrays, choice) or "query_block_size=8" in TpuKernels().refuses(
        arrays, choice
    )
    assert "per tile" in resolve("mosaic").refuses(arrays, choice)
    assert resolve(None).refuses(arrays, choice) is None
