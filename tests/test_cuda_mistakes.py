"""Mistakes planted in kernels on tensor cores, each of which the emulator must make visible in one of its schedules."""

import pytest
from cases import conv, laid_out
from cuda_emulator import SCHEDULES, DeviceArray, EmulatorProvider, device, emulated, host
from cuda_emulator.provider import extra_flags
from test_cuda_conv import run
from test_cuda_mma import channels_last, exact
from test_matrix_conv import reference_of
from tolerance import assert_close

from fastconv.backends.cuda import device as backend

pytestmark = pytest.mark.skipif(any("sanitize" in flag for flag in extra_flags()), reason="sanitizers see them, too")

CASE = conv((2, 16, 21, 17), (24, 16, 3, 3), padding=1, dilation=(1, 2))
RAGGED = conv((2, 13, 11, 17), (21, 13, 3, 3), padding=1)  # read through copies
# name: pass, dtype, source, what is there, what is put in its place; the source says which algorithm runs
MISTAKES = {
    "weight gradient, no wait": (
        "conv_weight_grad", "float16", "weight_grad_mma.cu", "fc::cp_wait<STAGES - 2>();", ""),
    "weight gradient, waits for one stage too few": (
        "conv_weight_grad", "float16", "weight_grad_mma.cu", "fc::cp_wait<STAGES - 2>();",
        "fc::cp_wait<STAGES - 1>();"),
    "weight gradient, no barrier in the loop": (
        "conv_weight_grad", "float16", "weight_grad_mma.cu", "fc::cp_wait<STAGES - 2>();\n    __syncthreads();",
        "fc::cp_wait<STAGES - 2>();"),
    "weight gradient, no barrier before the first copies": (
        "conv_weight_grad", "float16", "weight_grad_mma.cu", "next_pixels(0);\n  __syncthreads();", "next_pixels(0);"),
    "weight gradient, a stage is written too early": (
        "conv_weight_grad", "float32", "weight_grad_mma.cu", "if (k + STAGES - 1 < steps) load(k + STAGES - 1);",
        "if (k + STAGES < steps) load(k + STAGES);"),
    "weight gradient, lanes of fragment a": (
        "conv_weight_grad", "float16", "weight_grad_mma.cu", "lane / 16 * 8 + lane % 8) * LDA",
        "lane / 8 % 2 * 8 + lane % 8) * LDA"),
    "weight gradient, lanes of fragment b": (
        "conv_weight_grad", "float16", "weight_grad_mma.cu", "j * 8 + lane / 16 * 8", "j * 8 + lane / 8 % 2 * 8"),
    "weight gradient, TF32 lanes": (
        "conv_weight_grad", "float32", "weight_grad_mma.cu", "fb[j][1] = fc::float_to_tf32(q[4 * LDB])",
        "fb[j][1] = fc::float_to_tf32(q[2 * LDB])"),
    "forward, no wait": ("conv", "float16", "conv_mma.cu", "fc::cp_wait<STAGES - 2>();", ""),
    "forward, no barrier": (
        "conv", "float16", "conv_mma.cu", "fc::cp_wait<STAGES - 2>();\n    __syncthreads();",
        "fc::cp_wait<STAGES - 2>();"),
    "forward, results written before others have read": (
        "conv", "float16", "conv_mma.cu", "[BN][LDO]\n  __syncthreads();", "[BN][LDO]"),
    "forward, results read before they are written": (
        "conv", "float16", "conv_mma.cu", "sums[i][j][e];\n  __syncthreads();", "sums[i][j][e];"),
    "forward, depth of the padding": ("conv", "float16", "conv_mma.cu", "const bool deep = run < depth;",
                                      "const bool deep = true;"),
    "wgmma, no wait for a stage": (
        "conv", "float16", "conv_wgmma.cu", "fc::mbarrier_wait(&full[stage], k / STAGES & 1);", ""),
    "wgmma, the wrong phase": (
        "conv", "float16", "conv_wgmma.cu", "fc::mbarrier_wait(&full[stage], k / STAGES & 1);",
        "fc::mbarrier_wait(&full[stage], k & 1);"),
    "wgmma, copies do not wait": (
        "conv", "float16", "conv_wgmma.cu", "fc::mbarrier_wait(&empty[stage], (k / STAGES & 1) ^ 1);", ""),
    "wgmma, a stage is given back too early": (
        "conv", "float16", "conv_wgmma.cu", "if (k > 0 && lane == 0) fc::mbarrier_arrive(&empty[(k - 1) % STAGES]);",
        "if (lane == 0) fc::mbarrier_arrive(&empty[k % STAGES]);"),
    "wgmma, a stage is given back before the wait": (
        "conv", "float16", "conv_wgmma.cu", "fc::wgmma_wait<1>();", "fc::wgmma_wait<2>();"),
    "wgmma, no wait at the end": ("conv", "float16", "conv_wgmma.cu", "fc::wgmma_wait<0>();", ""),
    "wgmma, no fence": ("conv", "float16", "conv_wgmma.cu", "fc::wgmma_fence();", ""),
    "wgmma, no barrier after initialisation": (
        "conv", "float16", "conv_wgmma.cu", "fc::mbarrier_fence();\n  }\n  __syncthreads();",
        "fc::mbarrier_fence();\n  }"),
    "wgmma, too few bytes": (
        "conv", "float16", "conv_wgmma.cu", "(BM + BN) * BK * 2)", "BM * BK * 2)"),
    "wgmma, swizzle of 64 bytes": (
        "conv", "float16", "conv_wgmma.cu", "swizzle_128 << 62", "(swizzle_128 + 1) << 62"),
    "wgmma, rows of eight": ("conv", "float16", "conv_wgmma.cu", "8 * 128 >> 4", "4 * 128 >> 4"),
    "wgmma, tiles anywhere": (
        "conv", "float16", "conv_wgmma.cu", "memory + (1024 - fc::shared_address(memory) % 1024) % 1024", "memory"),
    "wgmma, depth of an operand": (
        "conv", "float16", "conv_wgmma.cu", "a + c * (16 * 2 >> 4)", "a + c * (32 * 2 >> 4)"),
    "wgmma, rows of the second warpgroup": (
        "conv", "float16", "conv_wgmma.cu", "(stage * BM + consumer * 64) * BK", "(stage * BM) * BK"),
    "wgmma, lanes of the result": (
        "conv", "float16", "conv_wgmma.cu", "i / 4 * 8 + lane % 4 * 2 + i % 2;", "i / 4 * 8 + lane % 4 + i % 2;"),
    "wgmma, taps without dilation": (
        "conv", "float16", "conv_wgmma.cu", "t.v[1] * l.tap_step[2],\n                    t",
        "t.v[1],\n                    t"),
    "copy, no barrier before reading": (
        "conv", "float16", "channels_last.cu", "s.size[0]));\n  __syncthreads();", "s.size[0]));"),
    "copy, no barrier before writing": (
        "conv", "float16", "channels_last.cu", ": element(0);\n  }\n  __syncthreads();", ": element(0);\n  }"),
    "copy, no zeros behind channels": (
        "conv", "float16", "channels_last.cu", " && channel < s.channels;", ";"),
    "packing, no zeros behind channels": (
        "conv", "float16", "pack_weights.cu", "t.v[0] < l.in_channels ? w[from] : to_element(real(0))", "w[from]"),
    "forward, lanes of fragment b": (
        "conv", "float16", "conv_mma.cu", "lane / 8 % 2 * 8);\n        fb", "lane / 16 * 8);\n        fb"),
}


