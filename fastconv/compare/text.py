"""The words of the report. All numbers are those of the comparison; what it does not show is not claimed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from fastconv.compare.data import DIGITS
from fastconv.compare.figures import short
from fastconv.compare.measure import BATCH_SIZE, FEW_EPOCHS, FEW_REPEATS, FEW_STEPS
from fastconv.compare.networks import NETWORKS
from fastconv.compare.study import PAIRS, Results

__all__ = [
    "accuracy", "auc", "confusions", "curves", "data_name", "extremes", "few_images", "interval", "introduction",
    "memory", "method", "pair", "reductions", "table", "times",
]

Paragraphs = list[str]


def interval(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share of `count` images (Wilson, J. Am. Stat. Assoc. 22, 209, 1927)."""
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def data_name(data: str) -> str:
    """What the data are called in a title."""
    return "scikit-learn's handwritten digits" if data == DIGITS else Path(data).name


def _label(name: str) -> str:
    return NETWORKS[name].label


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def introduction(results: Results) -> Paragraphs:
    """What was done, in one paragraph."""
    dataset = results.dataset
    size = "x".join(map(str, dataset.input_size))
    cut = "" if len(dataset.train) == results.available else f" of the {results.available:,} that there are"
    fewer = "" if results.epochs == results.plan.epochs else (
        f" (fewer than the {results.plan.epochs} asked for: there was not the time)")
    return [
        f"Networks from logistic regression to DenseNet learnt the same {len(dataset.train):,} images{cut}, of {size} "
        f"pixels and {dataset.num_classes} classes, for {_count(results.epochs, 'epoch')}{fewer}, by the same "
        f"recipe, and were tested on the same {len(dataset.test):,}. All of them computed with fastconv on a CPU, in "
        f"{results.seconds / 60:.1f} minutes with seed {results.plan.seed}, on {results.plan.date}.",
    ]


def _test(results: Results, name: str) -> float:
    return float(results.runs[name][0]["accuracy"])


def extremes(results: Results, trained: list[str]) -> tuple[str, str]:
    """The most and the least accurate network."""
    order = sorted(trained, key=lambda name: _test(results, name))
    return order[-1], order[0]


def table(results: Results) -> Paragraphs:
    """To the table of all networks."""
    return [
        "One line for each network, the most accurate first, with its first seed. The interval holds the accuracy that "
        "would show on endless test images with 95% confidence: networks whose intervals overlap widely cannot be "
        "ranked by these. MACs are multiply-accumulates for one image; infer and train are milliseconds for each "
        f"image, alone and in a batch of {BATCH_SIZE}; step is the most memory of one training step's arrays.",
    ]


def accuracy(results: Results, trained: list[str]) -> Paragraphs:
    """To the bubbles of accuracy against MACs."""
    best, worst = extremes(results, trained)
    low, high = interval(_test(results, best), len(results.dataset.test))
    cheap = min((name for name in trained if _test(results, name) >= low),
                key=lambda name: results.costs[name]["macs"])
    words = [
        f"Up is more accurate, right is more work. {_label(best)} is the most accurate with {_test(results, best):.2%} "
        f"(95% interval {low:.1%} to {high:.1%}) for {short(results.costs[best]['macs'])} MACs, {_label(worst)} the "
        f"least with {_test(results, worst):.2%} for {short(results.costs[worst]['macs'])}."]
    if cheap != best:
        words.append(
            f"Of the networks within that interval {_label(cheap)} does the least work, "
            f"{short(results.costs[cheap]['macs'])} MACs, with {_test(results, cheap):.2%}: more work alone does not "
            "make a better network.")
    return words


def auc(results: Results, trained: list[str]) -> Paragraphs:
    """To the bubbles of AUC against parameters."""
    values = {name: float(results.runs[name][0]["auc"]) for name in trained}
    best = max(values, key=lambda name: values[name])
    most, least = (choose(trained, key=lambda name: results.costs[name]["parameters"]) for choose in (max, min))
    return [
        "The area under the ROC curve is the chance that an image of a class scores higher for it than one of another "
        f"class; unlike accuracy it needs no threshold. {_label(best)} has the largest, {values[best]:.4f}; "
        f"{_label(most)}, with the most parameters, {short(results.costs[most]['parameters'])}, has "
        f"{values[most]:.4f}, and {_label(least)}, with the fewest, {short(results.costs[least]['parameters'])}, "
        f"{values[least]:.4f}."]


