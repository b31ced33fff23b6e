"""What the GPU kernels should cost, by arithmetic: `python -m experiments roofline > docs/gpu-roofline.md`.

Counts the bytes and operations of every stage and divides them by a chip's published peaks. Nothing is measured. The
result is a lower bound on the time of a stage if every byte counted here crosses the memory bus once.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.config import TRITON
from pallas_kernels.gpu.chunks import make_plan


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks per second: bytes, 16-bit tensor-core operations, float32 operations."""

    name: str
    memory: float
    tensor: float
    vector: float


H200 = Chip("H200", memory=4.8e12, tensor=989e12, vector=67e12)

# Per pair: write and read the sort key, four passes of a 32-bit radix sort, split the sorted keys into block and pair,
# count, compute the slots, scatter the pair to its slot.
_SCHEDULE_BYTES = 80
_EXTRACTION_OPERATIONS = 8  # per score


@dataclasses.dataclass(frozen=True)
class Problem:
    """Causal self-attention on sequences without padding, in a 16-bit dtype."""

    sequence: int
    block_size: int
    top_k: int
    head_dim: int
    batch: int = 2
    heads: int = 16

    @property
    def rows(self) -> int:
        """Queries, over all sequences and heads."""
        return self.batch * self.heads * self.sequence

    @property
    def num_blocks(self) -> int:
        return self.sequence // self.block_size

    @property
    def pairs(self) -> int:
        """Chosen (query, block) pairs. The first queries see fewer than top_k blocks."""
        chosen = sum(min(block + 1, self.top_k) for block in range(self.num_blocks))
        return self.batch * self.heads * chosen * self.block_size

    @property
    def array_bytes(self) -> int:
        """Bytes of the queries; keys, values and outputs have the same size."""
        return self.rows * self.head_dim * 2

    def slots(self, tile_size: int) -> float:
        """Slots of all tiles: the pairs, and half a tile of padding per block."""
        return self.pairs + self.batch * self.heads * self.num_blocks * tile_size / 2


@dataclasses.dataclass(frozen=True)
class Stage:
    """Bytes of memory traffic, 16-bit tensor-core operations and float32 operations of one stage."""

    name: str
    bytes: float
    tensor: float = 0.0
    vector: float = 0.0

    def milliseconds(self, chip: Chip) -> float:
        """Time at the peaks. Memory traffic and arithmetic overlap; the two kinds of arithmetic do not."""
        return 1e3 * max(self.bytes / chip.memory, self.tensor / chip.tensor + self.vector / chip.vector)


def forward_stages(problem: Problem) -> tuple[Stage, ...]:
    """Routing, schedule, attention and merge, in that order."""
    p, row = problem, 2 * problem.head_dim
    return (
        _route_stage(problem),
        Stage("schedule", p.pairs * _SCHEDULE_BYTES),
        Stage(  # gather queries, read keys and values, write partial results
            "attend",
            p.pairs * (2 * row + 8) + 2 * p.array_bytes,
            tensor=4 * p.slots(TRITON.tile_size) * p.block_size * p.head_dim,
        ),
        Stage("merge", p.pairs * (row + 8) + p.array_bytes + 4 * p.rows),
    )


def backward_stages(problem: Problem) -> tuple[Stage, ...]:
    """Delta, schedule, dK and dV, dQ per pair, and the sum of dQ over the pairs of a query."""
    p, row = problem, 2 * problem.head_dim
    products = 2 * p.slots(TRITON.backward_tile_size) * p.block_size * p.head_dim
    keys: tuple[Stage, ...]
    if p.block_size <= TRITON.key_size:  # one kernel computes all three
        keys = (Stage("d_key, d_value, d_query", p.pairs * (3 * row + 16) + 8 * p.array_bytes, tensor=5 * products),)
    else:
        keys = (
            Stage("d_key, d_value", p.pairs * (2 * row + 16) + 8 * p.array_bytes, tensor=4 * products),
            Stage("d_query of pairs", p.pairs * (3 * row + 16) + 2 * p.array_bytes, tensor=3 * products),
        )
    return (
        Stage("delta", 2 * p.array_bytes + 4 * p.rows),
        Stage("schedule", p.pairs * _SCHEDULE_BYTES),
        *keys,
        Stage("sum", p.pairs * (row + 4) + p.array_bytes),
    )


def total(name: str, stages: tuple[Stage, ...]) -> Stage:
    """Bytes and operations of several stages, summed."""
    return Stage(name, *(sum(getattr(stage, kind) for stage in stages) for kind in ("bytes", "tensor", "vector")))


