"""A Triton driver for a machine without a GPU: it names a compute capability and never loads anything."""

from __future__ import annotations

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from benchmarks.evidence.machine_code.architectures import ARCHITECTURES, REGISTERS


class _Properties:
    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_device_properties(self, device) -> dict[str, int]:
        limits = ARCHITECTURES[self.arch]
        return {
            "max_shared_mem": limits.shared_bytes_per_program,
            "multiprocessor_count": limits.processors,
            "max_num_regs": REGISTERS,
            "warpSize": 32,
        }

    def unload_module(self, module) -> None:
        pass


class NamedDriver(DriverBase):
    def __init__(self, arch: int) -> None:
        self.arch, self.utils = arch, _Properties(arch)
        self.launcher_cls = lambda source, metadata: lambda *args, **kwargs: None

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a kernel cache per architecture

    def set_current_device(self, device) -> None:
        pass

    def get_current_stream(self, device=None) -> int:
        return 0

    def get_device_capability(self, device=None) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda

    def get_benchmarker(self):
        raise RuntimeError("a kernel asks to be timed: there is no GPU here, and fastpt's choose from a table")

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache) -> None:
        pass
