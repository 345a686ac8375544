"""Optional fixes for the Triton (3.9) CPU interpreter so that kernels written for the
compiler give the same numbers in it.  Every fix can be switched off by name.

    import shims; shims.install()            # before or after kernels are imported
    shims.install(bf16=False)                # leave the stock bf16 behaviour

What is changed (all by monkeypatching triton.runtime.interpreter):
  float_args : a Python float passed to a run-time (non-constexpr) parameter becomes an fp32
               scalar tensor, as the compiler does (stock: stays a Python float / fp64).
  bf16       : fp32->bf16 rounds to nearest even (stock: truncates), bf16 arithmetic is done in
               fp32 and rounded (stock: arithmetic on the raw uint16 pattern), dot / sum / where
               and scans on bf16 decode first.
  libdevice  : triton.language.extra.libdevice stubs (stock: return None) are given numpy
               implementations for the common functions.
  aliases    : builtins bound to another name at module level get their _semantic argument
               (stock: "Did you forget to add @triton.jit ?").
  strict     : (off by default) reject or do elementwise what the compiler does, see _install_strict.
  autotune   : Autotuner takes the first (pruned) config instead of timing them (stock: asks for
               the active GPU driver, RuntimeError on a CPU machine).
"""

import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import autotuner as _at
from triton.runtime import interpreter as _it

from fastpt.ops._library import OPS

_TH = _it.TensorHandle
_installed = set()


