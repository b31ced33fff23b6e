"""Decoding with a cache: time of a step and bytes that it reads, MoBA beside dense attention; prefill in chunks.

Both attend the same keys and values in one process, in turns; each writes the new token into a donated cache of its
own. The streaming rate is that of a sum over a large array.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.preset import DecodingConfig
from experiments.studies.efficiency import describe_machine, in_fresh_process, time_in_turns
from sparse_attn.decode import MoBACache
from sparse_attn.systems.moba import MoBA

_STREAMED = 2**26  # numbers whose sum measures the streaming rate
_PREFILL_REPEATS = 3

_Arrays = tuple[jax.Array, jax.Array, jax.Array]


def measure(config: DecodingConfig) -> dict[str, Any]:
    """Medians of times (ms), ratios of medians, bytes by formula and by count: a row for each number of query heads."""
    return in_fresh_process(_measure, config)


def _measure(config: DecodingConfig) -> dict[str, Any]:
    """What `measure` returns, in a process of its own."""
    rows = [_measure_row(config, group) for group in tqdm(config.groups, desc="decoding", unit="group")]
    return {"rows": rows, "machine": describe_machine()}


def table(numbers: dict[str, Any]) -> str:
    """The rows as text, the machine below."""
    columns = {
        "heads": lambda row: f"{row['num_heads']}:{row['num_key_value_heads']}",
        "moba ms": lambda row: f"{row['moba_ms']:.3f} ±{row['moba_iqr_ms'] / 2:.3f}",
        "dense ms": lambda row: f"{row['dense_ms']:.2f} ±{row['dense_iqr_ms'] / 2:.2f}",
        "x dense": lambda row: f"{row['speedup_over_dense']:.1f}",
        "must read": lambda row: f"{row['needed_bytes'] / 2**20:.2f} MiB",
        "reads": lambda row: f"{row['read_bytes'] / 2**20:.2f} MiB",
        "dense reads": lambda row: f"{row['dense_bytes'] / 2**20:.0f} MiB",
        "stream GB/s": lambda row: f"{row['streaming_rate'] / 1e9:.1f}",
        "% stream": lambda row: f"{row['share_of_streaming']:.0%}",
        "chunks s": lambda row: f"{row['chunks_ms'] / 1e3:.2f}",
        "whole s": lambda row: f"{row['whole_ms'] / 1e3:.2f}",
        "chunks/whole": lambda row: f"{row['chunks_over_whole']:.2f}",
    }
    lines = [list(columns), *([show(row) for show in columns.values()] for row in numbers["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    machine = ", ".join(f"{key} {value}" for key, value in {**numbers["machine"], **numbers["about"]}.items())
    return (
        f"{text}\n\nms: median of a step ± half the interquartile range. must read: means and chosen blocks, where the "
        "heads of a group share their own block alone. reads: the means, and what the compiled step gathers. % stream: "
        f"must read / moba ms, of the rate of a sum over a large array. s: all tokens by prefill.\n{machine}"
    )


def _measure_row(config: DecodingConfig, group: int) -> dict[str, Any]:
    attention = MoBA(block_size=config.block_size, top_k=config.top_k)
    first = config.max_length - config.steps * (config.repeats + 1)  # tokens by prefill
    prompt, new = (_draw(config, group, seed, length) for seed, length in ((0, first), (1, config.max_length - first)))

    def empty() -> MoBACache:
        sizes = (config.batch_size, config.max_length, config.num_key_value_heads, config.head_dim)
        return attention.init_cache(*sizes, dtype=config.dtype)

    @functools.partial(jax.jit, donate_argnums=0)
    def extend(cache: MoBACache, query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, MoBACache]:
        return attention.attend_cached(query, key, value, cache)

    def prefill(chunk: int) -> MoBACache:
        cache = empty()
        for start in range(0, first, chunk):
            _, cache = extend(cache, *(array[:, start : start + chunk] for array in prompt))
        return jax.block_until_ready(cache)

    prefills = {"chunks": functools.partial(prefill, config.prefill_chunk), "whole": functools.partial(prefill, first)}
    seconds = {name: np.median(times) for name, times in time_in_turns(prefills, _PREFILL_REPEATS).items()}
    cache = prefill(config.prefill_chunk)
    program = extend.lower(cache, *(array[:, :1] for array in new)).compile().as_text() or ""

    def moba_step(cache: MoBACache, token: _Arrays) -> tuple[MoBACache, jax.Array]:
        output, cache = attention.attend_cached(*token, cache=cache)
        return cache, output

    calls = {
        "moba": _steps(moba_step, cache, new, config.steps),
        "dense": _steps(_dense_step, _in_rows(cache), new, config.steps),
    }
    large = jnp.ones(_STREAMED, jnp.float32)
    stream = jax.jit(jnp.sum)
    calls["stream"] = lambda: jax.block_until_ready(stream(large))
    times = time_in_turns(calls, config.repeats)
    step = {name: np.array(times[name]) / config.steps for name in ("moba", "dense")}
    rate = large.nbytes / np.median(times["stream"])
    needed = needed_bytes(config, group)
    row: dict[str, Any] = {"num_heads": group * config.num_key_value_heads}
    row["num_key_value_heads"] = config.num_key_value_heads
    for name, each in step.items():
        row[f"{name}_ms"] = float(np.median(each)) * 1e3
        row[f"{name}_iqr_ms"] = float(np.subtract(*np.percentile(each, [75, 25]))) * 1e3
    return row | {
        "speedup_over_dense": row["dense_ms"] / row["moba_ms"],
        "needed_bytes": needed,
        "read_bytes": count_read_bytes(program, cache),
        "dense_bytes": cache.key.nbytes + cache.value.nbytes,
        "streaming_rate": float(rate),
        "share_of_streaming": needed / (row["moba_ms"] / 1e3) / float(rate),
        "chunks_ms": float(seconds["chunks"]) * 1e3,
        "whole_ms": float(seconds["whole"]) * 1e3,
        "chunks_over_whole": float(seconds["chunks"] / seconds["whole"]),
    }


def needed_bytes(config: DecodingConfig, group: int) -> int:
    """What a step must read: a mean a block in float32, and the chosen blocks, where no two heads choose the same.

    The own block is common to the heads of a group.
    """
    blocks = -(-config.max_length // config.block_size)
    chosen = group * (min(config.top_k, blocks) - 1) + 1
    block_bytes = config.block_size * 2 * config.head_dim * jnp.dtype(config.dtype).itemsize
    return config.batch_size * config.num_key_value_heads * (4 * config.head_dim * blocks + chosen * block_bytes)


def count_read_bytes(program: str, cache: MoBACache) -> int:
    """Bytes that a compiled step gathers in whole blocks of keys and values, and those of the means, read once.

    Args:
      program: HLO as text. A block that has just been completed is not gathered there, but sliced.
      cache: which the step reads.
    """
    *_, block_size, head_dim = cache.key.shape
    gather = rf"= \w+\[([\d,]+)\]\S* gather\(.*slice_sizes={{[\d,]*\b{block_size},{head_dim}}}"
    numbers = sum(math.prod(map(int, shape.split(","))) for shape in re.findall(gather, program))
    return numbers * cache.key.dtype.itemsize + cache.mean.nbytes


def _draw(config: DecodingConfig, group: int, seed: int, length: int) -> _Arrays:
    """Query `[batch, length, heads, head_dim]`, and key and value with as many heads as the cache."""
    kv_heads = config.num_key_value_heads
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(config.batch_size, length, heads, config.head_dim) for heads in (group * kv_heads, kv_heads, kv_heads)]
    query, key, value = (jax.random.normal(*each, config.dtype) for each in zip(keys, shapes, strict=True))
    return query, key, value


def _steps(step: Callable[..., tuple[Any, jax.Array]], state: Any, new: _Arrays, steps: int) -> Callable[[], None]:
    """A function that takes the next `steps` of the new tokens in; every call goes on where the last one stopped.

    The steps of a call are one program, as the layers of a model are, so that calling it takes none of their time.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def take(state: Any, tokens: _Arrays) -> tuple[Any, jax.Array]:
        return jax.lax.scan(step, state, tokens)

    def cut(array: jax.Array) -> jax.Array:  # [batch, tokens, heads, head_dim] -> [calls, steps, batch, 1, ...]
        tokens = jnp.moveaxis(array, 1, 0)[:, :, None]
        return tokens.reshape(-1, steps, *tokens.shape[1:])

    calls = jax.block_until_ready(list(zip(*map(cut, new), strict=True)))

    def run() -> Iterator[None]:
        grown = jax.tree.map(jnp.copy, state)  # the program donates it
        for tokens in calls:
            grown, outputs = take(grown, tokens)
            outputs.block_until_ready()
            yield

    return functools.partial(next, run())


def _dense_step(
    state: tuple[jax.Array, jax.Array, jax.Array], token: _Arrays
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    """`jax.nn.dot_product_attention` over key and value `[batch, max_length, kv_heads, head_dim]`, length int32 []."""
    key, value, length = state
    query, *new = token
    key, value = (jax.lax.dynamic_update_slice_in_dim(*pair, length, 1) for pair in zip((key, value), new, strict=True))
    lengths = jnp.full(len(key), length + 1, jnp.int32)
    return (key, value, length + 1), jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths)


def _in_rows(cache: MoBACache) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The cache as `_dense_step` takes it; its rows are of one length."""

    def join(array: jax.Array) -> jax.Array:
        batch, kv_heads, _, _, head_dim = array.shape
        return array.reshape(batch, kv_heads, -1, head_dim).swapaxes(1, 2)[:, : cache.max_length]

    return join(cache.key), join(cache.value), cache.length[0]
