"""Stand-ins for what this machine lacks. `torch_npu` here is found when this folder is on PYTHONPATH."""
