"""The tables of the docs hold what the committed result files hold."""

from __future__ import annotations

import json
import re
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
    for cell, name in zip(ratios, ("elr-none", "elr-warmup", "elr-uniform", "elr-project"), strict=True):
        assert cell == ("–" if (workload, name) not in ROWS else ratio(workload, name))
    shares = [100 * ROWS[workload, name]["graph"]["of_copy"] for name in ("elr-none", "elr-uniform")]
    assert of_copy == ", ".join(f"{share:.0f} %" for share in shares)


def test_readme() -> None:
    """Every ratio of the README's table is one of the file's, of the right workload."""
    for shown, workloads in {
        "ResNet-50": ("resnet-50",),
        "ViT-B/16": ("vit-b-16",),
        "a decoder of 1.1 billion parameters; in bfloat16": ("decoder-1b", "decoder-1b-bf16"),
        "ResNet-56, one launch": ("resnet-56",),
    }.items():
        _, none, rules, lars, foreach = cells_of("README.md", "Kernels", shown)
        assert none.split("; ") == [ratio(workload, "elr-none") for workload in workloads]
        measured = {ratio(w, name) for w, name in ROWS if w in workloads and name.startswith("elr-")}
        assert set(re.findall(r"\d\.\d\d", rules)) <= measured
        for cell, name in ((lars, "timm-lars"), (foreach, "torch-foreach")):
            known = (workloads[0], name) in ROWS
            assert (
                float(cell) == pytest.approx(float(ratio(workloads[0], name)), abs=0.05)
                if known
                else cell == "–"
            )


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
