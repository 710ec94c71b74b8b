"""When the host learns of the end of the warm-up, on a device that is simulated: tests/gpu has the real one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from elropt._warmup_end import STEPS_PER_LOOK, WarmupEndPoll


class Event:
    """Of a device that is `late` questions behind: the copy that it stands for is made only when it has happened."""

    late = 0
    on_device, on_host = torch.zeros(()), torch.zeros(())

    def record(self, _: object) -> None:
        self.left, self.then = Event.late, Event.on_device.clone()

    def query(self) -> bool:
        self.left -= 1
        if self.left < 0:
            Event.on_host.copy_(self.then)
        return self.left < 0

    def synchronize(self) -> None:
        Event.on_host.copy_(self.then)


def simulated(monkeypatch: pytest.MonkeyPatch, *, in_step: bool, late: int) -> WarmupEndPoll:
    Event.on_device.zero_()
    Event.on_host.zero_()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    Event.late = late
    watch = WarmupEndPoll(torch.zeros(()))
    watch.flag = SimpleNamespace(is_cuda=True, device=None)  # type: ignore[assignment]
    watch.copy = SimpleNamespace(copy_=lambda *_, **__: None)  # type: ignore[assignment]
    watch.value, watch.in_step = Event.on_host.numpy(), in_step
    return watch


def first_known(monkeypatch: pytest.MonkeyPatch, *, in_step: bool, late: int, set_at: int) -> int:
    """The step before which the host knows that the flag was set at step `set_at`."""
    watch = simulated(monkeypatch, in_step=in_step, late=late)
    for step in range(1, 1000):
        if watch.warmup_is_over():
            return step
        if step == set_at:
            Event.on_device.fill_(1.0)
        watch.look()
    return 1000


@pytest.mark.parametrize("set_at", [1, STEPS_PER_LOOK, STEPS_PER_LOOK + 1, 100])
def test_ranks_learn_of_it_at_the_same_step(monkeypatch: pytest.MonkeyPatch, set_at: int) -> None:
    known = [first_known(monkeypatch, in_step=True, late=late, set_at=set_at) for late in (0, 3, 1000)]
    looked = -(-set_at // STEPS_PER_LOOK) * STEPS_PER_LOOK
    assert known == [looked + STEPS_PER_LOOK + 1] * 3


def test_a_single_process_learns_of_it_when_the_copy_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [first_known(monkeypatch, in_step=False, late=late, set_at=5) for late in (0, 3)]
    assert known == [STEPS_PER_LOOK + 1, STEPS_PER_LOOK + 4]


@pytest.mark.parametrize("late", [0, 3, 1000])
@pytest.mark.parametrize("in_step", [False, True])
def test_a_copy_from_before_a_rise_says_nothing(
    monkeypatch: pytest.MonkeyPatch, in_step: bool, late: int
) -> None:
    watch = simulated(monkeypatch, in_step=in_step, late=late)
    Event.on_device.fill_(1.0)
    for _ in range(2 * STEPS_PER_LOOK - 1):  # one copy has been made, and may be under way
        watch.look()
    watch.ask_again()
    Event.on_device.zero_()
    for _ in range(3 * STEPS_PER_LOOK):
        assert not watch.warmup_is_over()
        watch.collect()
        watch.look()
        Event.on_host.fill_(0.0 if watch.arrival is None or watch.arrival.then == 0 else 1.0)
    assert not watch.warmup_is_over()
