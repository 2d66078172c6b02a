"""Strict JAX for every test: four CPU devices, no silent rank promotion."""

import importlib.metadata
import os

# Four devices for what is sharded; and no optimisation by LLVM, since a test
# compiles much and computes little. JAX 0.10 also has the older emitters of
# kernels, which compile in two thirds of the time.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=4',
    '--xla_backend_optimization_level=0',
    '--xla_cpu_use_fusion_emitters=false'
    if importlib.metadata.version('jaxlib').startswith('0.10.')
    else '',
  ]
)

import hypothesis
import jax

# The same examples in every run: what is red on one machine is red on all.
hypothesis.settings.register_profile('same', derandomize=True, deadline=None)
hypothesis.settings.load_profile('same')
jax.config.update('jax_numpy_rank_promotion', 'raise')
