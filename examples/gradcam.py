"""Grad-CAM with a known answer: a small patch at a random place decides the class, and the heatmap must find it.

    pip install "fastconv[plot]"
    python gradcam.py [--ndim 3] [--out DIR]

The background is noise. Class 0 has no patch, class 1 one with stripes across, class 2 one with stripes down; a network
with global average pooling learns that in seconds, without ever being told where the patch is.
"""

import argparse
from pathlib import Path

import numpy as np

from fastconv import plots
from fastconv.gradcam import gradcam
from fastconv.nn import CONV, MAX_POOL, Flatten, GlobalAvgPool, Linear, ReLU, Sequential, cross_entropy
from fastconv.training import AdamW
from fastconv.watch import layer_outputs

PATCH = 5


def patches(count, size, ndim, rng):
    """Images (count, 1, *size), classes and the first corner (count, ndim) of each patch."""
    images = rng.normal(0, 0.3, (count, 1, *(size,) * ndim)).astype(np.float32)
    classes = rng.integers(0, 3, count)
    corners = rng.integers(0, size - PATCH + 1, (count, ndim))
    bright = np.arange(PATCH) % 2 == 0  # stripes of one pixel
    for image, label, corner in zip(images, classes, corners, strict=True):
        if label == 0:
            continue
        shape = [1] * ndim
        shape[-2 if label == 1 else -1] = PATCH
        image[(0, *(slice(start, start + PATCH) for start in corner))] += 2 * bright.reshape(shape)
    return images, classes, corners


def network(ndim, rng):
    """Three convolutions and global average pooling."""
    conv, pool = CONV[ndim], MAX_POOL[ndim]
    return Sequential(
        conv(1, 8, 3, padding=1, rng=rng), ReLU(),
        conv(8, 8, 3, padding=1, rng=rng), ReLU(), pool(2),
        conv(8, 16, 3, padding=1, rng=rng), ReLU(),
        GlobalAvgPool(), Flatten(), Linear(16, 3, rng=rng),
    )  # fmt: skip


def hits(heats, corners, margin):
    """For each heatmap whether its maximum lies in the patch, and the share of its sum within `margin` pixels of it."""
    peaks = np.array([np.unravel_index(heat.argmax(), heat.shape) for heat in heats])
    inside = ((peaks >= corners) & (peaks < corners + PATCH)).all(axis=1)
    shares = [
        heat[tuple(slice(max(start - margin, 0), start + PATCH + margin) for start in corner)].sum() / heat.sum()
        for heat, corner in zip(heats, corners, strict=True)
    ]
    return inside, np.array(shares)


def main():
    parser = argparse.ArgumentParser(description="Train on patches, then find them by Grad-CAM.")
    parser.add_argument("--ndim", type=int, choices=(2, 3), default=2, help="images or volumes (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the pictures")
    args = parser.parse_args()
    size, batch, steps = {2: (32, 32, 100), 3: (14, 24, 60)}[args.ndim]
    rng = np.random.default_rng(0)
    net = network(args.ndim, rng)
    optimizer = AdamW(net.parameters(), lr=1e-2)
    for step in range(1, steps + 1):
        images, classes, _ = patches(batch, size, args.ndim, rng)
        logits, backward = net.forward(images)
        loss, dlogits = cross_entropy(logits, classes)
        backward(dlogits)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step:3d}  loss {loss:.4f}")

    images, classes, corners = patches(150, size, args.ndim, rng)
    accuracy = (net(images).argmax(axis=1) == classes).mean()
    images, classes, corners = (part[classes > 0] for part in (images, classes, corners))
    heats = gradcam(net, images)  # of the classes that the network predicts
    print(f"test accuracy {accuracy:.0%}")
    for margin in (0, 2):  # the heatmap comes from a layer after a pool of 2
        inside, shares = hits(heats, corners, margin)
        area = ((PATCH + 2 * margin) / size) ** args.ndim
        print(f"sum of the heatmap within {margin} pixels of the patch: {shares.mean():.0%} ({area:.1%} of the image)")
    print(f"maximum of the heatmap in the patch: {inside.mean():.0%} of {len(images)} images")

    args.out.mkdir(parents=True, exist_ok=True)
    shown = range(2 if args.ndim == 3 else 5)
    names = [f"{i}: stripes {('across', 'down')[classes[i] - 1]}" for i in shown]
    plots.heatmaps(
        {name: images[i, 0] for i, name in enumerate(names)}, {name: heats[i] for i, name in enumerate(names)},
        args.out / "gradcam.png", "Grad-CAM of the predicted class",
    )  # fmt: skip
    plots.filters(net.state_dict()["0.weight"], args.out / "filters.png", "Filters of the first convolution")
    maps = layer_outputs(net, images[:1], ["1", "3", "6"])  # behind the ReLU of each convolution
    plots.feature_maps(images[0, 0], {f"layer {name}": y[0] for name, y in maps.items()}, args.out / "feature_maps.png")
    print(f"pictures in {args.out.resolve()}")


if __name__ == "__main__":
    main()
