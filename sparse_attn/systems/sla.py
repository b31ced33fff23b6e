"""SLA: exact attention to the best key blocks plus linear attention, joined by a learned projection."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sparse_attn.checks import check_one_of, check_positive, check_share
from sparse_attn.grammar import choose, score
from sparse_attn.grammar.describe import block_mean, split_blocks
from sparse_attn.selection import LevelMap
from sparse_attn.sharding import splits_over_mesh
from sparse_attn.systems.system import System, by_sequence

FeatureMap = Literal["softmax", "elu", "relu"]
LinearKeys = Literal["all", "marginal"]
_FEATURES = {"softmax": jax.nn.softmax, "elu": lambda x: jax.nn.elu(x) + 1, "relu": jax.nn.relu}


def score_blocks(query: jax.Array, key: jax.Array, *, query_block_size: int, key_block_size: int) -> jax.Array:
    """mean(q) mean(k - mean of all keys), unscaled: float32 `[batch, heads, query_blocks, key_blocks]`."""
    key = key.astype(jnp.promote_types(key.dtype, jnp.float32))
    centred = key - key.mean(1, keepdims=True)
    return score.dot(block_mean(query, query_block_size), block_mean(centred, key_block_size))


def linear_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, levels: LevelMap | None, *, feature_map: FeatureMap
) -> jax.Array:
    """o_l over the blocks of level 2, or over all keys for None: float32 `[batch, tokens, heads, head_dim]`.

    Zero for a query whose features have nothing in common with those of any key. Args: those of `SLA`.
    """
    batch, num_tokens, kv_heads, _ = key.shape
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    query_features, key_features = (_FEATURES[feature_map](array.astype(dtype)) for array in (query, key))
    # A last feature of 1 makes z the last column of H.
    value = jnp.concatenate([value.astype(dtype), jnp.ones((batch, num_tokens, kv_heads, 1), dtype)], axis=-1)
    # Axes: b, k, g, t, s, i, j, d as in the grammar, t and s inside blocks where there are any; e features of H.
    grouped = query_features.reshape(batch, num_tokens, kv_heads, -1, query.shape[-1])
    if levels is None:
        state = jnp.einsum("bskd,bske->bkde", key_features, value, precision="highest")
        joint = jnp.einsum("btkgd,bkde->btkge", grouped, state, precision="highest")
        mass = joint[..., -1:] + 1e-5
    else:
        blocks = (split_blocks(array, levels.key_block_size) for array in (key_features, value))
        states = jnp.einsum("bjskd,bjske->bkjde", *blocks, precision="highest")
        used = (levels.levels == 2).reshape(batch, kv_heads, -1, *levels.levels.shape[-2:]).astype(dtype)
        state = jnp.einsum("bkgij,bkjde->bkgide", used, states, precision="highest")
        grouped = split_blocks(grouped, levels.query_block_size)
        joint = jnp.einsum("bitkgd,bkgide->bitkge", grouped, state, precision="highest")
        joint = joint.reshape(batch, -1, *joint.shape[3:])[:, :num_tokens]
        mass = joint[..., -1:]
    return jnp.where(mass > 0, joint[..., :-1] / jnp.where(mass > 0, mass, 1), 0).reshape(query.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLA(System):
    """SLA: exact attention to the best key blocks plus linear attention, joined by a learned projection.

    Paper: SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention (arXiv 2509.24006).
    Bidirectional; a pretrained model is fine-tuned with it. Query blocks score key blocks by the dot product of their
    means, with the keys centred. A share of the key blocks is critical and gets softmax attention o_s. Linear attention
    o_l = phi(q) H / (phi(q) z), with H = sum phi(k)^T v and z = sum phi(k)^T, has a normaliser of its own; the output
    is o_s + o_l projection + bias. Both parameters start at zero, where the output is o_s.

    The defaults are those of the authors' readme.

    Where code and paper disagree: in the paper the critical blocks are 5 % of a row, the last 10 % are negligible and
    dropped, and o_l runs over the marginal blocks in between. No branch of the code (thu-ml/SLA) drops any: in SLA-1
    (at 325cc75) o_l runs over all blocks that are not critical, in main (at d973e55) over all keys, with 1e-5 added to
    phi(q) z. Main is the default; linear_keys="marginal" gives SLA-1, and with density=0.05 and negligible=0.1 the
    paper. The paper does not say how shares are rounded; they are rounded down, as the code rounds density. The paper
    ranks by the softmax of q k / sqrt(d) of plain means, the code by q k of centred ones, which is the same order. As
    in the code the critical blocks may be none: o_s is then zero (the code divides by zero).

    Attributes:
      density: share of the key blocks that is critical, between 0 and 1, rounded down.
      negligible: share at the end of the ranking that the linear part leaves out; needs linear_keys="marginal".
      linear_keys: keys of the linear part, "all" or those of the "marginal" blocks.
      feature_map: phi: "softmax" over features, "elu" (plus 1) or "relu".
      query_block_size: tokens in a block of queries; the last may be shorter.
      key_block_size: tokens in a block of keys; the last may be shorter.
    """

    density: float = 0.2
    negligible: float = 0.0
    linear_keys: LinearKeys = "all"
    feature_map: FeatureMap = "softmax"
    query_block_size: int = 64
    key_block_size: int = 64

    paper = "2509.24006"
    is_causal = False
    is_trainable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("density", self.density)
        check_share("negligible", self.negligible)
        check_one_of("linear_keys", self.linear_keys, get_args(LinearKeys))
        check_one_of("feature_map", self.feature_map, get_args(FeatureMap))
        check_positive("query_block_size", self.query_block_size)
        check_positive("key_block_size", self.key_block_size)
        if self.negligible and self.linear_keys == "all":
            negligible = self.negligible
            raise ValueError(f"negligible must be 0 with linear_keys='all', which leaves none out, got {negligible=}")

    def _select(self, query: jax.Array, key: jax.Array) -> LevelMap:
        """The class of every pair of blocks: 1 critical, 2 marginal, 0 negligible."""
        query_block_size, key_block_size = self.query_block_size, self.key_block_size
        scores = score_blocks(query, key, query_block_size=query_block_size, key_block_size=key_block_size)
        num_blocks, place = scores.shape[-1], choose.rank(scores)
        levels = jnp.where(place < num_blocks - int(self.negligible * num_blocks), 2, 0)
        levels = jnp.where(place < int(self.density * num_blocks), 1, levels)
        return LevelMap(levels.astype(jnp.int8), query_block_size, key_block_size)

    def __call__(  # type: ignore[override]
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        projection: jax.Array,
        bias: jax.Array,
        *,
        segment_ids: ArrayLike | None = None,
        seq_lengths: ArrayLike | None = None,
    ) -> jax.Array:
        """o_s + o_l projection + bias: softmax attention to the critical blocks and projected linear attention.

        Args, besides those of `System`, which also says what is returned and raised:
          projection: `[head_dim, head_dim]`, from o_l to the output, for all heads.
          bias: `[head_dim]`.
        """

        def call(_: slice, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return self._call(query, key, value, projection, bias)

        return by_sequence(call, (query, key, value), segment_ids, seq_lengths)

    @splits_over_mesh(projection="", bias="")
    def _call(  # type: ignore[override]
        self, query: jax.Array, key: jax.Array, value: jax.Array, projection: jax.Array, bias: jax.Array
    ) -> jax.Array:
        query, key, value = self._checked(query, key, value)
        for name, array, shape in (("projection", projection, query.shape[-1:] * 2), ("bias", bias, query.shape[-1:])):
            if array.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {name}.shape={array.shape}")
        levels = self._select(*jax.lax.stop_gradient((query, key)))
        exact = self._attend(query, key, value, levels).output()
        linear_levels = levels if self.linear_keys == "marginal" else None
        linear = linear_attention(query, key, value, linear_levels, feature_map=self.feature_map)
        projected = jnp.einsum("bthd,de->bthe", linear, projection.astype(linear.dtype), precision="highest")
        return (exact + projected + bias.astype(linear.dtype)[None, None, None]).astype(query.dtype)
