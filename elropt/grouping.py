"""Parameter groups for an optimizer: by scale invariance, and with learning rates that scale with the width."""

import math
import numbers
import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from ._model_copy import Inputs, Outputs, check_model, owner_of
from .scale_invariance import explain, warn_of_eps, warn_of_frozen_norms

__all__ = ["param_groups", "width_scaled_groups"]

Role: TypeAlias = Literal["input", "hidden", "output", "vector", "fixed"]

# (optimizer, loss) → the power of the width that the learning rate of a role is proportional to
# (docs/guide/width-scaling.md)
EXPONENTS: dict[tuple[str, str], dict[Role, float]] = {
    ("sgd", "cross_entropy"): {"input": 0.5, "hidden": -0.5, "output": -0.5, "vector": 0.5, "fixed": 0.0},
    ("sgd", "mse"): {"input": 0.0, "hidden": -1.0, "output": -1.0, "vector": 0.0, "fixed": 0.0},
    ("adam", "cross_entropy"): {"input": 0.0, "hidden": -1.0, "output": -0.5, "vector": 0.0, "fixed": 0.0},
}
EXPONENTS["adam", "mse"] = EXPONENTS["adam", "cross_entropy"]
WIDTH_ATTRIBUTES = ("out_features", "out_channels", "embedding_dim")  # of Linear, convolutions, Embedding


