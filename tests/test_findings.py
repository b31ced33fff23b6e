"""From numbers to verdicts and pages, on studies written by hand."""

import copy
import json
import re

import pytest

from experiments.findings import compare, find_all
from experiments.report import write_report

ABOUT = {
    "git_revision": "0123456789abcdef",
    "git_dirty": True,
    "python": "3.11",
    "jax": "0.10",
    "device": "cpu",
    "cpu_count": 2,
}


def variant(kind, block_size, top_k, width, values):
    label = "dense" if kind == "dense" else f"B={block_size}, k={top_k} <conv {width}>"
    return {
        "name": label,
        "label": label,
        "kind": kind,
        "block_size": block_size,
        "top_k": top_k,
        "key_conv_width": width,
        "seeds": [0, 1],
        "values": values,
        "runs": [],
        "num_parameters": 1234,
    }


def study(name, **numbers):
    common = {"study": name, "preset": "tiny", "settings": {}, "about": ABOUT, "seconds": 60.0}
    return {**common, "metric": "accuracy", "chance": 0.1, "setting": "A <small> setting.", **numbers}


LARGE, SMALL = variant("moba", 16, 2, 3, [0.2, 0.3]), variant("moba", 4, 8, 3, [0.8, 0.9])
DENSE = variant("dense", None, None, 3, [0.95, 0.99])
BLOCK_SIZE = study("block_size", budget=32, variants=[LARGE, SMALL, DENSE])


@pytest.mark.parametrize(
    ("better", "worse", "verdict", "margin", "spread"),
    [
        ([0.8, 0.9], [0.2, 0.3], "holds", 0.6, 0.1),
        ([0.3, 0.6], [0.2, 0.4], "not shown", 0.15, 0.3),
        ([0.2, 0.3], [0.8, 0.9], "fails", -0.6, 0.1),
        ([0.5], [0.1], "not shown", 0.4, 0.0),
    ],
)
def test_a_difference_counts_beyond_the_spread(better, worse, verdict, margin, spread):
    found = compare(better, worse)
    assert found[0] == verdict
    assert found[1:] == pytest.approx((margin, spread))


def verdicts(studies):
    return {finding.title: finding.verdict for finding in find_all(studies)}


def test_every_claim_is_judged_or_missing():
    found = verdicts({"block_size": BLOCK_SIZE})
    assert found["Smaller blocks"] == "holds"
    assert found["Against dense attention"] == "fails"  # 0.97 against 0.85 with a spread of 0.1
    assert {
        verdict for title, verdict in found.items() if title not in ("Smaller blocks", "Against dense attention")
    } == {"missing"}


def test_a_claim_that_fails_is_called_so():
    swapped = copy.deepcopy(BLOCK_SIZE)
    swapped["variants"][0]["values"], swapped["variants"][1]["values"] = [0.8, 0.9], [0.2, 0.3]
    assert verdicts({"block_size": swapped})["Smaller blocks"] == "fails"


def test_dense_is_reached_within_the_spread():
    near = copy.deepcopy(BLOCK_SIZE)
    near["variants"][1]["values"] = [0.9, 1.0]
    assert verdicts({"block_size": near})["Against dense attention"] == "holds"
    near["variants"][1]["values"] = [0.4, 1.0]  # a spread so wide that it shows nothing
    assert verdicts({"block_size": near})["Against dense attention"] == "not shown"


def test_key_convolution_takes_the_best_width():
    widths = [
        variant("moba", 4, 8, width, values) for width, values in ((0, [0.1, 0.1]), (3, [0.5, 0.6]), (5, [0.9, 0.9]))
    ]
    (finding,) = (f for f in find_all({"key_convolution": study("key_convolution", variants=widths)}) if f.ours != "-")
    assert finding.verdict == "holds"
    assert "Width 5, the best of those tried, gains +0.800" in finding.words
    assert "Width 3 alone: holds (+0.450)" in finding.words


