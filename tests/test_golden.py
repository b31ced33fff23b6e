"""Numbers computed by MoBA's own published code: choices, outputs and gradients.

Every `moba_*.npz` and `mobagrad_*.npz` is compared: those of tests/golden always, and those of the folder named by the
environment variable GOLDEN_DIR (by default shared/golden beside the repository) if it is there. Sequences are packed
there and the library gets them as segments. Its block ids run through a row, those of the files start at each sequence.
"""

import functools
import os
import pathlib

import jax
import numpy as np
import pytest

import sparse_attn
from tests.test_attention import every_implementation

TESTS = pathlib.Path(__file__).parent
FOLDERS = (
    TESTS / "golden",
    pathlib.Path(os.environ.get("GOLDEN_DIR", TESTS.parent.parent / "shared" / "golden")),
)
TOLERANCE = 1e-4  # absolute; theirs is float32 in another order of summation


def find(prefix):
    """Files by prefix, one parameter each; a skipped one where there is none."""
    files = {path.name: path for folder in FOLDERS for path in sorted(folder.glob(f"{prefix}_*.npz"))}
    nothing = pytest.param(None, marks=pytest.mark.skip(reason=f"no {prefix}_*.npz in {[str(f) for f in FOLDERS]}"))
    return pytest.mark.parametrize("path", list(files.values()) or [nothing], ids=lambda path: path and path.stem)


def load(path):
    """The arrays of a file, the lengths of its sequences, and the options of the call."""
    with np.load(path) as file:
        arrays = dict(file)
    lengths = np.diff(arrays["cu_seqlens"]) if "cu_seqlens" in arrays else arrays["seq_lengths"]
    ids = np.repeat(np.arange(lengths.size), lengths).astype(np.int32)[None]  # [1, tokens]
    top_k = arrays["topk"] if "topk" in arrays else arrays["top_k"]
    options = {"block_size": int(arrays["block_size"]), "top_k": int(top_k)}
    return arrays, lengths, options | {"query_segment_ids": ids, "key_value_segment_ids": ids}


def q_k_v(arrays):
    return tuple(arrays[name][None] for name in "qkv")  # [1, tokens, heads, head_dim]


@every_implementation
@find("moba")
def test_choices_and_outputs_are_those_of_the_published_code(path, implementation):
    arrays, lengths, options = load(path)

    @jax.jit
    def call(query, key, value):
        selection = sparse_attn.route_moba(query, key, **options, implementation=implementation)
        return selection.indices, sparse_attn.moba_attention(
            query, key, value, **options, implementation=implementation
        )

    indices, output = (np.asarray(x)[0] for x in call(*q_k_v(arrays)))
    np.testing.assert_allclose(output, arrays["output"], rtol=0, atol=TOLERANCE)

    blocks = -(-lengths // options["block_size"])  # of every sequence
    first_block = np.repeat(np.cumsum(blocks) - blocks, lengths)[:, None]  # [tokens, 1]
    position = np.concatenate([np.arange(length) for length in lengths])
    is_chosen = indices >= 0
    local = np.where(is_chosen, indices - first_block, 0)  # [heads, tokens, top_k], block inside its own sequence
    np.testing.assert_array_equal(local[..., 0], np.broadcast_to(position // options["block_size"], local.shape[:2]))

    mask = np.zeros_like(arrays["block_mask"])  # [heads, tokens, blocks of a sequence]
    for row in np.argwhere(is_chosen):
        mask[row[0], row[1], local[tuple(row)]] = True
    np.testing.assert_array_equal(mask, arrays["block_mask"])

    gate = np.take_along_axis(arrays["gate_unmasked"], local, axis=-1)[..., 1:]  # behind the own block: falling
    rises = (np.diff(gate, axis=-1) > TOLERANCE) & is_chosen[..., 2:]
    assert not rises.any()


@every_implementation
@find("mobagrad")
def test_outputs_and_gradients_are_those_of_the_published_code(path, implementation):
    arrays, _, options = load(path)
    attend = functools.partial(sparse_attn.moba_attention, **options, implementation=implementation)

    @jax.jit
    def output_and_gradients(query, key, value, d_output):
        output, pull_back = jax.vjp(attend, query, key, value)
        return output, *pull_back(d_output)

    results = output_and_gradients(*q_k_v(arrays), arrays.get("dout", arrays["out"])[None])
    names = ("out", "dq", "dk", "dv") if arrays.get("has_grad", True) else ("out",)
    for name, result in zip(names, results, strict=False):
        np.testing.assert_allclose(result[0], arrays[name], rtol=0, atol=TOLERANCE, err_msg=name)
