"""An image and a number in, two classifiers out, in a loop of one's own: is the digit larger than the number beside it?

    pip install "fastconv[demo]"
    python two_inputs_two_heads.py

The network takes a pair, images (N, 1, 8, 8) and a table (N, 1), in which NaN is a missing value: then the question
is whether the digit is larger than 4. Who sees the image alone can be right in 82 % of the cases, who sees the number
alone in 68 %. An auxiliary classifier sits on the layer where both meet; its loss counts 0.3 and sends its gradient a
short way (Szegedy et al. 2015). `fastconv.training.fit` takes the same network and, with the table in its `Split`, the
same data.
"""

import numpy as np
from sklearn.datasets import load_digits

from fastconv.models import Standardise, WithHeads
from fastconv.nn import Concat, Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential, cross_entropy
from fastconv.training import AdamW

images, digits = load_digits(return_X_y=True)
images = (images.reshape(-1, 1, 8, 8) / 16 - 0.3).astype(np.float32)
rng = np.random.default_rng(0)
numbers = rng.integers(0, 9, len(digits))
missing = rng.random(len(digits)) < 0.2
labels = (digits > np.where(missing, 4, numbers)).astype(int)
table = np.where(missing, np.nan, numbers)[:, None].astype(np.float32)
order = rng.permutation(len(images))
test, train = order[:360], order[360:]

image = Sequential(
    Conv2d(1, 16, 3, padding="same", rng=1), ReLU(), MaxPool2d(2),
    Conv2d(16, 32, 3, padding="same", rng=2), ReLU(), MaxPool2d(2), Flatten(),
)  # fmt: skip
number = Standardise(1)  # one column in; out come its value in standard deviations and whether it is missing
number.fit(table[train])
net = WithHeads(
    {"join": Concat(image=image, number=number), "hidden": Linear(130, 256, rng=3), "relu": ReLU(),
     "fc": Linear(256, 2, rng=4)},
    heads={"aux": ("join", Linear(130, 2, rng=5))},
)  # fmt: skip
optimizer = AdamW(net.parameters(), lr=3e-3)

for epoch in range(1, 13):
    for batch in np.split(rng.permutation(train), range(32, len(train), 32)):
        (logits, aux), backward = net.forward((images[batch], table[batch]))
        loss, dlogits = cross_entropy(logits, labels[batch])
        aux_loss, daux = cross_entropy(aux, labels[batch])
        backward((dlogits, np.float32(0.3) * daux))
        optimizer.step()
        optimizer.zero_grad()
    answer = net((images[test], table[test])).argmax(axis=1)  # in inference there are the logits alone
    right = answer == labels[test]
    print(f"epoch {epoch:2}  losses of the last batch {loss:.4f}, {aux_loss:.4f}  test accuracy {right.mean():.2%}, "
          f"where the number is missing {right[missing[test]].mean():.2%}")
