"""Networks of other packages, small, as pure functions of their params.

Each entry of :data:`MODELS` makes a :class:`Model` on shapes alone; nothing is
downloaded, and the sizes are the smallest that keep the form of the published
network. Importing this module imports none of the packages.
"""

import functools
import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import cost, plans, structure

WORDS = jax.ShapeDtypeStruct((2, 8), jnp.int32)
VOCABULARY = 50


class Model(NamedTuple):
  """A network as a function of its params.

  Attributes:
    fn: fn(params, *args, train=bool) -> a pytree of arrays.
    params: their shapes.
    args: shapes of the inputs; integers are tokens.
    trains: whether its training form is another program.
  """

  fn: Callable[..., Any]
  params: Any
  args: tuple[jax.ShapeDtypeStruct, ...]
  trains: bool = True


def image(side: int = 32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)


def lively(params: Any) -> Any:
  """Random leaves of a scale at which a signal survives depth and products."""

  def one(path: Any, x: Any) -> Any:
    name = jax.tree_util.keystr(path)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.key(0)
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return np.ones(x.shape, x.dtype)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    draw = rng.standard_normal(x.shape).astype(x.dtype)
    last = name.lower().rpartition("['")[2].rpartition('.')[2]
    grows = any(part in last for part in ('scale', 'var', 'gamma', 'lambda'))
    is_norm = last in ('weight', 'g') and x.ndim == 1
    if grows or is_norm or 'var_ema' in name:
      return 1 + 0.3 * np.abs(draw)
    if x.ndim < 2 or x.size == max(x.shape):
      return 0.1 * draw
    if 'embed' in name and x.ndim == 2 and 'kernel' not in last:
      return draw
    is_equinox = "['" not in name
    fan_in = np.prod(x.shape[1:] if is_equinox else x.shape[:-1])
    return draw * np.sqrt(2 / fan_in).astype(x.dtype)

  return jax.tree_util.tree_map_with_path(one, params)


def inputs(model: Model) -> list[jax.Array]:
  """Random images, and tokens that differ."""
  rng = np.random.default_rng(0)
  return [
    jnp.asarray(
      rng.integers(1, VOCABULARY, spec.shape, np.int32)
      if jnp.issubdtype(spec.dtype, jnp.integer)
      else rng.standard_normal(spec.shape, np.float32)
    )
    for spec in model.args
  ]


# --- Flax classes of transformers 4 ------------------------------------------

TEXT = {
  'vocab_size': VOCABULARY,
  'hidden_size': 16,
  'num_hidden_layers': 1,
  'num_attention_heads': 2,
  'intermediate_size': 24,
  'max_position_embeddings': 16,
}
PICTURE = {
  'image_size': 32,
  'patch_size': 16,
  'hidden_size': 16,
  'num_hidden_layers': 1,
  'num_attention_heads': 2,
  'intermediate_size': 24,
}


def huggingface(
  name: str,
  task: str,
  *specs: jax.ShapeDtypeStruct,
  keys: tuple[str, ...] = ('input_ids',),
  trains: bool = True,
  **config: Any,
) -> Model:
  """A Flax class of transformers, called as its users call it."""
  import transformers

  made = getattr(transformers, f'{name}Config')(**config)
  model = getattr(transformers, f'Flax{name}{task}')(made, _do_init=False)
  specs = specs or (WORDS,)

  def fn(params: Any, *args: Any, train: bool = False) -> Any:
    given = dict(zip(keys, args, strict=True))
    if 'pixel_values' in given:  # Theirs have channels first.
      given['pixel_values'] = given['pixel_values'].transpose(0, 3, 1, 2)
    has_statistics = 'batch_stats' in params
    if train and trains:
      given['train'] = True
      if not has_statistics:
        given['dropout_rng'] = jax.random.key(0)
    out = model(**given, params=params)
    if has_statistics and train:
      return out[0].logits, out[1]
    return out['logits' if 'logits' in out else 'logits_per_image']

  return Model(fn, dict(model.params_shape_tree), specs, trains)


