import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common.models import FROZEN_HEAD_NORM, MODELS, PadShortcut, TransformerBlock, build
from elropt import find_scale_invariant

CIFAR, IMAGENET, DIGITS = (3, 32, 32), (3, 224, 224), (1, 8, 8)

SMALL = [
    ("mlp-6-w32", DIGITS),
    ("bn-mlp-6-w32", DIGITS),
    ("ln-mlp-6-w32", DIGITS),
    ("conv-5-w8", DIGITS),
    ("conv-9-w4", (3, 18, 18)),
    ("plain-8-w8", DIGITS),
    ("plain-14-w4", (3, 15, 15)),
    ("resnet-14-w4", (3, 15, 15)),
    ("resnet-18-w4", (3, 32, 32)),
    ("resnet-34-w4", (3, 32, 32)),
    ("resnet-50-w4", (3, 72, 72)),
    ("vgg-16-bn-w4", (3, 32, 32)),
    ("vit-s-8-w64", (3, 32, 32)),
    ("vit-b-16-w64", (3, 32, 32)),
    ("ln-transformer-2-w32", DIGITS),
]
NORMALIZED = [case for case in SMALL if not case[0].startswith(("mlp", "vit", "ln-transformer"))]
CONVOLUTIONAL = [case for case in SMALL if "mlp" not in case[0]]


def on_meta(name, in_shape, classes, **overrides):
    with torch.device("meta"):
        return build(name, in_shape=in_shape, classes=classes, **overrides)


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "in_shape", "classes", "count"),
    [
        # He et al. (2016), table 6, to two digits (0.27 M, 0.85 M, 1.7 M); exact with option A by hand below.
        ("resnet-20", CIFAR, 10, 269_722),
        ("resnet-56", CIFAR, 10, 853_018),
        ("resnet-110", CIFAR, 10, 1_727_962),
        ("plain-20", CIFAR, 10, 269_722),
        ("plain-110", CIFAR, 10, 1_727_962),
        # torchvision's model pages; with the 3×3 stem for CIFAR a 7×7 stem less: 64·3·(49 − 9) weights.
        ("resnet-18", IMAGENET, 1000, 11_689_512),
        ("resnet-34", IMAGENET, 1000, 21_797_672),
        ("resnet-50", IMAGENET, 1000, 25_557_032),
        ("resnet-18", CIFAR, 10, 11_689_512 - 64 * 3 * 40 - 990 * 513),
        # torchvision's vgg16_bn has 138,365,992: less its three linear layers, the 4,224 convolution biases.
        (
            "vgg-16-bn",
            CIFAR,
            10,
            138_365_992 - (25_088 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000) - 4224 + 5130,
        ),
        # timm and torchvision.
        ("vit-s-16", IMAGENET, 1000, 22_050_664),
        ("vit-b-16", IMAGENET, 1000, 86_567_656),
    ],
)
def test_parameter_counts_are_the_published_ones(name, in_shape, classes, count):
    assert parameter_count(on_meta(name, in_shape, classes)) == count


def test_cifar_resnet_parameter_count_by_hand():
    convolutions = 3 * 16 * 9 + 6 * 16 * 16 * 9 + (16 + 5 * 32) * 32 * 9 + (32 + 5 * 64) * 64 * 9
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    assert convolutions + norms + 65 * 10 == 269_722


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("vit")])
def test_patch_side_is_the_number_in_a_vits_name(name):
    model = on_meta(name.replace("N", "4"), CIFAR, 10)
    assert model.position.shape[1] == 1 + 8 * 8
    assert model.patch_embedding.kernel_size == (4, 4)


