"""What a rule remembers of its layers, packed into vectors that `optimizer.state` holds views of."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._group_values import lr_gain, may_be_tracked
from ._warmup_end import is_readable
from .rules import RADIAL_TESTS, ROW_STATE, RuleState

__all__ = ["STATE_DTYPES", "RuleMemory", "State"]

STATE_DTYPES = {**dict.fromkeys(RuleState._fields, torch.float32), "rounding_step": torch.int64}

State = MutableMapping[Tensor, dict[str, Any]]


class RuleMemory:
    """The memory of the param groups that share a rule; nothing but its tensors changes.

    Making it takes over what `state` holds of each row, zeros where it holds nothing, and leaves views of the new
    vectors there: so saving, loading and copying an optimizer need nothing of their own.

    Args:
        groups: the param groups.
        row_counts: of every parameter, see `count_rows`.
        state: of the optimizer.
        device: of the vectors.
        is_kept: whether the state is to hold it: with a rule, or `project`.

    Attributes:
        rows: one entry per row, `handed_over` and `largest_lr`.
        packed: the vectors of `rows` as one, float32 [3, R].
        warmup: `handed_over` and `largest_lr` as one, float32 [2].
        rounding_step: the steps that were rounded stochastically, 0-dim int64; None if no group asks for it.
        was_found: whether `state` held a memory of an earlier optimizer, or of one that was laid out in another way.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        row_counts: Mapping[Tensor, int],
        state: State,
        device: torch.device,
        *,
        is_kept: bool,
    ) -> None:
        self.counts = {p: n for p, n in row_counts.items() if n}
        self.flagged = {p for group in groups if group.get("scale_invariant") for p in group["params"]}
        self.never_tracked = {
            p for group in groups for p in group["params"] if row_counts[p] and not may_be_tracked(p, group)
        }
        self.packed = torch.zeros(
            len(ROW_STATE), sum(self.counts.values()), dtype=torch.float32, device=device
        )
        self.warmup = torch.zeros(2, dtype=torch.float32, device=device)
        of_all: dict[str, Tensor] = dict(zip(("handed_over", "largest_lr"), self.warmup, strict=True))
        self.rows = RuleState(**dict(zip(ROW_STATE, self.packed, strict=True)), **of_all)
        self.was_found, knows_lr = False, False
        self._views: list[tuple[Tensor, str, Tensor]] = []
        first = 0
        for p, count in self.counts.items():
            views = {key: getattr(self.rows, key)[first : first + count] for key in ROW_STATE}
            held = state.get(p, {}) if is_kept else {}
            self.was_found = self.was_found or "tracked" in held
            knows_lr = knows_lr or "largest_lr" in held
            for key, view in views.items():
                if key in held and held[key].numel() == count:
                    view.copy_(held[key].view(count), non_blocking=True)
            for key in of_all.keys() & held.keys():
                of_all[key].copy_(torch.maximum(of_all[key], held[key].to(device)))
            if p in self.flagged:
                views["tracked"].fill_(RADIAL_TESTS)
            if p in self.never_tracked:
                views["tracked"].fill_(-1)
            if is_kept:
                self._leave(state, p, views)
            first += count
        if is_kept:  # torch.distributed.checkpoint wants a state of all parameters or of none
            for p in row_counts:
                self._leave(state, p, of_all)
        if self.was_found and not knows_lr:  # of a version that did not remember it
            for group in groups:
                if any(p in self.counts for p in group["params"]):
                    now = torch.as_tensor(lr_gain(group), dtype=torch.float32, device=device).squeeze()
                    self.rows.largest_lr.copy_(torch.maximum(self.rows.largest_lr, now))
        self.rounding_step = self._take_rounding_step(groups, state)

    def _take_rounding_step(self, groups: Sequence[Mapping[str, Any]], state: State) -> Tensor | None:
        """One counter of steps for all parameters that are rounded stochastically."""
        rounded = [p for group in groups if group["stochastic_rounding"] is not None for p in group["params"]]
        if not rounded:
            return None
        held = [state[p]["rounding_step"] for p in rounded if "rounding_step" in state.get(p, {})]
        step = torch.zeros((), dtype=torch.int64, device=rounded[0].device)
        for count in held:
            step.copy_(torch.maximum(step, count.to(step)))
        for p in rounded:
            self._leave(state, p, {"rounding_step": step})
        return step

    def _leave(self, state: State, p: Tensor, views: Mapping[str, Tensor]) -> None:
        state[p].update(views)
        self._views += [(p, key, view) for key, view in views.items()]

    def is_detached(self, state: State) -> bool:
        """Whether `state` holds something else than the views of this memory."""
        return any(state.get(p, {}).get(key) is not view for p, key, view in self._views)

    def tests_left(self) -> dict[Tensor, int]:
        """How many more steps test the rows of each parameter that has tests left. Reads the memory if it was found."""
        if not self.was_found or not is_readable(self.rows.tracked):
            return dict.fromkeys(self.counts.keys() - self.flagged - self.never_tracked, RADIAL_TESTS)
        passed = self.rows.tracked.cpu().numpy()
        done = np.split((passed < 0) | (passed == RADIAL_TESTS), np.cumsum(list(self.counts.values()))[:-1])
        return {p: RADIAL_TESTS for p, rows in zip(self.counts, done, strict=True) if not rows.all()}