CAUSAL, CLASSIFIER = 'ForCausalLM', 'ForSequenceClassification'
IMAGES = 'ForImageClassification'
pixels = functools.partial(huggingface, keys=('pixel_values',))
SEQ2SEQ = {
  'd_model': 16,
  'encoder_layers': 1,
  'decoder_layers': 1,
  'encoder_attention_heads': 2,
  'decoder_attention_heads': 2,
  'encoder_ffn_dim': 24,
  'decoder_ffn_dim': 24,
  'vocab_size': VOCABULARY,
}


def seq2seq(name: str) -> Model:
  return huggingface(
    name,
    'ForConditionalGeneration',
    WORDS,
    WORDS,
    keys=('input_ids', 'decoder_input_ids'),
    max_position_embeddings=16,
    **SEQ2SEQ,
  )


def whisper() -> Model:
  return huggingface(
    'Whisper',
    'ForConditionalGeneration',
    jax.ShapeDtypeStruct((2, 8, 32), jnp.float32),
    WORDS,
    keys=('input_features', 'decoder_input_ids'),
    num_mel_bins=8,
    max_source_positions=16,
    max_target_positions=16,
    pad_token_id=0,
    **SEQ2SEQ,
  )


def wav2vec2() -> Model:
  return huggingface(
    'Wav2Vec2',
    'ForCTC',
    jax.ShapeDtypeStruct((2, 400), jnp.float32),
    keys=('input_values',),
    conv_dim=(12, 12),
    conv_stride=(5, 2),
    conv_kernel=(10, 3),
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    do_stable_layer_norm=True,
    feat_extract_norm='layer',
    mask_time_prob=0.0,
    **{k: v for k, v in TEXT.items() if k != 'max_position_embeddings'},
  )


def clip() -> Model:
  tower = {k: v for k, v in PICTURE.items() if 'size' not in k}
  tower |= {'hidden_size': 16, 'intermediate_size': 24}
  return huggingface(
    'CLIP',
    'Model',
    WORDS,
    image(),
    keys=('input_ids', 'pixel_values'),
    projection_dim=12,
    text_config=TEXT | {'eos_token_id': 49},
    vision_config=PICTURE,
  )


# --- dm-haiku ----------------------------------------------------------------


def haiku(make: Callable[[Any], Callable[..., Any]], side: int = 32) -> Model:
  """A Haiku network; its state is part of the params."""
  import haiku as hk

  net = hk.transform_with_state(lambda x, train: make(hk)(x, is_training=train))
  spec = image(side)
  params, state = jax.eval_shape(
    lambda key: net.init(key, jnp.zeros(spec.shape), True), jax.random.key(0)
  )

  def fn(variables: Any, x: Any, train: bool = False) -> Any:
    out, state = net.apply(
      variables['params'], variables['state'], None, x, train
    )
    return (out, {'state': state}) if train else out

  return Model(fn, {'params': params, 'state': state}, (spec,))


# --- jax-resnet --------------------------------------------------------------


def linen(make: Callable[[], Any], side: int = 32) -> Model:
  """A Linen network with batch statistics; it trains where they are mutable.

  With two images a norm of pooled features has two entries, and float32 loses
  their difference.
  """
  spec = jax.ShapeDtypeStruct((8, side, side, 3), jnp.float32)
  module = make()
  params = jax.eval_shape(
    lambda key: module.init(key, jnp.zeros(spec.shape)), jax.random.key(0)
  )

  def fn(variables: Any, x: Any, train: bool = False) -> Any:
    if train:
      return module.apply(variables, x, mutable=['batch_stats'])
    return module.apply(variables, x, mutable=False)

  return Model(fn, params, (spec,))


def _jax_resnet(block: str, stem: str = 'ResNetStem', **options: Any) -> Any:
  import jax_resnet
  from jax_resnet import resnet

  return jax_resnet.ResNet(
    functools.partial(getattr(resnet, block), **options),
    stage_sizes=[1, 1],
    n_classes=10,
    hidden_sizes=(32, 64),
    stem_cls=getattr(resnet, stem),
  )


