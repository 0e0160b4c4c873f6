"""Training with several heads, with images and a table, and with both; and the gradient that nobody reads."""

from __future__ import annotations

import numpy as np
import pytest
from tolerance import assert_close
from training_cases import assert_same_bits, small_net, striped, write_npz

from fastconv import cli, models, nn
from fastconv.models.covariates import Standardise
from fastconv.models.googlenet import WithHeads
from fastconv.nn import conv as conv_layers
from fastconv.training import data, loop, optim, run


def two_inputs_three_outputs(seed: int = 0) -> WithHeads:
    """A network of every kind at once: (images (N, 1, 6, 6), table (N, 2)) to logits and two heads, float64."""
    kind = {"dtype": np.float64, "rng": np.random.default_rng(seed)}
    image = nn.Sequential(conv=nn.Conv2d(1, 3, 3, **kind), relu=nn.ReLU(), flat=nn.Flatten())
    trunk = {
        "join": nn.Concat(image=image, covariates=Standardise(2, np.float64)),
        "hidden": nn.Linear(48 + 4, 5, **kind), "relu": nn.ReLU(), "fc": nn.Linear(5, 3, **kind),
    }  # fmt: skip
    heads = {"aux1": ("join", nn.Linear(52, 3, **kind)), "aux2": ("relu", nn.Linear(5, 3, **kind))}
    return WithHeads(trunk, heads)