def times(results: Results) -> Paragraphs:
    """To the picture of times."""
    costs = results.costs
    slow = max(costs, key=lambda name: costs[name]["training_batch"])
    gain = max(costs, key=lambda name: costs[name]["inference_1"] / costs[name]["inference_batch"])
    ratio = costs[gain]["inference_1"] / costs[gain]["inference_batch"]
    step = float(np.median([cost["training_batch"] / cost["inference_batch"] for cost in costs.values()]))
    return [
        f"A training step (forward, backward, optimizer) costs {step:.1f} times the inference in the median network; "
        f"the dearest is {_label(slow)} with {1e3 * costs[slow]['training_batch']:.3g} ms for each image. An image in "
        f"a batch of {BATCH_SIZE} is cheaper than one alone, most of all in {_label(gain)}, by a factor of "
        f"{ratio:.1f}: what a call costs apart from arithmetic is shared by the batch."]


def memory(results: Results) -> Paragraphs:
    """To the picture of memory."""
    costs = results.costs
    most = max(costs, key=lambda name: costs[name]["peak_bytes"])
    over = [name for name in costs if BATCH_SIZE * costs[name]["activation_bytes"] > 4 * costs[name]["parameters"]]
    return [
        "Training keeps the activations of all layers for the backward pass. The peak is what the arrays of one step "
        "took beside the weights and the optimizer's state: activations, gradients, and what layers keep for "
        f"themselves; {_label(most)} takes the most, {costs[most]['peak_bytes'] / 1e6:.1f} MB. The count adds up the "
        "outputs of all layers; those that no backward pass reads, such as batch normalisation's before a ReLU, are "
        "freed or overwritten at once, so that the peak can be below it.",
        f"In {len(over)} of {len(costs)} networks the activations of {BATCH_SIZE} images are larger than the weights: "
        "there the size of the batch and of the images decides how much memory is needed, not the parameters."]


def curves(results: Results, trained: list[str]) -> Paragraphs:
    """To the learning curves of all."""
    def first(name: str) -> float:
        return float(results.runs[name][0]["history"][0]["val_accuracy"])

    def last(name: str) -> float:
        return float(results.runs[name][0]["history"][-1]["val_accuracy"])

    quick, slow = max(trained, key=first), min(trained, key=first)
    val = len(results.dataset.val or ())
    return [
        f"Accuracy on the {val:,} validation images, which took no part in the training, after each epoch; the other "
        "networks are grey. After the first epoch "
        f"{_label(quick)} is ahead with {first(quick):.1%} and {_label(slow)} is last with {first(slow):.1%}; in the "
        f"end they have {last(quick):.1%} and {last(slow):.1%}."]


_PAIR_INTRODUCTIONS = {
    "shortcuts": "Both networks have 20 layers and the same convolutions; only ResNet-20 adds the input of each block "
                 "to its output, aˡ⁺² = relu(zˡ⁺² + aˡ) (He et al. 2016), which gives the gradient a way around "
                 "the layers.",
    "heads": "GoogLeNet's auxiliary classifiers look at two hidden layers; their losses count 0.3 each in training, "
             "and they are left out afterwards (Szegedy et al. 2015). The idea is that early layers get a stronger "
             "gradient.",
}


def pair(results: Results, key: str) -> Paragraphs:
    """To a pair of networks that differ in one thing."""
    names = PAIRS[key]
    runs = {name: [run for run in results.runs[name] if "diverged" not in run] for name in names}
    words = [f"{_PAIR_INTRODUCTIONS[key]} Lines are the mean of {len(results.runs[names[0]])} seeds, bands reach from "
             "the lowest to the highest."]
    without, with_ = (results.runs[name] for name in names)
    diverged = [_label(name) for name in names if len(runs[name]) < len(results.runs[name])]
    if diverged:
        words.append(f"Runs of {' and '.join(diverged)} diverged, and are left out.")
    if not all(runs.values()):
        return words
    both = [(b["accuracy"], a["accuracy"]) for a, b in zip(without, with_, strict=True)
            if "diverged" not in a and "diverged" not in b]
    better, worse = sum(b > a for b, a in both), sum(b < a for b, a in both)

    def mean(name: str, value: Any) -> str:
        return f"{float(np.mean([value(run) for run in runs[name]])):.2%}"

    label = {name: _label(name) for name in names}
    words.append(
        f"Mean test accuracy: {label[names[1]]} {mean(names[1], lambda r: r['accuracy'])}, "
        f"{label[names[0]]} {mean(names[0], lambda r: r['accuracy'])}. {label[names[1]]} is better with {better} of "
        f"{_count(len(both), 'seed')}, worse with {worse}. On the training images of the last epoch: "
        f"{mean(names[1], lambda r: r['history'][-1]['train_accuracy'])} against "
        f"{mean(names[0], lambda r: r['history'][-1]['train_accuracy'])}.")
    words.append(_verdict(key, better, worse, len(both), results))
    return words


