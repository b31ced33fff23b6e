"""A user's first program, for an installed wheel: run by itself and read by `mypy --strict`, see `make wheel`."""

import importlib.metadata
import typing

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import pallas_kernels
import sparse_attn
from sparse_attn.nn import MoBAAttention
from sparse_attn.systems.infllm_v2 import InfLLMv2
from sparse_attn.systems.prism import Prism

if typing.TYPE_CHECKING:  # mypy refuses each of these, since types reach the user; else the ignore would be unused
    array = jnp.ones(1)
    sparse_attn.moba_attention(array, array, array, block_size="64", top_k=1, is_causal=True)  # type: ignore[arg-type]
    sparse_attn.route_moba(array, array, block_size=64, topk=1, is_causal=True)  # type: ignore[call-arg]
    Prism(block_size="64")  # type: ignore[arg-type]
    Prism().select(array)  # type: ignore[call-arg]
    MoBAAttention(in_features=32, num_heads=2, block_size=64, rngs=nnx.Rngs(0))  # type: ignore[call-arg]

DISTRIBUTION = "sparse-attn-jax"
TOKENS = 40  # a ragged last block


def installed_files() -> None:
    """The wheel holds the two packages with their data, and neither tests nor experiments."""
    names = {str(path) for path in importlib.metadata.files(DISTRIBUTION) or ()}
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"sparse_attn", "pallas_kernels"}
    assert {"sparse_attn/py.typed", "pallas_kernels/py.typed"} <= names
    assert sparse_attn.__version__ == importlib.metadata.version(DISTRIBUTION)
    for package in (sparse_attn, pallas_kernels):  # the installed ones, not a checkout's
        assert any(str(path.locate()) == package.__file__ for path in importlib.metadata.files(DISTRIBUTION) or ())


def functions_agree() -> None:
    """The sparse path gives the reference's output and gradients."""
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (1, TOKENS, 2, 16)) for key in keys]

    def loss(implementation: typing.Literal["reference", "xla"], arrays: list[jax.Array]) -> jax.Array:
        query, key, value = arrays
        output = sparse_attn.moba_attention(
            query, key, value, block_size=16, top_k=2, is_causal=True, implementation=implementation
        )
        return jnp.sum(jnp.sin(output))

    results = [jax.value_and_grad(loss, argnums=1)(implementation, arrays) for implementation in ("reference", "xla")]
    jax.tree.map(lambda want, got: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5), *results)


def module_runs() -> None:
    """A module keeps the shape of its input, and its gradient is finite."""
    module = MoBAAttention(in_features=32, num_heads=2, block_size=16, top_k=2, key_conv_width=3, rngs=nnx.Rngs(0))
    inputs = jax.random.normal(jax.random.key(1), (1, TOKENS, 32))
    assert module(inputs).shape == inputs.shape
    assert jnp.isfinite(jax.grad(lambda inputs: module(inputs).sum())(inputs)).all()


def system_is_exact_where_it_chooses_all() -> None:
    """InfLLM-V2, with as many blocks to choose as there are, is dense causal attention."""
    query, key, value = (jax.random.normal(key, (1, TOKENS, 2, 16)) for key in jax.random.split(jax.random.key(2), 3))
    attention = InfLLMv2(block_size=16, pool_size=8, pool_stride=4, local_blocks=1, top_k=3, dense_length=0)
    output = attention(query, key, value)
    want = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    np.testing.assert_allclose(output, want, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    installed_files()
    functions_agree()
    module_runs()
    system_is_exact_where_it_chooses_all()
    print(f"{DISTRIBUTION} {sparse_attn.__version__} works with jax {jax.__version__}")
