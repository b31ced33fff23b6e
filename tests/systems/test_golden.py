"""Every system against outputs of its authors' own published code.

Takes every SYSTEM_*.npz of the folder named by the environment variable GOLDEN_DIR (by default shared/golden beside the
repository; skipped where there is none), and the few kept in tests/golden. The comparison for a system is the function
`check` of tests/systems/check_SYSTEM.py, which reads all settings from the file itself.
"""

import importlib
import os
import pathlib

import numpy as np
import pytest

TESTS = pathlib.Path(__file__).parents[1]
FOLDERS = (
    TESTS / "golden",
    pathlib.Path(os.environ.get("GOLDEN_DIR", TESTS.parent.parent / "shared" / "golden")),
)
FILES = {path.name: path for folder in FOLDERS for path in sorted(folder.glob("*.npz"))}


@pytest.mark.parametrize("path", FILES.values(), ids=lambda path: path.stem)
def test_agrees_with_the_published_code(path):
    with np.load(path) as file:
        arrays = dict(file)
    system = path.stem.partition("_")[0]
    importlib.import_module(f"tests.systems.check_{system}").check(arrays)