def test_theory_holds_by_the_share_within_three_errors():
    row = {"head_dim": 64, "block_size": 8, "num_related": 1, "delta_mu": 1.0, "num_blocks": 8, "top_k": 2}
    for name in ("snr", "failure", "recall"):
        row |= {f"{name}_theory": 0.5, f"{name}_measured": 0.52, f"{name}_spread": 0.01}
    numbers = {
        "monte_carlo": [row],
        "trained": [],
        "correlation": None,
        "rank_correlation": None,
        "mean_absolute_gap": None,
    }
    found = verdicts({"snr": study("snr", **numbers)})
    assert found["The signal-to-noise formula"] == "holds"
    assert found["The formula on trained models"] == "missing"
    row["recall_measured"] = 0.9
    assert verdicts({"snr": study("snr", **numbers)})["The signal-to-noise formula"] == "fails"


def test_fewer_bits_are_better():
    dense, large, small, conv = (
        variant("dense", None, None, 0, [2.0, 2.0]),
        variant("moba", 64, 2, 0, [2.5, 2.6]),
        variant("moba", 16, 8, 0, [2.2, 2.3]),
        variant("moba", 16, 8, 3, [2.1, 2.2]),
    )
    found = find_all({"language_model": study("language_model", variants=[dense, large, small, conv])})
    (finding,) = (f for f in found if f.ours != "-")
    assert finding.verdict == "holds"
    assert "+0.3000" in finding.words
    assert "needs +0.1500" in finding.words


def test_the_report_shows_what_is_there_and_escapes_it(tmp_path):
    (tmp_path / "block_size").mkdir()
    (tmp_path / "block_size" / "study.json").write_text(json.dumps(BLOCK_SIZE))
    page = write_report(tmp_path)
    text, markdown = page.read_text(), (tmp_path / "report.md").read_text()
    assert "A &lt;small&gt; setting." in text
    assert "<td>B=4, k=8 &lt;conv 3&gt;</td>" in text
    assert "A &lt;small&gt; setting." in markdown
    assert "<conv 3>" not in text + markdown
    images = re.findall(r'<img src="([^"]{,40})', text)
    assert len(images) == markdown.count("](plots/") == 1
    assert all(image.startswith("data:image/png;base64,iVBOR") for image in images)
    assert text.count("<table>") == 2  # the summary, and all numbers of the one finding that has some
    assert text.count("<details>") == text.count("</details>") == 1
    assert "http" not in text
    assert "uncommitted changes" in markdown
    assert "| Smaller blocks | **holds** |" in markdown
    assert (tmp_path / "plots" / "block_size.png").stat().st_size > 1000


def test_a_directory_without_studies_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="out must hold studies"):
        write_report(tmp_path)


def test_systems_are_ranked_in_their_league_and_a_selection_is_drawn(tmp_path):
    def row(system, is_causal, error, mass, milliseconds):
        times = {"select_ms": milliseconds, "total_ms": 9.0}
        about = {"model": "recall", "system": system, "is_causal": is_causal, "setting": 0.5, "density": 0.25}
        return {**about, "error": error, "mass_recall": mass, **times}

    rows = [
        row("oracle", True, 0.1, 0.9, 0.1),
        row("MoBA", True, 0.3, 0.5, 2.0),
        row("SALE", True, 0.2, 0.4, 3.0),
        row("PISA", False, 0.4, 0.6, 1.0),
    ]
    selection = {"indices": [[[[0, -1], [0, 1], [1, 0]]]], "block_size": 2, "num_blocks": 2}
    numbers = study("comparison", rows=rows, selection=selection)
    (finding,) = (found for found in find_all({"comparison": numbers}) if found.study == "comparison")
    assert finding.verdict == "measured"
    assert "recall, causal: least error SALE (0.20), most mass MoBA (0.50), quickest choice MoBA" in finding.ours
    assert "bidirectional: least error PISA" in finding.ours
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison" / "study.json").write_text(json.dumps(numbers))
    write_report(tmp_path)
    assert (tmp_path / "plots" / "selection.png").stat().st_size > 1000
    assert "plots/selection.png" in (tmp_path / "report.md").read_text()
