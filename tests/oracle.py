"""Block-sparse attention in NumPy loops, float64, written from the numbered semantics and from nothing else.

It shares no code with the library. One query at a time it asks: which keys are mine, where do I stand among them, which
blocks do I choose, what is the softmax over them, and what are its derivatives. Slow and plain on purpose.
Arrays are laid out as in the library; every function takes NumPy arrays and returns NumPy arrays. Padding is never
read, so that NaN there stays there.
"""

import dataclasses

import numpy as np

from tests import near_ties


@dataclasses.dataclass(frozen=True)
class QueryView:
    """What one query may attend to before any block is chosen.

    Attributes:
      blocks: block id -> indices of its keys, in order; the blocks of the query's segment.
      visible: the keys that the query may see, a set of indices.
      own_block: the block that holds the query's own position; None if not causal or if nothing is visible.
    """

    blocks: dict[int, np.ndarray]
    visible: frozenset[int]
    own_block: int | None


def _segments(ids, length, num_tokens):
    """Segment id -> indices of its real tokens in order; segments in the order of their ids."""
    length = num_tokens if length is None else int(length)
    ids = np.zeros(num_tokens, np.int64) if ids is None else np.asarray(ids)
    return {int(i): np.array([t for t in range(length) if ids[t] == i]) for i in sorted(set(ids[:length].tolist()))}


def views(
    num_queries,
    num_keys,
    *,
    batch_size,
    block_size,
    is_causal=True,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
):
    """A QueryView for every query: a list over the batch of lists over the queries (S2, S5, S7)."""

    def row(array, b):
        return None if array is None else np.asarray(array)[b]

    result = []
    for b in range(batch_size):
        query_segments = _segments(row(query_segment_ids, b), row(query_seq_lengths, b), num_queries)
        key_segments = _segments(row(key_value_segment_ids, b), row(key_value_seq_lengths, b), num_keys)
        nothing = QueryView({}, frozenset(), None)
        views_of_row = [nothing] * num_queries  # padding queries keep this
        next_block = 0
        for segment, keys in key_segments.items():
            blocks = {}
            for start in range(0, len(keys), block_size):
                blocks[next_block] = keys[start : start + block_size]
                next_block += 1
            queries = query_segments.get(segment, np.array([], np.int64))
            for rank, t in enumerate(queries):
                position = rank + len(keys) - len(queries)  # aligned at the end
                if not is_causal:
                    views_of_row[t] = QueryView(blocks, frozenset(keys.tolist()), None)
                elif position >= 0:
                    own_block = min(blocks) + position // block_size
                    views_of_row[t] = QueryView(blocks, frozenset(keys[: position + 1].tolist()), own_block)
        result.append(views_of_row)
    return result


def route(query, key, *, block_size, top_k, is_causal=True, input_error=0.0, **sequences):
    """Blocks chosen by every query head (S2, S3, S4, S6).

    Args:
      input_error: how far the numbers that the library routes may lie from query and key.

    Returns:
      indices: int `[batch, heads, queries, top_k]`, own block first, then by falling score, ties to the lower id; -1
        behind.
      gap: `[batch, heads, queries]`, what float32 leaves of the smallest difference in the query's ranking, down to the
        first block left out: above 0 no rounding can change the choice. Ties of exact scores are not counted.
    """
    batch_size, num_queries, heads, head_dim = query.shape
    _, num_keys, kv_heads, _ = key.shape
    query, key = query.astype(np.float64), key.astype(np.float64)
    indices = np.full((batch_size, heads, num_queries, top_k), -1)
    gap = np.full((batch_size, heads, num_queries), np.inf)
    all_views = views(
        num_queries, num_keys, batch_size=batch_size, block_size=block_size, is_causal=is_causal, **sequences
    )
    means = {}  # (row, key/value head, block) -> mean key, mean of absolute values

    def mean_of(b, kv_head, block, tokens):
        if (b, kv_head, block) not in means:
            keys = key[b, tokens, kv_head]
            means[b, kv_head, block] = keys.mean(axis=0), np.abs(keys).mean(axis=0)
        return means[b, kv_head, block]

    for b, h, t in np.ndindex(batch_size, heads, num_queries):
        view, kv_head, q = all_views[b][t], h // (heads // kv_heads), query[b, t, h]
        if not view.visible:
            continue
        blocks = [block for block in view.blocks if view.own_block is None or block < view.own_block]
        own = [] if view.own_block is None else [view.own_block]
        num_others, chosen = top_k - len(own), []
        if blocks:
            mean, size = map(np.array, zip(*(mean_of(b, kv_head, j, view.blocks[j]) for j in blocks), strict=True))
            scores = mean @ q
            # Rounded are a block's sum and its mean, and the sum of products.
            error = near_ties.dot_error(q, mean, size @ np.abs(q), block_size + 1 + head_dim)
            error += input_error * (np.abs(q).sum() + size.sum(-1))
            ranking = np.argsort(-scores, kind="stable")
            chosen = [blocks[place] for place in ranking[:num_others]]
            low, high = (scores - error)[ranking], (scores + error)[ranking]
            left = np.minimum.accumulate(low)[:-1] - np.maximum.accumulate(high[::-1])[::-1][1:]
            gap[b, h, t] = min(left[:num_others][left[:num_others] != 0], default=np.inf)
        chosen = own + chosen
        indices[b, h, t, : len(chosen)] = chosen
    return indices, gap