# ---------------------------------------------------------------- bf16 helpers
def bf16_to_f32(u16):
    u16 = np.asarray(u16)
    return (u16.astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(u16.shape)


def f32_to_bf16(x):
    x = np.ascontiguousarray(x, dtype=np.float32)
    b = x.view(np.uint32)
    r = ((b >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    with np.errstate(over="ignore"):
        out = ((b + r) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(x)
    if nan.any():
        out = np.where(nan, np.uint16(0x7FC0), out)
    return out.reshape(x.shape)


def _is_bf(h):
    return isinstance(h, _TH) and h.dtype.scalar == tl.bfloat16 and h.data.dtype == np.uint16


def _dec(h):
    return bf16_to_f32(h.data) if _is_bf(h) else h.data


def _install_bf16():
    B = _it.InterpreterBuilder
    o_cast, o_fp2fp = B.cast_impl, B.create_fp_to_fp
    o_bin, o_un, o_ter, o_dot, o_fma = B.binary_op, B.unary_op, B.ternary_op, B.create_dot, B.create_fma

    def cast_impl(self, src, dst_type):
        s, d = src.dtype.scalar, dst_type.scalar
        if s == tl.bfloat16 and src.data.dtype == np.uint16:
            f = bf16_to_f32(src.data)
            if d == tl.bfloat16:
                return src
            if d == tl.float32:
                return _TH(f, tl.float32)
            return o_cast(self, _TH(f, tl.float32), dst_type)
        if d == tl.bfloat16:
            if s in (tl.float16, tl.float64) or not s.is_floating():
                src = o_cast(self, src, tl.float32)
            if src.dtype.scalar == tl.float32:
                return _TH(f32_to_bf16(src.data), tl.bfloat16)
        return o_cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        s, d = src.dtype.scalar, dst_type.scalar
        pair = {s, d}
        if pair <= {tl.bfloat16, tl.float32, tl.float16, tl.float64} and tl.bfloat16 in pair:
            if not (d == tl.bfloat16 and rounding_mode == _it._ir.ROUNDING_MODE.RTZ):
                return cast_impl(self, src, dst_type)
            if s == tl.float32:
                b = np.ascontiguousarray(src.data).view(np.uint32)
                return _TH((b >> np.uint32(16)).astype(np.uint16).reshape(src.data.shape), tl.bfloat16)
        if s == tl.float32 and d == tl.float16 and rounding_mode != _it._ir.ROUNDING_MODE.RTZ:
            return o_cast(self, src, dst_type)  # numpy astype: round to nearest even
        return o_fp2fp(self, src, dst_type, rounding_mode)

    def binary_op(self, lhs, rhs, op):
        if _is_bf(lhs) or _is_bf(rhs):
            t = op(_dec(lhs), _dec(rhs))
            if t.dtype == np.bool_:
                return _TH(t, tl.int1)
            return _TH(f32_to_bf16(t), tl.bfloat16)
        return o_bin(self, lhs, rhs, op)

    def unary_op(self, arg, op):
        if _is_bf(arg):
            return _TH(f32_to_bf16(op(_dec(arg))), tl.bfloat16)
        return o_un(self, arg, op)

    def ternary_op(self, a, b, c, op):
        if op is not np.where and any(map(_is_bf, (a, b, c))):
            return _TH(f32_to_bf16(op(_dec(a), _dec(b), _dec(c))), tl.bfloat16)
        return o_ter(self, a, b, c, op)

    def create_fma(self, x, y, z):
        if any(map(_is_bf, (x, y, z))):
            t = _dec(x).astype(np.float64) * _dec(y).astype(np.float64) + _dec(z)
            return _TH(f32_to_bf16(t.astype(np.float32)), tl.bfloat16)
        return o_fma(self, x, y, z)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if _is_bf(a) or _is_bf(b):
            acc = _dec(d)
            r = np.matmul(_dec(a).astype(np.float32), _dec(b).astype(np.float32)) + acc
            return _TH(r.astype(acc.dtype), d.dtype.scalar)
        return o_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    B.cast_impl, B.create_fp_to_fp = cast_impl, create_fp_to_fp
    B.binary_op, B.unary_op, B.ternary_op = binary_op, unary_op, ternary_op
    B.create_fma, B.create_dot = create_fma, create_dot

    o_sum, o_mm, o_cum = _it.ReduceOps.sum, _it.ReduceOps.min_max, _it.ScanOps.cumsum
    o_tt = _it.ReduceScanOpInterface.to_tensor

    def _to_f32(t):
        return tl.core.tensor(
            _TH(bf16_to_f32(t.handle.data), tl.float32),
            tl.block_type(tl.float32, list(t.handle.data.shape)) if t.handle.data.shape else tl.float32,
        )

    def _to_bf(t):
        h = _TH(f32_to_bf16(t.handle.data), tl.bfloat16)
        shp = list(t.handle.data.shape)
        ty = tl.block_type(tl.bfloat16, shp) if (t.type.is_block() and shp) else tl.bfloat16
        return tl.core.tensor(h, ty)

    def r_sum(self, input):
        if _is_bf(input.handle):
            return _to_bf(o_sum(self, _to_f32(input)))
        return o_sum(self, input)

    def r_mm(self, input, val_reduce_op, idx_reduce_op=None):
        input = input[0] if isinstance(input, tuple) else input
        if _is_bf(input.handle):
            r = o_mm(self, _to_f32(input), val_reduce_op, idx_reduce_op)
            if isinstance(r, tuple):
                return (_to_bf(r[0]), r[1])
            return _to_bf(r) if val_reduce_op else r
        return o_mm(self, input, val_reduce_op, idx_reduce_op)

    def s_cum(self, input):
        if _is_bf(input.handle):
            return [_to_bf(o_cum(self, _to_f32(input))[0])]
        return o_cum(self, input)

    _it.ReduceOps.sum, _it.ReduceOps.min_max, _it.ScanOps.cumsum = r_sum, r_mm, s_cum


def _install_float_args():
    orig = _it._implicit_cvt

    def _implicit_cvt(arg):
        if isinstance(arg, float) and not isinstance(arg, bool):
            return tl.tensor(_TH(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
        return orig(arg)

    _it._implicit_cvt = _implicit_cvt


def _install_libdevice():
    """libdevice functions in triton.language.extra.libdevice are `...` stubs: called as plain
    Python they return None.  Replace them (in the module and wherever already imported by
    `from ... import tanh`) by functions on tl.tensor."""
    import math
    import sys

    from triton.language.extra import libdevice as ld

    erf = np.vectorize(math.erf, otypes=[np.float64])
    table = {
        "rsqrt": lambda x: 1.0 / np.sqrt(x),
        "tanh": np.tanh,
        "exp": np.exp,
        "exp2": np.exp2,
        "log": np.log,
        "log2": np.log2,
        "log1p": np.log1p,
        "expm1": np.expm1,
        "sqrt": np.sqrt,
        "sin": np.sin,
        "cos": np.cos,
        "abs": np.abs,
        "floor": np.floor,
        "ceil": np.ceil,
        "erf": erf,
        "rint": np.rint,
        "nearbyint": np.rint,
        "trunc": np.trunc,
        "round": lambda x: np.trunc(x + np.copysign(0.5, x)),
        "fast_expf": np.exp,
        "fast_logf": np.log,
        "isnan": np.isnan,
        "isinf": np.isinf,
        "sinh": np.sinh,
        "cosh": np.cosh,
        "atan": np.arctan,
        "asin": np.arcsin,
        "acos": np.arccos,
    }
    table2 = {
        "pow": np.power,
        "fmod": np.fmod,
        "div_rn": np.divide,
        "atan2": np.arctan2,
        "fdividef": np.divide,
        "fast_dividef": np.divide,
    }

    def mk(f, name):
        def g(x, _semantic=None):
            if not isinstance(x, tl.core.tensor):
                return float(f(x))
            d = _dec(x.handle)
            with np.errstate(all="ignore"):
                r = f(d)
            if r.dtype == np.bool_:
                return tl.core.tensor(_TH(r.astype(np.int32), tl.int32), _ty(x, tl.int32))
            if _is_bf(x.handle):
                return tl.core.tensor(_TH(f32_to_bf16(r), tl.bfloat16), x.type)
            return tl.core.tensor(_TH(r.astype(d.dtype), x.handle.dtype), x.type)

        g.__name__ = name
        return g

    def _ty(x, s):
        return tl.block_type(s, x.shape) if x.type.is_block() else s

    def mk2(f, name):
        def g(x, y, _semantic=None):
            x, y = _it.interpreter_semantic.to_tensor(x), _it.interpreter_semantic.to_tensor(y)
            x, y = _it.interpreter_semantic.broadcast_impl_value(x, y)
            r = f(_dec(x.handle), _dec(y.handle)).astype(np.float32)
            return tl.core.tensor(_TH(r, tl.float32), _ty(x, tl.float32))

        g.__name__ = name
        return g

    new = {**{k: mk(f, k) for k, f in table.items()}, **{k: mk2(f, k) for k, f in table2.items()}}
    for k, g in new.items():
        old = getattr(ld, k, None)
        setattr(ld, k, g)
        if old is None:
            continue
        for mod in list(sys.modules.values()):  # rebinding of `from libdevice import tanh`
            d = getattr(mod, "__dict__", None)
            if not d or mod is ld:
                continue
            for n, v in list(d.items()):
                if v is old:
                    try:
                        setattr(mod, n, g)
                    except Exception:
                        pass


def _install_autotune():
    def run(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args))
        try:
            cfgs = self.prune_configs(kwargs)
        except Exception:
            cfgs = self.configs
        pick = getattr(self, "_meter_pick", None)
        config = cfgs[0] if pick is None else pick(cfgs)
        self.best_config = config
        if config.pre_hook is not None:
            config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
        ret = self.fn.run(*args, **kwargs, **config.all_kwargs())
        self.nargs = None
        return ret

    _at.Autotuner.run = run


def _install_aliases():
    """`my_cast = tl.cast` or `from triton.language import exp` at module level: stock patches only the
    triton.language modules, so the alias misses its _semantic argument."""
    orig = _it._patch_lang

    def wrap(member):
        def w(*a, **k):
            k["_semantic"] = _it.interpreter_semantic
            return member(*a, **k)

        w.__name__ = getattr(member, "__name__", "builtin")
        return w

    def _patch_lang(fn):
        g = fn.__globals__
        for n, v in list(g.items()):
            if callable(v) and not isinstance(v, type) and tl.core.is_builtin(v):
                g[n] = wrap(v)
        return orig(fn)

    _it._patch_lang = _patch_lang


class LoopInt(int):
    """loop variable: an int that also has .to(), as the compiler's int32 loop variable has"""

    def to(self, dtype, **k):
        return tl.cast(_it.interpreter_semantic.to_tensor(int(self)), dtype, _semantic=_it.interpreter_semantic)


for _n in ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__floordiv__", "__mod__"):

    def _mk(n):
        f = getattr(int, n)

        def op(self, o):
            if not isinstance(o, int):
                return NotImplemented
            r = f(self, o)
            return r if r is NotImplemented else LoopInt(r)

        return op

    setattr(LoopInt, _n, _mk(_n))


def _install_strict():
    """what the compiler rejects is rejected here, and what it does elementwise is elementwise here:
    block conditions, and/or/not and min/max on blocks, break/continue/try/dict/list comprehension,
    plain Python globals, int arguments equal to 1 (constexpr when compiled), tl.dot with K < 16."""
    import ast
    import builtins

    T = tl.core.tensor

    def _and(kind, *fs):
        r = fs[0]()
        for f in fs[1:]:
            if isinstance(r, T):
                v = f()
                r = (r.logical_and if kind == "and" else r.logical_or)(_it.interpreter_semantic.to_tensor(v))
            elif (kind == "and") == bool(r):
                r = f()
            else:
                return r
        return r

    def _not(x):
        if isinstance(x, T):
            return x == 0 if not x.dtype.is_int1() else ~x
        return not x

    def _cond(x):
        # only conditions written in kernels: triton itself tests `if mask:` on blocks
        if isinstance(x, T) and (x.type.is_block() and x.numel != 1):
            raise ValueError("strict: Boolean value of Tensor with more than one value is ambiguous")
        return x

    def _mm(name):
        b = getattr(builtins, name)

        def f(*a, **k):
            if builtins.any(isinstance(x, T) for x in a):
                r = a[0]
                for x in a[1:]:
                    r = getattr(tl, name + "imum")(r, x)
                return r
            return b(*a, **k)

        f._strict = True
        return f

    def _range(*a):
        return map(LoopInt, builtins.range(*(int(x) for x in a)))

    helpers = {"_strict_bool": _and, "_strict_not": _not, "_strict_cond": _cond, "min": _mm("min"), "max": _mm("max")}
    bad = (
        ast.Break,
        ast.Continue,
        ast.Try,
        ast.With,
        ast.Dict,
        ast.DictComp,
        ast.ListComp,
        ast.SetComp,
        ast.Set,
        ast.Lambda,
        ast.Yield,
        ast.Raise,
        ast.Delete,
        ast.Global,
        ast.Nonlocal,
        ast.Starred,
    )

    class Tr(_it.ASTTransformer):
        def visit_BoolOp(self, node):
            self.generic_visit(node)
            lam = [
                ast.Lambda(
                    args=ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[]), body=v
                )
                for v in node.values
            ]
            return ast.copy_location(
                ast.Call(
                    func=ast.Name(id="_strict_bool", ctx=ast.Load()),
                    args=[ast.Constant("and" if isinstance(node.op, ast.And) else "or")] + lam,
                    keywords=[],
                ),
                node,
            )

        def visit_UnaryOp(self, node):
            self.generic_visit(node)
            if isinstance(node.op, ast.Not):
                return ast.copy_location(
                    ast.Call(func=ast.Name(id="_strict_not", ctx=ast.Load()), args=[node.operand], keywords=[]), node
                )
            return node

        def _test(self, node):
            self.generic_visit(node)
            node.test = ast.copy_location(
                ast.Call(func=ast.Name(id="_strict_cond", ctx=ast.Load()), args=[node.test], keywords=[]), node.test
            )
            return node

        visit_If = visit_While = visit_IfExp = _test

        def visit_For(self, node):
            self.generic_visit(node)
            it = node.iter
            if isinstance(it, ast.Call) and isinstance(it.func, ast.Name) and it.func.id == "range":
                it.func.id = "_strict_range"
            return node

    FR = _it.FunctionRewriter
    FR.ast_transformer = Tr()
    o_tr, o_exec = FR._transform_ast, FR._compile_and_exec
    helpers["_strict_range"] = _range

    def _transform_ast(self, src):
        tree = ast.parse(src)
        for n in ast.walk(tree):
            if isinstance(n, bad):
                raise NotImplementedError(
                    f"strict: the compiler has no {type(n).__name__} ({self.fn.__name__} line {n.lineno})"
                )
        fdef = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))
        loc = {a.arg for a in ast.walk(fdef.args) if isinstance(a, ast.arg)} | {
            n.id for n in ast.walk(fdef) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        skip = {
            m
            for n in ast.walk(fdef)
            for a in ([n.annotation] if isinstance(n, (ast.arg, ast.AnnAssign)) and n.annotation else [])
            for m in ast.walk(a)
        }
        for st in fdef.body:
            for n in ast.walk(st):
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and n.id not in loc and n not in skip:
                    v = self.fn.__globals__.get(n.id)
                    if isinstance(v, (bool, int, float, list, dict, np.ndarray)):
                        raise NameError(
                            f"strict: global {n.id} is not a tl.constexpr ({self.fn.__name__} line {n.lineno})"
                        )
        return o_tr(self, src)

    def _compile_and_exec(self, tree):
        g = self.fn.__globals__
        for k, v in helpers.items():
            g.setdefault(k, v)
        return o_exec(self, tree)

    FR._transform_ast, FR._compile_and_exec = _transform_ast, _compile_and_exec

    o_cvt = _it._implicit_cvt

    def _implicit_cvt(arg):
        if type(arg) is int and arg == 1:
            return 1
        return o_cvt(arg)

    _it._implicit_cvt = _implicit_cvt
    k = {8: 32, 64: 4, 32: 8}
    _it.interpreter_builder.codegen_fns["min_dot_size"] = lambda l, r: (1, 1, k.get(l.scalar.primitive_bitwidth, 16))


def install(float_args=True, bf16=True, libdevice=True, autotune=True, aliases=True, strict=False):
    for name, on, f in (
        ("aliases", aliases, _install_aliases),
        ("float_args", float_args, _install_float_args),
        ("bf16", bf16, _install_bf16),
        ("libdevice", libdevice, _install_libdevice),
        ("autotune", autotune, _install_autotune),
        ("strict", strict, _install_strict),
    ):
        if on and (name not in _installed or name == "libdevice"):
            f()
            _installed.add(name)
    return sorted(_installed)


class TritonServes(TorchDispatchMode):
    """Within it the Triton kernels of fastpt's ops, interpreted, serve CPU tensors; ops without one stay as they are."""

    def __init__(self):
        super().__init__()
        install(strict=True)
        self.served: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = OPS.get(func.name().removeprefix("fastpt::").split(".")[0]) if func.namespace == "fastpt" else None
        if (
            op is None
            or op.triton is None
            or not all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in _tensors(args))
        ):
            return func(*args, **(kwargs or {}))
        self.served.add(op.name)
        return op.triton(*args, **(kwargs or {}))


def _tensors(args):
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
