"""Ascend NPUs through torch-npu and CANN."""

from __future__ import annotations

import importlib
import importlib.util

from steepest.devices.api import DEVICES, Accelerator, visible_devices


@DEVICES.register("npu")
class NPUDevice(Accelerator):
    """One or more Ascend NPUs. torch_npu is imported when the device is asked about, never before.

    With torch-npu installed and CANN's libraries missing, plain `import torch` fails unless the environment has
    TORCH_DEVICE_BACKEND_AUTOLOAD=0 before that import; `steepest.trainer.entry` sets it for the commands.
    """

    name = "npu"
    type = "npu"
    distributed_backend = "cpu:gloo,npu:hccl"
    visible_devices_variable = "ASCEND_RT_VISIBLE_DEVICES"
    ray_resource = "NPU"

    def availability(self) -> str | None:
        if importlib.util.find_spec("torch_npu") is None:
            return (
                "the package torch-npu is not installed; install it for your torch and CANN versions "
                "(pip install 'steepest[npu]'), or use trainer.device=cpu."
            )
        try:
            importlib.import_module("torch_npu")
        except ImportError as error:
            return (
                f"torch-npu is installed but cannot load CANN ({error}); run "
                "`source /usr/local/Ascend/ascend-toolkit/set_env.sh` first, or use trainer.device=cpu."
            )
        except RuntimeError as error:  # torch-npu refuses a torch that is built for CUDA in this way
            return (
                f"torch-npu refused to load ({str(error).splitlines()[0]}); install a CPU build of torch beside it, "
                "or use trainer.device=cpu."
            )
        if not self.module.is_available():
            chosen = visible_devices(self)
            seen = "" if chosen is None else f" (ASCEND_RT_VISIBLE_DEVICES={chosen!r})"
            return f"torch-npu sees no card{seen}; see that `npu-smi info` lists one, or use trainer.device=cpu."
        return None
