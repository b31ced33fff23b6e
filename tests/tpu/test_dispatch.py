"""Which implementation a call gets on a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn
from sparse_attn import pallas
from tests import cases, oracle


@pytest.fixture
def on_tpu(monkeypatch):
    """The library believes that it runs on a TPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


def arguments(dtype):
    query, key, value = np.random.default_rng(0).standard_normal((3, 1, 48, 2, 64)).astype(dtype)
    return {"query": query, "key": key, "value": value, "block_size": 16, "top_k": 2}


@pytest.mark.parametrize("implementation", [None, "pallas"])
def test_the_kernels_are_taken_by_default_and_by_name(on_tpu, monkeypatch, implementation):
    def refuse(*args, **options):
        raise AssertionError("the kernel was called")

    for name in ("route", "attend"):
        with monkeypatch.context() as patch:
            patch.setattr(pallas, name, refuse)
            if name == "attend":
                patch.setattr(pallas, "route", lambda query, *_, **__: jnp.zeros((1, 2, 48, 2), jnp.int32))
            with pytest.raises(AssertionError, match="the kernel was called"):
                sparse_attn.moba_attention(**arguments("float32"), implementation=implementation)


def test_what_the_kernels_refuse_goes_to_xla_unless_they_were_named(on_tpu):
    inputs = arguments("float16")
    with pytest.raises(NotImplementedError, match="float16"):
        sparse_attn.moba_attention(**inputs, implementation="pallas")
    output = jax.jit(lambda arrays: sparse_attn.moba_attention(**arrays, block_size=16, top_k=2))(
        {name: inputs[name] for name in ("query", "key", "value")}
    )
    want = oracle.moba(*(inputs[name] for name in ("query", "key", "value")), block_size=16, top_k=2)
    cases.assert_close(output, want, "float16")
