"""What the package exports, who imports whom, and which parts of JAX it stands on that may change."""

import ast
import graphlib
import inspect
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import pytest
from packaging.requirements import Requirement

import sparse_attn

ROOT = pathlib.Path(__file__).parent.parent

# What JAX promises nothing about: each is a reason for the upper bound on jax in pyproject.toml.
UNSTABLE = ("jax._src.", "jax.experimental.", "jax.extend.", "jax.interpreters.", "jaxlib.")
REASONS = {
    "sparse_attn": {
        "jax.experimental.custom_partitioning.custom_partitioning": "tells XLA that rows and heads are independent",
        "jax.extend.core.Primitive": "the transpose that is the sparse backward pass; the choice by platform",
        "jax.interpreters.ad": "its derivative and transpose",
        "jax.interpreters.batching": "its vmap",
        "jax.interpreters.mlir": "its lowering, and that of the choice among backends by platform",
    },
    "pallas_kernels": {
        "jax.experimental.pallas": "all kernels",
        "jax.experimental.pallas.tpu": "TPU kernels",
        "jax.experimental.pallas.triton": "GPU kernels",
        "jax.experimental.pallas.mosaic_gpu": "GPU kernels for Hopper",
        "jax.experimental.mosaic.gpu": "numbers in registers, inside instructions written by hand",
        "jax.experimental.mosaic.gpu.utils": "conditions and addresses there",
        "jaxlib.mlir.ir": "instructions written by hand",
        "jaxlib.mlir.dialects.arith": "instructions written by hand",
        "jaxlib.mlir.dialects.llvm": "instructions written by hand",
        "jaxlib.mlir.dialects.nvvm": "instructions written by hand",
    },
    "experiments": {
        "jax.experimental.pallas": "the report changes kernels to measure parts of them",
        "jax.experimental.pallas.tpu": "the report changes kernels to measure parts of them",
        "jax.experimental.multihost_utils": "processes of a run agree on what they do",
        "jax.experimental.topologies": "the report compiles for a TPU that is not there",
        "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel": "what the report compares with",
        "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask": "what the report compares with",
    },
}


def imports(path):
    """Names that a source file imports, wherever in the file, and dotted names that it uses."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def sources(room):
    return sorted((ROOT / room).rglob("*.py"))


def test_the_exports_are_the_public_names_and_nothing_else():
    public = {name for name, value in vars(sparse_attn).items() if name[0] != "_" and not inspect.ismodule(value)}
    modules = {"decode", "reference", "theory"}
    assert public == set(sparse_attn.__all__) - modules
    assert sparse_attn.__all__ == sorted(sparse_attn.__all__)
    promised = {"moba_attention", "route_moba", "block_sparse_attention", "BlockSelection", "reference"}
    assert promised <= set(sparse_attn.__all__)


@pytest.mark.parametrize("name", sparse_attn.__all__)
def test_every_public_name_exists_and_says_what_it_is(name):
    assert getattr(sparse_attn, name).__doc__


def test_importing_the_library_loads_neither_flax_nor_pallas_nor_starts_a_backend():
    code = """
import sys, sparse_attn
names = [name.split(".") for name in sys.modules]
loaded = [name for name in names if name[0] in ("flax", "optax", "chex") or "pallas" in name]
from jax._src import xla_bridge
print(loaded, xla_bridge.backends_are_initialized())
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] False"


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("pallas_kernels", ("sparse_attn", "experiments", "tests", "flax", "optax", "chex")),
        ("sparse_attn", ("experiments", "tests", "optax", "chex", "torch", "numpy.testing")),
    ],
)
def test_imports_run_one_way(room, forbidden):
    assert sources(room)
    for path in sources(room):
        for module in imports(path):
            assert not any(module == name or module.startswith(f"{name}.") for name in forbidden), f"{path}: {module}"


def test_no_imports_of_the_experiments_run_in_a_circle():
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources("experiments")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}

    def imported(path):
        """The modules among the names, and those that hold a name."""
        return {name if name in paths else name.rpartition(".")[0] for name in imports(path)} & paths.keys()

    graph = {name: imported(path) - {name} for name, path in paths.items()}
    assert sum(map(len, graph.values())) > len(graph)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


def test_flax_is_imported_under_sparse_attn_nn_alone():
    for path in sources("sparse_attn"):
        if "nn" not in path.relative_to(ROOT / "sparse_attn").parts:
            for module in imports(path):
                assert module.split(".")[0] != "flax", f"{path}: {module}"
                assert not module.startswith("sparse_attn.nn"), f"{path}: {module}"


@pytest.mark.parametrize("room", REASONS)
def test_the_unstable_parts_of_jax_that_are_used_are_known(room):
    used = {name for path in sources(room) for name in imports(path)}
    assert {name for name in used if f"{name}.".startswith(UNSTABLE)} == set(REASONS[room])


def test_jax_is_bounded_above_by_what_was_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {requirement.name: requirement.specifier for requirement in map(Requirement, project["dependencies"])}
    assert required["jax"].contains(jax.__version__)
    assert any(bound.operator == "<" for bound in required["jax"])


def test_the_changelog_begins_with_the_version():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == sparse_attn.__version__
