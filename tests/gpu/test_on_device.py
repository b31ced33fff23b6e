"""The check of the GPU kernels, and what the benchmark makes of its measurements."""

import os
import pathlib
import subprocess
import sys

import pytest

from experiments.__main__ import EXTRAS
from experiments.kernels import calls, on_device
from experiments.kernels.roofline import Problem
from pallas_kernels.config import TRITON

PROBLEM = Problem(sequence=48, block_size=16, top_k=2, head_dim=16, batch=1, heads=1)


def test_it_needs_neither_flax_nor_an_extra():
    code = f"""
import sys
sys.modules.update(dict.fromkeys({[*EXTRAS, "flax"]}))
from experiments.__main__ import main
main(["on_device"])
"""
    root, environment = pathlib.Path(__file__).parents[2], os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "error: JAX finds no GPU. What the kernels should cost: python -m experiments roofline" in done.stderr


def test_the_interpreted_kernels_pass_the_check():
    assert on_device.check(PROBLEM, TRITON, interpret=True) == {
        "route": True,
        "forward": True,
        "forward_backward": True,
    }


def test_wrong_results_do_not_pass_the_check():
    expected = calls.right_results(PROBLEM, calls.make_arrays(PROBLEM))
    assert calls.is_right(expected, expected)
    output, log_sum_exp = expected["forward"]
    assert not calls.is_right((output.at[0, 5, 0, 3].add(0.2), log_sum_exp), expected["forward"])
    assert not calls.is_right(expected["route"].at[0, 0, 40, 1].add(1), expected["route"])
    assert not calls.is_right((output, log_sum_exp.at[0, 7, 0].set(float("nan"))), expected["forward"])


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
