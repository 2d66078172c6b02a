"""Writes weights.npz: weights under foreign names, and what they compute.

The weights are those of five small networks, in the layout and under the names
of PyTorch, Hugging Face and Keras; the logits are computed from them here, in
float64, in NumPy, with the layout of the source (NCHW, OIHW) and nothing of
jaxprune. Weights are multiples of 1/32 between -1 and 1, kept as int8, and so
are the inputs; `index` holds their names and shapes in the order in which
`data` holds their entries. From the root of the repository:

  python tests/golden/make_weights.py
"""

import json
import math
import pathlib

import numpy as np

ROOT = pathlib.Path(__file__).parent


class Weights:
  """Draws each array when it is first asked for, and remembers it."""

  def __init__(self, seed):
    self.rng = np.random.RandomState(seed)
    self.arrays = {}

  def __call__(self, name, *shape, low=-32, high=32):
    x = self.rng.randint(low, high + 1, shape).astype(np.int8)
    self.arrays[name] = x
    return x / 32


def conv(x, kernel, stride=1, pad=(0, 0), groups=1):
  """Returns a cross-correlation of NCHW with OIHW, by its definition."""
  x = np.pad(x, ((0, 0), (0, 0), pad, pad))
  outputs, _, rows, columns = kernel.shape
  high = (x.shape[2] - rows) // stride + 1
  wide = (x.shape[3] - columns) // stride + 1
  y = np.zeros((len(x), outputs, high, wide))
  for o in range(outputs):
    per_group = x.shape[1] // groups
    first = o // (outputs // groups) * per_group
    part = x[:, first : first + per_group]
    for i in range(high):
      for j in range(wide):
        top, left = i * stride, j * stride
        window = part[:, :, top : top + rows, left : left + columns]
        y[:, o, i, j] = np.sum(window * kernel[o], (1, 2, 3))
  return y


def batch_norm(x, scale, bias, mean, var, epsilon):
  col = lambda v: v[None, :, None, None]
  return (x - col(mean)) / np.sqrt(col(var) + epsilon) * col(scale) + col(bias)


def torch_norm(w, name, x, epsilon=1e-5):
  n = x.shape[1]
  scale, bias = w(f'{name}.weight', n, low=16), w(f'{name}.bias', n)
  mean = w(f'{name}.running_mean', n)
  var = w(f'{name}.running_var', n, low=8)
  w.arrays[f'{name}.num_batches_tracked'] = np.array(7, np.int8)
  return batch_norm(x, scale, bias, mean, var, epsilon)


def relu(x):
  return np.maximum(x, 0)


def relu6(x):
  return np.clip(x, 0, 6)


def hard_sigmoid(x):
  return np.clip(x + 3, 0, 6) / 6


def hard_swish(x):
  return x * hard_sigmoid(x)


