"""Pretrained weights of PyTorch, Keras and Hugging Face, as our variables.

A *names* function maps the layers of a network of :mod:`jaxprune.models` to the
names that another library has for them; :func:`from_torch` and
:func:`from_keras` bring the arrays into our layout, exactly: nothing is
rounded unless ``allow_rounding`` says so, nothing is guessed, and a name that
is missing or left over is an error::

  model = models.resnet50()
  like = jax.eval_shape(model.init, jax.random.key(0), images)
  arrays = weights.read('resnet50.safetensors')
  variables = weights.from_torch(arrays, like, weights.torch_resnet)

Names may stand under a prefix, such as ``model.`` or ``_orig_mod.``, and
weights may be pruned by ``torch.nn.utils.prune``.

A norm's epsilon and the padding of a strided convolution are no weights: give
the network those of the source, by ``epsilon`` and ``tensorflow_padding``. A
block that a network leaves out leaves its names free: ``ignore`` them. Without
the last block of a stage some names count that stage as shorter, and a whole
checkpoint is refused: convert the whole network then, and leave it out after.
"""

from jaxprune.io.pretrained.conversion import from_keras, from_torch, to_torch
from jaxprune.io.pretrained.files import bert_options, read
from jaxprune.io.pretrained.names import (
  Named,
  cifar_resnet,
  hugging_face_bert,
  keras_mobilenet_v1,
  keras_mobilenet_v2,
  keras_mobilenet_v3,
  timm_mobilenet_v1,
  timm_mobilenet_v2,
  timm_mobilenet_v3,
  timm_vgg,
  torch_resnet,
  torchvision_googlenet,
  torchvision_mobilenet_v2,
  torchvision_mobilenet_v3,
  torchvision_vgg,
)

__all__ = [
  'Named',
  'bert_options',
  'cifar_resnet',
  'from_keras',
  'from_torch',
  'hugging_face_bert',
  'keras_mobilenet_v1',
  'keras_mobilenet_v2',
  'keras_mobilenet_v3',
  'read',
  'timm_mobilenet_v1',
  'timm_mobilenet_v2',
  'timm_mobilenet_v3',
  'timm_vgg',
  'to_torch',
  'torch_resnet',
  'torchvision_googlenet',
  'torchvision_mobilenet_v2',
  'torchvision_mobilenet_v3',
  'torchvision_vgg',
]