@pytest.mark.parametrize(
    ("name", "in_shape", "layers"),
    [
        ("mlp-2", DIGITS, 2),
        ("bn-mlp-30", DIGITS, 30),
        ("conv-5", CIFAR, 5),
        ("conv-6", CIFAR, 6),
        ("conv-7", CIFAR, 7),
        ("conv-8", DIGITS, 8),
        ("plain-8", CIFAR, 8),
        ("plain-20", CIFAR, 20),
        ("plain-38", CIFAR, 38),
        ("resnet-56", CIFAR, 56),
        ("resnet-18", CIFAR, 18),
        ("resnet-34", CIFAR, 34),
        ("resnet-50", IMAGENET, 50),
    ],
)
def test_number_in_the_name_counts_the_layers_with_weights(name, in_shape, layers):
    modules = on_meta(name, in_shape, 10).named_modules()
    assert layers == sum(
        isinstance(module, nn.Linear | nn.Conv2d) for path, module in modules if "shortcut" not in path
    )


@pytest.mark.parametrize(("name", "in_shape"), SMALL)
def test_logits_and_gradients(name, in_shape):
    torch.manual_seed(0)
    model = build(name, in_shape=in_shape, classes=7)
    logits = model(torch.randn(6, *in_shape))
    assert logits.shape == (6, 7)
    assert logits.isfinite().all()
    F.cross_entropy(logits, torch.arange(6)).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("key.bias"):  # adds the same to all scores of a query: no effect at all
            continue
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.norm() > 0, parameter_name