def max_pool(x):
  n, c, high, wide = x.shape
  x = x[:, :, : high // 2 * 2, : wide // 2 * 2]
  return x.reshape(n, c, high // 2, 2, wide // 2, 2).max((3, 5))


def resnet(w, x):
  """Three stages of one block, widths 3, 5 and 8, projections."""
  x = conv(x, w('conv1.weight', 3, 3, 3, 3), 1, (1, 1))
  x = relu(torch_norm(w, 'bn1', x))
  for i, width in enumerate((3, 5, 8), 1):
    stride, name, inputs = min(i, 2), f'layer{i}.0', x.shape[1]
    kernel = w(f'{name}.conv1.weight', width, inputs, 3, 3)
    y = torch_norm(w, f'{name}.bn1', conv(x, kernel, stride, (1, 1)))
    kernel = w(f'{name}.conv2.weight', width, width, 3, 3)
    y = torch_norm(w, f'{name}.bn2', conv(relu(y), kernel, 1, (1, 1)))
    if i > 1:
      kernel = w(f'{name}.downsample.0.weight', width, inputs, 1, 1)
      x = torch_norm(w, f'{name}.downsample.1', conv(x, kernel, stride))
    x = relu(x + y)
  return x.mean((2, 3)) @ w('fc.weight', 4, 8).T + w('fc.bias', 4)


def vgg(w, x):
  """Two stages of one and two convolutions, read flat as C x 2 x 3."""
  place = 0
  for count, width in ((1, 3), (2, 4)):
    for _ in range(count):
      name = f'features.{place}'
      kernel = w(f'{name}.weight', width, x.shape[1], 3, 3)
      bias = w(f'{name}.bias', width)
      x = conv(x, kernel, 1, (1, 1)) + bias[None, :, None, None]
      x = relu(torch_norm(w, f'features.{place + 1}', x))
      place += 3
    x, place = max_pool(x), place + 1
  x = x.reshape(len(x), -1)
  x = relu(x @ w('classifier.0.weight', 5, 24).T + w('classifier.0.bias', 5))
  return x @ w('classifier.3.weight', 3, 5).T + w('classifier.3.bias', 3)


def mobilenet_v3(w, x):
  """Two blocks: at stride 2 with squeeze, and with an identity shortcut."""
  unit = lambda name, x, act: act(torch_norm(w, f'{name}.1', x, 1e-3))
  kernel = w('features.0.0.weight', 4, 3, 3, 3)
  x = unit('features.0', conv(x, kernel, 2, (1, 1)), hard_swish)
  # Kernel, expanded, squeezed or none, activation, stride.
  rows = ((3, 4, 8, relu, 2), (5, 6, None, hard_swish, 1))
  for i, (side, wide, squeezed, act, stride) in enumerate(rows, 1):
    y, j, name = x, 0, f'features.{i}.block'
    if wide != 4:
      kernel = w(f'{name}.{j}.0.weight', wide, 4, 1, 1)
      y, j = unit(f'{name}.{j}', conv(y, kernel), act), j + 1
    kernel = w(f'{name}.{j}.0.weight', wide, 1, side, side)
    y = conv(y, kernel, stride, (side // 2,) * 2, groups=wide)
    y, j = unit(f'{name}.{j}', y, act), j + 1
    if squeezed:
      s = y.mean((2, 3), keepdims=True)
      for layer, n, act_ in (
        ('fc1', squeezed, relu),
        ('fc2', wide, hard_sigmoid),
      ):
        kernel = w(f'{name}.{j}.{layer}.weight', n, s.shape[1], 1, 1)
        bias = w(f'{name}.{j}.{layer}.bias', n)[None, :, None, None]
        s = act_(conv(s, kernel) + bias)
      y, j = y * s, j + 1
    y = conv(y, w(f'{name}.{j}.0.weight', 4, wide, 1, 1))
    y = unit(f'{name}.{j}', y, lambda y: y)
    x = x + y if stride == 1 else y
  x = conv(x, w('features.3.0.weight', 6, 4, 1, 1))
  x = unit('features.3', x, hard_swish).mean((2, 3))
  x = hard_swish(
    x @ w('classifier.0.weight', 7, 6).T + w('classifier.0.bias', 7)
  )
  return x @ w('classifier.3.weight', 3, 7).T + w('classifier.3.bias', 3)


def mobilenet_v1(w, x):
  """Keras: kernels HWIO and HWC1, strides padded (0, 1), relu6."""

  def unit(name, x):
    n = x.shape[1]
    gamma, beta = w(f'{name}/gamma:0', n, low=16), w(f'{name}/beta:0', n)
    mean = w(f'{name}/moving_mean:0', n)
    var = w(f'{name}/moving_variance:0', n, low=8)
    return relu6(batch_norm(x, gamma, beta, mean, var, 1e-3))

  kernel = w('conv1/kernel:0', 3, 3, 3, 2).transpose(3, 2, 0, 1)
  x = unit('conv1_bn', conv(x, kernel, 2, (0, 1)))
  for i, (width, stride) in enumerate(((4, 1), (6, 2), (6, 1)), 1):
    n = x.shape[1]
    kernel = w(f'conv_dw_{i}/depthwise_kernel:0', 3, 3, n, 1)
    pad = (1, 1) if stride == 1 else (0, 1)
    x = conv(x, kernel.transpose(2, 3, 0, 1), stride, pad, groups=n)
    x = unit(f'conv_dw_{i}_bn', x)
    kernel = w(f'conv_pw_{i}/kernel:0', 1, 1, n, width).transpose(3, 2, 0, 1)
    x = unit(f'conv_pw_{i}_bn', conv(x, kernel))
  x = x.mean((2, 3)) @ w('conv_preds/kernel:0', 1, 1, 6, 3)[0, 0]
  return x + w('conv_preds/bias:0', 3)


def bert(w, ids, mask):
  """Two layers of two heads, width 4; BERT's own names of norms."""
  dense = lambda name, x, n: (
    x @ w(f'{name}.weight', n, x.shape[-1]).T + w(f'{name}.bias', n)
  )

  def norm(name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12)
    return x * w(f'{name}.gamma', 4, low=16) + w(f'{name}.beta', 4)

  place, (batch, length) = 'bert.embeddings', ids.shape
  x = w(f'{place}.word_embeddings.weight', 9, 4)[ids]
  x = x + w(f'{place}.position_embeddings.weight', 6, 4)[:length]
  x = x + w(f'{place}.token_type_embeddings.weight', 2, 4)[0]
  x = norm(f'{place}.LayerNorm', x)
  split = lambda x: x.reshape(batch, length, 2, 2).transpose(0, 2, 1, 3)
  for i in range(2):
    place = f'bert.encoder.layer.{i}'
    parts = ('query', 'key', 'value')
    q, k, v = (
      split(dense(f'{place}.attention.self.{part}', x, 4)) for part in parts
    )
    a = q @ k.transpose(0, 1, 3, 2) / np.sqrt(2)
    a = np.where(mask[:, None, None], np.exp(a), 0)
    a = a / a.sum(-1, keepdims=True)
    y = (a @ v).transpose(0, 2, 1, 3).reshape(batch, length, 4)
    y = dense(f'{place}.attention.output.dense', y, 4)
    x = norm(f'{place}.attention.output.LayerNorm', x + y)
    y = dense(f'{place}.intermediate.dense', x, 8)
    y = y * (1 + np.vectorize(math.erf)(y / np.sqrt(2))) / 2
    y = dense(f'{place}.output.dense', y, 4)
    x = norm(f'{place}.output.LayerNorm', x + y)
  return dense('classifier', np.tanh(dense('bert.pooler.dense', x[:, 0], 4)), 3)


def main():
  """Writes the file."""
  index, data, logits = {}, [], {}
  cases = (
    (resnet, (9, 9)),
    (vgg, (8, 12)),
    (mobilenet_v3, (9, 9)),
    (mobilenet_v1, (8, 8)),
    (bert, (5,)),
  )
  for seed, (network, sides) in enumerate(cases):
    w, name = Weights(seed), network.__name__
    if network is bert:
      x = w.rng.randint(0, 9, (2, *sides)).astype(np.int8)
      mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
      logits[name] = bert(w, x, mask)
    else:
      x = w.rng.randint(-32, 33, (2, 3, *sides)).astype(np.int8)
      logits[name] = network(w, x / 32)
    arrays = {**w.arrays, 'input': x}
    index[name] = {key: array.shape for key, array in arrays.items()}
    data += [array.ravel() for array in arrays.values()]
  data = np.concatenate(data)
  np.savez_compressed(
    ROOT / 'weights.npz', index=json.dumps(index), data=data, **logits
  )


if __name__ == '__main__':
  main()
