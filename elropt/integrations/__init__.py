"""elropt in training frameworks. A module imports its framework when it is imported itself, never before:

- `lightning`: a callback with a `Recorder`, for `lightning.pytorch` and `pytorch_lightning`;
- `transformers`: a callback with a `Recorder` for the Trainer, and an ELRSGD with the groups of `param_groups`;
- `timm`: the name "elrsgd" for `create_optimizer_v2` and timm's scripts.

What to write for every framework, also for those that need no module: docs/guide/frameworks.md.
"""
