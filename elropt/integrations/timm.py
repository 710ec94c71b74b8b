"""The name "elrsgd" for timm's optimizers: importing this module registers it.

``timm.optim.create_optimizer_v2(model, "elrsgd", …)`` then makes an `ELRSGD`. It takes all of its keyword arguments;
as with timm's "sgd", the momentum is 0.9 unless another is given, here without Nesterov. timm's groups are those with
and without weight decay, and ELRSGD finds the tracked layers in its first steps. To have them found before, give
``param_group_fn=lambda model: elropt.param_groups(model, images, weight_decay=…)``.

timm's scripts are started through this module::

    python -m elropt.integrations.timm train.py DATA --opt elrsgd --opt-kwargs rule=angle tracked_lr=0.003
    torchrun --nproc-per-node 8 -m elropt.integrations.timm train.py DATA --opt elrsgd
"""

import runpy
import sys
from pathlib import Path

from ..optimizer import ELRSGD

try:
    from timm.optim import OptimInfo, list_optimizers  # pyright: ignore[reportMissingImports]
    from timm.optim._optim_factory import default_registry  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("elropt.integrations.timm needs timm: pip install 'timm>=1.0.12'") from error

__all__: list[str] = []

if "elrsgd" not in list_optimizers():
    default_registry.register(
        OptimInfo(
            name="elrsgd",
            opt_class=ELRSGD,
            description="SGD that measures and controls the effective learning rate of every layer (elropt)",
            has_eps=False,
            has_momentum=True,
        )
    )

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(
            "usage: python -m elropt.integrations.timm SCRIPT [ARGUMENT …], such as train.py DATA --opt elrsgd"
        )
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as Python does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")
