"""Which choices no rounding of float32 can change.

Tests compare choices with float64 loops. Programs that add in other orders part where scores nearly tie, so a choice
counts only if no error within the bounds below could change it. Exact scores have the bound 0: there even ties count.

Bounds are to first order in the unit roundoff, and for the worst case: what happens is far below them.
"""

import numpy as np

UNIT = 2.0**-24  # a float32 operation errs by at most this share of its result
TINY = 2.0**-126  # smaller results may be taken for 0
EXP = 4  # such units that exp may err by; XLA's errs by less than 2


def eighths(numbers):
    """The nearest multiples of 1/8: scores from their products, and their means over powers of two, are exact."""
    return np.round(8 * numbers) / 8


def dot_error(one, other, magnitude, roundings):
    """How far a float32 product of two vectors, or of two means of vectors, may lie from the true one.

    Every rounding errs by at most UNIT of a partial sum, which is at most the magnitude, in any order of adding. Sums
    of multiples of 2^-12 of magnitude at most 2^12 have 24 bits: they are exact.

    Args:
      one, other: factors, or means of factors, float64 `[..., head_dim]`.
      magnitude: `[...]`, the product of their absolute values, or of the means of absolute values.
      roundings: on the longest way from a number to the score: about the terms of the means and of the product.
    """
    one, other = np.broadcast_arrays(one, other)
    is_exact = magnitude <= 2**12
    for array, bits in ((one, 9), (other, 9), (one * other, 12)):
        is_exact = is_exact & (array * 2**bits % 1 == 0).all(-1)
    return np.where(is_exact, 0.0, roundings * UNIT * magnitude)


def softmax(logits, error):
    """Softmax along the last axis, float64, and how far a float32 one may lie from it.

    exp(x - max) has the relative error of x, of rounding the difference, and of exp; the sum, the weighted mean of
    those and of its roundings. The maximum is the same number above and below, so that its own error cancels.

    Args:
      logits: float64 `[..., n]`; -inf for what is left out.
      error: how far float32 logits may lie from them; broadcasts to them.
    """
    distance = np.where(np.isneginf(logits), 0.0, logits.max(-1, keepdims=True) - logits)
    weight = np.where(np.isneginf(logits), 0.0, np.exp(-distance))
    weight /= weight.sum(-1, keepdims=True)
    relative = error + UNIT * (distance + EXP)
    of_sum = (weight * relative).sum(-1, keepdims=True) + UNIT * (logits.shape[-1] + 1)
    return weight, weight * (relative + of_sum) + TINY * (weight > 0)


def is_decided(scores, error, kept):
    """Whether all that is kept stands above all that is not, whatever the errors: bool `[...]`.

    Args:
      scores: float64 `[..., n]`; -inf cannot be kept, inf always is.
      error: how far float32 scores may lie from them; broadcasts to them.
      kept: bool `[..., n]`.
    """
    lowest = np.where(kept, scores - error, np.inf).min(-1, initial=np.inf)
    return lowest >= np.where(kept, -np.inf, scores + error).max(-1, initial=-np.inf)


def is_prefix_decided(mass, error, kept, share, first=False):
    """`is_decided` for the shortest prefix, by falling mass, that reaches a share of the sum of mass.

    The sum with the last one kept must be above the line, and the sum without it below, whatever the errors.

    Args:
      mass, error, kept: scores of `is_decided`, not negative.
      share: of the sum; broadcasts to `[...]`.
      first: bool, broadcasts to mass: kept before all others.
    """
    first = np.broadcast_to(first, mass.shape)
    others = kept & ~first
    last = np.where(others, mass, np.inf).min(-1, initial=np.inf)
    has_others = others.any(-1)
    reached = np.where(kept, mass, 0).sum(-1) - share * mass.sum(-1)
    before = reached - np.where(has_others, last, 0)
    slack = np.broadcast_to(error, mass.shape).sum(-1) + 2 * mass.shape[-1] * UNIT * mass.sum(-1)
    ends = (reached >= slack) | (kept | (mass == 0)).all(-1)
    return is_decided(np.where(first, np.inf, mass), error, kept | first) & ends & (~has_others | (before <= -slack))


def most(decided, least=0.9):
    """The array itself; says how many rows are left out, and fails where fewer than the share `least` are decided."""
    decided = np.asarray(decided)
    print(f"left out {(~decided).sum()} of {decided.size} rows, nearer to a tie than float32 tells apart")
    assert decided.mean() >= least, "too many near ties: draw other numbers"
    return decided
