"""elropt in training frameworks. Each module imports its framework when it is imported itself, never before:

- `lightning`: a callback with a `Recorder`, for `lightning.pytorch` and `pytorch_lightning`;
- `config`: an optimizer with the groups of `param_groups` from a configuration file (LightningCLI, hydra).

What to write for every framework, also for those that need no module: docs/guide/frameworks.md.
"""
