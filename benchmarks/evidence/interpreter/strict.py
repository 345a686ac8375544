"""What the compiler refuses is refused here, and what it does element by element is done so.

Stock, the interpreter runs a kernel as the Python it is: `min` of two blocks returns one of them whole, `and` of two blocks
likewise, `break` works, a plain global is read. Kernels that pass here compile (nearly always: evidence/compiled.py decides).
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Rewriter = interpreter.FunctionRewriter
_transform, _compile = Rewriter._transform_ast, Rewriter._compile_and_exec

REFUSED = (
    ast.Break, ast.Continue, ast.Try, ast.With, ast.Dict, ast.DictComp, ast.ListComp, ast.SetComp, ast.Set, ast.Lambda,
    ast.Yield, ast.Raise, ast.Delete, ast.Global, ast.Nonlocal, ast.Starred,
)  # fmt: skip
LEAST_DOT_DEPTH = {8: 32, 32: 8, 64: 4}  # by the bits of the operands; 16 otherwise


def install() -> None:
    Rewriter.ast_transformer = _Rewritten()
    Rewriter._transform_ast, Rewriter._compile_and_exec = _refuse_and_transform, _compile_with_helpers
    convert = interpreter._implicit_cvt
    # An int argument of 1 is a constant for the compiler: `stride.to(...)` fails there, so it must fail here.
    interpreter._implicit_cvt = lambda argument: 1 if type(argument) is int and argument == 1 else convert(argument)
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = lambda left, right: (
        1, 1, LEAST_DOT_DEPTH.get(left.scalar.primitive_bitwidth, 16),
    )  # fmt: skip


class LoopIndex(int):
    """A loop variable: an int that also has .to(), as the compiler's int32 has."""

    def to(self, dtype, **_):
        semantic = interpreter.interpreter_semantic
        return tl.cast(semantic.to_tensor(int(self)), dtype, _semantic=semantic)


def _staying_loop_index(name: str) -> Callable:
    plain = getattr(int, name)

    def operation(self, other):
        result = plain(self, other) if isinstance(other, int) else NotImplemented
        return result if result is NotImplemented else LoopIndex(result)

    return operation


for _name in ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__floordiv__", "__mod__"):
    setattr(LoopIndex, _name, _staying_loop_index(_name))


def _is_block(value) -> bool:
    return isinstance(value, tl.core.tensor)


def _and_or(kind: str, *operands: Callable):
    """`and` and `or`: element by element on blocks, Python's own on plain values."""
    result = operands[0]()
    for operand in operands[1:]:
        if _is_block(result):
            join = result.logical_and if kind == "and" else result.logical_or
            result = join(interpreter.interpreter_semantic.to_tensor(operand()))
        elif (kind == "and") == bool(result):
            result = operand()
        else:
            return result
    return result


def _not(value):
    if not _is_block(value):
        return not value
    return ~value if value.dtype.is_int1() else value == 0


def _condition(value):
    """Only of conditions written in kernels: triton's own code tests `if mask:` on blocks."""
    if _is_block(value) and value.type.is_block() and value.numel != 1:
        raise ValueError("strict: Boolean value of Tensor with more than one value is ambiguous")
    return value


def _extremum(name: str) -> Callable:
    def call(*values, **kwargs):
        if not any(map(_is_block, values)):
            return getattr(builtins, name)(*values, **kwargs)
        result = values[0]
        for value in values[1:]:
            result = getattr(tl, name + "imum")(result, value)
        return result

    return call


HELPERS = {
    "_strict_bool": _and_or,
    "_strict_not": _not,
    "_strict_cond": _condition,
    "_strict_range": lambda *bounds: map(LoopIndex, range(*(int(bound) for bound in bounds))),
    "min": _extremum("min"),
    "max": _extremum("max"),
}


def _call(name: str, like: ast.AST, *arguments: ast.expr) -> ast.AST:
    call = ast.Call(func=ast.Name(id=name, ctx=ast.Load()), args=list(arguments), keywords=[])
    return ast.copy_location(call, like)


class _Rewritten(interpreter.ASTTransformer):
    """Boolean operators, conditions and ranges go through HELPERS."""

    def visit_Assign(self, node):
        node.value = self.visit(node.value)  # triton 3.6 leaves it as it is
        return super().visit_Assign(node)

    def visit_BoolOp(self, node):
        self.generic_visit(node)
        none = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        later = [ast.Lambda(args=none, body=value) for value in node.values]
        kind = ast.Constant("and" if isinstance(node.op, ast.And) else "or")
        return _call("_strict_bool", node, kind, *later)

    def visit_UnaryOp(self, node):
        self.generic_visit(node)
        return _call("_strict_not", node, node.operand) if isinstance(node.op, ast.Not) else node

    def _visit_test(self, node):
        self.generic_visit(node)
        node.test = _call("_strict_cond", node.test, node.test)
        return node

    visit_If = visit_While = visit_IfExp = _visit_test

    def visit_For(self, node):
        self.generic_visit(node)
        loop = node.iter
        if isinstance(loop, ast.Call) and isinstance(loop.func, ast.Name) and loop.func.id == "range":
            loop.func.id = "_strict_range"
        return node


def _refuse_and_transform(self, source: str):
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, REFUSED):
            raise NotImplementedError(
                f"strict: the compiler has no {type(node).__name__} ({self.fn.__name__} line {node.lineno})"
            )
    for name in _globals_read(next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))):
        if isinstance(self.fn.__globals__.get(name.id), (bool, int, float, list, dict, np.ndarray)):
            raise NameError(f"strict: global {name.id} is not a tl.constexpr ({self.fn.__name__} line {name.lineno})")
    return _transform(self, source)


def _globals_read(function: ast.FunctionDef):
    """Names that the body reads and neither the signature nor an assignment binds; annotations do not count."""
    bound = {argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)}
    names = [node for statement in function.body for node in ast.walk(statement) if isinstance(node, ast.Name)]
    bound |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
    annotated = [node.annotation for node in ast.walk(function) if isinstance(node, ast.AnnAssign)]
    skipped = {id(node) for annotation in annotated for node in ast.walk(annotation)}
    return [n for n in names if isinstance(n.ctx, ast.Load) and n.id not in bound and id(n) not in skipped]


def _compile_with_helpers(self, tree):
    for name, helper in HELPERS.items():
        self.fn.__globals__.setdefault(name, helper)
    return _compile(self, tree)
