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

import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags as absl_flags

from experiments import command, evidence, flags, workdir
from experiments.joint.methods import METHODS, choose
from experiments.joint.networks import finish
from experiments.joint.supernets import make_steps
from experiments.joint.tasks import MODELS, Config, prepare
from jaxprune.report import plots
from jaxprune.search import joint

_F = absl_flags.FlagValues()
_text = functools.partial(absl_flags.DEFINE_string, flag_values=_F)
_int = functools.partial(absl_flags.DEFINE_integer, flag_values=_F)
_float = functools.partial(absl_flags.DEFINE_float, flag_values=_F)
_list = functools.partial(absl_flags.DEFINE_list, flag_values=_F)
_choice = functools.partial(absl_flags.DEFINE_enum, flag_values=_F)
_choice('model', 'resnet20_half', list(MODELS), 'The network.')
_text('dataset', 'digits', 'The data; see experiments.prune.')
_text('data_dir', None, 'A folder of sets that TFDS prepared.')
_int('subset', 0, 'Training images, equally many of a class; 0: all.')
_int('side', 0, 'Shrink all images to this side first; 0: as they are.')
_list('sides', [], 'Sides allowed; without it 4 from half of the largest on.')
_choice(
  'spatial',
  'input',
  ['input', 'stage'],
  'What has a side: the images, or every stage (needs --canvas=yes).',
)
_list('methods', list(METHODS), 'What to compare.')
_float('macs', 0.25, 'Part of the multiply-adds that is kept, in (0, 1).')
_int('steps', 600, 'Weight steps of a supernet.')
_float('warmup', 0.3, 'Part of them over random vectors.')
_int('every', 2, 'Weight steps for one vector step.')
_int('n', 8, 'Vectors of one vector step.')
_float('sigma', 0.1, 'Perturbation of the vector, falls to 0.3 of it.')
_float('rate', 0.02, 'Learning rate of the vector (Adam).')
_float('rho', 1.0, 'Weight of the penalty log(MACs / target) above 0.')
_choice(
  'form',
  'pairs',
  ['pairs', 'plain', 'spsa'],
  'Of the estimate: antithetic normal, normal, or signs.',
)
_int('epochs', 12, 'Passes over the data to train the network found.')
_choice('start', 'scratch', ['scratch', 'shared'], 'Of that training.')
_int('batch', 64, 'Examples of a weight step; twice as many of a vector step.')
_float('learning_rate', 0.1, 'The highest rate of SGD with momentum.')
_float('weight_decay', 5e-4, 'Pull of the kernels towards zero.')
_float('validation', 0.2, 'Part of the training split held out for vectors.')
_int('seeds', 1, 'Runs of everything, of seeds first_seed, first_seed + 1, ..')
_int('first_seed', 0, 'The first of them.')
_int('save_every', 100, 'Steps between two checkpoints.')
_choice('canvas', 'no', ['no', 'yes'], 'One compile for all sides, or each.')
_text('workdir', None, 'Where everything is kept; by default under runs/.')
_choice('preset', 'full', ['full', 'smoke'], 'smoke: every phase, two minutes.')
PRESETS: Mapping[str, Mapping[str, Any]] = {
  'full': {},
  'smoke': {
    'subset': 800, 'steps': 12, 'epochs': 1, 'sides': ['6', '8'], 'n': 2,
    'methods': ['joint', 'uniform', 'depth', 'random'], 'save_every': 5,
  },
}  # fmt: skip


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
  given = command.parse(_F, argv, PRESETS)
  methods = given.pop('methods')
  command.check_names('methods', methods, METHODS)
  try:
    given['sides'] = tuple(sorted(int(side) for side in given['sides']))
  except ValueError:
    raise flags.BadInputError(
      f'--sides must be ints, got {given["sides"]}.'
    ) from None
  seeds, first = given.pop('seeds'), given.pop('first_seed')
  holds = {'macs': 0 < given['macs'] < 1, 'warmup': 0 <= given['warmup'] < 1}
  for name in ('steps', 'every', 'epochs', 'batch', 'save_every'):
    holds[name] = given[name] >= 1
  holds['n'] = given['n'] >= 2 and given['n'] % 2 == 0
  command.check(given, holds)
  if given['spatial'] == 'stage' and given['canvas'] == 'no':
    raise flags.BadInputError('--spatial=stage needs --canvas=yes.')
  if given['workdir'] is None:
    given['workdir'] = command.folder_of(given, 'joint', given['dataset'])
  configs = [Config(**given, seed=seed) for seed in range(first, first + seeds)]
  return configs, methods


def compare(argv: Sequence[str]) -> tuple[pathlib.Path, str]:
  """Runs the comparison; returns (the run folder, its table)."""
  configs, methods = parse(argv)
  folder = workdir.claim(configs[0])
  return folder, table([run(config, methods) for config in configs])


def main(argv: Sequence[str]) -> int:
  """Runs the comparison from the command line; returns the exit code."""
  return command.job(compare, _F, argv, __doc__)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
