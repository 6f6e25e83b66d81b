"""For the test suites of adapters: one call that tells whether a model can be taught."""

from boxteacher.errors import InconclusiveError
from boxteacher.testing.conformance import check_provider

__all__ = ["InconclusiveError", "check_provider"]
