"""Devices: what the rest of the code may ask one, and the table of them. A new device is one file in backends/."""

from steepest.devices.api import (
    DEVICES,
    Accelerator,
    Device,
    MemoryStats,
    device_of,
    hide_unusable,
    select_device,
)

__all__ = [
    "DEVICES",
    "Accelerator",
    "Device",
    "MemoryStats",
    "device_of",
    "hide_unusable",
    "select_device",
]
