"""Choice of a device, what it says about itself, and the words when it is not there."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from steepest.devices import DEVICES, Device, MemoryStats, api, device_of, select_device
from steepest.devices.backends import npu
from steepest.devices.backends.cpu import CPUDevice
from steepest.devices.backends.cuda import CUDADevice
from steepest.devices.backends.npu import NPUDevice
from steepest.errors import ConfigError, DeviceError, render
from steepest.registry import Registry


def test_names_and_facts_of_the_three_devices() -> None:
    facts = {
        name: (device.type, device.distributed_backend, device.visible_devices_variable, device.ray_resource)
        for name in DEVICES.names()
        for device in [DEVICES.get(name).value()]
    }
    assert facts == {
        "cpu": ("cpu", "gloo", None, "CPU"),
        "cuda": ("cuda", "cpu:gloo,cuda:nccl", "CUDA_VISIBLE_DEVICES", "GPU"),
        "npu": ("npu", "cpu:gloo,npu:hccl", "ASCEND_RT_VISIBLE_DEVICES", "NPU"),
    }
    assert [device.name for device in api.by_preference()] == ["cuda", "npu", "cpu"]


def test_facts_for_the_rollout_engine_and_for_processes_that_share_a_card() -> None:
    facts = {
        name: (device.sleep_level, device.allocator_variable, device.fused_adamw)
        for name in DEVICES.names()
        for device in [DEVICES.get(name).value()]
    }
    assert facts == {
        "cpu": (None, None, True),
        "cuda": (2, "PYTORCH_CUDA_ALLOC_CONF", True),
        "npu": (1, "PYTORCH_NPU_ALLOC_CONF", False),
    }
    npu = NPUDevice()
    assert npu.environment() == {"HCCL_HOST_SOCKET_PORT_RANGE": "auto", "HCCL_NPU_SOCKET_PORT_RANGE": "auto"}
    assert npu.rollout_environment() == {"VLLM_ASCEND_ENABLE_NZ": "0"}
    assert CPUDevice().environment() == CUDADevice().environment() == CUDADevice().rollout_environment() == {}


def test_attention_by_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CPUDevice().attention_implementation(torch.bfloat16) == (
        "sdpa",
        "cpu has no fused attention for packed sequences",
    )
    assert NPUDevice().attention_implementation(torch.bfloat16) == (
        "flash_attention_2",
        "torch-npu has a fused attention",
    )
    assert NPUDevice().attention_implementation(torch.float32)[0] == "sdpa"
    name, why = CUDADevice().attention_implementation(torch.float32)
    assert (name, why) == ("sdpa", "flash-attn computes in bfloat16, not in float32")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert CUDADevice().attention_implementation(torch.bfloat16) == ("sdpa", "the package flash-attn is not installed")


def test_a_flash_attn_that_does_not_load_is_said_and_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10\\nmore')")
    monkeypatch.syspath_prepend(str(tmp_path))
    name, why = CUDADevice().attention_implementation(torch.bfloat16)
    assert (name, why) == ("sdpa", "the package flash-attn does not load (undefined symbol: _ZN3c10)")


def test_the_device_of_a_tensor() -> None:
    assert isinstance(device_of(torch.zeros(1).device), CPUDevice)
    assert isinstance(device_of("cuda:3"), CUDADevice)
    with pytest.raises(DeviceError, match=r"torch device 'meta': no such device here; known: cpu, cuda, npu"):
        device_of("meta")


def cards(*, cuda: str | None, npu: str | None) -> Registry:
    """A table of devices whose cards are there (None) or are not, for this reason."""

    class CUDA(CUDADevice):
        def availability(self) -> str | None:
            return cuda

    class NPU(NPUDevice):
        def quick_look(self) -> str | None:
            return None

        def availability(self) -> str | None:
            return npu

    table = Registry(DEVICES.kind, DEVICES.key)
    for kind in (CPUDevice, CUDA, NPU):
        table.register(kind.name)(kind)
    return table


def test_unset_takes_the_best_present_and_says_why() -> None:
    assert select_device(table=cards(cuda=None, npu="absent; buy one.")).name == "cuda"
    device = select_device(table=cards(cuda="no driver; install it.", npu=None))
    assert device.name == "npu"
    assert render(device.chosen_because) == "device is unset: the best device present; no cuda: no driver"
    device = select_device(None, cards(cuda="no driver; install it.", npu="absent; buy one."))
    assert device.name == "cpu"
    assert device.chosen_because.endswith("no cuda: no driver; no npu: absent")


def test_a_named_device_is_never_replaced() -> None:
    table = cards(cuda="no driver; install it, or use device=cpu.", npu=None)
    with pytest.raises(DeviceError) as caught:
        select_device("cuda", table)
    assert str(caught.value) == "device=cuda: no driver; install it, or use device=cpu."
    assert select_device("cpu", table).name == "cpu"
    assert render(select_device("cpu", table).chosen_because) == "device=cpu"


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"^device='cud': no such device. Did you mean 'cuda'\? Known: cpu, cuda, npu"
    ):
        select_device("cud")
    with pytest.raises(ConfigError, match="; use device=npu with ASCEND_RT_VISIBLE_DEVICES=3 in the environment"):
        select_device("npu:3")


def test_cuda_says_which_of_three_things_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def torch_is(cuda: str | None, available: bool) -> None:
        for module, name, value in (
            (torch.cuda, "is_available", lambda: available),
            (torch.version, "cuda", cuda),
            (torch.version, "hip", None),
        ):
            monkeypatch.setattr(module, name, value, raising=False)

    torch_is(cuda=None, available=False)
    assert "is built without CUDA; install a CUDA build" in str(CUDADevice().availability())
    torch_is(cuda="12.9", available=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' hides every card" in str(CUDADevice().availability())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "finds no card or no driver; see that nvidia-smi" in str(CUDADevice().availability())
    torch_is(cuda="12.9", available=True)
    assert CUDADevice().availability() is None


class FakeModule(ModuleType):
    """torch's module of an accelerator with two cards."""

    def __init__(self) -> None:
        super().__init__("fake")
        self.states = [torch.tensor([1]), torch.tensor([2])]
        self.seeds: list[int] = []
        self.calls: list[str] = []

    def device_count(self) -> int:
        return 2

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return (600 + index, 1000)

    def max_memory_allocated(self, index: int) -> int:
        return 400 + index

    def max_memory_reserved(self, index: int) -> int:
        return 500 + index

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")

    def get_device_name(self, index: int) -> str:
        return "Ascend910B"

    def is_bf16_supported(self) -> bool:
        return True

    def manual_seed_all(self, seed: int) -> None:
        self.seeds.append(seed)

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return list(self.states)

    def set_rng_state(self, state: torch.Tensor, index: int) -> None:
        self.states[index] = state