def _verdict(key: str, better: int, worse: int, count: int, results: Results) -> str:
    without, with_ = (_label(name) for name in PAIRS[key])
    last = {name: float(np.mean([run["history"][-1]["train_accuracy"] for run in results.runs[name]
                                 if "diverged" not in run])) for name in PAIRS[key]}
    if better == count:
        verdict = f"{with_} beats {without} with every seed"
        if key == "shortcuts" and last[PAIRS[key][1]] > last[PAIRS[key][0]]:
            return (f"{verdict}, on the training images too: it is not that the plain network overfits, it is harder "
                    f"to optimise, here within {_count(results.epochs, 'epoch')}, as the paper found.")
        return f"{verdict}."
    if worse == count:
        return f"{with_} is worse than {without} with every seed of this comparison."
    return f"The seeds disagree, so this comparison does not show which of {without} and {with_} is better."


def reductions(results: Results) -> Paragraphs:
    """Naive against reduced inception modules."""
    naive, reduced = results.costs["googlenet_naive"], results.costs["googlenet"]
    return [
        "A 1x1 convolution before a 3x3 or 5x5 one reduces the channels that the dear one has to read. The same nine "
        f"modules need {short(naive['macs'])} MACs and {short(naive['parameters'])} parameters without reductions, "
        f"{short(reduced['macs'])} and {short(reduced['parameters'])} with them: factors of "
        f"{naive['macs'] / reduced['macs']:.1f} and {naive['parameters'] / reduced['parameters']:.1f}.",
        f"Measured, a training step takes {1e3 * naive['training_batch']:.3g} ms for each image without and "
        f"{1e3 * reduced['training_batch']:.3g} ms with them, a factor of "
        f"{naive['training_batch'] / reduced['training_batch']:.1f}. Test accuracy: "
        f"{_test(results, 'googlenet_naive'):.2%} without, {_test(results, 'googlenet'):.2%} with.",
    ]


def few_images(results: Results) -> Paragraphs:
    """To the curves over the size of the training set."""
    sizes = sorted(results.few)
    mean = {n: {name: float(np.mean(values)) for name, values in results.few[n]["accuracy"].items()} for n in sizes}
    least, most = ({name: mean[n][name] for name in mean[n]} for n in (sizes[0], sizes[-1]))
    best = [max(values, key=lambda name: values[name]) for values in (least, most)]
    return [
        f"Test accuracy after training on few images, the mean of {FEW_REPEATS} draws, and a line from the lowest to "
        f"the highest. The best with {sizes[0]} images: {best[0]}, {least[best[0]]:.1%}; with {sizes[-1]:,}: "
        f"{best[1]}, {most[best[1]]:.1%}.",
        "Moving the training images at random by up to 1/14 of their size changes LeNet-5 from "
        f"{least['LeNet-5']:.1%} to {least['LeNet-5 with shifts']:.1%} with the fewest images and from "
        f"{most['LeNet-5']:.1%} to {most['LeNet-5 with shifts']:.1%} with the most. LeNet-5 takes at least "
        f"{FEW_STEPS} steps of {BATCH_SIZE} images and {FEW_EPOCHS} epochs; the other methods are scikit-learn's on "
        "the pixels, with settings that are the same everywhere and not tuned.",
    ]


def confusions(results: Results, best: str, worst: str) -> Paragraphs:
    """To the two confusion matrices."""
    def largest(name: str) -> str:
        matrix = np.array(results.runs[name][0]["confusion"])
        np.fill_diagonal(matrix, 0)
        row, column = np.unravel_index(int(matrix.argmax()), matrix.shape)
        count = int(matrix[row, column])
        if not count:
            return f"{_label(name)} makes no error"
        return f"{_label(name)} takes {row} for {column} most often, {_count(count, 'time')}"

    return [
        "Rows are the true classes, columns what the network says; numbers off the diagonal are errors. Of the most "
        f"and the least accurate network: {largest(best)}; {largest(worst)}."]


def method(results: Results) -> Paragraphs:
    """How it was done, for those who want to repeat it."""
    return [
        f"AdamW with the learning rates above, which rise during a twentieth of the steps and fall along a cosine to "
        f"0, weight decay 0.01, batches of {BATCH_SIZE}, training images moved at random by up to 1/14 of their size. "
        "Nothing was chosen by the test images; the validation images only draw the curves. One learning rate for each "
        "network and few epochs: with more tuning each could be better, and their order another.",
        "Times are the fastest of several runs, measured one network after the other before the trainings; memory is "
        "that of NumPy's arrays during a step, traced, without the workspace of the compiled part. With the same seed "
        "the trainings give the same bits on the same machine, for any number of threads; times vary.",
    ]