@pytest.mark.parametrize(("name", "in_shape"), CONVOLUTIONAL)
def test_channels_last_gives_the_same(name, in_shape):
    torch.manual_seed(0)
    model = build(name, in_shape=in_shape, classes=5).double()
    images = torch.randn(4, *in_shape, dtype=torch.float64)

    def run():
        logits = model(images)
        return logits, torch.autograd.grad(logits.square().sum(), list(model.parameters()))

    logits, gradients = run()
    images = images.to(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    logits_channels_last, gradients_channels_last = run()
    torch.testing.assert_close(logits_channels_last, logits)
    for left, right in zip(gradients_channels_last, gradients, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize(
    "name", ["mlp-4-w512", "bn-mlp-4-w512", "conv-5-w32", "plain-20-w64", "resnet-18", "vgg-16-bn"]
)
def test_initial_variance_is_2_over_fan_in_and_1_over_fan_in_for_the_head(name):
    torch.manual_seed(0)
    model = build(name, in_shape=CIFAR, classes=100)
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        fan_in, count = module.weight[0].numel(), module.weight.numel()
        expected = (1 if path == "head" else 2) / fan_in
        deviations = 5 * math.sqrt(
            2 / count
        )  # the sample variance of n normals has relative deviation √(2/n)
        assert module.weight.var().item() == pytest.approx(expected, rel=deviations), path
        assert abs(module.weight.mean().item()) < 5 * math.sqrt(expected / count), path
        if path == "head":
            assert not module.bias.any()
        else:
            assert module.bias is None, path


def test_vit_initialization():
    torch.manual_seed(0)
    model = build("vit-s-4", in_shape=CIFAR, classes=10, depth=2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = 1 / math.sqrt(48) if name == "patch_embedding.weight" else 0.02
            deviations = 5 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(std, rel=deviations), name


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize(("name", "in_shape"), NORMALIZED)
def test_scale_invariant_nets(name, in_shape, norm):
    torch.manual_seed(0)
    model = build(name, in_shape=in_shape, classes=5, norm=norm, scale_invariant=True).double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm):
            assert module.weight is None
            assert module.bias is None
            module.eps = 1e-30
    assert not model.head.weight.requires_grad
    assert model.head.bias is None
    torch.testing.assert_close(model.head.weight.norm().item(), FROZEN_HEAD_NORM, atol=0, rtol=1e-6)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    images = torch.rand(4, *in_shape, dtype=torch.float64) + 0.5
    logits = model(images)
    for index, parameter in enumerate(trainable):
        parameter.data.mul_(0.5 + index / len(trainable))
    torch.testing.assert_close(model(images), logits)


def test_scale_invariance_takes_a_normalization():
    with pytest.raises(ValueError, match="needs normalization: choose norm 'batch' or 'layer'"):
        build("mlp-4", in_shape=DIGITS, classes=10, scale_invariant=True)


def test_bn_mlp_against_the_formula():
    torch.manual_seed(0)
    model = build("bn-mlp-4", in_shape=DIGITS, classes=10, width=16).double()
    x = images = torch.randn(12, *DIGITS, dtype=torch.float64)
    x = x.reshape(12, 64)
    for index in range(1, 4):
        x = x @ model.get_submodule(f"layer{index}.linear").weight.T
        x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
        x = x.clamp_min(0)
    torch.testing.assert_close(model(images), x @ model.head.weight.T)


def test_option_a_shortcut():
    images = torch.randn(2, 4, 5, 5)
    padded = PadShortcut(new_channels=4, stride=2)(images)
    assert padded.shape == (2, 8, 3, 3)
    for row in range(3):
        for column in range(3):
            assert torch.equal(padded[:, :4, row, column], images[:, :, 2 * row, 2 * column])
    assert not padded[:, 4:].any()


def test_resnet_blocks_add_their_shortcut():
    """A branch that is −0.1 everywhere takes 0.1 from its input, down to 0; six such blocks take 0.6."""
    torch.manual_seed(0)
    model = build("resnet-14-w4", in_shape=(3, 16, 16), classes=5).double()
    for path, module in model.named_modules():
        if path.endswith("branch.1.norm"):
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, -0.1)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    features = (model.stem(images)[:, :, ::4, ::4] - 0.6).clamp_min(0).mean((2, 3))
    torch.testing.assert_close(model(images), features @ model.head.weight[:, :4].T)


def test_plain_net_is_the_resnet_without_its_shortcuts():
    torch.manual_seed(0)
    residual = build("resnet-14-w4", in_shape=(3, 16, 16), classes=5).double()
    plain = build("plain-14-w4", in_shape=(3, 16, 16), classes=5).double()
    for left, right in zip(plain.parameters(), residual.parameters(), strict=True):
        left.data.copy_(right.data)
    for module in residual.modules():
        if hasattr(module, "shortcut"):
            module.shortcut = Zero()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(plain(images), residual(images))


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros(())


@pytest.mark.parametrize(
    ("name", "blocks", "strides", "side"),
    [
        ("resnet-18-w4", (2, 2, 2, 2), (2, 1), 40),
        ("resnet-18-w4", (2, 2, 2, 2), (2, 1), 72),
        ("resnet-50-w4", (3, 4, 6, 3), (1, 2, 1), 72),
    ],
)
def test_imagenet_resnets_against_the_formula(name, blocks, strides, side):
    torch.manual_seed(0)
    model = build(name, in_shape=(3, side, side), classes=5).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    weights = dict(model.named_parameters())

    def layer(x, path, stride):
        kernel, gain, bias = (weights[f"{path}.{key}"] for key in ("conv.weight", "norm.weight", "norm.bias"))
        x = F.conv2d(x, kernel, stride=stride, padding=(kernel.shape[-1] - 1) // 2)
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * gain.view(-1, 1, 1) + bias.view(-1, 1, 1)

    images = torch.randn(3, 3, side, side, dtype=torch.float64)
    x = layer(images, "stem", 2 if side > 64 else 1).relu()
    if side > 64:
        x = F.max_pool2d(x, 3, 2, 1)
    for stage, count in enumerate(blocks, start=1):
        for index in range(1, count + 1):
            path, halve = f"stage{stage}_block{index}", stage > 1 and index == 1
            branch = x
            for position, stride in enumerate(strides):
                branch = layer(branch, f"{path}.branch.{position}", stride if halve else 1)
                if position < len(strides) - 1:
                    branch = branch.relu()
            changes = f"{path}.shortcut.conv.weight" in weights
            assert changes == (branch.shape != x.shape)
            x = (branch + (layer(x, f"{path}.shortcut", 2 if halve else 1) if changes else x)).relu()
    torch.testing.assert_close(model(images), x.mean((2, 3)) @ model.head.weight.T + model.head.bias)


def test_resnet_stem_follows_the_image_size():
    small, large = on_meta("resnet-18", (3, 64, 64), 10), on_meta("resnet-18", (3, 65, 65), 10)
    assert small.stem.conv.kernel_size == (3, 3)
    assert large.stem.conv.kernel_size == (7, 7)
    shapes = []
    for model, side in ((small, 64), (large, 224)):
        model.pool.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
        model(torch.empty(2, 3, side, side, device="meta"))
    assert shapes == [(2, 512, 8, 8), (2, 512, 7, 7)]


def test_transformer_block_against_torch():
    torch.manual_seed(0)
    block = TransformerBlock(width=24, head_dim=8, qk_norm=False).double()
    reference = nn.TransformerEncoderLayer(
        24, 3, 96, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    attention = block.attention
    linears = attention.query, attention.key, attention.value
    pairs = [
        (reference.self_attn.in_proj_weight, torch.cat([linear.weight for linear in linears])),
        (reference.self_attn.in_proj_bias, torch.cat([linear.bias for linear in linears])),
        (reference.self_attn.out_proj.weight, attention.projection.weight),
        (reference.self_attn.out_proj.bias, attention.projection.bias),
        (reference.linear1.weight, block.mlp[0].weight),
        (reference.linear1.bias, block.mlp[0].bias),
        (reference.linear2.weight, block.mlp[2].weight),
        (reference.linear2.bias, block.mlp[2].bias),
        (reference.norm1.weight, block.attention_norm.weight),
        (reference.norm1.bias, block.attention_norm.bias),
        (reference.norm2.weight, block.mlp_norm.weight),
        (reference.norm2.bias, block.mlp_norm.bias),
    ]
    for left, right in pairs:
        left.data.copy_(right.data)
    tokens = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(block(tokens), reference(tokens))


def test_qk_norm_makes_queries_and_keys_scale_invariant():
    torch.manual_seed(0)
    images = torch.randn(3, *DIGITS, dtype=torch.float64)
    changes = {}
    for qk_norm in (False, True):
        model = build("ln-transformer-2", in_shape=DIGITS, classes=5, qk_norm=qk_norm).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        logits = model(images)
        for block in model.blocks:
            for linear in (block.attention.query, block.attention.key):
                linear.weight.data.mul_(3)
                linear.bias.data.mul_(3)
        changes[qk_norm] = (model(images) - logits).abs().max() / logits.abs().max()
    assert changes[True] < 1e-4  # the epsilon of the LayerNorm
    assert changes[False] > 1e-2


def test_without_bias_queries_and_keys_are_scale_invariant_on_their_own():
    torch.manual_seed(0)
    images = torch.randn(8, *DIGITS)
    found = {}
    for qk_bias in (True, False):
        model = build("ln-transformer-2", in_shape=DIGITS, classes=5, qk_norm=True, qk_bias=qk_bias)
        kinds = find_scale_invariant(model, images)
        found[qk_bias] = {name for name, kind in kinds.items() if kind}
        assert ("blocks.0.attention.query.bias" in kinds) == qk_bias
        assert "blocks.0.attention.value.bias" in kinds
    weights = {f"blocks.{i}.attention.{part}.weight" for i in (0, 1) for part in ("query", "key")}
    assert found == {True: set(), False: weights}


@pytest.mark.parametrize(("name", "in_shape"), [("bn-mlp-4", DIGITS), ("plain-8", CIFAR), ("vit-s-8", CIFAR)])
def test_width_suffix_is_the_width(name, in_shape):
    by_name, by_argument = on_meta(f"{name}-w64", in_shape, 10), on_meta(name, in_shape, 10, width=64)
    shapes = [parameter.shape for parameter in by_name.parameters()]
    assert shapes == [parameter.shape for parameter in by_argument.parameters()]
    assert shapes != [parameter.shape for parameter in on_meta(name, in_shape, 10).parameters()]


def test_torchs_seed_fixes_the_weights():
    def draw(seed):
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build("conv-5", in_shape=DIGITS, classes=10).parameters())

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "resnet",
        "resnet-",
        "resnet-N",
        "resnet-x",
        "bn-mlp",
        "bn-mlp-N-w8",
        "lenet-5",
        "vgg-16",
        "bn-mlp--3",
    ],
)
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(
        ValueError, match=r"unknown model .*choose one of mlp-N, bn-mlp-N, .*ln-transformer-N"
    ):
        build(name, in_shape=DIGITS, classes=10)


