"""How much of a model is tracked: the share of its parameters in scale-invariant weights, by family of models.

    python -m benchmarks.tracked_share --out benchmarks/results/tracked-share.json

`elropt.find_scale_invariant` measures each model on random data; nothing is downloaded. What is tracked is what
`elropt.param_groups` puts into its group "scale_invariant": invariant weights with 2 or more dimensions. Whether a
weight is invariant follows from what comes after it, and not from its size. So the large models (language models,
ViTs) are measured with fewer layers of the same kind, language models with narrower ones, and counted at full size.
torchvision, timm and transformers must be installed for their models. A row has

- `family`, `model`, `package`;
- `parameters`: how many numbers are trained (a shared weight counts once); `tracked_parameters`: in tracked weights;
- `share` = tracked_parameters / parameters;
- `share_without_embeddings`: the same without the embeddings and the output layer of a language model, else None;
- `weights`, `tracked_weights`: tensors of 2 or more dimensions;
- `tracked_names`: names of the tracked weights, with `*` for the number of the layer;
- `measured_layers`: the number of layers that were measured; None: the model itself was measured.

`summary` has, for each family, the number of models, and the least and the largest `share` and
`share_without_embeddings`.
"""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.common import models
from benchmarks.common.command_line import one_of, progress_bar, show, table_of
from benchmarks.common.files import write_json
from elropt import env_report, find_scale_invariant

Row = dict[str, Any]
Measured = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
GraphLayer = Literal["gcn", "gin", "sage"]

LAYERS = 3  # that are measured of a large model: the first, one in the middle, the last
BATCH = 8
NARROW = {  # sizes of a language model that is measured; its names and what follows what are those of the model
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
SMALL_VIT = {"img_size": 32, "depth": LAYERS, "embed_dim": 24, "num_heads": 3}
SMALL_SWIN = {"img_size": 64, "embed_dim": 12, "window_size": 2}  # all layers: their names tell the stage


@dataclass(frozen=True)
class Model:
    """A model to measure.

    Attributes:
        family: of the models that are summarized together.
        package: that it is from; torch: from this file or benchmarks.common.models.
        measured: makes the model that is measured, and its arguments by position and by name.
        counted: makes the model at full size; None: that is the measured one.
    """

    family: str
    package: str
    measured: Callable[[], Measured]
    counted: Callable[[], nn.Module] | None = None


class GraphNet(nn.Module):
    """Node features [n, features] and adjacency [n, n] → [n, classes]; each layer is followed by BatchNorm and ReLU.

    "gcn": A·h·W (Kipf & Welling, 2017); "gin": an MLP with BatchNorm of h + A·h (Xu et al., 2019, with ε = 0); "sage":
    h·W₁ + A·h·W₂ (Hamilton et al., 2017). The rows of A are scaled to the sum 1.
    """

    def __init__(
        self, layer: GraphLayer, depth: int, width: int, features: int = 128, classes: int = 40
    ) -> None:
        super().__init__()
        self.layer = layer
        self.linears, self.norms, self.skips = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i in range(depth):
            ins = width if i else features
            linear = nn.Linear(ins, width)
            if layer == "gin":
                linear = nn.Sequential(linear, nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))
            self.linears.append(linear)
            self.norms.append(nn.BatchNorm1d(width))
            if layer == "sage":
                self.skips.append(nn.Linear(ins, width, bias=False))
        self.head = nn.Linear(width, classes)

    def forward(self, h: Tensor, adjacency: Tensor) -> Tensor:
        adjacency = adjacency / adjacency.sum(1, keepdim=True)
        for i, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            neighbours = adjacency @ h
            added = linear(neighbours + h if self.layer == "gin" else neighbours)
            h = F.relu(norm(added + self.skips[i](h) if self.layer == "sage" else added))
        return self.head(h)


def graph_net(family: str, layer: GraphLayer, depth: int, width: int) -> Model:
    def measured() -> Measured:
        adjacency = (torch.rand(64, 64) < 0.1).float() + torch.eye(64)
        return GraphNet(layer, depth, width), (torch.randn(64, 128), adjacency), {}

    return Model(family, "torch", measured)


