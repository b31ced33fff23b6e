"""The parts that `tpu_report` measures, each compiled for a v6e in its own process.

libtpu's profile counts every number that it cannot know as zero. Loops over lists, guards, and grids whose length is
only known at run time are therefore replaced by ones that always run, a fixed number of times.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

CHIP = "v6e:1x1"
HEAD_DIM = 128


class Measured(NamedTuple):
    """libtpu's figures of a part, by operation: cycles; bytes of VMEM, and how many of them hold spilled registers."""

    cycles: dict[str, int]
    kernels: dict[str, tuple[int, int]]

    @property
    def all(self) -> int:
        return sum(self.cycles.values())

    def named(self, word: str) -> int:
        return sum(number for name, number in self.cycles.items() if word in name)

    def kernel(self, word: str) -> tuple[int, int]:
        return next(found for name, found in self.kernels.items() if word in name)


def measure(part: str, *, reads_memory: bool = False, **sizes: Any) -> Measured:
    """Compiles a part in a new process, since libtpu reads its flags only once, and reads the files it writes."""
    with tempfile.TemporaryDirectory() as directory:
        flags = f"--xla_jf_dump_static_llo_profile_to={directory}"
        if reads_memory:  # thousands of files, so only on request
            flags += f" --xla_jf_dump_to={directory}"
        quiet = dict.fromkeys(("TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL", "TF_CPP_MIN_LOG_LEVEL"), "3")
        environment = os.environ | quiet
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": flags,
        }
        command = [sys.executable, "-m", "experiments.kernels.tpu_parts", part, json.dumps(sizes)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{part} {sizes} was not compiled:\n{done.stderr[-3000:]}")
        cycles: dict[str, int] = {}
        for path in Path(directory).glob("*_static_llo_profile.textproto"):
            found = re.findall(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)', path.read_text())
            cycles |= {name: int(number) for name, number in found}
        return Measured(cycles, _kernels(Path(directory), cycles) if reads_memory else {})


def _kernels(directory: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Bytes of scoped VMEM of each operation, and how many of them hold spilled registers, from libtpu's report."""
    text = next(directory.glob("*-vmem_report.html")).read_text()
    kernels = {}
    for name in names:
        key = f'"{name}": '
        if key in text:
            found, _ = json.JSONDecoder().raw_decode(text, text.index(key) + len(key))
            places = [place for block in found["blocks"] for place in block["allocations"]]
            kernels[name] = found["total_size"], sum(place["size"] for place in places if place["tag"] == "SPILL")
    return kernels


def compile_part(part: str, sizes: dict[str, Any]) -> None:
    """Compiles one part; libtpu writes the profile, the program and the code."""
    import jax
    from jax.experimental import topologies

    sharding = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc(CHIP, "tpu").devices[0])
    function, arguments, *donated = PARTS[part](**sizes)
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in arguments]
    jax.jit(function, donate_argnums=donated[0] if donated else ()).lower(*arrays).compile()


def _with(module: Any, **replacements: Any) -> Any:
    """A copy of a module with some names replaced."""
    return types.SimpleNamespace(**(vars(module) | replacements))


def _always(_: Any) -> Callable[[Callable[[], None]], None]:
    """`pl.when` with a condition that is always true."""
    return lambda body: body()