def attention_mask(indices, *, num_keys, block_size, is_causal=True, **sequences):
    """Keys attended by every query head given block ids: bool `[batch, heads, queries, keys]`."""
    batch_size, heads, num_queries, _ = indices.shape
    mask = np.zeros((batch_size, heads, num_queries, num_keys), bool)
    all_views = views(
        num_queries, num_keys, batch_size=batch_size, block_size=block_size, is_causal=is_causal, **sequences
    )
    for b, h, t in np.ndindex(batch_size, heads, num_queries):
        view = all_views[b][t]
        for block in indices[b, h, t]:
            for token in view.blocks.get(int(block), ()):
                mask[b, h, t, token] = int(token) in view.visible
    return mask


def attention(query, key, value, mask, *, scale=None, d_output=None):
    """Softmax attention over the true entries of mask, and its gradients by hand.

    With p = softmax(scale * k q): out = sum_s p_s v_s, dv_s = p_s dout, ds_s = p_s (dout . v_s - dout . out),
    dq = scale * sum_s ds_s k_s, dk_s = scale * ds_s q. A query with nothing to attend to gives zeros (S9).

    Args:
      mask: bool `[batch, heads, queries, keys]`.
      d_output: cotangent of the output; None for the output alone.

    Returns:
      The output, or (output, (d_query, d_key, d_value)). All float64.
    """
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    batch_size, num_queries, heads, head_dim = query.shape
    group = heads // key.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    output = np.zeros(query.shape[:3] + value.shape[3:])
    d_query, d_key, d_value = np.zeros(query.shape), np.zeros(key.shape), np.zeros(value.shape)
    for b, h, t in np.ndindex(batch_size, heads, num_queries):
        seen = np.flatnonzero(mask[b, h, t])
        if not seen.size:
            continue
        k, v, q = key[b, seen, h // group], value[b, seen, h // group], query[b, t, h]
        logits = scale * (k @ q)
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        output[b, t, h] = weights @ v
        if d_output is not None:
            d_out = d_output[b, t, h].astype(np.float64)
            d_logits = weights * (v @ d_out - output[b, t, h] @ d_out)
            d_query[b, t, h] = scale * (d_logits @ k)
            d_key[b, seen, h // group] += scale * np.outer(d_logits, q)
            d_value[b, seen, h // group] += np.outer(weights, d_out)
    return output if d_output is None else (output, (d_query, d_key, d_value))


def moba(query, key, value, *, block_size, top_k, is_causal=True, scale=None, d_output=None, **sequences):
    """MoBA attention: route, then attend to what was chosen. Returns as `attention`."""
    indices, _ = route(query, key, block_size=block_size, top_k=top_k, is_causal=is_causal, **sequences)
    mask = attention_mask(indices, num_keys=key.shape[1], block_size=block_size, is_causal=is_causal, **sequences)
    return attention(query, key, value, mask, scale=scale, d_output=d_output)


def slope(function, arrays, direction, step=1e-6):
    """Derivative of a scalar function of float64 arrays along a direction, by central differences.

    Args:
      function: takes the arrays, gives a float.
      arrays, direction: lists of NumPy arrays, pairwise of one shape.
    """
    ahead, behind = (
        function(*(x + sign * step * d for x, d in zip(arrays, direction, strict=True))) for sign in (1, -1)
    )
    return (ahead - behind) / (2 * step)
