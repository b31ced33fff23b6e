"""The Mosaic GPU kernels that attend, on a GPU or interpreted on a CPU with race detection, against loops in NumPy.

The interpreter knows the memories, the warpgroups and the barriers, but neither wgmma nor lane code: products and the
copies of rows are replaced by plain ones. What is left to a GPU to prove are those few functions of `tiles`.
"""

import functools
import inspect
import operator
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.config import MosaicConfig
from pallas_kernels.gpu.mosaic import backward, forward, tiles
from sparse_attn.attend.backends import MosaicKernels
from sparse_attn.layout import whole_rows
from tests import attend
from tests.cases import Case

if jax.__version_info__ < (0, 11):
    pytest.skip("the Mosaic interpreter of jax 0.10 knows no slice that starts at a number", allow_module_level=True)

from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # races have no public name yet

ON_GPU = jax.default_backend() == "gpu"
pytestmark = pytest.mark.timeout(120, method="thread")  # a deadlock hangs outside Python


def product(a, b):
    return jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)


def add_product(total, a, b):
    return total + product(a, b)


def load_numbers(ref, layout):
    return ref[...]


def zeros(rows, columns):
    return jnp.zeros((rows, columns))


def ranks(shape, axis):
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def opaque(number):
    return number


def copy_listed_rows(source_ref, row_ref, first, target_ref):
    rows = row_ref[pl.ds(first, target_ref.shape[0])]
    copied = source_ref[...].at[jnp.maximum(rows, 0)].get()
    target_ref[...] = jnp.where(rows[:, None] >= 0, copied, 0)


def copy_block(source_ref, first, stride, length, target_ref):
    rank = jnp.arange(target_ref.shape[0])
    is_real = rank < length
    copied = source_ref[...].at[jnp.where(is_real, first + rank * stride, 0)].get()
    target_ref[...] = jnp.where(is_real[:, None], copied, 0)


def close_copies(in_flight):
    plgpu.commit_smem()


def write_rows(source_ref, place_ref, target_ref, *first_column):
    columns = tuple(pl.ds(first, source_ref.shape[1]) for first in first_column)

    @pl.loop(0, source_ref.shape[0])
    def _(row):
        place = place_ref[row]

        @pl.when(place >= 0)
        def _():
            target_ref[place, *columns] = source_ref[row]


def write_block(source, target_ref, first, length):
    @pl.loop(0, jnp.clip(length, 0, source.shape[0]))
    def _(row):
        target_ref[first + row] = lax.dynamic_index_in_dim(source, row, keepdims=False)


STAND_INS = {
    "product": product,
    "add_product": add_product,
    "load_numbers": load_numbers,
    "zeros": zeros,
    "ranks": ranks,
    "opaque": opaque,
    "copy_listed_rows": copy_listed_rows,
    "copy_block": copy_block,
    "close_copies": close_copies,
    "write_rows": write_rows,
    "write_numbers": write_rows,
    "write_block": write_block,
}


# Few programs, so that each has several tiles and blocks; little memory, so that heads have several chunks.
SMALL = MosaicConfig(num_programs=2, chunk_bytes=20000)
BY_XLA = MosaicConfig(num_programs=2, gather_in_kernel=False)
ONE_PROGRAM = MosaicConfig(num_programs=1)
THREE_SLOTS = MosaicConfig(num_programs=1, query_slots=3)

# Between them: blocks cut in two and in three, blocks of one and of two warpgroups, both widths of a row, both gathers;
# 3, 4, 1 and 7 query heads per key/value head. "grouped_ragged" has four chunks, the last one shorter. In "many_tiles"
# each of the three parts of the block has three tiles, the last one not full, and one program has them all.
CASES = (
    Case("grouped_ragged", 1, 43, 150, heads=3, kv_heads=1, head_dim=20, block_size=140, dtype="bfloat16", scale=0.7),
    Case("mixed_segments", queries=18, keys=45, heads=8, block_size=4, top_k=3, sequences="mixed", dtype="float16"),
    Case("by_xla", 3, 29, 150, head_dim=80, block_size=100, is_causal=False, sequences="lengths", dtype="float16"),
    Case("many_tiles", 1, 45, 300, heads=7, kv_heads=1, block_size=300, top_k=9, is_causal=False, dtype="bfloat16"),
)