def _forward(
    rows: int, steps: int, tile: int, block_size: int = 128, has_maximum: bool = False, without: str | None = None
) -> tuple:
    import jax.numpy as jnp

    from pallas_kernels.tpu.per_query import forward, memory

    tiles_per_step = 1024 // tile
    add_rows, fetch_rows = memory.add_rows, memory.fetch_rows

    def add_only(part_ref: Any, result_ref: Any, state_ref: Any, fetch: Any) -> None:
        del fetch
        add_rows(part_ref, result_ref, state_ref)

    def fetch_only(part_ref: Any, result_ref: Any, state_ref: Any, fetch: Any) -> None:
        for number in range(tiles_per_step):  # read part of every tile, so that no result is dropped
            state_ref[number : number + 1, :] += result_ref[number * tile * 2 : number * tile * 2 + 1, :]
        fetch_rows(*fetch)

    if without:
        memory.add_rows = {"fetch": add_only, "add": fetch_only}[without]  # type: ignore[assignment]

    def attend(query: Any, key_stop: Any, key_value: Any, table: Any, numbers: Any) -> Any:
        return forward.attend_tiles(
            query,
            key_stop,
            key_value,
            memory.Tiles(table, numbers, numbers, numbers, steps),  # type: ignore[arg-type]
            has_maximum=has_maximum,
            is_aligned=True,
            scale=HEAD_DIM**-0.5,
            vmem_bytes=64 << 20,
        )

    return attend, [
        ((rows, HEAD_DIM), jnp.bfloat16),
        ((rows,), jnp.int32),
        ((64, 2, block_size, HEAD_DIM), jnp.bfloat16),
        ((steps + 1, tiles_per_step, tile), jnp.int32),
        (((steps + 1) * tiles_per_step,), jnp.int32),
    ]


def _backward(rows: int, steps: int, tile: int, block_size: int = 128) -> tuple:
    import jax.numpy as jnp

    from pallas_kernels.tpu.per_query import backward, memory

    def differentiate(packed: Any, key: Any, value: Any, d_key: Any, d_value: Any, table: Any, numbers: Any) -> Any:
        return backward.differentiate_tiles(
            packed,
            key,
            value,
            d_key,
            d_value,
            memory.Tiles(table, numbers, numbers, numbers, steps),  # type: ignore[arg-type]
            head_dim=HEAD_DIM,
            is_aligned=True,
            scale=HEAD_DIM**-0.5,
            vmem_bytes=64 << 20,
        )

    keys, sums = ((64, block_size, HEAD_DIM), jnp.bfloat16), ((64, block_size, HEAD_DIM), jnp.float32)
    table = ((steps + 1, 1, tile), jnp.int32), ((steps + 1,), jnp.int32)
    return differentiate, [(((rows + 8) * 2, 128), jnp.uint32), keys, keys, sums, sums, *table], (3, 4)


