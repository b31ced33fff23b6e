"""How far past their training length do the models of the block size study still recall?"""

from pathlib import Path
from typing import Any

from experiments.config import to_dict
from experiments.data import make_data
from experiments.evaluate import at_length, evaluate
from experiments.preset import Preset
from experiments.studies import block_size
from experiments.studies.variants import write_study
from experiments.train import load_run


def run(preset: Preset, out: Path) -> dict[str, Any]:
    """Evaluates the models of the block size study at the preset's lengths; writes length/study.json.

    A longer sequence has as many pairs to recall and more filler between them.
    """
    base = preset.recall
    settings = {
        "base": to_dict(base),
        "seeds": preset.recall_seeds,
        "block_sizes": preset.block_sizes,
        "lengths": preset.lengths,
    }

    def measure() -> dict[str, Any]:
        trained = block_size.run(preset, out)
        variants = []
        for variant in trained["variants"]:
            by_seed = []
            for directory in variant["runs"]:
                config, model = load_run(out / directory)
                data = [make_data(at_length(config.data, length), config.seed, out) for length in preset.lengths]
                by_seed.append([evaluate(model, each, config.train.evaluate_batches)["accuracy"] for each in data])
            final = [accuracies[-1] for accuracies in by_seed]
            variants.append({**variant, "values": final, "lengths": preset.lengths, "values_by_length": by_seed})
        common = {key: trained[key] for key in ("metric", "higher_is_better", "chance", "setting")}
        return {**common, "training_length": base.data.sequence_length, "variants": variants}

    return write_study(out, "length", preset.name, settings, measure)
