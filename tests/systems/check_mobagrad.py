"""MoBA against outputs and gradients of its authors' code under autograd."""

import functools

import jax

import sparse_attn
from tests.backends import PLAIN
from tests.systems.check_moba import assert_close, options_of


def check(arrays):
    _, options = options_of(arrays)
    query, key, value = (arrays[name][None] for name in "qkv")  # [1, tokens, heads, head_dim]
    for implementation in PLAIN:
        attend = functools.partial(sparse_attn.moba_attention, **options, implementation=implementation)

        @jax.jit
        def output_and_gradients(query, key, value, d_output, attend=attend):
            output, pull_back = jax.vjp(attend, query, key, value)
            return output, *pull_back(d_output)

        results = output_and_gradients(query, key, value, arrays.get("dout", arrays["out"])[None])
        names = ("out", "dq", "dk", "dv") if arrays.get("has_grad", True) else ("out",)
        for name, result in zip(names, results, strict=False):
            assert_close(result[0], arrays[name], err_msg=name)
