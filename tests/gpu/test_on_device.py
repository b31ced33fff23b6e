"""What the benchmark of the GPU kernels makes of its measurements."""

import pytest

from pallas_kernels.gpu import on_device


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
