"""The one table of primitives: all that is known of each operation of JAX.

Everything that reads a traced program asks this table: a row says how a
primitive treats zeros, sums and sizes, and rules are added to it where they are
written (:func:`jaxprune.structure.rule`, the rules for several input sizes, the
translations to ONNX). A trait is a word of a few, so that a row is read as a
sentence::

  add('tanh', elementwise=True, zero='all', counts='activations')

  tanh works entry by entry, is zero where all of its operands are, and counts
  as an activation.

A new trait is a field of :class:`Primitive` with the value of most as default;
the rows that differ set it, and whoever needs it asks ``where(trait=value)``.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

# The values of each trait that is a word; '' is the rest.
WORDS = {
  'bodies': ('', 'inlined', 'control', 'derivative'),
  'moves': (
    '', 'stays', 'separate', 'reshapes', 'broadcasts', 'negates', 'flips',
    'slices',
  ),
  'linear': ('', 'first', 'jointly', 'each', 'cases'),
  'positive': ('', 'first', 'jointly'),
  'zero': (
    '', 'any', 'first', 'all', 'bounds', 'cases', 'quotient', 'power',
    'product', 'broadcast', 'gather', 'handed', 'pad',
  ),
  'counts': ('', 'norms', 'activations', 'pooling'),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Primitive:
  """What is known of a primitive; the default of each trait is not to know.

  Attributes:
    rule: types the results of an equation and says how to resize it.
    elementwise: whether entry k of the result is made of the entries k.
    bodies: of calls, 'inlined' where they are no more than their body,
      'control' of control flow, 'derivative' with a derivative of their own.
    refused: why it has no rule, as "it ..."; '' unless it is refused.
    moves: each entry of the result is an entry of the first operand: in its
      place ('stays'; 'separate' of operands that each have their result), of
      another shape ('reshapes'), repeated along new axes ('broadcasts'), with
      the other sign ('negates'), in another order ('flips') or of a part of
      them ('slices').
    linear: linear without offset in the 'first' operand, in all operands
      'jointly' (a sum), in 'each' of them alone (a product), or in the 'cases'
      behind the first.
    positive: as ``linear``, but for factors >= 0 alone.
    zero: where the result is zero if entries of operands are: if 'any' of them
      is, the 'first' or 'all'; the other words name a function of
      :mod:`jaxprune.structure.walks.absence`.
    neutral: of a reduction, the number that does not change its result.
    counts: what its entries count as where small operations are counted.
    harmless: for each operand a number at which there is a finite derivative,
      where 0 is none; None for those that take any.
    canvas: its rule in a program for several input sizes.
    onnx: its translation to ONNX.
    viewed: whether the translation takes known operands as views.
  """

  rule: Callable[..., Any] | None = None
  elementwise: bool = False
  bodies: str = ''
  refused: str = ''
  moves: str = ''
  linear: str = ''
  positive: str = ''
  zero: str = ''
  neutral: float | None = None
  counts: str = ''
  harmless: tuple[float | None, ...] = ()
  canvas: Callable[..., Any] | None = None
  onnx: Callable[..., Any] | None = None
  viewed: bool = False

  def __post_init__(self) -> None:
    for trait, words in WORDS.items():
      if getattr(self, trait) not in words:
        raise ValueError(
          f'{trait} of a primitive must be one of '
          f'{", ".join(map(repr, words))}, got {getattr(self, trait)!r}.'
        )


TABLE: dict[str, Primitive] = {}
_UNKNOWN = Primitive()


def add(*names: str, **traits: Any) -> None:
  """Adds traits to the rows of primitives, which are made if they are new."""
  for name in names:
    TABLE[name] = dataclasses.replace(known(name), **traits)


def known(name: str) -> Primitive:
  """Returns what is known of the primitive of a name, nothing at the least."""
  return TABLE.get(name, _UNKNOWN)


class Names(Collection[str]):
  """The names of primitives with some traits, of those added later too."""

  def __init__(self, traits: dict[str, tuple[Any, ...]]):
    self._traits = traits

  def __contains__(self, name: object) -> bool:
    row = TABLE.get(name) if isinstance(name, str) else None
    return row is not None and all(
      getattr(row, trait) in values for trait, values in self._traits.items()
    )

  def __iter__(self) -> Iterator[str]:
    return (name for name in sorted(TABLE) if name in self)

  def __len__(self) -> int:
    return sum(1 for _ in self)


def where(**traits: Any) -> Names:
  """Returns the names of primitives with traits.

  Args:
    **traits: trait -> its value, or a tuple of those that will do.
  """
  return Names(
    {k: v if isinstance(v, tuple) else (v,) for k, v in traits.items()}
  )


# What only lays entries out anew: the same numbers, in another shape.
LAYOUT = ('stays', 'reshapes', 'broadcasts')


def neutral_of(number: float, dtype: Any) -> Any:
  """Returns a neutral number in a dtype: infinity is the largest it has."""
  if np.dtype(dtype) == np.bool_:
    return number > 0
  if jnp.issubdtype(dtype, jnp.integer) and not np.isfinite(number):
    info = jnp.iinfo(dtype)
    return info.max if number > 0 else info.min
  return number


# Calls and control flow ------------------------------------------------------

add('jit', 'closed_call', bodies='inlined')
add('scan', 'while', 'cond', 'remat2', bodies='control')
add('custom_jvp_call', 'custom_vjp_call', bodies='derivative')

# Entry by entry --------------------------------------------------------------


def _elementwise(names: str, **traits: Any) -> None:
  """A row for each of several primitives that are alike."""
  add(*names.split(), elementwise=True, **traits)


_elementwise(
  """
  acos acosh bessel_i0e clz complex cos cosh device_put digamma eq eq_to erfc
  exp exp2 ge igamma igamma_grad_a igammac is_finite le le_to lgamma log log2
  logistic lt_to not one_minus_square polygamma pow
  regularized_incomplete_beta rsqrt zeta
  """
)
_elementwise(
  """
  asin asinh atan atan2 atanh bessel_i1e cbrt ceil erf erf_inv expm1 floor gt
  log1p lt ne nextafter or population_count round sign sin sinh sqrt square tan
  tanh xor
  """,
  zero='all',
)
_elementwise('abs', zero='all', positive='first')
_elementwise('conj imag real', zero='all', linear='first')
_elementwise('neg', zero='all', linear='first', moves='negates')
_elementwise(
  """
  convert_element_type copy name pvary reduce_precision sharding_constraint
  stop_gradient
  """,
  zero='all', linear='first', moves='stays',
)  # fmt: skip
add('device_put', zero='all', linear='first', moves='stays')
_elementwise('add add_any sub', zero='all', linear='jointly')
_elementwise('mul', zero='any', linear='each')
_elementwise('mulhi and', zero='any')
_elementwise(
  'rem shift_left shift_right_arithmetic shift_right_logical', zero='first'
)
_elementwise('div', zero='quotient', linear='first')
_elementwise('integer_pow', zero='power')
_elementwise('select_n', zero='cases', linear='cases')
_elementwise('max min', zero='bounds', positive='jointly')
_elementwise('clamp', zero='bounds')

add('add', 'sub', 'mul', 'div', counts='norms')
_ACTIVATIONS = """
  clamp erf erfc exp exp2 expm1 log log1p logistic max min pow sin cos tanh
