"""Of libdevice, what Inductor's kernels use and Triton's interpreter has not."""

import triton
import triton.language as tl


@triton.jit
def rsqrt(x):
    return 1.0 / tl.sqrt(x)


@triton.jit
def tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def erf(x):
    return tl.erf(x)


@triton.jit
def cos(x):
    return tl.cos(x)


@triton.jit
def sin(x):
    return tl.sin(x)
