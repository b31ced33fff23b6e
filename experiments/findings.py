"""From a study's numbers to a sentence: the paper's claim, our number with its spread, and whether it holds."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

Verdict = Literal["holds", "fails", "not shown", "measured", "missing"]
Study = dict[str, Any]  # the content of a study.json


@dataclasses.dataclass(frozen=True)
class Finding:
    """One claim and what became of it."""

    title: str
    claim: str
    """What the paper says, with where."""
    study: str
    """Name of the study that tests it."""
    verdict: Verdict
    ours: str
    """Our numbers in a line."""
    words: str
    """What they mean, and by which rule the verdict was reached."""
    rows: tuple[tuple[str, ...], ...] = ()
    """A table, head first."""


def find_all(studies: dict[str, Study]) -> list[Finding]:
    """Every finding; those whose study is not there yet are missing."""
    findings = []
    for study, title, claim, judge in _CLAIMS:
        if study in studies:
            verdict, ours, words, rows = judge(studies[study])
            findings.append(Finding(title, claim, study, verdict, ours, words, tuple(rows)))
        else:
            findings.append(Finding(title, claim, study, "missing", "-", "The study has not been run."))
    return findings


def compare(better: Sequence[float], worse: Sequence[float]) -> tuple[Verdict, float, float]:
    """Whether one side is above the other by more than the seeds scatter.

    Args:
      better: values, one a seed, of the side that the claim puts above.
      worse: values of the other side.

    Returns:
      The verdict, the margin between the means, and the spread: the larger of the two ranges over seeds. "holds" if the
      margin exceeds the spread, "fails" if the sign is wrong, "not shown" in between or with a single seed.
    """
    margin = float(np.mean(better) - np.mean(worse))
    spread = float(max(np.ptp(better), np.ptp(worse)))
    if margin <= 0:
        return "fails", margin, spread
    return ("holds" if margin > spread and min(len(better), len(worse)) > 1 else "not shown"), margin, spread


def compare_with_dense(dense: Sequence[float], sparse: Sequence[float]) -> tuple[Verdict, str]:
    """Whether sparse attention is as accurate as dense: "holds", "fails" or "not shown", and the sentence that says so.

    It holds if dense lies above by no more than the spread over seeds, and by no more than 0.05: a wide spread alone
    shows nothing.
    """
    _, margin, spread = compare(dense, sparse)
    numbers = f"dense lies {margin:+.3f} above it, the spread over seeds is {spread:.3f}"
    if margin > spread:
        return "fails", f"Dense attention is not reached: {numbers}."
    if margin > 0.05:
        return "not shown", f"Dense attention is neither reached nor clearly missed: {numbers}."
    return "holds", f"Dense attention is reached: {numbers} (at most 0.05 below counts as reached)."


def show(values: Sequence[float]) -> str:
    """Mean and range over seeds."""
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}, n={len(values)})"


Rows = list[tuple[str, ...]]
Judgement = tuple[Verdict, str, str, Rows]


def _judge_theory(study: Study) -> Judgement:
    points = study["monte_carlo"]
    deviations = np.array(
        [
            abs(row[f"{name}_measured"] - row[f"{name}_theory"]) / max(row[f"{name}_spread"], 1e-9)
            for row in points
            for name in ("snr", "recall")
        ]
    )
    worst = max(abs(row["recall_measured"] - row["recall_theory"]) for row in points)
    share = float((deviations < 3).mean())
    ours = f"{share:.0%} of {deviations.size} values within 3 standard errors; recall off by at most {worst:.3f}"
    words = "Holds if at least 90 % of the measured SNRs and recalls lie within 3 standard errors of the formula."
    rows: Rows = [("d", "B", "related keys", "gap", "SNR theory", "SNR measured", "recall theory", "recall measured")]
    for row in points:
        cells = [str(row[name]) for name in ("head_dim", "block_size", "num_related", "delta_mu")]
        for name in ("snr", "recall"):
            cells += [f"{row[f'{name}_theory']:.3f}", f"{row[f'{name}_measured']:.3f} ± {row[f'{name}_spread']:.3f}"]
        rows.append(tuple(cells))
    return ("holds" if share >= 0.9 else "fails"), ours, words, rows


def _judge_trained(study: Study) -> Judgement:
    if study["correlation"] is None:
        return "missing", "-", "There are too few trained recall models; run the block size study first.", []
    correlation, ranks, gap = (study[name] for name in ("correlation", "rank_correlation", "mean_absolute_gap"))
    ours = f"correlation {correlation:.2f} (ranks {ranks:.2f}), mean gap {gap:.2f}, over {len(study['trained'])} heads"
    words = (
        "Each head's measured SNR predicts its recall. Holds if the correlation over all heads is at least 0.7. The "
        "relevant block is the one with the value to copy; a head that looks for something else has an SNR near zero. "
        "Scores are taken as normal and equally noisy. Heads of all block sizes and layers are pooled, which raises "
        "the correlation: the gap is the stricter number."
    )
    rows: Rows = [("run", "layer", "head", "SNR", "recall predicted", "recall measured")]
    for row in study["trained"]:
        numbers = [f"{row[name]:.2f}" for name in ("snr_measured", "recall_predicted", "recall_measured")]
        rows.append((row["run"], str(row["layer"]), str(row["head"]), *numbers))
    return ("holds" if correlation >= 0.7 else "fails"), ours, words, rows


def _judge_block_size(study: Study) -> Judgement:
    sizes = {variant["block_size"]: variant for variant in study["variants"] if variant["kind"] == "moba"}
    smallest = min(sizes)
    larger = 4 * smallest if 4 * smallest in sizes else max(sizes)
    small, large = sizes[smallest]["values"], sizes[larger]["values"]
    verdict, margin, spread = compare(small, large)
    ours = f"B={larger}: {show(large)}; B={smallest}: {show(small)}"
    budget = study["budget"]
    words = f"Smaller blocks gain {margin:+.3f} at an equal budget of {budget} tokens; the seeds spread {spread:.3f}."
    return verdict, ours, words, _variant_rows(study)


def _judge_key_convolution(study: Study) -> Judgement:
    widths = {variant["key_conv_width"]: variant["values"] for variant in study["variants"]}
    none = widths.pop(0)
    best = max(widths, key=lambda width: np.mean(widths[width]))
    verdict, margin, spread = compare(widths[best], none)
    ours = "; ".join(f"width {width}: {show(values)}" for width, values in sorted({0: none, **widths}.items()))
    gains = {width: compare(values, none) for width, values in sorted(widths.items())}
    words = f"Width {best}, the best of those tried, gains {margin:+.3f} over none; the seeds spread {spread:.3f}. "
    words += " ".join(f"Width {width} alone: {found[0]} ({found[1]:+.3f})." for width, found in gains.items())
    return verdict, ours, words, _variant_rows(study)


def _judge_dense(study: Study) -> Judgement:
    dense = next(variant["values"] for variant in study["variants"] if variant["kind"] == "dense")
    best = max((v for v in study["variants"] if v["kind"] == "moba"), key=lambda variant: np.mean(variant["values"]))
    verdict, words = compare_with_dense(dense, best["values"])
    ours = f"dense {show(dense)}; best MoBA ({best['label']}) {show(best['values'])}"
    return verdict, ours, words, []


def _judge_length(study: Study) -> Judgement:
    variants = {v["block_size"]: v for v in study["variants"] if v["kind"] == "moba"}
    dense = next(v for v in study["variants"] if v["kind"] == "dense")
    smallest = variants[min(variants)]
    longest = smallest["lengths"][-1]
    verdict, words = compare_with_dense(dense["values"], smallest["values"])
    ours = f"at {longest} tokens: {smallest['label']} {show(smallest['values'])}; dense {show(dense['values'])}"
    words = f"Trained at {study['training_length']} tokens, judged at the longest. {words}"
    rows: Rows = [("model", *(f"{length} tokens" for length in smallest["lengths"]))]
    for variant in study["variants"]:
        columns = zip(*variant["values_by_length"], strict=True)
        rows.append((variant["label"], *(show(column) for column in columns)))
    return verdict, ours, words, rows


def _judge_language_model(study: Study) -> Judgement:
    dense, large, small, convolved = study["variants"]
    negative = {id(v): [-value for value in v["values"]] for v in study["variants"]}  # fewer bits are better
    verdict, margin, spread = compare(negative[id(small)], negative[id(large)])
    _, gain, gain_spread = compare(negative[id(convolved)], negative[id(small)])
    best = min((large, small, convolved), key=lambda variant: np.mean(variant["values"]))
    gap = float(np.mean(best["values"]) - np.mean(dense["values"]))
    ours = "; ".join(f"{variant['label']}: {show(variant['values'])}" for variant in study["variants"])
    words = (
        f"Validation bits per byte, fewer are better. Smaller blocks save {margin:+.4f} (seeds spread {spread:.4f}), "
        f"key convolution saves {gain:+.4f} more (spread {gain_spread:.4f}); the best MoBA, {best['label']}, needs "
        f"{gap:+.4f} bits against dense. The verdict is that on smaller blocks."
    )
    return verdict, ours, words, _variant_rows(study)


def _judge_efficiency(study: Study) -> Judgement:
    rows = [row for row in study["rows"] if row["pass"] == "forward" and row["speedup_over_dense"]]
    if not rows:
        return "missing", "-", "Dense attention was not timed at any of these lengths.", []
    ratios = {row["sequence_length"]: row["speedup_over_dense"] for row in rows}
    shortest, longest = min(ratios), max(ratios)
    ours = ", ".join(f"{ratio:.1f}x at {length}" for length, ratio in sorted(ratios.items()))
    words = (
        f"Forward, routing included, against jax.nn.dot_product_attention in the same process on "
        f"{study['machine']['cpu_model']}. Holds in direction if the ratio is larger at the longest length "
        f"than at the shortest, and above 1 at "
        f"{longest} tokens; the paper's figure is for another machine and length. "
        f"Heads are spread over {study['machine']['devices']} JAX devices for both. "
        f"MiB: temporary memory as compiled; peak: growth of a fresh process; a large product of matrices reaches "
        f"{study['machine']['matmul_gflops']} GFLOP/s."
    )
    head = (
        "tokens",
        "pass",
        "MoBA ms",
        "dense ms",
        "ratio",
        "PyTorch ms",
        "ratio",
        "MoBA MiB",
        "dense MiB",
        "MoBA peak",
        "dense peak",
        "GFLOP/s",
    )
    names: tuple[str, ...] = ("moba_ms", "dense_ms", "speedup_over_dense", "torch_ms", "speedup_over_torch")
    names = (*names, "moba_temp_mib", "dense_temp_mib", "moba_peak_mib", "dense_peak_mib", "achieved_gflops")
    table: Rows = [head]
    for row in study["rows"]:
        numbers = ("-" if row.get(name) is None else f"{row[name]:.1f}" for name in names)
        table.append((str(row["sequence_length"]), row["pass"], *numbers))
    return ("holds" if ratios[longest] > max(1, ratios[shortest]) else "fails"), ours, words, table


def _judge_comparison(study: Study) -> Judgement:
    columns = ("density", "mass_recall", "error", "select_ms", "total_ms")
    rows: Rows = [
        ("model", "mask", "system", "setting", "density", "mass recall", "output error", "choice ms", "total ms")
    ]
    winners = []
    leagues: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in study["rows"]:
        leagues.setdefault((row["model"], row["is_causal"]), []).append(row)
    for (model, is_causal), league in leagues.items():
        mask = "causal" if is_causal else "bidirectional"
        for row in sorted(league, key=lambda row: row["error"]):
            numbers = (f"{row[name]:.3g}" for name in columns)
            rows.append((model, mask, row["system"], f"{row['setting']:.3g}", *numbers))
        real = [row for row in league if row["system"] != "oracle"]
        error = min(real, key=lambda row: row["error"])
        mass = max(real, key=lambda row: row["mass_recall"])
        quick = min(real, key=lambda row: row["select_ms"])
        winners.append(
            f"{model}, {mask}: least error {error['system']} ({error['error']:.2f}), most mass {mass['system']} "
            f"({mass['mass_recall']:.2f}), quickest choice {quick['system']} ({quick['select_ms']:.1f} ms)"
        )
    words = (
        "Error: norm of the difference from dense attention's output over that output's norm. Mass: share of dense "
        "attention's weights on the pairs that a system attends exactly. A system whose dial is coarse may miss the "
        "target density: compare it with its neighbours by the column. Times are of XLA on this machine at a short "
        "length, and say what the choice costs beside the attention. One model, one layer each: an example, not a rank."
    )
    return "measured", "; ".join(winners), words, rows


def _variant_rows(study: Study) -> Rows:
    seeds = study["variants"][0]["seeds"]
    rows: Rows = [("model", "parameters", *(f"seed {seed}" for seed in seeds), "mean")]
    for variant in study["variants"]:
        values = [f"{value:.3f}" for value in variant["values"]]
        rows.append((variant["label"], f"{variant['num_parameters']:,}", *values, f"{np.mean(variant['values']):.3f}"))
    return rows


_PAPER = "FlashMoBA (arXiv 2511.11571)"
_CLAIMS = (
    (
        "snr",
        "The signal-to-noise formula",
        f"Routing by block means has SNR = dmu_eff sqrt(d / 2B); an irrelevant block wins with Phi(-SNR). {_PAPER}.",
        _judge_theory,
    ),
    (
        "snr",
        "The formula on trained models",
        f"The model explains when trained routing finds the right block. {_PAPER}.",
        _judge_trained,
    ),
    (
        "block_size",
        "Smaller blocks",
        f"B=512 to 128 at equal budget lifts RULER from 38.8 to 56.0 %, perplexity 20.9 to 19.7 (340M). {_PAPER}.",
        _judge_block_size,
    ),
    (
        "key_convolution",
        "Key convolution",
        f"kconv3 lifts RULER from 56.0 to 63.9 % and LM accuracy from 45.1 to 45.6 % (340M, B=128). {_PAPER}.",
        _judge_key_convolution,
    ),
    (
        "block_size",
        "Against dense attention",
        f"With small blocks and key convolution MoBA matches dense. {_PAPER}.",
        _judge_dense,
    ),
    (
        "length",
        "Past the training length",
        f"With kconv5 retrieval stays at 100 % at 64K tokens, 8 times the training length. {_PAPER}.",
        _judge_length,
    ),
    (
        "language_model",
        "Language model on real text",
        f"Smaller blocks and key convolution lower perplexity; MoBA then matches dense attention. {_PAPER}.",
        _judge_language_model,
    ),
    (
        "efficiency",
        "Speed",
        f"Up to 14.7x FlashAttention-2 at 512K tokens on a GPU. {_PAPER}.",
        _judge_efficiency,
    ),
    (
        "comparison",
        "The systems side by side",
        "No paper's claim: what each system keeps of dense attention at an equal share of exactly attended pairs.",
        _judge_comparison,
    ),
)


def load_studies(out: Path) -> dict[str, Study]:
    """The study.json files below a preset's directory, by study."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*/study.json"))}
