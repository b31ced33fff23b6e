"""The comparison with PyTorch, as far as it goes without PyTorch and without a GPU."""

import json
import sys
import types

import pytest

from experiments.kernels import compare_torch


def times(median):
    return {"median": median, "least": 0.9 * median, "most": 1.1 * median}


REPORT = {
    "machine": {"jax": "0.12", "device": "H200", "date": "2026-01-01"},
    "backend": "triton",
    "problems": [
        {
            **{"batch": 2, "heads": 16, "head_dim": 64, "block_size": block_size, "top_k": top_k, "sequence": 8192},
            "seconds": {"whole_forward": times(0.002)},
        }
        for block_size, top_k in ((128, 8), (512, 2))
    ],
}


@pytest.mark.parametrize(
    ("torch", "reason"),
    [
        (None, "not installed"),
        (types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False)), "no CUDA device"),
    ],
    ids=["no_torch", "no_cuda"],
)
def test_what_is_missing_is_said(monkeypatch, torch, reason):
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(SystemExit, match=reason):
        compare_torch.find_torch()


def test_each_shape_is_measured_once_and_stands_beside_the_report(monkeypatch, tmp_path):
    shapes = []

    def measure(_, *shape):
        shapes.append(shape)
        return {"seconds": {"forward": times(0.010)}, "memory": {}, "failures": {"forward_backward": "no room"}}

    torch = types.SimpleNamespace(__version__="2", cuda=types.SimpleNamespace(get_device_name=lambda: "H200"))
    monkeypatch.setattr(compare_torch, "find_torch", lambda: torch)
    monkeypatch.setattr(compare_torch, "measure", measure)
    report, out = tmp_path / "gpu.json", tmp_path / "torch.json"
    report.write_text(json.dumps(REPORT))
    compare_torch.main([str(report), "--out", str(out)])
    assert shapes == [(2, 16, 8192, 64)]
    assert [problem["block_size"] for problem in json.loads(out.read_text())["problems"]] == [128, 512]
    rows = out.with_suffix(".md").read_text().splitlines()[-4:]
    assert rows[0] == "| 64 | 128 / 8 | 8192 | forward | 10.00 | 20 % | 2.00 | 20 % | 5.00 |"
    assert rows[3] == "| 64 | 512 / 2 | 8192 | forward_backward | - | - | - | - | - |"


def test_times_are_medians_between_events_after_one_call_that_does_not_count():
    calls = []
    events = types.SimpleNamespace(record=lambda: None, elapsed_time=lambda _: float(len(calls)))
    cuda = types.SimpleNamespace(Event=lambda enable_timing: events, synchronize=lambda: None)
    seconds = compare_torch.measure_seconds(types.SimpleNamespace(cuda=cuda), lambda: calls.append(1))
    assert seconds == pytest.approx({"median": 0.0065, "least": 0.002, "most": 0.011})  # calls 2 to 11
