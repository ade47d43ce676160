"""The k largest, against slow sorts: ties go to the first, and nothing else decides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from support.graphs import given

from tl_contrastive_lrp.render.ranking import (
    extremes,
    largest_ascending,
    largest_first,
    largest_mask,
)

SIZES = st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]))


def slow(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[: max(count, 0)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(SIZES, st.integers(-1, 12))
def test_the_largest_equal_a_slow_sort(dtype: type, size: list[float], count: int) -> None:
    values, expected = np.array(size, dtype=dtype), slow(size, count)
    assert np.flatnonzero(largest_mask(values, count)).tolist() == sorted(expected)
    ascending = largest_ascending(values, count).tolist()
    assert sorted(ascending) == sorted(expected)
    assert ascending == sorted(expected, key=lambda i: (size[i], i))
    if count >= 0:
        assert largest_first(values, count).tolist() == expected


@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0])), st.integers(0, 6))
def test_extremes_leave_zeros_out(values: list[float], count: int) -> None:
    positive, negative = extremes(np.array(values), count)
    order = slow(values, len(values))
    assert positive == [i for i in order if values[i] > 0][:count]
    assert negative == [i for i in reversed(order) if values[i] < 0][:count]
