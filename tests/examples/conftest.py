"""The examples of plain torch run with the other tests; those that need a framework are in tests/frameworks."""

from ..frameworks.conftest import example as example
