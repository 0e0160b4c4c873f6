"""Settings of the process: exactness, threads, forced algorithm, instruction set.

    fastconv.config(exact=True)                 # from now on
    with fastconv.config(threads=1): ...        # restored afterwards

Settings belong to the process, not to the thread that sets them.
"""

from __future__ import annotations

import operator
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

ALGORITHMS = ("auto", "winograd", "channelwise", "direct", "im2col", "reference")
ISAS = ("generic", "avx2", "avx512", "neon")


@dataclass(frozen=True, slots=True)
class Settings:
    """One consistent set of settings; `settings()` returns the current one.

    Attributes
    ----------
    exact
        Forbid algorithms whose rounding error exceeds that of the plain sum (Winograd).
    batch_invariant
        Keep the batch size out of every choice, so that a sample gives the same bits alone and in any batch.
    threads
        The most threads that one call uses.
    algorithm
        ``"auto"``, or the row of the algorithm table that every convolution must take.
    isa
        The kernel table: one of `fastconv.backends._cpu.available_isas()`.
    tune
        Choose algorithms by trying them instead of by prediction; see `fastconv.tune`.
    """

    exact: bool = False
    batch_invariant: bool = False
    threads: int = 1
    algorithm: str = "auto"
    isa: str = "generic"
    tune: bool = False


class _Restore:
    """What `config` returns: leaving it as a context puts the previous settings back."""

    __slots__ = ("_previous", "_reason")

    def __init__(self, previous: Settings, reason: str) -> None:
        self._previous = previous
        self._reason = reason

    def __enter__(self) -> Settings:
        return settings()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        _apply(self._previous, self._reason)


_current: Settings | None = None
_token = -1
_tokens: dict[Settings, int] = {}
_reason = ""
_forked = False
_FORKED = "1: this process was forked, and OpenMP's threads do not survive a fork"


def settings() -> Settings:
    """Return the current settings of the process."""
    return _current if _current is not None else _start()


def token() -> int:
    """Return a number that stands for the current settings: equal settings have the same, cheaper to look up."""
    if _token < 0:
        settings()
    return _token


def config(*, exact: bool | None = None, batch_invariant: bool | None = None, threads: int | None = None,
           algorithm: str | None = None, isa: str | None = None, tune: bool | None = None) -> _Restore:
    """Change settings of the whole process, at once; as a context, restore the previous ones on exit.

    Parameters
    ----------
    exact, batch_invariant, threads, algorithm, isa, tune
        See `Settings`; None leaves a setting as it is.

    Returns
    -------
    context manager
        Yields the new `Settings`. Ignore it to keep the change.

    Raises
    ------
    TypeError, ValueError
        For a value of the wrong type, fewer than one thread, or an unknown or unavailable name.

    Warns
    -----
    RuntimeWarning
        If more than one thread is asked for in a forked process, which stays at one (see `thread_reason`).
    """
    previous, reason = settings(), _reason
    changes: dict[str, Any] = {}
    for name, value in (("exact", exact), ("batch_invariant", batch_invariant), ("tune", tune)):
        if value is not None:
            if not isinstance(value, bool):
                raise TypeError(f"config: {name} is {value!r}, but True or False is needed. Hint: bool({value!r})")
            changes[name] = value
    if algorithm is not None:
        changes["algorithm"] = _choice("algorithm", algorithm, ALGORITHMS)
    if isa is not None:
        changes["isa"] = _choice("isa", isa, available_isas())
    if threads is not None:
        changes["threads"] = _thread_count(threads)
    _apply(replace(previous, **changes), reason if threads is None else f"{threads}: set by config(threads={threads})")
    return _Restore(previous, reason)


def set_num_threads(n: int) -> None:
    """Let each call use at most `n` >= 1 threads, in the whole process."""
    config(threads=n)


def get_num_threads() -> int:
    """Return how many threads each call uses at most."""
    return settings().threads


def thread_reason() -> str:
    """Return the number of threads and where it comes from, as `fastconv info` prints it."""
    settings()
    return _reason


def available_isas() -> tuple[str, ...]:
    """Names of the kernel tables that this build holds and this CPU can run."""
    from fastconv.backends import _cpu

    return tuple(_cpu.available_isas())


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        known = f" ({value} is not available on this CPU or in this build)" if value in ISAS else ""
        raise ValueError(f"config: {name} is {value!r}, but one of {', '.join(map(repr, allowed))} is "
                         f"needed{known}. Hint: fastconv.show_config() lists what is there")
    return str(value)


