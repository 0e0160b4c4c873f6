"""The networks once more, in PyTorch, with torchvision's or MONAI's names: what fastconv's are compared with."""

import itertools
from collections import OrderedDict

import torch
from numpy_nets import C3
from torch import nn
from torch.nn import functional as F


class Dims:
    """PyTorch's layers for a number of spatial axes."""

    def __init__(self, ndim):
        for name in ("Conv", "BatchNorm", "MaxPool", "AvgPool", "AdaptiveAvgPool"):
            setattr(self, name, getattr(nn, f"{name}{ndim}d"))
        self.ndim = ndim


# ---- ResNet ---------------------------------------------------------------------------------------------------------


class Padding(nn.Module):
    """Shortcut without weights: every `stride`-th pixel, channels filled up with zeros."""

    def __init__(self, outputs, stride):
        super().__init__()
        self.outputs, self.stride = outputs, stride

    def forward(self, x):
        x = x[(..., *[slice(None, None, self.stride)] * (x.ndim - 2))]
        return torch.cat([x, x.new_zeros(len(x), self.outputs - x.shape[1], *x.shape[2:])], 1)


class Block(nn.Module):
    """Basic block (kernels 3, 3) or bottleneck (1, 3, 1); the stride is that of the first 3x3, in the paper the first.

    The paper's basic blocks add what they read, filled up with channels of zeros.
    """

    def __init__(self, d, inputs, inside, kernels, stride, residual, paper=False):
        super().__init__()
        outputs = inside * (4 if len(kernels) == 3 else 1)
        widths = [inputs, *[inside] * (len(kernels) - 1), outputs]
        self.count, self.residual = len(kernels), residual
        for i, kernel in enumerate(kernels):
            step = stride if i == (0 if paper else kernels.index(3)) else 1
            conv = d.Conv(widths[i], widths[i + 1], kernel, step, kernel // 2, bias=False)
            setattr(self, f"conv{i + 1}", conv)
            setattr(self, f"bn{i + 1}", d.BatchNorm(widths[i + 1]))
        if residual and (stride > 1 or inputs != outputs) and paper and len(kernels) == 2:
            self.downsample = Padding(outputs, stride)
        elif residual and (stride > 1 or inputs != outputs):
            self.downsample = nn.Sequential(d.Conv(inputs, outputs, 1, stride, bias=False), d.BatchNorm(outputs))

    def forward(self, x):
        z = x
        for i in range(1, self.count + 1):
            z = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(z))
            if i < self.count:
                z = F.relu(z)
        if self.residual:
            z = z + (self.downsample(x) if hasattr(self, "downsample") else x)
        return F.relu(z)


class ResNet(nn.Module):
    def __init__(self, counts, kernels, channels=(64, 128, 256, 512), stem="large", in_channels=3, classes=1000,
                 residual=True, ndim=2, paper=False):
        super().__init__()
        d = Dims(ndim)
        large = stem == "large"
        self.conv1 = d.Conv(in_channels, channels[0], 7 if large else 3, 2 if large else 1, 3 if large else 1,
                            bias=False)
        self.bn1 = d.BatchNorm(channels[0])
        self.maxpool = d.MaxPool(3, 2, 1) if large else nn.Identity()
        inputs = channels[0]
        self.stages = len(counts)
        for stage, (inside, count) in enumerate(zip(channels, counts, strict=True)):
            blocks = []
            for i in range(count):
                blocks.append(Block(d, inputs, inside, kernels, 2 if stage and not i else 1, residual, paper))
                inputs = inside * (4 if len(kernels) == 3 else 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.flatten(2).mean(2))


# ---- DenseNet -------------------------------------------------------------------------------------------------------


