"""A stand-in for Huawei's `torch_npu`, with which the NPU's paths run on a machine without one.

With the folder that holds this package on PYTHONPATH, `import torch_npu` gives a real PyTorch device "npu" (backend key
PrivateUse1). Its memory is the host's, its operators run on the CPU, and it refuses what a card refuses: tensors of two
devices in one operator, a CPU generator for a device's numbers, more memory than there is. docs/npu_simulation.md says
what that shows and what it cannot show.

Environment:
    FAKE_NPU_DEVICES    cards of the machine (2); ASCEND_RT_VISIBLE_DEVICES hides some of them
    FAKE_NPU_MEMORY     bytes a card (64 GiB)
    FAKE_NPU_TORCH_ACCELERATOR_MEMORY=1    torch.accelerator.memory_* work, as with torch-npu 2.13; without it they
                        fail, as with 2.12 and older
    FAKE_NPU_BUILD_DIR  where the compiled library is looked for (~/.cache/steepest), see fake_npu_build.py
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import fake_npu_build
import torch
from torch.utils.backend_registration import generate_methods_for_privateuse1_backend
from torch.utils.checkpoint import DefaultDeviceType

IS_FAKE = True
"""Not in the real package: tests ask `getattr(torch_npu, "IS_FAKE", False)`."""
__version__ = torch.__version__.split("+")[0] + "+fake"


def _load() -> ModuleType:
    library = fake_npu_build.library()
    if not library.is_file():
        raise ImportError(f"the stand-in NPU is not compiled for this torch and Python; run {fake_npu_build.COMMAND}")
    spec = importlib.util.spec_from_file_location(fake_npu_build.MODULE, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_C = _load()

from . import autocast, hccl, npu  # noqa: E402  (they need _C)
from .ops import npu_fusion_attention, npu_rms_norm, npu_rotary_mul, npu_swiglu  # noqa: E402

__all__ = ["IS_FAKE", "npu", "npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu"]

torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True, for_packed_sequence=True)
DefaultDeviceType.set_device_type("npu")  # as the real package does
_autocast = autocast.register()  # kept: a Library that is dropped takes its kernels with it
if torch.distributed.is_available():
    hccl.register()
