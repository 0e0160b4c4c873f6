"""Whole training steps of networks in fastconv and PyTorch: ``python bench/compare_training.py --help``.

A step is forward, softmax cross-entropy, backward and SGD with momentum, on one batch, from the same weights. Times are
taken in turns in one process for each network; peak memory, above what the process held with its libraries loaded, in a
process for each network and peer.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import compare
from peers import versions
from training_nets import NETS, STEPS, Net

HERE = Path(__file__).parent
BURST_SECONDS, MOST_STEPS, PAUSE_SECONDS = 0.3, 50, 0.025


def time_steps(net: Net, peers: Sequence[str], threads: int, rounds: int) -> dict[str, Any]:
    """Seconds of the fastest and the median step of each peer, and the loss after three steps."""
    steps = {name: STEPS[name][0](net, STEPS[name][1], threads) for name in peers}
    losses = {name: [step() for _ in range(3)][-1] for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, step in steps.items():
            time.sleep(PAUSE_SECONDS)
            step()
            end = time.perf_counter() + BURST_SECONDS
            for _ in range(MOST_STEPS):
                start = time.perf_counter()
                step()
                now = time.perf_counter()
                times[name].append(now - start)
                if now > end:
                    break
    return {"times": {name: (min(t), median(t)) for name, t in times.items()}, "losses": losses}


def peak_memory(net: Net, peer: str, threads: int) -> int:
    """Bytes that a network and three steps of it take at most, above the imports."""
    if peer.startswith("torch"):
        import torch

        torch.set_num_threads(threads)
        torch.nn.functional.conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3))
    for module in ("nn", "models", "training"):  # torch's networks are made from its layers
        importlib.import_module(f"fastconv.{module}")

    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    step = STEPS[peer][0](net, STEPS[peer][1], threads)
    for _ in range(3):
        step()
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def child(job: Mapping[str, Any], env: Mapping[str, str]) -> Any:
    """What a process of its own says about a job."""
    done = subprocess.run([sys.executable, str(HERE / "compare_training.py"), "--job", json.dumps(job)], text=True,
                          capture_output=True, env=dict(env))
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def run_job(job: Mapping[str, Any]) -> Any:
    net = next(net for net in NETS if net.name == job["net"])
    if job["what"] == "memory":
        return peak_memory(net, job["peers"][0], job["threads"])
    return time_steps(net, job["peers"], job["threads"], job["rounds"])


def ratio(record: Mapping[str, Any], key: str = "times") -> float:
    """The better of torch's orders over the better of fastconv's: of the smallest times, or of the memory."""
    def best(prefix: str) -> float:
        values = [v[0] if key == "times" else v for name, v in record[key].items() if name.split("_")[0] == prefix]
        return min(values, default=math.nan)
    return best("torch") / best("fastconv")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[net.name for net in NETS])
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(STEPS), metavar="A,B",
                        help=f"of {','.join(STEPS)}")
    parser.add_argument("--threads", type=int, default=2, help="of everybody (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each peer gets (default 5)")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--no-times", action="store_true", help="measure peak memory only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.job:
        print(json.dumps(run_job(json.loads(options.job))))
        return 0

    env = compare.environment(options.threads, None)
    isa = compare.native_isa()
    data: dict[str, Any] = {
        "machine": compare.cpu_name(), "isa": isa, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": compare.commit(), "versions": versions(["fastconv", "torch"]), "threads": options.threads,
        "rounds": options.rounds, "rows": []}
    print(f"{data['machine']}, {isa}, {options.threads} threads, {data['date']}, commit {data['commit']}")
    print(f"{'network':12} " + " ".join(f"{name + ' ms':>14} {'MB':>5}" for name in options.peers)
          + f" {'x torch':>8} {'x MB':>6}")
    for net in [net for net in NETS if not options.only or net.name in options.only]:
        job = {"net": net.name, "peers": options.peers, "threads": options.threads, "rounds": options.rounds}
        record: dict[str, Any] = {"name": net.name, "shape": net.shape, "times": {}, "memory": {}}
        if not options.no_times:
            record |= child(job | {"what": "times"}, env)
        if not options.no_memory:
            record["memory"] = {name: child(job | {"what": "memory", "peers": [name]}, env) for name in options.peers}
        data["rows"].append(record)
        cells = []
        for name in options.peers:
            seconds, size = record["times"].get(name, [math.nan])[0], record["memory"].get(name, math.nan)
            cells.append(f"{seconds * 1e3:14.2f} {size / 2**20:5.0f}")
        print(f"{net.name:12} " + " ".join(cells) + f" {ratio(record):8.2f} {ratio(record, 'memory'):6.2f}", flush=True)
    ratios = [ratio(record) for record in data["rows"]]
    print(f"geometric mean {math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}x, worst {min(ratios):.2f}x "
          "(better order against better order)")
    if options.json:
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
