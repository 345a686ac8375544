"""What kernels may call that the stock interpreter lacks: float arguments as tensors, libdevice, aliases, autotuned kernels.

Ours avoid all four (kernels/README.md); the peers' do not, and are measured next to ours.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import autotuner, interpreter

from benchmarks.evidence.interpreter.bf16 import Handle, decoded, from_float32, is_bf16

_convert, _patch_language = interpreter._implicit_cvt, interpreter._patch_lang

ONE_ARGUMENT: dict[str, Callable] = {
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "tanh": np.tanh,
    "exp": np.exp,
    "exp2": np.exp2,
    "fast_expf": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log2": np.log2,
    "log1p": np.log1p,
    "fast_logf": np.log,
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "abs": np.abs,
    "floor": np.floor,
    "ceil": np.ceil,
    "rint": np.rint,
    "trunc": np.trunc,
    "isnan": np.isnan,
    "isinf": np.isinf,
}
TWO_ARGUMENTS: dict[str, Callable] = {
    "pow": np.power,
    "fmod": np.fmod,
    "div_rn": np.divide,
    "atan2": np.arctan2,
    "fast_dividef": np.divide,
}


def install() -> None:
    interpreter._implicit_cvt = _convert_floats_too
    interpreter._patch_lang = _patch_aliases_too
    autotuner.Autotuner.run = _run_first_config


def _convert_floats_too(argument):
    """A Python float given to a run-time parameter is a float32 scalar with `.to`, not a Python double."""
    if isinstance(argument, float):
        return tl.tensor(Handle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
    return _convert(argument)


def _patch_aliases_too(function):
    """`cast = tl.cast` at module level gets its `_semantic` argument like tl.cast itself."""
    names = function.__globals__
    for name, value in list(names.items()):
        if callable(value) and not isinstance(value, type) and tl.core.is_builtin(value):
            names[name] = _with_semantic(value)
    return _patch_language(function)


def _with_semantic(builtin: Callable) -> Callable:
    return lambda *args, **kwargs: builtin(*args, **{**kwargs, "_semantic": interpreter.interpreter_semantic})


def _run_first_config(self, *args, **kwargs):
    """An autotuned kernel runs its first config instead of timing all on a GPU that is not there."""
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    self.best_config = config = self.prune_configs(kwargs)[0]
    if config.pre_hook is not None:
        config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
    return self.fn.run(*args, **kwargs, **config.all_kwargs())


def install_libdevice() -> None:
    """The stubs of triton.language.extra.libdevice return None; replaced there and where a module has imported one."""
    replaced = {}
    for name, function in [*ONE_ARGUMENT.items(), *TWO_ARGUMENTS.items()]:
        stub = getattr(libdevice, name, None)
        if getattr(stub, "is_ours", False):
            stub_of = stub.stub
        else:
            stub_of, ours = stub, (_one_argument if name in ONE_ARGUMENT else _two_arguments)(function)
            ours.is_ours, ours.stub = True, stub
            setattr(libdevice, name, ours)
        if stub_of is not None:
            replaced[id(stub_of)] = getattr(libdevice, name)
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None) or {}
        if "triton" in names or "tl" in names or any(n in names for n in ("tanh", "rsqrt")):
            for name in [n for n, value in list(names.items()) if id(value) in replaced]:
                names[name] = replaced[id(names[name])]


def _like(tensor: tl.core.tensor, values: np.ndarray, scalar: tl.dtype) -> tl.core.tensor:
    return tl.core.tensor(
        Handle(values, scalar), tl.block_type(scalar, tensor.shape) if tensor.type.is_block() else scalar
    )


def _one_argument(function: Callable) -> Callable:
    def call(x, _semantic=None):
        if not isinstance(x, tl.core.tensor):
            return float(function(x))
        numbers = decoded(x.handle)
        with np.errstate(all="ignore"):
            result = function(numbers)
        if result.dtype == np.bool_:
            return _like(x, result.astype(np.int32), tl.int32)
        if is_bf16(x.handle):
            return _like(x, from_float32(result), tl.bfloat16)
        return _like(x, result.astype(numbers.dtype), x.handle.dtype.scalar)

    return call


def _two_arguments(function: Callable) -> Callable:
    def call(x, y, _semantic=None):
        semantic = interpreter.interpreter_semantic
        x, y = semantic.broadcast_impl_value(semantic.to_tensor(x), semantic.to_tensor(y))
        return _like(x, function(decoded(x.handle), decoded(y.handle)).astype(np.float32), tl.float32)

    return call
