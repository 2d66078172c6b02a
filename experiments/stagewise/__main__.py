"""Stage-wise pruning: is the proxy nearer the truth, and the network better?

  python -m experiments.stagewise
  python -m experiments.stagewise --dataset=fashion_mnist --subset=10000
  python -m experiments.stagewise --preset=smoke

Two supernets are trained equally long. In the *stage-wise* one the sub-networks
of every stage learn from the full network's features; in the *single-path* one
a random sub-network of the whole learns from the labels. Then

- proxy: ``--nets`` sub-networks of ``--macs`` of the multiply-adds are trained
  from scratch, and what each supernet said of them is compared with what they
  reach: Kendall's tau, and the gap in accuracy;
- found: each way chooses a network on the budget, trained from scratch as long:
  *stage-wise* by the exact knapsack over its stages (``--search=evolution``: by
  a search that asks the same proxies), *evolution* by the search of MetaPruning
  on the single-path supernet, *uniform* by one fraction of every width.

Ablations: ``--notiny`` (no narrowest sub-network in every step), ``--teacher=
before`` (the full network is trained first and then fixed: v1 of the paper),
``--source=chain``, ``--stages=1``. Stopped at any moment, the same command goes
on: what ended is read, what ran continues from its checkpoint. ``--pairs=30``
times a step of each supernet against one of the full network instead.
"""

import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags as absl_flags

from experiments import command, evidence, workdir
from experiments.stagewise.choosing import (
  TOLERANCE,
  by_single_path,
  by_stages,
  make_judge,
)
from experiments.stagewise.supernets import speed, supernet
from experiments.stagewise.tasks import MODELS, Config, prepare
from experiments.stagewise.truth import finish, proxy_against_truth
from jaxprune.search import joint

METHODS = ('stagewise', 'evolution', 'uniform')
_F = absl_flags.FlagValues()
_text = functools.partial(absl_flags.DEFINE_string, flag_values=_F)
_int = functools.partial(absl_flags.DEFINE_integer, flag_values=_F)
_float = functools.partial(absl_flags.DEFINE_float, flag_values=_F)
_list = functools.partial(absl_flags.DEFINE_list, flag_values=_F)
_bool = functools.partial(absl_flags.DEFINE_bool, flag_values=_F)
_choice = functools.partial(absl_flags.DEFINE_enum, flag_values=_F)
_choice('model', 'resnet20_half', list(MODELS), 'The network.')
_text('dataset', 'digits', 'The data; see experiments.prune.')
_text('data_dir', None, 'A folder of sets that TFDS prepared.')
_int('subset', 0, 'Training images, equally many of a class; 0: all.')
_int('side', 0, 'Shrink all images to this side first; 0: as they are.')
_list('methods', list(METHODS), 'What to compare.')
_float('macs', 0.4, 'Part of the multiply-adds that is kept, in (0, 1).')
_int('steps', 600, 'Of a supernet.')
_int('epochs', 10, 'Passes over the data to train a network from scratch.')
_int('m', 2, 'Random sub-networks of each stage in a step.')
_int('candidates', 256, 'Judged in each stage, and by evolution.')
_int('nets', 12, 'Sub-networks of equal cost for the proxy; 0: none.')
_bool('tiny', True, 'Whether the narrowest learn in every step.')
_choice('teacher', 'now', ['now', 'before'], 'Which full network teaches.')
_choice('source', 'full', ['full', 'chain'], 'What a stage begins from.')
_choice('search', 'knapsack', ['knapsack', 'evolution'], 'Over the stages.')
_int('stages', 0, 'Use so many stages at most; 0: all.')
_int('batch', 64, 'Examples of a step.')
_int('judges', 512, 'Held-out images that the proxies are measured on.')
_float('learning_rate', 0.1, 'The highest rate of SGD with momentum.')
_float('weight_decay', 5e-4, 'Pull of the kernels towards zero.')
_float('validation', 0.2, 'Part of the training split held out.')
_int('seeds', 1, 'Runs of everything, of seeds first_seed, first_seed + 1, ..')
_int('first_seed', 0, 'The first of them.')
_int('save_every', 100, 'Steps between two checkpoints.')
_int('pairs', 0, 'Time the steps instead, in so many interleaved pairs.')
_text('workdir', None, 'Where everything is kept; by default under runs/.')
_choice('preset', 'full', ['full', 'smoke'], 'smoke: every phase, a minute.')
PRESETS: Mapping[str, Mapping[str, Any]] = {
  'full': {},
  'smoke': {
    'subset': 800, 'steps': 6, 'epochs': 1, 'candidates': 16, 'nets': 3,
    'm': 1, 'judges': 64, 'save_every': 4,
  },
}  # fmt: skip


