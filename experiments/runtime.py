"""How much faster a network at half of every width runs in ONNX Runtime.

  python -m experiments.runtime
  python -m experiments.runtime --models=mobilenet_v2 --batches=1 --rounds=30

Both networks have random weights, are written by ``jaxprune.io.save_onnx``
and run on one thread, in interleaved rounds of one run each; the classifier
keeps its width. Printed are the median CPU seconds of a run, the median of the
ratio in a round with its 95 % bootstrap interval, and the multiply-adds. With
``--xla`` the same pair is measured under ``jax.jit`` as well.
"""

import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import command, settings
from experiments.settings import BadInputError, at_least, setting
from jaxprune import cost, io, models, plans, structure
from jaxprune.checks import extras

MODELS = {
  'resnet50': models.resnet50,
  'mobilenet_v2': functools.partial(models.mobilenet_v2, grouped=True),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """What is asked for."""

  models: tuple[str, ...] = setting(tuple(MODELS), 'Which networks.')
  batches: tuple[int, ...] = setting((1, 64), 'Images in a run.')
  side: int = setting(224, 'Side of an image.', fits=at_least(1))
  rounds: int = setting(30, 'Interleaved pairs of runs.', fits=at_least(1))
  seconds: float = setting(
    300.0, 'Wall time of a pair after which no round is begun.'
  )
  xla: bool = setting(False, 'Measure under jax.jit as well.')


Call = Callable[[np.ndarray], Any]


def halve(name: str, side: int) -> tuple[list[tuple[Any, Any]], list[int]]:
  """Returns (function, params) of a network and of its half, and their MACs."""
  model = MODELS[name]()
  x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  spec = jax.eval_shape(model.init, jax.random.key(0), x)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    fan_in = np.prod(leaf.shape[:-1], initial=1)
    scale = np.sqrt(2 / fan_in) if len(leaf.shape) > 1 else 0.1
    noise = scale * rng.standard_normal(leaf.shape, np.float32)
    return 1 + np.abs(noise) if path[-1].key in ('scale', 'var') else noise

  params = jax.tree_util.tree_map_with_path(draw, spec)
  fn = lambda params, x: model.apply(params, x)
  graph = structure.trace(fn, params, x)
  half = {name: group.size // 2 for name, group in graph.groups.items()}
  plan = plans.from_widths(graph, half)
  small = plans.specialise(graph, plan), plans.shrink(graph, plan, params)
  return [(fn, params), small], [cost.macs(graph), cost.macs(graph, plan)]


def in_onnx_runtime(fn: Any, params: Any, x: np.ndarray) -> Call:
  """Returns the function as a session of ONNX Runtime on one thread."""
  onnxruntime = extras.require('onnxruntime')
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = options.inter_op_num_threads = 1
  with tempfile.NamedTemporaryFile(suffix='.onnx') as file:
    io.save_onnx(file.name, lambda x: fn(params, x), x)
    session = onnxruntime.InferenceSession(
      file.name, options, providers=['CPUExecutionProvider']
    )
  return lambda x: session.run(None, {'input': x})[0]


def in_xla(fn: Any, params: Any, x: np.ndarray) -> Call:
  """Returns the function under jit."""
  del x
  compiled = jax.jit(fn)
  on_device = jax.device_put(params)
  return lambda x: np.asarray(compiled(on_device, x))


def seconds(call: Call, x: np.ndarray) -> float:
  """Returns the CPU time of one call."""
  start = time.process_time()
  call(x)
  return time.process_time() - start


def measure(calls: list[Call], x: np.ndarray, config: Config) -> dict[str, Any]:
  """Times two functions in turns; returns the figures."""
  for call in calls:
    call(x)
    call(x)
  begun, times = time.monotonic(), []
  for _ in range(config.rounds):
    times.append([seconds(call, x) for call in calls])
    if time.monotonic() - begun > config.seconds:
      break
  times = np.array(times)
  ratios = times[:, 0] / times[:, 1]
  draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
  low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
  return {
    'rounds': len(times),
    'dense_s': float(np.median(times[:, 0])),
    'half_s': float(np.median(times[:, 1])),
    'fastest_s': times.min(axis=0).tolist(),
    'speedup': float(np.median(ratios)),
    'interval': [float(low), float(high)],
  }


def run(argv: Sequence[str]) -> tuple[None, str]:
  """Measures every network at every batch; prints a line of JSON for each."""
  config = settings.parse(Config, argv)
  unknown = sorted({*config.models} - {*MODELS})
  if unknown:
    raise BadInputError(
      f'No model is called {", ".join(unknown)}; there are {", ".join(MODELS)}.'
    )
  runtimes = {'onnxruntime': in_onnx_runtime}
  if config.xla:
    runtimes['xla'] = in_xla
  for name in config.models:
    pair, macs = halve(name, config.side)
    for batch in config.batches:
      shape = (batch, config.side, config.side, 3)
      x = np.random.default_rng(1).standard_normal(shape, np.float32)
      for runtime, make in runtimes.items():
        calls = [make(fn, params, x) for fn, params in pair]
        figures = measure(calls, x, config)
        row = {'model': name, 'batch': batch, 'runtime': runtime}
        print(json.dumps({**row, 'macs': macs, **figures}), flush=True)
  return None, ''


if __name__ == '__main__':
  sys.exit(command.job(run, Config, sys.argv[1:], __doc__))
