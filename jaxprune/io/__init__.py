"""Networks in and out of files.

Checkpoints that are verified when read (:class:`Checkpointer`), weights as
plain arrays (:func:`save_arrays`), functions as StableHLO or ONNX programs,
arrays with their plan as safetensors, and published weights
(:mod:`jaxprune.io.pretrained`).
"""

from jaxprune.io import pretrained as pretrained
from jaxprune.io.checkpoint import Checkpointer as Checkpointer
from jaxprune.io.checkpoint import Metadata as Metadata
from jaxprune.io.checkpoint import Restored as Restored
from jaxprune.io.checkpoint import load_arrays as load_arrays
from jaxprune.io.checkpoint import save_arrays as save_arrays
from jaxprune.io.onnx.export import save_onnx as save_onnx
from jaxprune.io.safetensors import load_safetensors as load_safetensors
from jaxprune.io.safetensors import save_safetensors as save_safetensors
from jaxprune.io.stablehlo import PLATFORMS as PLATFORMS
from jaxprune.io.stablehlo import load_stablehlo as load_stablehlo
from jaxprune.io.stablehlo import save_stablehlo as save_stablehlo
