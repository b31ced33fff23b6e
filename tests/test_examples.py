"""Every example runs at a small size and does what it shows."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# How each is called, and what its result must be.
SMALL = {
    "function": ({"tokens": 256, "block_size": 16}, lambda result: result is None),
    "language_model": ({"steps": 12, "length": 64}, lambda losses: losses[1] < losses[0]),
    "linen_model": ({"tokens": 64}, lambda output: output.shape == (2, 64, 64)),
    "mesh_scan_remat": ({"steps": 3}, lambda losses: losses[-1] < losses[0]),
    "trained_parts": ({"steps": 20, "tokens": 64}, lambda losses: all(last < first for first, last in losses.values())),
    "video_transformer": ({"steps": 20, "grid": (2, 4, 4)}, lambda errors: errors[1] < errors[0]),
}


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_an_example_does_what_it_shows(name, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    options, is_right = SMALL[name]
    assert is_right(importlib.import_module(name).main(**options))


def test_examples_are_short():
    assert all(len(path.read_text().splitlines()) < 80 for path in EXAMPLES.glob("*.py"))
