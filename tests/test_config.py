"""Settings: as function and as context, threads from the machine, forked processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastconv
from fastconv.config import (
    Settings,
    available_isas,
    cgroup_quota,
    config,
    default_threads,
    get_num_threads,
    set_num_threads,
    settings,
    thread_reason,
)

module = sys.modules["fastconv.config"]  # `fastconv.config` names the function


@pytest.fixture(autouse=True)
def restored():
    with config():
        yield


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter, with the fastconv that is tested here."""
    ours = ("OMP_NUM_THREADS", "FASTCONV_NUM_THREADS", "FASTCONV_CPU")
    clean = {k: v for k, v in os.environ.items() if k not in ours}
    place = {"PYTHONPATH": str(Path(fastconv.__file__).parents[1])}
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60,
                          env=clean | place | environment, check=False)


# ---- config -----------------------------------------------------------------------------------------------------


def test_a_context_restores() -> None:
    before = settings()
    with config(exact=True, threads=3, algorithm="direct") as now:
        assert now is settings()
        assert (now.exact, now.threads, now.algorithm) == (True, 3, "direct")
        assert now.batch_invariant == before.batch_invariant
        with config(exact=False, batch_invariant=True):
            assert settings() == Settings(False, True, 3, "direct", before.isa)
        assert settings() is now
        assert "set by config(threads=3)" in thread_reason()
    assert settings() is before
    with pytest.raises(ZeroDivisionError), config(threads=5):
        _ = 1 / 0
    assert settings() is before


def test_a_call_stays() -> None:
    reason = thread_reason()
    assert reason.startswith(f"{get_num_threads()}: ")
    config(batch_invariant=True)
    assert settings().batch_invariant
    assert thread_reason() == reason
    set_num_threads(7)
    assert get_num_threads() == settings().threads == 7
    assert thread_reason() == "7: set by config(threads=7)"


def test_every_isa_of_this_machine_can_be_chosen() -> None:
    assert "generic" in available_isas()
    for isa in available_isas():
        with config(isa=isa):
            assert settings().isa == isa


@pytest.mark.parametrize(
    ("change", "error", "pattern"),
    [
        ({"exact": 1}, TypeError, "exact is 1, but True or False"),
        ({"batch_invariant": "no"}, TypeError, "batch_invariant is 'no'"),
        ({"threads": 0}, ValueError, "threads is 0.*at least 1"),
        ({"threads": -2}, ValueError, "threads is -2"),
        ({"threads": 2.0}, TypeError, r"threads is 2\.0.*integer"),
        ({"threads": True}, TypeError, "threads is True"),
        ({"algorithm": "winograde"}, ValueError, "algorithm is 'winograde'.*'auto'.*'direct'"),
        ({"algorithm": 3}, ValueError, "algorithm is 3"),
        ({"isa": "sse9"}, ValueError, "isa is 'sse9'.*'generic'.*"),
        ({"isa": "neon" if "avx2" in available_isas() else "avx2"}, ValueError,
         "isa is .* not available on this CPU"),
    ],
)
def test_bad_settings_change_nothing(change: dict[str, object], error: type[Exception], pattern: str) -> None:
    before = settings()
    with pytest.raises(error, match=f"config: {pattern}.*Hint"):
        config(**{"exact": not before.exact, "algorithm": "direct"} | change)
    assert settings() is before


def test_settings_belong_to_the_process() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with config(threads=9), ThreadPoolExecutor(1) as pool:
        assert pool.submit(get_num_threads).result() == 9


def test_the_table_of_algorithms_is_that_of_the_planner() -> None:
    from fastconv import plan

    assert set(module.ALGORITHMS) == {"auto", *(row.name for row in plan.ROWS)}


# ---- Threads ----------------------------------------------------------------------------------------------------


