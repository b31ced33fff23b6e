"""Every system keeps the common face and has its card in docs/systems.md."""

import copy
import dataclasses
import pathlib
import pickle

import jax
import jax.numpy as jnp
import pytest

from sparse_attn.systems.__main__ import find_systems, make_page, split_docstring
from tests.every_system import NAMES, TOKENS, every_system, make_values

ROOT = pathlib.Path(__file__).parents[2]
SYSTEMS = {system.__module__.rpartition(".")[2]: system for system in find_systems()}
every_name = pytest.mark.parametrize("name", SYSTEMS)


def test_the_docs_page_is_printed_from_the_code():
    page = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
    assert page == make_page(), "run: python -m sparse_attn.systems > docs/systems.md"


def test_every_file_but_the_base_is_one_system_and_is_called_in_tests():
    files = {path.stem for path in (ROOT / "sparse_attn" / "systems").glob("*.py")}
    assert files - set(SYSTEMS) == {"__init__", "__main__", "system"}
    assert tuple(SYSTEMS) == NAMES


@every_name
def test_a_system_has_the_common_face_and_says_what_its_fields_are(name):
    system = SYSTEMS[name]
    assert callable(system.select)
    assert system.paper in system.__doc__
    fields = {field.name for field in dataclasses.fields(system)}
    assert "is_causal" in fields or isinstance(system.is_causal, bool)
    assert set(split_docstring(system)[1]) | {"scale", "implementation"} == fields | {"scale", "implementation"}


@every_name
def test_equal_systems_are_equal_hash_alike_and_pickle(name):
    value, other = (make_values(num_heads=4)[name] for _ in range(2))
    assert value is not other
    for equal in (other, pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
        assert equal == value
        assert hash(equal) == hash(value)
    assert dataclasses.replace(value, scale=0.5) != value
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.scale = 0.5


@every_name
def test_traced_segments_are_taken_or_refused_by_name(name):
    query, key, value = (jnp.ones((1, TOKENS, heads, 8)) for heads in (4, 2, 2))
    call = every_system(query, key)[name]
    ids = jnp.zeros((1, TOKENS), jnp.int32)

    def run(ids):
        return jax.eval_shape(lambda *arrays: call(*arrays[:3], segment_ids=arrays[3]), query, key, value, ids)

    if getattr(SYSTEMS[name], "traces_sequences", False):
        assert run(ids).shape == query.shape
    else:
        with pytest.raises(ValueError, match="segment_ids"):
            run(ids)
