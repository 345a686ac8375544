"""What serves each op on CPU and CUDA, held against its schema: arguments by name and order, results, torch.compile, opcheck.

No GPU is needed: the fake implementations stand for CUDA tensors, and the interpreter for the CUDA kernels.
"""

import inspect
import re
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

pytest.importorskip("triton")

from benchmarks.evidence import calls
from fastpt.ops._library import OPS
from tests.helpers import needs_native

CSRC = Path(__file__).parents[2] / "csrc"
WITH_TRITON = [op for op in OPS.values() if op.triton is not None]
NO_CPP = {
    "cross_entropy",
    "cross_entropy_and_gradient",
    "cross_entropy_backward",
    "linear_divergence",  # made of linear ops and divergence_rows
    "linear_cross_entropy_scale",
}


class Recorder(TorchDispatchMode):
    """The smallest call of each op."""

    def __init__(self):
        super().__init__()
        self.arguments: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastpt":
            name = func._schema.name.split("::")[1]
            if name not in self.arguments or _size(args) < _size(self.arguments[name]):
                self.arguments[name] = tree_map_only(Tensor, lambda t: t.detach().clone(), args)
        return func(*args, **(kwargs or {}))


def _size(args) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(args) if isinstance(leaf, Tensor))


@cache
def recorded() -> dict[str, tuple]:
    """Arguments of every op with a CUDA kernel, forward and backward, from the evidence's cases."""
    recorder = Recorder()
    with _disable_current_modes():
        for module in calls.all_modules():
            for case in calls.cases_of(module):
                for inputs in case.numbers(calls.random(torch.float32)):
                    if _size((inputs.args, dict(inputs.kwargs))) < 1 << 16:
                        with recorder:
                            calls.run(case.function, inputs)
    return recorder.arguments


@pytest.mark.parametrize("op", WITH_TRITON, ids=lambda op: op.name)
def test_compiles_on_fake_cuda_tensors(op):
    """One graph of the op on CUDA tensors: results on their device, of the shapes and dtypes that the CPU kernels give."""
    arguments = recorded()[op.name]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastpt::{op.name}", "CUDA")
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    with _disable_current_modes(), torch.no_grad():
        expected = op.overload(*tree_map_only(Tensor, torch.clone, arguments))
        torch._dynamo.reset()
        with FakeTensorMode(allow_non_fake_inputs=True):
            on_cuda = tree_map_only(Tensor, _on_cuda, arguments)
            leaves, spec = tree_flatten(on_cuda)
            compiled = torch.compile(
                lambda *given: op.overload(*tree_unflatten(list(given), spec)), fullgraph=True, backend=backend
            )
            got = compiled(*leaves)
    (graph,) = graphs
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert op.overload in called
    results, wanted = tree_leaves(got), tree_leaves(expected)
    assert len(results) == len(wanted)
    for result, plain in zip(results, wanted, strict=True):
        if plain is not None:
            assert (result.device.type, result.shape, result.dtype) == ("cuda", plain.shape, plain.dtype)