class DenseLayer(nn.Module):
    def __init__(self, d, inputs, growth):
        super().__init__()
        self.norm1, self.conv1 = d.BatchNorm(inputs), d.Conv(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = d.BatchNorm(4 * growth), d.Conv(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class MonaiDenseLayer(nn.Module):
    """The same with the names that MONAI has: a Sequential inside."""

    def __init__(self, d, inputs, growth):
        super().__init__()
        self.layers = nn.Sequential()
        for i, (before, after, kernel) in enumerate([(inputs, 4 * growth, 1), (4 * growth, growth, 3)], 1):
            self.layers.add_module(f"norm{i}", d.BatchNorm(before))
            self.layers.add_module(f"relu{i}", nn.ReLU())
            self.layers.add_module(f"conv{i}", d.Conv(before, after, kernel, padding=kernel // 2, bias=False))

    def forward(self, x):
        return self.layers(x)


class DenseBlock(nn.Module):
    def __init__(self, d, inputs, count, growth, layer=DenseLayer):
        super().__init__()
        for i in range(count):
            self.add_module(f"denselayer{i + 1}", layer(d, inputs + i * growth, growth))

    def forward(self, x):
        for layer in self.children():
            x = torch.cat([x, layer(x)], 1)
        return x


class DenseNet(nn.Module):
    def __init__(self, counts, growth, channels, in_channels=3, classes=1000, ndim=2, monai=False, stem="large"):
        super().__init__()
        d = Dims(ndim)
        large = stem == "large"
        layer = MonaiDenseLayer if monai else DenseLayer
        f = self.features = nn.Sequential()
        f.add_module("conv0", d.Conv(in_channels, channels, *((7, 2, 3) if large else (3, 1, 1)), bias=False))
        f.add_module("norm0", d.BatchNorm(channels))
        f.add_module("relu0", nn.ReLU())
        f.add_module("pool0", d.MaxPool(3, 2, 1) if large else nn.Identity())
        for i, count in enumerate(counts, 1):
            f.add_module(f"denseblock{i}", DenseBlock(d, channels, count, growth, layer))
            channels += count * growth
            if i < len(counts):
                t = nn.Sequential()
                t.add_module("norm", d.BatchNorm(channels))
                t.add_module("relu", nn.ReLU())
                t.add_module("conv", d.Conv(channels, channels // 2, 1, bias=False))
                t.add_module("pool", d.AvgPool(2))
                f.add_module(f"transition{i}", t)
                channels //= 2
        f.add_module("norm5", d.BatchNorm(channels))
        head = nn.Linear(channels, classes)
        if monai:
            self.class_layers = nn.Sequential(OrderedDict(out=head))
        else:
            self.classifier = head

    def forward(self, x):
        head = self.class_layers if hasattr(self, "class_layers") else self.classifier
        return head(F.relu(self.features(x)).flatten(2).mean(2))


# ---- GoogLeNet ------------------------------------------------------------------------------------------------------


class ConvReLU(nn.Module):
    def __init__(self, d, batch_norm, inputs, outputs, kernel, **options):
        super().__init__()
        self.conv = d.Conv(inputs, outputs, kernel, bias=not batch_norm, **options)
        if batch_norm:
            self.bn = d.BatchNorm(outputs, eps=0.001)

    def forward(self, x):
        x = self.conv(x)
        return F.relu(self.bn(x) if hasattr(self, "bn") else x)


class Inception(nn.Module):
    def __init__(self, d, batch_norm, inputs, ch1, ch3red, ch3, ch5red, ch5, proj):
        super().__init__()
        k = 3 if batch_norm else 5
        self.branch1 = ConvReLU(d, batch_norm, inputs, ch1, 1)
        self.branch2 = nn.Sequential(ConvReLU(d, batch_norm, inputs, ch3red, 1),
                                     ConvReLU(d, batch_norm, ch3red, ch3, 3, padding=1))
        self.branch3 = nn.Sequential(ConvReLU(d, batch_norm, inputs, ch5red, 1),
                                     ConvReLU(d, batch_norm, ch5red, ch5, k, padding=k // 2))
        self.branch4 = nn.Sequential(d.MaxPool(3, 1, 1), ConvReLU(d, batch_norm, inputs, proj, 1))

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class Auxiliary(nn.Module):
    def __init__(self, d, batch_norm, inputs, classes, channels, units):
        super().__init__()
        self.pool = d.AdaptiveAvgPool(4) if batch_norm else d.AvgPool(5, 3)
        self.conv = ConvReLU(d, batch_norm, inputs, channels, 1)
        self.fc1, self.fc2 = nn.Linear(channels * 4**d.ndim, units), nn.Linear(units, classes)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(self.conv(self.pool(x)).flatten(1))))


class GoogLeNet(nn.Module):
    """`width` divides all channels."""

    TABLE = """
        3a  64  96 128  16  32  32
        3b 128 128 192  32  96  64
        4a 192  96 208  16  48  64
        4b 160 112 224  24  64  64
        4c 128 128 256  24  64  64
        4d 112 144 288  32  64  64
        4e 256 160 320  32 128 128
        5a 256 160 320  32 128 128
        5b 384 192 384  48 128 128"""

    def __init__(self, torchvision, in_channels=3, classes=1000, width=1, ndim=2, stem="large"):
        super().__init__()
        d = Dims(ndim)
        self.torchvision, self.large = torchvision, stem == "large"
        kernel, stride = (7, 2) if self.large else (3, 1)
        self.conv1 = ConvReLU(d, torchvision, in_channels, 64 // width, kernel, stride=stride, padding=kernel // 2)
        self.conv2 = ConvReLU(d, torchvision, 64 // width, 64 // width, 1)
        self.conv3 = ConvReLU(d, torchvision, 64 // width, 192 // width, 3, padding=1)
        self.pool = d.MaxPool(3, 2, ceil_mode=True)
        self.last_pool = d.MaxPool(2, 2, ceil_mode=True) if torchvision else self.pool
        channels = 192 // width
        for line in self.TABLE.split("\n")[1:]:
            name, *numbers = line.split()
            c = [int(n) // width for n in numbers]
            setattr(self, f"inception{name}", Inception(d, torchvision, channels, *c))
            channels = c[0] + c[2] + c[4] + c[5]
            if name in ("4a", "4d"):
                setattr(self, "aux1" if name == "4a" else "aux2",
                        Auxiliary(d, torchvision, channels, classes, 128 // width, 1024 // width))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        def norm(x):
            return x if self.torchvision else F.local_response_norm(x, 5, 1e-4, 0.75, 1.0)

        x = self.conv1(x)
        if self.large:
            x = norm(self.pool(x))
        x = self.pool(norm(self.conv3(self.conv2(x))))
        x = self.pool(self.inception3b(self.inception3a(x)))
        x = self.inception4a(x)
        aux1 = self.aux1(x)
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        aux2 = self.aux2(x)
        x = self.last_pool(self.inception4e(x))
        x = self.inception5b(self.inception5a(x))
        return self.fc(x.flatten(2).mean(2)), aux1, aux2


# ---- AlexNet, VGG, NIN ----------------------------------------------------------------------------------------------


class Features(nn.Module):
    """Convolutions as ``features``, a pool to a fixed size, linear layers as ``classifier``."""

    def __init__(self, d, features, pool_size, classifier):
        super().__init__()
        self.features, self.avgpool = nn.Sequential(*features), d.AdaptiveAvgPool(pool_size)
        self.classifier = nn.Sequential(*classifier)

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def alexnet(paper, in_channels=3, classes=1000, width=1, pool_size=6, ndim=2):
    d = Dims(ndim)
    c = [n // width for n in ((96, 256, 384, 384, 256) if paper else (64, 192, 384, 256, 256))]
    groups = 2 if paper else 1
    tail = [nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0)] if paper else []
    units = 4096 // width
    drop, relu, pool = nn.Identity(), nn.ReLU(), d.MaxPool(3, 2)
    fc = [nn.Linear(c[4] * pool_size**ndim, units), nn.Linear(units, units), nn.Linear(units, classes)]
    return Features(d, [
        d.Conv(in_channels, c[0], 11, 4, 0 if paper else 2), relu, *tail, pool,
        d.Conv(c[0], c[1], 5, 1, 2, groups=groups), relu, *tail, pool,
        d.Conv(c[1], c[2], 3, 1, 1), relu,
        d.Conv(c[2], c[3], 3, 1, 1, groups=groups), relu,
        d.Conv(c[3], c[4], 3, 1, 1, groups=groups), relu, pool], pool_size,
        [fc[0], relu, drop, fc[1], relu, drop, fc[2]] if paper else [drop, fc[0], relu, drop, fc[1], relu, fc[2]])


def vgg(convolutions, batch_norm=False, in_channels=3, classes=1000, width=1, pool_size=7, ndim=2):
    d = Dims(ndim)
    layers = []
    for channels, count in zip((64, 128, 256, 512, 512), convolutions, strict=True):
        for _ in range(count):
            layers += [d.Conv(in_channels, channels // width, 3, 1, 1)]
            layers += [d.BatchNorm(channels // width)] if batch_norm else []
            layers += [nn.ReLU()]
            in_channels = channels // width
        layers.append(d.MaxPool(2))
    units, drop = 4096 // width, nn.Identity()
    return Features(d, layers, pool_size, [
        nn.Linear(in_channels * pool_size**ndim, units), nn.ReLU(), drop,
        nn.Linear(units, units), nn.ReLU(), drop, nn.Linear(units, classes)])


class NIN(nn.Module):
    """``rows``: kernel, stride, padding, then the channels of the convolution and its 1x1 convolutions."""

    def __init__(self, rows, in_channels=3, ndim=2):
        super().__init__()
        d = Dims(ndim)
        self.pool = d.MaxPool(3, 2, ceil_mode=True)
        for i, (kernel, stride, padding, *channels) in enumerate(rows, 1):
            layers = [d.Conv(in_channels, channels[0], kernel, stride, padding), nn.ReLU()]
            for before, after in itertools.pairwise(channels):
                layers += [d.Conv(before, after, 1), nn.ReLU()]
            setattr(self, f"mlpconv{i}", nn.Sequential(*layers))
            in_channels = channels[-1]
        self.count = len(rows)

    def forward(self, x):
        for i in range(1, self.count + 1):
            x = getattr(self, f"mlpconv{i}")(x)
            if i < self.count:
                x = self.pool(x)
        return x.flatten(2).mean(2)


# ---- LeNet, perceptrons, cnn3d --------------------------------------------------------------------------------------


def mlp(inputs, *units):
    layers = [("flatten", nn.Flatten())]
    for i, (before, after) in enumerate(itertools.pairwise((inputs, *units)), 1):
        layers += [(f"fc{i}", nn.Linear(before, after)), (f"relu{i}", nn.ReLU())]
    return nn.Sequential(OrderedDict(layers[:-1]))


def cnn3d(in_channels=1, classes=2):
    layers = []
    for channels in (8, 16, 32):
        layers += [nn.Conv3d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm3d(channels), nn.ReLU(),
                   nn.MaxPool3d(2)]
        in_channels = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(in_channels, classes))


class LeNet(nn.Module):
    def __init__(self, in_channels=1, classes=10, features=25, ndim=2):
        super().__init__()
        d = Dims(ndim)
        self.c1, self.c3 = d.Conv(in_channels, 6, 5, padding=2), d.Conv(6, 16, 5)
        self.pool, self.relu = d.MaxPool(2), nn.ReLU()
        self.c5, self.f6 = nn.Linear(16 * features, 120), nn.Linear(120, 84)
        self.output = nn.Linear(84, classes)

    def forward(self, x):
        x = self.pool(self.relu(self.c3(self.pool(self.relu(self.c1(x))))))
        return self.output(self.relu(self.f6(self.relu(self.c5(x.flatten(1))))))


class Squash(nn.Module):
    def forward(self, x):
        return 1.7159 * torch.tanh(2 / 3 * x)


class Subsampling(nn.Module):
    def __init__(self, d, channels):
        super().__init__()
        self.mean, self.count = d.AvgPool(2), 2**d.ndim
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))

    def forward(self, x):
        shape = (-1, *[1] * (x.ndim - 2))
        return self.count * self.mean(x) * self.weight.reshape(shape) + self.bias.reshape(shape)


class SparseConv(nn.Module):
    """Sees the maps that have an X in its column of the table."""

    def __init__(self, ndim):
        super().__init__()
        rows = C3.split()
        pairs = [(out, source) for out in range(16) for source, row in enumerate(rows) if row[out] == "X"]
        self.out, self.source = map(list, zip(*pairs, strict=True))
        self.convolution = getattr(F, f"conv{ndim}d")
        self.weight = nn.Parameter(torch.empty(len(pairs), *[5] * ndim))
        self.bias = nn.Parameter(torch.empty(16))
        self.fan_in = self.weight.numel() / 16  # the mean

    def forward(self, x):
        dense = self.weight.new_zeros(16, 6, *self.weight.shape[1:])
        return self.convolution(x, dense.index_put((torch.tensor(self.out, device=x.device),
                                                    torch.tensor(self.source, device=x.device)), self.weight),
                                self.bias)


class Distances(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.register_buffer("codes", torch.empty(classes, 84))

    def forward(self, x):
        return -(x[:, None] - self.codes).square().sum(2)


class LeNet1998(nn.Module):
    def __init__(self, in_channels=1, classes=10, features=(5, 5)):
        super().__init__()
        d = Dims(len(features))
        self.c1, self.s2 = d.Conv(in_channels, 6, 5, padding=2), Subsampling(d, 6)
        self.c3, self.s4 = SparseConv(d.ndim), Subsampling(d, 16)
        self.c5, self.f6 = d.Conv(16, 120, features), nn.Linear(120, 84)
        self.squash, self.output = Squash(), Distances(classes)

    def forward(self, x):
        for layer in (self.c1, self.s2, self.c3, self.s4, self.c5):
            x = self.squash(layer(x))
        return self.output(self.squash(self.f6(x.flatten(1))))


# ---- MONAI ----------------------------------------------------------------------------------------------------------


def monai_resnet(counts, kernels, channels, in_channels, classes, stride=1, bias=True, padding=False, ndim=3):
    """MONAI's ResNet: the stride of its stem, the bias of its projections, or padding in their place."""
    net = ResNet(counts, kernels, channels, in_channels=in_channels, classes=classes or 1, ndim=ndim)
    net.conv1.stride = (stride,) * ndim
    for block in [m for m in net.modules() if hasattr(m, "downsample")]:
        conv = block.downsample[0]
        if padding:
            block.downsample = Padding(conv.out_channels, conv.stride[0])
        elif bias:
            block.downsample[0] = type(conv)(conv.in_channels, conv.out_channels, 1, conv.stride)
    if not classes:
        net.fc = nn.Identity()
    return net