def seen_in(op, dtype, algorithm):
    """The schedules in which a pass gives wrong numbers, or fails, in place or through copies."""
    seen = set()
    for case, put in ((CASE, channels_last), (RAGGED, lambda v, dtype: DeviceArray(laid_out(v, dtype, "contiguous")))):
        x, w, b, dy = exact(case, dtype)
        right = reference_of(case, x, w, b, dy)[op]
        for name, flags in SCHEDULES.items():
            with emulated(flags):
                try:
                    y = run(op, case, put(x, dtype), DeviceArray(laid_out(w, dtype, "contiguous")),
                            device(b.astype(dtype)), put(dy, dtype), algorithm, None)
                    n = case.reduction[op] if dtype == "float32" else 1
                    assert_close(host(y), right, n, magnitude=case.reduction[op] ** 0.5)
                except (AssertionError, RuntimeError, RuntimeWarning):
                    seen.add(name)
    return seen


def plant(name, monkeypatch):
    """Put a mistake into the sources; returns pass and dtype."""
    op, dtype, source, there, instead = MISTAKES[name]
    original = backend.source_text

    def changed(file):
        text = original(file)
        if file == source:
            assert text.count(there) == 1
            text = text.replace(there, instead)
        return text

    monkeypatch.setattr(EmulatorProvider, "_entries", {})
    monkeypatch.setattr(backend, "source_text", changed)
    return op, dtype, "wgmma" if source == "conv_wgmma.cu" else "mma"


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name, monkeypatch):
    assert seen_in(*plant(name, monkeypatch))


@pytest.mark.parametrize(("op", "dtype", "algorithm"), [
    ("conv", "float32", "mma"), ("conv", "float16", "mma"), ("conv_weight_grad", "float32", "mma"),
    ("conv_weight_grad", "float16", "mma"), ("conv", "float16", "wgmma")])
def test_without_one_nothing_is_seen(op, dtype, algorithm):
    assert not seen_in(op, dtype, algorithm)
