"""The worlds of gloo processes of the parallel tests."""

from tests.parallel.conftest import pool

__all__ = ["pool"]