def _on_cuda(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")


@pytest.mark.parametrize("op", WITH_TRITON, ids=lambda op: op.name)
def test_opcheck_of_the_cuda_registration(op, request):
    """The function under the CUDA key takes the CPU's place, in the interpreter, and passes torch.library.opcheck."""
    if not request.config.getoption("--triton"):
        pytest.skip("needs the interpreter")
    from benchmarks.evidence import interpreter

    arguments = recorded()[op.name]
    interpreter.TritonServes()  # sets the interpreter up
    served = []

    def kernel(*args, **kwargs):
        served.append(op.name)
        return op.triton(*args, **kwargs)

    library = torch.library.Library("fastpt", "IMPL")
    try:
        library.impl(op.name, kernel, "CPU", allow_override=True)
        with _disable_current_modes():
            torch.library.opcheck(op.overload, arguments)
    finally:
        library._destroy()
    assert served


def schema_names(op) -> list[str]:
    return [argument.name for argument in op.overload._schema.arguments]


def misfit(names: list[str], function, by_name: Sequence[str] = ()) -> str | None:
    """Why a Python function cannot take the schema's arguments by position (those of `by_name` by name), or None."""
    parameters = list(inspect.signature(function).parameters.values())
    found = [p.name for p in parameters[: len(names)]]
    if found != names:
        return f"takes {found}, the schema has {names}"
    if lacking := set(by_name) - {p.name for p in parameters[len(names) :]}:
        return f"does not take {sorted(lacking)}, which the schema has"
    further = [
        p.name for p in parameters[len(names) :] if p.default is inspect.Parameter.empty and p.name not in by_name
    ]
    return f"asks for {further} beyond the schema" if further else None


@pytest.mark.parametrize("op", WITH_TRITON, ids=lambda op: op.name)
def test_triton_launchers_take_the_schemas_arguments(op):
    module, function = op.triton_launcher.split(":")
    by_name = [argument.name for argument in op.overload._schema.arguments if argument.kwarg_only]
    by_place = [name for name in schema_names(op) if name not in by_name]
    assert misfit(by_place, getattr(import_module(module), function), by_name) is None


@cache
def cpp_parameters() -> dict[str, list[str]]:
    """Of each op with a C++ kernel, the names of that function's parameters."""
    text = "\n".join(path.read_text() for path in sorted((CSRC / "cpu").rglob("*.cpp")))
    return parameters_in(text)


def parameters_in(text: str) -> dict[str, list[str]]:
    macros = dict(re.findall(r"#define (\w+_ARGUMENTS)\s+((?:.*\\\n)*.*)", text))
    found = {}
    for op, function in re.findall(r'm\.impl\("(\w+)",\s*&(?:fastpt::)?(\w+)', text):
        definition = re.search(rf"^[^\n;#]*\b{function}\(([^{{}};]*?)\)\s*\{{", text, re.MULTILINE)
        assert definition, f"no definition of {function}"
        parameters = re.sub(r"\w+_ARGUMENTS", lambda m: macros[m[0]].replace("\\\n", " "), definition[1])
        found[op] = [re.findall(r"\w+", part)[-1] for part in re.split(r",(?![^<]*>)", parameters)]
    return found


@needs_native
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_cpp_kernels_take_the_schemas_arguments(op):
    """By name from the source, by type and number of results from what the dispatcher inferred of the function."""
    if op.name in NO_CPP:
        assert op.name not in cpp_parameters()
        return
    assert cpp_parameters()[op.name] == schema_names(op)
    line = re.search(r"^CPU: .* :: (\(.*\) -> .*) \[", torch._C._dispatch_dump(f"fastpt::{op.name}"), re.MULTILINE)
    inferred = torch._C.parse_schema(f"x{line[1]}")
    schema = op.overload._schema
    assert [str(a.type) for a in inferred.arguments] == [str(a.type) for a in schema.arguments]
    assert [str(r.type) for r in inferred.returns] == [str(r.type) for r in schema.returns]


def test_planted_deviations_are_seen():
    def swapped(up, gate): ...
    def renamed(gate, upper): ...
    def longer(gate, up, more): ...
    def sound(gate, up, more=1): ...

    names = schema_names(OPS["swiglu"])
    assert misfit(names, sound) is None
    assert "the schema has ['gate', 'up']" in misfit(names, swapped)
    assert "upper" in misfit(names, renamed)
    assert "beyond the schema" in misfit(names, longer)
    assert "does not take ['out']" in misfit(names, sound, ["out"])
    planted = 'at::Tensor swiglu(const at::Tensor& up, std::array<bool, 2> gate) {}\nm.impl("swiglu", &fastpt::swiglu);'
    assert parameters_in(planted) == {"swiglu": ["up", "gate"]}
