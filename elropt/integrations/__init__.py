"""elropt in training frameworks. A module imports its framework when it is imported itself, never before:

- `lightning`: a callback with a `Recorder`, for `lightning.pytorch` and `pytorch_lightning`.

What to write for every framework, also for those that need no module: docs/guide/frameworks.md.
"""
