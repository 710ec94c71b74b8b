"""A callback that records layers during `Trainer.fit`, for `lightning.pytorch` and `pytorch_lightning`."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..layer_table import Tracked
from ..recorder import Recorder, whole_number

__all__ = ["RecorderCallback"]

PACKAGES = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch_lightning"}  # module → package


def _lightning() -> Any:
    """Of the two packages the one that is imported already; else the one that is installed."""
    for module in PACKAGES:
        if sys.modules.get(module) is not None:
            return sys.modules[module]
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(package) is not None:
            return importlib.import_module(module)
    raise ImportError("elropt.integrations.lightning needs Lightning: pip install lightning")


class RecorderCallback(_lightning().Callback):
    """An `elropt.Recorder` for each optimizer of a `Trainer`, while it fits.

    Every `every` steps of an optimizer the layers are written to its file, and `elr/<name>`, `angle/<name>`,
    elr_spread, log_elr_std and angle_spread to all loggers of the trainer. The last three also go to ``self.log``, for
    the progress bar and callbacks that monitor them, on every rank. Any torch optimizer will do.

    Steps are counted for each optimizer apart. The counts are saved with the checkpoint, so that a resumed run goes on
    with the next number. Where a checkpoint has no counts, ``trainer.global_step`` is the count, shared
    equally among several optimizers.

    Args:
        path: JSONL file. None: ``elr.jsonl`` in ``trainer.log_dir``, which is a new folder for each run with most
            loggers. With several optimizers each has a file, ``elr-0.jsonl``, and its tags begin with its number,
            ``optimizer_0/``.
        every: record the steps whose number is a multiple of it.
        prog_bar: show the three spreads in the progress bar.
        tracked: for other optimizers than ELRSGD, which weights are scale-invariant, see `layer_stats`.

    Attributes:
        recorders: of the last fit, in the order of ``trainer.optimizers``.

    Raises:
        ValueError: `every` is no whole number above 0; when the fit starts: `tracked` does not fit the optimizer.
        OSError: when the fit starts: a file cannot be written.

    Examples:
        >>> trainer = Trainer(callbacks=[RecorderCallback(every=50)])
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        every: int = 100,
        prog_bar: bool = False,
        tracked: Tracked = None,
    ) -> None:
        self.path = path
        self.every = whole_number("every", every, at_least=1)
        self.prog_bar = prog_bar
        self.tracked = tracked
        self.recorders: list[Recorder] = []
        self._steps: list[int] = []  # from a checkpoint
        self._new: dict[str, float] = {}  # spreads that were recorded in this batch, on rank 0
        self._steps_before: list[int] = []  # of each recorder, at the start of this batch

    @property
    def state_key(self) -> str:
        return self._generate_state_key(path=str(self.path))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": [recorder.step for recorder in self.recorders] or self._steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._steps = list(state_dict["steps"])
        self.recorders = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        folder = trainer.log_dir  # on every rank: it is a broadcast
        path = Path(folder or trainer.default_root_dir, "elr.jsonl") if self.path is None else Path(self.path)
        count = len(trainer.optimizers)
        steps = self.state_dict()["steps"] if trainer.global_step and count > 1 else []
        if len(steps) != count:
            steps = [trainer.global_step // count] * count
        self.recorders = []
        for i, (optimizer, step) in enumerate(zip(trainer.optimizers, steps, strict=True)):
            own = path if count == 1 else path.with_stem(f"{path.stem}-{i}")
            prefix = "" if count == 1 else f"optimizer_{i}/"
            self.recorders.append(
                Recorder(
                    optimizer,
                    own,
                    every=self.every,
                    first_step=step,
                    on_record=partial(self._log, trainer, prefix),
                    tracked=self.tracked,
                )
            )

    def _log(self, trainer: Any, prefix: str, scalars: dict[str, float], step: int) -> None:
        known = {tag: value for tag, value in scalars.items() if not math.isnan(value)}  # AdamW has no ELR
        named = {prefix + tag: value for tag, value in known.items()}
        self._new |= {prefix + tag: value for tag, value in known.items() if "/" not in tag}
        for logger in trainer.loggers:
            logger.log_metrics(named, step)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if len(self.recorders) == 1:
            # global_step counts the steps that a GradScaler leaves out, but none of use_pl_optimizer=False
            self.recorders[0].step = max(self.recorders[0].step, trainer.global_step)
        self._steps_before = [recorder.step for recorder in self.recorders]

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        new, self._new = self._new, {}
        if self._recorded():
            new = trainer.strategy.broadcast(new)  # callbacks monitor them on every rank
        if new and not trainer.barebones:
            # The loggers have them: of self.log they would see only the batches that log_every_n_steps chooses.
            self.log_dict(new, prog_bar=self.prog_bar, logger=False)

    def _recorded(self) -> bool:
        """Whether a step of this batch was recorded: the same on every rank."""
        return any(
            recorder.step > before + -before % self.every
            for before, recorder in zip(self._steps_before, self.recorders, strict=True)
        )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        for recorder in self.recorders:
            recorder.close()
