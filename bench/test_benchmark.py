"""Every row, pass and peer for pytest-benchmark: ``pytest bench --benchmark-only -k "fwd and vgg"``.

One group per row and pass. Peers run one after the other here; compare.py interleaves them.
"""

import pytest
from peers import PASSES, PEERS, Unsupported, make_case
from shapes import load

import fastconv

# peers warn of their own deprecations
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("row", load(), ids=lambda row: row.name)
@pytest.mark.parametrize("direction", PASSES)
def test_benchmark(benchmark, row, direction, peer):
    benchmark.group = f"{row.kind} {row.name} {direction}"
    try:
        case = make_case(row, direction, fastconv.get_num_threads(), PEERS[peer].order)
        run = PEERS[peer].make(case)
    except (ImportError, Unsupported) as reason:
        pytest.skip(str(reason))
    if row.macs:
        benchmark.extra_info["gflop"] = 2e-9 * row.macs * (3 if direction == "fwdbwd" else 1)
    benchmark(run)
