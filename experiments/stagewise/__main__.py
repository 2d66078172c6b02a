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

from experiments import command, evidence, settings, workdir
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
  config = settings.parse(Config, argv)
  if config.m + config.tiny < 1:
    raise settings.BadInputError(f'--m is out of range: {config.m}.')
  if not 0 <= config.stages <= len(MODELS[config.model].cuts) + 1:
    raise settings.BadInputError(f'--stages is out of range: {config.stages}.')
  config = settings.in_folder(config, 'stagewise', config.dataset)
  return settings.by_seed(config), list(config.methods)


def compare(argv: Sequence[str]) -> tuple[pathlib.Path | None, str]:
  """Runs the comparison, or the clock; returns (the run folder, its tables)."""
  configs, methods = parse(argv)
  if configs[0].pairs:
    return None, speed(prepare(configs[0]), configs[0].pairs)
  folder = workdir.claim(configs[0])
  return folder, tables([run(config, methods) for config in configs], methods)


def main(argv: Sequence[str]) -> int:
  """Runs the comparison from the command line; returns the exit code."""
  return command.job(compare, Config, argv, __doc__)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
