"""Settings of every test: CPU unless JAX_PLATFORMS says otherwise, and programs compiled fast, not well.

Compiling takes most of the suite's time, the more so the better XLA optimises. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests
programs as a user gets them.

The warpgroups of an interpreted Mosaic GPU kernel are threads that block one another at barriers. XLA takes a thread
for each core, and two are too few for three warpgroups: hence NPROC.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("NPROC", "16")

import hypothesis
import pytest

# Compilation falls on whichever example comes first, hence no deadline; fixed seeds, so that a failure comes back.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("suite")


# The longest come first, so that no worker is left alone with one of them.
LONGEST = (
    "test_sharding.py",
    "test_parallel.py",
    "test_train_step.py",
    "test_compile_key_major.py",
    "test_studies.py",
    "test_attention.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def strict_ranks():
    """Rank promotion is an error: a user who forbids it can still call the library."""
    import jax

    with jax.numpy_rank_promotion("raise"):
        yield
