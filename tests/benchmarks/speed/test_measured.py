"""The tables of the docs hold what the committed result files hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RESULT = json.loads((ROOT / "benchmarks" / "results" / "step-time-h200.json").read_text(encoding="utf-8"))
ROWS = {(row["workload"], row["optimizer"]): row for row in RESULT["rows"]}
NAMES = {
    "ResNet-50": "resnet-50",
    "ViT-B/16": "vit-b-16",
    "decoder, 1 B": "decoder-1b",
    "the same in bfloat16": "decoder-1b-bf16",
    "ResNet-56 (on chip)": "resnet-56",
    "2,000 small tensors": "2000-tensors",
}


COLUMNS = ("elr-none", "elr-warmup", "elr-uniform", "elr-project", "torch-foreach", "timm-lars")


def cells_of(document: str, heading: str, first: str) -> list[str]:
    """The cells of the row that begins with the cell `first`, in the first such table after a heading."""
    text = (ROOT / document).read_text(encoding="utf-8").split(f"\n## {heading}")[1]
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def ratio(workload: str, optimizer: str, mode: str = "graph") -> str:
    """Median time over that of torch's fused SGD."""
    mine, base = (ROWS[workload, name][mode]["us"][1] for name in (optimizer, "torch-fused"))
    return f"{mine / base:.2f}"


@pytest.mark.parametrize("shown", NAMES)
def test_step_times(shown: str) -> None:
    workload = NAMES[shown]
    base = ROWS[workload, "torch-fused"]
    _, size, time, *ratios, of_copy = cells_of("docs/kernels.md", "12. ", shown)
    assert size == f"{base['tensors']:,}; {base['elements'] / 1e6:,.1f}"
    assert time == f"{base['graph']['us'][1]:,.1f}"
    for cell, name in zip(ratios, COLUMNS, strict=True):
        assert cell == ("–" if (workload, name) not in ROWS else ratio(workload, name))
    shares = [100 * ROWS[workload, name]["graph"]["of_copy"] for name in ("elr-none", "elr-uniform")]
    assert of_copy == ", ".join(f"{share:.0f} %" for share in shares)


CPU = json.loads((ROOT / "benchmarks" / "results" / "host-time-cpu-steps.json").read_text(encoding="utf-8"))
CPU_CASES = {
    "a 30-layer BN-MLP of width 128": "bn-mlp-30",
    "ResNet-50": "resnet-50",
    "ResNet-50, at most 4 elements each way": "resnet-50, cut down",
}


@pytest.mark.parametrize("shown", CPU_CASES)
def test_steps_on_the_cpu(shown: str) -> None:
    _, *cells = cells_of("docs/kernels.md", "13. ", shown)
    ratios = {row["optimizer"]: row["ratio"][1] for row in CPU["rows"] if row["case"] == CPU_CASES[shown]}
    columns = (
        "torch-foreach",
        "torch-fused",
        "elr-none",
        "elr-warmup",
        "elr-uniform",
        "elr-angle",
        "elr-sphere",
    )
    assert cells == [f"{ratios[optimizer]:.2f}" for optimizer in columns]


def test_many_groups_on_the_cpu() -> None:
    path = ROOT / "benchmarks" / "results" / "host-time-cpu-groups.json"
    ratios = {
        row["optimizer"]: row["ratio"][1] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
    }
    section = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").split("\n## 13. ")[1]
    assert f'"uniform" takes {ratios["elr-uniform, 1"]:.2f} times' in section
    more = {
        name: f"{ratios[name + ', 160'] / ratios[name + ', 1']:.2f}" for name in ("elr-none", "elr-uniform")
    }
    assert f"take {more['elr-none']} times the time without a rule, and {more['elr-uniform']} with" in section
    assert f"torch's for-loop {ratios['torch-loop, 160']:.2f}" in section


def host_cell(optimizer: str, mode: str) -> str:
    """A ratio with its interval, as the docs show it."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "host-h200.json").read_text(encoding="utf-8"))[
        "rows"
    ]
    (row,) = (row for row in rows if (row["workload"], row["optimizer"]) == ("160x4", optimizer))
    low, high = row[f"{mode}_ratio"]["interval"]
    return f"{row[f'{mode}_ratio']['median']:.2f} [{low:.2f}, {high:.2f}]"


@pytest.mark.parametrize(
    ("shown", "mode"), [("until `step()` returns", "cpu"), ("issued without waiting", "eager")]
)
def test_host_times(shown: str, mode: str) -> None:
    _, *cells = cells_of("docs/kernels.md", "12. ", shown)
    optimizers = ("elr-none", "elr-warmup", "elr-uniform", "torch-foreach")
    assert cells == [host_cell(optimizer, mode) for optimizer in optimizers]
