"""fastconv and its peers, interleaved in one process per row: ``python bench/compare.py --help``."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import report
from peers import PASSES, PEERS, versions
from shapes import POOLS, Row, draw, load, select

HERE = Path(__file__).parent
ROW_SECONDS = 600  # a row that takes longer is given up
QUIET_LOAD = 0.3

# Compiler flags of the peak's loop; names by which the peers' environment variables know the instruction set.
PEAK_FLAGS = {
    "generic": ["-DVECTOR_BYTES=16"],
    "avx2": ["-mavx2", "-mfma", "-DVECTOR_BYTES=32"],
    "avx512": ["-mavx512f", "-DVECTOR_BYTES=64"],
    "neon": ["-DVECTOR_BYTES=16"],
}
CAPS = {
    "generic": {"FASTCONV_CPU": "generic", "ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"FASTCONV_CPU": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows or classes; * and ? as in a shell")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS), metavar="A,B",
                        help=f"of {','.join(PEERS)}")
    parser.add_argument("--threads", type=int, default=2, help="of everybody (default 2)")
    parser.add_argument("--isa", choices=sorted(CAPS), help="cap the instruction set of all who can be capped")
    parser.add_argument("--order", choices=("contiguous", "channels_last", "both"), default="both",
                        help="memory orders that fastconv runs; the better one counts (peers always run theirs)")
    parser.add_argument("--batch", type=int, help="replace the batch of every row")
    parser.add_argument("--pass", dest="direction", choices=PASSES, default="fwd",
                        help="dgrad, wgrad, fwdbwd: gradients, against torch's autograd")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each peer gets (default 7)")
    parser.add_argument("--random", type=int, metavar="N", help="N convolutions drawn at random instead of the table")
    parser.add_argument("--seed", type=int, default=0, help="of --random (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw them (PNG or SVG; needs Matplotlib)")
    parser.add_argument("--load", type=Path, metavar="FILE", help="measure nothing, show the results in FILE")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.peers if name not in PEERS]
    if unknown:
        parser.error(f"--peers: {', '.join(unknown)} is not known; there are {', '.join(PEERS)}")
    for name in ("threads", "rounds", "batch", "random"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name}: {value} is not positive")
    try:
        options.rows = _rows(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _rows(options: argparse.Namespace) -> list[Row]:
    rows = draw(options.random, options.seed) if options.random else load()
    if options.only:
        rows = select(rows, options.only)
    if options.direction == "wgrad":
        rows = [row for row in rows if row.op not in POOLS]
    if not rows:
        raise ValueError("--pass wgrad: pools have no weights")
    return [replace(row, batch=options.batch) for row in rows] if options.batch else rows


def chosen_peers(options: argparse.Namespace, native: str) -> tuple[list[str], dict[str, str]]:
    """Peers that are run, and why others are not."""
    kept, left_out = [], {}
    other_order = {"contiguous": "fastconv_cl", "channels_last": "fastconv"}.get(options.order)
    for name in dict.fromkeys(options.peers):
        if name == other_order:
            continue
        if options.isa and options.isa != native and PEERS[name].cap is None:
            left_out[name] = f"cannot be capped to {options.isa}"
        elif options.direction != "fwd" and not PEERS[name].gradients:
            left_out[name] = "no gradients"
        else:
            kept.append(name)
    return kept, left_out


def environment(threads: int, isa: str | None) -> dict[str, str]:
    """Of the processes that measure."""
    env = {name: value for name, value in os.environ.items() if name not in
           ("OPENBLAS_CORETYPE", "FASTCONV_NUM_THREADS")}  # the first slows NumPy down
    return env | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)} | CAPS.get(isa or "", {})


def native_isa() -> str:
    """The best instruction set of this machine and build."""
    from fastconv.backends import _cpu

    return str(_cpu.default_isa())


def fma_peak(isa: str, threads: int) -> float | None:
    """Measure the peak in GFLOP/s by a loop of multiply-adds on registers; None without a C compiler.

    Every thread runs the loop; the best of 20 times 5 ms counts, as for the rows.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "fma_peak.so")
        command = ["cc", "-O2", "-shared", "-fPIC", *PEAK_FLAGS[isa], str(HERE / "fma_peak.c"), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        loop = ctypes.CDLL(str(library)).fma_peak
    loop.argtypes, loop.restype = [ctypes.c_long, ctypes.POINTER(ctypes.c_float)], ctypes.c_double

    def once(_: int) -> tuple[float, float]:
        sink = ctypes.c_float()
        start = perf_counter()
        work = loop(800_000, ctypes.byref(sink))  # without the GIL
        return work, perf_counter() - start

    with ThreadPoolExecutor(threads) as pool:
        return max(sum(work / seconds for work, seconds in pool.map(once, range(threads))) for _ in range(20)) / 1e9


def measure(row: Row, peers: Sequence[str], options: argparse.Namespace, env: Mapping[str, str]) -> dict[str, Any]:
    """Run measure.py on a row, in a process of its own: fresh memory, and a crash takes one row only."""
    job = {"row": row.to_dict(), "peers": peers, "direction": options.direction, "threads": options.threads,
           "rounds": options.rounds}
    record = {"row": job["row"], "direction": options.direction, "times": {}, "notes": {}, "algorithms": {},
              "extra_bytes": None}
    try:
        child = subprocess.run([sys.executable, str(HERE / "measure.py")], input=json.dumps(job), text=True,
                               capture_output=True, env=env, timeout=ROW_SECONDS)
    except subprocess.TimeoutExpired:
        return record | {"notes": {"all": f"given up after {ROW_SECONDS} s"}}
    if child.returncode:
        why = child.stderr.strip().splitlines()[-1:] or [""]
        return record | {"notes": {"all": f"exit code {child.returncode}: {why[0]}"}}
    return record | json.loads(child.stdout.splitlines()[-1])


def about(options: argparse.Namespace, isa: str, peers: Sequence[str]) -> dict[str, Any]:
    """Machine, versions and options, for the results."""
    shown = ("only", "threads", "isa", "order", "batch", "direction", "rounds", "random", "seed")
    return {
        "machine": f"{cpu_name()}, {os.cpu_count()} CPUs, {platform.system()} {platform.machine()}",
        "isa": isa,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": versions(peers),
        "options": {name: getattr(options, name) for name in shown},
        "load_before": os.getloadavg()[0],
        "peak_gflops": fma_peak(isa, options.threads),
    }


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Of this checkout, "-dirty" if it was changed since; None outside of one."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all rows and print each as it comes."""
    native = native_isa()
    isa = options.isa or native
    peers, left_out = chosen_peers(options, native)
    data = about(options, isa, peers) | {"peers": peers, "rows": []}
    missing = {name: "not installed" for name in peers if data["versions"][PEERS[name].package] is None}
    data["left_out"] = left_out | missing
    data["peers"] = peers = [name for name in peers if name not in missing]
    introduce(data)
    if data["load_before"] > QUIET_LOAD:
        print(f"warning: the load is {data['load_before']:.1f}, something else is running; do not trust the times")
    env = environment(options.threads, options.isa)
    width = max(len(row.name) for row in options.rows)
    print("\n" + report.heading(peers, width))
    for row in options.rows:
        record = measure(row, peers, options, env)
        data["rows"].append(record)
        show_row(record, data, width)
    data["peak_gflops_after"] = fma_peak(isa, options.threads)
    return data


def introduce(data: Mapping[str, Any]) -> None:
    print(f"{data['machine']}, {data['isa']}, {data['options']['threads']} threads, {data['date']}, "
          f"commit {data['commit']}")
    print(", ".join(f"{name} {version or 'missing'}" for name, version in data["versions"].items()))
    for name, reason in data["left_out"].items():
        print(f"without {name}: {reason}")
    peak = data["peak_gflops"]
    print("FMA peak: not measured (no C compiler)" if peak is None else f"FMA peak: {peak:.0f} GFLOP/s")


def show_row(record: Mapping[str, Any], data: Mapping[str, Any], width: int) -> None:
    print(report.text(record, data["peers"], data["peak_gflops"], width), flush=True)
    for name, note in record["notes"].items():
        if name == "all" or note.startswith(("failed", "wrong")):
            print(f"    {name}: {note}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.load:
        data = json.loads(options.load.read_text())
        introduce(data)
        width = max(len(record["row"]["name"]) for record in data["rows"])
        print("\n" + report.heading(data["peers"], width))
        for record in data["rows"]:
            show_row(record, data, width)
    else:
        data = run(options)
    print(f"\n{report.LEGEND}\n\n{report.summary(data['rows'])}")
    if data["peak_gflops"]:
        print(f"\nFMA peak: {data['peak_gflops']:.0f} GFLOP/s before, {data['peak_gflops_after']:.0f} after")
    if data["options"]["random"]:
        print(f"\n{report.distribution(data['rows'])}")
    if options.json and not options.load:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    if options.chart:
        report.chart(data["rows"], options.chart,
                     f"fastconv, {data['options']['direction']}, {data['options']['threads']} threads, {data['isa']}\n"
                     f"{data['machine']}, {data['date'][:10]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
