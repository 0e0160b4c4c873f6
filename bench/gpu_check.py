"""Parts of gpu_check.sh: primitives against their emulation, and times against PyTorch with cuDNN."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from shapes import CONVS, Row, load

from fastconv import functional
from fastconv.arrays import to_host
from fastconv.backends.cuda import device as backend
from fastconv.backends.cuda.device import Kernel

ROOT = Path(__file__).resolve().parent.parent

# ---- primitives ------------------------------------------------------------------------------------------------------

# Each kernel is one warp: a and b are 256 words each, which lanes read as the primitive needs them.
PRIMITIVES = """
#include "prim.cuh"
extern "C" __global__ void primitives(const unsigned *a, const unsigned *b, float *d, unsigned *bits) {
  FC_SMEM(memory);
  unsigned *s = reinterpret_cast<unsigned *>(memory);
  const int lane = threadIdx.x;
  unsigned x[4], y[2], r[4];
  for (int i = 0; i < 4; i++) x[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; i++) y[i] = b[lane * 2 + i];
  float sums[3][4] = {};
  unsigned tf[4], tg[2];
  for (int i = 0; i < 4; i++) tf[i] = fc::float_to_tf32(__uint_as_float(x[i] & 0x7fffffffu & ~0x40000000u));
  for (int i = 0; i < 2; i++) tg[i] = fc::float_to_tf32(__uint_as_float(y[i] & 0x7fffffffu & ~0x40000000u));
  fc::mma_tf32(sums[0], tf, tg);
  fc::mma_half(sums[1], x, y);
  fc::mma_bfloat16(sums[2], x, y);
  for (int k = 0; k < 3; k++)
    for (int i = 0; i < 4; i++) d[(k * 32 + lane) * 4 + i] = sums[k][i];
  fc::cp_async16(&s[lane * 4], &a[(31 - lane) * 4], lane % 5 != 0);
  fc::cp_commit();
  fc::cp_wait<0>();
  __syncthreads();
  fc::ldmatrix_x4(r, &s[lane * 4]);
  for (int i = 0; i < 4; i++) bits[lane * 4 + i] = r[i];
  fc::ldmatrix_x4_trans(r, &s[lane * 4]);
  for (int i = 0; i < 4; i++) bits[128 + lane * 4 + i] = r[i];
  bits[256 + lane] = __match_any_sync(~0u, (int64)(a[lane] % 7));
  bits[288 + lane] = __ballot_sync(~0u, a[lane] % 3 == 0);
  bits[320 + lane] = fc::float_to_half(__uint_as_float(a[lane] & 0x7effffffu)) |
                     fc::float_to_bfloat16(__uint_as_float(a[lane] & 0x7effffffu)) << 16;
}
FC_EXPORT(primitives)
"""


def run_primitives() -> dict[str, Any]:
    """What every primitive makes of fixed operands: sums as numbers, the rest as bits."""
    rng = np.random.default_rng(0)
    # Halves of moderate size, so that no product is infinite in any of the formats.
    a, b = (rng.standard_normal(512).astype(np.float16).view(np.uint32) for _ in range(2))
    text = PRIMITIVES.replace('#include "prim.cuh"', (backend._SOURCES / "prim.cuh").read_text())
    original, backend.source_text = backend.source_text, lambda name: text
    try:
        provider = backend.provider()
        d, bits = provider.empty((3, 32, 4), np.float32), provider.empty((352,), np.uint32)
        provider.launcher(Kernel("primitives.cu", "primitives", (("FC_DTYPE", 0),)), (1,), (32,), (), 512)(
            provider.upload(a), provider.upload(b), d, bits)
    finally:
        backend.source_text = original
    return {"sums": to_host(d).ravel().tolist(), "bits": to_host(bits).tolist()}


def primitives(dry: bool) -> dict[str, Any]:
    """Run them on the GPU and by the emulator; they must agree, sums up to rounding."""
    from cuda_emulator import emulated

    with emulated():
        emulation = run_primitives()
    golden = emulation if dry else run_primitives()
    np.testing.assert_array_equal(golden["bits"], emulation["bits"])
    np.testing.assert_allclose(golden["sums"], emulation["sums"], rtol=1e-5, atol=1e-5)
    print(f"primitives: {len(golden['bits'])} words and {len(golden['sums'])} sums agree with their emulation")
    return golden


# ---- times -----------------------------------------------------------------------------------------------------------

SETS = 4  # operands that take turns, so that they are not all in the L2 cache
ROUNDS = 7
QUEUED = 1e-3  # seconds of work that a round has at least, if ten turns are enough for that
CALLS = 20  # that the host queues, to say what it takes for one
MOST_BYTES = 8 << 30  # of one set of operands

Call = Callable[[int], Any]  # gets the number of a set of operands


class Clock:
    """What calls take of the GPU, and of the host; in a dry run both are those of the emulator."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry

    def measure(self, calls: dict[str, Call]) -> dict[str, Any]:
        """By name the seconds that a call takes of the GPU, as the median over rounds.

        "graph" says whether all of them were captured in CUDA graphs and replayed, so that the host is not in it;
        "call", where calls take less than a millisecond, what the host takes to queue one.
        """
        if self.dry:
            start = time.perf_counter()
            calls["fastconv"](0)
            seconds = time.perf_counter() - start
            return {"fastconv": seconds, "graph": False, "call": {"fastconv": seconds}}
        turns = captured(calls)
        graph = turns is not None
        if turns is None:
            turns = {name: turn_of(call) for name, call in calls.items()}
        result: dict[str, Any] = {name: gpu_seconds(turn) / SETS for name, turn in turns.items()}
        if max(result.values()) < 1e-3:
            result["call"] = {name: host_seconds(call) for name, call in calls.items()}
        return result | {"graph": graph}


