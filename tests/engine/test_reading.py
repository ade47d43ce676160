"""Sums of relevance: what is kept between forward, backward and result, and for how long."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from tl_contrastive_lrp.engine.reading import BY_HEAD, BY_NEURON, BY_POSITION, RelevanceSums


@pytest.mark.parametrize(
    ("pattern", "shape", "kept"),
    [
        (BY_POSITION, (1, 3, 5), (3,)),
        (BY_NEURON, (1, 3, 5), (3, 5)),
        (BY_HEAD, (1, 3, 2, 5), (2, 3)),
    ],
)
def test_what_gets_no_gradient_is_zero_in_the_shape_of_the_last_forward(
    pattern: str, shape: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    sums = RelevanceSums()
    sums.add("here", pattern)
    (reading,) = sums.readings
    assert sums.take() == {}, "nothing has run"
    assert reading.fired is not None
    reading.fired(torch.ones(1, 7, *shape[2:]))
    reading.fired(torch.ones(shape))
    zero = sums.take()["here"]
    assert zero.dtype == torch.float32
    assert torch.equal(zero, torch.zeros(kept))
    x, g = torch.randn(shape), torch.randn(shape)
    reading.sink(x, g)
    axes = {BY_POSITION: (0, 2), BY_NEURON: (0,), BY_HEAD: (0, 3)}[pattern]
    wanted = (x.double() * g.double()).sum(axes)
    got = sums.take()["here"].double()
    assert torch.allclose(got.T if pattern == BY_HEAD else got, wanted, atol=1e-6)
    assert torch.equal(sums.take()["here"], torch.zeros(kept)), "each backward is taken once"
    sums.clear()
    assert sums.take() == {}


def test_sums_are_released_without_the_garbage_collector() -> None:
    sums = RelevanceSums()
    sums.add("here", BY_POSITION)
    sums.add_bias("there", torch.ones(5))
    alive = weakref.ref(sums)
    gc.disable()
    try:
        del sums
        assert alive() is None
    finally:
        gc.enable()
