"""Static estimates of the TPU kernels beside splash attention: `python -m experiments tpu_report > docs/tpu-report.md`.

Needs libtpu, but no TPU. Every figure comes from its own program (`tpu_parts`), compiled for a v6e with a fixed number
of steps. Two step counts give the cost of a step and the cost that is paid once. The text under the printed tables says
how far to trust them. Takes about a quarter of an hour.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.kernels.tpu_parts import CHIP, HEAD_DIM, Measured, measure
from pallas_kernels.config import PER_QUERY
from pallas_kernels.tpu.per_query import chunks
from pallas_kernels.tpu.per_query.forward import plan_chunk
from sparse_attn.layout import whole_rows

CHOICES = (128, 8), (512, 2)  # block_size, top_k
TOKENS = 8192, 65536, 524288
FORWARD_TILES = 128, 64
SPLASH_TILE = 2048  # the fastest for splash attention from 512 to 2048, by trial
V6E_BYTES = 128 << 20
KV_HEADS = 8  # of a decode step
LIMITS = """\
Why more than 5 cycles per pair at block 128:

* In the step: two addresses per pair saturate the scalar unit. See `pallas_kernels/tpu/per_query/forward_kernels.py`.
* Padding: the last tile of each block in each chunk is half empty on average. At 524288 tokens a chunk of 75776 rows,
  the most that fits in 128 MiB, has 148 pairs per block; tiles of 64 waste the least there.
* Load, finish: once per row, shared by the row's pairs, and once per chunk. Queries are packed into words; sums are
  cleared, divided and stored. The first copy of a chunk and the tables of its first step are not overlapped.
* Sort, count: XLA's sort takes two thirds; the rest counts pairs by a product of one-hot matrices.
* Cut: the scalar unit takes about 14 cycles per tile, and at least four tiles per block.

What the figures are worth:

* They are estimates of libtpu's static profile for a v6e. Nothing has run on a TPU. Compare them; do not quote times.
* The profile assumes that HBM reads and writes overlap freely. Memory-bound kernels look up to twice as fast as they
  are.
* Numbers that the profile cannot know count as 0, so the same rows and keys are fetched every time. Copies of keys are
  made in every step and counted. In splash attention and in `attend_backward` the pipeline would skip repeated ones.
* Loops, guards and grids that depend on data are measured at fixed lengths (`experiments/kernels/tpu_parts.py`).
* Splash attention is measured with a full mask and a body that always runs; a causal pass counts as half.
* Padding assumes that every block is chosen equally often: half a tile per block and chunk.
* The backward pass is taken to use the forward pass's chunk, sort and cut; its own tiles are longer.
* Extractions of the router assume independent scores. The newest of s key steps then holds a negative binomial number
  of blocks above the best 8 of the steps before it. A tile makes as many extractions as its worst of 512 queries needs,
  at most 8.
* The decode step has full steps of 16 blocks (8 for one head a group). Its dense counterpart is
  `jax.nn.dot_product_attention` over the whole cache. Writing the new token to the cache is in neither.
