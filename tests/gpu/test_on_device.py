"""The command for a lent machine: rehearsed on a CPU, and what it makes of its measurements."""

import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

from experiments.__main__ import EXTRAS, main
from experiments.kernels import on_device, verdict
from tests.backends import needs_triton

ROOT = pathlib.Path(__file__).parents[2]


def test_without_time_every_step_is_left_out_and_neither_flax_nor_an_extra_is_needed(tmp_path):
    code = f"""
import sys
sys.modules.update(dict.fromkeys({[*EXTRAS, "flax"]}))
from experiments.__main__ import main
sys.exit(main(["on_device", "--minutes", "0", "--out", sys.argv[1]]))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "verify.json").read_text())
    assert report["about"] == {"left_out": "the time was up"}
    assert report["implementation"] is None


@needs_triton
@pytest.mark.timeout(180)
def test_every_step_is_rehearsed_with_interpreted_kernels(tmp_path, capsys):
    assert main(["on_device", "--rehearse", "--minutes", "3", "--out", str(tmp_path)]) == 0
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(files) == {"verify.json", "tuning.json", "pallas.json", "pallas.md"}
    report = {name: json.loads(text) for name, text in files.items() if name.endswith(".json")}
    assert [check["part"] for check in report["verify.json"]["checks"] if "errors" in check] == list(verdict.PARTS)
    assert report["verify.json"]["implementation"] == "pallas"
    tried = report["tuning.json"]["pallas"]["tried"]
    assert [trial["sizes"] for trial in tried] == [{}, {"tile_size": 64}]
    assert all(trial["is_right"] for trial in tried)
    (problem,) = report["pallas.json"]["problems"]
    assert problem["seconds"]["whole_forward_backward"]["median"] > 0
    assert not problem["failures"]
    assert "is it right?" in capsys.readouterr().out


def test_sizes_are_kept_that_are_right_and_faster():
    found = {"sizes": {}, "seconds": None, "tried": []}
    trials = on_device._trials(found, {"rehearse": False}, {"tile_size": (64, 32), "num_stages": (3,)})
    outcomes = iter([(3.0, True), (2.0, True), (1.0, False), (2.5, True)])
    asked = []
    for step in trials:
        asked.append(step["sizes"])
        seconds, is_right = next(outcomes)
        on_device._note(found, step["sizes"], {"seconds": seconds, "is_right": is_right})
    assert asked == [{}, {"tile_size": 64}, {"tile_size": 32}, {"tile_size": 64, "num_stages": 3}]
    assert found["sizes"] == {"tile_size": 64}


def test_results_that_differ_or_are_no_numbers_are_not_close():
    right = [jnp.ones((2, 3), jnp.bfloat16), jnp.full(4, 100.0, jnp.bfloat16)]
    assert on_device.is_close(right, right)
    assert not on_device.is_close([right[0].at[1, 2].add(0.1), right[1]], right)
    assert not on_device.is_close([right[0].at[1, 2].set(jnp.nan), right[1]], right)


def test_stages_are_differences_of_the_calls_that_were_measured():
    seconds = {"route": 1.0, "schedule": 2.0, "schedule_attend": 5.0, "forward": 9.0, "forward_backward": 17.0}
    stages = {"route": 1, "schedule": 2, "attend": 3, "merge": 4, "backward": 8}
    assert on_device.split_stages(seconds) == pytest.approx(stages)
    del seconds["schedule_attend"]
    assert on_device.split_stages(seconds) == {"route": 1, "schedule": 2, "backward": 8}


def test_a_row_of_the_table_compares_with_dense_attention_and_names_what_failed():
    def times(median):
        return {"median": median, "least": 0.9 * median, "most": 1.1 * median}

    problem = {
        **{"head_dim": 64, "block_size": 128, "top_k": 8, "sequence": 8192},
        "seconds": {"whole_forward": times(0.002), "dense_forward": times(0.010), "whole_forward_backward": times(0.1)},
        "stages": {"route": 0.001, "attend": 0.0005},
        "rates": {"attend": {"bytes_per_second": 2e12, "flops_per_second": 1e14}},
        "memory": {"whole_forward": 220, "dense_forward": 200},
        "failures": {"dense_forward_backward": "no room"},
    }
    cells = on_device.row(problem, {"bytes_per_second": 4e12}).strip("| ").split(" | ")
    both = ["100.00", "20 %", "-", "-"]
    expected = ["64", "128 / 8", "8192", "1.00", "-", "0.50", "-", "2.00", "20 %", "10.00", "5.00", *both, "1.10", "-"]
    assert cells == [*expected, "50 %", "dense_forward_backward"]
    assert len(cells) == len(on_device._COLUMNS)
