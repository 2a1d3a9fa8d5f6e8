"""Triton's interpreter, with bf16 as GPUs have it.

The interpreter (triton 3.6 and 3.7) keeps bf16 as 16-bit integers; its `tl.dot` multiplies those, and its cast from f32
cuts bits off.  Here tiles are widened before they are multiplied, which is exact, and casts round to nearest even.
"""

import os
import sys

import numpy as np
import torch


def interpret() -> None:
    """Choose the interpreter, also where Triton is loaded already (torch._dynamo imports it)."""
    loaded = "triton" in sys.modules
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"
        if loaded:
            _replace_compiled()
    _mend_bf16()


def _replace_compiled() -> None:
    """These modules may hold functions that are meant for the compiler."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    late = ("triton.language", "torch._inductor.runtime.triton_helpers", "moe_compile.kernels")
    for name in [n for n in sys.modules if n.startswith(late)]:
        for attribute, function in list(vars(sys.modules[name]).items()):
            if isinstance(function, JITFunction):
                setattr(sys.modules[name], attribute, InterpretedFunction(function.fn))


def _mend_bf16() -> None:
    try:
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:  # no Triton: nothing to interpret
        return
    if hasattr(InterpreterBuilder, "mended"):
        return
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        narrow = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
        return TensorHandle(narrow.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    InterpreterBuilder.mended = True
