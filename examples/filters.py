"""Box, edge, blur and sharpen: the filters of a first course on images, as convolutions of a picture.

    pip install "fastconv[demo]"
    python filters.py PICTURE [OUT.png]
"""

import argparse

import numpy as np
from PIL import Image

from fastconv.demo import FILTERS, filter_image
from fastconv.plots import pictures

parser = argparse.ArgumentParser(description="Apply the classical filters to a picture.")
parser.add_argument("picture", help="any file that pillow reads")
parser.add_argument("out", nargs="?", default="filters.png", help="where to draw the results (%(default)s)")
args = parser.parse_args()

with Image.open(args.picture) as file:
    picture = np.asarray(file.convert("RGB"), np.float32) / 255

results = {"picture": picture}
for name, kernel in FILTERS.items():
    answer = filter_image(picture, kernel)
    # Filters whose weights add up to 0 answer with differences of either sign: draw 0 as grey.
    results[name] = answer if kernel.sum() > 0.5 else 0.5 + answer.mean(axis=2)
pictures(results, args.out, "Filters by convolution")
print(args.out)
