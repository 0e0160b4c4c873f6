"""A small 3D network on volumes: adrenal glands from abdominal CT, normal or with a mass.

    python adrenal3d.py adrenalmnist3d.npz

The file (28x28x28, CC BY 4.0) comes from https://medmnist.com: Yang et al., MedMNIST v2, Scientific Data
10, 41 (2023). Three of four glands are normal, so that the area under the ROC curve says more than the accuracy.
"""

import argparse

from fastconv.models import cnn3d
from fastconv.training import AdamW, CosineLR, Normalise, Progress, evaluate, fit, flip, load_npz

parser = argparse.ArgumentParser(description="Train a small 3D network on adrenalmnist3d.npz.")
parser.add_argument("data", help="path of adrenalmnist3d.npz")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

dataset = load_npz(args.data)
normalise = Normalise.fit(dataset.train.images)
net = cnn3d(dataset.in_channels, dataset.num_classes, rng=args.seed)
optimizer = AdamW(net.parameters(), lr=3e-3)
steps = args.epochs * -(-len(dataset.train) // args.batch_size)

with Progress(args.epochs) as progress:
    fit(
        net, dataset.train, optimizer, args.epochs, val=dataset.val, batch_size=args.batch_size,
        normalise=normalise, augment=flip, schedule=CosineLR(optimizer, steps), seed=args.seed, progress=progress,
    )  # fmt: skip

test = evaluate(net, dataset.test, normalise=normalise)
print(f"test AUC {test.auc:.4f}, accuracy {test.accuracy:.2%}")