def turn_of(call: Call) -> Callable[[], None]:
    """Calls with each set of operands."""
    def turn() -> None:
        for n in range(SETS):
            call(n)
    return turn


def captured(calls: dict[str, Call]) -> dict[str, Callable[[], None]] | None:
    """By name what replays a call with each set of operands; None if one of them cannot be captured."""
    capture = {"fastconv": captured_by_cupy, "torch": captured_by_torch}
    try:
        return {name: capture[name](turn_of(call)) for name, call in calls.items()}
    except Exception as error:  # whatever the libraries raise: events tell the time, too
        print(f"times: no graph ({type(error).__name__}: {error})")
        return None


def captured_by_cupy(turn: Callable[[], None]) -> Any:
    import cupy

    cupy.cuda.Device().synchronize()
    cupy.get_default_memory_pool().free_all_blocks()  # kept for streams of earlier graphs; PyTorch needs it, too
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        turn()  # compiles, and takes the memory, which the pool has then
        stream.synchronize()
        stream.begin_capture()
        try:
            turn()
        finally:
            graph = stream.end_capture()
    return graph.launch


def captured_by_torch(turn: Callable[[], None]) -> Any:
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what earlier graphs had
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        turn()  # chooses algorithms
        stream.synchronize()
        graph.capture_begin()
        try:
            turn()
        finally:
            graph.capture_end()
    return graph.replay


def gpu_seconds(turn: Callable[[], None]) -> float:
    """The median over rounds of the time of a turn, by events of CuPy on the default stream, which is PyTorch's too."""
    import cupy

    def elapsed(turns: int) -> float:
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        turn()  # so that the GPU is busy while the host queues the next
        begin.record()
        for _ in range(turns):
            turn()
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(begin, end)) / 1e3 / turns

    turns = min(10, 1 + int(QUEUED / max(elapsed(1), 1e-6)))
    return statistics.median(elapsed(turns) for _ in range(ROUNDS))


def host_seconds(call: Call) -> float:
    """What the host takes for a call that it does not wait for, in the fastest of three rounds."""
    import cupy

    rounds = []
    for _ in range(3):
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        for n in range(CALLS):
            call(n % SETS)
        rounds.append((time.perf_counter() - start) / CALLS)
    cupy.cuda.Device().synchronize()
    return min(rounds)


# What is timed: the dtype of arrays, and the algorithm that is asked for. PyTorch's TF32 is allowed for "tf32" only.
PRECISIONS = {"float32": ("float32", "auto"), "tf32": ("float32", "mma"), "float16": ("float16", "auto"),
              "bfloat16": ("bfloat16", "auto"), "float16_mma": ("float16", "mma")}