def own(family: str, name: str, side: int, classes: int = 10, **options: object) -> Model:
    """A net of benchmarks.common.models, for images of `side`."""

    def build(side: int = side) -> nn.Module:
        return models.build(name, in_shape=(3, side, side), classes=classes, **options)

    def measured() -> Measured:
        small = min(side, 32)
        return build(small), (torch.randn(BATCH, 3, small, small),), {}

    return Model(family, "torch", measured, build)


def of_torchvision(family: str, name: str) -> Model:
    # On 1 x 1 pixels a depthwise convolution in front of BatchNorm has no effect, so such nets need more of them.
    side = 64 if name.startswith(("mobilenet", "efficientnet")) else 32

    def measured() -> Measured:
        from torchvision.models import get_model  # type: ignore[import-not-found]

        return get_model(name, weights=None), (torch.randn(BATCH, 3, side, side),), {}

    return Model(family, "torchvision", measured)


def of_timm(family: str, name: str, small: Mapping[str, Any] | None = None, **options: Any) -> Model:
    """`small`: what the model that is measured has otherwise."""

    def build(**sizes: Any) -> nn.Module:
        import timm  # type: ignore[import-not-found]

        return timm.create_model(name, **options, **sizes)

    def measured() -> Measured:
        sizes = small or {}
        side = sizes.get("img_size", 64 if name.startswith("efficientnet") else 32)
        return build(**sizes), (torch.randn(BATCH, 3, side, side),), {}

    return Model(family, "timm", measured, build if small else None)


