"""Static estimates of the TPU kernels beside JAX's splash attention: `python -m pallas_kernels.tpu.report`.

Needs libtpu, no TPU. Every figure comes from a program of its own, compiled in a process of its own for a v6e with a
fixed number of steps; two step counts give the cost of a step and what is paid once. What that is worth stands under
the table that it prints. Takes about ten minutes on one core.
"""

import argparse
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

CHIP = "v6e:1x1"
HEAD_DIM = 128
CHOICES = (128, 8), (512, 2)  # block_size, top_k
TOKENS = 8192, 65536, 524288
TILE, TILES = 128, 8  # those of KEY_MAJOR
BACKWARD_TILE = 256
SPLASH_TILE = 2048  # best for splash attention among 512 to 2048, found by trial
LIMITS = (
    "Why more than 5 cycles a pair: half-empty last tiles of a block and chunk (at 524288 tokens a chunk has 64 pairs",
    "a block, so a tile is mostly padding); filling the accumulator, the first load and the last store of a chunk,",
    "which nothing hides; XLA's copies where queries become words and sums become outputs; the sort; and the latency",
    "of the loop that cuts the sorted pairs into tiles.",
    "",
    "* Estimates of libtpu's static profile for a v6e; nothing here ever ran on a TPU. Compare, never quote a time.",
    "* The profile overlaps reads and writes of HBM freely: kernels bound by memory look up to twice too fast.",
    "* Prefetched numbers count as 0 there: a stretch of keys is copied once and not again at each change, here and in",
    "  splash attention. That is some 40 cycles a tile, hidden behind the step if memory is as fast as promised.",
    "* Splash attention is measured with a full mask and its body made to run always; a causal pass counts as half.",
    "* Tables of tiles (cut_tiles) are measured with the loops at fixed counts: one batch of four tiles a piece.",
    "* Padding assumes that every block is chosen equally often: half a tile for each block and chunk.",
    "* With XLA's gathers and scatters the profile of a whole program is not available: parts are measured alone.",
)


