"""The nearest motif is exact, whatever way it is found."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kcomplex.errors import WeightsError
from kcomplex.motifs import nearest as search
from kcomplex.motifs.nearest import distinct, nearest, squared_distances


def brute_force(rows, motifs, real=None):
    """The first smallest sum of squares, added from the first entry to the last."""
    best = []
    for index, row in enumerate(rows):
        length = rows.shape[1] if real is None else real[index]
        sums = np.zeros(len(motifs))
        for column in range(length):
            sums += (row[column] - motifs[:, column]) ** 2
        best.append(np.argmin(sums))
    return np.array(best, dtype=np.intp)


def engines():
    return [
        pytest.param(search._search_tree, id="tree"),
        pytest.param(search._search_products, id="products"),
    ]


@st.composite
def rows_and_motifs(draw):
    size = draw(st.integers(1, 5))
    # Few values make many ties; an offset, a wide range and far blocks are hard for products.
    values = draw(
        st.sampled_from(
            [
                st.sampled_from([-1.0, 0.0, 1.0]),
                st.floats(-1, 1, width=32).map(lambda x: 1000 + x / 1000),
                st.floats(-(2.0**100), 2.0**100, width=32),
                st.floats(-1e140, 1e140),
            ]
        )
    )
    motifs = draw(hnp.arrays(np.float64, (draw(st.integers(2, 12)), size), elements=values))
    far = draw(st.sampled_from([0.0, 1e8]))
    rows = draw(hnp.arrays(np.float64, (draw(st.integers(1, 12)), size), elements=values)) + far
    return rows, motifs


@settings(max_examples=80, deadline=None)
@given(rows_and_motifs(), st.data())
def test_nearest_is_brute_force(case, data):
    rows, motifs = case
    real = data.draw(hnp.arrays(np.intp, len(rows), elements=st.integers(1, rows.shape[1])))
    np.testing.assert_array_equal(nearest(rows, motifs), brute_force(rows, motifs))
    np.testing.assert_array_equal(nearest(rows, motifs, real), brute_force(rows, motifs, real))


@pytest.mark.parametrize("engine", engines())
@settings(max_examples=80, deadline=None)
@given(case=rows_and_motifs())
def test_each_engine_is_brute_force_on_distinct_motifs(engine, case):
    rows, motifs = case
    motifs = motifs[distinct(motifs)]
    if len(motifs) > 1:
        np.testing.assert_array_equal(engine(rows, motifs, 1), brute_force(rows, motifs))


@pytest.mark.parametrize("engine", engines())
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_each_engine_is_brute_force_on_integers_full_of_ties(engine, size):
    generator = np.random.default_rng(size)
    motifs = generator.integers(-2, 3, (200, size)).astype(float)
    motifs = motifs[distinct(motifs)]
    rows = generator.integers(-3, 4, (500, size)).astype(float)
    np.testing.assert_array_equal(engine(rows, motifs, 1), brute_force(rows, motifs))


@pytest.mark.parametrize("size", [3, 24])
def test_pieces_do_not_matter(size, monkeypatch):
    generator = np.random.default_rng(0)
    rows = generator.integers(-2, 3, (700, size)).astype(float)
    motifs = generator.integers(-2, 3, (600, size)).astype(float)
    whole = nearest(rows, motifs)
    monkeypatch.setattr(search, "_CHUNK", 1000)
    for workers in (1, 2, -1):
        np.testing.assert_array_equal(nearest(rows, motifs, workers=workers), whole)


def test_products_give_way_to_double_precision_where_single_cannot_tell():
    rows = np.random.default_rng(0).normal(1e5, 1e-4, (300, 20))
    rows[0] = -1e5
    motifs = rows[:60]
    found = nearest(rows, motifs)
    np.testing.assert_array_equal(found, brute_force(rows, motifs))
    np.testing.assert_array_equal(found[:60], np.arange(60))


def test_equal_motifs_are_used_by_the_first():
    motifs = np.array([[1.0, 2.0], [0.0, -0.0], [1.0, 2.0], [-0.0, 0.0]])
    assert nearest(np.array([[1.0, 2.0], [0.1, 0.0]]), motifs).tolist() == [0, 1]


def test_without_blocks_nothing_is_found():
    assert nearest(np.zeros((0, 3)), np.ones((2, 3))).shape == (0,)


def test_without_motifs_it_refuses():
    with pytest.raises(WeightsError, match="no motif"):
        nearest(np.zeros((2, 3)), np.zeros((0, 3)))


def test_distinct_keeps_the_lowest_index_and_order():
    rows = np.array([[2.0, 1.0], [0.0, 0.0], [2.0, 1.0], [-0.0, 0.0], [1.0, 1.0]])
    assert distinct(rows).tolist() == [0, 1, 4]


def test_squared_distances_leave_padding_out():
    rows, motifs = np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([[0.0, 0.0], [0.0, 0.0]])
    assert squared_distances(rows, motifs, np.array([2, 1])).tolist() == [5.0, 1.0]
