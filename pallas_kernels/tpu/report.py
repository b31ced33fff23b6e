"""Static estimates of the TPU kernels beside splash attention: `python -m pallas_kernels.tpu.report`.

Needs libtpu, no TPU. Every figure comes from a program of its own (`report_parts`), compiled for a v6e with a fixed
number of steps; two step counts give the cost of a step and what is paid once. What that is worth stands under the
tables that it prints. Takes about ten minutes on one core.
"""

import math
from typing import Any

from pallas_kernels.config import KEY_MAJOR
from pallas_kernels.tpu import chunks
from pallas_kernels.tpu.report_parts import CHIP, HEAD_DIM, Measured, measure

CHOICES = (128, 8), (512, 2)  # block_size, top_k
TOKENS = 8192, 65536, 524288
FORWARD_TILES = 128, 64
SPLASH_TILE = 2048  # best for splash attention among 512 to 2048, found by trial
V6E_BYTES = 128 << 20
LIMITS = """\
Why more than 5 cycles a pair at block 128:

* In the step: the scalar unit forms two addresses a pair, and it is full. See `forward_kernels`.
* Padding: the last tile of each block in each chunk is half empty. At 524288 tokens a chunk of 74904 rows, all that
  128 MiB hold, has 146 pairs a block; tiles of 64 waste the least there.
* Load, clear, store; pack, finish: once a row, shared by its pairs. A chunk's first load and last store are hidden by
  nothing; XLA writes the words of the queries, and divides and narrows the sums, in several passes over HBM.
* Sort, count: XLA's sort takes half of it, counting pairs by a product of one-hot matrices and copies of the unsorted
  pairs between layouts the rest. A chunk of 599232 pairs is dear: with 524288, a power of two, it
  would be 0.75 (measured apart).
* Cut: the scalar unit, some 14 cycles a tile, and at least four tiles for each block.

What the figures are worth:

* Estimates of libtpu's static profile for a v6e; nothing here ever ran on a TPU. Compare, never quote a time.
* The profile overlaps reads and writes of HBM freely: kernels bound by memory look up to twice too fast.
* Numbers that the profile cannot know count as 0: always the same rows and keys are fetched. Copies of keys are made
  in every step and count; in splash attention the pipeline would leave them out, and in `attend_backward` it does.
* Loops, guards and grids that depend on data are measured at fixed lengths (`report_parts`).
* Splash attention is measured with a full mask and its body made to run always; a causal pass counts as half.
* Padding assumes that every block is chosen equally often: half a tile for each block and chunk.
* Extractions of the router assume independent scores: of the best 8 of s stretches, the newest holds a binomial number,
  and a tile goes on until the last of its 512 queries is done.
* With XLA's gathers and scatters the profile of a whole program is not available: parts are measured alone.
* VMEM and spills are read back from the report that libtpu writes beside a compiled program; chunks of 8192 rows there.
"""


def _slope(part: str, few: int, many: int, slots: int, **sizes: Any) -> tuple[float, float, Measured]:
    """Cycles a slot in a step, cycles paid once for each row of the chunk, and one of the two measurements."""
    low, high = (measure(part, reads_memory=True, rows=8192, steps=steps, **sizes) for steps in (few, many))
    step = (high.named("attend") - low.named("attend")) / (many - few)
    return step / slots, (low.named("attend") - few * step) / 8192, low


