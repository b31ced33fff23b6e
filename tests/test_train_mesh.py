"""Training over eight devices, over processes and in parts: the numbers of one device, and of a run never stopped."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import train as training
from experiments import utilization
from experiments.config import MeshConfig, TrainConfig
from experiments.data import make_data
from experiments.data.text import PackedDocuments
from experiments.evaluate import token_losses
from experiments.mesh import make_mesh
from experiments.metrics import read_metrics
from sparse_attn.nn import Transformer
from tests.train_mesh import CONFIG, MESHES, losses

RESUMED = [f"resumed on {name}" for name in ("same", "other", "single")]
pytestmark = pytest.mark.timeout(400)


def start(num_devices, *arguments):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
    command = [sys.executable, "-m", "tests.train_mesh", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    process = start(8, tmp_path_factory.mktemp("meshes"))
    output, error = process.communicate()
    assert process.returncode == 0, error[-5000:]
    return json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("name", [*MESHES, *RESUMED])
def test_mesh_accumulation_and_chunks_change_nothing_but_rounding(results, name):
    """4x2 trains in microbatches with unequal numbers of targets, and with the loss in chunks."""
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


def test_run_on_a_mesh_begins_with_the_parameters_of_a_run_on_another(results):
    one, other = results["begun on one"], results["begun on 2x4"]
    assert one["losses"][0] != results["one"]["losses"][0]
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=2e-6)
    np.testing.assert_allclose(other["parameters"], one["parameters"], atol=1e-5)


def test_parameters_and_optimizer_are_split_over_all_devices(results):
    """But for norms, and the axes that a mesh of 2x4 does not divide: the vocabulary, the convolution's width."""
    for name in ("params", "optimizer"):
        whole, on_device = results["bytes"][name]
        assert len(on_device) == 8
        assert max(on_device) < whole / 5


def test_two_processes_are_killed_stopped_and_go_on_to_the_same_losses(results, tmp_path):
    """Both get SIGKILL after step 5; then the second alone gets SIGTERM, and both stop; then they go on to the end."""

    def both(how):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        processes = [start(2, tmp_path, port, process, how) for process in (0, 1)]
        outputs = [process.communicate() for process in processes]
        return [process.returncode for process in processes], outputs

    statuses, outputs = both("killed")
    assert statuses == [-signal.SIGKILL] * 2, outputs
    before = losses(tmp_path)
    assert len(before) == 5
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["3"]

    statuses, outputs = both("resumed")
    assert statuses == [0, 0], outputs
    told = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    assert told[0] == told[1]
    assert "all processes must have the same configuration" in told[0]["different"]
    assert told[0]["stopped"] == 5
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path)[:5] == before
    np.testing.assert_allclose(losses(tmp_path), results["one"]["losses"], rtol=2e-6)
    np.testing.assert_allclose(told[0]["evaluation"]["loss"], results["one"]["evaluation"]["loss"], rtol=2e-6)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (3, 5)])
def test_mesh_that_is_not_of_all_devices_is_an_error(sizes):
    with pytest.raises(ValueError, match=r"mesh\.data \* mesh\.model must be the number of devices, 1, got"):
        make_mesh(MeshConfig(*sizes))


def test_parts_that_do_not_divide_a_batch_are_an_error():
    with pytest.raises(
        ValueError, match=r"must divide data\.batch_size=8, got mesh\.data=2 and train\.accumulate_steps=3"
    ):
        dataclasses.replace(CONFIG, mesh=MeshConfig(data=2), train=TrainConfig(accumulate_steps=3))


@pytest.mark.parametrize("task", ["recall", "needle", "text"])
def test_rows_of_a_batch_are_those_of_the_whole(task):
    config = dataclasses.replace(CONFIG.data, task=task)
    if task == "text":
        streams = np.random.default_rng(0).integers(0, 9, (2, 200))
        data = PackedDocuments(*streams, 8, config, 0, vocab_size=9, bytes_per_token=1.0, description={})
    else:
        data = make_data(config, 0)
    rows = np.array([1, 2, 6])
    for split in ("train", "validation"):
        whole, part = data.batch(5, split), data.batch(5, split, rows)
        assert whole.keys() == part.keys()
        for name in whole:
            np.testing.assert_array_equal(part[name], whole[name][rows])


@pytest.mark.parametrize(("loss_chunk", "has_all_logits"), [(0, True), (5, False)])
def test_chunks_of_the_loss_keep_no_array_of_all_logits(loss_chunk, has_all_logits):
    graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(CONFIG.model, rngs=nnx.Rngs(0))))
    batch = make_data(CONFIG.data, 0).batch(0, "train")

    def loss(params):
        return token_losses(nnx.merge(graph, params), batch, loss_chunk)[0].sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert ("f32[8,16,17]" in program) == has_all_logits
    assert ("f32[8,5,17]" in program) != has_all_logits


def test_bfloat16_computes_and_float32_remembers():
    """Activations are bfloat16; logits, loss, gradient norm, parameters and both moments of Adam are float32."""
    model = dataclasses.replace(CONFIG.model, dtype="bfloat16")
    graph, make_state, train_step = training._compile(model, CONFIG.optimizer, CONFIG.train.steps, None, 2, 5)
    batch = make_data(CONFIG.data, 0).batch(0, "train")
    state = jax.eval_shape(make_state, 0)
    new, measured = jax.eval_shape(train_step, state, batch)
    is_float = lambda dtype: jnp.issubdtype(dtype, jnp.floating)  # noqa: E731
    assert {x.dtype.name for x in jax.tree.leaves((state, new, measured)) if is_float(x.dtype)} == {"float32"}
    hidden = jax.eval_shape(lambda params: nnx.merge(graph, params).hidden(batch["tokens"]), state.params)
    assert hidden.dtype == jnp.bfloat16


def test_operations_are_those_of_loops():
    """Matrices by the model's own parameters, attention by counting what every token sees."""
    config = dataclasses.replace(
        CONFIG.model, layer_pattern=("sliding_window", "moba", "dense"), num_layers=3, num_key_value_heads=4
    )
    params = nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param)
    kernels = [
        leaf.size
        for path, leaf in jax.tree.leaves_with_path(params)
        if re.search(r"kernel", jax.tree_util.keystr(path)) and "key_conv" not in jax.tree_util.keystr(path)
    ]
    products = 0
    for token in range(18):
        own = token // 4
        products += 2 * sum(token - 4 < key <= token for key in range(18))
        products += 2 * sum(key <= token and key // 4 in (own, own - 1) for key in range(18)) + own
        products += 2 * sum(key <= token for key in range(18))
    expected = 3 * (2 * sum(kernels) + 2 * 8 * 2 * products / 18)
    np.testing.assert_allclose(utilization.train_flops(config, 18), expected, rtol=1e-12)


def test_metrics_of_devices_are_left_out_where_unknown(monkeypatch):
    assert utilization.device_metrics(1e12, 1) == {}
    devices = [
        SimpleNamespace(device_kind="TPU v5 lite", memory_stats=lambda n=n: {"peak_bytes_in_use": n}) for n in (3, 7)
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert utilization.device_metrics(197e12, 4) == {"model_flops_utilization": 0.25, "peak_memory_bytes": 7.0}
