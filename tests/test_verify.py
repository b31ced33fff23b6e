"""The check of a machine finds what is wrong, survives what crashes, and is the evidence that defaults follow."""

import dataclasses
import json
import pathlib
import time

import numpy as np
import pytest

from experiments.kernels import oracle as large_oracle
from experiments.kernels import verdict, verify
from experiments.kernels.steps import run_steps
from sparse_attn.attend import backends
from sparse_attn.attend.backends import Xla
from tests import oracle, steps_that_fail

RESULTS = pathlib.Path(__file__).parents[1] / "experiments" / "results"
SMALL = verify.Case("small", (21, 3, 40), 4, 2, 8, 8, 3, "float32", is_small=True)


def test_the_oracle_for_long_sequences_says_what_the_loops_say():
    query, key, value, d_output, segment_ids = verify._inputs(SMALL)
    arrays = [array[None] for array in (query, key, value)]
    ids = {f"{side}_segment_ids": segment_ids[None] for side in ("query", "key_value")}
    indices, gap = oracle.route(*arrays[:2], block_size=8, top_k=3, **ids)
    chosen, decided = verify._choice(SMALL)
    assert decided.mean() > 0.9
    np.testing.assert_array_equal(chosen[decided], np.sort(indices[0], -1)[decided])
    assert (gap[0][decided] > 0).all()
    mask = oracle.attention_mask(indices, num_keys=SMALL.tokens, block_size=8, **ids)
    output, gradients = oracle.attention(*arrays, mask, d_output=d_output[None])
    expected = verify._expected(SMALL)
    for name, right in {"output": output, "d_query": gradients[0]}.items():
        np.testing.assert_allclose(np.stack(expected[name], 1), right[0], atol=1e-12)
    for name, right in zip(("d_key", "d_value"), gradients[1:], strict=True):
        np.testing.assert_allclose(expected[name], right[0], atol=1e-12)


def test_near_ties_are_left_out():
    key = np.repeat([[1.0], [1.0 + 1e-7], [0.0], [9.0]], 2, axis=0)
    geometry = large_oracle.make_geometry((8,), 2)
    _, decided = large_oracle.choose(np.ones((8, 1)), key, geometry, top_k=2)
    np.testing.assert_array_equal(decided, [True] * 4 + [False] * 4)


@dataclasses.dataclass(frozen=True)
class Wrong(Xla):
    """Errs in one part."""

    part: str = ""

    def route(self, *call):
        right = super().route(*call)
        return right.at[0, 1, 63, 0].set(-1) if self.part == "route" else right

    def forward(self, *call):
        output, log_sum_exp = super().forward(*call)
        return (output.at[0, 5, 1].add(0.01), log_sum_exp) if self.part == "forward" else (output, log_sum_exp)

    def backward(self, *call):
        query, key, value = super().backward(*call)
        return (query, key.at[0, 63, 1].multiply(np.nan), value) if self.part == "gradients" else (query, key, value)


@pytest.mark.parametrize("part", verdict.PARTS)
def test_what_is_right_passes_and_what_is_wrong_does_not(part):
    for implementation, is_right in (("xla", True), (Wrong(part=part), False)):
        outcome = {"implementation": "xla", "case": "small", "part": part, **verify.check(SMALL, part, implementation)}
        report = {"about": {"platform": "cpu"}, "checks": [outcome], "times": []}
        assert (not verdict.wrong(report)) == is_right, outcome


def test_the_rest_is_done_after_a_step_that_hangs_or_crashes():
    steps = [{"do": word} for word in ("crash", "refuse", "fail", "hang", "work", "work")]
    outcomes = [outcome for _, outcome in run_steps(steps_that_fail.run, steps, 4.0, time.monotonic() + 60)]
    assert "crashed" in outcomes[0]["failed"]
    assert outcomes[1] == {"refused": "no such chip"}
    assert outcomes[2] == {"failed": "ValueError: wrong shape"}
    assert "hung" in outcomes[3]["failed"]
    assert outcomes[4] == outcomes[5]
    assert outcomes[4]["process"]
    late = run_steps(steps_that_fail.run, steps, 4.0, time.monotonic())
    assert [outcome for _, outcome in late] == [{"left_out": "the time was up"}] * len(steps)


def report_of(**times):
    """A report of a chip on which XLA and the kernels took so many seconds, and are right."""
    checks = [
        {"implementation": name, "case": case, "part": part, "errors": {"output": 0.5}, "same_bits": True}
        for name in times
        for case in ("small", "8K")
        for part in verdict.PARTS
    ]
    sizes = {"tokens": 2048, "pass": "forward and backward", "bytes": 1 << 20}
    measured = [{"implementation": name, "seconds": seconds, **sizes} for name, seconds in times.items()]
    return {
        "about": {"device_kind": "TPU v9"},
        "checks": checks,
        "times": measured,
        "wrong": [],
        "implementation": None,
    }


def complete(report):
    report["wrong"] = verdict.wrong(report)
    report["implementation"] = verdict.fastest(report)
    return report


def test_the_fastest_of_what_is_right_is_recommended():
    assert complete(report_of(xla=2.0, pallas=1.0))["implementation"] == "pallas"
    for fault in ({"errors": {"output": float("nan")}}, {"same_bits": False}, {"failed": "crashed"}):
        report = report_of(xla=2.0, pallas=1.0)
        report["checks"][-1] |= fault
        assert complete(report)["implementation"] == "xla"
        assert "WRONG: pallas, 8K, gradients" in verdict.table(report)
    report = report_of(xla=2.0, pallas=1.0)
    del report["checks"][-1]  # never compared
    assert complete(report)["implementation"] == "xla"
    assert not report["wrong"]


def evidence_of(kind, results=RESULTS):
    return json.loads((results / kind.replace(" ", "_") / "verify.json").read_text())


def test_every_default_kernel_has_its_evidence():
    for kind, name in backends.VERIFIED.items():
        assert verdict.supports(evidence_of(kind), kind, name)


def test_evidence_is_of_that_kind_and_that_kernel_and_nothing_wrong(tmp_path):
    (tmp_path / "TPU_v9").mkdir()
    (tmp_path / "TPU_v9" / "verify.json").write_text(json.dumps(complete(report_of(xla=2.0, pallas=1.0))))
    report = evidence_of("TPU v9", tmp_path)
    assert verdict.supports(report, "TPU v9", "pallas")
    assert not verdict.supports(report, "TPU v8", "pallas")
    assert not verdict.supports(report, "TPU v9", "mosaic")
    assert not verdict.supports(report | {"wrong": ["pallas, 8K"]}, "TPU v9", "pallas")
