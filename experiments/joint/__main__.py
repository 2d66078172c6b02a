"""JointPruning: channels, depth and resolution searched as one vector.

  python -m experiments.joint
  python -m experiments.joint --macs=0.15 --methods=joint,uniform --seeds=1
  python -m experiments.joint --dataset=fashion_mnist --subset=10000 --side=14
  python -m experiments.joint --model=mobilenet_v1 --dataset=cifar10 --macs=0.25
  python -m experiments.joint --spatial=stage --canvas=yes
  python -m experiments.joint --preset=smoke

A supernet warms up over random vectors. Then each method looks for a network
that keeps ``--macs`` of its multiply-adds:

- joint, channel: weight steps (a vector drawn around the mean, a training
  batch) and vector steps (Adam along the estimated gradient of the held-out
  loss) take turns; channel with depth and resolution whole;
- depth, resolution: of all settings of that dimension, widths uniformly
  narrowed to the budget, the one of least held-out loss on a supernet that was
  trained as long over random vectors;
- random, evolution: a search among vectors on the budget on that supernet, over
  as many held-out images as the vector steps saw;
- uniform: one fraction of every width.

Every network found is trained from scratch equally long (or ``--start=shared``
from the weights of its supernet; the uniform one from that of the random
vectors). Stopped at any moment, the same command goes
on: phases that ended are read, the one that ran continues from its checkpoint.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import command, evidence, settings, workdir
from experiments.joint.methods import choose
from experiments.joint.networks import finish
from experiments.joint.supernets import make_steps
from experiments.joint.tasks import Config, prepare
from jaxprune.report import plots
from jaxprune.search import joint


def run(config: Config, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Runs what is left of one seed; returns method -> figures."""
  folder = pathlib.Path(config.workdir, f'seed{config.seed}')
  task = functools.cache(lambda: prepare(config))
  steps = functools.cache(lambda: make_steps(task()))

  def make(name):
    vector, params = choose(task(), steps(), name, folder)
    workdir.write(folder / f'{name}.vector.json', joint.to_json(vector) + '\n')
    result = finish(task(), vector, params, folder / name / 'training')
    bars = {k: tuple(v) for k, v in result['widths'].items()}
    (folder / f'{name}.svg').write_text(plots.svg(plots.widths(bars), name))
    print(
      f'seed {config.seed}, {name}: {result["accuracy"]:.2%} with '
      f'{result["macs"]:.1%} of the multiply-adds',
      flush=True,
    )
    return result

  return workdir.complete(folder, methods, make)


def table(results: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
  """Returns accuracies by method, and joint less each, paired by seed."""
  names = list(results[0])
  column = lambda name: [100 * r[name]['accuracy'] for r in results]
  rows = []
  for name in names:
    vector = results[0][name]['vector']
    depth = sum(vector['depths'].values())
    macs = np.mean([r[name]['macs'] for r in results])
    row = [name, str(evidence.summary(column(name)))]
    if 'joint' in names:
      same = name == 'joint' or len(results) < 2
      row.append(
        '' if same else str(evidence.paired(column('joint'), column(name)))
      )
    side = vector['side']
    if isinstance(side, dict):
      side = ' '.join(map(str, side.values()))
    rows.append([*row, f'{100 * macs:.1f}', depth, side])
  header = ['method', 'top-1, %']
  header += ['joint less it'] if 'joint' in names else []
  return evidence.table(
    [*header, 'MACs, %', 'blocks (seed 0)', 'side (seed 0)'], rows
  )


def parse(argv: Sequence[str]) -> tuple[list[Config], list[str]]:
  """Returns a configuration for every seed, and the methods.

  Raises:
    BadInputError: if a flag is unknown or its value is wrong.
  """
  config = settings.parse(Config, argv)
  if config.spatial == 'stage' and config.canvas == 'no':
    raise settings.BadInputError('--spatial=stage needs --canvas=yes.')
  sides = tuple(sorted(config.sides))
  config = dataclasses.replace(config, sides=sides)
  config = settings.in_folder(config, 'joint', config.dataset)
  return settings.by_seed(config), list(config.methods)


def compare(argv: Sequence[str]) -> tuple[pathlib.Path, str]:
  """Runs the comparison; returns (the run folder, its table)."""
  configs, methods = parse(argv)
  folder = workdir.claim(configs[0])
  return folder, table([run(config, methods) for config in configs])


def main(argv: Sequence[str]) -> int:
  """Runs the comparison from the command line; returns the exit code."""
  return command.job(compare, Config, argv, __doc__)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