def run(config: Config, methods: Sequence[str]) -> dict[str, Any]:
  """Runs what is left of one seed; returns name -> figures."""
  folder = pathlib.Path(config.workdir, f'seed{config.seed}')
  task = functools.cache(lambda: prepare(config))
  judge = functools.cache(lambda: make_judge(task()))
  net = functools.cache(lambda kind: supernet(task(), kind, folder / kind))

  def make(name):
    if name == 'proxy':
      both = {kind: net(kind) for kind in ('stagewise', 'single')}
      return proxy_against_truth(task(), judge(), both, folder)
    if name == 'stagewise':
      vector = by_stages(task(), judge(), net('stagewise'))
    elif name == 'evolution':
      vector = by_single_path(task(), judge(), net('single'))
    else:
      vector = joint.uniform(
        task().vectors, task().cost, task().limit, tolerance=TOLERANCE
      )
    result = finish(task(), vector, folder / f'{name}_training')
    print(
      f'seed {config.seed}, {name}: {result["accuracy"]:.2%} with '
      f'{result["macs"]:.1%} of the multiply-adds',
      flush=True,
    )
    return result

  wanted = [*methods, *(['proxy'] if config.nets else [])]
  return workdir.complete(folder, wanted, make)


def tables(results: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> str:
  """Returns the networks found, and the proxies, over the seeds."""
  column = lambda name: [100 * r[name]['accuracy'] for r in results]
  rows = []
  for name in methods:
    macs = 100 * np.mean([r[name]['macs'] for r in results])
    row = [name, str(evidence.summary(column(name))), f'{macs:.1f}']
    if 'stagewise' in methods:
      same = name == 'stagewise' or len(results) < 2
      row.append(
        '' if same else str(evidence.paired(column('stagewise'), column(name)))
      )
    rows.append(row)
  header = ['method', 'top-1, %', 'MACs, %']
  header += ['stage-wise less it'] if 'stagewise' in methods else []
  text = evidence.table(header, rows)
  if 'proxy' not in results[0]:
    return text
  rows = [
    [
      kind,
      str(evidence.summary([r['proxy']['tau'][kind] for r in results])),
      str(evidence.summary([100 * r['proxy']['gap'][kind] for r in results])),
    ]
    for kind in ('stage-wise', 'single-path')
  ]
  header = ['supernet', "Kendall's tau", 'gap in accuracy, points']
  return f'{text}\n\n{evidence.table(header, rows)}'


def parse(argv: Sequence[str]) -> tuple[list[Config], list[str]]:
  """Returns a configuration for every seed, and the methods.

  Raises:
    BadInputError: if a flag is unknown or its value is wrong.
  """
  given = command.parse(_F, argv, PRESETS)
  given.pop('pairs')
  methods = given.pop('methods')
  command.check_names('methods', methods, METHODS)
  seeds, first = given.pop('seeds'), given.pop('first_seed')
  holds = {
    'macs': 0 < given['macs'] < 1,
    'm': given['m'] + given['tiny'] >= 1,
    'nets': given['nets'] == 0 or given['nets'] >= 3,
    'candidates': given['candidates'] >= 3,
    'stages': 0 <= given['stages'] <= len(MODELS[given['model']].cuts) + 1,
  }
  for name in ('steps', 'epochs', 'batch', 'judges', 'save_every'):
    holds[name] = given[name] >= 1
  command.check(given, holds)
  if given['workdir'] is None:
    given['workdir'] = command.folder_of(given, 'stagewise', given['dataset'])
  configs = [Config(**given, seed=seed) for seed in range(first, first + seeds)]
  return configs, methods


def compare(argv: Sequence[str]) -> tuple[pathlib.Path | None, str]:
  """Runs the comparison, or the clock; returns (the run folder, its tables)."""
  configs, methods = parse(argv)
  if _F['pairs'].value:
    return None, speed(prepare(configs[0]), _F['pairs'].value)
  folder = workdir.claim(configs[0])
  return folder, tables([run(config, methods) for config in configs], methods)


def main(argv: Sequence[str]) -> int:
  """Runs the comparison from the command line; returns the exit code."""
  return command.job(compare, _F, argv, __doc__)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
