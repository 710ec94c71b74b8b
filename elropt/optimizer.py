"""ELRSGD: validates, holds state, picks a backend. The arithmetic is in `functional` and below."""

from __future__ import annotations

import itertools
import math
import numbers
import operator
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, ParamsT, _use_grad_for_differentiable

from . import kernels
from ._rule_group import (
    STATE_DTYPES,
    LayerMeasurements,
    RuleGroup,
    TritonStep,
    count_rows,
    has_lr_by_row,
    has_tensor_decay,
    lr_ratio,
    refuse_one_of_many,
    rule_key,
)
from ._state_dict import check_groups, check_state, matched_by_name, warn_of_other_rules
from .rules import RULES
from .sharding import check_placement, is_dtensor, is_inside_zero, local

__all__ = ["ELRSGD"]


class ELRSGD(Optimizer):
    r"""`torch.optim.SGD` that measures and controls the effective learning rate (ELR) of every layer.

    In front of a normalization only the direction of a weight w matters, and one SGD step turns it by about
    λ·E radians, E = ‖g‖/‖w‖. ELRSGD measures E for every such layer and lets a *rule* act on it::

        measure   ‖w‖², ‖g‖², ⟨w,g⟩ of every tracked layer
        decide    the rule's s, a, p from these numbers alone
        update    ŵ = a·w ;  g̃ = s·g + ω·ŵ ;  m ← μ·m + (1−d)·g̃ ;  u = nesterov ? g̃ + μ·m : m
                  u ← u − p·ŵ (with project) ;  w ← ŵ − λ·u

    With ``rule=None`` and float hyper-parameters this is `torch.optim.SGD`, bit for bit. A layer is *tracked* if its
    group has ``scale_invariant=True`` (see `elropt.param_groups`), or, in groups without that key, if it has two or
    more dimensions and its gradient has been orthogonal to it in each of its first 8 steps (or more, as long as the
    steps hardly turn it: a bias that is still at 0 hides a dependence).
    All other parameters see plain SGD. Groups that name the same rule, granularity and project are decided
    together, others apart.

    Args:
        params: parameters, named parameters or param groups, as in `torch.optim.SGD`.
        lr: learning rate λ ≥ 0, a float or a one-element tensor. Its unit for the tracked layers depends on the rule:
            ``None``, "warmup" and "uniform": SGD's; "angle": radians per plain SGD step; "sphere": learning rate on the
            unit sphere. A scheduler owns ``group["lr"]``; no rule writes it.
        momentum: μ, 0 ≤ μ < 1 (any μ ≥ 0 with ``rule=None``).
        dampening: d.
        weight_decay: ω ≥ 0, L2 decay inside the gradient. It is radial, so with ``project``, "angle" and
            "sphere" it has hardly any effect on tracked layers (none without momentum).
        nesterov: Nesterov momentum; needs ``momentum > 0`` and ``dampening = 0``.
        rule:
            "warmup" (default): all tracked layers have the same ELR while their weights are rescaled, which
            does not change the network's function, until they have it under plain SGD too (to 10 %); from
            then on it is plain SGD. The ELR is λĒ, Ē the geometric mean, but no more than the critical one,
            √((1−μ)³/(1+μ)): at 0.023 rad with momentum 0.9, steady gradients double ‖w‖² in a step. The λ that counts
            is that of the step: what a schedule raises it to after the hand-over, often within 100 steps, is not
            capped, so rather start at the full λ than with a linear warm-up. No hyper-parameters.
            "uniform": s = Ē/E, Ē the geometric mean: all tracked layers have the same ELR.
            "angle": every tracked layer has the ELR ``lr``, in radians per plain SGD step, and keeps its initial norm.
            "sphere": SGD with learning rate ``lr`` on the unit sphere (Kodryan et al., NeurIPS 2022), norm kept.
            None: plain SGD.
            In "angle" and "sphere" the stored weight is one step ahead of its sphere: each step first brings it back
            (a = radius/‖w‖), then moves it; its direction is exactly that of training on the sphere.
        tracked_lr: the tracked layers' own learning rate, in the unit of the rule; a number. They train as if the lr of
            their group were ``tracked_lr · group["lr"] / reference_lr``, where ``group["reference_lr"]`` is, and stays,
            the `lr` that it was given with: the constructor's for the constructor's `tracked_lr`, so that groups with
            another `lr` differ by as much, its own for a group's. None: `lr`. Under ``rule=None``, and on the Triton
            kernels, only groups with the key ``scale_invariant`` can have it.
        project: remove the radial part of the update of tracked layers, to the rounding of float32.
        granularity: what one norm is taken over: "layer" (a tensor), "filter" (each index of its dimension 0; for
            "uniform", "angle" and "sphere") or "network" (all tracked tensors together; "angle" and "sphere").
        stochastic_rounding: a seed: bfloat16 parameters are rounded up or down with the probabilities that keep their
            mean, so that updates smaller than half their last digit are not lost. Repeatable; Triton kernels only.
            None: to the nearest. Other dtypes are not concerned.
        maximize: maximize the objective.
        foreach, fused: as in torch: `torch._foreach_*` or the Triton kernels (CUDA only); None for both picks fused on
            CUDA where every tensor of the group qualifies, else foreach on CUDA and, in float32 and float64, on the CPU
            (there to the bits of torch's for-loop), else one tensor after the other.
        differentiable: let autograd run through the step; needs ``rule=None`` and ``project=False``.

    Raises:
        ValueError: an argument, here or in a param group, outside the ranges above. With a rule, `step` raises it too,
            before anything changes, if a scheduler or anybody else has brought such a value (tensors are not read).

    Warns:
        UserWarning: once, if "angle" is to turn layers by more than 0.1 rad per step. (The angle of "sphere" is known
            on the device alone: look at `elropt.effective_lrs`.)

    What else can happen, by name:
        - a tracked layer whose ‖w‖² or ‖g‖² is zero or not finite in float32 is left out of the rule at that step: its
          gradient enters the update as in SGD, one whose ‖g‖² overflows not at all, and it has no influence on the
          others (a NaN stays in its own layer); more: docs/faults.md;
        - sparse gradients and complex parameters are never tracked; sparse ones need ``rule=None``, no decay;
        - nothing to track: the rule does nothing, and "warmup" stays armed;
        - layers that join after the hand-over of the warm-up see plain SGD, and are tested for reports;
        - parameters flattened by FSDP1 or DeepSpeed ZeRO, and with rules that compare layers one optimizer for each
          parameter, stepped in backward: ValueError, docs/distributed.md.
    State of a parameter: `momentum_buffer`, and with a rule or `project` the float32 tensors `sphere_grad_norm` (c,
    smoothed), `radius`, `tracked` (radial tests passed, or -1) and `handed_over`.

    Source: derived, docs/theory.md; the model is that of Mehmeti-Göpel & Wand, ICML 2024 (arXiv 2306.00700).

    Example:
        >>> optimizer = ELRSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        rule: str | None = "warmup",
        tracked_lr: float | None = None,
        project: bool = False,
        granularity: str = "layer",
        stochastic_rounding: int | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "rule": rule,
            "tracked_lr": tracked_lr,
            "project": project,
            "granularity": granularity,
            "stochastic_rounding": stochastic_rounding,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        validate(defaults)
        self._inside_zero = is_inside_zero()
        self._rule_groups: list[RuleGroup] | None = None
        self._layout: tuple[list[object], list[object]] = [], []
        self._held: tuple[list[object], list[object]] = [], []
        self._captured: dict[int, TritonStep] = {}
        self._checked: tuple[list[Any], list[Any]] = [], []  # learning rates and other values
        self._given: dict[int, bool] = {}
        self._warned_of_angle = False
        self._recording = False
        self._stepping = threading.RLock()
        super().__init__(params, defaults)
        self._prepare_tracing()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's own hyper-parameters are checked before it is added."""
        if isinstance(param_group, dict):
            complete = {**self.defaults, **param_group}
            reference = self.defaults if "tracked_lr" not in param_group else complete
            set_reference_lr(complete, reference["lr"])
            validate(complete)
            _refuse_duplicates(complete)
            self._check_tensors(complete)
            if complete["tracked_lr"] is not None:
                param_group["reference_lr"] = complete["reference_lr"]
        super().add_param_group(param_group)
        self._rule_groups = None
        group = self.param_groups[-1]
        self._given.update({id(p): is_lazy(p) or p.dim() != 1 for p in group["params"]})
        self._warn_of_large_angle(group, stacklevel=4)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in _SGD_DEFAULTS.items():
                group.setdefault(key, self.defaults.get(key, value))
        self._rule_groups = None
        self._layout, self._held = ([], []), ([], [])
        self.__dict__.setdefault("_captured", {})  # graphs outlive load_state_dict
        self._recording = False
        self._stepping = threading.RLock()
        given = {id(p): is_lazy(p) or p.dim() != 1 for group in self.param_groups for p in group["params"]}
        for name, value in {"_inside_zero": False, "_given": given, "_warned_of_angle": False}.items():
            self.__dict__.setdefault(name, value)
        self._checked = [], []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that the rule's state stays float32 whatever the dtype of the parameters, that what
        `torch.optim.SGD` does not know (rule, granularity, scale_invariant …) stays as it is here if not in the dict,
        that `foreach` and `fused` always do: they say how to compute here, not what, and that parameters with names on
        both sides are matched by name.

        Warns:
            UserWarning: rule, granularity or project of the dict are not those of the optimizer, or only one of the
                two has a tracked_lr; the dict's hold.

        Raises:
            ValueError: a state dict of another optimizer than SGD and ELRSGD, or groups, names, shapes, dtypes, values
                or hyper-parameters that do not fit; nothing has been changed then.
        """
        loaded: dict[str, Any] = {}

        def complete(_: Optimizer, final: dict[str, Any]) -> None:
            check_groups(final, self.param_groups)
            named = [
                matched_by_name(theirs, mine, number)
                for number, (mine, theirs) in enumerate(
                    zip(self.param_groups, final["param_groups"], strict=True)
                )
            ]
            final["param_groups"] = [
                {**{k: v for k, v in mine.items() if k not in _SGD_KEYS}, **theirs, **_backend_of(mine)}
                for mine, theirs in zip(self.param_groups, named, strict=True)
            ]
            self._check_loaded(final)
            warn_of_other_rules(final["param_groups"], self.param_groups)
            for theirs, group in zip(named, final["param_groups"], strict=True):
                if "rule" in theirs and "tracked_lr" not in theirs:  # of an ELRSGD that did not have it
                    group["tracked_lr"] = None
            loaded.update(final)

        def restore(_: Optimizer) -> None:
            for index, p in self._params_by_index(loaded):
                for key, dtype in STATE_DTYPES.items():
                    value = loaded["state"].get(index, {}).get(key)
                    if value is not None:
                        self.state[p][key] = value.detach().to(p.device, dtype, copy=True)

        hooks = (
            self.register_load_state_dict_pre_hook(complete),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        self._prepare_tracing()

    def _params_by_index(self, state_dict: Mapping[str, Any]) -> list[tuple[int, Tensor]]:
        """(index in a state dict, parameter here), by position."""
        indices = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        return list(zip(indices, params, strict=True))

    def _check_loaded(self, state_dict: Mapping[str, Any]) -> None:
        for number, group in enumerate(state_dict["param_groups"]):
            try:
                validate({**self.defaults, **group})
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"param group {number} of the state dict: {error}") from None
        check_state(state_dict["state"], self._params_by_index(state_dict))

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Never waits for the device, unless torch.amp.GradScaler is used where only some tensors qualify for
        the kernels, or parameters are sharded (docs/distributed.md). Threads wait for one another.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: a gradient that cannot be applied, see the class; nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling() and self._is_traceable():
            self._step()
        elif torch.compiler.is_compiling():
            self._step_eagerly()
        else:
            self._step_alone()
        return loss

    def _step_alone(self) -> None:
        """One thread at a time, and what it makes of state is made of normal tensors."""
        with self._stepping:
            self._check_values()
            if torch.is_inference_mode_enabled():
                with torch.inference_mode(False), torch.no_grad():
                    self._step()
            else:
                self._step()

    def _step(self) -> None:
        prepared = [
            (rule_group, rule_group.prepare(self.state)) for rule_group in self._current_rule_groups()
        ]
        for _, tensors in prepared:
            if isinstance(tensors, TritonStep) and tensors.plan is not None and tensors.plan.in_capture:
                self._captured[id(tensors)] = tensors  # a graph that is replayed later uses its memory
        # set by torch.amp.GradScaler around this call
        amp = {name: _tensor_or_none(self, name) for name in ("grad_scale", "found_inf")}
        all_fused = all(isinstance(tensors, TritonStep) or not tensors for _, tensors in prepared)
        if amp["found_inf"] is not None and not all_fused:
            if not _unscale(self, amp):
                self._recording = False
                for rule_group, _ in prepared:
                    rule_group.skip(amp["grad_scale"])
                return
            amp = dict.fromkeys(amp)
        grown = [e.step(tensors, self.state, record=self._recording, **amp) for e, tensors in prepared]
        if any(grown):
            self._held = self._state_objects()
        self._recording = False

    @torch.compiler.disable()
    def _step_eagerly(self) -> None:
        """Rules look at addresses and version counters, which a trace would take for constants."""
        self._step_alone()

    def _prepare_tracing(self) -> None:
        """What the first step would make, where torch.compile could not trace the making of it."""
        if self._is_traceable():
            self._current_rule_groups()

    def _is_traceable(self) -> bool:
        """Whether torch.compile can trace a step: SGD by `torch._foreach_*` or a for-loop."""
        return all(
            group["rule"] is None and not group["project"] and (group["foreach"] or group["fused"] is False)
            for group in self.param_groups
        )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by torch.amp.GradScaler: whether the kernels divide by its scale and skip an overflow themselves."""
        return all(
            group["fused"]
            or (
                kernels.available()
                and group["fused"] is None
                and group["foreach"] is None
                and not group["differentiable"]
                and not has_lr_by_row(group)
                and all(p.is_cuda and not is_dtensor(p) for p in group["params"])
            )
            for group in self.param_groups
        )

    def record_next_step(self) -> None:
        """Have the next step measure the layers even where its rule does not need it. It computes the same."""
        self._recording = True

    @torch.no_grad()
    def layer_records(self) -> list[LayerMeasurements]:
        """What the last step measured and applied; where it measured nothing, weights and gradients as they are now.
        `elropt.layer_stats` makes a table of it."""
        records = [rule_group.record(self.state) for rule_group in self._current_rule_groups()]
        return [record for record in records if record is not None]

    def _current_rule_groups(self) -> list[RuleGroup]:
        """What groups of the same rule, granularity and project form; anew if anybody changed them or their state."""
        groups = self.param_groups
        params = [group["params"] for group in groups]
        objects = [*groups, *itertools.chain.from_iterable(params)]
        options: list[object] = [
            (
                g["rule"],
                g["granularity"],
                g["project"],
                g["stochastic_rounding"],
                g["tracked_lr"] is None,
                g.get("scale_invariant"),
            )
            for g in groups
        ]
        options += map(len, params)
        held = self._state_objects()
        if (
            self._rule_groups is None
            or options != self._layout[1]
            or not _same_objects(objects, self._layout[0])
            or (
                not all(map(_same_objects, held, self._held))
                and any(rule_group.is_detached(self.state) for rule_group in self._rule_groups)
            )
        ):
            self._refuse_capture()
            together: dict[Any, list[dict[str, Any]]] = {}
            for group in self.param_groups:
                set_reference_lr(group, group["lr"])
                validate_choices(group)
                _refuse_duplicates(group)
                self._check_tensors(group)
                together.setdefault(rule_key(group), []).append(group)
            self._refuse_flattened()
            for groups in together.values():
                refuse_one_of_many(groups)
            with torch.inference_mode(False):
                self._rule_groups = [
                    RuleGroup(groups, self.state, number) for number, groups in enumerate(together.values())
                ]
            self._layout = objects, options
            if any(is_lazy(p) for group in self.param_groups for p in group["params"]):
                self._layout = [], []  # anew at the next step: it may have a shape then
            held = self._state_objects()
        self._held = held
        return self._rule_groups

    def _check_values(self) -> None:
        """Of groups with a rule, what a scheduler or the user has changed since the last step. Reads no tensor."""
        lrs = [group["lr"] for group in self.param_groups]
        others = list(map(_STEP_VALUES, self.param_groups))
        if has_tensor_decay(self.param_groups):  # comparing it would wait for the device
            others = []
        as_before = bool(others) and others == self._checked[1]
        if as_before and _same_objects(lrs, self._checked[0]):
            return
        for group, lr in zip(self.param_groups, lrs, strict=True):
            if group["rule"] is not None or group["project"]:
                if not (
                    as_before and type(lr) is float and 0 <= lr < math.inf
                ):  # at most a scheduler's new lr
                    validate_numbers(group, read_tensors=False)
                    validate_choices(group)
                    set_reference_lr(group, group["lr"])
                self._warn_of_large_angle(group, stacklevel=7)
        self._checked = lrs, others

    def _warn_of_large_angle(self, group: Mapping[str, Any], stacklevel: int) -> None:
        """Once, where lr is an angle; that of "sphere", lr·‖g‖·‖w‖, is only known on the device."""
        if self._warned_of_angle or RULES[group["rule"]].lr_unit != "rad per step":
            return
        lr = group["lr"]
        if (
            not isinstance(lr, Tensor)
            and (angle := lr * lr_ratio(group)) > LARGE_ANGLE
            and any(count_rows(p, group) for p in group["params"])
        ):
            self._warned_of_angle = True
            warnings.warn(
                f"rule={group['rule']!r} is to turn every tracked layer by {angle:g} radians per plain SGD step "
                f"(lr={lr:g}, tracked_lr={group['tracked_lr']}). More than {LARGE_ANGLE} is hardly ever wanted, and "
                "SGD's lr has another unit: keep it for all other parameters and give tracked_lr=0.01 to begin with",
                UserWarning,
                stacklevel=stacklevel,
            )

    def _check_tensors(self, group: Mapping[str, Any]) -> None:
        params = group["params"]
        rule = group["rule"] or ("project" if group["project"] else None)
        if has_lr_by_row(group) and (rule is None or group["fused"]):
            reason = (
                "rule=None needs groups that say which layers are tracked (scale_invariant, see "
                "elropt.param_groups): without a rule nothing finds out"
                if rule is None
                else "fused=True needs groups that say which layers are tracked (scale_invariant, see "
                "elropt.param_groups); bare parameters take foreach=True or fused=None"
            )
            raise ValueError(f"tracked_lr={group['tracked_lr']} with {reason}")
        for p in params if isinstance(params, list | tuple) else [params]:
            p = p[1] if isinstance(p, tuple) else p
            check_placement(p, rule, inside_zero=self._inside_zero)
            if isinstance(p, Tensor) and not is_lazy(p) and p.is_inference():
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is an inference tensor, which only torch.inference_mode "
                    "can change: make the model outside of it"
                )

    def _refuse_flattened(self) -> None:
        """DeepSpeed ZeRO puts one-dimensional pieces of many parameters in the place of those of every group."""
        params = [p for group in self.param_groups for p in group["params"]]
        if (
            not any(self._given.values())
            or all(id(p) in self._given for p in params)
            or any(is_lazy(p) or p.dim() != 1 for p in params)
        ):
            return
        for group in self.param_groups:
            rule = group["rule"] or ("project" if group["project"] else None)
            if rule is not None and any(id(p) not in self._given for p in group["params"]):
                raise ValueError(
                    f"rule={rule!r} needs the norm of every layer, but the parameters that this optimizer was made "
                    "with have been replaced by flattened ones, as DeepSpeed ZeRO and its fp16 and bf16 optimizers do: "
                    "use stage 0, or torch.distributed.fsdp.fully_shard instead, or rule=None, project=False"
                )

    def _refuse_capture(self) -> None:
        """What a rule remembers cannot be made while a CUDA graph is captured: each replay would make it anew."""
        remembering = [
            group
            for group in self.param_groups
            if group["rule"] is not None or group["project"] or group["stochastic_rounding"] is not None
        ]
        on_cuda = any(p.is_cuda for group in remembering for p in group["params"])
        if on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the optimizer's state would have to be made during CUDA graph capture: run one step before it, also "
                "after load_state_dict or add_param_group"
            )

    def _state_objects(self) -> tuple[list[object], list[object]]:
        """The dicts of the state and what they hold, to notice when somebody has put in something else."""
        dicts = [
            held for key, held in self.state.items() if isinstance(key, Tensor)
        ]  # hooks keep what they like
        return dicts, list(itertools.chain.from_iterable(map(dict.values, dicts)))


