"""`step()` reads no value back to the host: every such read is an op that this file forbids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from elropt import ELRSGD

from .every_rule import FORMS, acts_on_update, skip_without_kernels
from .nets import backward, bn_mlp

pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = {"reference": {"foreach": False}, "foreach": {"foreach": True}, "triton": {"fused": True}}
READS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
}


class ForbidReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            raise AssertionError(f"{name} reads a value back to the host")
        return func(*args, **(kwargs or {}))


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("reads a value back to the host")


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Forbids reads; on a GPU the driver's own check too."""
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with ForbidReads(), pytest.MonkeyPatch.context() as patch:
            for name in ("tolist", "cpu", "__array__"):  # these read memory without an op on the CPU
                patch.setattr(torch.Tensor, name, forbidden)
            yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_the_check_can_fail() -> None:
    with pytest.raises(AssertionError, match="reads a value"), no_host_reads():
        torch.ones(()).item()
    with pytest.raises(AssertionError, match="reads a value"), no_host_reads():
        bool(torch.ones(1) > 0)
    with pytest.raises(AssertionError, match="reads a value"), no_host_reads():
        torch.ones(1).tolist()


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize(
    ("rule", "granularity", "elr_of", "project"),
    [(*form, p) for form in FORMS for p in (False, True) if not (p and acts_on_update(form[0], form[2]))],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_host_reads(
    backend: str, rule: str | None, granularity: str, elr_of: str | None, project: bool, tensor_lr: bool
) -> None:
    skip_without_kernels(BACKENDS[backend], rule, elr_of)
    # The interpreter itself reads the kernels' arguments: there only the host code around them can be checked.
    net = bn_mlp(depth=2, width=4).to(DEVICE)
    lr = torch.tensor(0.01, device=DEVICE) if tensor_lr else 0.01
    options = {**BACKENDS[backend], "protect": False if backend == "triton" else None}
    optimizer = ELRSGD(
        net.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3,
        rule=rule, granularity=granularity, elr_of=elr_of, project=project, **options,
    )  # fmt: skip
    steps = (
        3 if backend == "triton" and DEVICE == "cpu" else 12
    )  # 12: long enough for the warm-up to hand over
    for step in range(steps):
        backward(net, step)
        if backend == "triton" and DEVICE == "cpu":
            optimizer.step()
        else:
            with no_host_reads():
                optimizer.step()


@pytest.mark.parametrize("foreach", [False, True])
def test_a_weight_decay_that_becomes_another_tensor_is_not_read(foreach: bool) -> None:
    net = bn_mlp(depth=2, width=4).to(DEVICE)
    optimizer = ELRSGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3, foreach=foreach)
    for step in range(4):
        backward(net, step)
        if step > 0:
            optimizer.param_groups[0]["weight_decay"] = torch.full((), 1e-3, device=DEVICE)
        with no_host_reads():
            optimizer.step()
