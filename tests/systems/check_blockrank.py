"""BlockRank against its authors' mask, attention, logits, scores of documents and loss."""

import functools

import jax
import numpy as np

from sparse_attn.systems.block_rank import BlockRank, auxiliary_loss

assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def check(arrays):
    query, key, value = (arrays[name].swapaxes(1, 2) for name in "qkv")
    rank = BlockRank(
        block_size=arrays["block_len"].item(),
        num_last_queries=arrays["num_last_queries"].item(),
        temperature=arrays["temperature_f64"].item(),
    )
    num_blocks, valid = arrays["n_blocks"].item(), arrays["valid"].reshape(len(query), -1)
    assert num_blocks * rank.block_size == query.shape[1]

    levels = jax.jit(rank.select)(query, key)
    mask = np.asarray(levels.to_mask()).repeat(rank.block_size, 2).repeat(rank.block_size, 3)
    mask = mask & np.tril(np.ones(mask.shape[2:], bool)) & (valid[:, None, :, None] & valid[:, None, None, :])
    np.testing.assert_array_equal(mask, np.broadcast_to(arrays["token_mask"][:, None], mask.shape))

    output = jax.jit(rank)(query, key, value, valid)
    assert_close(np.asarray(output)[valid], arrays["output"].swapaxes(1, 2)[valid])
    assert not np.asarray(output)[~valid].any()

    logits = jax.jit(rank.last_query_logits)(query, key, valid)
    expected = arrays["last_block_logits"]
    np.testing.assert_array_equal(np.isneginf(logits), expected < -1e29)
    assert_close(np.where(np.isneginf(logits), 0, logits), np.where(expected < -1e29, 0, expected))

    documents = jax.jit(rank.document_logits)(logits, arrays["labels"].astype(np.int32))
    assert_close(documents, arrays["doc_logits"])
    loss = jax.jit(auxiliary_loss)(documents, arrays["answer_ids"].astype(np.int32))
    is_positive = (arrays["answer_ids"] >= 0) & (arrays["answer_ids"] < num_blocks - 2)
    if is_positive.any(1).all():
        assert_close(loss, arrays["loss"])
    else:  # theirs is infinite, ours leaves such rows out
        assert arrays["loss"] == np.inf
