"""What the studies on associative recall have in common."""

from typing import Any

from experiments.config import RunConfig


def describe_recall(base: RunConfig) -> dict[str, Any]:
    """The setting in words, the metric, and the accuracy of guessing among the values."""
    data, model = base.data, base.model
    return {
        "metric": "accuracy",
        "higher_is_better": True,
        "chance": 1 / data.num_values,
        "setting": (
            f"Associative recall of {data.num_pairs} key-value pairs in {data.sequence_length} tokens; "
            f"{model.num_layers} layers of {model.hidden_size} features, alternately a window of {model.window_size} "
            f"tokens and the attention under test; {base.train.steps} steps of {data.batch_size} sequences."
        ),
    }
