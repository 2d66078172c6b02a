"""Networks as files for other programs: StableHLO, ONNX, safetensors."""

from jaxprune.export.onnx import save_onnx as save_onnx
from jaxprune.export.safetensors import load_safetensors as load_safetensors
from jaxprune.export.safetensors import save_safetensors as save_safetensors
from jaxprune.export.stablehlo import PLATFORMS as PLATFORMS
from jaxprune.export.stablehlo import load as load
from jaxprune.export.stablehlo import save as save
