"""Every form of every kernel compiles for the GPUs that there are, with NVRTC, which needs none: no spill, no stack."""

import os
import random

import pytest
from cuda_kernels import every, name_of
from nvrtc import compile_source, look_at_all

from fastconv.backends.cuda.device import source_text
from fastconv.backends.cuda.launches import DTYPES

# The whole product of kernels and GPUs, as CI does; else each kernel for one of them, drawn.
EVERYTHING = any(os.environ.get(name, "") not in ("", "0", "false") for name in ("CI", "FASTCONV_LONG"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_90a", "sm_100")
# Registers per thread: with 256 threads of 128 registers, two blocks fit a multiprocessor of 65536.
CEILING = 128
# With 288 threads, by blocks that share a multiprocessor.
WGMMA_CEILINGS = {1: 224, 2: 112}


# What a kernel on tensor cores must hold, by dtype.
MMA = {"float32": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
       "float16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
       "bfloat16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"}
FRAGMENTS = {"conv_mma": "ldmatrix.sync.aligned.m8n8.x4.shared",
             "weight_grad_mma": "ldmatrix.sync.aligned.m8n8.x4.trans"}


def instructions(kernel):
    """What the assembly of a kernel must hold."""
    if kernel.name not in (*FRAGMENTS, "conv_wgmma"):
        return ()
    dtype = next(name for name, (code, _) in DTYPES.items() if code == dict(kernel.defines)["FC_DTYPE"])
    if kernel.name == "conv_wgmma":
        defines, bits = dict(kernel.defines), {"float16": "f16", "bfloat16": "bf16"}[dtype]
        return (f"wgmma.mma_async.sync.aligned.m64n{defines['BN']}k16.f32.{bits}.{bits}",
                f"cp.async.bulk.tensor.{defines['AXES'] + 2}d.shared::cluster.global.im2col",
                "cp.async.bulk.tensor.2d.shared::cluster.global.tile", "mbarrier.try_wait.parity")
    fragments = () if dtype == "float32" else (FRAGMENTS[kernel.name],)
    return "cp.async.cg.shared.global", MMA[dtype], *fragments


def rows():
    """(kernel, architecture) of each test."""
    for kernel in every():
        draw = random.Random(name_of(kernel))
        architectures = [kernel.architecture] if kernel.architecture else ARCHITECTURES
        for architecture in architectures if EVERYTHING else [draw.choice(architectures)]:
            yield pytest.param(kernel, architecture, id=f"{name_of(kernel)}-{architecture}")


@pytest.fixture(scope="module")
def compiled(request):
    """What `look` gives for each test that this pytest run collected, compiled on all cores."""
    wanted = [tuple(item.callspec.params[name] for name in ("kernel", "architecture"))
              for item in request.session.items if getattr(item, "originalname", "") == "test_compiles_without_spills"]
    looks = [(source_text(kernel.source), architecture, kernel.defines, kernel.name, instructions(kernel))
             for kernel, architecture in wanted]
    return dict(zip(wanted, look_at_all(looks), strict=True))


@pytest.mark.parametrize(("kernel", "architecture"), list(rows()))
def test_compiles_without_spills(compiled, kernel, architecture):
    usage, missing = compiled[kernel, architecture]
    assert not missing
    assert usage.stack == 0
    assert usage.spilled == 0
    ceiling = WGMMA_CEILINGS[dict(kernel.defines)["BLOCKS"]] if kernel.name == "conv_wgmma" else CEILING
    assert usage.registers <= ceiling


def test_a_mistake_is_reported():
    with pytest.raises(AssertionError, match="identifier \"y\" is undefined"):
        compile_source('extern "C" __global__ void f(float *x) { x[0] = y; }', "sm_90")


def test_a_stack_is_reported():
    source = ('extern "C" __global__ void f(float *x, int *at, int n) { float a[64] = {};'
              " for (int i = 0; i < n; i++) a[at[i] & 63] += x[i]; x[0] = a[n & 63]; }")
    assert compile_source(source, "sm_90").usage["f"].stack > 0
