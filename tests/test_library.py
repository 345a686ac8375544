"""One kernel serves an op on a device: CUDA C++ where it was built, Triton else."""

import torch

from fastpt.ops import _library


def register(name):
    return _library.register(
        f"{name}(Tensor x) -> Tensor", reference=torch.clone, fake=torch.empty_like, cost=lambda x: None, triton="a:b"
    )


def test_triton_does_not_take_what_cpp_has():
    built = torch.library.Library("fastpt", "IMPL")
    built.impl("owner_probe", torch.clone, "CUDA")  # as TORCH_LIBRARY_IMPL does when fastpt._C is loaded
    try:
        register("owner_probe")
        register("owner_probe_of_triton")
        assert _library.serving_kernel("owner_probe", "cuda") == "C++"
        assert _library.serving_kernel("owner_probe_of_triton", "cuda") == "Triton"
        assert _library.serving_kernel("owner_probe", "cpu") == "reference"
    finally:
        for name in ("owner_probe", "owner_probe_of_triton"):
            _library.OPS.pop(name, None)
            _library.SERVED_BY_TRITON.discard(name)
        built._destroy()
