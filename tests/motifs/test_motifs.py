"""Blocks of weights and banks of motifs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcomplex.errors import SpecError, WeightsError
from kcomplex.motifs.blocks import blocks_of, draw_motifs, mosaic_bits, motif_count, split_rows, update_motifs
from kcomplex.motifs.nearest import nearest, squared_distances
from tests.golden import VENDORED


def test_tensors_are_padded_each_at_its_own_end():
    blocks = blocks_of([np.arange(1.0, 6.0).reshape(5, 1), np.zeros((0, 3)), np.array(7.0)], 3)
    assert blocks.rows.tolist() == [[1, 2, 3], [4, 5, 0], [7, 0, 0]]
    assert blocks.real.tolist() == [3, 2, 1]
    assert [piece.tolist() for piece in split_rows(blocks.rows, blocks.sizes)] == [[1, 2, 3, 4, 5], [], [7]]


@given(st.lists(st.integers(0, 20), max_size=5), st.integers(1, 7))
def test_split_undoes_blocks(sizes, block_size):
    tensors = [np.arange(size, dtype=np.float32) + 1 for size in sizes]
    blocks = blocks_of(tensors, block_size)
    assert len(blocks.rows) == sum(-(-size // block_size) for size in sizes)
    for tensor, piece in zip(tensors, split_rows(blocks.rows, blocks.sizes), strict=True):
        np.testing.assert_array_equal(tensor, piece)
    assert blocks.real.sum() == sum(sizes)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_without_a_nearest_motif_are_refused_with_their_place(value, dtype):
    wrong = np.zeros((2, 3), dtype)
    wrong[1, 1] = value
    with pytest.raises(WeightsError, match=r"'second' of shape \(2, 3\).* flat index 4"):
        blocks_of([np.ones(3, dtype), wrong], 2, ["first", "second"])


def test_values_whose_squares_overflow_are_refused():
    with pytest.raises(WeightsError, match="beyond"):
        blocks_of([np.array([1e200])], 2)


def test_blocks_have_at_least_one_weight():
    with pytest.raises(SpecError, match="at least 1"):
        blocks_of([np.ones(3)], 0)


def test_published_capacities():
    table = np.load(VENDORED / "momos_capacity_table.npz")
    counts = [
        motif_count(float(capacity), int(blocks), reference=True)
        for capacity, blocks in zip(table["capacity"], table["m_blocks"], strict=True)
    ]
    np.testing.assert_array_equal(counts, table["k"])


@pytest.mark.parametrize(("capacity", "published", "ours"), [(0.29, 28, 29), (0.57, 56, 57), (0.58, 57, 58)])
def test_capacity_rounds_down_without_losing_a_whole_motif(capacity, published, ours):
    assert motif_count(capacity, 100) == ours
    assert motif_count(capacity, 100, reference=True) == published


def test_capacity_is_at_least_one_motif_and_at_most_all_blocks():
    assert motif_count(1e-6, 100) == 1
    assert motif_count(1.0, 100) == 100


def test_relative_algorithmic_compression_is_the_published_one():
    cases = np.load(VENDORED / "rac_cases.npz")
    ours = [
        n * q / mosaic_bits(int(k), int(s), int(q), int(m))
        for n, m, s, k, q in zip(*(cases[key] for key in "nmskq"), strict=True)
    ]
    np.testing.assert_allclose(ours, cases["rac"], rtol=1e-12)


def test_drawn_motifs_are_distinct_whole_blocks_in_the_permutations_order():
    blocks = blocks_of([np.array([0, 0, 1, 1, 1, 1, 2, 2, 3])], 2)
    permutation = np.array([4, 2, 0, 1, 3])
    assert draw_motifs(blocks, 3, permutation).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert draw_motifs(blocks, 9, permutation).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert draw_motifs(blocks, 2, permutation, force_zero=False).tolist() == [[1, 1], [0, 0]]
    published = draw_motifs(blocks, 9, permutation, reference=True)
    assert published.tolist() == [[0, 0], [3, 0], [1, 1], [0, 0], [1, 1]]


def test_a_padded_tail_is_a_motif_only_where_there_is_no_other_block():
    blocks = blocks_of([np.array([3.0]), np.array([4.0])], 2)
    assert draw_motifs(blocks, 2, np.array([1, 0]), force_zero=False).tolist() == [[4, 0], [3, 0]]


def test_motifs_move_to_the_mean_of_real_entries():
    blocks = blocks_of([np.array([1.0, 2.0, 3.0, 6.0, 5.0])], 2)
    motifs = np.array([[0.0, 0.0], [2.0, 3.0]])
    updated = update_motifs(blocks, motifs, np.array([1, 1, 1]))
    assert updated.tolist() == [[0.0, 0.0], [3.0, 4.0]]
    assert motifs.tolist() == [[0.0, 0.0], [2.0, 3.0]]


def test_unused_motifs_move_to_distinct_blocks_that_fit_worst():
    blocks = blocks_of([np.array([1.0, 1.0, 9.0, 9.0, 9.0, 9.0, 5.0, 5.0])], 2)
    motifs = np.array([[0.0, 0.0], [1.0, 1.0], [70.0, 70.0], [80.0, 80.0]])
    updated = update_motifs(blocks, motifs, nearest(blocks.rows, motifs), force_zero=True)
    assert updated[2:].tolist() == [[9.0, 9.0], [5.0, 5.0]]


@given(st.integers(0, 1000))
def test_an_update_never_adds_distortion(seed):
    generator = np.random.default_rng(seed)
    blocks = blocks_of([generator.normal(size=61), generator.normal(size=7)], 3)
    motifs = draw_motifs(blocks, 6, generator.permutation(len(blocks.rows)))
    before = nearest(blocks.rows, motifs, blocks.real)
    updated = update_motifs(blocks, motifs, before)
    after = nearest(blocks.rows, updated, blocks.real)
    assert squared_distances(blocks.rows, updated[after], blocks.real).sum() <= squared_distances(
        blocks.rows, motifs[before], blocks.real
    ).sum() * (1 + 1e-12)
    np.testing.assert_array_equal(updated[0], 0)
