"""The clock: CPU time of several networks, measured in turn."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def milliseconds(
  calls: Mapping[str, Callable[[], Any]],
  *,
  pairs: int = 30,
  least: float = 0.01,
  tick: Callable[[], Any] = lambda: None,
) -> dict[str, tuple[float, float]]:
  """Returns (milliseconds a call, speed relative to the first) of each.

  The CPU time of the process over so many calls that they take ``least``
  seconds; round after round all of them in turn, so that what else the machine
  does meets all alike. Both figures are medians over the rounds; the second of
  the ratio within a round.

  Args:
    calls: name -> a function that starts the computation and returns arrays.
    pairs: number of rounds.
    least: seconds of one measurement.
    tick: called after each round.
  """
  repeats = {}
  for name, call in calls.items():
    _seconds(call, 2)  # Compiles.
    repeats[name] = max(1, round(least / max(_seconds(call, 3) / 3, 1e-6)))
  rounds = []
  for _ in range(pairs):
    rounds.append([_seconds(calls[n], repeats[n]) / repeats[n] for n in calls])
    tick()
  found = np.maximum(np.array(rounds), 1e-9)
  ratios = np.median(found[:, :1] / found, axis=0)
  medians = np.median(found, axis=0) * 1e3
  return {
    name: (float(medians[i]), float(ratios[i])) for i, name in enumerate(calls)
  }


def _seconds(call: Callable[[], Any], repeats: int) -> float:
  begin = time.process_time()
  for _ in range(repeats):
    jax.block_until_ready(call())
  return time.process_time() - begin