def _thread_count(value: object) -> int:
    wrong = (f"config: threads is {value!r}, but an integer of at least 1 is needed. "
             "Hint: fastconv.get_num_threads() tells the current number")
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(wrong)
    threads = operator.index(value)
    if threads < 1:
        raise ValueError(wrong)
    if _forked and threads > 1:
        warnings.warn(f"config: threads is {threads}, but 1 is used: this process was forked, and OpenMP's threads "
                      "do not survive a fork. Hint: start workers with the 'spawn' or "
                      "'forkserver' method", RuntimeWarning, stacklevel=3)
        return 1
    return threads


def _apply(new: Settings, reason: str) -> None:
    global _current, _reason, _token
    _current, _reason = (replace(new, threads=1), _FORKED) if _forked else (new, reason)
    _token = _tokens.setdefault(_current, len(_tokens))


def _start() -> Settings:
    """Build the first settings from the machine and the environment."""
    from fastconv.backends import _cpu

    threads, reason = default_threads()
    tune = os.environ.get("FASTCONV_TUNE") or "0"
    if tune not in ("0", "1"):
        raise ValueError(f"FASTCONV_TUNE is {tune!r}, but 0 or 1 is needed. Hint: 1 stands for config(tune=True)")
    _apply(Settings(threads=threads, isa=_cpu.default_isa(), tune=tune == "1"), reason)
    return settings()


def default_threads() -> tuple[int, str]:
    """Return the number of threads that this machine grants, and why.

    The smallest of: the CPUs in the affinity mask, the CPU quota of the control group (rounded up), and
    ``FASTCONV_NUM_THREADS`` or, without it, ``OMP_NUM_THREADS``.
    """
    limits = [(_cpus(), "CPUs in the affinity mask")]
    quota = cgroup_quota()
    if quota is not None:
        limits.append((max(1, -int(-quota // 1)), f"a cgroup quota of {quota:g} CPUs"))
    limits.extend(_environment_limit())
    threads = min(n for n, _ in limits)
    return threads, f"{threads}: the least of " + ", ".join(
        why if why.startswith("a ") else f"{n} {why}" for n, why in limits)


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _environment_limit() -> list[tuple[int, str]]:
    ours, openmp = os.environ.get("FASTCONV_NUM_THREADS"), os.environ.get("OMP_NUM_THREADS")
    if ours:
        if not ours.strip().isdecimal() or int(ours) < 1:
            raise ValueError(f"FASTCONV_NUM_THREADS is {ours!r}, but an integer of at least 1 is needed. "
                             "Hint: unset it to use every CPU that the process may run on")
        return [(int(ours), "by FASTCONV_NUM_THREADS")]
    # OpenMP allows one number per nesting level, "4,2"; the first is ours. It ignores what it cannot read.
    first = (openmp or "").split(",")[0].strip()
    return [(int(first), "by OMP_NUM_THREADS")] if first.isdecimal() and int(first) >= 1 else []


def cgroup_quota(membership: str = "/proc/self/cgroup", mount: str = "/sys/fs/cgroup") -> float | None:
    """Return the CPU quota of this process's control group, in CPUs, or None where there is none.

    Reads version 2 (``cpu.max``) and version 1 (``cpu.cfs_quota_us``) and walks up to the root, because a group
    is bound by all its ancestors.
    """
    try:
        lines = Path(membership).read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            roots = [Path(mount), Path(mount, "unified")]
        elif "cpu" in controllers.split(","):
            roots = [Path(mount, controllers), Path(mount, "cpu")]
        else:
            continue
        for root in roots:
            group = root / path.lstrip("/")
            quotas += [q for folder in (group, *group.parents) if folder.is_relative_to(root)
                       and (q := _folder_quota(folder)) is not None]
    return min(quotas, default=None)


def _folder_quota(folder: Path) -> float | None:
    """Quota that one folder of the cgroup tree sets: "200000 100000" is 2 CPUs, "max" or -1 is none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return int(quota) / int(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError):
        return None


def _after_fork() -> None:
    """A forked child has none of the threads of GNU OpenMP's pool, and would wait for them for ever."""
    global _forked
    _forked = True
    if _current is not None:
        _apply(_current, _reason)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
