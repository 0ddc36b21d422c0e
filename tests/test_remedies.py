"""Remedies against collisions: best paths against brute force, budgets kept, capacities kept, balance, determinism, bad input."""
import subprocess
import sys
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from grnb.ids.collisions import birthday, effective_space, measure
from grnb.ids.make import collisions, make_ids
from grnb.ids.remedies import balanced, reassign, sinkhorn, sinkhorn_last
from grnb.tokenizer.paths import best_paths
from grnb.tokenizer.encode import residual_encode
from grnb.tokenizer.kmeans import ResidualKMeans

fast = settings(max_examples=30, deadline=None)


@st.composite
def cases(draw, most=60):
    "Rows with duplicates and clusters, and codebooks of mixed sizes"
    g = np.random.default_rng(draw(st.integers(0, 2**20)))
    D, sizes = draw(st.integers(1, 6)), draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    x = g.normal(size=(draw(st.integers(1, most)), D)).astype(np.float32)
    if draw(st.booleans()): x = x[g.integers(max(1, len(x) // 4), size=len(x))]                    # duplicates
    return x, [(g.normal(size=(K, D)) / (l + 1)).astype(np.float32) for l, K in enumerate(sizes)]


def errors_of(x, codes, books): return ((x - sum(b[codes[:, l].astype(int)] for l, b in enumerate(books))) ** 2).sum(1, dtype=np.float64)


@fast
@given(cases(most=12))
def test_a_full_beam_lists_all_paths_in_order(case):
    x, books = case
    every = np.array(list(product(*[range(len(b)) for b in books])))
    codes, errors = best_paths(x, books, 10**6)
    assert codes.shape == (len(x), len(every), len(books))
    for i, row in enumerate(x):
        assert sorted(map(tuple, codes[i].tolist())) == sorted(map(tuple, every.tolist()))
        true = errors_of(np.repeat(row[None], len(every), 0), codes[i], books)
        np.testing.assert_allclose(errors[i], true, atol=1e-4)
        assert (np.diff(errors[i]) >= 0).all()


@fast
@given(cases(), st.integers(1, 9))
def test_a_beam_is_that_of_a_plain_loop(case, width):
    x, books = case
    codes, errors = best_paths(x, books, width, batch=7)
    for i, row in enumerate(x.astype(np.float64)):
        paths = [()]
        for l, b in enumerate(books):
            error = lambda p: ((row - sum(books[j][c].astype(np.float64) for j, c in enumerate(p))) ** 2).sum()
            paths = sorted((p + (c,) for p in paths for c in range(len(b))), key=error)[:width]
        got = errors_of(np.repeat(x[i:i + 1], len(codes[i]), 0), codes[i], books)
        want = [error(p) for p in paths]
        assert len({tuple(c) for c in codes[i].tolist()}) == codes.shape[1] and len(want) <= codes.shape[1] <= width
        np.testing.assert_allclose(got[:len(want)], want, atol=1e-4)                                # ties may swap paths, not errors
        np.testing.assert_allclose(errors[i], got, atol=1e-4)


@fast
@given(cases())
def test_width_one_is_the_greedy_code(case):
    x, books = case
    codes = best_paths(x, books, 1)[0][:, 0]
    np.testing.assert_allclose(errors_of(x, codes, books), errors_of(x, residual_encode(x, books), books), atol=1e-4)


@fast
@given(cases(), st.sampled_from([0., .1, 1., 10.]), st.integers(1, 20))
def test_reassign_keeps_its_promises(case, budget, width):
    x, books = case
    sizes = tuple(len(b) for b in books)
    before = residual_encode(x, books)
    r = reassign(x, books, budget, width)
    own, now, count = errors_of(x, before, books), errors_of(x, r.codes, books), Counter(map(tuple, r.codes.tolist()))
    moved = (before != r.codes).any(1)
    assert moved.sum() == r.moved and (now <= own * (1 + budget) + 1e-4).all()
    assert all(count[tuple(c)] == 1 for c in r.codes[moved].tolist())                              # a free path is free
    assert r.left == len(x) - len(count) and r.moved + r.left == len(x) - len(set(map(tuple, before.tolist())))
    for bucket in set(map(tuple, before.tolist())):                                                # the nearest keeps the ID, ties by row
        rows = np.flatnonzero((before == bucket).all(1))
        keeper = min(rows, key=lambda i: (round(own[i], 4), i))
        assert not moved[rows].all() and (not moved[keeper] or np.isclose(own[rows[~moved[rows]]].min(), own[keeper], atol=1e-3))
    assert collisions(make_ids(r.codes, sizes)).rate <= collisions(make_ids(before, sizes)).rate
    if r.moved: assert np.isclose(r.max_extra, (now / np.maximum(own, 1e-30) - 1)[moved].max(), rtol=1e-2, atol=1e-2) or own[moved].min() < 1e-3
    assert np.isclose(r.extra * max(own.sum(), 1e-30), (now - own).sum(), atol=1e-3)


def test_what_stays_has_no_free_path_in_reach():
    "Of items that stay, none has a free path within budget among those it looked at."
    g = np.random.default_rng(0)
    x, books = g.normal(size=(400, 4)).astype(np.float32), [g.normal(size=(8, 4)).astype(np.float32), .5 * g.normal(size=(8, 4)).astype(np.float32)]
    r = reassign(x, books, .5, width=10)
    taken, own = set(map(tuple, r.codes.tolist())), errors_of(x, residual_encode(x, books), books)
    stayed = [i for i, n in enumerate(Counter(map(tuple, r.codes.tolist()))[tuple(c)] for c in r.codes.tolist()) if n > 1]
    codes, errors = best_paths(x[stayed], books, 10)
    free = np.array([[tuple(c) not in taken for c in row] for row in codes.tolist()])
    assert len(stayed) > 50 and not (free & (errors < 1.5 * own[stayed][:, None] - 1e-3)).any()


def test_reassign_starts_from_given_codes_and_never_moves_the_unique():
    g = np.random.default_rng(1)
    x, books = g.normal(size=(30, 3)).astype(np.float32), [g.normal(size=(40, 3)).astype(np.float32)] * 2
    start = np.c_[np.arange(30), np.arange(30)]
    r = reassign(x, books, 5., codes=start)
    assert (r.codes == start).all() and r[1:] == (0, 0, 0., 0., 0.)


def test_equal_items_and_zero_error_stay():
    r = reassign(np.ones((6, 3)), [np.ones((1, 3)), np.zeros((4, 3))], 1.)
    assert (r.moved, r.left) == (3, 2)                                          # three other paths are just as near, and free
    r = reassign(np.zeros((5, 2)), [np.zeros((1, 2)), np.float32([[1, 0], [0, 0]])], .5)
    assert (r.moved, r.left) == (0, 4)
    assert reassign(np.zeros((0, 2)), [np.ones((3, 2))]).moved == 0


def test_long_ids_are_told_apart():
    "More than 64 bits: the hash table compares codes, not a packed word."
    g = np.random.default_rng(2)
    x, books = g.normal(size=(200, 3)).astype(np.float32), [g.normal(size=(300, 3)).astype(np.float32) * .6**l for l in range(9)]
    r = reassign(np.repeat(x, 2, 0), books, 1.)
    assert r.codes.dtype == np.uint16 and collisions(make_ids(r.codes, (300,) * 9)).largest <= 2 and r.moved + r.left == 200


# --- balance

@fast
@given(cases(), st.sampled_from([1., 1.5, 3.]), st.data())
def test_no_code_is_over_its_capacity(case, capacity, data):
    x, books = case
    L = len(books)
    levels = data.draw(st.sampled_from([None, (0,), (-1,), tuple(range(L))]))
    r = balanced(x, books, capacity, levels, batch=13)
    limited = set(range(L)) if levels is None else {l % L for l in levels}
    for l in limited:
        parents = Counter(map(tuple, r.codes[:, :l].tolist()))
        for path, n in Counter(map(tuple, r.codes[:, :l + 1].tolist())).items(): assert n <= int(np.ceil(capacity * parents[path[:l]] / len(books[l])))
    assert r.largest == max(Counter(map(tuple, r.codes.tolist())).values())
    assert len(r.perplexity) == L and all(1 - 1e-9 <= p <= len(b) + 1e-9 for p, b in zip(r.perplexity, books))
    greedy = errors_of(x, residual_encode(x, books), books).sum()
    if greedy > 1e-3: assert np.isclose(r.extra, errors_of(x, r.codes, books).sum() / greedy - 1, atol=1e-3)


def plain_balanced(x, books, capacity):
    "The rule in plain loops: per parent, items by regret take their nearest codeword with room"
    codes = np.zeros((len(x), len(books)), int)
    r = x.astype(np.float64)
    for l, b in enumerate(books):
        d = ((r[:, None] - b[None]) ** 2).sum(-1) / 2
        for parent in set(map(tuple, codes[:, :l].tolist())):
            rows = np.flatnonzero((codes[:, :l] == parent).all(1))
            limit, used = int(np.ceil(capacity * len(rows) / len(b))), Counter()
            two = np.sort(d[rows], 1)
            regret = two[:, 1] - two[:, 0] if len(b) > 1 else np.zeros(len(rows))
            for i in rows[np.argsort(-regret, kind='stable')]:
                codes[i, l] = next(c for c in np.argsort(d[i], kind='stable') if used[c] < limit)
                used[codes[i, l]] += 1
        r -= b[codes[:, l]]
    return codes


@pytest.mark.parametrize('capacity', [1., 1.3, 2.])
def test_balance_is_that_of_a_plain_loop(capacity):
    g = np.random.default_rng(3)
    x, books = g.normal(size=(300, 5)).astype(np.float32), [g.normal(size=(K, 5)).astype(np.float32) for K in (7, 1, 4)]
    assert (balanced(x, books, capacity, batch=50).codes == plain_balanced(x, books, capacity)).all()


def test_without_limited_levels_it_is_greedy():
    g = np.random.default_rng(4)
    x, books = g.normal(size=(300, 5)).astype(np.float32), [g.normal(size=(9, 5)).astype(np.float32)] * 2
    r = balanced(x, books, levels=())
    assert (r.codes == residual_encode(x, books)).all() and r.extra == 0


def plain_sinkhorn(scores, epsilon, iters):
    d = -scores.astype(np.float64)
    middle = (d.max() + d.min()) / 2
    P = np.exp(-(d - middle) / (d.max() - middle) / epsilon)
    for _ in range(iters):
        P /= P.sum(1, keepdims=True) * len(P)
        P /= P.sum(0, keepdims=True) * P.shape[1]
    return P


def test_sinkhorn_is_that_of_a_plain_loop_and_balances():
    g = np.random.default_rng(5)
    s = g.normal(size=(90, 6)) + np.arange(6)
    np.testing.assert_allclose(sinkhorn(s, .05, 7), plain_sinkhorn(s, .05, 7), rtol=1e-8)
    P = sinkhorn(s, .05, 500)
    np.testing.assert_allclose(P.sum(0), 1 / 6)
    np.testing.assert_allclose(P.sum(1), 1 / 90, rtol=1e-4)
    assert np.bincount(s.argmax(1), minlength=6).std() > 2 * np.bincount(P.argmax(1), minlength=6).std()


@fast
@given(st.integers(1, 20), st.integers(1, 8), st.sampled_from([1e-5, .003, 1., 100.]), st.booleans())
def test_sinkhorn_is_finite(B, K, epsilon, flat):
    P = sinkhorn(np.zeros((B, K)) if flat else np.random.default_rng(B).normal(size=(B, K)) * 1e6, epsilon)
    assert np.isfinite(P).all() and (P >= 0).all()
    if flat: np.testing.assert_allclose(P, 1 / (B * K))


def test_sinkhorn_spreads_what_collides_and_touches_the_last_level_only():
    g = np.random.default_rng(6)
    x = np.repeat(g.normal(size=(40, 6)), 4, 0).astype(np.float32) + .05 * g.normal(size=(160, 6)).astype(np.float32)
    rk = ResidualKMeans(K=8, L=3, seed=0).fit(x)
    before, r = rk.encode(x), sinkhorn_last(x, rk)
    assert (r.codes[:, :2] == before[:, :2]).all() and r.extra > 0
    assert collisions(make_ids(r.codes, rk.sizes)).rate < .5 * collisions(make_ids(before, rk.sizes)).rate
    assert (sinkhorn_last(x, rk, rounds=0).codes == before).all()


# --- all of them

CODE = '''
import hashlib, numpy as np
from grnb.ids.remedies import *
from grnb.tokenizer.paths import best_paths
from grnb.core import rng
g = rng(7, 'x')
x, books = g.normal(size=(500, 8)).astype(np.float32), [g.normal(size=(8, 8)).astype(np.float32) for _ in range(2)]
out = [best_paths(x, books, 5)[0], reassign(x, books, 1.).codes, balanced(x, books).codes, sinkhorn_last(x, books).codes]
print(*[hashlib.sha256(np.ascontiguousarray(o).tobytes()).hexdigest() for o in out])
'''


def test_two_processes_give_the_same_codes():
    a, b = (subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert a == b and len(a.split()) == 4


def test_batch_size_changes_nothing():
    g = np.random.default_rng(8)
    x, books = g.normal(size=(200, 16)).astype(np.float32), [g.normal(size=(8, 16)).astype(np.float32) for _ in range(2)]
    for batch in (1, 7, 4096):
        assert (best_paths(x, books, 4, batch=batch)[0] == best_paths(x, books, 4)[0]).all()
        assert (balanced(x, books, batch=batch).codes == balanced(x, books).codes).all()


class Latent:
    kind, latent, codebooks = 'rqvae', True, [np.ones((2, 3))]
    def fitted(self): return self


@pytest.mark.parametrize('f', [lambda x, b: best_paths(x, b, 2), reassign, balanced, sinkhorn_last])
def test_bad_rows_and_codebooks(f):
    books = [np.ones((2, 3), np.float32)]
    for x, b, says in [(np.full((2, 3), np.nan), books, 'x: expected finite'), (np.ones((2, 4)), books, 'x: expected width 3, got 4'), (np.ones((2, 3)), [], 'codebooks: expected at least one level'),
                       (np.ones((2, 3)), [np.ones((2, 3)), np.ones((2, 4))], 'codebooks: expected width 3, got 4'), (np.ones((2, 3)), [np.ones(3)], 'codebooks: expected float numbers of shape|codebooks: expected shape'),
                       (np.ones((2, 3)), [np.full((2, 3), np.inf)], 'codebooks: expected finite'), (np.ones((2, 3)), [np.ones((0, 3))], 'at least one codeword'),
                       (np.ones((2, 3)), Latent(), 'rqvae has no codewords that add up'), (np.ones((2, 3)), ResidualKMeans(), 'not fitted')]:
        with pytest.raises(ValueError, match=says): f(x, b)


def test_nothing_and_one_code_are_well():
    for x, books in [(np.zeros((0, 3)), [np.ones((2, 3))]), (np.ones((4, 3)), [np.ones((1, 3))] * 2)]:
        for r in (balanced(x, books), sinkhorn_last(x, books), reassign(x, books)): assert r.codes.shape == (len(x), len(books)) and not r.codes.any()
        assert best_paths(x, books, 3)[0].shape == (len(x), min(3, len(books[0])), len(books))


@pytest.mark.parametrize('f, says', [
    (lambda x, b: best_paths(x, b, 0), 'width: expected at least 1'),
    (lambda x, b: reassign(x, b, -1), 'budget: expected a number of at least 0, got -1'),
    (lambda x, b: reassign(x, b, np.nan), 'budget: expected'),
    (lambda x, b: reassign(x, b, codes=np.zeros((3, 1), int)), 'codes: expected 2 rows'),
    (lambda x, b: reassign(x, b, codes=np.full((2, 1), 9)), 'codes: expected values from 0'),
    (lambda x, b: balanced(x, b, .5), 'capacity: expected a number of at least 1'),
    (lambda x, b: balanced(x, b, levels=(1,)), 'levels: expected numbers from -1 to 0'),
    (lambda x, b: sinkhorn(np.zeros((2, 0))), 'scores: expected'),
    (lambda x, b: sinkhorn(np.full((2, 2), np.inf)), 'scores: expected finite'),
    (lambda x, b: sinkhorn(np.zeros((2, 2)), 0), 'epsilon: expected a number above 0'),
    (lambda x, b: sinkhorn(np.zeros((2, 2)), iters=0), 'iters: expected at least 1'),
])
def test_bad_settings(f, says):
    with pytest.raises(ValueError, match=says): f(np.ones((2, 3), np.float32), [np.ones((2, 3), np.float32)])


# --- the size of the space

def test_the_birthday_line_is_what_draws_do():
    g = np.random.default_rng(9)
    rates = [collisions(make_ids(g.integers(200, size=(60, 1)), (200,))).rate for _ in range(400)]
    assert abs(np.mean(rates) - birthday(200, 60)) < 4 * np.std(rates) / 20
    assert birthday(2.**64, 10**6) == pytest.approx(999_999 / 2.**64) and birthday(5, 0) == 0
    for bad in (0, -1, np.nan):
        with pytest.raises(ValueError, match='space: expected'): birthday(bad, 3)


@fast
@given(st.lists(st.integers(0, 30), min_size=2, max_size=200))
def test_effective_space_counts_pairs(codes):
    ids = make_ids(np.array(codes)[:, None], (31,))
    meet = sum(a == b for i, a in enumerate(codes) for b in codes[:i])
    want = len(codes) * (len(codes) - 1) / 2 / meet if meet else np.inf
    assert effective_space(ids) == pytest.approx(want)


def test_effective_space_is_unbiased_and_bounds_collisions():
    g = np.random.default_rng(10)
    p = g.dirichlet(np.full(100, .3))
    draws = [make_ids(g.choice(100, size=(50, 1), p=p), (100,)) for _ in range(600)]
    meet = [1 / effective_space(d) for d in draws]
    assert abs(np.mean(meet) - (p**2).sum()) < 4 * np.std(meet) / 600**.5
    rate = np.mean([collisions(d).rate for d in draws])
    assert birthday(100, 50) < rate < birthday(1 / (p**2).sum(), 50)


def test_a_point_holds_what_was_measured():
    g = np.random.default_rng(11)
    c = g.integers(9, size=(300, 2))
    p = measure(c, (9, 9))
    assert p[:3] == (300, 2, 81.) and p.rate == collisions(make_ids(c, (9, 9))).rate and p.chance == birthday(81, 300)