@pytest.mark.parametrize(
    ("name", "in_shape", "overrides", "message"),
    [
        ("mlp-1", DIGITS, {}, "at least 2 layers, got 1"),
        ("conv-4", DIGITS, {}, "at least 5, got 4"),
        ("conv-5", (1, 3, 3), {}, "side of at least 4, got 3"),
        ("plain-21", CIFAR, {}, r"N = 6n \+ 2 .*got 21"),
        ("resnet-2", CIFAR, {}, r"N = 6n \+ 2 .*got 2"),
        ("vgg-16-bn", (3, 16, 16), {}, "at least 32, got 16"),
        ("vit-s-5", CIFAR, {}, "side 5 do not tile images of side 32"),
        ("vit-s-0", CIFAR, {}, "side 0 do not tile"),
        ("vit-s-4-w100", CIFAR, {}, "multiple of head_dim 64, got 100"),
        ("ln-transformer-0", DIGITS, {}, "at least 1 block, got 0"),
        ("bn-mlp-4-w0", DIGITS, {}, "width must be a whole number, at least 1, got 0"),
        ("bn-mlp-4-w8", DIGITS, {"width": 4}, "'bn-mlp-4-w8' sets the width: leave out width=4"),
        ("bn-mlp-4", DIGITS, {"depth": 3}, "takes no depth; allowed: width, norm, scale_invariant"),
        (
            "vit-s-4",
            CIFAR,
            {"norm": "batch"},
            "takes no norm; allowed: width, depth, head_dim, qk_norm, qk_bias",
        ),
        ("bn-mlp-4", DIGITS, {"norm": "group"}, "'batch', 'layer' or 'none', got 'group'"),
        ("bn-mlp-4", (8, 8), {}, r"in_shape must be \(channels, side, side\), got \(8, 8\)"),
        ("conv-5", (3, 32, 16), {}, "in_shape must be"),
    ],
)
def test_what_a_net_does_not_have_is_an_error(name, in_shape, overrides, message):
    with pytest.raises(ValueError, match=message):
        build(name, in_shape=in_shape, classes=10, **overrides)