def _schedule(rows: int, top_k: int, pieces: int, tile: int, batches: int) -> tuple:
    import jax.numpy as jnp

    from pallas_kernels.tpu.per_query import cut_tiles, memory

    def cut(ids: Any, numbers: Any) -> Any:
        places = memory.Pieces(numbers, numbers, numbers)
        sizes = {"tile_size": tile, "tiles_per_step": 1024 // tile, "pieces_per_step": 512}
        return cut_tiles.make_tiles(ids, places, **sizes, fixed_batches=batches)

    return cut, [((top_k, rows), jnp.int32), ((pieces,), jnp.int32)]


def _pack(rows: int) -> tuple:
    """Packing of the backward pass's rows."""
    import jax.numpy as jnp

    from pallas_kernels.tpu.per_query import memory

    vector, numbers = ((rows, HEAD_DIM), jnp.bfloat16), [((rows, 1), jnp.int32), *[((rows, 1), jnp.float32)] * 2]
    return memory.pack_rows, [vector, vector, *numbers]


def _norm(rows: int) -> tuple:
    import jax.numpy as jnp

    from pallas_kernels.tpu.per_query import forward

    return forward._largest_norm, [((rows, HEAD_DIM), jnp.bfloat16)]


def _router(tokens: int, extractions: int, is_cut: bool = False) -> tuple:
    """All tokens as queries, one step of at most 256 key blocks of 128 tokens; masked only if is_cut."""
    import jax.numpy as jnp
    from jax import lax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    from pallas_kernels.blocks import Blocks
    from pallas_kernels.tpu import routing

    def fixed_grid(*, grid: tuple, **options: Any) -> Any:
        """Fixes what is only known at run time: one key step per tile of queries, all groups of 128 blocks."""
        lengths = {2: max(1, tokens // 128 // 128), 3: 1}
        fixed = tuple(size if isinstance(size, int) else lengths[axis] for axis, size in enumerate(grid))
        return pltpu.PrefetchScalarGridSpec(grid=fixed, **options)

    def extract(start: int, stop: Any, body: Any, carry: Any) -> Any:
        """Runs a fixed number first. The loop of unknown length counts as 0, but its length is still computed."""
        return lax.fori_loop(start, stop, body, lax.fori_loop(start, extractions, body, carry))

    routing.lax = _with(  # type: ignore[attr-defined]
        lax, fori_loop=extract, cond=lambda _, cut, whole: (cut if is_cut else whole)()
    )
    routing.pl = _with(pl, when=_always)  # type: ignore[attr-defined]
    routing.pltpu = _with(pltpu, PrefetchScalarGridSpec=fixed_grid)  # type: ignore[attr-defined]

    def route(query: Any, block: Any, key_range: Any) -> Any:
        sizes: dict[str, Any] = {"block_size": 128, "num_keys": tokens, "is_packed": False}
        return routing.route(
            query,
            query,
            Blocks(key_range, key_range, None, block, block, key_range, key_range, **sizes),
            top_k=8,
            is_causal=True,
        )

    return route, [((1, tokens, 1, HEAD_DIM), jnp.bfloat16), ((1, tokens // 128), jnp.int32), ((1, tokens), jnp.int32)]


def _tiles(tokens: int, query_block: int, key_block: int, list_length: int, is_masked: bool, backward: bool) -> tuple:
    """Every query tile visits `list_length` key blocks; for dK and dV every key block visits as many query memory."""
    import jax.numpy as jnp
    from jax import lax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    from pallas_kernels.blocks import Blocks
    from pallas_kernels.tpu.per_tile import pipeline
    from pallas_kernels.tpu.per_tile.backward import attend_tiles_backward
    from pallas_kernels.tpu.per_tile.forward import attend_tiles_forward

    def walk(
        span_ref: Any,
        steps_hbm: Any,
        ids_ref: Any,
        ids_semaphore: Any,
        *,
        copies: Any,
        entries: int,
        clear: Any,
        compute: Any,
        mask_copies: Any = None,
    ) -> None:
        """`pipeline.stream` with full steps, the same number for each program."""
        del span_ref, clear
        keys_a_step = entries * (key_block if mask_copies is not None else query_block)
        row, num_steps = pl.program_id(0), max(1, list_length * key_block // keys_a_step)
        makers = [copies] + ([mask_copies] if is_masked and mask_copies is not None else [])

        def ids_copy(step: Any) -> Any:
            place = lax.rem(step, 3)
            source = steps_hbm.at[row, lax.div(step, 32)]
            return pltpu.make_async_copy(source, ids_ref.at[place], ids_semaphore.at[place])

        def for_copies(step: Any, act: str) -> None:
            def body(entry: Any, carry: None) -> None:
                for make in makers:
                    for copy in make(lax.rem(step, 2), entry, ids_ref[lax.rem(step, 3), 0, 2 + entry]):
                        getattr(copy, act)()
                return carry

            lax.fori_loop(0, entries, body, None)

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            for step in range(2):
                ids_copy(step).start()
            ids_copy(0).wait()
            for_copies(0, "start")

        def run(number: Any, carry: None) -> None:
            step = pl.program_id(1) * num_steps + number
            ids_copy(step + 2).start()
            ids_copy(step + 1).wait()
            for_copies(step + 1, "start")
            for_copies(step, "wait")
            compute(lax.rem(step, 2), is_masked)
            return carry

        lax.fori_loop(0, num_steps, run, None)

    pipeline.stream = walk
    array, number = ((1, tokens, 1, HEAD_DIM), jnp.bfloat16), ((1, tokens), jnp.int32)
    inputs = [array, array, array, ((1, 1, -(-tokens // query_block), list_length), jnp.int32), number, number, number]

    def run(query: Any, key: Any, value: Any, lists: Any, start: Any, stop: Any, position: Any, *rest: Any) -> Any:
        sizes: dict[str, Any] = {"block_size": key_block, "num_keys": tokens, "is_packed": False}
        blocks = Blocks(start, stop, position[..., None], start, start, start, start, **sizes)
        choice = (query, key, value), lists, blocks, query_block
        if not backward:
            return attend_tiles_forward(*choice, scale=HEAD_DIM**-0.5)
        return attend_tiles_backward(*choice, rest[:2], rest[2:], scale=HEAD_DIM**-0.5)

    statistics = ((1, tokens, 1), jnp.float32)
    return run, [*inputs, array, statistics, array, statistics] if backward else inputs


def _splash(tokens: int, tile: int, backward: bool = False) -> tuple:
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def always(h: Any, i: Any, j: Any, data: Any, mask: Any, next_mask: Any, next_i: bool = False) -> Any:
        del h, data, mask, next_mask
        return (i if next_i else j), None, True, True

    splash._next_nonzero = always  # else a prefetched number decides whether the body runs
    names: tuple[str, ...] = "block_q", "block_kv", "block_kv_compute"
    if backward:
        names += "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"
    tiles: dict[str, Any] = dict.fromkeys(names, tile)
    mask = masks.MultiHeadMask([masks.FullMask((tokens, tokens))])
    attention = splash.make_splash_mha_single_device(mask=mask, block_sizes=splash.BlockSizes(**tiles))

    def attend(*arrays: Any) -> Any:
        if not backward:
            return attention(*arrays)
        return jax.grad(lambda *x: attention(*x).astype(jnp.float32).sum(), (0, 1, 2))(*arrays)

    return attend, [((1, tokens, HEAD_DIM), jnp.bfloat16)] * 3


def _decode(tokens: int, blocks: int, kv_heads: int, group: int) -> tuple:
    """A decode step: each head attends 8 blocks of 128 keys, those of a group `blocks` together, in full steps."""
    import jax.numpy as jnp
    from jax import lax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    from pallas_kernels.tpu import decode
    from sparse_attn.attend import cached
    from sparse_attn.decode import moba

    guards = itertools.count()
    steps = -(-blocks // min(16, 8 * group))

    def when(condition: Any) -> Any:
        """The first guard stays: its copies are those before the first step, once a call."""
        return pl.when(condition) if next(guards) == 0 else _always(condition)

    def fixed_grid(*, grid: tuple, **options: Any) -> Any:
        del grid
        return pltpu.PrefetchScalarGridSpec(grid=(kv_heads * steps,), **options)

    decode.pl = _with(pl, when=when)  # type: ignore[attr-defined]
    decode.pltpu = _with(pltpu, PrefetchScalarGridSpec=fixed_grid)  # type: ignore[attr-defined]
    decode.lax = _with(lax, cond=lambda _, full, part: full())  # type: ignore[attr-defined]

    def step(query: Any, key: Any, mean: Any, length: Any) -> Any:
        new = jnp.ones_like(length)
        blocks = cached.geometry(length, new, 1, tokens // 128, 128)
        indices = moba._choose_from_table(query, mean, blocks, 8)
        return decode.attend((query, key, key), indices, length, new, scale=HEAD_DIM**-0.5)

    cache = (1, kv_heads, tokens // 128, 128, HEAD_DIM)
    query, mean = ((1, 1, kv_heads * group, HEAD_DIM), jnp.bfloat16), ((*cache[:3], HEAD_DIM), jnp.float32)
    return step, [query, (cache, jnp.bfloat16), mean, ((1,), jnp.int32)]


def _dense_decode(tokens: int, kv_heads: int, group: int) -> tuple:
    """The same step over all keys, in plain XLA."""
    import jax
    import jax.numpy as jnp

    def step(query: Any, key: Any, value: Any, length: Any) -> Any:
        return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=length)

    cache = ((1, tokens, kv_heads, HEAD_DIM), jnp.bfloat16)
    return step, [((1, 1, kv_heads * group, HEAD_DIM), jnp.bfloat16), cache, cache, ((1,), jnp.int32)]


# By name: what returns the function to compile, its arguments as (shape, dtype), and the arguments it may overwrite.
PARTS: dict[str, Callable[..., tuple]] = {
    "forward": _forward,
    "backward": _backward,
    "schedule": _schedule,
    "pack": _pack,
    "norm": _norm,
    "router": _router,
    "tiles": _tiles,
    "splash": _splash,
    "decode": _decode,
    "dense_decode": _dense_decode,
}

if __name__ == "__main__":
    compile_part(sys.argv[1], json.loads(sys.argv[2]))