def _backend_of(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("foreach", "fused")}


_STEP_VALUES = operator.itemgetter(
    "momentum", "dampening", "weight_decay", "nesterov", "rule", "project", "tracked_lr"
)
LARGE_ANGLE = 0.1  # in radians per step
_SGD_KEYS = (
    "params",
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "maximize",
    "foreach",
    "differentiable",
    "fused",
)
_SGD_DEFAULTS = {
    "nesterov": False,
    "maximize": False,
    "foreach": None,
    "differentiable": False,
    "fused": None,
    "rule": None,
    "tracked_lr": None,
    "project": False,
    "granularity": "layer",
    "stochastic_rounding": None,
}


def validate(group: Mapping[str, Any]) -> None:
    """Check the hyper-parameters of one param group; reads tensors among them.

    Raises:
        ValueError: names the value, what is allowed and the remedy.
        RuntimeError: a combination of foreach, fused and differentiable that torch refuses too.
    """
    validate_numbers(group, read_tensors=True)
    validate_choices(group)


def set_reference_lr(group: dict[str, Any], lr: float | Tensor) -> None:
    """The `lr` at which `tracked_lr` holds; read here if it is a tensor. What is there stays.

    Raises:
        ValueError: there is no proportion to an lr of 0.
    """
    if group["tracked_lr"] is None or "reference_lr" in group:
        return
    if not 0 < float(lr) < math.inf:
        raise ValueError(
            f"tracked_lr={group['tracked_lr']} is kept in proportion to lr, so lr={lr} is not valid: it must be above "
            "0 when the optimizer is made; a schedule may bring it to 0 later"
        )
    group["reference_lr"] = float(lr)