"""
add(*_ACTIVATIONS.split(), counts='activations')

add('sqrt', 'rsqrt', 'cbrt', 'log', 'log2', 'lgamma', 'digamma', harmless=(1,))
add('log1p', 'asin', 'acos', 'atanh', 'erf_inv', harmless=(0,))
add('acosh', harmless=(2,))
add('pow', harmless=(1, None))
add('div', 'rem', 'atan2', harmless=(None, 1))

# Entries in other places -----------------------------------------------------

add('bitcast_convert_type', zero='handed')
add('optimization_barrier', zero='handed', moves='separate')
add('reshape', 'squeeze', 'transpose', zero='handed', moves='reshapes')
add('reshape', 'squeeze', 'transpose', linear='first')
add('broadcast_in_dim', zero='broadcast', moves='broadcasts', linear='first')
add('rev', zero='handed', moves='flips', linear='first')
add('slice', 'dynamic_slice', zero='handed', moves='slices', linear='first')
add('gather', zero='gather', linear='first')
add('split', 'tile', 'unstack', zero='handed', linear='first')
add('concatenate', 'stack', zero='handed', linear='jointly')
add('pad', zero='pad', linear='jointly')
add('dynamic_update_slice', 'sort', zero='handed')
add('scatter', 'scatter-add', 'scatter-sub', zero='handed')

# Sums and other reductions ---------------------------------------------------

_PRODUCTS = ('dot_general', 'conv_general_dilated', 'ragged_dot_general')
add(*_PRODUCTS, zero='product', linear='each')
add('reduce_sum', 'reduce_window_sum', linear='first', neutral=0)
add('reduce_max', 'reduce_window_max', positive='first', neutral=-np.inf)
add('reduce_min', 'reduce_window_min', positive='first', neutral=np.inf)
add('reduce_prod', neutral=1)
add('reduce_and', neutral=True)
add('reduce_or', 'reduce_xor', neutral=False)
add('argmax', neutral=-np.inf)
add('argmin', neutral=np.inf)
_REDUCTIONS = """
  reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum
  reduce_window_max reduce_window_min reduce_window_sum
