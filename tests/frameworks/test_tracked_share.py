"""A language model that is measured with few, narrow layers has the kinds of the model itself."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.tracked_share import LM_OUTPUT, MODELS, of_transformers, row_of
from elropt import find_scale_invariant

pytest.importorskip("transformers")
RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "tracked-share.json"
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "vocab_size": 50,
}


@pytest.mark.parametrize("kind", ["olmo2", "gemma2"])
def test_few_narrow_layers_stand_for_all(kind: str) -> None:
    import transformers

    row = row_of("a model", of_transformers(LM_OUTPUT, kind, **SIZES))
    net = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **SIZES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of eps
        kinds = find_scale_invariant(
            net, input_ids=torch.randint(3, 50, (8, 12)), use_cache=False, outputs=lambda out: out.logits
        )
    parameters = dict(net.named_parameters())
    tracked = [parameters[name] for name, found in kinds.items() if found and parameters[name].ndim >= 2]
    assert len(tracked) == row["tracked_weights"] > 5
    assert sum(weight.numel() for weight in tracked) == row["tracked_parameters"]
    assert sum(parameter.numel() for parameter in net.parameters()) == row["parameters"]


def test_committed_row_is_measured_again() -> None:
    """Queries and keys alone, and 0.6 billion parameters as its name says."""
    rows = {row["model"]: row for row in json.loads(RESULT.read_text(encoding="utf-8"))["rows"]}
    row = row_of("qwen3-0.6b", MODELS["qwen3-0.6b"])
    assert row == rows["qwen3-0.6b"]
    assert row["tracked_parameters"] == 28 * 1024 * 128 * (16 + 8)
    assert row["parameters"] == pytest.approx(0.6e9, rel=0.01)
