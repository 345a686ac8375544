"""Build rules: the kernels/ mapping and the one native module, fastpt._C.

FASTPT_NATIVE=0 skips the native module, FASTPT_NATIVE=1 makes a missing compiler an error. By default it is built where
a C++ compiler is there and skipped, with one line, where not: fastpt then runs on its PyTorch references.
With a CUDA build of torch and nvcc, the CUDA C++ kernels are part of it; without nvcc, Triton and PyTorch serve GPUs.
FASTPT_SANITIZE=1 instruments it with AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`).
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup


def native_module() -> dict:
    """setup() arguments for fastpt._C, or {} when it is not to be built."""
    wanted = os.environ.get("FASTPT_NATIVE", "auto")
    if wanted == "0":
        return {}
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        if wanted == "1":
            raise SystemExit("fastpt: FASTPT_NATIVE=1, but no C++ compiler was found (install g++ or set CXX)")
        print("fastpt: no C++ compiler found, building without the native CPU kernels (slower)", file=sys.stderr)
        return {}
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as missing:
        if wanted == "1":
            raise
        print(f"fastpt: {missing.name} is not installed here, building without the native CPU kernels (slower); "
              "for them: pip install torch pybind11 ninja, then pip install --no-build-isolation .", file=sys.stderr)  # fmt: skip
        return {}

    sanitizers = []
    if (
        os.environ.get("FASTPT_SANITIZE") == "1"
    ):  # -g1: reports name lines; -fno-wrapv: Python's own flags define overflow
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-wrapv", "-O1", "-g1"]
    minor = ".".join(torch.__version__.split(".")[:2])
    has_cuda = torch.version.cuda is not None and CUDA_HOME is not None
    if torch.version.cuda is not None and not has_cuda:
        print("fastpt: no nvcc found, building without the CUDA C++ kernels (set CUDA_HOME for them)", file=sys.stderr)
    if has_cuda and not torch.cuda.is_available():  # without a GPU torch does not know what to compile for
        built_for = sorted(int(arch.removeprefix("sm_")) for arch in torch._C._cuda_getArchFlags().split())
        wanted_archs = ";".join(f"{arch // 10}.{arch % 10}" for arch in built_for if arch >= 80)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{wanted_archs}+PTX")
    sources = [path for folder in ("csrc", "csrc/cpu") for path in Path(folder).glob("*.cpp")]
    if has_cuda:
        sources += [path for ending in ("*.cpp", "*.cu") for path in Path("csrc/cuda").glob(ending)]
    # ISA-specific code is chosen at run time (csrc/cpu/for_each_isa.h), so no -march here: the wheel runs elsewhere.
    # -fopenmp: at::parallel_for is a header template that needs it to run in parallel.
    flags = [
        "-O3", "-std=c++20", "-g0", "-fopenmp", "-fvisibility=hidden",
        "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi",
        f'-DFASTPT_TORCH_MINOR="{minor}"', f"-DFASTPT_CUDA={int(has_cuda)}", *sanitizers,
    ]  # fmt: skip
    extension = (CUDAExtension if has_cuda else CppExtension)(
        "fastpt._C",
        sorted(str(path) for path in sources),
        include_dirs=[str(Path("csrc").resolve()), pybind11.get_include()],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++20"]} if has_cuda else flags,
        extra_link_args=["-fopenmp", *sanitizers],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(
    packages=[*find_packages(include=["fastpt", "fastpt.*"]), "fastpt.kernels"],
    package_dir={"fastpt.kernels": "kernels"},  # fastpt/kernels is a link to it, for editable installs
    **native_module(),
)