* XLA's gathers and scatters hide the profile of a whole program, so parts are measured one by one.
* VMEM and spills come from the report that libtpu writes beside a compiled program, for chunks of 8192 rows.
"""


class Cost(NamedTuple):
    """Cycles of a kernel."""

    slot: float  # per slot of a step
    row: float  # per row of a chunk
    chunk: float  # per chunk


def _cost(part: str, few: int, many: int, slots: int, **sizes: Any) -> tuple[Cost, Measured]:
    """The cost of a part, from three combinations of steps and rows, and the measurement with the fewest of both."""
    low = measure(part, reads_memory=True, rows=8192, steps=few, **sizes)
    more_steps, more_rows = (
        measure(part, rows=rows, steps=steps, **sizes) for rows, steps in ((8192, many), (12288, few))
    )
    step = (more_steps.all - low.all) / (many - few)
    row = (more_rows.all - low.all) / 4096
    return Cost(step / slots, row, low.all - few * step - 8192 * row), low


def _table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    for row in (header, ("---",) * len(header), *rows):
        print("| " + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    print(flush=True)


def _per_query() -> tuple[dict[tuple[int, int], Cost], dict[int, Cost]]:
    """Forward by (block_size, tile), backward by block_size."""
    forward: dict[tuple[int, int], Cost] = {}
    backward: dict[int, Cost] = {}
    rows: list[tuple[object, ...]] = []
    for block_size, _ in CHOICES:
        for tile in FORWARD_TILES:
            cost, found = _cost("forward", 4, 8, 1024, tile=tile, block_size=block_size)
            forward[block_size, tile] = cost
            rows.append(("attend_fixed", block_size, tile, *cost[:2], round(cost.chunk), *found.kernel("attend")))
        tile = PER_QUERY.backward_tile_size
        cost, found = _cost("backward", 8, 24, tile, tile=tile, block_size=block_size)
        backward[block_size] = cost
        rows.append(("attend_backward", block_size, tile, *cost[:2], round(cost.chunk), *found.kernel("attend")))
    cost, found = _cost("forward", 4, 8, 1024, tile=128, has_maximum=True)
    rows.append(("attend_running", 128, 128, *cost[:2], round(cost.chunk), *found.kernel("attend")))
    sizes = "kernel", "block", "pairs per tile"
    _table((*sizes, "cycles per slot", "per row", "per chunk", "bytes of VMEM", "of these for spills"), rows)
    add, fetch = (_cost("forward", 4, 8, 1024, tile=128, without=name)[0].slot for name in ("add", "fetch"))
    print(f"In the step at block 128, tiles of 128: {forward[128, 128].slot:.2f} cycles, {add:.2f} without adding")
    print(f"rows, {fetch:.2f} without fetching the rows of the next step. Adding and fetching overlap.\n")
    return forward, backward


def _whole(forward: dict, backward: dict, splash: float, router: dict[int, float]) -> None:
    """Prints the tables of the whole forward and backward passes."""
    for block_size, top_k in CHOICES:
        print(f"Forward, cycles per real (query, chosen block) pair, block {block_size}, top_k {top_k}:\n")
        rows: list[tuple[object, ...]] = []
        backward_rows: list[tuple[object, ...]] = []
        for tokens in TOKENS:
            num_blocks = tokens // block_size
            query: Any = jax.ShapeDtypeStruct((1, tokens, 1, 128), jnp.bfloat16)
            lay_out = functools.partial(whole_rows, block_size=block_size, is_causal=True)
            chunk = plan_chunk(query, query, top_k, jax.eval_shape(lay_out, query, query), PER_QUERY)
            assert isinstance(chunk, chunks.Chunk)
            pairs = chunk.rows * top_k
            cost = forward[block_size, chunk.tile_size]
            norm = measure("norm", rows=chunk.rows).all
            tiles = pairs / num_blocks / chunk.tile_size + 0.5
            sizes: dict[str, Any] = {
                "pieces": num_blocks,
                "tile": chunk.tile_size,
                "batches": 0 if tiles <= 4 else math.ceil(tiles / 8),
            }
            schedule = measure("schedule", rows=chunk.rows, top_k=top_k, **sizes)
            cut = schedule.named("cut_tiles")
            parts = (
                cost.slot,
                cost.slot * chunk.tile_size / 2 * num_blocks / pairs,
                (cost.row * chunk.rows + cost.chunk + norm) / pairs,
                (schedule.all - cut) / pairs,
                cut / min(num_blocks, 512) * num_blocks / pairs,
            )
            ours, dense = sum(parts) * top_k, splash * tokens / 512 / 2
            rows.append(
                (tokens, chunk.rows, chunk.tile_size, *parts, sum(parts), round(ours), round(dense), dense / ours)
            )
            if block_size == 128:
                rows[-1] += (router[tokens], dense / (ours + top_k * router[tokens]))
            cost = backward[block_size]
            padding = cost.slot * PER_QUERY.backward_tile_size / 2 * num_blocks / pairs
            pack = measure("pack", rows=chunk.rows).all / pairs
            parts_backward = cost.slot, padding, (cost.row * chunk.rows + cost.chunk) / pairs, pack, sum(parts[-2:])
            backward_rows.append((tokens, *parts_backward, sum(parts_backward), sum(parts_backward) / sum(parts)))
        named = "in the step", "padding", "load, finish", "sort, count", "cut", "all"
        more = ("router, per pair", "ratio with it") if block_size == 128 else ()
        header = ("tokens", "chunk rows", "tile", *named, "per query", "splash, causal, per query", "ratio", *more)
        _table(header, rows)
        print(f"Backward, cycles per real pair, block {block_size}, top_k {top_k}:\n")
        parts_named = "in the step", "padding", "load, store", "pack", "sort, count, cut"
        _table(("tokens", *parts_named, "all", "over the forward"), backward_rows)


def _router() -> dict[int, float]:
    """Prints the router's table. Returns its cycles per pair at block 128, top_k 8, causal, by tokens."""

    def extractions(key_steps: int) -> float:
        """Expected extractions of a tile at its newest key step: the maximum over 512 queries, at most 8."""
        chance = 1 / key_steps
        terms = [math.comb(number + 7, 7) * chance**number * (1 - chance) ** 8 for number in range(8)]
        return sum(1 - sum(terms[:number]) ** 512 for number in range(1, 9))

    print("Router, block 128, top_k 8, causal. A key step is 256 blocks, or all if fewer, for 512 queries:\n")
    rows: list[tuple[object, ...]] = []
    cycles = {}
    for tokens in TOKENS:
        measured = min(tokens, 256 * 128)
        few, many, cut = (
            measure("router", reads_memory=is_cut, tokens=measured, extractions=number, is_cut=is_cut)
            for number, is_cut in ((1, False), (8, False), (1, True))
        )
        tiles, router = measured // 512, few.named("moba_route")
        extraction = (many.named("moba_route") - router) / tiles / 7
        mask = (cut.named("moba_route") - router) / tiles
        key_step = router / tiles - extraction  # one extraction is always made
        means = (few.all - router) / measured  # per token
        most = tokens // measured
        costs = [key_step + extraction * extractions(number) for number in range(1, most + 1)]
        seen = sum(sum(costs[:number]) + mask for number in range(1, most + 1)) / most  # a tile sees half of the steps
        cycles[tokens] = (seen / 512 + means) / 8
        numbers = most, key_step, mask, extraction, sum(map(extractions, range(1, most + 1))) / most
        rows.append((tokens, *numbers, seen / 512, means, cycles[tokens] * 8, cycles[tokens]))
    header = "tokens", "key steps", "one key step", "its mask", "one extraction", "extractions per key step"
    _table((*header, "scores and choice, per query", "means and copies", "all, per query", "per pair"), rows)
    print("{} bytes of VMEM, {} of these for spills.\n".format(*cut.kernel("moba_route")))
    return cycles


