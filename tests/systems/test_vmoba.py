"""VMoBA against loops over pairs in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.grammar import order
from sparse_attn.systems.vmoba import VMoBA
from tests import near_ties, oracle
from tests.cases import assert_close
from tests.systems.check_vmoba import Packed

GRID, BOX, SIZE = (2, 4, 8), (2, 4), 16  # four boxes of 16 tokens
SHAPES = {"grid_shape": GRID, "box_shape": BOX}


def draw(dtype=np.float32, heads=4, kv_heads=2, batch=2, tokens=64, seed=0):
    """Exact scores, many of which tie."""
    random = np.random.default_rng(seed)
    query = near_ties.eighths(random.standard_normal((batch, tokens, heads, 8))).astype(dtype)
    return query, *near_ties.eighths(random.standard_normal((2, batch, tokens, kv_heads, 8))).astype(dtype)


def boxes_by_loops(grid, box):
    """Original index of the token at each place, box by box."""
    frames, height, width = grid
    full = (frames, *box) if len(box) == 2 else box
    places = []
    for corner in itertools.product(*(range(0, size, step) for size, step in zip(grid, full, strict=True))):
        for t, y, x in itertools.product(*(range(c, c + s) for c, s in zip(corner, full, strict=True))):
            places.append((t * height + y) * width + x)
    return np.array(places)


def choose_by_loops(query, key, token_order, size, scope, threshold=None, top_k=None):
    """bool [batch, heads, tokens, boxes]: pairs of a scope taken one by one, own boxes first; and which are decided."""
    batch, tokens, heads, _ = query.shape
    query, key = query.astype(np.float64), key.astype(np.float64)[:, token_order]
    blocks = range(-(-tokens // size))
    own_block = {int(token): place // size for place, token in enumerate(token_order)}
    chosen, decided = np.zeros((2, batch, heads, tokens, len(blocks)), bool)
    for b in range(batch):
        scopes = {}  # name of the scope -> [(score, own, pair)]
        for h, t, j in itertools.product(range(heads), range(tokens), blocks):
            mean = key[b, j * size : (j + 1) * size, h // (heads // key.shape[2])].mean(0)
            name = {"query": (h, t), "block": j, "head": h, "all": 0}[scope]
            scopes.setdefault(name, []).append((query[b, t, h] @ mean, own_block[t] == j, (h, t, j)))
        for pairs in scopes.values():
            low, high = min(pairs)[0], max(pairs)[0]
            pairs.sort(key=lambda pair: (-pair[1], -pair[0], pair[2][0], pair[2][2], pair[2][1]))  # ties: box by box
            total = sum((score - low) / (high - low) for score, _, _ in pairs)
            num_queries = len({pair[2][:2] for pair in pairs})
            mass, others = 0.0, 0
            error = 2 * (len(pairs) + 2) * near_ties.UNIT * total  # of sums of shares, each rounded twice itself
            for place, (score, is_own, pair) in enumerate(pairs):
                if top_k is not None:
                    is_kept = place < top_k * num_queries
                    decided[(b, *pair)] = True
                else:
                    is_kept = is_own or others == 0 or mass < threshold * total
                    others += not is_own
                    decided[(b, *pair)] = is_own or others == 1 or abs(mass - threshold * total) > error
                mass += (score - low) / (high - low)
                chosen[(b, *pair)] = is_kept
    return chosen, near_ties.most(decided)


@pytest.mark.parametrize("box", [(4, 4), (2, 2), (1, 2, 4), (2, 4, 8)], ids=str)
def test_boxes_equal_loops(box):
    token_order, size = order.boxes(GRID, box)
    np.testing.assert_array_equal(token_order, boxes_by_loops(GRID, box))
    assert size == np.prod(box if len(box) == 3 else (GRID[0], *box))
    np.testing.assert_array_equal(order.inverse(token_order)[token_order], np.arange(64))


def test_slabs_of_time_may_have_parts_of_frames():
    token_order, size = order.boxes((5, 3, 2), (1.5,))
    assert size == 9
    np.testing.assert_array_equal(token_order, np.arange(30))


RULES = [(scope, {"threshold": 0.4}) for scope in ("query", "block", "head", "all")] + [
    (scope, {"top_k": 2}) for scope in ("query", "head", "all")
]


@pytest.mark.parametrize(("scope", "budget"), RULES, ids=str)
def test_choice_equals_loops(scope, budget, strict_ranks):
    query, key, _ = draw()
    levels = jax.jit(VMoBA(**SHAPES, scope=scope, **budget).select)(query, key)
    expected, decided = choose_by_loops(query, key, boxes_by_loops(GRID, BOX), SIZE, scope, **budget)
    np.testing.assert_array_equal(levels.to_mask()[decided], expected[decided])
    np.testing.assert_array_equal(levels.key_order, np.broadcast_to(boxes_by_loops(GRID, BOX), (2, 4, 64)))


def test_at_least_one_pair_is_kept_beside_the_own_boxes():
    query, key, _ = draw()
    select = jax.jit(VMoBA(**SHAPES, threshold=0.0).select)
    assert (select(query, key).to_mask().sum((2, 3)) == 64 + 1).all()
    one_box = jax.jit(VMoBA(grid_shape=GRID, box_shape=GRID).select)
    assert one_box(query, key).to_mask().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_equals_a_dense_softmax(dtype, strict_ranks):
    query, key, value = draw(jnp.dtype(dtype), tokens=20)
    shapes = {"grid_shape": (5, 2, 2), "box_shape": (2,)}  # boxes of 8, the last of 4
    chosen, decided = choose_by_loops(query, key, np.arange(20), 8, "head", threshold=0.25)
    assert decided.all()
    output = jax.jit(VMoBA(**shapes, scale=0.5))(query, key, value)
    mask = chosen.repeat(8, axis=-1)[..., :20]
    assert output.dtype == dtype
    assert_close(output, oracle.attention(query, key, value, mask, scale=0.5), dtype)


def test_output_and_gradients_equal_float64_in_the_order_of_boxes():
    query, key, value = draw()
    d_output = np.random.default_rng(1).standard_normal(query.shape).astype(np.float32)

    @jax.jit
    def run(query, key, value, d_output):
        output, pull_back = jax.vjp(VMoBA(**SHAPES), query, key, value)
        return output, pull_back(d_output)

    output, actual = run(query, key, value, d_output)
    token_order = boxes_by_loops(GRID, BOX)
    chosen, decided = choose_by_loops(query, key, token_order, SIZE, "head", threshold=0.25)
    assert decided.all()
    mask = chosen[..., np.argsort(token_order) // SIZE]  # [batch, heads, queries, keys]
    expected, gradients = oracle.attention(query, key, value, mask, d_output=d_output)
    assert_close(output, expected, "float32")
    for one, other in zip(actual, gradients, strict=True):
        assert_close(one, other, "float32")


def test_rows_do_not_meet_unless_packed():
    query, key, _ = draw()
    louder = query * np.array([1, 9], np.float32).reshape(2, 1, 1, 1)
    options = {"grid_shape": GRID, "box_shape": (1, 2, 4), "threshold": 0.6}
    for system in (VMoBA, Packed):
        select = jax.jit(system(**options).select)
        is_same = (select(louder, key).levels[0] == select(query, key).levels[0]).all()
        assert is_same == (system is VMoBA)


def test_bad_arguments_are_named():
    query, key, value = draw()
    for options, name in (
        ({"box_shape": (3, 3)}, "box_shape"),
        ({"box_shape": (0.01,)}, "box_shape"),
        ({"box_shape": (1, 1, 1, 1)}, "box_shape"),
        ({"scope": "row"}, "scope"),
        ({"threshold": 1.5}, "threshold"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 1, "scope": "block"}, "top_k"),
    ):
        with pytest.raises(ValueError, match=name):
            VMoBA(**{**SHAPES, **options})
    with pytest.raises(ValueError, match="grid_shape"):
        VMoBA(grid_shape=(2, 4, 7), box_shape=(1,))(query, key, value)
    with pytest.raises(ValueError, match="grid_shape"):
        order.boxes((0, 1, 1), (1, 1))
    with pytest.raises(ValueError, match="as many tokens as query"):
        VMoBA(**SHAPES).select(query[:, :32], key)