def test_an_accelerator_asks_its_own_torch_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module, device = FakeModule(), NPUDevice()
    asked: list[str] = []
    monkeypatch.setattr(torch, "get_device_module", lambda kind: asked.append(kind) or module)
    assert device.count() == 2
    assert device.memory(1) == MemoryStats(total=1000, available=601, peak=401, peak_reserved=501)
    device.synchronize()
    device.empty_cache()
    assert module.calls == ["synchronize", "empty_cache"]
    assert device.supports_bf16() == (True, "Ascend910B has bf16 arithmetic")
    assert device.default_dtype() is torch.bfloat16
    device.seed(5)
    state = device.rng_state()
    assert module.seeds == [5] and sorted(state) == ["cpu", "npu:0", "npu:1"]
    module.states = [torch.tensor([8]), torch.tensor([9])]
    device.set_rng_state(state)
    assert [int(s) for s in module.states] == [1, 2]
    assert set(asked) == {"npu"}


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


X86 = "processor\t: 0\nmodel name\t: Fast CPU\nflags\t\t: fpu sse avx2 {}\n"


@pytest.mark.parametrize(
    ("cpuinfo", "bf16", "words"),
    [
        (X86.format("avx512f avx512_bf16"), True, "this CPU has AVX512-BF16"),
        (X86.format("amx_bf16 amx_tile avx512_bf16"), True, "this CPU has AMX-BF16 and AVX512-BF16"),
        (X86.format("avx512f amx_int8"), False, "neither AVX512-BF16 nor AMX, so fp32 is faster"),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", True, "this CPU has Arm BF16"),
    ],
)
def test_bf16_is_used_where_the_cpu_has_it(tmp_path: Path, cpuinfo: str, bf16: bool, words: str) -> None:
    write(tmp_path, {"proc/cpuinfo": cpuinfo})
    supported, reason = CPUDevice(tmp_path).supports_bf16()
    assert supported is bf16 and words in reason
    assert CPUDevice(tmp_path).default_dtype() is (torch.bfloat16 if bf16 else torch.float32)


def test_cpu_memory_is_that_of_the_container_when_it_is_smaller(tmp_path: Path) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    device = CPUDevice(tmp_path)
    write(tmp_path, {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   2000 kB\n"})
    assert device.memory().total == total
    assert device.memory().available == 2000 * 1024
    write(tmp_path, {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n"})
    assert device.memory().total == total
    write(tmp_path, {"sys/fs/cgroup/memory.max": "1000000\n", "sys/fs/cgroup/memory.current": "400000\n"})
    assert device.memory().total == 1_000_000
    assert device.memory().available == 600_000
    write(tmp_path, {"sys/fs/cgroup/memory.current": "1200000\n"})
    assert device.memory().available == 0


def test_cpu_peak_memory_grows_with_use_in_bytes() -> None:
    device = CPUDevice()
    before = device.memory().peak
    room = torch.ones(max(1, before // 4) + 25_000_000)  # fp32: at least 100 MB above the peak so far
    grown = device.memory().peak - before
    assert 90e6 < grown < 4 * room.numel() + 50e6


def test_cpu_device_describes_itself() -> None:
    device: Device = select_device("cpu")
    text = device.describe()
    assert text.startswith("cpu (") and "device=cpu" in text and " by default: " in text
    assert device.torch_device() == torch.device("cpu") and device.count() == 1


def test_seed_and_random_state_repeat_the_numbers() -> None:
    device = CPUDevice()
    device.seed(3)
    first = torch.rand(4)
    state = device.rng_state()
    second = torch.rand(4)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(4), second) and not torch.equal(first, second)
    device.seed(3)
    assert torch.equal(torch.rand(4), first)


def test_the_compressed_mask_of_the_fused_attention() -> None:
    """The stand-in for torch-npu goes by the mode alone; a card goes by what is in the mask."""
    with torch.inference_mode():
        mask = npu._causal_mask(torch.device("cpu"))
    assert not mask.is_inference(), "the backward pass could not keep it"
    assert mask.dtype == torch.bool and mask.shape == (2048, 2048)
    places = torch.arange(2048)
    assert torch.equal(mask, places[None, :] > places[:, None])  # hidden: keys after the query