# --- equimo ------------------------------------------------------------------


def equinox(make: Callable[[Any], Any], side: int = 32) -> Model:
  """An Equinox network: its arrays are the params."""
  import equinox as eqx

  shaped = eqx.filter_eval_shape(make, jax.random.key(0))
  params, static = eqx.partition(
    shaped, lambda x: isinstance(x, jax.ShapeDtypeStruct)
  )

  def fn(params: Any, x: Any, train: bool = False) -> Any:
    model = eqx.combine(params, static)
    keys = jax.random.split(jax.random.key(0), x.shape[0])
    call = lambda x, key: model(x, key=key, inference=not train)
    return jax.vmap(call)(x.transpose(0, 3, 1, 2), keys)

  return Model(fn, params, (image(side),))


def _equimo_vit(key: Any) -> Any:
  from equimo.models.vit import VisionTransformer

  return VisionTransformer(
    32, 3, 16, 16, 2, [1], mlp_ratio=1.5, num_classes=10, key=key
  )


def _equimo_convnext(key: Any) -> Any:
  from equimo.models.convnext import ConvNeXt

  return ConvNeXt(
    3, depths=[1] * 4, dims=[8, 8, 16, 16], num_classes=10, key=key
  )


def _equimo_mobilenet(key: Any) -> Any:
  from equimo.models import mobilenet

  return mobilenet.mobilenetv3_small(in_channels=3, num_classes=10, key=key)


# Name -> how to make it. The name begins with that of the package.
MODELS: dict[str, Callable[[], Model]] = {
  'bert': lambda: huggingface('Bert', CLASSIFIER, **TEXT),
  'roberta': lambda: huggingface(
    'Roberta', CLASSIFIER, **TEXT | {'max_position_embeddings': 20}
  ),
  'electra': lambda: huggingface(
    'Electra', CLASSIFIER, embedding_size=12, **TEXT
  ),
  'albert': lambda: huggingface(
    'Albert', CLASSIFIER, embedding_size=12, **TEXT
  ),
  'distilbert': lambda: huggingface(
    'DistilBert',
    CLASSIFIER,
    vocab_size=VOCABULARY,
    dim=16,
    hidden_dim=24,
    n_layers=1,
    n_heads=2,
    max_position_embeddings=16,
  ),
  'roformer': lambda: huggingface(
    'RoFormer', CLASSIFIER, embedding_size=16, **TEXT
  ),
  'gpt2': lambda: huggingface(
    'GPT2',
    'LMHeadModel',
    vocab_size=VOCABULARY,
    n_positions=16,
    n_embd=16,
    n_layer=1,
    n_head=2,
  ),
  'gpt-neo': lambda: huggingface(
    'GPTNeo',
    CAUSAL,
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    attention_types=[[['global'], 1]],
    max_position_embeddings=16,
  ),
  'gpt-j': lambda: huggingface(
    'GPTJ',
    CAUSAL,
    vocab_size=VOCABULARY,
    n_positions=16,
    n_embd=16,
    n_layer=1,
    n_head=2,
    rotary_dim=4,
  ),
  'opt': lambda: huggingface(
    'OPT',
    CAUSAL,
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    ffn_dim=24,
    max_position_embeddings=16,
    word_embed_proj_dim=16,
    trains=False,
  ),
  'bloom': lambda: huggingface(
    'Bloom', CAUSAL, vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2
  ),
  'xglm': lambda: huggingface(
    'XGLM',
    CAUSAL,
    vocab_size=VOCABULARY,
    d_model=16,
    ffn_dim=24,
    num_layers=1,
    attention_heads=2,
    max_position_embeddings=16,
  ),
  'llama': lambda: huggingface('Llama', CAUSAL, num_key_value_heads=1, **TEXT),
  'mistral': lambda: huggingface(
    'Mistral', CAUSAL, num_key_value_heads=1, sliding_window=4, **TEXT
  ),
  'gemma': lambda: huggingface(
    'Gemma', CAUSAL, num_key_value_heads=1, head_dim=8, **TEXT
  ),
  'pegasus': lambda: seq2seq('Pegasus'),
  'mbart': lambda: seq2seq('MBart'),
  'bart': lambda: seq2seq('Bart'),
  'whisper': whisper,
  'wav2vec2': wav2vec2,
  'clip': clip,
  'vit': lambda: pixels('ViT', IMAGES, image(), **PICTURE),
  'beit': lambda: pixels(
    'Beit', IMAGES, image(), vocab_size=VOCABULARY, **PICTURE
  ),
  'dinov2': lambda: pixels('Dinov2', IMAGES, image(), **PICTURE),
  'resnet': lambda: pixels(
    'ResNet',
    IMAGES,
    image(),
    embedding_size=16,
    hidden_sizes=[64, 128],
    depths=[1, 2],
  ),
  'regnet': lambda: pixels(
    'RegNet',
    IMAGES,
    image(),
    embedding_size=8,
    hidden_sizes=[16, 32],
    depths=[1, 1],
    groups_width=8,
  ),
  'haiku-resnet': lambda: haiku(
    lambda hk: hk.nets.ResNet(
      [1] * 4,
      10,
      bottleneck=False,
      channels_per_group=(32, 64, 64, 64),
      strides=(1, 2, 1, 1),
    )
  ),
  'haiku-resnet-v2': lambda: haiku(
    lambda hk: hk.nets.ResNet(
      [1] * 4,
      10,
      resnet_v2=True,
      channels_per_group=(64, 64, 128, 128),
      strides=(1, 2, 1, 1),
    )
  ),
  'haiku-mobilenet': lambda: haiku(
    lambda hk: hk.nets.MobileNetV1((1, 2, 1), (16, 32, 32), 10)
  ),
  'resnet-d': lambda: linen(
    lambda: _jax_resnet('ResNetDBottleneckBlock', 'ResNetDStem')
  ),
  'resnext': lambda: linen(
    lambda: _jax_resnet('ResNetBottleneckBlock', groups=4, base_width=16)
  ),
  'resnest': lambda: linen(
    lambda: _jax_resnet('ResNeStBottleneckBlock', 'ResNetDStem')
  ),
  'equimo-vit': lambda: equinox(_equimo_vit),
  'equimo-convnext': lambda: equinox(_equimo_convnext),
  'equimo-mobilenet': lambda: equinox(_equimo_mobilenet),
}

