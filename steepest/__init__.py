"""Steepest: reinforcement-learning post-training for language models."""

import os

# With torch-npu installed and CANN missing, `import torch` itself fails unless this is set before it, also for a run on
# the CPU. The NPU device imports torch_npu by itself, when it is asked for. A value of the user's own wins.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

__version__ = "0.1.0"
