"""The statistical model against direct integration and against drawing it."""

import jax
import numpy as np
import pytest
from scipy import integrate, stats

from sparse_attn import theory


def integrated_recall(snr: float, num_blocks: int, top_k: int) -> float:
    """The integral of docs/maths.md, in float64, with SciPy's binomial."""

    def density(z: float) -> float:
        return stats.norm.pdf(z - np.sqrt(2) * snr) * stats.binom.cdf(top_k - 1, num_blocks - 1, stats.norm.cdf(-z))

    return integrate.quad(density, -12, 16, limit=400)[0]


@pytest.mark.parametrize("snr", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize(("num_blocks", "top_k"), [(2, 1), (8, 2), (64, 8), (512, 16), (4096, 16)])
def test_recall_is_the_integral(snr, num_blocks, top_k):
    recall = theory.recall_at_k(snr, num_blocks, top_k)
    np.testing.assert_allclose(recall, integrated_recall(snr, num_blocks, top_k), atol=2e-4)


def test_recall_is_what_drawing_scores_gives():
    rng, snr, num_blocks, top_k, draws = np.random.default_rng(0), 0.8, 20, 3, 200_000
    relevant = np.sqrt(2) * snr + rng.normal(size=draws)
    better = (rng.normal(size=(draws, num_blocks - 1)) > relevant[:, None]).sum(1)
    share = (better < top_k).mean()
    np.testing.assert_allclose(theory.recall_at_k(snr, num_blocks, top_k), share, atol=5 * np.sqrt(0.25 / draws))


def test_recall_at_its_ends_and_under_jit():
    recall = jax.jit(theory.recall_at_k)(np.array([1.0, 1.0, 1.0]), np.array([4, 4, 1]), np.array([4, 0, 1]))
    np.testing.assert_array_equal(recall, [1.0, 0.0, 1.0])


def test_one_against_one_is_the_failure_probability():
    snr = np.array([0.0, 0.7, 2.0])
    np.testing.assert_allclose(theory.recall_at_k(snr, 2, 1), 1 - theory.failure_probability(snr), atol=1e-5)
    np.testing.assert_allclose(theory.failure_probability(snr), stats.norm.cdf(-snr), atol=1e-6)


def test_snr_is_that_of_drawn_blocks():
    rng, head_dim, block_size, related = np.random.default_rng(1), 32, 16, 3
    draws = 20_000
    gap = theory.effective_gap(0.9, related, 0.4)
    np.testing.assert_allclose(gap, 0.9 + 2 * 0.4, rtol=1e-6)
    # Products with a unit query are one coordinate of the keys.
    products = rng.normal(scale=head_dim**-0.5, size=(2, draws, block_size))
    products[0, :, 0] += 0.9
    products[0, :, 1:related] += 0.4
    difference = products[0].mean(1) - products[1].mean(1)
    measured = difference.mean() / difference.std()
    np.testing.assert_allclose(theory.snr(head_dim, block_size, gap), measured, rtol=5 / np.sqrt(draws))


def test_block_size_for_snr_inverts_snr():
    block_size = theory.block_size_for_snr(64, 1.5, np.array([0.5, 2.0]))
    np.testing.assert_allclose(theory.snr(64, block_size, 1.5), [0.5, 2.0], rtol=1e-6)
