"""The table of measured sizes, and the loop that fills it."""

import json

import jax
import pytest

from pallas_kernels.config import TRITON, TritonConfig
from pallas_kernels.gpu import tuner, tuning
from pallas_kernels.gpu.calls import make_calls
from pallas_kernels.gpu.roofline import Problem

pytestmark = pytest.mark.timeout(120)

ENTRY = {
    **{"device": "NVIDIA H200", "head_dim": 64, "block_size": 128, "top_k": 8, "sequence": 65536},
    **{"config": {"tile_size": 64}, "date": "2026-01-01", "jax": "0.12.0"},
    **{"milliseconds": {"forward": 1.0}, "default_milliseconds": {"forward": 2.0}},
}


@pytest.fixture
def table(tmp_path):
    """Makes a table of the entries given."""

    def write(*entries):
        path = tmp_path / "tuning.json"
        path.write_text(json.dumps({"about": "", "entries": entries}))
        return path

    return write


def test_the_table_in_the_repository_can_be_read():
    assert all(isinstance(sizes, TritonConfig) for sizes in tuning.read_sizes(tuning.TABLE).values())


def test_kernels_take_the_entry_of_their_device_and_problem_and_else_the_defaults(table, monkeypatch):
    here = jax.devices()[0].device_kind
    monkeypatch.setattr(tuning, "TABLE", table(ENTRY, ENTRY | {"device": here, "config": {"tile_size": 32}}))
    assert tuning.tuned(64, 128, 8) == TritonConfig(tile_size=32)
    assert tuning.tuned(64, 128, 9) == tuning.tuned(65, 128, 8) == tuning.tuned(64, 64, 8) == TRITON


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([ENTRY | {"colour": 1}], "colour"),
        ([{name: value for name, value in ENTRY.items() if name != "date"}], "date"),
        ([ENTRY, ENTRY], "two entries"),
        ([ENTRY | {"config": {"tile_size": 100}}], "tile_size=100"),
        ([ENTRY | {"config": {"tyle_size": 64}}], "tyle_size"),
    ],
)
def test_bad_entries_are_named(table, entries, reason):
    with pytest.raises(ValueError, match=reason):
        tuning.read_sizes(table(*entries))


def test_an_entry_replaces_the_older_one_for_its_problem(table):
    path = table(ENTRY, ENTRY | {"head_dim": 128})
    sizes = TritonConfig(key_size=32)
    tuning.write_entry(path, tuning.make_entry(sizes, **{name: ENTRY[name] for name in ENTRY if name != "config"}))
    assert tuning.read_sizes(path) == {
        ("NVIDIA H200", 64, 128, 8): sizes,
        ("NVIDIA H200", 128, 128, 8): TritonConfig(tile_size=64),
    }


def test_the_tuner_takes_the_fastest_sizes_that_are_right():
    """Interpreted kernels and made-up times: 16 pairs a tile are fastest and wrong, 32 come next, 64 fail."""
    times = {16: 2.0, 32: 3.0, TRITON.tile_size: 5.0}
    tried = []

    def make(problem, config):
        if config.tile_size == 64:
            raise RuntimeError("out of shared memory")
        tried.append(config.tile_size)
        calls = make_calls(problem, config, interpret=True)

        def forward(arrays, indices):
            output, log_sum_exp = calls["forward"](arrays, indices)
            return (output + 1 if config.tile_size == 16 else output), log_sum_exp

        return calls | {"forward": forward}

    def seconds(*_):
        return times[tried[-1]]

    problem = Problem(sequence=48, block_size=16, top_k=2, head_dim=16, batch=1, heads=1)
    grid = (("forward", {"tile_size": (16, 32, 64)}),)
    found, found_times, default_times = tuner.tune(problem, seconds, grid, make)
    assert found == TritonConfig(tile_size=32)
    assert found_times == {"forward": 3000.0}
    assert default_times == {"forward": 5000.0}