def test_threads_follow_affinity_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "FASTCONV_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "cgroup_quota", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert default_threads() == (8, "8: the least of 8 CPUs in the affinity mask")
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert default_threads()[0] == 4
    monkeypatch.setenv("FASTCONV_NUM_THREADS", "6")
    assert default_threads()[0] == 6
    assert "6 by FASTCONV_NUM_THREADS" in default_threads()[1]
    monkeypatch.setenv("FASTCONV_NUM_THREADS", "100")
    assert default_threads()[0] == 8
    monkeypatch.setattr(module, "cgroup_quota", lambda: 2.5)
    assert default_threads()[0] == 3
    assert "a cgroup quota of 2.5 CPUs" in default_threads()[1]
    monkeypatch.setattr(module, "cgroup_quota", lambda: 0.1)
    assert default_threads()[0] == 1
    monkeypatch.delenv("FASTCONV_NUM_THREADS")
    monkeypatch.setattr(module, "cgroup_quota", lambda: None)
    for unreadable in ("", "many", "0", "-3", ",2"):
        monkeypatch.setenv("OMP_NUM_THREADS", unreadable)
        assert default_threads()[0] == 8


@pytest.mark.parametrize("value", ["0", "two", "-1", "1.5"])
def test_our_variable_must_be_readable(value: str) -> None:
    run = python("from fastconv.config import settings; settings()", FASTCONV_NUM_THREADS=value)
    assert f"ValueError: FASTCONV_NUM_THREADS is {value!r}, but an integer of at least 1 is needed" in run.stderr


def test_an_unknown_isa_in_the_environment_is_an_error() -> None:
    run = python("from fastconv.config import settings; settings()", FASTCONV_CPU="pentium")
    assert "ValueError: FASTCONV_CPU is 'pentium'" in run.stderr
    assert "generic" in run.stderr


def test_the_environment_caps_the_isa() -> None:
    run = python("from fastconv.config import *; print(settings().isa, *available_isas())", FASTCONV_CPU="generic")
    assert run.stdout.split() == ["generic", "generic"]


def cgroup(tmp_path, membership: str, files: dict[str, str]) -> float | None:
    (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return cgroup_quota(str(tmp_path / "membership"), str(tmp_path / "mount"))


V1 = "12:memory:/pod\n5:cpu,cpuacct:/pod/box\n1:name=systemd:/\n"


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/pod/box\n", {"pod/box/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000\n"}, None),
        # An ancestor binds, also one above a group without a limit or without a file.
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000\n", "pod/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/pod/box\n", {"pod/box/cpu.max": "400000 100000\n", "cpu.max": "100000 100000\n"}, 1.0),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/gone/in/here\n", {"cpu.max": "300000 100000\n"}, 3.0),
        (V1, {"cpu,cpuacct/pod/box/cpu.cfs_quota_us": "250000\n",
              "cpu,cpuacct/pod/box/cpu.cfs_period_us": "100000\n"}, 2.5),
        (V1, {"cpu/pod/cpu.cfs_quota_us": "50000\n", "cpu/pod/cpu.cfs_period_us": "25000\n",
              "cpu/pod/box/cpu.cfs_quota_us": "-1\n", "cpu/pod/box/cpu.cfs_period_us": "100000\n"}, 2.0),
        (V1, {"memory/pod/cpu.max": "100000 100000"}, None),
        ("0::/\n", {"cpu.max": "garbage\n"}, None),
        ("", {}, None),
    ],
)
def test_cgroup_quota(tmp_path, membership: str, files: dict[str, str], quota: float | None) -> None:
    assert cgroup(tmp_path, membership, files) == quota


def test_no_cgroup_file(tmp_path) -> None:
    assert cgroup_quota(str(tmp_path / "missing"), str(tmp_path)) is None


# ---- Fork -------------------------------------------------------------------------------------------------------

FORK = """
import os, warnings
from fastconv.config import *
{before}
with config(threads=4):
    child = os.fork()
    if child == 0:
        print(get_num_threads(), thread_reason())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            set_num_threads(3)
        print(get_num_threads(), *(w.category.__name__ for w in caught))
        set_num_threads(1)
        config(exact=True)
if child == 0:
    print(get_num_threads(), settings().exact, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(get_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("before", ["", "settings()"])
def test_a_forked_child_has_one_thread(before: str) -> None:
    # Python 3.12 and later warn of a fork while other threads run, such as those of NumPy's BLAS.
    run = python(FORK.format(before=before), FASTCONV_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert lines[0].startswith("1 1: this process was forked")
    assert lines[1:] == ["1 RuntimeWarning", "1 False", "1"]