CNNS = (
  'resnet regnet haiku-resnet haiku-resnet-v2 haiku-mobilenet resnet-d resnext '
  'resnest'
)
OTHERS = 'wav2vec2 equimo-convnext equimo-mobilenet'


def coverage(name: str) -> dict[str, Any]:
  """Returns what part of a network can go, by what becomes of reductions.

  For each of the three semantics: the number of groups, and the part of the
  multiply-adds that goes with half of every group, rounded up. Where *rescale*
  offers much less than *keep* it says why.
  """
  model = MODELS[name]()
  family = 'cnn' if name in CNNS.split() else 'transformer'
  row: dict[str, Any] = {
    'family': 'other' if name in OTHERS.split() else family
  }
  reasons: dict[str, set[str]] = {}
  fn = lambda params, *args: model.fn(params, *args, train=False)
  for reductions in ('protect', 'keep', 'rescale'):
    graph = structure.trace(
      fn, model.params, *model.args, reductions=reductions
    )
    widths = {n: (g.size + 1) // 2 for n, g in graph.groups.items()}
    plan = plans.from_widths(graph, widths)
    left = cost.macs(graph, plan) / cost.macs(graph)
    row[reductions] = {
      'groups': len(graph.groups),
      'removed': round(1 - left, 4),
    }
    reasons[reductions] = {
      re.sub(r':\d+', '', why) for why in graph.protected.values()
    }
  if row['keep']['removed'] - row['rescale']['removed'] > 0.05:
    more = sorted(reasons['rescale'] - reasons['keep'])
    row['rescale']['why'] = '; '.join(more)
  return row
