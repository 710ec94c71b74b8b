"""For the Trainer of Hugging Face transformers: a callback that records layers, and an ELRSGD with groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._model_copy import Outputs
from ..grouping import param_groups
from ..layer_table import Tracked
from ..optimizer import ELRSGD
from ..recorder import Recorder, whole_number

try:
    from transformers import TrainerCallback  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(
        "elropt.integrations.transformers needs transformers: pip install 'transformers>=5' accelerate"
    ) from error

__all__ = ["RecorderCallback", "grouped_elrsgd"]


class RecorderCallback(TrainerCallback):  # pyright: ignore[reportGeneralTypeIssues]
    """An `elropt.Recorder` of a `Trainer`'s optimizer while it trains. Any torch optimizer will do.

    The step of a record is ``state.global_step`` before the step. A resumed run goes on with the step of its
    checkpoint; see `first_step` of `Recorder`.

    Args:
        path: JSONL file. None: ``elr.jsonl`` in the `output_dir` of the training arguments.
        every: record the steps whose number is a multiple of it.
        tracked: for other optimizers than ELRSGD, which weights are scale-invariant, see `layer_stats`.
        log: ``trainer.log``, to have `elr/<name>`, `angle/<name>`, elr_spread, log_elr_std and angle_spread in the
            trainer's logs, and so in all that it reports to (`report_to`). None: they are in the file alone.

    Attributes:
        recorder: of the last training; None before the first.

    Raises:
        ValueError: `every` is no whole number above 0; when the training starts: `tracked` does not fit the optimizer.
        OSError: when the training starts: the file cannot be written.

    Examples:
        >>> trainer.add_callback(RecorderCallback(every=50, log=trainer.log))
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        every: int = 100,
        tracked: Tracked = None,
        log: Callable[[dict[str, float]], object] | None = None,
    ) -> None:
        self.path = path
        self.every = whole_number("every", every, at_least=1)
        self.tracked = tracked
        self.log = log
        self.recorder: Recorder | None = None
        self._new: dict[str, float] = {}  # recorded in this step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()  # the training before this one was interrupted
        path = Path(args.output_dir, "elr.jsonl") if self.path is None else Path(self.path)
        self.recorder = Recorder(
            kwargs["optimizer"],
            path,
            every=self.every,
            first_step=state.global_step,
            on_record=self._keep,
            tracked=self.tracked,
        )

    def _keep(self, scalars: dict[str, float], step: int) -> None:
        self._new = {
            tag: value for tag, value in scalars.items() if not math.isnan(value)
        }  # AdamW has no elr

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.recorder is not None:
            self.recorder.step = state.global_step  # which counts the steps that a GradScaler leaves out

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        new, self._new = self._new, {}
        if new and self.log is not None:
            self.log(new)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()


def grouped_elrsgd() -> Callable[..., ELRSGD]:
    """Stands for the optimizer's class in a `Trainer`, for an `ELRSGD` with the groups of `param_groups`.

    (An optimizer class in this place, such as `ELRSGD` itself, gets the trainer's own two groups, with and without
    weight decay, and ELRSGD finds the tracked layers in its first steps.)

    The trainer's dict of keyword arguments has

    - batch: the arguments of the model by name, at least 8 samples, as the data collator returns them. Its tensors are
      copied to the device of the model;
    - exclude, outputs: as for `param_groups`;
    - lr and all others: as for `ELRSGD`; norm gains and biases have no weight decay. `learning_rate` and `weight_decay`
      of the training arguments are not read.

    Raises:
        ValueError, TypeError: when the training starts: those of `param_groups` and `ELRSGD`.

    Examples:
        >>> batch = collator([dataset[i] for i in range(8)])
        >>> options = {"batch": batch, "lr": 0.1, "momentum": 0.9, "rule": "angle", "tracked_lr": 0.01}
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=(grouped_elrsgd, options))
    """
    return _make


def _make(
    model: nn.Module,
    *,
    batch: Mapping[str, Any],
    exclude: Iterable[str] = (),
    outputs: Outputs | None = None,
    **options: Any,
) -> ELRSGD:
    device = next(model.parameters()).device
    here: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()
    }
    return ELRSGD(param_groups(model, exclude=exclude, outputs=outputs, **here), **options)