def _route_stage(problem: Problem) -> Stage:
    """Block means, scores in three tensor-core passes, and extraction of the best blocks."""
    p = problem
    visible = sum(range(1, p.num_blocks + 1)) * p.block_size * p.batch * p.heads  # (query, block) scores
    step_blocks = min(TRITON.route_blocks, p.num_blocks)
    scores_read = 0.0
    for last in range(p.num_blocks):
        seen = 0
        for step in range(last // step_blocks + 1):
            # About top_k step_blocks / seen blocks of a step enter a query's list. A tile runs until its slowest query
            # is done, taken as twice that number.
            seen += step_blocks
            scores_read += min(p.top_k if step == 0 else 2 * p.top_k * step_blocks / seen, step_blocks) * step_blocks
    scores_read *= p.block_size * p.batch * p.heads
    return Stage(
        "route",
        2 * p.array_bytes + 4 * p.rows * p.top_k,
        tensor=3 * 2 * visible * p.head_dim,
        vector=_EXTRACTION_OPERATIONS * scores_read,
    )


def dense_milliseconds(problem: Problem, chip: Chip) -> tuple[float, float]:
    """Dense causal attention at the peak of the tensor cores: forward (two products), backward (five products)."""
    forward = 4 * problem.rows * problem.sequence / 2 * problem.head_dim / chip.tensor * 1e3
    return forward, 2.5 * forward


def memory_ratio(problem: Problem) -> float:
    """Memory of the forward pass over that of dense flash attention (inputs, output, log-sum-exp)."""
    p = problem
    dense = 4 * p.array_bytes + 4 * p.rows
    array = jax.ShapeDtypeStruct((p.batch, p.sequence, p.heads, p.head_dim), jnp.bfloat16)
    indices = jax.ShapeDtypeStruct((p.batch, p.heads, p.sequence, p.top_k), jnp.int32)
    plan = make_plan(
        array,
        array,
        indices,
        num_blocks=p.num_blocks,
        block_size=p.block_size,
        scale=1.0,
        tile_size=TRITON.tile_size,
        arrays=2,
        config=TRITON,
    )
    chunk = plan.chunk_heads * plan.chunk_pairs * (2 * p.head_dim + 16)
    return (dense + 4 * indices.size + chunk) / dense


def roofline() -> None:
    """Prints what the GPU kernels should cost at a chip's published peaks."""
    print(table(), end="")


PROBLEMS = tuple(
    Problem(sequence, block_size, top_k, head_dim)
    for head_dim in (128, 64)
    for block_size, top_k in ((128, 8), (64, 16), (512, 2))
    for sequence in (1 << n for n in range(13, 20))
)


_EXPLANATION = (
    "**Nothing here is measured**, and no GPU kernel of this library has run on a GPU yet. A stage takes at least the",
    "larger of its bytes over the memory bandwidth and its operations over the peak rate. Not included: launches, the",
    "share of a peak that a real kernel reaches, and L2 cache hits, which save memory traffic. The number of",
    "extractions in routing is an estimate for scores in random order.",
    "",
    "Batch 2, 16 heads, bfloat16, causal; times in milliseconds. `dense` is causal dense attention at the peak of the",
    "tensor cores, which no kernel reaches, for the pass in the column before it. `memory` is the memory of the",
    "forward pass over that of dense attention.",
    "",
    "Written by `python -m experiments roofline`.",
    "",
)
_COLUMNS = ("block / top_k", "tokens", "route", "schedule", "attend", "merge", "forward", "dense", "backward", "dense")


def table(chip: Chip = H200, problems: tuple[Problem, ...] = PROBLEMS) -> str:
    """The roofline of the benchmark's problems, in Markdown."""
    lines = [
        "# What the GPU kernels should cost",
        "",
        f"Arithmetic at the published peaks of one {chip.name}: {chip.memory / 1e12:.1f} TB/s, "
        f"{chip.tensor / 1e12:.0f} TFLOP/s in 16 bits, {chip.vector / 1e12:.0f} TFLOP/s in float32.",
        *_EXPLANATION,
    ]
    for head_dim in dict.fromkeys(problem.head_dim for problem in problems):
        lines += [
            f"## head_dim {head_dim}",
            "",
            f"| {' | '.join(_COLUMNS)} | memory |",
            "| --- " + "| ---: " * 10 + "|",
        ]
        for problem in problems:
            if problem.head_dim != head_dim:
                continue
            forward = [stage.milliseconds(chip) for stage in forward_stages(problem)]
            backward = sum(stage.milliseconds(chip) for stage in backward_stages(problem))
            dense_forward, dense_backward = dense_milliseconds(problem, chip)
            numbers = (*forward, sum(forward), dense_forward, backward, dense_backward)
            lines.append(
                f"| {problem.block_size} / {problem.top_k} | {problem.sequence} | "
                + " | ".join(f"{number:.2f}" if number < 100 else f"{number:.0f}" for number in numbers)
                + f" | {memory_ratio(problem):.2f} |"
            )
        lines.append("")
    problem = Problem(65536, 128, 8, 128)
    lines += [
        "## Stage by stage: 64K tokens, block_size 128, top_k 8, head_dim 128",
        "",
        "| stage | GB | tensor TFLOP | float32 TFLOP | ms at the peaks |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind, stages in (("forward", forward_stages(problem)), ("backward", backward_stages(problem))):
        lines += [
            f"| {kind}: {stage.name} | {stage.bytes / 1e9:.2f} | {stage.tensor / 1e12:.2f} | "
            f"{stage.vector / 1e12:.3f} | {stage.milliseconds(chip):.2f} |"
            for stage in stages
        ]
    return "\n".join(lines) + "\n"
