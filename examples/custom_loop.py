"""A network and a training loop of one's own: handwritten digits, 8x8, in a few seconds.

    pip install "fastconv[demo]"
    python custom_loop.py
"""

import numpy as np
from sklearn.datasets import load_digits

from fastconv.nn import Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential, cross_entropy
from fastconv.training import AdamW

images, labels = load_digits(return_X_y=True)
images = (images.reshape(-1, 1, 8, 8) / 16 - 0.3).astype(np.float32)
rng = np.random.default_rng(0)
order = rng.permutation(len(images))
test, train = order[:360], order[360:]

net = Sequential(
    Conv2d(1, 16, 3, padding="same", rng=1), ReLU(), MaxPool2d(2),
    Conv2d(16, 32, 3, padding="same", rng=2), ReLU(), MaxPool2d(2),
    Flatten(), Linear(128, 10, rng=3),
)  # fmt: skip
optimizer = AdamW(net.parameters(), lr=3e-3)

for epoch in range(1, 9):
    for batch in np.split(rng.permutation(train), range(32, len(train), 32)):
        logits, backward = net.forward(images[batch])
        loss, dlogits = cross_entropy(logits, labels[batch])
        backward(dlogits)
        optimizer.step()
        optimizer.zero_grad()
    accuracy = (net(images[test]).argmax(axis=1) == labels[test]).mean()
    print(f"epoch {epoch}  loss of the last batch {loss:.4f}  test accuracy {accuracy:.2%}")
