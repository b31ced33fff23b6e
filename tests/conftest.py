"""Settings of every test: CPU unless JAX_PLATFORMS says otherwise, and programs compiled fast, not well.

Compiling takes most of the suite's time, the more so the better XLA optimises. Up to jax 0.10 there is a choice between
two generators of loops, and the older one takes half as long. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests programs as a user
gets them.

The warpgroups of an interpreted Mosaic GPU kernel are threads that block one another at barriers. XLA takes a thread
for each core, and two are too few for three warpgroups: hence NPROC.
"""

import importlib.metadata
import os

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")
IS_FAST = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"
if IS_FAST and importlib.metadata.version("jaxlib").startswith("0.10."):
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

# Compilation falls on whichever example comes first, hence no deadline; fixed seeds, so that a failure comes back.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("suite")


# The longest come first, so that no worker is left alone with one of them.
LONGEST = (
    "test_sharding.py",
    "test_parallel.py",
    "test_train_mesh.py",
    "test_train_step.py",
    "test_compile_per_query.py",
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
