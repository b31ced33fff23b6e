"""Training over eight devices, over processes and in parts: the numbers of one device, and of a run never stopped."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from experiments.config import MeshConfig
from experiments.mesh import make_mesh
from tests.train_mesh import MESHES

RESUMED = [f"resumed on {name}" for name in ("same", "other", "single")]
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "tests.train_mesh", str(tmp_path_factory.mktemp("meshes"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [*MESHES, *RESUMED, "parts"])
def test_mesh_accumulation_and_chunks_change_nothing_but_rounding(results, name):
    one, other = results["one"], results[name]
    assert len(one["losses"]) == 6
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=2e-6)
    np.testing.assert_allclose(other["evaluation"]["loss"], one["evaluation"]["loss"], rtol=2e-6)
    assert other["evaluation"]["num_targets"] == one["evaluation"]["num_targets"] == 32
    # Adam divides by the size of the gradient, so rounding counts most where that is small.
    np.testing.assert_allclose(other["parameters"], one["parameters"], atol=1e-5)


def test_stopped_run_resumes_to_the_same_bits_on_the_same_mesh(results):
    assert results["stopped"] == {"steps": 4}
    assert results["resumed on same"] == results["2x4"]


def test_parameters_and_optimizer_are_split_over_all_devices(results):
    """But for norms and the key convolution's hidden axis, which are small, and the odd vocabulary's axis."""
    for name in ("params", "optimizer"):
        whole, on_device = results["bytes"][name]
        assert len(on_device) == 8
        assert max(on_device) < whole / 5


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (3, 5)])
def test_mesh_that_is_not_of_all_devices_is_an_error(sizes):
    with pytest.raises(ValueError, match=r"mesh\.data \* mesh\.model must be the number of devices, 1, got"):
        make_mesh(MeshConfig(*sizes))