@pytest.mark.parametrize("weights", [0.3, (0.5, 0.1)])
def test_step_agrees_with_pytorch(weights):
    """Loss and every parameter after a step of SGD: loss + w1 * loss of head 1 + w2 * loss of head 2."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    rng = np.random.default_rng(1)
    x, table = rng.standard_normal((7, 1, 6, 6)), rng.standard_normal((7, 2))
    table[2, 1] = np.nan
    target = np.array([0, 1, 2, 0, 1, 2, 2])
    net = two_inputs_three_outputs()

    p = {name: torch.tensor(value, requires_grad=True) for name, value in net.state_dict().items()}
    t, missing = torch.tensor(np.nan_to_num(table)), torch.tensor(np.isnan(table)).double()
    image = functional.conv2d(torch.tensor(x), p["join.image.conv.weight"], p["join.image.conv.bias"]).relu()
    joined = torch.cat([image.flatten(1), t, missing], 1)  # mean 0 and deviation 1 until it is fitted
    hidden = functional.linear(joined, p["hidden.weight"], p["hidden.bias"]).relu()
    outputs = [functional.linear(hidden, p["fc.weight"], p["fc.bias"]),
               functional.linear(joined, p["aux1.weight"], p["aux1.bias"]),
               functional.linear(hidden, p["aux2.weight"], p["aux2.bias"])]
    scales = (1, 0.3, 0.3) if weights == 0.3 else (1, *weights)
    expected = sum(scale * functional.cross_entropy(y, torch.tensor(target))
                   for scale, y in zip(scales, outputs, strict=True))
    expected.backward()

    optimizer = optim.SGD(net.parameters(), lr=1.0)
    value, logits = loop.train_step(net, optimizer, (x, table), target, head_weights=weights)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    assert_close(logits, outputs[0].detach().numpy(), 52)
    for name, parameter in net.named_parameters():
        assert_close(parameter.value, (p[name] - p[name].grad).detach().numpy(), 7 * 52, magnitude=1)


def test_a_weight_for_each_head():
    net = two_inputs_three_outputs()
    batch = (np.zeros((2, 1, 6, 6)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"head_weights is \(0.3,\), 1 numbers, but the model has 2 outputs"):
        loop.train_step(net, optim.SGD(net.parameters()), batch, np.array([0, 1]), head_weights=(0.3,))


def striped_with_table(count: int, seed: int) -> data.Split:
    """Class 1 if the stripes go down and the first column is positive, or neither: the image alone says nothing.

    A tenth of the second column, which is noise, is missing.
    """
    stripes = striped(count, seed=seed)
    rng = np.random.default_rng(seed + 100)
    table = rng.standard_normal((count, 2)).astype(np.float32) * [3, 50] + [0, 100]
    answer = (stripes.labels == (table[:, 0] > 0)).astype(np.int64)
    table[rng.random(count) < 0.1, 1] = np.nan
    return data.Split(stripes.images, answer, table.astype(np.float32))


@pytest.fixture
def table_npz(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "stripes", models.Model(lambda **options: small_net(), 1, 12, ndims=(2,)))
    train, test = striped_with_table(400, seed=0), striped_with_table(100, seed=1)
    return write_npz(
        tmp_path / "table.npz",
        x_train=train.images[:, 0], y_train=train.labels, train_table=train.table,
        x_test=test.images[:, 0], y_test=test.labels, test_table=test.table,
    )  # fmt: skip


def test_table_from_the_command_line(tmp_path, table_npz, capsys):
    """What only image and table together tell is learnt with the table, and not without."""
    accuracy = {}
    for name, words in (("with", []), ("without", ["--no-table"])):
        arguments = ["train", "--model", "stripes", "--data", str(table_npz), "--epochs", "15", "--batch-size", "20",
                     "--lr", "0.01", "--out", str(tmp_path / name), *words]
        assert cli.main(arguments) == 0
        text = capsys.readouterr().out
        assert ("a table of 2 columns" in text) == (name == "with")
        accuracy[name] = float(text.split("  acc ")[-1].split("%")[0])
    assert accuracy["with"] > 90
    assert accuracy["without"] < 65


def test_run_fits_the_table_and_keeps_it(tmp_path, table_npz):
    training = run.Run(run.Recipe("stripes", str(table_npz), epochs=1))
    state, table = training.model.state_dict(), training.dataset.train.table
    np.testing.assert_allclose(state["join.covariates.mean"], np.nanmean(table, 0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(state["join.covariates.std"], np.nanstd(table, 0, dtype=np.float64), rtol=1e-6)
    training.save(tmp_path / "a.npz")
    assert run.Run.resume(tmp_path / "a.npz", {}).recipe.table
    with pytest.raises(ValueError, match="made with table True, but False is given"):
        run.Run.resume(tmp_path / "a.npz", {"table": False})


def test_googlenet_with_auxiliary_classifiers(tmp_path):
    """Both classifiers move, the losses fall, and inference gives logits alone."""
    train, test = striped(48, size=40), striped(16, size=40, seed=1)
    path = write_npz(tmp_path / "s.npz", x_train=train.images[:, 0], y_train=train.labels,
                     x_test=test.images[:, 0], y_test=test.labels)
    options = {"auxiliary": True, "variant": "torchvision", "width": 0.1}
    training = run.Run(run.Recipe("googlenet", str(path), options, epochs=3, batch_size=16, val_fraction=0.2))
    before = training.model.state_dict()
    training.train(tmp_path / "a.npz")
    after = training.model.state_dict()
    for name in ("aux1.conv.conv.weight", "aux2.fc2.weight", "fc.weight"):
        assert (before[name] != after[name]).any(), name
    losses = [record.train_loss for record in training.history]
    assert losses[-1] < losses[0]
    assert losses[0] > 1.2 * np.log(2)  # of three heads, 1 + 0.3 + 0.3 times about log 2
    assert training.test().probabilities.shape == (16, 2)


def test_options_that_the_network_does_not_have(tmp_path, table_npz):
    with pytest.raises(ValueError, match=r"options \{'depht': 3\}: models: depht is given, but resnet18 takes stem, "):
        run.Run(run.Recipe("resnet18", str(table_npz), {"depht": 3}))


def test_covariates_keep_auxiliary_heads(tmp_path):
    """Heads see the image alone and give the same as without a table; both move in training, as the table's columns."""
    images = np.random.default_rng(0).standard_normal((4, 1, 40, 40)).astype(np.float32)
    table = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    backbone = models.googlenet(1, 2, auxiliary=True, variant="torchvision", width=0.1, dropout=0.0, rng=0)
    for _, layer in backbone.named_layers():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    (_, *expected), _ = backbone.forward(images)
    net = models.WithCovariates(backbone, 3, rng=0)
    (logits, *heads), backward = net.forward((images, table))
    assert len(heads) == 2
    for head, alone in zip(heads, expected, strict=True):
        np.testing.assert_array_equal(head, alone)
    ones = np.ones_like(logits)
    parts = [backward(dys) for dys in ((ones, None, None), (None, ones, None), (None, None, ones))]
    net.zero_grad()
    whole = backward((ones, ones, ones))
    assert all((part[0] != 0).any() for part in parts)
    assert (parts[0][1] != 0).any() and not parts[1][1].any()
    assert_close(whole[0], sum(part[0] for part in parts), 10_000)  # through some 60 layers
    assert_close(whole[1], parts[0][1], 100)

    train, test = striped(48, size=40), striped(16, size=40, seed=1)
    path = write_npz(tmp_path / "s.npz", x_train=train.images[:, 0], y_train=train.labels,
                     x_test=test.images[:, 0], y_test=test.labels,
                     train_table=np.ones((48, 2), np.float32) * np.arange(48)[:, None], test_table=np.ones((16, 2)))
    training = run.Run(run.Recipe("googlenet", str(path), {"auxiliary": True, "variant": "torchvision", "width": 0.1},
                                  epochs=1, batch_size=16, val_fraction=0.2))
    before = training.model.state_dict()
    training.train(tmp_path / "a.npz")
    after = training.model.state_dict()
    for name in ("join.image.aux1.conv.conv.weight", "join.image.conv1.conv.weight", "head.fc1.weight"):
        assert (before[name] != after[name]).any(), name
    assert training.test().probabilities.shape == (16, 2)