def param_groups(
    model: nn.Module,
    /,
    *inputs: Any,
    weight_decay: float | None = None,
    tracked_lr: float | None = None,
    exclude: Iterable[str] = (),
    outputs: Outputs | None = None,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters into groups for ELRSGD, or any other torch optimizer.

    Returns plain dicts with the keys `name`, `params`, `param_names`, `scale_invariant` (bool) and, where it is said
    below, `weight_decay`; empty groups are left out:

    - "scale_invariant": what `find_scale_invariant` finds, if it has 2 or more dimensions;
    - "other": all else with 2 or more dimensions, for example the head;
    - "no_decay": norm gains and biases (fewer than 2 dimensions, or the magnitude of
      `torch.nn.utils.parametrizations.weight_norm`), with weight decay 0;
    - "sparse": weights with sparse gradients, which only plain SGD without decay can apply: ``rule=None``,
      ``project=False``, weight decay 0.

    Args:
        model: any module, as for `find_scale_invariant`.
        *inputs: the arguments of `model`, as for `find_scale_invariant`.
        **kwargs: the same by name. If a batch is a dict: ``param_groups(model, **batch)``. If the model has an argument
            of the same name as this function, pass it by position.
        weight_decay: weight decay of the first two groups, per step and unit of lr; not negative. None: they have no
            such entry, and the `weight_decay` of the optimizer holds.
        tracked_lr: the entry `tracked_lr` of the "scale_invariant" group, in the unit of the optimizer's rule (rad for
            "angle", `sphere_lr` for "sphere"), see `ELRSGD`. Other optimizers do not read it. None: no group has the
            entry, and the `tracked_lr` of the optimizer holds.
        exclude: names or `fnmatch` patterns ("head.*") of parameters that are never tracked.
        outputs: what of the outputs counts, as for `find_scale_invariant`.

    Warns:
        UserWarning: nothing is tracked. Or: the invariance is only approximate, or frozen norms were measured as if
            they were not, see `find_scale_invariant`.

    Raises:
        ValueError: a number that is negative or not finite, an entry of `exclude` that matches no parameter,
            a model without trainable parameters; and those of `find_scale_invariant`.
        TypeError: `exclude` is a single string, or `model` no module.
    """
    for argument, value in (("weight_decay", weight_decay), ("tracked_lr", tracked_lr)):
        if value is not None and not (isinstance(value, numbers.Real) and 0 <= value < math.inf):
            raise ValueError(f"{argument}={value!r} is not valid: it must be a finite number, at least 0")
    check_model(model)
    excluded = _matching(
        "exclude",
        exclude,
        [name for name, _ in model.named_parameters()],
        "no parameter; give a name from model.named_parameters() or a pattern such as 'head.*'",
    )
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if not trainable:
        raise ValueError("model has no parameter with requires_grad=True, so there is nothing to optimize")

    call = Inputs(inputs, kwargs)
    explained = explain(model, call, outputs, training=True)
    members: dict[str, list[str]] = {"scale_invariant": [], "other": [], "no_decay": [], "sparse": []}
    for name, param in trainable.items():
        if explained[name].sparse_grad:
            members["sparse"].append(name)
        elif param.ndim < 2 or (name.endswith(".original0") and param.numel() == param.shape[0]):
            members["no_decay"].append(name)
        elif explained[name].kind is not None and name not in excluded:
            members["scale_invariant"].append(name)
        else:
            members["other"].append(name)
    warn_of_frozen_norms(model)
    warn_of_eps(model, call, outputs, {name: explained[name] for name in members["scale_invariant"]})
    if not members["scale_invariant"]:
        warnings.warn(
            "no parameter is tracked: none that is trainable and not excluded is a scale-invariant weight. "
            "explain_scale_invariance(model, *inputs) says why for each; pass real data, at least 8 samples, "
            "as inputs, and put a normalization behind the weights to be tracked",
            UserWarning,
            stacklevel=2,
        )

    groups: list[dict[str, Any]] = []
    for group_name, param_names in members.items():
        if not param_names:
            continue
        tracked = group_name == "scale_invariant"
        group = {
            "name": group_name,
            "params": [trainable[name] for name in param_names],
            "param_names": param_names,
            "scale_invariant": tracked,
        }
        if group_name in ("no_decay", "sparse"):
            group["weight_decay"] = 0.0
        elif weight_decay is not None:
            group["weight_decay"] = weight_decay
        if group_name == "sparse":
            group |= {
                "rule": None,
                "project": False,
                "granularity": "layer",
                "elr_of": None,
                "protect": None,
            }
        if tracked and tracked_lr is not None:
            group["tracked_lr"] = tracked_lr
        groups.append(group)
    return groups


def width_scaled_groups(
    model: nn.Module,
    base_width: float,
    *,
    lr: float = 1e-3,
    loss: Literal["cross_entropy", "mse"] = "cross_entropy",
    optimizer: Literal["sgd", "adam"] = "sgd",
    width: float | None = None,
    input: Iterable[str] = (),
    output: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters into groups whose learning rates scale with its width.

    Tune `lr` on a net of `base_width`, then give the same `lr` for wider ones. Returns plain dicts with the keys
    `name`, `params`, `param_names` and `lr` = lr·m^e, m = width / base_width; empty groups are left out. Exponents e:

    | name | what | SGD, cross-entropy | SGD, MSE | Adam |
    |---|---|---:|---:|---:|
    | "input" | first weight matrix | 1/2 | 0 | 0 |
    | "hidden" | those between | −1/2 | −1 | −1 |
    | "output" | last weight matrix | −1/2 | −1 | −1/2 |
    | "vector" | biases, norm gains | 1/2 | 0 | 0 |
    | "fixed" | the output's bias, single numbers | 0 | 0 | 0 |

    They are the largest exponents with which activations, and the gradients with respect to them, stay bounded as the
    width grows. The logits grow like √m. That does no harm under cross-entropy, where the gradients with respect to
    the logits are bounded, or with Adam, whose step does not grow with them. Under SGD with MSE they must stay bounded
    as well. Weight matrices are all parameters of 2 or more dimensions, in the order of `model.named_parameters()`.
    The height and width of a kernel do not count as width.

    The groups fit `torch.optim.SGD`, Adam, AdamW and `ELRSGD` with rule=None. Under the rule "angle" the elr of a
    tracked layer is the `lr` of its group; under "uniform" (and "warmup" while it lasts) it is `lr` times an E that is
    the same for all. There the groups set ratios of effective learning rates, which need other exponents
    (docs/guide/width-scaling.md §5). Schedulers scale all groups alike.

    Args:
        model: any module in standard parameterization.
        base_width: the width at which `lr` was tuned; positive, counted as `width` is.
        lr: learning rate at `base_width`, in the optimizer's unit; finite, not negative. The default is torch's.
        loss: which exponents: "cross_entropy" or "mse".
        optimizer: which exponents: "sgd" or "adam".
        width: of `model`. None: the output features, channels or embedding size of the first layer with the role input.
        input: names or `fnmatch` patterns ("*embed.weight") of the matrices whose fan-in does not grow with the width.
            By default the first matrix.
        output: the same of the matrices whose fan-out does not grow. By default the last matrix.

    Raises:
        ValueError: a number, `loss` or `optimizer` that is not allowed; fewer than 2 weight matrices; a pattern that
            matches none; one in both roles (as where input and output are tied); a width that cannot be read off.
        TypeError: `input` or `output` is a single string.

    Source: derived, docs/guide/width-scaling.md; the regimes are those of Haas et al. (arXiv 2505.22491).

    Examples:
        >>> optimizer = ELRSGD(width_scaled_groups(model, 256, lr=0.1), momentum=0.9, rule=None)
    """
    for argument, value in (("base_width", base_width), ("width", width)):
        if value is not None and not (isinstance(value, numbers.Real) and 0 < value < math.inf):
            raise ValueError(f"{argument}={value!r} is not valid: it must be a finite number above 0")
    if not (isinstance(lr, numbers.Real) and 0 <= lr < math.inf):
        raise ValueError(f"lr={lr!r} is not valid: it must be a finite number, at least 0")
    if (optimizer, loss) not in EXPONENTS:
        known = ", ".join(f"optimizer={name!r} with loss={of!r}" for name, of in EXPONENTS)
        raise ValueError(f"optimizer={optimizer!r} with loss={loss!r} is not known; choose one of {known}")

    matrices = [name for name, p in model.named_parameters(remove_duplicate=False) if p.ndim >= 2]
    if len(matrices) < 2:
        raise ValueError(
            f"model has {len(matrices)} weight matrices; widths scale between an input and an output layer, "
            "so at least 2 are needed"
        )
    computed = [
        name for name in matrices if ".parametrizations." in name or name.endswith(("weight_g", "weight_v"))
    ]
    if computed:
        raise ValueError(
            f"{', '.join(computed[:2])}{' …' if len(computed) > 2 else ''}: weights that are computed from other "
            "parameters (weight_norm and the like) scale otherwise, which is not derived: remove the parametrization"
        )
    otherwise = f"no weight matrix; the model has {', '.join(matrices)}"
    inputs = _matching("input", input, matrices, otherwise)
    if not inputs:
        inputs = matrices[:1]
        if _layer_width(model, inputs[0]) is None:
            raise ValueError(
                f"the first weight matrix, {inputs[0]!r}, is of no Linear, convolution or Embedding: name all whose "
                "fan-in does not grow in input=, such as ['patch_embedding.weight', 'class_token', 'position']"
            )
    outputs = _matching("output", output, matrices, otherwise) or matrices[-1:]
    params = dict(model.named_parameters(remove_duplicate=False))
    roles: dict[Tensor, Role] = {params[name]: "input" for name in inputs}
    for name in outputs:
        if params[name] in roles:
            raise ValueError(
                f"{name!r} is both input-like and output-like, and the two scale differently: untie them, or name the "
                "matrices whose fan-in does not grow in input=, those whose fan-out does not in output="
            )
    roles |= {params[name]: "output" for name in outputs}
    output_layers = {owner_of(name) for name in outputs} - {""}
    if width is None:
        widths = [found for name in inputs if (found := _layer_width(model, name)) is not None]
        if not widths:
            raise ValueError(
                f"the width cannot be read off {', '.join(inputs)}, which are of no Linear, convolution or Embedding: "
                "give width="
            )
        width = widths[0]

    exponents = EXPONENTS[optimizer, loss]
    members: dict[Role, dict[str, Tensor]] = {role: {} for role in exponents}
    for name, param in model.named_parameters():
        if param.requires_grad:
            role = roles.get(param)
            if role is None and param.ndim >= 2:
                role = "hidden"
            elif role is None:
                role = "fixed" if param.numel() == 1 or owner_of(name) in output_layers else "vector"
            members[role][name] = param
    if not any(members.values()):
        raise ValueError("model has no parameter with requires_grad=True, so there is nothing to optimize")
    return [
        {
            "name": role,
            "params": [*of_role.values()],
            "param_names": [*of_role],
            "lr": lr * (width / base_width) ** exponents[role],
        }
        for role, of_role in members.items()
        if of_role
    ]


def _matching(argument: str, patterns: Iterable[str], names: list[str], otherwise: str) -> list[str]:
    """Those of `names` that a name or pattern matches, in their own order. A pattern that matches none is an error,
    which says that it matches `otherwise`."""
    if isinstance(patterns, str):
        raise TypeError(
            f"{argument} is the string {patterns!r}; pass an iterable of names or patterns: [{patterns!r}]"
        )
    matched = set()
    for pattern in patterns:
        matches = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not matches:
            raise ValueError(f"{argument} has {pattern!r}, which matches {otherwise}")
        matched.update(matches)
    return [name for name in names if name in matched]


def _layer_width(model: nn.Module, name: str) -> int | None:
    """The number of outputs of the layer that a weight belongs to; None for a layer without WIDTH_ATTRIBUTES."""
    layer = model.get_submodule(owner_of(name).removeprefix("."))
    found = (getattr(layer, attribute, None) for attribute in WIDTH_ATTRIBUTES)
    return next((width for width in found if isinstance(width, int)), None)