"""
add(*_REDUCTIONS.split(), zero='handed', counts='pooling')
add('reduce_xor', 'reduce_window', counts='pooling')
add('cumsum', 'fft', zero='handed', linear='first')
add('cumprod', 'select_and_gather_add', 'select_and_scatter_add', zero='handed')

# Refused by name -------------------------------------------------------------


def _refused(why: str, names: str) -> None:
  """Rows of primitives without a rule: every axis that they touch is whole."""
  add(*names.split(), refused=why)


_refused(
  'solves or factors whole matrices',
  """
  cholesky cholesky_update custom_linear_solve eig eigh geqp3 geqrf hessenberg
  householder_product lu lu_pivots_to_permutation ormqr polynomial qr schur svd
  symmetric_product triangular_solve tridiagonal tridiagonal_solve
  """,
)
_refused(
  'multiplies blocks of entries with scales of their own',
  'scaled_dot scaled_matmul scaled_matmul_wrapper',
)
_refused(
  'reduces by a function of its own, or keeps a part that data choose',
  'approx_top_k reduce select_and_scatter',
)
_refused(
  'is a kernel of one kind of device, made for its shapes',
  """
  cudnn_fusion dot_product_attention_bwd dot_product_attention_bwd_wrapper
  dot_product_attention_fp8_bwd dot_product_attention_fp8_bwd_wrapper
  dot_product_attention_fp8_fwd dot_product_attention_fp8_fwd_wrapper
  dot_product_attention_fwd dot_product_attention_fwd_wrapper
  """,
)
_refused(
  'exchanges entries with other devices',
  """
  all_gather all_gather_done all_gather_invariant all_gather_reduced
  all_gather_reduced_start all_gather_start all_to_all all_to_all_done
  all_to_all_start axis_index pbroadcast pbroadcast_done pbroadcast_dynamic
  pbroadcast_start pmax pmin ppermute ppermute_done ppermute_start precv
  preduced psend psum psum_done psum_invariant psum_invariant_start psum_start
  ragged_all_to_all reduce_scatter reduce_scatter_done reduce_scatter_start
  reduced_vary_cast reduced_vary_cast_p shard_map unreduced_pmax
  unreduced_pmin unreduced_psum unreduced_psum_start unreduced_reduce_scatter
  unreduced_reduce_scatter_start unvmap_all unvmap_any unvmap_max
  vary_unreduced_cast vary_unreduced_cast_p
  """,
)
# Collectives still hand zeros on where JAX binds them outside of a shard_map.
_COLLECTIVES = 'all_gather all_to_all pbroadcast ppermute psum psum_invariant'
add(*_COLLECTIVES.split(), zero='handed')
_refused(
  'reads or writes a mutable reference',
  """
  accum_grad_in_ref addupdate box_get box_set empty_ref free_ref freeze get
  get_variable log_extend log_read maybe_set new_box new_log new_ref
  new_variable pin run_state set_variable swap unpin
  """,
)
_refused(
  'calls what cannot be traced',
  """
  call_exported custom_partitioning debug_callback debug_print ffi_call
  inspect_sharding io_callback pure_callback
  """,
)
_refused(
  'is a call whose body has a meaning of its own',
  """
  call call_hi_primitive call_hi_primitive_linearized composite core_map
  custom_jvp_call_jaxpr custom_lin custom_vmap_call eval_jaxpr linear_call
  noinline nonbatchable nondifferentiable_backward nontraceable remat_opt
  select_if_vmap stage vprim
  """,
)
_refused(
  'draws numbers, or makes keys, for a fixed shape',
  """
  iota_2x32_shape philox2x32 philox4x32 random_clone random_fold_in
  random_gamma random_seed random_split random_unwrap random_wrap
  rng_bit_generator rng_uniform threefry2x32 threefry4x32
  """,
)
_refused(
  'makes an array of a shape or type that only other passes of JAX use',
  """
  broadcast_to dim_as_value dimension_size empty empty2 from_edtype
  layout_constraint platform_index relayout reshard shape_assertion to_edtype
  with_memory_space_constraint zeros_like
  """,
)
_refused(
  'holds an order or a check and no number',
  """
  after_all announce_jaxpr check create_linear create_token dce_sink tie
  unreachable
  """,
)