def validate_numbers(group: Mapping[str, Any], *, read_tensors: bool) -> None:
    """The part of `validate` that asks for numbers in their ranges. Same errors."""
    for name in ("lr", "momentum", "dampening", "weight_decay"):
        if not isinstance(group[name], numbers.Real | Tensor):
            raise ValueError(f"{name}={group[name]!r} is not valid: it must be a number")
    for name in ("lr", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"{name} is a tensor of shape {tuple(value.shape)}; it must be a float or have one element"
            )
    for name in ("lr", "momentum", "dampening", "weight_decay"):
        value = group[name]
        lowest = -math.inf if name == "dampening" else 0
        if (read_tensors or not isinstance(value, Tensor)) and not (
            math.isfinite(value) and lowest <= float(value)
        ):
            raise ValueError(
                f"{name}={value} is not valid: it must be finite{' and at least 0' if lowest == 0 else ''}"
            )


def _same_objects(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _tensor_or_none(optimizer: Optimizer, name: str) -> Tensor | None:
    value = getattr(optimizer, name, None)  # without any gradient, torch.amp.GradScaler says 0
    return value if isinstance(value, Tensor) else None


def _unscale(optimizer: Optimizer, amp: Mapping[str, Tensor | None]) -> bool:
    """What torch.amp.GradScaler does for optimizers that leave it to it; whether the gradients are finite.

    For steps in which only some tensors qualify for the kernels. Waits for the device.
    """
    found_inf, scale = amp["found_inf"], amp["grad_scale"]
    if found_inf is not None and found_inf.item() != 0:
        return False
    if scale is not None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    local(p.grad).div_(scale.to(p.grad.device))
    return True


def _refuse_duplicates(group: Mapping[str, Any]) -> None:
    params = group["params"]
    if not isinstance(params, list | tuple) or (group["rule"] is None and not group["project"]):
        return
    tensors = [p[1] if isinstance(p, tuple) else p for p in params]
    if len({id(p) for p in tensors}) != len(tensors):
        raise ValueError(
            f"a param group with rule={group['rule']!r}, project={group['project']} holds the same parameter twice; "
            "give it once, or use rule=None and project=False"
        )


def validate_choices(group: Mapping[str, Any]) -> None:
    """The part of `validate` that reads no tensor: the rule, and what goes together. Same errors."""
    momentum, dampening = group["momentum"], group["dampening"]
    rule, granularity, flag = group["rule"], group["granularity"], group.get("scale_invariant")
    if group["nesterov"] and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"nesterov=True needs momentum > 0 and dampening=0, not momentum={momentum}, dampening={dampening}"
        )
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not known; choose one of {', '.join(map(repr, RULES))}")
    if granularity not in RULES[rule].granularities:
        allowed = ", ".join(map(repr, RULES[rule].granularities))
        raise ValueError(
            f"granularity={granularity!r} has no meaning for rule={rule!r}; choose one of {allowed}"
        )
    if rule is not None and momentum >= 1:
        raise ValueError(
            f"momentum={momentum} is not valid with rule={rule!r}: it must be below 1, or use rule=None"
        )
    tracked_lr = group["tracked_lr"]
    if tracked_lr is not None and not (
        isinstance(tracked_lr, numbers.Real) and 0 <= float(tracked_lr) < math.inf
    ):
        raise ValueError(
            f"tracked_lr={tracked_lr!r} is not valid: a finite number, at least 0, in the unit of the rule, or None"
        )
    reference = group.get("reference_lr", 1.0)
    if not isinstance(reference, numbers.Real) or not 0 < float(reference) < math.inf:
        raise ValueError(
            f"reference_lr={reference!r} is not valid: it must be finite and above 0, the lr at which tracked_lr "
            "holds; leave it out to have it be lr"
        )
    seed = group["stochastic_rounding"]
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise ValueError(
            f"stochastic_rounding={seed!r} is not valid: a seed (an integer from 0 to 2⁶³−1), or None"
        )
    if flag is not None and not isinstance(flag, bool):
        raise ValueError(
            f"scale_invariant={flag!r} is not valid: True, False, or leave it out to have it measured"
        )
    if group["differentiable"] and (rule is not None or group["project"]):
        raise ValueError(
            "differentiable=True needs rule=None and project=False: rules do not take part in autograd"
        )
    if group["fused"] and isinstance(group["weight_decay"], Tensor):
        raise ValueError(
            "weight_decay as a tensor does not work with fused=True; give a float or use foreach=True"
        )
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("fused=True does not support differentiable=True; use fused=False")
    if group["fused"] and group["foreach"]:
        raise RuntimeError("fused and foreach cannot both be True; choose one")