def _table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    for row in (header, ("---",) * len(header), *rows):
        print("| " + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    print(flush=True)


def _key_major() -> tuple[dict[tuple[int, int], tuple[float, float]], dict[int, tuple[float, float]]]:
    """Cycles a slot, and paid once a row: forward by (block_size, tile), backward by block_size."""
    forward: dict[tuple[int, int], tuple[float, float]] = {}
    backward: dict[int, tuple[float, float]] = {}
    rows: list[tuple[object, ...]] = []
    for block_size, _ in CHOICES:
        for tile in FORWARD_TILES:
            slot, once, found = _slope("forward", 4, 8, 1024, tile=tile, block_size=block_size)
            forward[block_size, tile] = slot, once
            rows.append(("attend_fixed", block_size, tile, slot, once, *found.kernel("attend")))
        tile = KEY_MAJOR.backward_tile_size
        slot, once, found = _slope("backward", 8, 24, tile, tile=tile, block_size=block_size)
        backward[block_size] = slot, once
        rows.append(("attend_backward", block_size, tile, slot, once, *found.kernel("attend")))
    slot, once, found = _slope("forward", 4, 8, 1024, tile=128, has_maximum=True)
    rows.append(("attend_running", 128, 128, slot, once, *found.kernel("attend")))
    header = "kernel", "block", "pairs a tile", "cycles a slot", "once a row", "bytes of VMEM", "of these for spills"
    _table(header, rows)
    add, fetch = (_slope("forward", 4, 8, 1024, tile=128, without=name)[0] for name in ("add", "fetch"))
    print(f"In the step at block 128, tiles of 128: {forward[128, 128][0]:.2f} in all, {add:.2f} without adding")
    print(f"rows, {fetch:.2f} without fetching those of the next step; the two overlap.\n")
    return forward, backward


def _whole(forward: dict, backward: dict, splash: float, router: dict[int, float]) -> None:
    """Tables of the whole forward and backward passes."""
    row_cost = {part: sum(measure(part, rows=32768).cycles.values()) / 32768 for part in ("pack", "finish")}
    for block_size, top_k in CHOICES:
        print(f"Forward, cycles a real (query, chosen block) pair, block {block_size}, top_k {top_k}:\n")
        rows: list[tuple[object, ...]] = []
        backward_rows: list[tuple[object, ...]] = []
        for tokens in TOKENS:
            num_blocks = tokens // block_size
            chunk = chunks.plan(
                tokens,
                row_bytes=1536,
                slot_bytes=4 * (128 * 8 + 3 * block_size),
                tile_bytes=8 * block_size * 128,
                pairs_per_row=top_k,
                num_pieces=num_blocks,
                tile_sizes=FORWARD_TILES,
                slots_per_step=1024,
                config=KEY_MAJOR,
            )
            pairs = chunk.rows * top_k
            slot, once = forward[block_size, chunk.tile_size]
            tiles = pairs / num_blocks / chunk.tile_size + 0.5
            sizes: dict[str, Any] = {
                "pieces": num_blocks,
                "tile": chunk.tile_size,
                "batches": 0 if tiles <= 4 else math.ceil(tiles / 8),
            }
            schedule = measure("schedule", rows=chunk.rows, top_k=top_k, **sizes)
            cut = schedule.named("cut_tiles")
            parts = (
                slot,
                slot * chunk.tile_size / 2 * num_blocks / pairs,
                once / top_k,
                sum(row_cost.values()) / top_k,
                (sum(schedule.cycles.values()) - cut) / pairs,
                cut / min(num_blocks, 512) * num_blocks / pairs,
            )
            ours, dense = sum(parts) * top_k, splash * tokens / 512 / 2
            rows.append(
                (tokens, chunk.rows, chunk.tile_size, *parts, sum(parts), round(ours), round(dense), dense / ours)
            )
            if block_size == 128:
                rows[-1] += (router[tokens], dense / (ours + top_k * router[tokens]))
            slot, once = backward[block_size]
            whole = slot * (1 + KEY_MAJOR.backward_tile_size / 2 * num_blocks / pairs) + once / top_k
            backward_rows.append((tokens, slot, whole, whole / sum(parts)))
        named = "in the step", "padding", "load, clear, store", "pack, finish", "sort, count", "cut", "all"
        more = ("router, a pair", "ratio with it") if block_size == 128 else ()
        header = ("tokens", "chunk rows", "tile", *named, "a query", "splash, causal, a query", "ratio", *more)
        _table(header, rows)
        print(f"Backward kernel, cycles a real pair, block {block_size}, top_k {top_k}:\n")
        _table(("tokens", "a slot", "with padding, load and store", "to the whole forward"), backward_rows)


def _router() -> dict[int, float]:
    """Cycles a pair of the router at block 128, top_k 8, causal, by tokens."""
    few, many = (measure("router", reads_memory=True, extractions=number) for number in (0, 1))
    tiles = 256 * 128 // 512
    extraction = (many.named("moba_route") - few.named("moba_route")) / tiles
    stretch = few.named("moba_route") / tiles
    means = (sum(few.cycles.values()) - few.named("moba_route")) / (256 * 128)  # a token

    def extractions(stretches: int) -> float:
        """Expected largest number among 512 queries of the best 8 that lie in the newest of so many stretches."""
        chance = 1 / stretches
        terms = [math.comb(8, number) * chance**number * (1 - chance) ** (8 - number) for number in range(9)]
        return sum(1 - min(1.0, sum(terms[:number])) ** 512 for number in range(1, 9))

    print("Router, block 128, top_k 8, causal; a stretch is 256 blocks for 512 queries:")
    print(f"{stretch:.0f} cycles a stretch, {extraction:.0f} an extraction; means and copies {means:.2f} a token;")
    print("{} bytes of VMEM, {} of these for spills.\n".format(*many.kernel("moba_route")))
    rows: list[tuple[object, ...]] = []
    cycles = {}
    for tokens in TOKENS:
        most = max(1, tokens // (256 * 128))
        costs = [stretch + extraction * extractions(number) for number in range(1, most + 1)]
        seen = sum(sum(costs[:number]) for number in range(1, most + 1)) / most  # a tile sees half of them
        cycles[tokens] = (seen / 512 + means) / 8
        rows.append((tokens, most, seen / 512, cycles[tokens] * 8, cycles[tokens]))
    _table(("tokens", "stretches", "scores and choice, a query", "all, a query", "a pair"), rows)
    return cycles


def _tiles(splash: float, splash_backward: float) -> None:
    """The query-tile-major kernels beside splash attention."""
    print("Query-tile-major kernels, cycles a query and 512 keys that it visits, 8192 queries, 4096 keys for each:\n")
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
    header = "kernel", "mask", "cycles", "to splash attention", "bytes of VMEM", "of these for spills"
    _table(header, rows)


def main() -> None:
    print(f"Static estimates for {CHIP}, head_dim {HEAD_DIM}, bfloat16, one head. A step takes 1024 slots.\n")
    chunks.SMALLEST_CHIP = V6E_BYTES  # there is no chip to ask
    splash = {tile: measure("splash", tokens=8192, tile=tile) for tile in (512, SPLASH_TILE)}
    cost = {tile: found.named("splash") / 8192 / 16 for tile, found in splash.items()}
    backward = measure("splash", tokens=8192, tile=1024, backward=True).named("splash") / 8192 / 16
    print(
        f"Splash attention, cycles a query and 512 keys: forward {cost[512]:.2f} (tiles 512), {cost[SPLASH_TILE]:.2f}"
    )
    print(f"({SPLASH_TILE}); with the backward {backward:.2f} (1024).\n")
    _tiles(cost[SPLASH_TILE], backward)
    slots = _key_major()
    router = _router()
    _whole(*slots, cost[SPLASH_TILE], router)
    print(LIMITS, end="")


if __name__ == "__main__":
    main()
