"""The report's figures, drawn from study.json files alone."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.findings import Study
from sparse_attn import BlockSelection
from sparse_attn.inspect import draw_selection

BLUE, ORANGE, GREY, GREEN = "#2563a8", "#d9742b", "#8a8f98", "#3a8f5c"


def draw_all(studies: dict[str, Study], directory: Path) -> dict[str, Path]:
    """Draws a figure for each study that is there, a summary of four and a selection; gives the PNG files by name."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, panels in _FIGURES.items():
        present = [(panel, studies[study]) for study, panel in panels if study in studies]
        if not present or (name == "summary" and len(present) < len(panels)):
            continue
        rows = 2 if len(present) == 4 else 1
        figure = Figure(figsize=(5.2 * len(present) / rows, 3.6 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (panel, study) in zip(np.ravel(figure.subplots(rows, len(present) // rows)), present, strict=True):
            panel(axes, study)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, linewidth=0.6)
        paths[name] = directory / f"{name}.png"
        figure.savefig(paths[name], dpi=150)
    if "comparison" in studies:
        drawn = studies["comparison"]["selection"]
        selection = BlockSelection(jnp.array(drawn["indices"], jnp.int32), drawn["block_size"], drawn["num_blocks"])
        paths["selection"] = directory / "selection.png"
        draw_selection(selection).savefig(paths["selection"], dpi=150)
    return paths


def _theory(axes: Axes, study: Study) -> None:
    points = study["monte_carlo"]
    limit = 1.1 * max(max(row["snr_theory"], row["snr_measured"]) for row in points)
    axes.plot([0, limit], [0, limit], color=GREY, linewidth=1, label="equal")
    axes.errorbar(
        [row["snr_theory"] for row in points],
        [row["snr_measured"] for row in points],
        [2 * row["snr_spread"] for row in points],
        fmt="o",
        color=BLUE,
        markersize=4,
        label="drawn (2 standard errors)",
    )
    axes.set(xlabel="SNR by the formula", ylabel="SNR measured", title="Signal-to-noise: theory and draws")
    axes.legend(frameon=False)


def _recall_theory(axes: Axes, study: Study) -> None:
    points = sorted(study["monte_carlo"], key=lambda row: row["snr_theory"])
    snrs = [row["snr_theory"] for row in points]
    axes.plot(snrs, [row["recall_theory"] for row in points], color=GREY, label="theory")
    measured, errors = ([row[f"recall_{name}"] for row in points] for name in ("measured", "spread"))
    axes.errorbar(snrs, measured, 2 * np.array(errors), fmt="o", color=BLUE, markersize=4, label="through the router")
    k, n = points[0]["top_k"], points[0]["num_blocks"]
    axes.set(xlabel="SNR", ylabel=f"recall@{k} of {n} blocks", ylim=(0, 1.05), title="Recall by SNR")
    axes.legend(frameon=False)


def _trained(axes: Axes, study: Study) -> None:
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1)
    variants = sorted({row["variant"] for row in study["trained"]})
    for index, variant in enumerate(variants):
        rows = [row for row in study["trained"] if row["variant"] == variant]
        predicted, measured = ([row[f"recall_{name}"] for row in rows] for name in ("predicted", "measured"))
        axes.scatter(predicted, measured, s=22, color=f"C{index}", label=variant, alpha=0.85)
    correlation = study["correlation"]
    title = "Trained heads" + (f": correlation {correlation:.2f}" if correlation is not None else "")
    axes.set(xlabel="recall the model predicts", ylabel="recall measured", title=title, xlim=(0, 1.03), ylim=(0, 1.03))
    axes.legend(frameon=False, fontsize=7)


def _block_size(axes: Axes, study: Study) -> None:
    moba = sorted((v for v in study["variants"] if v["kind"] == "moba"), key=lambda variant: -variant["block_size"])
    dense = next(variant for variant in study["variants"] if variant["kind"] == "dense")
    _line_over_seeds(
        axes, [f"{v['block_size']}\n(top {v['top_k']})" for v in moba], [v["values"] for v in moba], "MoBA"
    )
    axes.axhline(np.mean(dense["values"]), color=ORANGE, linewidth=1.5, label="dense")
    axes.axhline(study["chance"], color=GREY, linewidth=1, linestyle=":", label="chance")
    axes.set(
        xlabel=f"block size (tokens), budget {study['budget']} tokens", ylabel="recall accuracy", title="Smaller blocks"
    )
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False)


def _key_convolution(axes: Axes, study: Study) -> None:
    variants = sorted(study["variants"], key=lambda variant: variant["key_conv_width"])
    labels = [str(variant["key_conv_width"] or "none") for variant in variants]
    axes.bar(labels, [np.mean(variant["values"]) for variant in variants], color=GREEN, alpha=0.55, width=0.6)
    for place, variant in enumerate(variants):
        axes.scatter([place] * len(variant["values"]), variant["values"], color=GREEN, s=20, zorder=3)
    axes.axhline(study["chance"], color=GREY, linewidth=1, linestyle=":", label="chance")
    block = f"B={variants[0]['block_size']}, k={variants[0]['top_k']}"
    axes.set(
        xlabel="width of the key convolution (tokens)", ylabel="recall accuracy", title=f"Key convolution, {block}"
    )
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False)


def _length(axes: Axes, study: Study) -> None:
    for index, variant in enumerate(study["variants"]):
        color = ORANGE if variant["kind"] == "dense" else f"C{index}"
        values = np.array(variant["values_by_length"])  # [seeds, lengths]
        axes.plot(variant["lengths"], values.mean(0), marker="o", color=color, label=variant["label"])
        axes.fill_between(variant["lengths"], values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axes.axvline(study["training_length"], color=GREY, linewidth=1, linestyle=":")
    axes.set(
        xscale="log", xlabel="sequence length (tokens)", ylabel="recall accuracy", title="Past the training length"
    )
    lengths = study["variants"][0]["lengths"]
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False, fontsize=7)


def _language_model(axes: Axes, study: Study) -> None:
    labels = [variant["label"].replace(", ", "\n", 1) for variant in study["variants"]]
    _line_over_seeds(axes, labels, [variant["values"] for variant in study["variants"]], None)
    axes.set(ylabel="validation bits per byte", title="Language model (fewer are better)")
    axes.tick_params(axis="x", labelsize=8)


def _time(axes: Axes, study: Study) -> None:
    for name, color in (("moba", BLUE), ("dense", ORANGE), ("torch", GREY)):
        for passes, style in (("forward", "-"), ("forward+backward", "--")):
            rows = [row for row in study["rows"] if row["pass"] == passes and row[f"{name}_ms"]]
            if rows:
                label = {"moba": "MoBA", "dense": "dense (jax.nn)", "torch": "PyTorch"}[name] + f", {passes}"
                lengths, times = ([row[key] for row in rows] for key in ("sequence_length", f"{name}_ms"))
                axes.plot(lengths, times, style, marker="o", markersize=3.5, color=color, label=label)
    axes.set(yscale="log", ylabel="time (ms)", title="Time")
    _finish_lengths(axes, study)


def _memory(axes: Axes, study: Study) -> None:
    for name, color in (("moba", BLUE), ("dense", ORANGE)):
        for passes, style in (("forward", "-"), ("forward+backward", "--")):
            rows = [row for row in study["rows"] if row["pass"] == passes and row[f"{name}_temp_mib"]]
            lengths, sizes = ([row[key] for row in rows] for key in ("sequence_length", f"{name}_temp_mib"))
            label = f"{'MoBA' if name == 'moba' else 'dense'}, {passes}"
            axes.plot(lengths, sizes, style, marker="o", markersize=3.5, color=color, label=label)
    axes.set(yscale="log", ylabel="temporary memory (MiB)", title="Memory")
    _finish_lengths(axes, study)


def _finish_lengths(axes: Axes, study: Study) -> None:
    """A logarithmic axis of sequence lengths, and a legend above the lines."""
    lengths = sorted({row["sequence_length"] for row in study["rows"]})
    axes.set(xscale="log", xlabel="sequence length (tokens)")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(top=8 * axes.get_ylim()[1])
    axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper left")


def _league(axes: Axes, study: Study, is_causal: bool) -> None:
    rows = [row for row in study["rows"] if row["is_causal"] == is_causal]
    models = list(dict.fromkeys(row["model"] for row in rows))
    errors = {model: {row["system"]: row["error"] for row in rows if row["model"] == model} for model in models}
    systems = sorted(errors[models[0]], key=lambda system: -errors[models[0]][system])
    for index, (model, color) in enumerate(zip(models, (BLUE, ORANGE), strict=False)):
        places = [place + 0.35 * (0.5 - index) for place in range(len(systems))]
        axes.barh(places, [errors[model][system] for system in systems], 0.35, color=color, label=model)
    axes.set_yticks(range(len(systems)), systems)
    axes.set(xlabel="output error against dense", title="Causal systems" if is_causal else "Systems without a mask")
    axes.legend(frameon=False, fontsize=7)


def _causal_league(axes: Axes, study: Study) -> None:
    _league(axes, study, is_causal=True)


def _open_league(axes: Axes, study: Study) -> None:
    _league(axes, study, is_causal=False)


def _line_over_seeds(axes: Axes, labels: list[str], values: list[list[float]], name: str | None) -> None:
    """Every seed a point, the means joined."""
    places = range(len(labels))
    axes.plot(places, [np.mean(each) for each in values], color=BLUE, marker="_", markersize=14, label=name)
    for place, each in zip(places, values, strict=True):
        axes.scatter([place] * len(each), each, color=BLUE, s=20, alpha=0.7, zorder=3)
    axes.set_xticks(places, labels)


_Panel = Callable[[Axes, Study], None]
_FIGURES: dict[str, tuple[tuple[str, _Panel], ...]] = {
    "summary": (
        ("snr", _theory),
        ("block_size", _block_size),
        ("key_convolution", _key_convolution),
        ("efficiency", _time),
    ),
    "snr": (("snr", _theory), ("snr", _recall_theory), ("snr", _trained)),
    "block_size": (("block_size", _block_size),),
    "key_convolution": (("key_convolution", _key_convolution),),
    "length": (("length", _length),),
    "language_model": (("language_model", _language_model),),
    "efficiency": (("efficiency", _time), ("efficiency", _memory)),
    "comparison": (("comparison", _causal_league), ("comparison", _open_league)),
}
