"""Networks from the literature, each a function that returns a layer."""

from fastconv.models.lenet import lenet5

__all__ = ["lenet5"]
