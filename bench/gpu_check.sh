#!/usr/bin/env bash
# Everything that only a GPU can tell, in one go: bench/gpu_check.sh OUT [PART...]
#
# From a bare checkout, with CuPy, PyTorch, Cython and a C compiler there and no network. Parts, each under ten minutes:
# primitives, tests, sanitizer, times, times_mma (on tensor cores); all of them if none is named. Writes JSON and text to the
# folder OUT; the JSON is to be committed under bench/results/. SECONDS_OF_TIMES is how long each part of times may take.
# DRY_RUN=1 runs what needs no GPU, on the emulator of the tests.
set -uo pipefail

out=${1:?usage: bench/gpu_check.sh OUT [PART...]}
shift
parts=${*:-primitives tests sanitizer times times_mma}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root" || exit 1
dry=${DRY_RUN:+--dry-run}
export PYTHONPATH=$root:$root/tests
failed=""
part() { # part NAME COMMAND...
    printf '\n=== %s (after %d s)\n' "$1" "$SECONDS"
    "${@:2}" 2>&1 | tee "$out/$1.txt" || failed="$failed $1"
}
pytest_gpu() { # side by side where pytest-xdist is there, under which a warning of pytest-benchmark is an error
    local side_by_side=()
    python -c "import xdist" 2> /dev/null && side_by_side=(-p no:benchmark -n 12)
    python -m pytest -q -p no:cacheprovider "${side_by_side[@]}" -m gpu tests/test_gpu.py "$@"
}
timed() { # timed FILE PRECISION...
    python bench/gpu_check.py times --out "$1" --precisions "${@:2}" --seconds "${SECONDS_OF_TIMES:-540}" $dry
}
sanitized() {
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
            python -m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py -k small || return 1
    done
}

python -c "import fastconv" 2> /dev/null || python setup.py --quiet build_ext --inplace || exit 1
for name in $parts; do
    case $name in
        primitives) part primitives python bench/gpu_check.py primitives --out "$out/gpu_primitives.json" $dry ;;
        tests) part tests pytest_gpu ;;
        sanitizer) if [ -n "$dry" ]; then echo "sanitizer: not in a dry run"; else part sanitizer sanitized; fi ;;
        times) part times timed "$out/gpu_times.json" float32 ;;
        times_mma) part times_mma timed "$out/gpu_times_mma.json" float16 tf32 bfloat16 float16_mma ;;
        *) echo "gpu_check: no part is called '$name'" >&2; exit 2 ;;
    esac
done
printf '\n=== done after %d s; failed:%s\n' "$SECONDS" "${failed:- none}"
[ -z "$failed" ]