def operands(row: Row, batch: int, order: str, sets: int, dtype: str, dry: bool) -> list[list[Any]]:
    """x, w and dy of each set on the GPU, in `order`."""
    if dry:
        xp: Any = np
        put = backend.provider().upload
    else:
        import cupy as xp

        def put(a: Any) -> Any:
            return a
    kind = backend.bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
    rng = xp.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> Any:
        if order == "channels_last" and len(shape) > 2:
            return xp.moveaxis(rng.standard_normal((shape[0], *shape[2:], shape[1]), xp.float32).astype(kind), -1, 1)
        return rng.standard_normal(shape, xp.float32).astype(kind)

    shapes = (batch, *row.x_shape[1:]), row.w_shape or (1,), (batch, *row.y_shape[1:])
    return [[put(draw(shape)) for shape in shapes] for _ in range(sets)]


def by_turns(rows: list[Row]) -> list[Row]:
    """The rows, one of each kind after the other, so that all kinds are there when the time is over."""
    place: dict[str, int] = {}
    turns = []
    for row in rows:
        place[row.kind] = place.get(row.kind, -1) + 1
        turns.append(place[row.kind])
    return [row for _, row in sorted(zip(turns, rows, strict=True), key=lambda pair: pair[0])]


def passes(row: Row, sets: list[list[Any]], algorithm: str) -> dict[str, Call]:
    """What fastconv runs of a row, by pass."""
    choice = {"algorithm": algorithm}
    if row.op == "conv":
        return {
            "conv": lambda n: functional.conv(*sets[n][:2], None, *row.arguments, **choice),
            "conv_input_grad": lambda n: functional.conv_input_grad(sets[n][0].shape, *sets[n][1:], *row.arguments,
                                                                    **choice),
            "conv_weight_grad": lambda n: functional.conv_weight_grad(sets[n][0], sets[n][1].shape, sets[n][2],
                                                                      *row.arguments, **choice)}
    if row.op == "conv_transpose":
        return {"conv": lambda n: functional.conv_transpose(*sets[n][:2], None, *row.arguments, **choice)}
    function = getattr(functional, row.op)
    return {row.op: lambda n: function(sets[n][0], *row.arguments)}


def torch_passes(row: Row, sets: list[list[Any]], tf32: bool) -> dict[str, Call]:
    """The same by PyTorch, on the same memory."""
    import torch

    tensors = [[torch.from_dlpack(a) for a in arrays] for arrays in sets]
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    axes = len(row.size)
    if row.op in CONVS:
        forward = getattr(torch.nn.functional, f"{row.op}{axes}d")
        result = {"conv": lambda n: forward(*tensors[n][:2], None, *row.arguments)}
        if row.op == "conv":
            stride, padding, dilation, groups = row.arguments

            def gradient(n: int, which: list[bool]) -> Any:
                x, w, dy = tensors[n]
                return torch.ops.aten.convolution_backward(dy, x, w, None, stride, padding, dilation, False,
                                                           [0] * axes, groups, which)

            result["conv_input_grad"] = lambda n: gradient(n, [True, False, False])
            result["conv_weight_grad"] = lambda n: gradient(n, [False, True, False])
        return result
    if row.op == "global_avg_pool":
        mean = getattr(torch.nn.functional, f"adaptive_avg_pool{axes}d")
        return {row.op: lambda n: mean(tensors[n][0], 1)}
    pool = getattr(torch.nn.functional, f"{row.op}{axes}d")
    return {row.op: lambda n: pool(tensors[n][0], *row.arguments)}


def times(dry: bool, seconds: float, precisions: list[str]) -> list[dict[str, Any]]:
    """Rows of the table in both memory orders at batch 32 and 256; each precision has its share of the time."""
    results = []
    for precision in precisions:
        dtype, algorithm = PRECISIONS[precision]
        if dtype == "bfloat16" and importlib.util.find_spec("ml_dtypes") is None:
            print("times: no bfloat16, for there is no ml_dtypes")
            continue
        results += times_of(dry, seconds / len(precisions), precision, dtype, algorithm)
    return results


