"""Named shapes shared by tests and benchmarks, tolerances, and the inputs that belong to a case."""

import dataclasses

import ml_dtypes
import numpy as np

from pallas_kernels.blocks import Blocks
from tests import near_ties

# How far a result may lie from the float64 oracle, as a share of the largest expected value (at least of 1). The 16-bit
# types: inputs are the oracle's own rounded numbers and sums are float32 (S8), so what remains is the rounding of
# tiles and of the result, a few units in the last place (2^-8, 2^-11). float32: sums of up to some hundred terms of
# changing sign, about a hundred units of 2^-24. float64: for checks of formulas.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the library.

    Attributes:
      sequences: "full" (no padding), "lengths" (padded rows, one without keys), "segments" (packed rows, sorted ids) or
        "mixed" (packed rows with ids in no order, some of them on one side only, and padding).
      exact: draw multiples of 1/8 instead of real numbers. Scores are then exact in float32 (for blocks of a power of
        two; a causal query never scores the short last block), and ties are frequent.
      scale: of the logits; None for 1 / sqrt(head_dim).
    """

    name: str
    batch: int = 2
    queries: int = 32
    keys: int = 32
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 8
    block_size: int = 8
    top_k: int = 2
    is_causal: bool = True
    dtype: str = "float32"
    sequences: str = "full"
    exact: bool = False
    scale: float | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def options(self) -> dict:
        """What routing takes besides arrays."""
        return {"block_size": self.block_size, "top_k": self.top_k, "is_causal": self.is_causal}

    @property
    def num_blocks(self) -> int:
        """Upper bound of the block ids: a packed row may hold one segment, hence one block, a key."""
        packed = self.sequences in ("segments", "mixed")
        return self.keys if packed else -(-self.keys // self.block_size)


CASES = (
    Case("aligned"),
    Case("ties", exact=True, top_k=3, queries=64, keys=64, head_dim=4),
    Case("ragged_tail", queries=37, keys=37, top_k=3, head_dim=5),
    Case("grouped_heads", heads=4, kv_heads=2, scale=0.7),
    Case("one_kv_head", heads=3, kv_heads=1, queries=29, keys=29, block_size=5),
    Case("block_of_one", queries=12, keys=12, block_size=1, top_k=4),
    Case("one_block", queries=12, keys=12, block_size=16, top_k=1),
    Case("many_blocks", batch=1, queries=150, keys=290, head_dim=4, kv_heads=1, block_size=2, top_k=6, exact=True),
    Case("top_k_one", top_k=1),
    Case("top_k_above_blocks", queries=20, keys=20, top_k=9),
    Case("fewer_queries", queries=13, keys=37, top_k=3),
    Case("more_queries", queries=37, keys=13, block_size=4),
    Case("one_query", queries=1, keys=40),
    Case("lengths", batch=3, sequences="lengths", top_k=3, heads=4),
    Case("segments", sequences="segments", queries=40, keys=40),
    Case("mixed_segments", batch=3, sequences="mixed", queries=36, keys=45, block_size=4, top_k=3, heads=4),
    Case("bidirectional", is_causal=False, top_k=2, queries=21, keys=37),
    Case("bidirectional_lengths", batch=3, is_causal=False, sequences="lengths", heads=4),
    Case("bidirectional_mixed", is_causal=False, sequences="mixed", batch=3, block_size=4, heads=4),
    Case("bfloat16", dtype="bfloat16", heads=4, exact=True, queries=48, keys=48),
    Case("float16", dtype="float16", sequences="mixed", exact=True, queries=48, keys=48, block_size=4),
)


def at_kernel_size(case: Case) -> Case:
    """The case with blocks and heads that the TPU kernels take, and tokens in proportion."""
    grown = -(-16 // case.block_size)
    sizes = {"queries": grown * case.queries, "keys": grown * case.keys, "block_size": grown * case.block_size}
    return dataclasses.replace(case, name=f"{case.name}_tpu", head_dim=32, **sizes)


# Long enough for several chunks, steps and tiles of every loop. Too large for the oracle; exact, so that two
# implementations must choose alike.
LONG = tuple(
    Case(f"long_{kind}", batch=1, queries=n, keys=4500, kv_heads=1, block_size=16, top_k=4, exact=True, sequences=kind)
    for kind, n in (("full", 4500), ("segments", 4500), ("mixed", 2600))
)

# The sizes at which speed is promised (README). Too large for the oracle.
BENCHMARKS = tuple(
    Case(f"tokens_{n}", batch=1, queries=n, keys=n, head_dim=64, block_size=64, top_k=8)
    for n in (2048, 4096, 8192, 16384)
)


def make_inputs(case: Case, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Draws what a case needs.

    Returns:
      arrays: "query", "key", "value" and "d_output" (a cotangent of the output) in the dtype of the case.
      sequences: the sequence arguments that the case sets, empty for "full".
    """
    random = np.random.default_rng(seed)
    query_shape = (case.batch, case.queries, case.heads, case.head_dim)
    key_shape = (case.batch, case.keys, case.kv_heads, case.head_dim)
    shapes = {"query": query_shape, "key": key_shape, "value": key_shape, "d_output": query_shape}

    def draw(shape):
        numbers = random.standard_normal(shape)
        return (near_ties.eighths(numbers) if case.exact else numbers).astype(as_dtype(case.dtype))

    return {name: draw(shape) for name, shape in shapes.items()}, make_sequences(case, random)


