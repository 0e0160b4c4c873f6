"""Mistakes planted in kernels on tensor cores, each of which the emulator must make visible in one of its schedules."""

import pytest
from cases import conv, laid_out
from cuda_emulator import SCHEDULES, DeviceArray, EmulatorProvider, device, emulated, host
from cuda_emulator.provider import extra_flags
from test_cuda_mma import channels_last, exact
from test_matrix_conv import reference_of, run
from tolerance import assert_close

from fastconv.backends.cuda import device as backend

pytestmark = pytest.mark.skipif(any("sanitize" in flag for flag in extra_flags()), reason="sanitizers see them, too")

CASE = conv((2, 16, 21, 17), (24, 16, 3, 3), padding=1, dilation=(1, 2))
RAGGED = conv((2, 21, 11, 17), (13, 21, 3, 3), padding=1)  # read through copies
# By source, which says which algorithm runs, pass and dtype; what is there, and what is put in its place.
MISTAKES = {
    ("weight_grad_mma.cu", "conv_weight_grad", "float16"): {
        "no wait": ("fc::cp_wait<STAGES - 2>();", ""),
        "waits for one stage too few": ("fc::cp_wait<STAGES - 2>();", "fc::cp_wait<STAGES - 1>();"),
        "no barrier in the loop": ("fc::cp_wait<STAGES - 2>();\n    __syncthreads();", "fc::cp_wait<STAGES - 2>();"),
        "no barrier before the first copies": ("next_pixels(0);\n  __syncthreads();", "next_pixels(0);"),
        "lanes of fragment a": ("lane / 16 * 8 + lane % 8) * LDA", "lane / 8 % 2 * 8 + lane % 8) * LDA"),
        "lanes of fragment b": ("j * 8 + lane / 16 * 8", "j * 8 + lane / 8 % 2 * 8"),
    },
    ("weight_grad_mma.cu", "conv_weight_grad", "float32"): {
        "a stage is written too early": (
            "if (k + STAGES - 1 < steps) load(k + STAGES - 1);", "if (k + STAGES < steps) load(k + STAGES);"),
        "TF32 lanes": ("fb[j][1] = fc::float_to_tf32(q[4 * LDB])", "fb[j][1] = fc::float_to_tf32(q[2 * LDB])"),
    },
    ("conv_mma.cu", "conv", "float16"): {
        "no wait": ("fc::cp_wait<STAGES - 2>();", ""),
        "no barrier": ("fc::cp_wait<STAGES - 2>();\n    __syncthreads();", "fc::cp_wait<STAGES - 2>();"),
        "results written before others have read": ("[BM][LDO]\n  __syncthreads();", "[BM][LDO]"),
        "results read before they are written": ("#endif\n      }\n  __syncthreads();", "#endif\n      }"),
        "depth of the padding": ("const bool deep = run < depth;", "const bool deep = true;"),
        "lanes of fragment b": ("lane / 8 % 2 * 8);\n        fb", "lane / 16 * 8);\n        fb"),
    },
    ("conv_wgmma.cu", "conv", "float16"): {
        "no wait for a stage": ("fc::mbarrier_wait(&full[stage], k / STAGES & 1);", ""),
        "the wrong phase": (
            "fc::mbarrier_wait(&full[stage], k / STAGES & 1);", "fc::mbarrier_wait(&full[stage], k & 1);"),
        "copies do not wait": ("fc::mbarrier_wait(&empty[stage], (k / STAGES & 1) ^ 1);", ""),
        "a stage is given back too early": (
            "if (k > 0 && lane == 0) fc::mbarrier_arrive(&empty[(k - 1) % STAGES]);",
            "if (lane == 0) fc::mbarrier_arrive(&empty[k % STAGES]);"),
        "a stage is given back before the wait": ("fc::wgmma_wait<1>();", "fc::wgmma_wait<2>();"),
        "no wait at the end": ("fc::wgmma_wait<0>();", ""),
        "no fence": ("fc::wgmma_fence();", ""),
        "no barrier after initialisation": (
            "fc::mbarrier_fence();\n  }\n  __syncthreads();", "fc::mbarrier_fence();\n  }"),
        "too few bytes": ("(BM + BN) * BK * 2)", "BM * BK * 2)"),
        "swizzle of 64 bytes": ("swizzle_128 << 62", "(swizzle_128 + 1) << 62"),
        "rows of eight": ("8 * 128 >> 4", "4 * 128 >> 4"),
        "tiles anywhere": ("memory + (1024 - fc::shared_address(memory) % 1024) % 1024", "memory"),
        "depth of an operand": ("a + c * (16 * 2 >> 4)", "a + c * (32 * 2 >> 4)"),
        "rows of the second warpgroup": ("(stage * BM + consumer * 64) * BK", "(stage * BM) * BK"),
        "lanes of the result": ("n = i / 4 * 8 + lane % 4 * 2;", "n = i / 4 * 8 + lane % 4;"),
        "results read before they are written": ("#endif\n    }\n  }\n  __syncthreads();", "#endif\n    }\n  }"),
        "results written before others have read": (
            "fc::wgmma_wait<0>();\n  }\n  __syncthreads();", "fc::wgmma_wait<0>();\n  }"),
        "taps without dilation": ("t.v[1] * l.tap_step[2],\n                    t", "t.v[1],\n                    t"),
    },
    ("channels_last.cu", "conv", "float16"): {
        "no barrier before writing": ("#endif\n  __syncthreads();", "#endif"),
        "no zeros behind channels": ("row + i * rows < channels", "row + i * rows < channels + 1"),
        "words of a channel": ("x * BYTES / 4", "x * BYTES / 2 % ROW"),
        "pixels of a word": ("[BYTES < 4 ? x % 2 : 0]", "[0]"),
        "the second pixel of a word": ("words[2 * k] >> 16 * h &", "words[2 * k] &"),
        "runs that are written": ("(e % 8 + e / (8 * ROW) * 8) * RUN", "e / 8 % 8 * RUN"),
    },
    ("channels_last.cu", "conv_input_grad", "float16"): {  # 13 channels are gathered
        "no zeros behind channels": ("channel + k < s.channels ?", "channel + k < s.padded ?"),
        "runs of a pixel": ("p * all + c]", "p * all]"),
    },
    ("pack_weights.cu", "conv", "float16"): {
        "no zeros behind channels": ("t.v[0] < l.in_channels ? w[from] : to_element(real(0))", "w[from]"),
    },
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


def plant(group, name, monkeypatch):
    """Put a mistake into the sources; returns pass, dtype and algorithm."""
    source, op, dtype = group
    there, instead = MISTAKES[group][name]
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


@pytest.mark.parametrize(("group", "name"), [
    pytest.param(group, name, id=f"{'-'.join(group)}-{name}") for group, rows in MISTAKES.items() for name in rows])
def test_a_mistake_is_seen(group, name, monkeypatch):
    assert seen_in(*plant(group, name, monkeypatch))


@pytest.mark.parametrize(("op", "dtype", "algorithm"), [
    ("conv", "float32", "mma"), ("conv", "float16", "mma"), ("conv_weight_grad", "float32", "mma"),
    ("conv_weight_grad", "float16", "mma"), ("conv", "float16", "wgmma")])
def test_without_one_nothing_is_seen(op, dtype, algorithm):
    assert not seen_in(op, dtype, algorithm)
