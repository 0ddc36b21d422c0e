"""decode.nodes: the search by prefix means against a plain Python beam, and what it must refuse."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from grnb.decode.nodes import NodeMeans
from grnb.ids.make import SemanticIDs, make_ids
from grnb.rerank import dense


def plain(codes, rows, v, q, k, beam):
    "The same search with dictionaries and lists; vectors of small whole numbers keep every score exact"
    below = lambda p: sorted({r for c, r in zip(codes, rows) if c[:len(p)] == p})
    score = lambda p: q @ (m := np.mean([v[r].astype(float) for r in below(p)], 0)) - m @ m / 2
    beams = [()]
    for l in range(1, len(codes[0]) + 1):
        kids = sorted({c[:l] for c in codes if c[:l - 1] in beams})
        beams = sorted(kids, key=lambda p: (-score(p), p))[:beam]
    found = []
    for p in beams: found += [(r, score(p)) for r in below(p) if r not in [f for f, _ in found]]
    return found[:k]


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 25), st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 30))
def test_equals_a_plain_beam(seed, N, L, V, beam, k):
    "Codes with collisions, several IDs an item, beams that prune, lists that run short. Means over one, two or four items are exact; others are compared by score."
    g = np.random.default_rng(seed)
    codes = g.integers(0, 3, size=(N, V, L))
    v, q = g.integers(-4, 5, size=(N, 3)).astype(np.float32), g.integers(-4, 5, size=(2, 3)).astype(np.float32) + g.normal(size=(2, 3)).astype(np.float32)
    ids = make_ids(codes, (3,) * L)
    rows, scores = NodeMeans(ids, v).search(q, k, beam)
    for i in range(2):
        want = plain([tuple(map(int, t)) for t in ids.tokens], ids.rows.tolist(), v, q[i].astype(float), k, beam)
        assert rows[i][rows[i] >= 0].tolist() == [r for r, _ in want]
        assert np.allclose(scores[i][:len(want)], [s for _, s in want], atol=1e-4)
        assert (rows[i][len(want):] == -1).all() and (scores[i][len(want):] == -np.inf).all()


def test_unique_ids_and_a_full_beam_are_exact_search():
    g = np.random.default_rng(1)
    v = g.normal(size=(300, 16)).astype(np.float32)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    ids = make_ids(g.integers(0, 8, size=(300, 2)), (8, 8), 'unique')
    rows, _ = NodeMeans(ids, v).search(v, 10, 300)
    assert (rows == dense(v, v, 10)[0]).all()


def test_batches_do_not_matter():
    g = np.random.default_rng(2)
    v, q = g.normal(size=(500, 32)).astype(np.float32), g.normal(size=(40, 32)).astype(np.float32)
    nodes = NodeMeans(make_ids(g.integers(0, 6, size=(500, 3)), (6, 6, 6)), v)
    a = nodes.search(q, 20, 15)
    for batch in (1, 7, 4096):
        b = nodes.search(q, 20, 15, batch=batch)
        assert (a[0] == b[0]).all() and np.allclose(a[1], b[1], atol=1e-5)


def test_one_level_one_item_and_equal_items():
    one = NodeMeans(make_ids(np.zeros((1, 1), int), (1,)), np.float32([[1, 2]]))
    assert one.search(np.float32([[1, 0]]), 3, 2)[0].tolist() == [[0, -1, -1]]
    same = NodeMeans(make_ids(np.zeros((4, 2), int), (2, 2)), np.ones((4, 2), np.float32))
    assert same.search(np.float32([[1, 0]]), 3, 2)[0].tolist() == [[0, 1, 2]] and len(same.means) == 1


def test_an_item_with_two_ids_below_a_prefix_counts_once():
    ids = SemanticIDs(np.uint8([[0, 0], [0, 1], [0, 1]]), np.array([0, 0, 1]), (1, 2))
    nodes = NodeMeans(ids, np.float32([[2, 0], [0, 2]]))
    assert nodes.means[nodes.mean[1]].tolist() == [1, 1]                  # not (4/3, 2/3)


@pytest.mark.parametrize('change, says', [
    (dict(v=np.zeros((3, 4), np.float32)), 'item rows from 0 to 2, got 0 to 5'),
    (dict(v=np.full((6, 4), np.nan, np.float32)), 'vectors: expected finite'),
    (dict(q=np.zeros((1, 3), np.float32)), 'queries: expected width 4, got 3'),
    (dict(k=0), 'k: expected at least 1'),
    (dict(beam=0), 'beam: expected at least 1'),
    (dict(codes=np.zeros((0, 2), int)), 'ids: expected at least one'),
])
def test_bad_input(change, says):
    a = dict(codes=np.zeros((6, 2), int), v=np.ones((6, 4), np.float32), q=np.ones((1, 4), np.float32), k=1, beam=1) | change
    with pytest.raises(ValueError, match=says): NodeMeans(make_ids(a['codes'], (2, 2)), a['v']).search(a['q'], a['k'], a['beam'])
