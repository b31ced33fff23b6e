"""Which implementation a call gets on a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn
from sparse_attn import pallas
from sparse_attn.selection import LevelMap
from sparse_attn.tiles import attend_tiles
from sparse_attn.visibility import make_visibility
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


@pytest.mark.timeout(120)
def test_tiles_and_their_gradients_run_through_the_kernels(interpret):
    random = np.random.default_rng(0)
    query, d_output = random.standard_normal((2, 1, 200, 1, 64)).astype(np.float32)
    key, value = random.standard_normal((2, 1, 256, 1, 64)).astype(np.float32)
    chosen = np.array([[[[True, False], [False, True]]]])
    visibility = make_visibility(query, key, is_causal=True)

    def attend(query, key, value):
        return pallas.attend_tiles(query, key, value, chosen, visibility, 128, 128, 0.2, interpret)[0]

    output, pull_back = jax.vjp(attend, query, key, value)
    mask = chosen.repeat(128, 2).repeat(128, 3)[:, :, :200] & (np.arange(256) <= np.arange(200)[:, None] + 56)
    want, want_gradients = oracle.attention(query, key, value, mask, scale=0.2, d_output=d_output)
    cases.assert_close(output, want, "float32")
    for actual, expected in zip(pull_back(d_output), want_gradients, strict=True):
        cases.assert_close(actual, expected, "float32")


def test_tiles_take_the_kernels_on_a_tpu_and_xla_for_what_they_refuse(on_tpu, monkeypatch):
    query, key, value = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 64)).astype(np.float32)
    visibility = make_visibility(query, key, is_causal=True)
    levels = LevelMap(np.ones((1, 2, 4, 4), np.int8), 8, 8)  # blocks below the kernels' smallest
    want = oracle.attention(query, key, value, np.tri(32, dtype=bool) & np.ones((1, 2, 1, 1), bool), scale=0.2)
    cases.assert_close(attend_tiles(query, key, value, levels, visibility, scale=0.2).output(), want, "float32")
    monkeypatch.setattr(pallas, "attend_tiles", lambda *_: (query, np.zeros((1, 32, 2), np.float32)))
    np.testing.assert_array_equal(attend_tiles(query, key, value, levels, visibility, scale=0.2).output(), query)
