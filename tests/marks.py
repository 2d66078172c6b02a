"""Marks that several test files set."""

import pytest


def slow(*arguments):
  """Marks a case of which the quick tests have a sibling."""
  return pytest.param(*arguments, marks=pytest.mark.slow)
