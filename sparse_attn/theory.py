"""The statistical model of block routing: when does the mean of a block's keys reveal the key that matters?

A query has unit norm and keys have variance 1 / head_dim in every channel, so that the product of a query with an
unrelated key is normal with mean 0 and variance 1 / head_dim. One block is relevant: `num_related` of its keys are
related to the query. Products are pure numbers, gaps are differences of mean products, sizes are counted in tokens.

Source: FlashMoBA (arXiv 2511.11571), the section on the statistical model; derived in docs/maths.md. All functions work
on arrays, broadcast, and run under jit.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betainc
from jax.scipy.stats import norm
from jax.typing import ArrayLike

# The trapezoidal rule over a normal density; the step that a binomial cuts out of it is many points wide.
_QUADRATURE = np.linspace(-8.0, 8.0, 512)


def effective_gap(delta_mu: ArrayLike, num_related: ArrayLike, cluster_gap: ArrayLike) -> jax.Array:
    """How far the summed products of the relevant block stand out: dmu_eff = dmu + (m - 1) (mu_cluster - mu_noise).

    Args:
      delta_mu: mean product of the query with the key it looks for, less that with an unrelated key.
      num_related: related keys in the block, that one included (m).
      cluster_gap: mean product with each of the other related keys, less that with an unrelated key.
    """
    return jnp.asarray(delta_mu) + (jnp.asarray(num_related) - 1) * cluster_gap


def snr(head_dim: ArrayLike, block_size: ArrayLike, gap: ArrayLike) -> jax.Array:
    """Mean of the score difference D between the relevant and an irrelevant block over its standard deviation.

    E[D] = dmu_eff / B and Var[D] = 2 / (d B), so SNR = dmu_eff sqrt(d / (2 B)).

    Args:
      head_dim: channels of a head (d).
      block_size: keys in a block (B).
      gap: the effective gap dmu_eff.
    """
    return jnp.asarray(gap) * jnp.sqrt(jnp.asarray(head_dim) / (2.0 * jnp.asarray(block_size)))


def failure_probability(snr: ArrayLike) -> jax.Array:
    """Probability that one irrelevant block beats the relevant one: Phi(-SNR)."""
    return norm.cdf(-jnp.asarray(snr))


def recall_at_k(snr: ArrayLike, num_blocks: ArrayLike, top_k: ArrayLike) -> jax.Array:
    """Probability that the relevant block is among the top_k of num_blocks by score.

    Given the standardised score z ~ N(sqrt(2) SNR, 1) of the relevant block, each of the others beats it independently
    with probability Phi(-z), so recall = E_z[P(Binomial(num_blocks - 1, Phi(-z)) <= top_k - 1)], by quadrature
    to about 1e-4 in float32.

    Args:
      snr: signal-to-noise ratio of one comparison.
      num_blocks: candidates, the relevant one included (n).
      top_k: blocks chosen among them (k); 0 gives 0, num_blocks or more gives 1.
    """
    weights = np.exp(-np.square(_QUADRATURE) / 2)
    snr, num_blocks, top_k = (jnp.asarray(array)[..., None] for array in (snr, num_blocks, top_k))
    beaten_by = norm.cdf(-(np.sqrt(2) * snr + _QUADRATURE))  # [..., points]
    others = num_blocks - 1.0
    # P(Binomial(n, p) <= k - 1) = I_{1 - p}(n - k + 1, k), for 1 <= k <= n.
    chosen = jnp.clip(top_k, 1.0, jnp.maximum(others, 1.0))
    found = betainc(others - chosen + 1.0, chosen, 1.0 - beaten_by)
    recall = (found * (weights / weights.sum())).sum(-1)
    top_k, num_blocks = top_k[..., 0], num_blocks[..., 0]
    return jnp.where(top_k >= num_blocks, 1.0, jnp.where(top_k < 1, 0.0, recall))


def block_size_for_snr(head_dim: ArrayLike, gap: ArrayLike, target_snr: ArrayLike) -> jax.Array:
    """Largest block size (a real number, tokens) whose SNR reaches the target: B = d dmu_eff^2 / (2 SNR^2)."""
    return jnp.asarray(head_dim) * jnp.square(gap) / (2.0 * jnp.square(target_snr))
