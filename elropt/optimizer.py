"""ELRSGD: holds the state and says when what happens. The arithmetic is in `rules` and the backends."""

from __future__ import annotations

import collections
import itertools
import math
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
from ._eager_step import LayerMeasurements
from ._group_values import (
    angle_of,
    has_lr_by_row,
    has_tensor_decay,
    may_be_tracked,
    reference_lr,
    rule_key,
    set_reference_lrs,
)
from ._rule_group import RuleGroup, RuleGroupPlan
from ._rule_memory import State
from ._state_dict import complete_state_dict, restore_memory
from ._triton_step import TritonStep
from ._validate import (
    check_decay,
    check_params,
    refuse_capture,
    refuse_duplicates,
    refuse_flattened,
    refuse_one_of_many,
    validate,
    validate_choices,
    validate_numbers,
)
from .rules import RULES
from .sharding import is_dtensor, is_inside_zero, local

__all__ = ["ELRSGD"]

LARGE_ANGLE = 0.1  # in radians per step
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
    "elr_of": None,
    "protect": None,
    "stochastic_rounding": None,
}
_STEP_VALUES = operator.itemgetter(
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "rule",
    "project",
    "tracked_lr",
    "elr_of",
    "protect",
)


class ELRSGD(Optimizer):
    r"""`torch.optim.SGD` that measures and controls the effective learning rate (ELR) of every layer.

    In front of a normalization only the direction of a weight w matters, and one SGD step turns it by about
    λ·E radians, E = ‖g‖/‖w‖. ELRSGD measures E for every such layer and lets a *rule* act on it:

        measure   ‖w‖², ‖g‖², ⟨w,g⟩ of every tracked layer
        decide    the rule's s, a, p from these numbers alone
        update    ŵ = a·w ;  g̃ = s·g + ω·ŵ ;  m ← μ·m + (1−d)·g̃ ;  u = nesterov ? g̃ + μ·m : m
                  u ← u − p·ŵ (with project) ;  w ← ŵ − λ·u

    With ``rule=None`` and float hyper-parameters this is `torch.optim.SGD`, bit for bit. A layer is *tracked* if its
    group has ``scale_invariant=True`` (see `elropt.param_groups`), or, in groups without that key, if it has two or
    more dimensions and its gradient has been orthogonal to it in each of its first 8 steps (or more, as long as the
    steps hardly turn it: a bias that is still at 0 hides a dependence).
    All other parameters see plain SGD. Groups with the same rule, granularity, project, elr_of and protect are decided
    together, others apart.

    Args:
        params: parameters, named parameters or param groups, as in `torch.optim.SGD`.
        lr: learning rate λ ≥ 0, a float or a one-element tensor. Its unit for the tracked layers depends on the rule:
            ``None``, "warmup", "uniform" and "equilibrium": SGD's; "angle": radians per plain SGD step, with
            ``elr_of="update"`` per step; "sphere": learning rate on the unit sphere. A scheduler owns ``group["lr"]``;
            no rule writes it.
        momentum: μ, 0 ≤ μ < 1 (any μ ≥ 0 with ``rule=None``).
        dampening: d.
        weight_decay: ω ≥ 0, L2 decay inside the gradient. It is radial, so with ``project``, "angle" and
            "sphere" it has hardly any effect on tracked layers (none without momentum), with "equilibrium" none but
            the angle.
        nesterov: Nesterov momentum; needs ``momentum > 0`` and ``dampening = 0``.
        rule: what is done to the tracked layers.

            - "warmup" (default): all tracked layers have the same ELR while their weights are rescaled, which does not
              change the network's function, until they have it under plain SGD too (to 10 %); from then on it is plain
              SGD. The ELR is λĒ, Ē the geometric mean, but no more than the critical one, √((1−μ)³/(1+μ)): at 0.023 rad
              with momentum 0.9, steady gradients double ‖w‖² in a step. While a schedule raises λ, as a linear warm-up
              does, the rule goes on; after the hand-over, often within 100 steps, it starts again when λ (times what
              momentum makes of it) exceeds the largest so far. No hyper-parameters.
            - "uniform": s = Ē/E, Ē the geometric mean: all tracked layers have the same ELR.
            - "angle": every tracked layer has the ELR ``lr``, in radians per plain SGD step, and keeps its initial
              norm.
            - "sphere": SGD with learning rate ``lr`` on the unit sphere (Kodryan et al., NeurIPS 2022), norm kept.
            - "equilibrium": every tracked layer turns, from the first step on, by the angle at which SGD with this lr,
              weight decay and momentum would settle, √(2·lr·weight_decay/(1+μ)) without Nesterov momentum, and keeps
              its norm. All other parameters are held back where they would move further (`protect`). Needs
              ``weight_decay > 0`` for tracked layers.
            - None: plain SGD.

            In "sphere", and in "angle" and "equilibrium" with ``elr_of="gradient"``, the stored weight is one step
            ahead of its sphere: each step first brings it back (a = radius/‖w‖), then moves it; its direction is
            exactly that of training on the sphere.
        tracked_lr: the tracked layers' own learning rate, in the unit of the rule; a number. They train as if the lr of
            their group were ``tracked_lr · group["lr"] / reference_lr``, where ``group["reference_lr"]`` is, and stays,
            the `lr` that it was given with: the constructor's for the constructor's `tracked_lr`, so that groups with
            another `lr` differ by as much, its own for a group's. None: `lr`. Under ``rule=None``, and on the Triton
            kernels, only groups with the key ``scale_invariant`` can have it.
        project: remove the radial part of the update of tracked layers, to the rounding of float32.
        granularity: what one norm is taken over: "layer" (a tensor), "filter" (each index of its dimension 0; for
            "uniform", "angle", "equilibrium" and "sphere") or "network" (all tracked tensors together; "angle",
            "equilibrium" and "sphere").
        elr_of: whose length "uniform", "angle" and "equilibrium" control. "gradient": the gradient's, so layers have
            the same `elr`, and with momentum they turn by angles that differ. "update": that of the update, after
            momentum and without its radial part, so layers turn by the same angle, measured from the weight before and
            after: the geometric mean ("uniform"), ``lr`` radians ("angle"), the angle of the equilibrium. None: the
            rule's own, "update" for "equilibrium" and "gradient" for the others.
        protect: beside "equilibrium", whether parameters that are not tracked (head, gains, biases) are held back: in
            relation to their size they move by at most the angle of the tracked layers times √((1−μ)/(1+μ)). The size
            is ‖w‖, for vectors of n at least √n, for others at least √(shape[0]/3), the norm of PyTorch's default
            initialization. They are what breaks first when lr is large. None: True with that rule.
        stochastic_rounding: a seed: bfloat16 parameters are rounded up or down with the probabilities that keep their
            mean, so that updates smaller than half their last digit are not lost. Repeatable; Triton kernels only.
            None: to the nearest. Other dtypes are not concerned.
        maximize: maximize the objective.
        foreach: whether to step by `torch._foreach_*`. None, as for `fused`, picks fused on CUDA where every tensor of
            the group qualifies, else foreach on CUDA and, in float32 and float64, on the CPU (there without a rule to
            the bits of torch's for-loop; the sums of a rule round otherwise), else one tensor after the other. Where
            some gradients are sparse, the group is stepped one tensor after the other, as in torch.
        fused: whether to step by the Triton kernels (CUDA only).
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
      others (a NaN stays in its own layer). Where the angle of the update is set ("angle" and "equilibrium" with
      ``elr_of="update"``) it stays where it is; more: docs/guide/faults.md;
    - sparse gradients and complex parameters are never tracked; sparse ones need ``rule=None``, no decay;
    - nothing to track: the rule does nothing, and "warmup" stays armed;
    - layers that join after the hand-over of the warm-up see plain SGD, and are tested for reports;
    - parameters flattened by FSDP1 or DeepSpeed ZeRO, and with rules that compare layers one optimizer for each
      parameter, stepped in backward: ValueError, docs/guide/distributed.md.

    State of a parameter: `momentum_buffer`, and with a rule or `project` the float32 tensors `sphere_grad_norm` (c,
    smoothed), `radius`, `tracked` (radial tests passed, or -1), `handed_over` and `largest_lr`
    (the same for all parameters: 1 while "warmup" is over; the largest λΓ that it acted at). With
    `stochastic_rounding` also `rounding_step`, int64.

    Source: derived, docs/theory.md; the model is that of Mehmeti-Göpel & Wand, ICML 2024 (arXiv 2306.00700).

    Examples:
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
        elr_of: str | None = None,
        protect: bool | None = None,
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
            "elr_of": elr_of,
            "protect": protect,
            "stochastic_rounding": stochastic_rounding,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        validate(defaults)
        # Every attribute is made here, and anew by `__setstate__`. Written by `add_param_group` alone:
        self._inside_zero = is_inside_zero()
        self._given: dict[int, bool] = {}  # ids of the parameters; whether they had other than one dimension
        # Written by `_update_rule_groups`; `_held` also at the end of a step:
        self._rule_groups: list[RuleGroup] | None = None
        self._layout: tuple[list[object], list[object]] = [], []  # of the param groups: objects, options
        self._held: tuple[list[object], list[object]] = [], []  # what the state held
        # Written by `step`:
        self._captured: dict[int, TritonStep] = {}  # CUDA graphs that are replayed later use their memory
        self._checked: tuple[list[Any], list[Any]] = [], []  # learning rates and other values
        self._warned_of_angle = False
        self._recording = False  # and by `record_next_step`
        self._stepping = threading.RLock()
        super().__init__(params, defaults)
        self._prepare_tracing()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's own hyper-parameters are checked before it is added."""
        added = {}
        if isinstance(param_group, dict):
            complete = {**self.defaults, **param_group}
            reference = self.defaults if "tracked_lr" not in param_group else complete
            validate(complete)
            if complete["tracked_lr"] is not None and "reference_lr" not in complete:
                added["reference_lr"] = reference_lr(complete, reference["lr"])
            refuse_duplicates(complete)
            check_params(complete, inside_zero=self._inside_zero)
        super().add_param_group(param_group)
        self._rule_groups = None
        group = self.param_groups[-1]
        group |= added
        self._given.update({id(p): is_lazy(p) or p.dim() != 1 for p in group["params"]})
        self._warn_of_large_angle(group, float(group["lr"]), stacklevel=4)

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
            UserWarning: rule, granularity, project, elr_of or protect of the dict are not those of the optimizer, or
                only one of the two has a tracked_lr; the dict's hold.

        Raises:
            ValueError: a state dict of another optimizer than SGD and ELRSGD, or groups, names, shapes, dtypes, values
                or hyper-parameters that do not fit; nothing has been changed then.
        """
        loaded: dict[str, Any] = {}

        def complete(_: Optimizer, final: dict[str, Any]) -> None:
            complete_state_dict(final, self.param_groups, self.defaults)
            loaded.update(final)

        def restore(_: Optimizer) -> None:
            restore_memory(self.state, loaded, self.param_groups)

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

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Never waits for the device, unless torch.amp.GradScaler is used where only some tensors qualify for
        the kernels, or parameters are sharded (docs/guide/distributed.md), or "warmup" has a learning rate on a GPU
        (then it is at most 32 steps ahead of the device); the first step after a state has been loaded or a
        group added reads what the rule remembers once. Threads wait for one another.

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
        """`step` for one thread at a time. New state is made of normal tensors, also in inference mode."""
        with self._stepping:
            self._check_values()
            if torch.is_inference_mode_enabled():
                with torch.inference_mode(False), torch.no_grad():
                    self._step()
            else:
                self._step()

    def _step(self) -> None:
        rule_groups = self._update_rule_groups()
        plans = [rule_group.plan(self.state) for rule_group in rule_groups]
        # set by torch.amp.GradScaler around this call
        amp = {name: _tensor_or_none(self, name) for name in ("grad_scale", "found_inf")}
        all_fused = all(plan.triton_step is not None or not plan.groups for plan in plans)
        if amp["found_inf"] is not None and not all_fused:
            if not _unscale(self, amp):
                self._recording = False
                for rule_group in rule_groups:
                    rule_group.skip(amp["grad_scale"])
                return
            amp = dict.fromkeys(amp)
        self._keep_captured(plans)
        grown = [
            rule_group.step(plan, self.state, record=self._recording, **amp)
            for rule_group, plan in zip(rule_groups, plans, strict=True)
        ]
        if any(grown):
            self._held = self._state_objects()
        self._recording = False

    def _keep_captured(self, plans: list[RuleGroupPlan]) -> None:
        for plan in plans:
            if plan.triton_step is not None and plan.triton_plan is not None and plan.triton_plan.in_capture:
                self._captured[id(plan.triton_step)] = plan.triton_step

    @torch.compiler.disable()
    def _step_eagerly(self) -> None:
        """Rules look at addresses and version counters, which a trace would take for constants."""
        self._step_alone()

    def _prepare_tracing(self) -> None:
        """Make what the first step would make, where torch.compile could not trace that."""
        if self._is_traceable():
            self._update_rule_groups()

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
        Changes nothing. `elropt.layer_stats` makes a table of it."""
        rule_groups, state = self._rule_groups, self.state
        if (
            rule_groups is None
            or not self._is_laid_out_as_before()
            or any(rule_group.is_detached(state) for rule_group in rule_groups)
        ):  # as the next step will make them, of copies
            state = collections.defaultdict(
                dict, {key: dict(held) for key, held in _of_params(state).items()}
            )
            rule_groups = self._make_rule_groups([dict(group) for group in self.param_groups], state)
        records = [rule_group.record(state) for rule_group in rule_groups]
        return [record for record in records if record is not None]

    def _update_rule_groups(self) -> list[RuleGroup]:
        """The rule groups. Made anew if anybody has changed the param groups or their state."""
        held = self._state_objects()
        rule_groups = self._rule_groups
        is_as_left = all(map(_same_objects, held, self._held))
        if (
            rule_groups is None
            or not self._is_laid_out_as_before()
            or (not is_as_left and any(rule_group.is_detached(self.state) for rule_group in rule_groups))
        ):
            refuse_capture(self.param_groups)
            self._rule_groups = rule_groups = self._make_rule_groups(self.param_groups, self.state)
            has_lazy = any(is_lazy(p) for group in self.param_groups for p in group["params"])
            # with lazy parameters anew at the next step: they may have a shape then
            self._layout = ([], []) if has_lazy else self._layout_now()
            self._held = self._state_objects()
        elif not is_as_left:
            for rule_group in rule_groups:
                rule_group.forget_triton_steps(self.state)
            self._held = held
        return rule_groups

    def _make_rule_groups(self, param_groups: list[dict[str, Any]], state: State) -> list[RuleGroup]:
        """Make the rule groups, and put their memory into `state`."""
        together: dict[Any, list[dict[str, Any]]] = {}
        for group in param_groups:
            validate_choices(group)
            refuse_duplicates(group)
            check_params(group, inside_zero=self._inside_zero)
            together.setdefault(rule_key(group), []).append(group)
        refuse_flattened(param_groups, self._given)
        for groups in together.values():
            refuse_one_of_many(groups)
        set_reference_lrs(param_groups)
        with torch.inference_mode(False):
            return [RuleGroup(groups, state, number) for number, groups in enumerate(together.values())]

    def _is_laid_out_as_before(self) -> bool:
        """Whether the param groups, their parameters and the options that rule groups depend on are the same."""
        objects, options = self._layout_now()
        return options == self._layout[1] and _same_objects(objects, self._layout[0])

    def _layout_now(self) -> tuple[list[object], list[object]]:
        groups = self.param_groups
        params = [group["params"] for group in groups]
        objects = [*groups, *itertools.chain.from_iterable(params)]
        options: list[object] = [
            (
                g["rule"],
                g["granularity"],
                g["project"],
                g["elr_of"],
                g["protect"],
                g["stochastic_rounding"],
                g["tracked_lr"] is None,
                g.get("scale_invariant"),
            )
            for g in groups
        ]
        options += map(len, params)
        return objects, options

    def _state_objects(self) -> tuple[list[object], list[object]]:
        """The dicts of the state and what they hold, to notice when somebody has put in something else."""
        dicts = [held for key, held in self.state.items() if isinstance(key, Tensor)]
        return dicts, list(itertools.chain.from_iterable(map(dict.values, dicts)))

    def _check_values(self) -> None:
        """Check what a scheduler or the user has changed in groups with a rule since the last step. Reads no tensor."""
        lrs = [group["lr"] for group in self.param_groups]
        others = list(map(_STEP_VALUES, self.param_groups))
        if has_tensor_decay(self.param_groups):  # comparing it would wait for the device
            others = []
        as_before = bool(others) and others == self._checked[1]
        if as_before and _same_objects(lrs, self._checked[0]):
            return
        ruled = [group for group in self.param_groups if group["rule"] is not None or group["project"]]
        for group in ruled:
            if not (as_before and type(group["lr"]) is float and 0 <= group["lr"] < math.inf):
                validate_numbers(group, read_tensors=False)  # more than a scheduler's new lr
                validate_choices(group)
                check_decay(group)
        set_reference_lrs(ruled)
        for group in ruled:
            if not isinstance(group["lr"], Tensor):
                self._warn_of_large_angle(group, group["lr"], stacklevel=7)
        self._checked = lrs, others

    def _warn_of_large_angle(self, group: Mapping[str, Any], lr: float, stacklevel: int) -> None:
        """Warn once, where lr is an angle. The angle of "sphere", lr·‖g‖·‖w‖, is only known on the device."""
        angle = None if self._warned_of_angle else angle_of(group, lr)
        if (
            angle is None
            or angle <= LARGE_ANGLE
            or not any(may_be_tracked(p, group) for p in group["params"])
        ):
            return
        self._warned_of_angle = True
        remedy = "SGD's lr has another unit: keep it for all other parameters and give tracked_lr=0.01 to begin with"
        if RULES[group["rule"]].settles:
            remedy = "it goes with √(lr·weight_decay): take a smaller lr or weight_decay"
        warnings.warn(
            f"rule={group['rule']!r} is to turn every tracked layer by {angle:g} radians per "
            f"{'step' if rule_key(group).of_update else 'plain SGD step'} (lr={lr:g}, "
            f"tracked_lr={group['tracked_lr']}). More than {LARGE_ANGLE} is hardly ever wanted, and {remedy}",
            UserWarning,
            stacklevel=stacklevel,
        )


def _of_params(state: Mapping[Any, dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
    """The state of parameters, without what hooks keep under other keys."""
    return {key: held for key, held in state.items() if isinstance(key, Tensor)}


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
