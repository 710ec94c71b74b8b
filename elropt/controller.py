"""The rules behind any optimizer: its step makes the direction, the rule says how far every tracked layer turns."""

# torch._foreach_* are functions of torch's own optimizers, not documented as public.
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

from __future__ import annotations

import math
import numbers
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ._eager_step import Group, measure, update_groups, upload
from ._group_values import lr_of
from ._state_dict import params_by_index
from ._unwrap import type_name, unwrap
from ._validate import refuse_flattened
from .backend import UpdateOptions, choose_backend
from .layer_table import Tracked, params_of
from .optimizer import ELRSGD, LARGE_ANGLE
from .rules import (
    RULES,
    LayerControls,
    LayerStats,
    RowHyper,
    RuleInputs,
    RuleState,
    masked_mean,
    turn_on_sphere,
    update_parts,
    usable,
)
from .sharding import check_placement, is_zero, local, reductions, shard_of

__all__ = ["RADIUS", "Controller", "control", "controller_of", "turn"]

RADIUS = "control_radius"  # in `optimizer.state[p]`
BEHIND_ANY = [name for name, spec in RULES.items() if spec.decide_update and not spec.settles]
AS_IT_IS = UpdateOptions(
    lr=1.0, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False
)


def control(
    optimizer: object,
    rule: str = "angle",
    *,
    granularity: str = "layer",
    tracked: Tracked = None,
) -> Controller:
    r"""Have a rule decide how far the steps of any torch optimizer turn the tracked layers.

    The base optimizer makes the direction, the rule the length. Per tracked layer, with Δ the change of the weight w in
    a step of the base optimizer and Δ⊥ = Δ − (⟨w,Δ⟩/‖w‖²)·w its tangential part:

        w ← R·(cos φ·w/‖w‖ + sin φ·Δ⊥/‖Δ⊥‖)

    so it turns by exactly the angle φ and keeps the norm R that it had when control began. All other parameters, and
    the state of the base optimizer, are those of the base optimizer, bit for bit.

    Args:
        optimizer: any torch optimizer: AdamW, Muon, SGD, Adafactor, one of another package, or what wraps one. An
            `ELRSGD` must have ``rule=None``.
        rule: "angle": φ is the ``lr`` of the layer's group, in radians per step, as it is when the step begins (a
            number or a one-element tensor). "uniform": φ is the geometric mean of the angles by which the base
            optimizer would have turned the layers in this step.
        granularity: what one norm is taken over: "layer" (a tensor), "filter" (each index of its dimension 0, a neuron)
            or, for "angle", "network" (all tracked tensors together, the largest ``lr`` among them counts).
        tracked: the layers: what `find_scale_invariant` returned, or names or parameters. Names need an optimizer that
            was made with `model.named_parameters()`; of a dict, those that it does not have are left out. Layers of
            param groups with ``scale_invariant=True`` (see `elropt.param_groups`) are always tracked, also of groups
            that are added later. None: only these.

    Returns:
        A handle; `Controller.remove` ends the control.

    Raises:
        TypeError: no torch optimizer, and none in it.
        ValueError: nothing is tracked; a rule or granularity that does not exist; an optimizer that is controlled
            already or has a rule of its own; a parameter that no rule can take. `step` raises it, before anything
            changes, if with "angle" an ``lr`` is no number from 0 to π/2 (tensors are not read).

    Warns:
        UserWarning: once, if "angle" is to turn layers by more than 0.1 rad per step.

    What else can happen, by name:

    - weight decay of the base is radial and has no effect on tracked layers; only L2 decay inside Adam's moments
      has, for these divide it by other numbers in every entry, and inside momentum, a little;
    - Δ = 0 (a step that `torch.amp.GradScaler` leaves out, no gradient): the weight stays as it was, bit for bit;
      so does one whose Δ is radial, to the rounding of its dtype;
    - Δ not finite, or w = 0: the layer gets what the base optimizer made of it, and has no influence on others;
    - a copy or an unpickled optimizer has no hooks, as always in torch: call `control` on it again, before
      `load_state_dict`. It then goes on with the norms that the first one kept.

    State of a tracked parameter, beside that of the base optimizer: `control_radius`, float32 [1] or for "filter"
    [size of dimension 0]: R. It is saved and loaded with the optimizer, and absent while the base's own step runs.
    Memory: a copy of the tracked weights during a step. It never waits for the device. Parameters that are DTensors
    (FSDP2, tensor parallelism) are controlled as whole tensors.

    Source: W ← R·normalize(W − η·R·normalize(u)), u = −Δ, is the Hyperball update (Wen et al. 2026, arXiv 2606.16899);
    it turns by φ = atan2(η·√(1−ρ²), 1−ηρ), ρ = cos(w,u). Derived, docs/guide/control.md.

    Examples:
        >>> groups = elropt.param_groups(model, x, weight_decay=0.01)
        >>> for group in groups:
        ...     group["lr"] = 0.01 if group["scale_invariant"] else 1e-3  # radians per step; AdamW's
        >>> optimizer = torch.optim.AdamW(groups)
        >>> elropt.control(optimizer)
    """
    base = unwrap(optimizer)
    if rule not in BEHIND_ANY:
        raise ValueError(
            f"rule={rule!r} is not one of {', '.join(map(repr, BEHIND_ANY))}; choose one of these"
        )
    if granularity not in RULES[rule].granularities:
        raise ValueError(
            f"granularity={granularity!r} has no meaning for rule={rule!r}; choose one of "
            f"{', '.join(map(repr, RULES[rule].granularities))}"
        )
    holder = _holder(base)
    if _controller_among(_hooks(base, holder)) is not None:
        raise ValueError(
            "this optimizer is controlled already: keep what control returned, and call its remove() first"
        )
    return Controller(base, holder, rule, granularity, params_of(holder, tracked) or frozenset())


