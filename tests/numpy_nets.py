"""The networks once more, in plain NumPy: forward passes by formula, from a state dict with the networks' names.

Gradients come from these by difference quotients, so that nothing of fastconv takes part.
"""

import numpy as np

# Table I of LeNet's paper: the row of each map of S2 has an X for each map of C3 that sees it.
C3 = """
    X...XXX..XXXX.XX
    XX...XXX..XXXX.X
    XXX...XXX..X.XXX
    .XXX..XXXX..X.XX
    ..XXX..XXXX.XX.X
    ...XXX..XXXX.XXX
"""


class Reference:
    """Layers in float64 that find their weights by name; training mode (statistics of the batch) without dropout."""

    def __init__(self, state):
        self.state = {name: np.asarray(value, np.float64) for name, value in state.items()}

    def has(self, prefix):
        return any(name.startswith(prefix) for name in self.state)

    def conv(self, name, x, stride=1, padding=0, groups=1):
        weight = self.state[f"{name}.weight"]
        kernel = weight.shape[2:]
        axes = tuple(range(2, x.ndim))
        windows = np.lib.stride_tricks.sliding_window_view(pad(x, padding, 0.0), kernel, axes)
        windows = windows[(slice(None), slice(None), *[slice(None, None, stride)] * len(axes))]
        inner = (1, *range(x.ndim, windows.ndim))
        parts = [np.tensordot(part, filters, (inner, range(1, weight.ndim)))
                 for part, filters in zip(np.split(windows, groups, 1), np.split(weight, groups), strict=True)]
        y = np.moveaxis(np.concatenate(parts, -1), -1, 1)
        return y + by_channel(self.state[f"{name}.bias"], y) if f"{name}.bias" in self.state else y

    def norm(self, name, x, eps=1e-5):
        axes = (0, *range(2, x.ndim))
        centred = x - x.mean(axes, keepdims=True)
        y = centred / np.sqrt((centred**2).mean(axes, keepdims=True) + eps)
        return y * by_channel(self.state[f"{name}.weight"], y) + by_channel(self.state[f"{name}.bias"], y)

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    # ---- blocks ----

    def residual(self, name, x, convolutions, stride=1, residual=True, paper=False):
        """`convolutions` is 2 or 3: basic block or bottleneck. The paper's basic blocks have shortcuts that pad.

        Where size or channels change and there is no padding, the projection's weights must be there.
        """
        z = x
        for i in range(1, convolutions + 1):
            kernel = 3 if convolutions == 2 or i == 2 else 1
            step = stride if i == (1 if convolutions == 2 or paper else 2) else 1
            z = self.norm(f"{name}bn{i}", self.conv(f"{name}conv{i}", z, step, kernel // 2))
            z = relu(z) if i < convolutions else z
        if not residual:
            return relu(z)
        if z.shape != x.shape and paper and convolutions == 2:
            x = x[(..., *[slice(None, None, stride)] * (x.ndim - 2))]
            x = np.concatenate([x, np.zeros((len(x), z.shape[1] - x.shape[1], *x.shape[2:]))], 1)
        elif z.shape != x.shape:
            x = self.norm(f"{name}downsample.1", self.conv(f"{name}downsample.0", x, stride))
        return relu(z + x)

    def dense_layer(self, name, x):
        x = self.conv(f"{name}conv1", relu(self.norm(f"{name}norm1", x)))
        return self.conv(f"{name}conv2", relu(self.norm(f"{name}norm2", x)), padding=1)

    def dense_block(self, name, x):
        i = 1
        while self.has(f"{name}denselayer{i}."):
            x = np.concatenate([x, self.dense_layer(f"{name}denselayer{i}.", x)], 1)
            i += 1
        return x

    def transition(self, name, x):
        return avg_pool(self.conv(f"{name}conv", relu(self.norm(f"{name}norm", x))), 2, 2)

    def conv_relu(self, name, x, stride=1, padding=0):
        x = self.conv(f"{name}conv", x, stride, padding)
        return relu(self.norm(f"{name}bn", x, 1e-3) if self.has(f"{name}bn") else x)

    def inception(self, name, x):
        large = self.state[f"{name}branch3.1.conv.weight"].shape[-1]
        return np.concatenate([
            self.conv_relu(f"{name}branch1.", x),
            self.conv_relu(f"{name}branch2.1.", self.conv_relu(f"{name}branch2.0.", x), padding=1),
            self.conv_relu(f"{name}branch3.1.", self.conv_relu(f"{name}branch3.0.", x), padding=large // 2),
            self.conv_relu(f"{name}branch4.1.", max_pool(x, 3, 1, 1))], 1)

    def naive_inception(self, name, x):
        return np.concatenate([*(self.conv_relu(f"{name}branch{i}.", x, padding=i - 1) for i in (1, 2, 3)),
                               max_pool(x, 3, 1, 1)], 1)

    def mlpconv(self, name, x, stride=1, padding=0):
        for i in (0, 2, 4):
            if self.has(f"{name}{i}."):
                x = relu(self.conv(f"{name}{i}", x, stride if i == 0 else 1, padding if i == 0 else 0))
        return x

    def auxiliary(self, name, x):
        x = average_to(x, 4) if self.has(f"{name}conv.bn") else avg_pool(x, 5, 3)
        x = self.conv_relu(f"{name}conv.", x)
        return self.linear(f"{name}fc2", relu(self.linear(f"{name}fc1", x.reshape(len(x), -1))))

    # ---- networks ----

    def resnet(self, x, counts, convolutions, residual=True, stem="large", paper=False):
        if stem == "large":
            x = max_pool(relu(self.norm("bn1", self.conv("conv1", x, 2, 3))), 3, 2, 1)
        else:
            x = relu(self.norm("bn1", self.conv("conv1", x, 1, 1)))
        for stage, count in enumerate(counts):
            for i in range(count):
                x = self.residual(f"layer{stage + 1}.{i}.", x, convolutions, 2 if stage and not i else 1, residual,
                                  paper)
        return self.linear("fc", global_mean(x))

    def densenet(self, x):
        x = max_pool(relu(self.norm("features.norm0", self.conv("features.conv0", x, 2, 3))), 3, 2, 1)
        for i in (1, 2, 3, 4):
            x = self.dense_block(f"features.denseblock{i}.", x)
            x = self.transition(f"features.transition{i}.", x) if i < 4 else x
        return self.linear("classifier", global_mean(relu(self.norm("features.norm5", x))))

    def googlenet(self, x):
        """Logits, and those of the auxiliary classifiers if there are weights for them."""
        torchvision = self.has("conv1.bn")

        def norm(x):
            return x if torchvision else response_norm(x, 5, 1e-4, 0.75, 1.0)

        outputs = []
        x = norm(max_pool(self.conv_relu("conv1.", x, 2, 3), 3, 2, ceil=True))
        x = norm(self.conv_relu("conv3.", self.conv_relu("conv2.", x), padding=1))
        x = max_pool(x, 3, 2, ceil=True)
        for name in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
            x = self.inception(f"inception{name}.", x)
            head = {"4a": "aux1", "4d": "aux2"}.get(name)
            if head and self.has(head):
                outputs.append(self.auxiliary(f"{head}.", x))
            if name in ("3b", "4e"):
                x = max_pool(x, 2 if torchvision and name == "4e" else 3, 2, ceil=True)
        return (self.linear("fc", global_mean(x)), *outputs) if outputs else self.linear("fc", global_mean(x))

    def alexnet(self, x, paper):
        i, groups = 0, 2 if paper else 1
        for stride, padding, parts, normalise, pool in (
                (4, 0 if paper else 2, 1, paper, True), (1, 2, groups, paper, True), (1, 1, 1, False, False),
                (1, 1, groups, False, False), (1, 1, groups, False, True)):
            x = relu(self.conv(f"features.{i}", x, stride, padding, parts))
            x = response_norm(x, 5, 5e-4, 0.75, 2.0) if normalise else x
            x = max_pool(x, 3, 2) if pool else x
            i += 2 + normalise + pool
        return self.classifier(global_mean(x), (0, 3, 6) if paper else (1, 4, 6))

    def vgg(self, x, convolutions, batch_norm=False):
        i = 0
        for count in convolutions:
            for _ in range(count):
                x = self.conv(f"features.{i}", x, padding=1)
                x = relu(self.norm(f"features.{i + 1}", x) if batch_norm else x)
                i += 2 + batch_norm
            x = max_pool(x, 2, 2)
            i += 1
        return self.classifier(global_mean(x), (0, 3, 6))

    def classifier(self, x, numbers):
        for i in numbers:
            x = self.linear(f"classifier.{i}", x)
            x = relu(x) if i != numbers[-1] else x
        return x

    def nin(self, x):
        x = max_pool(self.mlpconv("mlpconv1.", x, padding=2), 3, 2, ceil=True)
        x = max_pool(self.mlpconv("mlpconv2.", x, padding=2), 3, 2, ceil=True)
        return global_mean(self.mlpconv("mlpconv3.", x, padding=1))

    def lenet(self, x):
        x = max_pool(relu(self.conv("c1", x, padding=2)), 2, 2)
        x = max_pool(relu(self.conv("c3", x)), 2, 2)
        x = relu(self.linear("c5", x.reshape(len(x), -1)))
        return self.linear("output", relu(self.linear("f6", x)))

    def lenet_1998(self, x):
        x = self.subsampling("s2", squash(self.conv("c1", x, padding=2)))
        x = self.subsampling("s4", squash(self.sparse_conv("c3", squash(x))))
        x = squash(self.conv("c5", squash(x)))
        x = squash(self.linear("f6", x.reshape(len(x), -1)))
        return -((x[:, None] - self.state["output.codes"]) ** 2).sum(2)

    def subsampling(self, name, x):
        total = 2 ** (x.ndim - 2) * avg_pool(x, 2, 2)
        return total * by_channel(self.state[f"{name}.weight"], x) + by_channel(self.state[f"{name}.bias"], x)

    def sparse_conv(self, name, x):
        """Weights lie in the order of the table's columns."""
        filters = iter(self.state[f"{name}.weight"])
        rows = C3.split()
        maps = []
        for column, bias in enumerate(self.state[f"{name}.bias"]):
            total = bias
            for source in [k for k, row in enumerate(rows) if row[column] == "X"]:
                kernel = next(filters)
                axes = tuple(range(1, x.ndim - 1))
                windows = np.lib.stride_tricks.sliding_window_view(x[:, source], kernel.shape, axes)
                total = total + np.tensordot(windows, kernel, kernel.ndim)
            maps.append(total)
        return np.stack(maps, 1)

    def mlp(self, x):
        x, i = x.reshape(len(x), -1), 1
        while self.has(f"fc{i + 1}."):
            x, i = relu(self.linear(f"fc{i}", x)), i + 1
        return self.linear(f"fc{i}", x)

    def cnn3d(self, x):
        for i in (0, 4, 8):
            x = max_pool(relu(self.norm(f"{i + 1}", self.conv(f"{i}", x, padding=1))), 2, 2)
        return self.linear("14", global_mean(x))


def by_channel(values, x):
    return values.reshape(-1, *[1] * (x.ndim - 2))


def relu(x):
    return np.where(x > 0, x, 0)


def squash(x):
    return 1.7159 * np.tanh(2 / 3 * x)


def average_to(x, size):
    """Means of parts whose borders are rounded outwards."""
    for axis in range(2, x.ndim):
        n = x.shape[axis]
        parts = [np.take(x, range(i * n // size, -(-(i + 1) * n // size)), axis) for i in range(size)]
        x = np.stack([part.mean(axis) for part in parts], axis)
    return x


def global_mean(x):
    return x.reshape(*x.shape[:2], -1).mean(2)


def pad(x, width, value):
    return np.pad(x, [(0, 0), (0, 0), *[(width, width)] * (x.ndim - 2)], constant_values=value)


def _windows(x, kernel, stride):
    axes = tuple(range(2, x.ndim))
    windows = np.lib.stride_tricks.sliding_window_view(x, (kernel,) * len(axes), axes)
    return windows[(slice(None), slice(None), *[slice(None, None, stride)] * len(axes))], tuple(-1 - i for i in
                                                                                               range(len(axes)))


def max_pool(x, kernel, stride, padding=0, ceil=False):
    x = pad(x, padding, -np.inf)
    if ceil:  # room for a last window that hangs over the end
        x = np.pad(x, [(0, 0), (0, 0), *[(0, -(n - kernel) % stride) for n in x.shape[2:]]], constant_values=-np.inf)
    windows, axes = _windows(x, kernel, stride)
    return windows.max(axes)


def avg_pool(x, kernel, stride):
    windows, axes = _windows(x, kernel, stride)
    return windows.mean(axes)


def response_norm(x, size, alpha, beta, k):
    squares = np.pad(x**2, [(0, 0), (size // 2, size // 2), *[(0, 0)] * (x.ndim - 2)])
    total = sum(squares[:, i:i + x.shape[1]] for i in range(size))
    return x / (k + alpha / size * total) ** beta