def make_sequences(case: Case, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws the sequence arguments of a case."""
    sequences = {}
    sides = {"query": case.queries, "key_value": case.keys}
    for side, num_tokens in sides.items():
        if case.sequences in ("lengths", "mixed"):
            lengths = random.integers(num_tokens // 2, num_tokens + 1, case.batch)
            lengths[-1] = 0 if side == "key_value" and case.sequences == "lengths" else lengths[-1]  # an empty row
            sequences[f"{side}_seq_lengths"] = lengths.astype(np.int32)
        if case.sequences == "segments":
            sequences[f"{side}_segment_ids"] = np.sort(random.integers(0, 4, (case.batch, num_tokens))).astype(np.int32)
        if case.sequences == "mixed":
            low = 0 if side == "query" else -1  # query id 2 has no keys, key id -1 no queries
            ids = random.integers(low, low + 3, (case.batch, num_tokens))
            sequences[f"{side}_segment_ids"] = ids.astype(np.int32)
    return sequences


def make_selection(case: Case, seed: int = 0, num_blocks: int | None = None) -> np.ndarray:
    """Draws block ids `[batch, heads, queries, top_k]` no router would choose: of any segment, past or future.

    Of a packed row's ids few exist; a smaller num_blocks than the case's leaves out the others.
    """
    num_blocks = num_blocks or case.num_blocks
    random = np.random.default_rng(seed)
    choices = np.arange(num_blocks + case.top_k)
    shape = (case.batch, case.heads, case.queries, choices.size)
    ids = random.permuted(np.broadcast_to(choices, shape), axis=-1)[..., : case.top_k]
    return np.where(ids < num_blocks, ids, -1).astype(np.int32)


def abstract_blocks(make, queries: int, keys: int, block_size: int, *, num_blocks: int | None = None) -> Blocks:
    """The geometry of one row as abstract arrays; make gives one of a shape. With num_blocks, of packed segments."""
    by_query, by_block = make(1, queries), make(1, num_blocks or -(-keys // block_size))
    sizes = {"block_size": block_size, "num_keys": keys, "is_packed": num_blocks is not None}
    return Blocks(by_query, by_query, None, by_block, by_block, by_query, by_query, **sizes)


def as_dtype(name: str) -> np.dtype:
    """NumPy's dtype of that name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def assert_close(actual, expected, dtype: str, rows=...) -> None:
    """Asserts that actual has no NaN and lies within the dtype's tolerance of the oracle's numbers."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    tolerance = TOLERANCE[dtype] * max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(actual[rows], expected[rows], rtol=0, atol=tolerance)