class TestUnreadGradient:
    TRAIN = striped(40)
    NORMALISE = data.Normalise.fit(TRAIN.images)

    def fit(self, net: nn.Layer, train: data.Split) -> None:
        loop.fit(net, train, optim.SGD(net.parameters(), lr=0.1), 1, normalise=self.NORMALISE, batch_size=20)

    @pytest.mark.parametrize("kind", ["plain", "table", "shared"])
    def test_only_layers_that_see_data_are_spared(self, monkeypatch, kind):
        train, shapes = self.TRAIN, []
        first = nn.Conv2d(1, 1, 3, padding=1, rng=0)
        second = first if kind == "shared" else nn.Conv2d(1, 1, 3, rng=1)
        net = nn.Sequential(nn.Sequential(first, nn.ReLU()), second, nn.GlobalAvgPool(), nn.Flatten(),
                            nn.Linear(1, 2, rng=2))
        if kind == "table":
            net = models.WithCovariates(net, 2, rng=3)
            train = striped_with_table(40, seed=0)
        by_hand = [p.value.copy() for p in net.parameters()]
        original = conv_layers.conv_input_grad
        monkeypatch.setattr(conv_layers, "conv_input_grad",
                            lambda shape, *args, **kw: shapes.append(1) or original(shape, *args, **kw))
        self.fit(net, train)
        # Two batches: the second convolution each time, and the first one too if it comes again.
        assert len(shapes) == (4 if kind == "shared" else 2)
        assert first.input_grad
        assert second.input_grad
        assert any((a != p.value).any() for a, p in zip(by_hand, net.parameters(), strict=True))
        if kind != "shared":
            first.input_grad = False  # as a user may have set it
            self.fit(net, train)
            assert not first.input_grad

    def test_same_bits(self):
        one, other = small_net(), small_net()
        self.fit(one, self.TRAIN)
        optimizer = optim.SGD(other.parameters(), lr=0.1)
        rng = np.random.default_rng((0, 1))
        for x, target in data.batches(self.TRAIN, 20, normalise=self.NORMALISE, rng=rng):
            logits, backward = other.forward(x)
            assert backward(nn.cross_entropy(logits, target)[1]).shape == x.shape
            optimizer.step()
            optimizer.zero_grad()
        assert_same_bits(one.state_dict(), other.state_dict())
