"""Devices. Names of vendors occur only in this folder. A new device is one file here and one line below."""

from steepest.devices.api import DEVICES, Accelerator, Device, MemoryStats, device_of, select_device
from steepest.devices.cpu import CPUDevice
from steepest.devices.cuda import CUDADevice
from steepest.devices.npu import NPUDevice, hide_unusable

__all__ = [
    "DEVICES",
    "Accelerator",
    "CPUDevice",
    "CUDADevice",
    "Device",
    "MemoryStats",
    "NPUDevice",
    "device_of",
    "hide_unusable",
    "select_device",
]
