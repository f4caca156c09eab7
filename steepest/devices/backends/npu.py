"""Ascend NPUs through torch-npu and CANN."""

from __future__ import annotations

import importlib
import re
import sys
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from steepest.checks import Check
from steepest.devices import ascend, hide_torch_npu
from steepest.devices.api import DEVICES, Accelerator, VarlenAttention, visible_devices
from steepest.devices.ascend import CPU_INDEX, cann_version, source_command
from steepest.devices.checks import DEV, device_files, waits_for_every_kernel
from steepest.devices.hide_torch_npu import PACKAGE
from steepest.errors import setting
from steepest.versions import installed, pip_install, public, release

_CPU_RUN = f"or use {setting('device')}=cpu."
_DEVICE_FILES = "davinci[0-9]*"
"""Device files: the driver shows each card as /dev/davinciN."""
_DRIVER = ("libascend_hal", "libdrv")
"""Libraries of the driver; all others belong to CANN."""
_MASK_SIZE = 2048
"""Side of the compressed causal mask that the fused attention takes for sequences of any length."""
_CAUSAL = 3
"""Its `sparse_mode`: causal, aligned at the last key."""


@DEVICES.register("npu")
class NPUDevice(Accelerator):
    """One or more Ascend NPUs. torch_npu is imported when the device is asked about, never before.

    With torch-npu installed and CANN's libraries missing, plain `import torch` fails unless the environment has
    TORCH_DEVICE_BACKEND_AUTOLOAD=0 before that import (`steepest/__init__.py` sets it), and so does
    `import transformers` (see `hide_unusable` below).
    """

    name = "npu"
    type = "npu"
    preference = 2
    distributed_backend = "cpu:gloo,npu:hccl"
    visible_devices_variable = "ASCEND_RT_VISIBLE_DEVICES"
    ray_resource = "NPU"
    allocator_variable = "PYTORCH_NPU_ALLOC_CONF"
    vllm_install = "install vLLM and its plug-in vllm-ascend as docs/en/ascend_install.md says"
    sleep_level = 1  # what verl uses here; level 2 gave wrong outputs with expert parallelism

    def quick_look(self) -> str | None:
        """See Device. It does not import torch_npu: without a card that import breaks torch for the whole process."""
        if not hide_torch_npu.present():
            return (
                "the package torch-npu is not installed; install it for your torch and CANN versions "
                f"({pip_install('npu')}), {_CPU_RUN}"
            )
        mismatch = _wrong_version()
        if mismatch is not None:
            return mismatch
        # A package without metadata lies on the path as a folder: then only importing it can tell.
        if installed("torch-npu") is not None and not any(Path("/dev").glob(_DEVICE_FILES)):
            return f"there is no Ascend card here (no /dev/davinci0); {_see_card(container=True)}"
        return None

    def availability(self) -> str | None:
        if not hide_torch_npu.present():
            return self.quick_look()
        reason = _wrong_version() or _cannot_import()
        return reason or self._no_card()

    def hide_unusable(self, wanted: str | None) -> None:
        """Hide a torch-npu that cannot work here from this process. Call it before transformers is imported.

        transformers imports torch_npu wherever it is installed and does not catch its errors, so a broken package
        would end a CPU run too. `wanted` is trainer.device: in a run that names another device torch_npu is always
        hidden. Hidden means that `import torch_npu` finds nothing; `availability` still finds it.
        """
        if PACKAGE in sys.modules or not hide_torch_npu.present():
            return
        others = wanted is not None and wanted.partition(":")[0] != self.name
        if others or self.quick_look() is not None or _cannot_import() is not None:
            hide_torch_npu.hide()

    def _no_card(self) -> str | None:
        try:
            if self.module.is_available() and self.module.device_count():
                return None
            why = ""
        except RuntimeError as error:  # the driver is there and does not answer
            why = f": {_first_line(error)}"
        chosen = visible_devices(self)
        if chosen is not None and not chosen.strip():
            return f"ASCEND_RT_VISIBLE_DEVICES={chosen!r} hides every card; unset it, {_CPU_RUN}"
        seen = "" if chosen is None else f" (ASCEND_RT_VISIBLE_DEVICES={chosen!r})"
        return f"torch-npu sees no card{seen}{why}; {_see_card(container=False)}"

    def environment(self) -> dict[str, str]:
        """Variables for HCCL's ports: with fixed ports two processes on one card would conflict."""
        return {"HCCL_HOST_SOCKET_PORT_RANGE": "auto", "HCCL_NPU_SOCKET_PORT_RANGE": "auto"}

    def rollout_environment(self) -> dict[str, str]:
        """Variables that switch off vllm-ascend's NZ weight layout, which does not allow updates of weights in
        place."""
        return {"VLLM_ASCEND_ENABLE_NZ": "0"}

    def vllm_problem(self, distribution: str, version: str) -> str | None:
        if installed("vllm-ascend") is None:
            return f"it needs the plug-in vllm-ascend of the same version; {self.vllm_install}"
        return None

    def expected(self, dev: Path = DEV) -> str | None:
        files = device_files(dev, _DEVICE_FILES)
        return (
            "the package torch-npu is installed"
            if hide_torch_npu.present()
            else f"{files[0]} is there"
            if files
            else None
        )

    def version_checks(self) -> list[Check]:
        return ascend.version_checks(ascend.installed_versions())

    def setup_checks(self) -> list[Check]:
        return [*ascend.setup_checks(), *waits_for_every_kernel("ASCEND_LAUNCH_BLOCKING")]

    def varlen_attention(self, dtype: torch.dtype) -> tuple[VarlenAttention | None, str]:
        """torch-npu's fused attention, in half precision."""
        if dtype not in (torch.bfloat16, torch.float16):
            return None, f"the fused attention computes in bfloat16, not in {str(dtype).removeprefix('torch.')}"
        return fusion_attention, "torch-npu has a fused attention"


def fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, *, ends: Tensor, lengths: tuple[int, ...], scale: float
) -> Tensor:
    """See `VarlenAttention`: `npu_fusion_attention` of packed sequences (layout TND)."""
    running = torch.tensor(lengths).cumsum(0).tolist()
    result = importlib.import_module(PACKAGE).npu_fusion_attention(
        query,
        key,
        value,
        query.shape[1],
        "TND",
        atten_mask=_causal_mask(query.device),
        scale=scale,
        keep_prob=1.0,
        actual_seq_qlen=running,
        actual_seq_kvlen=running,
        sparse_mode=_CAUSAL,
    )
    out: Tensor = result[0]
    return out


@lru_cache
def _causal_mask(device: torch.device) -> Tensor:
    """The mask, true where a key is hidden; all layers share it. Made outside inference mode: the backward pass saves
    it."""
    with torch.inference_mode(False):
        # triu on the CPU: which data types a card's own takes is not known here
        return torch.ones(_MASK_SIZE, _MASK_SIZE, dtype=torch.bool).triu_(1).to(device)


def _wrong_version() -> str | None:
    found = installed("torch-npu")
    want, have = release(found or "")[:3], release(torch.__version__)[:3]
    if not want or want == have:
        return None
    numbers = ".".join(map(str, have))
    return (
        f"torch-npu {found} needs torch {'.'.join(map(str, want))}, but torch is {torch.__version__}; "
        f"pip install 'torch-npu=={numbers}.*', or the other torch, {_CPU_RUN}"
    )


def _cannot_import() -> str | None:
    """Import torch_npu. None, or the reason why it failed, as a sentence with its remedy."""
    with hide_torch_npu.unhidden():
        try:
            importlib.import_module(PACKAGE)
        except ModuleNotFoundError as error:
            return f"torch-npu needs the package {error.name}, which is missing; pip install {error.name}, {_CPU_RUN}"
        except ImportError as error:
            return _no_library(_first_line(error))
        except Exception as error:  # it raises plain Exceptions too
            return _refused(_first_line(error))
    return None


def _no_library(error: str) -> str:
    found = re.search(r"lib[\w.+-]*\.so[\w.]*", error)
    if found is None or "cannot open shared object file" not in error:
        return (
            f"torch-npu does not load ({error}); see that torch-npu, torch {torch.__version__} and CANN belong "
            f"together (docs/devices.md), {_CPU_RUN}"
        )
    library = found.group()
    if library.startswith(_DRIVER):
        return (
            f"torch-npu cannot load {library} of the Ascend driver; install the driver, or mount "
            f"/usr/local/Ascend/driver into the container and add its lib64 folders to LD_LIBRARY_PATH, {_CPU_RUN}"
        )
    if cann_version() is not None:
        return (
            f"CANN's set_env.sh is sourced, but {library} is not in this CANN; install the whole toolkit with its "
            f"operators, in the version that torch-npu {installed('torch-npu') or 'here'} needs, {_CPU_RUN}"
        )
    return (
        f"torch-npu cannot load CANN ({library}), whose set_env.sh is not sourced; run `{source_command()}` "
        f"(install CANN first where that file is missing), {_CPU_RUN}"
    )


def _refused(error: str) -> str:
    if "Two accelerators" in error:
        return (
            f"torch-npu refuses a torch that is built for another accelerator ({error.split(':')[0]}; torch is "
            f"{torch.__version__}); pip install torch=={public(torch.__version__)} {CPU_INDEX}, {_CPU_RUN}"
        )
    if "set_env.sh" in error:  # its libraries were found, by LD_LIBRARY_PATH for example, but not the rest of it
        return (
            f"CANN's environment is not whole ({error.split('. ')[0]}); run `{source_command()}` "
            f"(install CANN first where that file is missing), {_CPU_RUN}"
        )
    return f"torch-npu refused to load ({error}); see that it fits torch {torch.__version__} and CANN, {_CPU_RUN}"


def _see_card(*, container: bool) -> str:
    extra = " and that a container was started with --device=/dev/davinci0" if container else ""
    return f"see that `npu-smi info` lists one{extra}, {_CPU_RUN}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