def _environment(directory: str) -> dict[str, str]:
    names = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    quiet = dict.fromkeys(("TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL", "TF_CPP_MIN_LOG_LEVEL"), "3")
    flag = f"--xla_jf_dump_static_llo_profile_to={directory}"
    more = {"JAX_PLATFORMS": "cpu", "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "LIBTPU_INIT_ARGS": flag}
    return os.environ | names | quiet | more


def measure(part: str, **sizes: Any) -> dict[str, int]:
    """Cycles of a part: {operation: cycles}. Runs this module in a new process, for libtpu reads its flags once."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pallas_kernels.tpu.report", "--part", part, "--sizes", json.dumps(sizes)]
        done = subprocess.run(command, env=_environment(directory), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{part} {sizes} was not compiled:\n{done.stderr[-3000:]}")
        cycles: dict[str, int] = {}
        for path in glob.glob(os.path.join(directory, "*_static_llo_profile.textproto")):
            with open(path) as file:
                found = re.findall(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)', file.read())
                cycles |= {name: int(number) for name, number in found}
    return cycles


def compile_part(part: str, sizes: dict[str, Any]) -> None:
    """Compiles one part; the profile is written by libtpu."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from pallas_kernels.config import KEY_MAJOR
    from pallas_kernels.tpu import backward, cut_tiles, forward, key_work

    device = topologies.get_topology_desc(CHIP, "tpu").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows, steps, block_size = sizes.get("rows", 8192), sizes.get("steps", 1), sizes.get("block_size", 128)
    bfloat16 = jnp.bfloat16
    kernel_options = {"head_dim": HEAD_DIM, "is_aligned": True, "scale": HEAD_DIM**-0.5, "config": KEY_MAJOR}
    if part in ("attend_fixed", "attend_running"):
        packed, table = array(rows + 8, 1, 128, dtype=jnp.uint32), array(steps + 1, TILES, TILE)
        key_value, numbers = array(64, 2, block_size, HEAD_DIM, dtype=bfloat16), array((steps + 1) * TILES)

        add_rows, fetch_rows = key_work.add_rows, key_work.fetch_rows

        def add_only(row_ref: Any, result_ref: Any, state_ref: Any, fetch: Any) -> None:
            del fetch
            add_rows(row_ref, result_ref, state_ref)

        def fetch_only(row_ref: Any, result_ref: Any, state_ref: Any, fetch: Any) -> None:
            for tile in range(TILES):  # one row a tile, so that the results are not thrown away
                state_ref[row_ref[0, tile, 0]] += result_ref[tile * TILE * 2 : tile * TILE * 2 + 2, :]
            fetch_rows(*fetch)

        if sizes.get("without"):
            key_work.add_rows = {"fetch": add_only, "add": fetch_only}[sizes["without"]]  # type: ignore[assignment]

        def attend(packed: Any, key_value: Any, table: Any, numbers: Any) -> Any:
            tiles = key_work.Tiles(table, numbers, numbers, numbers, steps)
            has_maximum = part == "attend_running"
            return forward.attend_tiles(packed, key_value, tiles, has_maximum=has_maximum, **kernel_options)

        jax.jit(attend).lower(packed, key_value, table, numbers).compile()
    elif part == "attend_backward":
        packed, table = array(rows + 8, 2, 128, dtype=jnp.uint32), array(steps + 1, 1, BACKWARD_TILE)
        key, numbers = array(64, block_size, HEAD_DIM, dtype=bfloat16), array(steps + 1)
        sums = array(64, block_size, HEAD_DIM, dtype=jnp.float32)

        def differentiate(packed: Any, key: Any, value: Any, d_key: Any, d_value: Any, table: Any, numbers: Any) -> Any:
            tiles = key_work.Tiles(table, numbers, numbers, numbers, steps)
            return backward.differentiate_tiles(packed, key, value, d_key, d_value, tiles, **kernel_options)

        differentiate_jit = jax.jit(differentiate, donate_argnums=(3, 4))
        differentiate_jit.lower(packed, key, key, sums, sums, table, numbers).compile()
    elif part == "schedule":
        num_pieces = sizes["pieces"]

        def cut(ids: Any, numbers: Any) -> Any:
            pieces = key_work.Pieces(numbers, numbers, numbers)
            return cut_tiles.make_tiles(
                ids, pieces, tile_size=TILE, tiles_per_step=TILES, fixed_batches=sizes["batches"]
            )

        jax.jit(cut).lower(array(rows, 8), array(num_pieces)).compile()
    elif part == "pack":
        jax.jit(key_work.pack_rows).lower(array(rows, HEAD_DIM, dtype=bfloat16), array(rows, 1)).compile()
    elif part == "finish":

        def finish(state: Any) -> Any:
            return forward.finish(state[:rows].reshape(rows, -1), HEAD_DIM, bfloat16)

        jax.jit(finish).lower(array(rows + 8, 2, 128, dtype=jnp.float32)).compile()
    elif part == "router":
        from pallas_kernels.tpu import routing

        tokens, blocks = sizes["tokens"], sizes["tokens"] // 128
        query = array(1, tokens, 1, HEAD_DIM, dtype=bfloat16)

        def route(query: Any, block: Any, reach: Any) -> Any:
            places = {"block_start": block, "block_length": block, "first_block": reach, "last_block": reach}
            return routing.route(query, query, **places, block_size=128, top_k=8, is_causal=True)

        jax.jit(route).lower(query, array(1, blocks), array(1, tokens)).compile()
    else:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        def always(h: Any, i: Any, j: Any, data: Any, mask: Any, next_mask: Any, next_i: bool = False) -> Any:
            del h, data, mask, next_mask
            return (i if next_i else j), None, True, True

        splash._next_nonzero = always  # else a prefetched number decides whether the body runs, and counts as 0
        tokens = sizes["tokens"]
        names: tuple[str, ...] = "block_q", "block_kv", "block_kv_compute"
        if part == "splash_backward":
            names += "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"
        tile_sizes = splash.BlockSizes(**dict.fromkeys(names, min(sizes["tile"], tokens)))
        mask = masks.MultiHeadMask([masks.FullMask((tokens, tokens))])
        attention = splash.make_splash_mha_single_device(mask=mask, block_sizes=tile_sizes)
        query = array(1, tokens, HEAD_DIM, dtype=bfloat16)

        def attend_dense(query: Any, key: Any, value: Any) -> Any:
            if part == "splash":
                return attention(query, key, value)
            return jax.grad(lambda *x: attention(*x).astype(jnp.float32).sum(), (0, 1, 2))(query, key, value)

        jax.jit(attend_dense).lower(query, query, query).compile()


def _named(cycles: dict[str, int], word: str) -> int:
    return sum(number for name, number in cycles.items() if word in name)


def _slope(part: str, few: int, many: int, slots: int, **sizes: Any) -> tuple[float, int]:
    """Cycles a slot in a step, and cycles that are paid once."""
    low, high = (_named(measure(part, steps=steps, **sizes), "attend") for steps in (few, many))
    step = (high - low) / (many - few)
    return step / slots, round(low - few * step)


def _table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    for row in (header, ("---",) * len(header), *rows):
        print("| " + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    print()


def main() -> None:
    from pallas_kernels.config import KEY_MAJOR
    from pallas_kernels.tpu import key_work

    forward = {
        block_size: _slope("attend_fixed", 4, 12, TILE * TILES, block_size=block_size) for block_size, _ in CHOICES
    }
    without = {name: _slope("attend_fixed", 4, 12, TILE * TILES, without=name)[0] for name in ("fetch", "add")}
    running, _ = _slope("attend_running", 4, 12, TILE * TILES)
    backward = {
        block_size: _slope("attend_backward", 16, 48, BACKWARD_TILE, block_size=block_size) for block_size, _ in CHOICES
    }
    pack, finish = (sum(measure(part, rows=4096).values()) / 4096 for part in ("pack", "finish"))
    empty, one = (measure("schedule", rows=8192, pieces=512, batches=batches) for batches in (0, 1))
    sort = (sum(empty.values()) - _named(empty, "cut_tiles")) / 8192 / 8
    per_batch = (_named(one, "cut_tiles") - _named(empty, "cut_tiles")) / 512
    per_piece = _named(empty, "cut_tiles") / 512
    splash = {tile: _named(measure("splash", tokens=8192, tile=tile), "splash") / 8192 / 16 for tile in (512, 2048)}
    splash_backward = _named(measure("splash_backward", tokens=8192, tile=1024), "splash") / 8192 / 16

    print(f"Static estimates for {CHIP}, head_dim {HEAD_DIM}, bfloat16, one head. Tiles of {TILE}, {TILES} a step.\n")
    rows: list[tuple[object, ...]] = []
    for block_size, _ in CHOICES:
        slot, once = forward[block_size]
        rows.append((f"attend_fixed, block {block_size}", slot, slot * TILE, once / 8192))
        slot, once = backward[block_size]
        rows.append((f"attend_backward, block {block_size}", slot, slot * BACKWARD_TILE, once / 8192))
    rows.append(("attend_running, block 128", running, running * TILE, ""))
    _table(("kernel", "cycles a slot", "a tile", "once a row of the chunk"), rows)
    print("Splash attention, cycles a query and 512 keys: forward")
    print(
        f"{splash[512]:.2f} (tiles 512), {splash[2048]:.2f} (2048); with the backward {splash_backward:.2f} (1024).\n"
    )

    row_bytes = key_work.row_bytes(65) + key_work.row_bytes(130)
    for block_size, top_k in CHOICES:
        print(f"Forward, cycles a real (query, chosen block) pair, block {block_size}, top_k {top_k}:\n")
        rows = []
        for tokens in TOKENS:
            slot, once = forward[block_size]
            num_blocks = tokens // block_size
            chunk = min(tokens, KEY_MAJOR.chunk_bytes // row_bytes // 1024 * 1024)
            pairs = chunk * top_k
            batches = max(1.0, pairs / num_blocks / TILE / 4)
            parts = (
                slot,
                slot * TILE / 2 * num_blocks / pairs,
                once / 8192 / top_k,
                (pack + finish) / top_k,
                sort,
                num_blocks * (per_piece + batches * per_batch) / pairs,
            )
            ours, dense = sum(parts) * top_k, splash[2048] * tokens / 512 / 2
            rows.append((tokens, chunk, *parts, sum(parts), round(ours), round(dense), dense / ours))
        parts_named = ("in the step", "padding", "load, clear, store", "pack, finish", "sort, count", "cut", "all")
        _table(("tokens", "chunk rows", *parts_named, "a query", "splash, causal, a query", "ratio"), rows)
    router = sum(measure("router", tokens=8192).values()) / 8192 / 8
    print(
        f"Router, beside that, 8192 tokens, block 128, top_k 8: {router:.2f} cycles a pair, one extraction a stretch."
    )
    slot, once = backward[128]
    whole = slot * (1 + BACKWARD_TILE / 2 * 512 / (32768 * 8)) + once / 8192 / 8
    print(f"Backward kernel at 65536 tokens with padding, block 128: {whole:.2f} cycles a pair.\n")
    step, no_add, no_fetch = forward[128][0], without["add"], without["fetch"]
    print(f"In the step at block 128: {step:.2f} in all, {no_add:.2f} without adding rows, {no_fetch:.2f} without")
    print(
        "fetching those of the next step. Adding and fetching overlap, so these do not add up. The own block is one of"
    )
    print("the chosen ones and goes through the same tiles: no pass of its own. On-chip memory, as requested (not read")
    print(f"back): {row_bytes} bytes a row of the chunk, a chunk at most {KEY_MAJOR.chunk_bytes}.\n")
    print("\n".join(LIMITS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", help="compile one part alone")
    parser.add_argument("--sizes", default="{}", help="its sizes, JSON")
    arguments = parser.parse_args()
    if arguments.part:
        compile_part(arguments.part, json.loads(arguments.sizes))
    else:
        main()
