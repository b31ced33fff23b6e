"""What MoBA must give, in float64 NumPy, for thousands of tokens: the choice of all queries, results of some rows.

Written from the numbered semantics (`sparse_attn/reference.py`); shares no code with the library. For causal
self-attention of one row of the batch, which may be packed with segments in the order of their ids.
"""

import dataclasses

import numpy as np

_UNIT = 2.0**-24  # a float32 operation errs by at most this share of its result


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where blocks lie (S2, S5): a segment is cut into blocks from its start, ids run on over the segments.

    Attributes:
      block_start, block_stop: `[blocks]`, first key of a block, and the key behind its last.
      first_block: `[tokens]`, the first block of the token's segment.
      own_block: `[tokens]`, the block that holds the token.
    """

    block_start: np.ndarray
    block_stop: np.ndarray
    first_block: np.ndarray
    own_block: np.ndarray


def make_geometry(lengths: tuple[int, ...], block_size: int) -> Geometry:
    """The geometry of segments of these lengths, one behind the other."""
    start: list[int] = []
    stop: list[int] = []
    first: list[int] = []
    own: list[int] = []
    begin = 0
    for length in lengths:
        first += [len(start)] * length
        own += [len(start) + place // block_size for place in range(length)]
        for block in range(begin, begin + length, block_size):
            start.append(block)
            stop.append(min(block + block_size, begin + length))
        begin += length
    return Geometry(*map(np.array, (start, stop, first, own)))


def choose(query: np.ndarray, key: np.ndarray, geometry: Geometry, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The choice of one head (S3, S4, S6).

    Args:
      query, key: `[tokens, head_dim]`.
      geometry: where blocks lie.
      top_k: blocks of a query.

    Returns:
      indices: `[tokens, top_k]`, the own block and those with the best means, ascending; -1 in front of them.
      decided: bool `[tokens]`, whether no rounding of float32 can change the choice.
    """
    query, key = query.astype(np.float64), key.astype(np.float64)
    length = (geometry.block_stop - geometry.block_start)[:, None]
    mean = np.add.reduceat(key, geometry.block_start) / length  # [blocks, head_dim]
    size = np.add.reduceat(np.abs(key), geometry.block_start) / length
    block = np.arange(len(mean))
    own, first = geometry.own_block[:, None], geometry.first_block[:, None]
    score = np.where((first <= block) & (block < own), query @ mean.T, -np.inf)  # [tokens, blocks]
    error = (int(length.max()) + query.shape[1] + 1) * _UNIT * (np.abs(query) @ size.T)
    score = np.where(block == own, np.inf, score)
    best = np.argsort(-score, axis=1, kind="stable")[:, :top_k]
    is_chosen = np.zeros(score.shape, bool)
    np.put_along_axis(is_chosen, best, True, axis=1)
    is_chosen &= score > -np.inf
    lowest = np.where(is_chosen & (block != own), score - error, np.inf).min(1)
    decided = lowest >= np.where(is_chosen | np.isneginf(score), -np.inf, score + error).max(1)
    indices = np.sort(np.where(is_chosen, block, -1), axis=1)[:, -top_k:]
    missing = top_k - indices.shape[1]
    return np.pad(indices, ((0, 0), (max(missing, 0), 0)), constant_values=-1), decided


def attend(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    d_output: np.ndarray,
    indices: np.ndarray,
    rows: np.ndarray,
    geometry: Geometry,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Attention of some queries of one head over their choice, scale 1 / sqrt(head_dim), and its gradients by hand.

    With p = softmax(q k / sqrt(head_dim)): o = sum p v, dv = p do, ds = p (do v - do o), dq = sum ds k, dk = ds q.

    Args:
      query, key, value, d_output: `[tokens, head_dim]`.
      indices: `[tokens, top_k]`, as `choose` gives them.
      rows: `[rows]`, the queries; what they add to the gradients of keys and values is all that is returned.
      geometry: where blocks lie.

    Returns:
      output and d_query `[rows, head_dim]`, log_sum_exp `[rows]`, d_key and d_value `[tokens, head_dim]`.
    """
    query, key, value, d_output = (array.astype(np.float64) for array in (query, key, value, d_output))
    scale = query.shape[1] ** -0.5
    output, d_query = np.zeros((2, len(rows), query.shape[1]))
    log_sum_exp = np.zeros(len(rows))
    d_key, d_value = np.zeros((2, *key.shape))
    for place, row in enumerate(rows):
        chosen = indices[row][indices[row] >= 0]
        seen = np.concatenate([np.arange(geometry.block_start[j], geometry.block_stop[j]) for j in chosen])
        seen = seen[seen <= row]
        logits = scale * (key[seen] @ query[row])
        largest = logits.max()
        weight = np.exp(logits - largest)
        log_sum_exp[place] = largest + np.log(weight.sum())
        weight /= weight.sum()
        output[place] = weight @ value[seen]
        d_logits = scale * weight * (value[seen] @ d_output[row] - output[place] @ d_output[row])
        d_query[place] = d_logits @ key[seen]
        d_key[seen] += np.outer(d_logits, query[row])
        d_value[seen] += np.outer(weight, d_output[row])
    return output, log_sum_exp, d_query, d_key, d_value
