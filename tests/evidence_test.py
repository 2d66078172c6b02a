"""Tests of the figures of a results table."""

import math

import numpy as np
import pytest

from experiments import evidence


def test_paired_by_hand():
  found = evidence.paired([2.0, 4.0, 9.0], [1.0, 2.0, 6.0])
  assert found.mean == pytest.approx(2.0)
  assert found.error == pytest.approx(1.0 / math.sqrt(3))
  assert found.verdict == 'higher'
  assert evidence.paired([1.0, 2.0, 6.0], [2.0, 4.0, 9.0]).verdict == 'lower'


def test_one_seed_claims_nothing():
  assert evidence.paired([9.0], [1.0]).verdict == 'level'


def test_paired_wants_the_same_seeds():
  with pytest.raises(ValueError, match='2 values against 1'):
    evidence.paired([1.0, 2.0], [1.0])


def test_subset_is_balanced_and_fixed():
  labels = np.random.default_rng(1).integers(0, 5, 400)
  rows = evidence.subset(labels, 50)
  np.testing.assert_array_equal(np.bincount(labels[rows]), [10] * 5)
  np.testing.assert_array_equal(rows, evidence.subset(labels, 50))
  assert len(set(rows.tolist())) == 50
  assert not np.array_equal(rows, evidence.subset(labels, 50, seed=1))


def test_subset_refuses():
  labels = np.array([0, 0, 0, 1])
  with pytest.raises(ValueError, match='3 cannot hold 2 classes'):
    evidence.subset(labels, 3)
  with pytest.raises(ValueError, match='Class 1 has 1 examples, 2 were asked'):
    evidence.subset(labels, 4)