def test_classes_must_be_positive():
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        build("bn-mlp-4", in_shape=DIGITS, classes=0)


TEXT = (16,)


@pytest.mark.parametrize("name", ["gpt-2-w32", "olmo-2-w32"])
def test_a_text_net_does_not_look_ahead(name):
    torch.manual_seed(0)
    model = build(name, in_shape=TEXT, classes=9)
    characters = torch.randint(9, (4, *TEXT))
    logits = model(characters)
    assert logits.shape == (4, 9, *TEXT)
    later = characters.clone()
    later[:, 10] = (later[:, 10] + 1) % 9
    changed = (model(later) - logits).abs().amax((0, 1)) > 1e-6
    assert changed.tolist() == [False] * 10 + [True] * 6


@pytest.mark.parametrize(("name", "layers"), [("gpt-2-w32", ["query", "key"]), ("olmo-2-w32", None)])
def test_weights_of_a_text_net_that_are_scale_invariant(name, layers):
    """With norms of sums only queries and keys are; with norms of branches all weights of the blocks."""
    torch.manual_seed(0)
    model = build(name, in_shape=TEXT, classes=9)
    in_blocks = {n for n, p in model.named_parameters() if "blocks" in n and p.ndim == 2}
    expected = {n for n in in_blocks if layers is None or n.split(".")[-2] in layers}
    found = find_scale_invariant(model, torch.randint(9, (32, *TEXT)))
    assert {n for n, kind in found.items() if kind and model.get_parameter(n).ndim == 2} == expected
    assert len(in_blocks) == 12


@pytest.mark.parametrize(("name", "in_shape"), [("gpt-2", CIFAR), ("bn-mlp-3", TEXT)])
def test_nets_of_images_and_of_text_are_not_mixed_up(name, in_shape):
    with pytest.raises(ValueError, match="in_shape must be"):
        build(name, in_shape=in_shape, classes=10)