def controller_of(optimizer: Optimizer) -> Controller | None:
    """The control that acts on the steps of an optimizer, if any."""
    return _controller_among(optimizer._optimizer_step_pre_hooks.values())


class Controller:
    """What `control` returned: it acts at every step of the optimizer, until `remove`.

    Attributes:
        rule, granularity: as given.
    """

    def __init__(
        self, optimizer: Optimizer, holder: Optimizer, rule: str, granularity: str, tracked: frozenset[Tensor]
    ) -> None:
        self.rule = rule
        self.granularity = granularity
        self._tracked = set(tracked)
        self._rows: _Rows | None = None
        self._pending: list[_Snapshot] = []  # of the steps that have begun
        self._loading: Mapping[str, Any] = {}
        self._loaded: dict[Tensor, Tensor] = {}  # radii of parameters that the base optimizer has no state of
        self._warned = False
        self._holder = weakref.ref(holder)
        found = self._find_tracked(holder)
        if not found:
            raise ValueError(
                "nothing is tracked: no param group has scale_invariant=True and no layer was given. Make the "
                "optimizer with elropt.param_groups(model, *inputs), or pass "
                "tracked=elropt.find_scale_invariant(model, *inputs)"
            )
        self._given = {id(p): p.dim() != 1 for group in holder.param_groups for p in group["params"]}
        _check_base(holder)
        _check_params(found, holder, rule)
        self._check_lrs(found, stacklevel=4)
        after = optimizer.register_step_post_hook(self._after)
        # the hooks of others, such as an average of the weights, are to see the weights that the step ends with
        hooks: Any = optimizer._optimizer_step_post_hooks
        hooks.move_to_end(after.id, last=False)
        self._handles = [
            after,
            optimizer.register_step_pre_hook(self._before),
            holder.register_state_dict_pre_hook(self._return_radii, prepend=True),
            holder.register_state_dict_post_hook(self._after_state_dict, prepend=True),
            holder.register_load_state_dict_pre_hook(self._before_load),
            holder.register_load_state_dict_post_hook(self._after_load, prepend=True),
        ]

    def __repr__(self) -> str:
        return f"Controller(rule={self.rule!r}, granularity={self.granularity!r})"

    def remove(self) -> None:
        """End the control: the next step is the base optimizer's own, and its state is its own again."""
        for handle in self._handles:
            handle.remove()
        self._pending.clear()
        self._loaded.clear()
        holder = self._holder()
        if holder is not None:
            _take_radii(holder, [p for group in holder.param_groups for p in group["params"]])

    @torch.compiler.disable()
    def _before(self, optimizer: Optimizer, *_: object) -> None:
        """Keep a copy of the tracked weights, and take the radii out of the state: many optimizers ask whether the
        state of a parameter is empty to know their first step."""
        holder = _holder(optimizer)
        _check_base(holder)
        params = self._find_tracked(holder)
        self._check_lrs(params, stacklevel=6)
        with torch.inference_mode(False), torch.no_grad():
            if self._rows is None or not self._rows.are_of(params):
                self._check_replaced(params, holder)
                _check_params(params, holder, self.rule)
                self._return_radii(holder)
                self._rows = _Rows(list(params), per_filter=self.granularity == "filter")
            # a step may call the hooked step of its base class: both are controlled; what failed is forgotten
            depth = sum(getattr(vars(kind).get("step"), "hooked", False) for kind in type(optimizer).__mro__)
            self._pending = self._pending[max(0, len(self._pending) - depth + 1) :]
            self._rows.take_radii(holder, self._loaded)
            self._loaded.clear()
            self._pending.append(
                _Snapshot(self._rows, self._rows.copies(), self._rows.by_row(self._angles(params)))
            )

    @torch.compiler.disable()
    def _after(self, optimizer: Optimizer, *_: object) -> None:
        """Replace what the base optimizer has made of the tracked weights."""
        if not self._pending:
            return
        rows, copies, angle = self._pending.pop()
        with torch.inference_mode(False), torch.no_grad():
            rows.turn(copies, angle, whole=self.granularity == "network")
        holder = _holder(optimizer)
        rows.count_moved(holder)
        rows.return_radii(holder)

    def _angles(self, params: Mapping[Tensor, Mapping[str, Any]]) -> list[float | Tensor] | None:
        """Of each parameter of the rows; None: the rule has no angle of its own."""
        if self._rows is None or not _lr_is_angle(self.rule):
            return None
        return [_lr_of(params[p]) for p in self._rows.params]

    def _return_radii(self, holder: Optimizer) -> None:
        """After a step that failed they are not in the state."""
        if self._rows is not None:
            self._rows.return_radii(holder, only_missing=True)

    def _after_state_dict(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        """torch.distributed.checkpoint wants a state of all parameters or of none: where the base optimizer keeps
        none, the others get an empty radius, in the dict alone."""
        state = state_dict["state"]
        if any(set(held) != {RADIUS} for held in state.values()):
            return
        radii = [held[RADIUS] for held in state.values()]
        for group in state_dict["param_groups"] if radii else ():
            for index in group["params"]:
                state.setdefault(index, {RADIUS: torch.empty(0, device=radii[0].device)})

    def _before_load(self, _: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Without the states that are a radius alone: many optimizers take any state for one of their own."""
        self._loading = state_dict
        own = {index: held for index, held in state_dict["state"].items() if set(held) != {RADIUS}}
        return {**state_dict, "state": own}

    def _after_load(self, holder: Optimizer) -> None:
        """The radii stay float32: torch casts state to the dtype of the parameters."""
        loaded, self._loading = self._loading, {}
        by_index = params_by_index(loaded["param_groups"], holder.param_groups)
        _take_radii(holder, [p for _, p in by_index])
        self._loaded.clear()
        keeps_state = bool(holder.state)
        for index, p in by_index:
            radius = loaded["state"].get(index, {}).get(RADIUS)
            if radius is None or not radius.numel():
                continue
            radius = radius.detach().to(p.device, torch.float32, copy=True)
            if keeps_state and not holder.state.get(p):
                self._loaded[p] = radius
            else:
                holder.state[p][RADIUS] = radius
        self._rows = None

    def _find_tracked(self, optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
        """The tracked parameters that the optimizer may change, and their groups. What was tracked once stays so, also
        if loading a state dict has replaced the flag of its group."""
        found = {}
        for group in optimizer.param_groups:
            flag = group.get("scale_invariant")
            if flag is True:
                self._tracked.update(group["params"])
            if flag is False:
                continue
            for p in group["params"]:
                if p in self._tracked and not is_lazy(p) and p.numel():
                    found[p] = group
        return found

    def _check_replaced(self, params: Mapping[Tensor, Mapping[str, Any]], holder: Optimizer) -> None:
        """Refuse to go on where others have put other parameters into the optimizer."""
        groups = [{**group, "rule": self.rule, "project": False} for group in holder.param_groups]
        refuse_flattened(groups, self._given)
        if not params:
            raise ValueError(
                "none of the tracked layers is in the optimizer any more: its parameters have been replaced. Call "
                "elropt.control after that (after fully_shard, after the optimizer is made), or remove() the control"
            )

    def _check_lrs(self, params: Mapping[Tensor, Mapping[str, Any]], stacklevel: int) -> None:
        """Refuse angles out of range, and warn once of large ones. Reads no tensor."""
        if not _lr_is_angle(self.rule):
            return
        for group in {id(group): group for group in params.values()}.values():
            lr = _lr_of(group)
            if isinstance(lr, Tensor) and lr.numel() == 1:
                continue
            if not isinstance(lr, numbers.Real) or not 0 <= float(lr) <= math.pi / 2:
                raise ValueError(
                    f"lr={lr!r} of a group with tracked layers is not valid: rule={self.rule!r} turns these by lr "
                    "radians per step, from 0 to π/2; set the lr of this group (0.01 to begin with), or use "
                    "another rule"
                )
            if float(lr) > LARGE_ANGLE and not self._warned:
                self._warned = True
                warnings.warn(
                    f"rule={self.rule!r} is to turn every tracked layer by lr={float(lr):g} radians per step. More "
                    f"than {LARGE_ANGLE} is hardly ever wanted: give the tracked layers a param group with an lr of "
                    "its own, 0.01 to begin with",
                    UserWarning,
                    stacklevel=stacklevel,
                )


def _check_base(holder: Optimizer) -> None:
    """Refuse an optimizer that has a rule of its own or holds the layers of one rank alone, and CUDA graphs."""
    if isinstance(holder, ELRSGD) and any(g["rule"] is not None or g["project"] for g in holder.param_groups):
        raise ValueError(
            "this ELRSGD has a rule of its own: use that one alone, or make it with rule=None, project=False"
        )
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the control of a step cannot be captured in a CUDA graph: capture forward and backward alone, and call "
            "optimizer.step() after the replay"
        )


def _check_params(params: Mapping[Tensor, Mapping[str, Any]], holder: Optimizer, rule: str) -> None:
    """Refuse tracked parameters that no rule can take, and options of their groups that would be ignored."""
    for p, group in params.items():
        check_placement(p, rule, inside_zero=is_zero(holder))
        if not p.is_floating_point():
            raise ValueError(
                f"a tracked parameter of shape {tuple(p.shape)} is {p.dtype}; only real floating-point parameters can "
                "be tracked: put it into a group with scale_invariant=False"
            )
        if group.get("differentiable"):
            raise ValueError(
                "differentiable=True: the control of a step does not take part in autograd; use differentiable=False"
            )
        if group.get("tracked_lr") is not None and not isinstance(holder, ELRSGD):
            raise ValueError(
                f"tracked_lr={group['tracked_lr']} is an option of ELRSGD: for other optimizers set the lr of the "
                "group with the tracked layers, group['lr'], and leave tracked_lr out"
            )
        radius = holder.state.get(p, {}).get(RADIUS)
        if radius is not None and radius.dtype != torch.float32:
            raise ValueError(
                f"the {RADIUS} of a parameter of shape {tuple(p.shape)} is {radius.dtype}, not float32: it was loaded "
                "without control; call elropt.control before load_state_dict"
            )


def _lr_is_angle(rule: str) -> bool:
    return RULES[rule].lr_unit == "rad per step"


def _lr_of(group: Mapping[str, Any]) -> Any:
    """As it is now; of an ELRSGD that of its tracked layers."""
    return lr_of(group) if group.get("tracked_lr") is not None else group.get("lr")


class _Snapshot(NamedTuple):
    """What is kept during a step.

    weights: copies of the tracked weights, on this rank.
    angle: of each row; None: the rule finds it from the step.
    """

    rows: _Rows
    weights: list[Tensor]
    angle: Tensor | None


class _Rows:
    """The rows of the tracked parameters, in one order, and the radii that they keep.

    A row is what one norm is taken over, a tensor or one index of its dimension 0. Parameters of the same device and
    dtype are neighbours.
    """

    def __init__(self, params: Sequence[Tensor], *, per_filter: bool) -> None:
        self._given = [(p, p.device, p.dtype, p.shape) for p in params]
        self.params = sorted(params, key=_kind)
        self.per_filter = per_filter
        self.counts = [p.shape[0] if per_filter and p.dim() else 1 for p in self.params]
        self.shards = [shard_of(p, by_rows=per_filter) for p in self.params]
        self.device = self.params[0].device if self.params else torch.device("cpu")
        self.reductions = reductions(self.params, self.counts, self.shards, self.device)
        self.radius = torch.zeros(sum(self.counts), device=self.device)
        self.radii = [r if r.device == p.device else r.to(p.device) for p, r in self._by_param()]
        self.eps = upload(
            np.repeat([torch.finfo(p.dtype).eps for p in self.params], self.counts).astype(np.float32),
            self.device,
        )
        self._sent: tuple[list[float], Tensor] = [], self.radius
        self._moved = [False] * len(self.params)

    def _by_param(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.params, self.radius.split(self.counts), strict=True))

    def are_of(self, params: Iterable[Tensor]) -> bool:
        """Whether these are the rows of `params`."""
        now = [(p, p.device, p.dtype, p.shape) for p in params]
        return len(now) == len(self._given) and all(
            a[0] is b[0] and a[1:] == b[1:] for a, b in zip(now, self._given, strict=True)
        )

    def take_radii(self, optimizer: Optimizer, loaded: Mapping[Tensor, Tensor]) -> None:
        """Out of the state of the optimizer; what somebody else has put there, or was `loaded`, is taken over."""
        held = _take_radii(optimizer, self.params)
        self._moved = [before or its is not None for before, its in zip(self._moved, held, strict=True)]
        held = [loaded.get(p) if its is None else its for p, its in zip(self.params, held, strict=True)]
        for own, count, its in zip(self.radii, self.counts, held, strict=True):
            if its is not own and its is not None and its.numel() == count:  # else of another granularity
                own.copy_(its.view(count))
        if any(own.device != self.device for own in self.radii):
            self.radius.copy_(torch.cat([own.to(self.device) for own in self.radii]))

    def count_moved(self, optimizer: Optimizer) -> None:
        """After a step: which parameters it may have moved."""
        self._moved = [
            before or p.grad is not None or bool(optimizer.state.get(p))
            for before, p in zip(self._moved, self.params, strict=True)
        ]

    def return_radii(self, optimizer: Optimizer, *, only_missing: bool = False) -> None:
        """Into the state of the optimizer, but for parameters that have not moved yet: it has no state of these, and
        many take any for one of their own. Their norms can be measured again."""
        for p, own, moved in zip(self.params, self.radii, self._moved, strict=True):
            if moved and not (only_missing and RADIUS in optimizer.state.get(p, {})):
                optimizer.state[p][RADIUS] = own

    def copies(self) -> list[Tensor]:
        """Of the weights as they are now."""
        weights = [local(p).detach() for p in self.params]
        copies = [torch.empty_like(w) for w in weights]
        if weights:
            torch._foreach_copy_(copies, weights)
        return copies

    def by_row(self, lrs: Sequence[float | Tensor] | None) -> Tensor | None:
        """One value per parameter as a vector, [R] float32 on the device. Numbers are sent if they have changed."""
        if lrs is None:
            return None
        values = [0.0 if isinstance(lr, Tensor) else float(lr) for lr in lrs]
        if values != self._sent[0]:
            self._sent = values, upload(np.repeat(values, self.counts).astype(np.float32), self.device)
        vector = self._sent[1]
        if any(isinstance(lr, Tensor) for lr in lrs):
            vector = vector.clone()
            for part, lr in zip(vector.split(self.counts), lrs, strict=True):
                if isinstance(lr, Tensor):
                    part.copy_(local(lr).detach().reshape(()), non_blocking=True)
        return vector

    def turn(self, weights: list[Tensor], angle: Tensor | None, *, whole: bool) -> None:
        """Turn the parameters from where they were before the step, `weights`, in the direction that it took. If that
        fails each is where it was, or is turned, and the radii are those of before."""
        if not weights:
            return
        changes = [local(p).detach() for p in self.params]
        torch._foreach_sub_(changes, weights)
        try:
            groups = self._groups(weights, changes)
            stats = measure(
                groups,
                self.device,
                per_filter=self.per_filter,
                with_momentum=False,
                reductions=self.reductions,
            )
            controls, radius = turn(stats, self.radius, angle, self.eps, whole=whole)
            update_groups(groups, controls, per_filter=self.per_filter)
        finally:
            torch._foreach_copy_(changes, weights)
        self.radius.copy_(radius)
        for own, (_, part) in zip(self.radii, self._by_param(), strict=True):
            if own.device != self.device:
                own.copy_(part, non_blocking=True)

    def _groups(self, weights: list[Tensor], changes: list[Tensor]) -> list[Group]:
        groups, first = [], 0
        kinds = list(map(_kind, self.params))
        while first < len(kinds):
            end = first + kinds[first:].count(kinds[first])
            here = slice(first, end)
            none: list[Tensor | None] = [None] * (end - first)
            backend = choose_backend(
                weights[here], changes[here], none, foreach=None, fused=None, per_filter=self.per_filter
            )
            groups.append(
                Group(
                    self.params[here],
                    weights[here],
                    changes[here],
                    self.shards[here],
                    none,
                    self.counts[here],
                    AS_IT_IS,
                    backend,
                )
            )
            first = end
        return groups


def turn(
    stats: LayerStats, radius: Tensor, angle: Tensor | None, eps: Tensor, *, whole: bool = False
) -> tuple[LayerControls, Tensor]:
    """The factors with which w ← a·w − s·Δ turns every row by its angle, and the radii after the step.

    Args:
        stats: of w before the step, with its change Δ in place of a gradient, [R].
        radius: [R] the norm R that each row keeps; 0: not yet seen.
        angle: [R] φ; None: the geometric mean of the angles by which the changes turn.
        eps: [R] the relative rounding of the dtype.
        whole: all rows together are one vector; `radius` holds their shares of its norm.
    """
    zero, one = torch.zeros_like(radius), torch.ones_like(radius)
    update = LayerStats(stats.weight_sq, stats.grad_sq, -stats.weight_dot_grad, zero, zero, zero)  # u = −Δ
    hyper = RowHyper(one, zero, one, one, zero, one)
    parts = update_parts(update, hyper)
    radial, tangent_sq, update_sq, has_tangent = parts
    directed = usable(stats.weight_sq) & torch.isfinite(update_sq) & torch.isfinite(stats.weight_dot_grad)
    # a change that is radial alone leaves the rounding of the new weight
    rounding_sq = torch.minimum(radial.square(), (eps / 2).square()) * stats.weight_sq
    moving = directed & has_tangent & (tangent_sq > rounding_sq)
    if angle is None:
        own = torch.atan2(tangent_sq.sqrt(), stats.weight_sq.sqrt() * (1 - radial))
        angle = masked_mean(torch.where(moving, own.log(), 0.0), moving).exp()
    inputs = RuleInputs(
        update, RuleState(zero, radius, one, zero, zero), hyper, directed, moving, whole, update=parts
    )
    controls, after = turn_on_sphere(inputs, angle)
    a, p, f = controls.weight_factor, controls.radial, controls.lr_factor
    assert a is not None
    assert p is not None
    assert f is not None
    # w ← a·w − f·(u − p·a·w). A factor of +0 leaves the bits of w, also those of −0.0; −1 is the base optimizer's step
    s = torch.where(moving, -f, torch.where(directed, 0.0, -1.0))
    return LayerControls(grad_factor=s, weight_factor=torch.where(moving, a * (1 + f * p), 1.0)), after.radius


def _kind(p: Tensor) -> tuple[str, str]:
    return str(p.device), str(p.dtype)


def _holder(optimizer: Optimizer) -> Optimizer:
    """Who holds the state: the optimizer itself or, of a wrapper with hooks around its steps alone, the one in it."""
    found: Any = optimizer
    while found is not None and not hasattr(found, "_optimizer_load_state_dict_pre_hooks"):
        found = getattr(found, "optimizer", None)
    if found is None:
        raise TypeError(
            f"a {type_name(optimizer)} has no hooks around its state, since its __init__ does not call that of "
            "torch.optim.Optimizer: pass the optimizer in it"
        )
    return found


def _controller_among(hooks: Iterable[object]) -> Controller | None:
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, Controller)), None)


def _hooks(optimizer: Optimizer, holder: Optimizer) -> list[Any]:
    steps, loads = optimizer._optimizer_step_pre_hooks, holder._optimizer_load_state_dict_pre_hooks
    return [*steps.values(), *loads.values()]


def _take_radii(optimizer: Optimizer, params: Iterable[Tensor]) -> list[Tensor | None]:
    """Out of the state, of which nothing is left where there was nothing else."""
    found = []
    for p in params:
        held: dict[str, Any] | None = optimizer.state.get(p)
        found.append(None if held is None else held.pop(RADIUS, None))
        if held is not None and not held:
            del optimizer.state[p]
    return found