def _tiles(splash: float, splash_backward: float) -> None:
    """Prints the table of the per-tile kernels beside splash attention."""
    print("Query-tile-major kernels, cycles per query and 512 visited keys; 8192 queries, each visits 4096 keys:\n")
    rows: list[tuple[object, ...]] = []
    for block in (512, 128):
        for is_masked in (False, True):
            sizes: dict[str, Any] = {
                "query_block": block,
                "key_block": block,
                "is_masked": is_masked,
                "list_length": 8 * 512 // block,
            }
            visited = 8192 * 8
            forward = measure("tiles", reads_memory=True, tokens=8192, backward=False, **sizes)
            backward = measure("tiles", reads_memory=True, tokens=8192, backward=True, **sizes)
            cost = forward.named("attend") / visited
            gradients = backward.named("attend") / visited
            note = "yes" if is_masked else "no"
            rows.append((f"forward, block {block}", note, cost, cost / splash, *forward.kernel("attend")))
            for name in ("d_query", "d_key_value"):
                part = backward.named(f"attend_tiles_{name}") / visited
                rows.append((f"{name}, block {block}", note, part, "", *backward.kernel(name)))
            whole = cost + gradients
            rows.append((f"all three, block {block}", note, whole, whole / splash_backward, "", ""))
    header = "kernel", "mask", "cycles", "over splash attention", "bytes of VMEM", "of these for spills"
    _table(header, rows)


def _decode() -> None:
    """Prints the table of a decode step beside dense attention to the same cache."""
    print(f"A decode step, one row, {KV_HEADS} key/value heads, block 128, top_k 8, cycles:\n")
    rows: list[tuple[object, ...]] = []
    for tokens in TOKENS:
        for group, unions in ((1, (8,)), (8, (16, 57))):
            sizes: dict[str, Any] = {"tokens": tokens, "kv_heads": KV_HEADS, "group": group}
            dense = measure("dense_decode", **sizes).all
            for blocks in unions:
                found = measure("decode", blocks=blocks, **sizes)
                kernel = found.named("attend_few")
                rows.append((tokens, group, blocks, kernel, found.all - kernel, found.all, dense, dense / found.all))
    sizes_named = "tokens", "heads a group", "blocks they choose together"
    named = "attend_few", "choice and union", "all", "dense, XLA", "ratio"
    _table((*sizes_named, *named), rows)


def tpu_report() -> None:
    """Prints static estimates of the TPU kernels beside splash attention; takes some fifteen minutes; needs libtpu."""
    print(f"Static estimates for {CHIP}, head_dim {HEAD_DIM}, bfloat16, one head. A step takes 1024 slots.\n")
    jax.config.update("jax_platforms", "cpu")  # else libtpu looks for a TPU and logs errors
    chunks.SMALLEST_CHIP = V6E_BYTES  # there is no chip to ask
    splash = {tile: measure("splash", tokens=8192, tile=tile) for tile in (512, SPLASH_TILE)}
    cost = {tile: found.named("splash") / 8192 / 16 for tile, found in splash.items()}
    backward = measure("splash", tokens=8192, tile=1024, backward=True).named("splash") / 8192 / 16
    print(
        f"Splash attention, cycles per query and 512 keys: forward {cost[512]:.2f} (tiles 512), {cost[SPLASH_TILE]:.2f}"
    )
    print(f"({SPLASH_TILE}); with the backward {backward:.2f} (1024).\n")
    _tiles(cost[SPLASH_TILE], backward)
    slots = _per_query()
    router = _router()
    _whole(*slots, cost[SPLASH_TILE], router)
    _decode()
    print(LIMITS, end="")
