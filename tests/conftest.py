"""Every test starts from one seed, and memory that nobody wrote reads as NaN."""

import os
from contextlib import nullcontext

import pytest

TRITON = "--triton"


def pytest_addoption(parser):
    parser.addoption(TRITON, action="store_true", help="the Triton kernels in the interpreter serve CPU tensors")


def pytest_configure(config):
    if config.getoption(TRITON):
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # tiny ops: threads that spin while they wait cost more than they do
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_generate_tests(metafunc):
    """Where there is a GPU, the tests of the ops run on it too (`-m gpu`: on it alone)."""
    import torch

    if "ops" in metafunc.definition.path.parts and torch.cuda.is_available():
        metafunc.fixturenames.append("default_device")
        metafunc.parametrize("default_device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


@pytest.fixture
def default_device(request):
    """Tensors made without a device are made on this one."""
    import torch

    torch.set_default_device(request.param)
    yield request.param
    torch.set_default_device(None)


@pytest.fixture
def runs_on_cpu_kernels(request):
    """Whether C++ or the references serve the test's tensors, rather than Triton and a library's GEMMs."""
    device = request.getfixturevalue("default_device") if "default_device" in request.fixturenames else None
    return not request.config.getoption(TRITON) and device in (None, "cpu")


@pytest.fixture(autouse=True)
def seeded_and_poisoned(request):
    import torch

    torch.manual_seed(0)
    # In deterministic mode ATen fills what torch.empty and its C++ kin return with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    with _kernels_under_test(request):
        yield
    torch.use_deterministic_algorithms(False)


def _kernels_under_test(request):
    if not request.config.getoption(TRITON):
        return nullcontext()
    from benchmarks.evidence.interpreter import TritonServes

    return TritonServes()


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
