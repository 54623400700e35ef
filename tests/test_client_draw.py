"""Which images are the client's: exact sizes, closed forms of the shares, nested draws."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.client_draw import (
    ClientDraw,
    alike_rows,
    classes_of,
    client_rows,
    counts_by_share,
    dirichlet_shares,
    drawn_rows,
)

CLASSES = [str(k) for k in range(10)]


def codes_of(*counts, seed=0):
    codes = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(seed).permutation(codes)


def draw(codes, num_classes=10, **options):
    return drawn_rows(ClientDraw(**options), codes, CLASSES[:num_classes], "domain 'x'")


def refusal(call):
    with pytest.raises(ValueError, match=" ") as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("concentration", [0.1, 1.0, 10.0])
def test_shares_have_the_moments_of_the_dirichlet_distribution(concentration):
    num, classes = 4000, 5
    shares = np.stack([dirichlet_shares(concentration, classes, seed) for seed in range(num)])
    assert np.allclose(shares.sum(axis=1), 1)
    variance = (classes - 1) / (classes**2 * (classes * concentration + 1))
    # Standard errors: of a mean √(var / num); of a variance, whose 4th moment is bounded, < 5%.
    assert np.abs(shares.mean(axis=0) - 1 / classes).max() < 4.5 * (variance / num) ** 0.5
    assert shares.var(axis=0) == pytest.approx(variance, rel=0.15)


def test_shares_of_a_vanishing_concentration_are_one_class():
    shares = dirichlet_shares(1e-300, 4, 0)
    assert sorted(shares) == [0, 0, 0, 1]


def test_counts_converge_to_the_drawn_shares():
    shares = dirichlet_shares(0.5, 10, 3)
    for size in (100, 10_000):
        codes = codes_of(*[size] * 10)
        rows = draw(codes, size=size, imbalance=0.5, seed=3)
        found = np.bincount(codes[rows], minlength=10) / size
        assert np.abs(found - shares).max() < 1 / size  # the largest remainder's bound


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8),
    st.integers(0, 50),
    st.sampled_from([1e-3, 0.1, 1.0, 100.0]),
    st.data(),
)
def test_sizes_are_exact_and_no_class_gives_more_than_it_has(available, seed, alpha, data):
    available = np.array(available)
    size = data.draw(st.integers(0, int(available.sum())))
    counts = counts_by_share(dirichlet_shares(alpha, len(available), seed), available, size)
    assert counts.sum() == size
    assert (counts <= available).all()
    assert (counts >= 0).all()


def test_a_class_of_too_few_gives_all_and_the_others_share_the_rest_in_proportion():
    counts = counts_by_share(np.array([0.6, 0.3, 0.1]), np.array([10, 100, 100]), 50)
    assert counts.tolist() == [10, 30, 10]
    assert counts_by_share(np.array([1.0, 0, 0]), np.array([2, 4, 4]), 8).tolist() == [2, 3, 3]


def test_without_a_size_as_many_as_the_shares_allow():
    assert counts_by_share(np.array([0.5, 0.5]), np.array([3, 8]), None).tolist() == [3, 3]
    assert counts_by_share(np.array([0.2, 0.8, 0]), np.array([9, 8, 5]), None).tolist() == [2, 8, 0]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=6), st.integers(0, 50))
def test_alike_rows_keep_the_shares_to_one_image(available, seed):
    shares = dirichlet_shares(0.7, len(available), seed)
    codes = codes_of(*available)
    counts = np.bincount(codes[alike_rows(shares, codes, 0)], minlength=len(available))
    assert (np.abs(counts - shares * counts.sum()) < 1).all()
    assert (counts <= available).all()


def test_exact_sizes_without_imbalance():
    codes = codes_of(*[30] * 10)
    assert len(draw(codes, size=37)) == 37
    assert len(draw(codes, fraction=0.5)) == 150
    assert len(draw(codes)) == 300
    rows = draw(codes, size=37)
    assert (np.diff(rows) > 0).all()


def test_a_default_size_is_all_where_there_are_fewer():
    codes = codes_of(*[30] * 10)
    assert len(draw(codes, at_most=37)) == 37
    assert len(draw(codes, at_most=1000)) == 300
    assert len(draw(codes, at_most=1000, fraction=0.1)) == 30
    assert len(draw(codes, at_most=5, size=7)) == 7


def test_a_draw_depends_on_its_seed_alone_and_smaller_ones_are_nested():
    codes = codes_of(*[30] * 10)
    assert (draw(codes, size=40) == draw(codes, size=40)).all()
    assert set(draw(codes, size=40)) < set(draw(codes, size=80))
    assert set(draw(codes, size=40)) != set(draw(codes, size=40, seed=1))
    unequal = {"imbalance": 0.5, "size": 60}
    assert (draw(codes, **unequal) == draw(codes, **unequal)).all()
    assert set(draw(codes, **unequal)) != set(draw(codes, **unequal, seed=1))


def test_what_the_client_does_not_get_measures_unless_told_otherwise():
    codes = codes_of(*[30] * 10)
    rows, test_rows = client_rows(ClientDraw(size=40), codes, CLASSES, "x")
    assert sorted([*rows, *test_rows]) == list(range(300))
    rows, test_rows = client_rows(ClientDraw(size=40, imbalance=0.5), codes, CLASSES, "x")
    assert not set(rows) & set(test_rows)
    counts = np.bincount(codes[rows], minlength=10)
    wanted = counts / 40 * len(test_rows)
    assert np.abs(np.bincount(codes[test_rows], minlength=10) - wanted).max() < 1
    with pytest.raises(ValueError, match="no image of x is left to test on"):
        client_rows(ClientDraw(), codes, CLASSES, "x")


def test_images_that_are_out_are_never_drawn():
    codes = codes_of(*[30] * 10)
    codes[:150] = -1
    for options in ({}, {"size": 70}, {"imbalance": 1.0}):
        assert draw(codes, **options).min() >= 150


def test_a_class_that_the_domain_lacks_gets_no_share():
    codes = codes_of(20, 0, 20)
    rows = draw(codes, 3, imbalance=1.0, size=20)
    assert Counter(codes[rows].tolist()).total() == 20
    assert len(draw(codes, 3, imbalance=1.0)) > 0


def test_what_cannot_be_drawn_is_one_line():
    codes = codes_of(5, 0, 5)
    assert "domain 'x' has 10 images" in refusal(lambda: draw(codes, 3, size=11))
    text = refusal(lambda: draw(codes, 3, size=11, classes=("0",)))
    assert "has no image of class '1'" in text
    text = refusal(lambda: drawn_rows(ClientDraw(size=6, classes=("0",)), codes_of(5), ["0"], "x"))
    assert "x has 5 images of the classes 0" in text
    assert "is none" in refusal(lambda: draw(codes, 3, fraction=0.01))
    assert "no image of the classes" in refusal(lambda: draw(np.full(4, -1), 3))
    assert "give one" in refusal(lambda: ClientDraw(size=3, fraction=0.5))


def test_classes_keep_the_familys_order_and_unknown_ones_get_a_suggestion():
    known = ["airplane", "bird", "cat"]
    assert classes_of(ClientDraw(), known) == known
    assert classes_of(ClientDraw(classes=("cat", "airplane")), known) == ["airplane", "cat"]
    assert "did you mean bird?" in refusal(lambda: classes_of(ClientDraw(classes=("brid",)), known))
    assert "twice" in refusal(lambda: classes_of(ClientDraw(classes=("cat", "cat")), known))
