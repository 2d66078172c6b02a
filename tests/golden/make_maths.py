"""Derives maths.json: scores and distributions in float64, by plain loops.

  python tests/golden/make_maths.py

Nothing of jaxprune is used, and no formula is written as it is there: sums run
over entries, shares are found by bisection, ranks by sorting.
"""

import json
import math
import pathlib

import numpy as np

RNG = np.random.default_rng(20)
# A network of a convolution with BatchNorm, a flatten of 2 x 2 and two layers.
CONV = RNG.standard_normal((3, 3, 2, 4)).astype(np.float32)
DENSE = RNG.standard_normal((16, 6)).astype(np.float32)
HEAD = RNG.standard_normal((6, 3)).astype(np.float32)
SCALE = RNG.uniform(0.5, 2, 4).astype(np.float32)
VAR = RNG.uniform(0.5, 2, 4).astype(np.float32)
EPS = 1e-5
# Estimates of the diagonal of a Hessian: some are below 0.
CURVES = [RNG.normal(0.5, 1, x.shape).astype(np.float32)
          for x in (CONV, DENSE, HEAD)]  # fmt: skip
SHAPES = {
  'conv1': (3, 3, 3, 16),
  'conv2': (3, 3, 16, 64),
  'conv3': (1, 1, 64, 64),
  'head': (64, 10),
}
MACS = {'conv1': 1024.0, 'conv2': 256.0, 'conv3': 64.0, 'head': 1.0}


def lookahead(conv, dense, head) -> dict[str, np.ndarray]:
  """Scores of all three kernels from their squares, one entry at a time."""
  gain = SCALE.astype(np.float64) ** 2 / (VAR.astype(np.float64) + EPS)
  scores = {'conv': np.zeros(conv.shape), 'dense': np.zeros(dense.shape),
            'head': np.zeros(head.shape)}  # fmt: skip
  for h, w, i, o in np.ndindex(conv.shape):
    after = sum(dense[k, j] for k in range(o, 16, 4) for j in range(6))
    scores['conv'][h, w, i, o] = conv[h, w, i, o] * after * gain[o]
  for i, o in np.ndindex(dense.shape):
    before = sum(conv[h, w, c, i % 4] for h, w, c in np.ndindex(3, 3, 2))
    after = sum(head[o, k] for k in range(3))
    scores['dense'][i, o] = dense[i, o] * before * gain[i % 4] * after
  for i, o in np.ndindex(head.shape):
    before = sum(dense[k, i] for k in range(16))
    scores['head'][i, o] = head[i, o] * before
  return scores


def squares() -> list[np.ndarray]:
  """The squares of all three kernels."""
  return [x.astype(np.float64) ** 2 for x in (CONV, DENSE, HEAD)]


def saliencies() -> list[np.ndarray]:
  """OBD of all three kernels, of either sign."""
  curves = [h.astype(np.float64) for h in CURVES]
  return [h * x / 2 for h, x in zip(curves, squares(), strict=True)]


def normalised(scores, kept) -> dict[str, list[bool]]:
  """The masks of the best of all leaves, each divided by its L2 norm."""
  ranked = []
  for name, x in scores.items():
    norm = math.sqrt(math.fsum(y * y for y in x.ravel()))
    ranked += [(y / norm, name, i) for i, y in enumerate(x.ravel())]
  best = {(name, i) for _, name, i in sorted(ranked)[-kept:]}
  return {n: [(n, i) in best for i in range(x.size)] for n, x in scores.items()}


def lamp(w: np.ndarray) -> np.ndarray:
  """w^2 over the sum of all squares that are not smaller."""
  squares = w.astype(np.float64).ravel() ** 2
  found = [x / math.fsum(y for y in squares if y >= x) for x in squares]
  return np.reshape(found, w.shape)


def fpgm(w: np.ndarray) -> np.ndarray:
  """The distance of each filter to all filters, one pair at a time."""
  filters = [w[..., j].astype(np.float64).ravel() for j in range(w.shape[-1])]
  far = [sum(math.dist(a, b) for b in filters) for a in filters]
  return np.broadcast_to(far, w.shape)


def shares(weights, sparsity, floors=None) -> dict[str, float]:
  """Real-valued shares: the scale by bisection, clipped at both ends."""
  sizes = {k: math.prod(s) for k, s in SHAPES.items()}
  floors = floors or {}
  budget = sum(sizes.values()) - round(sparsity * sum(sizes.values()))
  low, high = 0.0, 1e12
  at = lambda c: {
    k: min(max(c * weights[k], floors.get(k, 0)), sizes[k]) for k in sizes
  }
  for _ in range(300):
    middle = (low + high) / 2
    if sum(at(middle).values()) < budget:
      low = middle
    else:
      high = middle
  return at(high)


def distributions() -> dict[str, dict[str, dict[str, float]]]:
  """Shares of every rule at several sparsities."""
  sizes = {k: math.prod(s) for k, s in SHAPES.items()}
  found = {}
  for s in (0.5, 0.8, 0.95):
    found[str(s)] = {
      'erk': shares({k: float(sum(v)) for k, v in SHAPES.items()}, s),
      'by_macs': shares({k: n * MACS[k] ** -0.5 for k, n in sizes.items()}, s),
      'uniform_plus': shares(
        {k: float(n) for k, n in sizes.items()},
        s,
        {'conv1': sizes['conv1'], 'head': math.ceil(0.2 * sizes['head'])},
      ),
    }
  return found


def main() -> None:
  """Writes the numbers beside this file."""
  plain = lambda x: np.asarray(x, np.float64).ravel().tolist()
  data = {
    'inputs': {
      name: plain(x)
      for name, x in {
        'conv': CONV, 'dense': DENSE, 'head': HEAD, 'scale': SCALE, 'var': VAR
      }.items()
    },
    'saliencies': [plain(x) for x in saliencies()],
    'lookahead': {n: plain(x) for n, x in lookahead(*squares()).items()},
    'obd_lookahead': {
      n: plain(x)
      for n, x in lookahead(*(np.maximum(s, 0) for s in saliencies())).items()
    },
    'normalised': normalised(lookahead(*squares()), 40),
    'lamp': plain(lamp(DENSE)),
    'fpgm': plain(fpgm(CONV)),
    'distributions': distributions(),
  }  # fmt: skip
  path = pathlib.Path(__file__).with_name('maths.json')
  path.write_text(json.dumps(data) + '\n')


if __name__ == '__main__':
  main()
