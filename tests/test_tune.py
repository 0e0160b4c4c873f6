"""Choice by trial: what is tried, what is chosen, and the file that keeps it."""

import json

import numpy as np
import pytest
from tolerance import assert_close

import fastconv
from fastconv import functional, plan, tune
from fastconv.backends import _cpu
from fastconv.cli import main
from fastconv.config import settings
from fastconv.problem import conv_problem


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No choices from before, a folder of its own, and plans that nobody has made under tuning."""
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "ROUND_SECONDS", 0)
    monkeypatch.setattr(tune, "_choices", {})
    monkeypatch.setattr(plan, "_plans", type(plan._plans)())
    with fastconv.config(threads=1, tune=True):
        yield


@pytest.fixture
def timed(monkeypatch):
    """Trials whose outcome a test dictates: seconds by label; what is not named takes a second."""
    seconds: dict[str, float] = {}
    monkeypatch.setattr(tune, "_runner", lambda tried: plan.label(tried.algorithm, tried.variant))
    monkeypatch.setattr(tune, "_seconds", lambda name: seconds.get(name, 1.0))
    return seconds


def arrays(*shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype) for shape in shapes]


def chosen(x, w, *, op="conv", **options):
    # not by explain, whose plans the process keeps
    current = settings()
    problem = conv_problem(x, w, **options)
    batch = 1 if current.batch_invariant else problem.batch
    request = plan.Request(problem, op, current.isa, False, False, current.exact, batch, current.threads)
    return tune.choose(request)


# more channels than a vector of any instruction set, so that no row is refused on one machine only
X, W = (1, 24, 12, 12), (24, 24, 3, 3)
NAMES = [*(f"winograd f{m}x{m}_3x3" for m in range(2, 7)), "direct", "im2col"]


def test_the_fastest_runs(timed):
    x, w = arrays(X, W)
    for name in NAMES:
        tune._choices.clear()
        tune.cache_file().unlink(missing_ok=True)
        timed.clear()
        timed[name] = 0.5
        choice = chosen(x, w, padding=1)
        assert choice.name == name
        assert dict(choice.measured) == {**dict.fromkeys(NAMES, 1), name: 0.5}


def test_noise_does_not_decide(timed):
    """What is predicted to be the fastest stays, unless another is clearly faster."""
    x, w = arrays(X, W)
    with fastconv.config(tune=False):
        predicted = fastconv.explain(x, w, padding=1)
    predicted = plan.label(predicted.algorithm, predicted.variant)
    other = next(name for name in ("direct", "im2col") if name != predicted)
    timed[other] = 0.99
    choice = chosen(x, w, padding=1)
    assert choice.name == choice.predicted == predicted


def test_what_cannot_run_is_not_tried(timed):
    x, w = arrays(X, W)
    x = fastconv.to_channels_last(x)
    assert [name for name, _ in chosen(x, w, stride=3).measured] == ["direct", "im2col"]
    with fastconv.config(exact=True):
        assert [name for name, _ in chosen(x, w).measured] == ["direct", "im2col"]
    (depthwise,) = arrays((24, 1, 3, 3))
    assert "channelwise" in dict(chosen(x, depthwise, groups=24).measured)


def test_a_choice_stays_in_the_process(timed):
    x, w = arrays(X, W)
    timed["direct"] = 0.5
    first = chosen(x, w)
    timed["direct"] = 2
    tune.cache_file().unlink()
    assert chosen(x, w) is first


def test_a_choice_is_kept_for_the_next_process(timed, monkeypatch):
    x, w = arrays(X, W)
    timed["im2col"] = 0.5
    first = chosen(x, w)
    monkeypatch.setattr(tune, "_choices", {})
    monkeypatch.setattr(tune, "_try", lambda request: pytest.fail("it was measured again"))
    again = chosen(x, w)
    assert (again.name, dict(again.measured)) == (first.name, dict(first.measured))


def test_what_a_choice_depends_on(timed, monkeypatch):
    x, w = arrays(X, W)
    chosen(x, w)

    def is_new(*given, **options):
        before = len(tune._choices)
        chosen(*given, **options)
        return len(tune._choices) == before + 1

    assert not is_new(x.copy(), w.copy())
    assert is_new(x[:, :, 1:], w)
    assert is_new(fastconv.to_channels_last(x), w)
    assert is_new(x.astype(np.float64), w.astype(np.float64))
    assert is_new(x, w, op="conv_input_grad")
    assert is_new(np.repeat(x, 2, axis=0), w)
    others = [{"isa": isa} for isa in _cpu.available_isas() if isa != settings().isa]
    for change in ({"threads": 2}, {"exact": True}, *others):
        with fastconv.config(**change):
            assert is_new(x, w)
    monkeypatch.setattr(fastconv, "__version__", "0.0.0")
    assert is_new(x, w)
    with fastconv.config(batch_invariant=True):
        assert not is_new(x, w)  # as with a batch of 1
        assert not is_new(np.repeat(x, 3, axis=0), w)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 0, "entries": {}}', '{"format": 1, "entries": 3}', "\0"])
def test_a_broken_file_is_ignored(timed, text):
    x, w = arrays(X, W)
    tune.cache_file().parent.mkdir()
    tune.cache_file().write_text(text)
    with pytest.warns(RuntimeWarning, match=r"tune.json is ignored .*Hint: delete the file"):
        choice = chosen(x, w)
    assert len(choice.measured) == len(NAMES)
    assert len(json.loads(tune.cache_file().read_text())["entries"]) == 1


@pytest.mark.parametrize(
    "entry",
    [
        None, [], {"algorithm": "direct"}, {"algorithm": "direct", "variant": "", "seconds": 3},
        {"algorithm": "fft", "variant": "", "seconds": {"fft": 1}},
        {"algorithm": "channelwise", "variant": "", "seconds": {"channelwise": 1}},
        {"algorithm": "direct", "variant": "", "seconds": {"im2col": 1}},
        {"algorithm": "direct", "variant": "", "seconds": {"direct": "fast"}},
    ],
)
def test_an_entry_that_does_not_fit_is_measured_again(timed, monkeypatch, entry):
    x, w = arrays(X, W)
    timed["im2col"] = 0.5
    chosen(x, w)
    data = json.loads(tune.cache_file().read_text())
    data["entries"] = dict.fromkeys(data["entries"], entry)
    tune.cache_file().write_text(json.dumps(data))
    monkeypatch.setattr(tune, "_choices", {})
    assert chosen(x, w).name == "im2col"


def test_the_file_is_bounded_and_replaced_as_a_whole(timed, monkeypatch):
    monkeypatch.setattr(tune, "ENTRIES", 3)
    (w,) = arrays(W)
    for size in range(3, 9):
        (x,) = arrays((1, 24, size, size))
        chosen(x, w)
        entries = json.loads(tune.cache_file().read_text())["entries"]
        assert len(entries) == min(size - 2, 3)
        assert f"[1,{size},{size}]" in list(entries)[-1]
    before = tune.cache_file().read_text()

    def fails(*args, **options):
        args[1].write("half of it")
        raise OSError("disk full")

    monkeypatch.setattr(tune.json, "dump", fails)
    with pytest.warns(RuntimeWarning, match="disk full"):
        chosen(arrays((1, 24, 20, 20))[0], w)
    assert tune.cache_file().read_text() == before
    assert [path.name for path in tune.cache_file().parent.iterdir()] == ["tune.json"]


def test_a_folder_that_cannot_be_written_warns(timed, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="FASTCONV_CACHE_DIR"):
        chosen(*arrays(X, W))


def test_the_folder(monkeypatch, tmp_path):
    assert tune.cache_file() == tmp_path / "cache" / "tune.json"
    monkeypatch.delenv("FASTCONV_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tune.cache_file() == tmp_path / "fastconv" / "tune.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tune.cache_file() == tmp_path / ".cache" / "fastconv" / "tune.json"


@pytest.mark.parametrize("order", ["contiguous", "channels_last", "strided"])
def test_tuned_passes_are_right(order):
    """Whatever wins, on arrays as they come, computes the convolution and both gradients."""
    x, w, b, dy = arrays((2, 8, 9, 10), (6, 8, 3, 3), (6,), (2, 6, 9, 10))
    if order == "channels_last":
        x, dy = fastconv.to_channels_last(x), fastconv.to_channels_last(dy)
    elif order == "strided":
        x, w = np.repeat(x, 2, axis=1)[:, ::2, ::-1], w[:, :, ::-1]
    exact = [a.astype(np.float64) for a in (x, w, b, dy)]
    prepared = fastconv.prepare_conv(w, b, padding=1)
    with fastconv.config(algorithm="reference"):
        y = functional.conv(*exact[:3], padding=1)
        dx = functional.conv_input_grad(x.shape, exact[1], exact[3], padding=1)
        dw = functional.conv_weight_grad(exact[0], w.shape, exact[3], padding=1)
    for found, expected, n in (
        (functional.conv(x, w, b, padding=1), y, 72),
        (prepared(x), y, 72),
        (functional.conv_input_grad(x.shape, w, dy, padding=1), dx, 54),
        (functional.conv_weight_grad(x, w.shape, dy, padding=1), dw, 180),
    ):
        # one of them may be Winograd's, whose bound is wider
        assert_close(found, expected, n, algorithm="winograd")
    assert len(tune.choices()) == 4
    assert all(seconds > 0 for choice in tune.choices() for _, seconds in choice.measured)


def test_explain_says_what_was_measured_and_predicted():
    x, w = arrays(X, W)
    text = str(fastconv.explain(x, w, padding=1))
    for name in NAMES:
        assert f"  predicted {name}: " in text
        assert f"  measured {name}: " in text
    assert "  not channelwise: it needs groups" in text
    with fastconv.config(tune=False):
        found = fastconv.explain(x, w, padding=1)
    assert "measured" not in str(found)
    assert [name for name, _ in found.predicted] == NAMES
    assert not found.variant or f"winograd {found.variant}" == min(found.predicted, key=lambda item: item[1])[0]
    assert "direct" in dict(found.predicted)


def test_the_command(capsys):
    assert main(["tune", "lenet5", "--train", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert sum(line.startswith("conv_weight_grad") for line in lines) == 5
    assert any(line.startswith("sum of") for line in lines)
    assert str(tune.cache_file()) in lines[-1]
    assert max(map(len, lines)) <= 120
    assert main(["tune", "lenet5", "--input", "1,2,2"]) == 2
    assert "fastconv tune: error" in capsys.readouterr().err


def test_settings():
    assert settings().tune
    with pytest.raises(TypeError, match="tune is 1, but True or False"):
        fastconv.config(tune=1)