def times_of(dry: bool, seconds: float, precision: str, dtype: str, algorithm: str) -> list[dict[str, Any]]:
    """The part of `times` in one precision."""
    clock, results, start = Clock(dry), [], time.monotonic()
    rows = [row for row in load() if algorithm == "auto" or row.op in CONVS]
    if dry:
        rows = [min((r for r in rows if r.op == op), key=lambda r: math.prod(r.x_shape)) for op in dict.fromkeys(
            r.op for r in rows)]
    for batch in (1,) if dry else (32, 256):
        for row in by_turns(rows):
            size = 4 * batch * (math.prod(row.x_shape[1:]) + math.prod(row.y_shape[1:]))
            if size > MOST_BYTES / SETS:
                continue
            for order in ("channels_last", "contiguous"):
                if time.monotonic() - start > seconds:
                    print(f"times: the time of {precision} is over; rows are missing")
                    return results
                sets = operands(row, batch, order, 1 if dry else SETS, dtype, dry)
                ours = passes(row, sets, algorithm)
                theirs = {} if dry else torch_passes(row, sets, precision == "tf32")
                for name, call in ours.items():
                    if precision == "float16_mma" and name == "conv_weight_grad":
                        continue  # as in float16
                    entry = {"row": row.name, "kind": row.kind, "pass": name, "batch": batch, "order": order,
                             "precision": precision, "macs": row.macs // row.batch * batch}
                    entry |= clock.measure({"fastconv": call} | ({"torch": theirs[name]} if name in theirs else {}))
                    if name in theirs:
                        entry["ratio"] = entry["torch"] / entry["fastconv"]
                    results.append(entry)
    return results


def summary(results: list[dict[str, Any]]) -> str:
    """Geometric means of torch's time over ours, by precision, class, pass and order; and what the host takes."""
    columns = {"precision": 15, "kind": 16, "pass": 18, "order": 15}
    groups: dict[tuple[str, ...], list[float]] = {}
    for r in results:
        if "ratio" in r:
            groups.setdefault(tuple(r[column] for column in columns), []).append(r["ratio"])
    lines = ["".join(f"{column:{width}}" for column, width in columns.items()) + " rows  x torch"]
    for key, ratios in sorted(groups.items()):
        lines.append("".join(f"{value:{width}}" for value, width in zip(key, columns.values(), strict=True))
                     + f"{len(ratios):5}  {statistics.geometric_mean(ratios):.2f}")
    calls = [r["call"] for r in results if "call" in r]
    for side in ("fastconv", "torch"):
        seconds = [call[side] for call in calls if side in call]
        if seconds:
            lines.append(f"the host takes {statistics.geometric_mean(seconds) * 1e6:.1f} us for a call of {side} "
                         f"({len(seconds)} rows)")
    without = sum(not r["graph"] for r in results)
    lines.append(f"{without} of {len(results)} times are not of CUDA graphs, so that the host is in them")
    return "\n".join(lines)


def machine(dry: bool) -> dict[str, Any]:
    """Device, date and commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {"date": now, "commit": commit.stdout.strip(),
              "python": sys.version.split()[0], "device": "emulator"}
    if not dry:
        import cupy
        import torch

        properties = cupy.cuda.runtime.getDeviceProperties(0)
        result |= {"device": properties["name"].decode(), "cupy": cupy.__version__, "torch": torch.__version__,
                   "driver": cupy.cuda.runtime.driverGetVersion(), "cudnn": torch.backends.cudnn.version()}
    return result


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("primitives", "times"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="on the emulator, smallest rows only")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    options = parser.parse_args(arguments)
    context: Any = nullcontext()
    if options.dry_run:
        from cuda_emulator import emulated

        context = emulated()
    with context:
        result: Any = (primitives(options.dry_run) if options.part == "primitives"
                       else times(options.dry_run, options.seconds, options.precisions))
    options.out.write_text(json.dumps({"machine": machine(options.dry_run), options.part: result}, indent=1))
    if options.part == "times":
        print(summary(result))


if __name__ == "__main__":
    main(sys.argv[1:])
