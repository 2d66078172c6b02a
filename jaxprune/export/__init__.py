"""Networks as files that other programs run: StableHLO, ONNX, safetensors."""

from jaxprune.export.stablehlo import PLATFORMS as PLATFORMS
from jaxprune.export.stablehlo import load as load
from jaxprune.export.stablehlo import save as save
