"""Backends are modules with the same functions: what one takes, the other takes."""

import inspect

import pytest

from fastconv.backends import cpu, reference

# NumPy serves normalisation everywhere; its references are oracles only.
ORACLES = {
    "batch_norm",
    "batch_norm_grad",
    "batch_statistics",
    "local_response_norm",
    "local_response_norm_grad",
}


def positional(function):
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def keywords(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("name", sorted(set(reference.__all__) - ORACLES))
def test_backends_have_the_same_signatures(name):
    ours, theirs = getattr(reference, name), getattr(cpu, name)
    assert positional(ours) == positional(theirs)
    assert positional(ours)[0][0] == "problem"
    # the compiled backend may take more by keyword: a forced algorithm, a fused activation
    assert keywords(ours).items() <= keywords(theirs).items()


def test_the_lists_are_complete():
    assert set(cpu.__all__) == set(reference.__all__) - ORACLES
