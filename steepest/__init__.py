"""Steepest: reinforcement-learning post-training for language models."""

import os

# With torch-npu installed and CANN missing, `import torch` itself fails unless this is set before it, also for a run on
# the CPU. The NPU device imports torch_npu itself when it is requested. A value that the user has set is kept.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

__version__ = "0.1.0"