def of_transformers(family: str, kind: str, auto: str = "AutoModelForCausalLM", **config: Any) -> Model:
    """`kind`: the model type; `config`: what its configuration has other than by default."""

    def build(**sizes: Any) -> nn.Module:
        import transformers  # type: ignore[import-not-found]

        made = transformers.AutoConfig.for_model(kind, **{**config, **sizes})
        return getattr(transformers, auto).from_config(made)

    def measured() -> Measured:
        import transformers  # type: ignore[import-not-found]

        has = transformers.AutoConfig.for_model(kind, **config)
        small = {name: value for name, value in NARROW.items() if getattr(has, name, None) is not None}
        small |= {"num_hidden_layers": LAYERS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        if getattr(has, "num_key_value_heads", None) == has.num_attention_heads:
            small["num_key_value_heads"] = small["num_attention_heads"]
        if getattr(has, "num_decoder_layers", None):
            small["num_decoder_layers"] = LAYERS
        if getattr(has, "layer_types", None):
            small["layer_types"] = has.layer_types[:LAYERS]
        tokens = torch.randint(3, NARROW["vocab_size"], (BATCH, 12))
        call = {"input_ids": tokens}
        if getattr(has, "is_encoder_decoder", False):
            call["decoder_input_ids"] = tokens.flip(0)
        return build(**small, use_cache=False), (), call

    def counted() -> nn.Module:
        with torch.device("meta"):
            return build()

    return Model(family, "transformers", measured, counted)


CONV_BN = "conv nets with BatchNorm"
CONV_OTHER = "conv nets with GroupNorm or LayerNorm"
GRAPH = "graph nets with BatchNorm"
MLP = "MLPs with BatchNorm"
VIT = "ViTs, pre-norm"
VIT_QK = "ViTs, pre-norm with QK-norm"
VIT_OUTPUT = "ViTs with norms on the outputs of blocks"
BERT = "language models, norm after the skip (BERT)"
PRE_NORM = "language models, pre-norm"
LM_QK = "language models, pre-norm with QK-norm"
LM_OUTPUT = "language models with norms on the outputs of blocks"

MODELS: dict[str, Model] = {
    **{
        name: of_torchvision(CONV_BN, name)
        for name in (
            "resnet18",
            "resnet50",
            "wide_resnet50_2",
            "regnet_y_400mf",
            "densenet121",
            "mobilenet_v2",
            "mobilenet_v3_large",
            "efficientnet_b0",
            "vgg16_bn",
        )
    },
    "resnetv2_50": of_timm(CONV_BN, "resnetv2_50"),
    "plain-56": own(CONV_BN, "plain-56", 32),
    "resnet50_gn": of_timm(CONV_OTHER, "resnet50_gn"),
    "resnetv2_50x1_bit": of_timm(CONV_OTHER, "resnetv2_50x1_bit"),
    "efficientnet_b0_gn": of_timm(CONV_OTHER, "efficientnet_b0_gn"),
    "convnext_tiny": of_timm(CONV_OTHER, "convnext_tiny"),
    "gcn-3": graph_net(GRAPH, "gcn", 3, 256),
    "gin-5": graph_net(GRAPH, "gin", 5, 300),
    "sage-3": graph_net(GRAPH, "sage", 3, 256),
    "bn-mlp-30": own(MLP, "bn-mlp-30", 8),
    "vit_base_patch16_224": of_timm(VIT, "vit_base_patch16_224", SMALL_VIT),
    "swin_tiny_patch4_window7_224": of_timm(VIT, "swin_tiny_patch4_window7_224", SMALL_SWIN),
    "vit_base_patch16_224, qk_norm": of_timm(VIT_QK, "vit_base_patch16_224", SMALL_VIT, qk_norm=True),
    "vit-s-16, qk_norm, separate queries and keys": own(
        VIT_QK, "vit-s-16", 224, classes=1000, qk_norm=True, qk_bias=False
    ),
    "vit_base_patch16_rpn_224": of_timm(VIT_OUTPUT, "vit_base_patch16_rpn_224", SMALL_VIT),
    "swinv2_tiny_window8_256": of_timm(VIT_OUTPUT, "swinv2_tiny_window8_256", SMALL_SWIN),
    "bert-base": of_transformers(BERT, "bert", "AutoModelForMaskedLM"),
    "roberta-base": of_transformers(
        BERT, "roberta", "AutoModelForMaskedLM", vocab_size=50265, max_position_embeddings=514
    ),
    "gpt2": of_transformers(PRE_NORM, "gpt2"),
    "pythia-160m": of_transformers(
        PRE_NORM,
        "gpt_neox",
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=50304,
    ),
    "t5-small": of_transformers(PRE_NORM, "t5", "AutoModelForSeq2SeqLM"),
    "llama-3.2-1b": of_transformers(
        PRE_NORM,
        "llama",
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "qwen3-0.6b": of_transformers(
        LM_QK,
        "qwen3",
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": of_transformers(
        LM_QK,
        "qwen3",
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=False,
    ),
    "olmo2-1b": of_transformers(
        LM_OUTPUT,
        "olmo2",
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=100352,
    ),
    "olmo2-7b": of_transformers(
        LM_OUTPUT,
        "olmo2",
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=100352,
    ),
    "gemma2-2b": of_transformers(
        LM_OUTPUT,
        "gemma2",
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=256000,
    ),
    "gemma3-1b": of_transformers(
        LM_OUTPUT,
        "gemma3_text",
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=262144,
    ),
}


def kinds_of(model: Model) -> tuple[dict[str, Any], nn.Module]:
    """The kind of every parameter of the model that is measured, and that model."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of eps: the images and tokens are random
        torch.manual_seed(0)
        net, inputs, named_inputs = model.measured()
        outputs = (lambda out: out.logits) if model.package == "transformers" else None
        return {**find_scale_invariant(net, *inputs, outputs=outputs, **named_inputs)}, net


def measured_name(name: str, layers: int, measured_layers: int) -> str:
    """The name in the model with fewer layers: the first and the last stay so, the others are the second."""

    def of_layer(match: re.Match[str]) -> str:
        layer = int(match[1])
        return f".{0 if layer == 0 else measured_layers - 1 if layer == layers - 1 else 1}."

    return re.sub(r"\.(\d+)\.", of_layer, name, count=1)


def layers_of(names: Iterable[str]) -> int:
    return 1 + max(int(number) for name in names for number in re.findall(r"\.(\d+)\.", name)[:1])


def embedding_names(net: nn.Module) -> set[str]:
    """Parameters of embeddings and of the output layer of a model of transformers."""
    output = net.get_output_embeddings().weight  # type: ignore[operator]
    owners = [(name, module) for name, module in net.named_modules() if isinstance(module, nn.Embedding)]
    found = {f"{name}.{parameter}" for name, module in owners for parameter, _ in module.named_parameters()}
    return found | {name for name, parameter in net.named_parameters() if parameter is output}


def row_of(name: str, model: Model) -> Row:
    kinds, net = kinds_of(model)
    full = model.counted() if model.counted else net
    parameters = dict(full.named_parameters())
    shrunk = len(parameters) != len(kinds)
    source = {n: n for n in parameters}
    if shrunk:
        depths = layers_of(parameters), layers_of(kinds)
        source = {n: measured_name(n, *depths) for n in parameters}
    weights = {n for n, parameter in parameters.items() if parameter.ndim >= 2}
    tracked = {n for n in weights if kinds[source[n]] is not None}
    embeddings = embedding_names(full) if model.package == "transformers" else None

    def numbers(names: Iterable[str]) -> int:
        return sum(parameters[n].numel() for n in names)

    return {
        "family": model.family,
        "model": name,
        "package": model.package,
        "parameters": numbers(parameters),
        "tracked_parameters": numbers(tracked),
        "share": numbers(tracked) / numbers(parameters),
        "share_without_embeddings": None
        if embeddings is None
        else numbers(tracked - embeddings) / numbers(set(parameters) - embeddings),
        "weights": len(weights),
        "tracked_weights": len(tracked),
        "tracked_names": sorted({re.sub(r"\.\d+(?=\.)", ".*", n) for n in tracked}),
        "measured_layers": LAYERS if shrunk else None,
    }


def summarized(rows: Iterable[Row]) -> dict[str, Any]:
    """For each family: the number of models, least and largest shares."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row["family"], []).append(row)
    return {
        family: {
            "models": len(members),
            **{
                share: [min(values), max(values)] if None not in values else None
                for share in ("share", "share_without_embeddings")
                for values in [[row[share] for row in members]]
            },
        }
        for family, members in families.items()
    }


def results_table(rows: Iterable[Row]) -> Table:
    """Shares in %."""
    table = table_of(
        "tracked parameters in %", "model", "all", "without embeddings", "weights", "tracked", wrap=True
    )
    for row in rows:
        without = row["share_without_embeddings"]
        table.add_row(
            f"{row['model']} ({row['family']})",
            show(100 * row["share"], ".1f"),
            show(None if without is None else 100 * without, ".1f"),
            str(row["weights"]),
            str(row["tracked_weights"]),
        )
    return table


def families_table(summary: Mapping[str, Any]) -> Table:
    """The least and the largest share of each family, in %."""
    table = table_of(
        "tracked parameters by family, in %", "family", "models", "all", "without embeddings", wrap=True
    )
    for family, of_family in summary.items():
        shares = (of_family["share"], of_family["share_without_embeddings"])
        table.add_row(family, str(of_family["models"]), *(range_of(share) for share in shares))
    return table


def range_of(share: Sequence[float] | None) -> str:
    """Least and largest share, in %."""
    if share is None:
        return "–"
    low, high = (f"{100 * value:.0f}" for value in share)
    return low if low == high else f"{low} to {high}"


def main(
    model: Annotated[
        list[str] | None, typer.Option(help="Models to measure; all by default.", callback=one_of(MODELS))
    ] = None,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("runs/tracked-share.json"),
) -> None:
    """The share of parameters that are tracked, by family of models. Minutes on a CPU.

    Example: python -m benchmarks.tracked_share --model resnet50 --model gcn-3
    """
    console = Console()
    rows = []
    with progress_bar(console) as progress:
        for name in progress.track(model or list(MODELS), description="models"):
            rows.append(row_of(name, MODELS[name]))
            console.print(f"{name}: {100 * rows[-1]['share']:.1f} %")
    env = env_report.collect()
    env |= {
        package: importlib.metadata.version(package)
        for package in sorted({row["package"] for row in rows} - {"torch"})
    }
    report = {"kind": "tracked-share", "env": env, "summary": summarized(rows), "rows": rows}
    write_json(out, report, indent=1)
    console.print(results_table(rows))
    console.print(families_table(report["summary"]))
    console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
