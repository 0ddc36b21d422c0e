"""Exact cosine over candidates and over everything, against plain numpy."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from grnb.core import unit
from grnb.rerank import cosine, dense

fast = settings(max_examples=60, deadline=None)


@st.composite
def pools(draw):
    "Vectors of which some are equal, queries, candidates that end early"
    g = np.random.default_rng(draw(st.integers(0, 2**20)))
    N, V, D, Q, C = draw(st.integers(1, 30)), draw(st.integers(0, 3)), draw(st.integers(1, 6)), draw(st.integers(0, 5)), draw(st.integers(1, 12))
    v = unit(g.choice([-1., 1, 2], (N, V, D) if V else (N, D)).astype(np.float32))
    q = unit(g.choice([-1., 1, 3], (Q, D)).astype(np.float32)) if Q else np.zeros((0, D), np.float32)
    rows = np.full((Q, C), -1)
    for r in rows:
        some = g.permutation(N)[:g.integers(0, min(C, N) + 1)]
        r[:len(some)] = some
    return q, v, rows, draw(st.integers(1, 15))


def best_view(q, v): return np.einsum('qd,nvd->qnv', q.astype(np.float64), v[:, None] if v.ndim == 2 else v).max(-1)


@fast
@given(pools())
def test_the_best_candidates_in_order(case):
    q, v, rows, k = case
    found, score = cosine(q, v, rows, k)
    want = best_view(q, v)
    assert found.shape == score.shape == (len(q), k) and score.dtype == np.float32 and found.dtype == np.int64
    for i in range(len(q)):
        mine = rows[i][rows[i] >= 0]
        n = min(k, len(mine))
        assert (found[i, n:] == -1).all() and (score[i, n:] == -np.inf).all() and set(found[i, :n]) <= set(mine)
        assert np.allclose(score[i, :n], np.sort(want[i, mine])[::-1][:n], atol=1e-6) and np.allclose(score[i, :n], want[i, found[i, :n]], atol=1e-6)
        for s in np.unique(score[i, :n]): assert (np.diff(found[i, :n][score[i, :n] == s]) > 0).all()


@fast
@given(pools(), st.integers(1, 3))
def test_dense_is_brute_force(case, batch):
    q, v, _, k = case
    found, score = dense(q, v, k, batch)
    n = min(k, len(v))
    assert np.allclose(score[:, :n], -np.sort(-best_view(q, v), 1)[:, :n], atol=1e-6) and (found[:, n:] == -1).all()
    for f, s in zip(found[:, :n], score[:, :n]): assert len(set(f)) == n and all((np.diff(f[s == x]) > 0).all() for x in np.unique(s))


def test_ties_at_the_edge_go_to_lower_rows():
    "Equal items outnumber what is kept"
    v = np.tile(np.float32([[1, 0]]), (50, 1))
    assert dense(v[:1], v, 5)[0].tolist() == [[0, 1, 2, 3, 4]]
    assert cosine(v[:1], v, np.arange(49, -1, -1)[None], 5)[0].tolist() == [[0, 1, 2, 3, 4]]


def test_mapped_vectors(tmp_path):
    v = unit(np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32))
    np.save(tmp_path/'v.npy', v)
    rows = np.arange(20)[None].repeat(3, 0)
    want = cosine(v[:3], v, rows, 5)
    assert (cosine(v[:3], np.load(tmp_path/'v.npy', mmap_mode='r'), rows, 5)[0] == want[0]).all()


@pytest.mark.parametrize('rows, k, says', [
    ([[5]], 1, 'rows: expected −1 to 4'), ([[-2]], 1, 'rows: expected −1 to 4'), ([0], 1, 'rows: expected integers'),
    ([[0.]], 1, 'rows: expected integers'), ([[0], [1]], 1, 'rows: expected integers'), ([[0]], 0, 'k: expected at least 1'), ([[0]], True, 'k: '),
])
def test_bad_input(rows, k, says):
    v = np.eye(5, dtype=np.float32)
    with pytest.raises(ValueError, match=says): cosine(v[:1], v, np.array(rows), k)