def backend(case):
    config = {"by_xla": BY_XLA, "mutant": ONE_PROGRAM, "many_tiles": THREE_SLOTS}.get(case.name, SMALL)
    return MosaicKernels(config, interpret=not ON_GPU and plgpu.InterpretGPUParams(detect_races=True))


def replace_products_and_copies(patch, *modules):
    for module in modules:
        for name, stand_in in STAND_INS.items():
            if hasattr(module, name):
                patch.setattr(module, name, stand_in)


@functools.cache
def actual(case):
    """As `expected`, from the kernels; a race is an error."""
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            replace_products_and_copies(patch, forward, backward)
        return attend.run(case, backend(case))


every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_outputs_and_log_sum_exp_are_those_of_the_oracle(case):
    attend.check_results(case, *actual(case)[:2])


@every_case
def test_gradients_are_those_of_the_oracle(case):
    attend.check_gradients(case, actual(case)[2])


@pytest.mark.skipif(ON_GPU, reason="races are seen by the interpreter alone")
def test_a_kernel_that_does_not_wait_for_a_free_slot_is_caught(monkeypatch):
    wait = "place - begin >= config.query_slots"
    source = inspect.getsource(forward)
    assert source.count(wait) == 1
    mutant = types.ModuleType("mutant")
    exec(source.replace(wait, "place < begin"), vars(mutant))
    replace_products_and_copies(monkeypatch, mutant, backward)
    monkeypatch.setattr(forward, "attend_forward", mutant.attend_forward)
    # One block of about four tiles: with several blocks the wait for a free block would hide the lack.
    case = Case("mutant", 1, 400, 8, kv_heads=1, top_k=1, is_causal=False, dtype="bfloat16")
    try:
        with pytest.raises(Exception, match="RACE DETECTED"):
            attend.run(case, backend(case))
    finally:
        interpret_pallas_call.reset_gpu_interpret_mode_state()


def test_what_the_kernels_cannot_do_is_said():
    for dtype, head_dim, reason in (("float32", 64, "float32"), ("bfloat16", 129, "head_dim=129")):
        array = jnp.zeros((1, 1, 1, head_dim), dtype)
        blocks = whole_rows(array, array, block_size=16, is_causal=True)
        with pytest.raises(NotImplementedError, match=reason):
            forward.attend_forward((array,) * 3, jnp.zeros((1, 1, 1, 1), jnp.int32), blocks, scale=1.0)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (32, 128), (128, 128)])
def test_threads_move_every_piece_to_where_wgmma_reads_it(monkeypatch, rows, columns):
    """The arithmetic of the lane code, done with integers, against a layout written down by bytes."""
    integers = {"addi": "add", "muli": "mul", "divui": "floordiv", "remui": "mod", "xori": "xor"}
    operations = types.SimpleNamespace(**{name: getattr(operator, function) for name, function in integers.items()})
    monkeypatch.setattr(tiles, "arith", operations)
    monkeypatch.setattr(tiles, "_int", int)
    places = np.full((rows, columns * 2 // 16), -1)
    for lane in range(128):
        monkeypatch.setattr(tiles, "_lane", lambda lane=lane: lane)
        for piece in tiles._pieces(rows, columns):
            assert places[piece.row, piece.number] == -1
            places[piece.row, piece.number] = piece.in_tile
    boxes = np.arange(rows * columns * 2).reshape(rows // 8, columns // 64, 8, 128)  # of 8 rows of 128 bytes
    unswizzled = boxes.transpose(0, 2, 1, 3).reshape(rows, columns * 2)[:, ::16]
    np.testing.assert_array_equal(places, unswizzled ^ (unswizzled >> 7 & 7) << 4)  # the hardware's 128-byte mode


def test_programs_have_equal_work():
    work, is_listed = jnp.array([2, 0, 1, 1, 2]), jnp.array([True, False, True, True, True])
    order, bounds = tiles.balance(work, is_listed, 3)
    np.testing.assert_array_equal(order[:4], [0, 2, 3, 4])
    np.testing.assert_array_equal(bounds, [0, 1, 3, 4])


@pytest.mark.parametrize(
    ("sizes", "name"),
    [({"query_slots": 1}, "query_slots=1"), ({"memory_registers": 25}, "=25"), ({"compute_registers": 240}, "at most")],
)
def test_wrong_sizes_are_named(sizes, name):
    with pytest.raises(ValueError, match=name):
        MosaicConfig(**sizes)
