"""Exported pointwise functions against NumPy, relatively, over all floats."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import special

from jaxprune import io

pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

TINY = 2.0**-126  # Below it a runtime may flush to 0.
LARGEST = np.finfo(np.float32).max


def numbers():
  """Returns float32 of all sizes, dense near 0, 1 and where exp overflows."""
  sizes = [
    [0, 1e-45, 1e-41, TINY / 2, TINY, LARGEST, np.inf],
    np.logspace(-37.5, 38.4, 300),
    np.linspace(0.01, 12, 300),
    np.linspace(12, 110, 150),
    1 + np.logspace(-7, -1, 30),
    1 - np.logspace(-7, -1, 30),
  ]
  sizes = np.concatenate(sizes).astype(np.float32)
  return np.concatenate([-sizes, sizes, [np.float32(np.nan)]])


X = numbers()
FINITE = (0, -0.0, 1e-41, -1e-20, 0.5, 1, -1, 2.5, -3, 1e30, LARGEST)
SPECIAL = np.float32([*FINITE, np.inf, -np.inf, np.nan])
A, B = (x.ravel() for x in np.meshgrid(SPECIAL, SPECIAL))

# Name -> what is exported, and the same in float64.
UNARY = {
  'abs': (jnp.abs, np.abs),
  'acos': (lax.acos, np.arccos),
  'acosh': (lax.acosh, np.arccosh),
  'asin': (lax.asin, np.arcsin),
  'asinh': (lax.asinh, np.arcsinh),
  'atan': (lax.atan, np.arctan),
  'atanh': (lax.atanh, np.arctanh),
  'ceil': (lax.ceil, np.ceil),
  'cos': (lax.cos, np.cos),
  'cosh': (lax.cosh, np.cosh),
  'elu': (jax.nn.elu, lambda x: np.where(x > 0, x, np.expm1(x))),
  'erf': (lax.erf, special.erf),
  'erfc': (lax.erfc, special.erfc),
  'exp': (lax.exp, np.exp),
  'exp2': (lax.exp2, np.exp2),
  'expm1': (lax.expm1, np.expm1),
  'floor': (lax.floor, np.floor),
  'gelu': (
    lambda x: jax.nn.gelu(x, approximate=False),
    lambda x: x / 2 * special.erfc(-x / np.sqrt(2)),
  ),
  'log': (lax.log, np.log),
  'log1p': (lax.log1p, np.log1p),
  'log_sigmoid': (jax.nn.log_sigmoid, lambda x: -np.logaddexp(0, -x)),
  'logistic': (lax.logistic, special.expit),
  'neg': (lax.neg, np.negative),
  'relu': (jax.nn.relu, lambda x: np.maximum(x, 0)),
  'relu6': (jax.nn.relu6, lambda x: np.clip(x, 0, 6)),
  'round': (jnp.round, np.round),
  'rsqrt': (lax.rsqrt, lambda x: 1 / np.sqrt(x)),
  'sign': (jnp.sign, np.sign),
  'sin': (lax.sin, np.sin),
  'sinh': (lax.sinh, np.sinh),
  'softplus': (jax.nn.softplus, lambda x: np.logaddexp(0, x)),
  'sqrt': (lax.sqrt, np.sqrt),
  'square': (lax.square, np.square),
  'tan': (lax.tan, np.tan),
  'tanh': (lax.tanh, np.tanh),
  'x^-1': (lambda x: x**-1, lambda x: 1 / x),
  'x^-3': (lambda x: x**-3, lambda x: x**-3.0),
  'x^3': (lambda x: x**3, lambda x: x**3),
}
# Functions that the runtime computes to more than 4e-7 of themselves.
# GELU rounds x / sqrt(2) first; at -13 the tail is x^2 = 169 times as far off.
LARGER = {'erfc': 6e-7, 'gelu': 2e-5}
BINARY = {
  'add': (lax.add, np.add),
  'clamp': (
    lambda a, b: lax.clamp(-jnp.abs(b), a, jnp.abs(b)),
    lambda a, b: np.clip(a, -np.abs(b), np.abs(b)),
  ),
  'div': (lax.div, np.divide),
  'eq': (lax.eq, np.equal),
  'ge': (lax.ge, np.greater_equal),
  'gt': (lax.gt, np.greater),
  'le': (lax.le, np.less_equal),
  'logaddexp': (jnp.logaddexp, np.logaddexp),
  'lt': (lax.lt, np.less),
  'max': (lax.max, np.maximum),
  'min': (lax.min, np.minimum),
  'mul': (lax.mul, np.multiply),
  'ne': (lax.ne, np.not_equal),
  'pow': (lax.pow, np.power),
  'rem': (lax.rem, np.fmod),
  'select': (
    lambda a, b: jnp.where(a > b, a, b),
    lambda a, b: np.where(a > b, a, b),
  ),
  'sub': (lax.sub, np.subtract),
}


def exported(fn, *args):
  """Returns what the runtime computes of a function, by name of the output."""
  with tempfile.TemporaryDirectory() as folder:
    path = f'{folder}/fn.onnx'
    io.save_onnx(path, fn, *args)
    session = onnxruntime.InferenceSession(
      path, providers=['CPUExecutionProvider']
    )
  inputs = [x.name for x in session.get_inputs()]
  outputs = [x.name.removeprefix('output_') for x in session.get_outputs()]
  arrays = session.run(None, dict(zip(inputs, args, strict=True)))
  return dict(zip(outputs, arrays, strict=True))


@functools.cache
def run(kind):
  """Returns what the runtime computes for a whole table, by name."""
  table = {'unary': UNARY, 'binary': BINARY}[kind]
  args = (A, B) if kind == 'binary' else (X,)
  fn = lambda *args: {name: f(*args) for name, (f, _) in table.items()}
  return exported(fn, *args)


def assert_close(found, wanted, relative, absolute=TINY):
  """Asserts it of every entry, infinities and NaN included."""
  with np.errstate(all='ignore'):
    rounded = wanted.astype(found.dtype)
    same = (found == rounded) | (np.isnan(found) & np.isnan(rounded))
    error = np.abs(found.astype(np.float64) - wanted)
    near = error <= relative * np.abs(wanted) + absolute
  wrong = np.flatnonzero(~(same | near))
  assert not wrong.size, (wrong, found[wrong], wanted[wrong])


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
@pytest.mark.parametrize('name', UNARY)
def test_a_function_is_numpys_over_all_floats(name):
  wanted = UNARY[name][1](X.astype(np.float64))
  assert_close(run('unary')[name], wanted, LARGER.get(name, 4e-7))


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
@pytest.mark.parametrize('name', BINARY)
def test_a_function_of_two_is_numpys_at_all_special_values(name):
  wanted = BINARY[name][1](A.astype(np.float64), B.astype(np.float64))
  assert_close(run('binary')[name], wanted, 4e-7)


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
def test_floats_become_integers_as_in_jax():
  """What does not fit is the nearest that does, NaN is 0, as XLA has it."""
  normal = X[(X == 0) | ~(abs(X) < TINY)]  # Others are 0 to XLA, not to ONNX.
  more = np.float32([2147483520, 3e9, 127.6, -1.9, 255, 300])
  x = np.concatenate([normal, more])
  kinds = ('int8', 'uint8', 'int16', 'uint16', 'int32', 'uint32', 'bool')
  fn = lambda x: {kind: x.astype(kind) for kind in kinds}
  found = exported(fn, x)
  for kind, wanted in jax.jit(fn)(x).items():
    assert found[kind].dtype == wanted.dtype
    np.testing.assert_array_equal(found[kind], wanted)
