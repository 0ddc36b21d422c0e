"""The light decoder against the scores of all IDs, and against a plain beam level by level."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from grnb.decode.beam import beam_search, expand
from grnb.decode.light import LightDecoder
from grnb.generator import StrongForm
from grnb.ids.make import make_ids
from grnb.trie import Trie

fast = settings(max_examples=50, deadline=None)


@st.composite
def worlds(draw, mode=None):
    "Codebooks, IDs of a pool, queries"
    g = np.random.default_rng(draw(st.integers(0, 2**20)))
    D, L = draw(st.integers(2, 8)), draw(st.integers(1, 4))
    books = [g.normal(size=(int(g.integers(1, 7)), D)).astype(np.float32) / (l + 1) for l in range(L)]
    codes = g.integers(0, [len(b) for b in books], (draw(st.integers(1, 60)), L))
    ids = make_ids(codes, tuple(map(len, books)), mode or draw(st.sampled_from(['bucket', 'unique'])))
    q = g.normal(size=(3, D)).astype(np.float32)
    return books, ids, q / np.linalg.norm(q, axis=1, keepdims=True)


def all_scores(books, codes, q, depth, weak):
    "Score (Q, n) of prefixes of `depth` codes"
    x = sum((b[codes[:, l]] for l, b in enumerate(books[:depth])), np.zeros((len(codes), q.shape[1])))
    return q @ x.T - (0 if weak else (x ** 2).sum(1) / 2)


@fast
@given(worlds(), st.sampled_from([0, 3, 64]), st.booleans())
def test_a_beam_as_wide_as_the_pool_scores_everything(world, scan, weak):
    books, ids, q = world
    trie = Trie.build(ids, scan)
    dec = LightDecoder(trie, books, weak)
    leaves, scores = dec.leaves(q, len(trie) + 3)
    want = all_scores(books, trie.codes.astype(int), q, len(books), weak)
    assert (leaves[:, len(trie):] == -1).all() and (scores[:, len(trie):] == -np.inf).all()
    for a, s, w in zip(leaves[:, :len(trie)], scores[:, :len(trie)], want):
        assert sorted(a) == list(range(len(trie))) and (np.diff(s) <= 0).all()
        assert np.allclose(s, w[a], atol=2e-4)
        for x in np.unique(s): assert (np.diff(a[s == x]) > 0).all()              # ties by lower leaf


@fast
@given(worlds('bucket'), st.integers(1, 20), st.booleans())
def test_with_every_prefix_in_the_table_it_is_the_plain_beam(world, beam, weak):
    books, ids, q = world
    trie = Trie.build(ids, 0)
    leaves, scores = LightDecoder(trie, books, weak).leaves(q, beam)
    codes = trie.codes.astype(int)
    for i in range(len(q)):
        kept = np.arange(len(codes))
        for depth in range(1, len(books) + 1):
            s = all_scores(books, codes[kept], q[i:i + 1], depth, weak)[0]
            _, start, group = np.unique(codes[kept][:, :depth], axis=0, return_index=True, return_inverse=True)
            top = np.argsort(-s[start], kind='stable')[:beam]
            kept = kept[np.isin(group.ravel(), top)]
        want = all_scores(books, codes[kept], q[i:i + 1], len(books), weak)[0]
        assert np.allclose(np.sort(want)[::-1], scores[i][leaves[i] >= 0], atol=2e-4)


@fast
@given(worlds('bucket'), st.integers(1, 30))
def test_one_closed_root_is_exact_at_any_beam(world, beam):
    books, ids, q = world
    trie = Trie.build(ids, 1000)
    scores = LightDecoder(trie, books).leaves(q, beam)[1]
    want = -np.sort(-all_scores(books, trie.codes.astype(int), q, len(books), False), 1)[:, :beam]
    assert np.allclose(scores[:, :want.shape[1]], want, atol=2e-4)


@fast
@given(worlds('bucket'), st.sampled_from([0, 3, 64]))
def test_it_ranks_as_the_strong_form_does(world, scan):
    "The same IDs and scores as beam search over the untrained generator, where the beam holds all"
    books, ids, q = world
    trie = Trie.build(ids, scan)
    a, b = LightDecoder(trie, books).leaves(q, len(trie)), beam_search(StrongForm(books), q, trie, len(trie))
    assert np.allclose(a[1], b[1], atol=2e-4)


@fast
@given(worlds(), st.integers(1, 25), st.integers(1, 25))
def test_candidates_are_the_items_of_the_ids_in_order(world, beam, want):
    books, ids, q = world
    trie = Trie.build(ids, 3)
    dec = LightDecoder(trie, books)
    rows, scores = dec.search(q, beam, want)
    slow, slow_scores = expand(*dec.leaves(q, beam), trie, want)
    assert (rows == slow).all() and (scores == slow_scores).all()
    for r in rows: assert len(set(r[r >= 0])) == (r >= 0).sum() and (np.diff((r >= 0).astype(int)) <= 0).all()


def test_items_of_several_ids_come_once():
    g = np.random.default_rng(0)
    books = [g.normal(size=(3, 4)).astype(np.float32) for _ in range(2)]
    trie = Trie.build(make_ids(g.integers(0, 3, (30, 3, 2)), (3, 3)), 2)
    rows, _ = LightDecoder(trie, books).search(g.normal(size=(5, 4)), 9, 40)
    assert (np.sort(rows, 1)[:, -30:] == np.arange(30)).all() and (rows[:, 30:] == -1).all()


def test_many_queries_equal_one_by_one():
    g = np.random.default_rng(1)
    books = [g.normal(size=(8, 6)).astype(np.float32) for _ in range(3)]
    trie = Trie.build(make_ids(g.integers(0, 8, (400, 3)), (8, 8, 8)), 5)
    dec, q = LightDecoder(trie, books), g.normal(size=(70, 6)).astype(np.float32)
    rows, scores = dec.search(q, 20, 10)
    for i in (0, 33, 69):
        one = dec.search(q[i:i + 1], 20, 10)
        assert (one[0][0] == rows[i]).all() and np.allclose(one[1][0], scores[i], atol=1e-5)


def test_no_queries_and_bad_input():
    books = [np.eye(3, dtype=np.float32)] * 2
    trie = Trie.build(make_ids(np.array([[0, 1], [2, 2]]), (3, 3)))
    dec = LightDecoder(trie, books)
    assert dec.search(np.zeros((0, 3)), 5, 4)[0].shape == (0, 4) and dec.leaves(np.zeros((0, 3)), 5)[0].shape == (0, 5)
    for call, says in [(lambda: dec.search(np.ones((1, 2))), 'queries: expected width 3'), (lambda: dec.search(np.ones((1, 3)), 0), 'beam: '),
                       (lambda: dec.search(np.ones((1, 3)), 1, 0), 'candidates: '), (lambda: dec.leaves(np.ones((1, 3)), 1.5), 'beam: '),
                       (lambda: LightDecoder(trie, books[:1] * 4), 'codebooks: '), (lambda: dec.search([[np.inf, 0, 0]]), 'queries: expected finite')]:
        with pytest.raises(ValueError, match=says): call()
