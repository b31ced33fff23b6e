"""Settings of every test: CPU unless JAX_PLATFORMS says otherwise."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import pytest

# Compilation falls on whichever example comes first, hence no deadline; fixed seeds, so that a failure comes back.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def strict_ranks():
    """Rank promotion is an error: a user who forbids it can still call the library."""
    import jax

    with jax.numpy_rank_promotion("raise"):
        yield
