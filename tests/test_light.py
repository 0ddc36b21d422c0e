"""The light decoder against the scores of all IDs, against a plain beam level by level, and its two kernels against each other."""
import os
import sys
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from grnb.decode import native
from grnb.decode.beam import beam_search
from grnb.decode.expand import expand
from grnb.decode.light import LightDecoder, fit_penalty
from grnb.generator.strong import StrongForm
from grnb.ids.make import make_ids
from grnb.trie.layout import Trie
from grnb.trie.live import LiveTrie

fast = settings(max_examples=50, deadline=None)
KERNELS = sorted({'numba', native.kernel()})
both = pytest.mark.parametrize('name', KERNELS)


@contextmanager
def using(name):
    "Light decoders made inside run this kernel"
    before = os.environ.get('GRNB_KERNEL')
    os.environ['GRNB_KERNEL'] = name
    try: yield
    finally:
        if before is None: del os.environ['GRNB_KERNEL']
        else: os.environ['GRNB_KERNEL'] = before


def decoder(name, *args, **options):
    with using(name): return LightDecoder(*args, **options)


@st.composite
def worlds(draw, mode=None, wide=False):
    "Codebooks of different sizes, IDs of a pool, queries"
    g = np.random.default_rng(draw(st.integers(0, 2**20)))
    D, L = draw(st.integers(2, 8)), draw(st.integers(1, 15 if wide else 4))
    books = [g.normal(size=(int(g.integers(1, 400 if wide and g.random() < .3 else 7)), D)).astype(np.float32) / (l + 1) for l in range(L)]
    codes = g.integers(0, [len(b) for b in books], (draw(st.integers(1, 60)), L))
    ids = make_ids(codes, tuple(map(len, books)), mode or draw(st.sampled_from(['bucket', 'unique'])))
    q = g.normal(size=(3, D)).astype(np.float32)
    return books, ids, q / np.linalg.norm(q, axis=1, keepdims=True)


def all_scores(books, codes, q, depth, weak, penalty=1.):
    "Score (Q, n) of prefixes of `depth` codes"
    x = sum((b[codes[:, l]] for l, b in enumerate(books[:depth])), np.zeros((len(codes), q.shape[1])))
    return q @ x.T - (0 if weak else penalty * (x ** 2).sum(1) / 2)


def step_of(books): return sum(np.abs(b).max() ** 2 + np.linalg.norm(b, axis=1).max() * 2 for b in books) / 2**14   # generous


@fast
@given(worlds(wide=True), st.sampled_from([0, 3, 64]), st.booleans(), st.sampled_from(KERNELS), st.sampled_from([0., .5, 1.]))
def test_a_beam_as_wide_as_the_pool_scores_everything(world, scan, weak, name, penalty):
    books, ids, q = world
    trie = Trie.build(ids, scan)
    dec = decoder(name, trie, books, weak, penalty=penalty)
    leaves, scores = dec.leaves(q, len(trie) + 3)
    want = all_scores(books, trie.codes.astype(int), q, len(books), weak, penalty)
    assert (leaves[:, len(trie):] == -1).all() and (scores[:, len(trie):] == -np.inf).all()
    for a, s, w in zip(leaves[:, :len(trie)], scores[:, :len(trie)], want):
        assert sorted(a) == list(range(len(trie))) and (np.diff(s) <= 0).all()
        assert np.allclose(s, w[a], atol=1e-3)                                        # half a step of the biases, which span up to 130 here
        for x in np.unique(s): assert (np.diff(a[s == x]) > 0).all()              # ties by lower leaf


@fast
@given(worlds(wide=True), st.sampled_from([0, 2, 64]), st.integers(1, 12), st.integers(1, 40), st.booleans(),
       st.sampled_from(['fp32', 'int8']), st.sampled_from(['stored', 'gram']), st.sampled_from(['none', 'best', 'mean']))
def test_both_kernels_give_the_same_bits(world, scan, beam, want, weak, precision, norms, lookahead):
    books, ids, q = world
    trie, options = Trie.build(ids, scan), dict(weak=weak, precision=precision, norms=norms, lookahead=lookahead)
    x = np.random.default_rng(0).normal(size=(int(trie.rows.max()) + 1, q.shape[1])).astype(np.float32)
    a, b = (decoder(name, trie, books, **options) for name in (KERNELS[0], KERNELS[-1]))
    assert a.kernel in ('c', 'numba') and (len(KERNELS) == 1 or a.kernel != b.kernel)
    for u, v in zip((*a.search(q, beam, want), *a.leaves(q, beam), a.tables(q)), (*b.search(q, beam, want), *b.leaves(q, beam), b.tables(q))): assert np.array_equal(u, v)
    (r, s), (t, u) = a.nearest(q, x, 3, beam, want), b.nearest(q, x, 3, beam, want)
    assert np.allclose(s, u, atol=1e-4) and (r == t).mean() > .9


@fast
@given(worlds('bucket'), st.integers(1, 20), st.booleans(), st.sampled_from(KERNELS))
def test_with_every_prefix_in_the_table_it_is_the_plain_beam(world, beam, weak, name):
    books, ids, q = world
    trie = Trie.build(ids, 0)
    leaves, scores = decoder(name, trie, books, weak).leaves(q, beam)
    codes = trie.codes.astype(int)
    for i in range(len(q)):
        kept, near = np.arange(len(codes)), False
        for depth in range(1, len(books) + 1):
            s = all_scores(books, codes[kept], q[i:i + 1], depth, weak)[0]
            _, start, group = np.unique(codes[kept][:, :depth], axis=0, return_index=True, return_inverse=True)
            order = np.argsort(-s[start], kind='stable')
            near |= len(order) > beam and s[start][order[beam - 1]] - s[start][order[beam]] < 4 * step_of(books)   # a cut between scores one step apart may fall either way
            kept = kept[np.isin(group.ravel(), order[:beam])]
        want = all_scores(books, codes[kept], q[i:i + 1], len(books), weak)[0]
        assert near or np.allclose(np.sort(want)[::-1], scores[i][leaves[i] >= 0], atol=1e-3)


@fast
@given(worlds('bucket'), st.integers(1, 30), st.sampled_from(KERNELS))
def test_one_closed_root_is_exact_at_any_beam(world, beam, name):
    books, ids, q = world
    trie = Trie.build(ids, 1000)
    scores = decoder(name, trie, books).leaves(q, beam)[1]
    want = -np.sort(-all_scores(books, trie.codes.astype(int), q, len(books), False), 1)[:, :beam]
    assert np.allclose(scores[:, :want.shape[1]], want, atol=4 * step_of(books))


@fast
@given(worlds('bucket'), st.booleans())
def test_the_strong_form_generator_agrees(world, everything):
    books, ids, q = world
    trie = Trie.build(ids, 0 if everything else 64)
    a, b = LightDecoder(trie, books).leaves(q, len(trie)), beam_search(StrongForm(books), q, trie, len(trie))
    assert np.allclose(a[1], b[1], atol=1e-3)


@fast
@given(worlds(), st.integers(1, 25), st.integers(1, 25), st.sampled_from(KERNELS))
def test_candidates_are_the_items_of_the_ids_in_order(world, beam, want, name):
    books, ids, q = world
    trie = Trie.build(ids, 3)
    dec = decoder(name, trie, books)
    rows, scores = dec.search(q, max(beam, want), want)
    slow, slow_scores = expand(*dec.leaves(q, max(beam, want)), trie, want)
    assert (scores == slow_scores).mean() > .98 and (rows == slow).mean() > .95       # only equal keys at the cut may differ
    for r in rows: assert len(set(r[r >= 0])) == (r >= 0).sum() and (np.diff((r >= 0).astype(int)) <= 0).all()


@fast
@given(worlds('bucket'), st.data(), st.sampled_from(KERNELS), st.sampled_from([0, 3, 64]))
def test_additions_removals_and_filters_equal_brute_force(world, data, name, scan):
    books, ids, q = world
    trie, n = Trie.build(ids, scan), len(ids.rows)
    dec, g = decoder(name, trie, books), np.random.default_rng(data.draw(st.integers(0, 999)))
    live, codes, there = LiveTrie(trie), ids.tokens.astype(int), np.ones(n, bool)
    gone = np.flatnonzero(g.random(n) < .4)
    live, there[gone] = live.remove(gone), False
    if data.draw(st.booleans()):
        more = g.integers(0, [len(b) for b in books], (int(g.integers(1, 20)), len(books)))
        live = live.add(more.astype(ids.tokens.dtype), np.arange(n, n + len(more)))
        codes, there = np.concatenate([codes, more]), np.r_[there, np.ones(len(more), bool)]
    if data.draw(st.booleans()):
        only = g.random(len(there)) < .5
        live, there = live.where(only), there & only
    rows, scores = dec.search(q, len(codes) + 5, len(codes) + 5, live)
    want = all_scores(books, codes, q, len(books), False)
    for r, s, w in zip(rows, scores, want):
        assert sorted(r[r >= 0]) == np.flatnonzero(there).tolist()
        assert np.allclose(s[r >= 0], w[r[r >= 0]], atol=1e-3) and (np.diff(s[:there.sum()]) <= 0).all()
    near = dec.nearest(q, q[np.arange(len(codes)) % len(q)].copy(), 4, len(codes) + 5, len(codes) + 5, live)[0]
    assert there[near[near >= 0]].all() and (near >= 0).sum(1).tolist() == [min(4, there.sum())] * len(q)


@both
def test_a_side_trie_starts_from_what_the_base_reached(name):
    "With floors, base and side together find what one trie over all items finds"
    g = np.random.default_rng(5)
    books = [g.normal(size=(16, 24)).astype(np.float32) / (l + 1) for l in range(4)]
    codes, q = np.unique(g.integers(0, 16, (3000, 4)), axis=0), g.normal(size=(40, 24)).astype(np.float32) / 5
    codes = codes[g.permutation(len(codes))]
    old, new = codes[:-200], codes[-200:]
    live = LiveTrie(Trie.build(make_ids(old, (16,) * 4), 0)).add(new.astype(np.uint8), np.arange(len(old), len(codes)))
    dec, whole = decoder(name, live.base, books), decoder(name, Trie.build(make_ids(codes, (16,) * 4), 0), books)
    for beam, shared in ((30, .93), (300, .99)):                                      # more prefixes are kept at a depth, so a few others fall at the next
        (rows, scores), (want, same) = dec.search(q, beam, 30, live), whole.search(q, beam, 30)
        assert (scores >= same - 2e-3).mean() > .97 and np.mean([len(set(a) & set(b)) / 30 for a, b in zip(rows, want)]) > shared
    assert (rows >= len(old)).any()


def test_items_of_several_ids_come_once():
    g = np.random.default_rng(0)
    books = [g.normal(size=(3, 4)).astype(np.float32) for _ in range(2)]
    trie = Trie.build(make_ids(g.integers(0, 3, (30, 3, 2)), (3, 3)), 2)
    for name in KERNELS:
        rows, _ = decoder(name, trie, books).search(g.normal(size=(5, 4)), 9, 40)
        assert (np.sort(rows, 1)[:, -30:] == np.arange(30)).all() and (rows[:, 30:] == -1).all()


def world_of(n=400, D=6, K=8, L=3, scan=5, seed=1):
    g = np.random.default_rng(seed)
    books = [g.normal(size=(K, D)).astype(np.float32) for _ in range(L)]
    return books, Trie.build(make_ids(g.integers(0, K, (n, L)), (K,) * L), scan), g.normal(size=(70, D)).astype(np.float32)


@both
@pytest.mark.parametrize('precision', ['fp32', 'int8'])
def test_neither_batch_nor_threads_change_a_bit(name, precision, monkeypatch):
    books, trie, q = world_of()
    dec = decoder(name, trie, books, precision=precision)
    rows, scores = dec.search(q, 20, 10)
    for i in (0, 33, 69):
        one = dec.search(q[i:i + 1], 20, 10)
        assert (one[0][0] == rows[i]).all() and (one[1][0] == scores[i]).all()
    monkeypatch.setenv('OMP_NUM_THREADS', '4')
    assert all(np.array_equal(a, b) for a, b in zip(dec.search(q, 20, 10), (rows, scores)))
    with ThreadPoolExecutor(16) as pool:                                              # one decoder, sixteen callers, different sizes
        calls = [pool.submit(dec.search, q[i % 70:i % 70 + 1], 5 + i % 40, 3 + i % 7) for i in range(200)]
        for i, call in enumerate(calls):
            assert all(np.array_equal(a, b) for a, b in zip(call.result(), dec.search(q[i % 70:i % 70 + 1], 5 + i % 40, 3 + i % 7)))


@both
def test_a_beam_of_four_thousand(name):
    books, trie, q = world_of(20000, 8, 40, 3, 4)
    dec = decoder(name, trie, books)
    leaves, scores = dec.leaves(q[:3], 4000)
    assert (leaves >= 0).all() and all(len(set(r)) == 4000 for r in leaves) and (np.diff(scores) <= 0).all()
    want = -np.sort(-all_scores(books, trie.codes.astype(int), q[:3], 3, False), 1)[:, :4000]
    assert np.mean(np.abs(scores - want) < .01) > .9


@both
def test_reranking_is_exact_in_both_precisions_and_for_views(name):
    books, trie, q = world_of(300)
    dec, g = decoder(name, trie, books), np.random.default_rng(3)
    for shape in ((300, 6), (300, 2, 6)):
        x = g.normal(size=shape).astype(np.float32)
        for v in (x, x.astype(np.float16)):
            rows, cos = dec.nearest(q, v, 5, 400, 400)
            s = np.einsum('nvd,qd->qnv', v.reshape(300, -1, 6).astype(np.float32), q).max(2)
            assert np.allclose(cos, -np.sort(-s, 1)[:, :5], atol=1e-4) and np.allclose(np.take_along_axis(s, rows, 1), cos, atol=1e-4)


def read_with_patience(order, score, k, patience):
    "Candidates read one by one: the k best, and how many were read"
    top, failed = [], 0
    for n, row in enumerate(order):
        if len(top) == k and failed >= patience: return top, n
        better = sorted([*top, row], key=lambda r: (-score[r], r))[:k]
        failed, top = 0 if better != top else failed + 1, better
    return top, len(order)


@both
@pytest.mark.parametrize('k', [1, 7, 40])
def test_patience_reads_until_so_many_in_a_row_fail(name, k):
    books, trie, q = world_of(300)
    dec, x = decoder(name, trie, books), np.random.default_rng(3).normal(size=(300, 6)).astype(np.float32)
    order, stopped = dec.search(q, 50, 120)[0], 0
    for patience in (1, 9, 30, 120, None):
        rows, cos = dec.nearest(q, x, k, 50, 120, patience=patience)
        for i in range(len(q)):
            top, read = read_with_patience(order[i], (x @ q[i]).astype(np.float64), k, patience or 120)
            assert rows[i].tolist() == top and np.allclose(cos[i], x[top] @ q[i], atol=1e-4)
            stopped += read < 120
    assert stopped
    with pytest.raises(ValueError, match='patience: expected at least 1, got 0'): dec.nearest(q, x, k, patience=0)


class Slots:
    "Vectors whose rows stand elsewhere"
    def __init__(self, base, slot): self.base, self.slot = base, slot
    shape, dtype = property(lambda self: self.base.shape), property(lambda self: self.base.dtype)
    def __len__(self): return len(self.slot)
    def parts(self): return self.base, None, self.slot
    def __getitem__(self, rows): return self.base[self.slot[rows]]


@both
def test_vectors_that_stand_elsewhere_or_are_no_numbers(name):
    "Slots of any integers and strides are read; a vector with NaN is never among the nearest while there are others; items without a vector are refused"
    g = np.random.default_rng(2)
    books = [g.normal(size=(8, 16)).astype(np.float32) for _ in range(2)]
    dec, x = decoder(name, Trie.build(make_ids(g.integers(0, 8, (50, 2)), (8, 8)), 64), books), g.normal(size=(50, 16)).astype(np.float32)
    q = dec._vectors(g.normal(size=(3, 16)).astype(np.float32))
    want = dec.nearest(q, x, 5, 64, 50)
    for slot in (np.arange(50, dtype=np.int32), np.arange(50)[::-1], np.arange(100)[::2] // 2):
        got = dec.nearest(q, Slots(np.ascontiguousarray(x[np.argsort(slot)]), slot), 5, 64, 50)
        assert np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1])
    first = want[0][0, 0]
    x[first, 3] = np.nan
    rows, score = dec.nearest(q, x, 50, 64, 50)
    assert rows[0, -1] == first and score[0, -1] == -np.inf and np.isfinite(score[:, :-1]).all()
    with pytest.raises(ValueError, match='vectors: expected'): dec.nearest(q, np.zeros((50, 0, 16), np.float32), 3)


class Two:
    "Vectors in two arrays, and where each row stands"
    def __init__(self, base, more, slot): self.base, self.more, self.slot = base, more, slot
    def __len__(self): return len(self.slot) or len(self.base) + len(self.more)
    def __getitem__(self, rows): return np.concatenate([self.base, self.more])[self.slot[rows] if len(self.slot) else rows]
    def parts(self): return self.base, self.more, self.slot
    ndim, dtype, shape = (property(lambda self, k=k: getattr(self.base, k)) for k in ('ndim', 'dtype', 'shape'))


@both
@pytest.mark.parametrize('kind', [np.float32, np.float16])
def test_vectors_in_two_parts_are_reranked_as_one_array(name, kind):
    books, trie, q = world_of(300)
    dec, g = decoder(name, trie, books), np.random.default_rng(4)
    live, x = LiveTrie(trie).add(trie.codes[:50], np.arange(300, 350)).remove(np.arange(0, 350, 3)), g.normal(size=(350, 6)).astype(kind)
    want = dec.nearest(q, x, 9, 400, 400, live)
    none, slot = np.zeros(0, np.int64), g.permutation(350)
    there = np.empty_like(x)
    there[slot] = x
    for v in (Two(x[:300], x[300:], none), Two(x[:10], x[10:], none), Two(there[:200], there[200:], slot), Two(there, there[:0], slot)):
        rows, cos = dec.nearest(q, v, 9, 400, 400, live)
        assert np.array_equal(rows, want[0]) and np.allclose(cos, want[1], atol=1e-6)
    for bad in (Two(x[:300], x[300:340], none), Two(x[:300], x[300:].astype(np.float64), none), Two(x[:300], x[300:, :5], none), Two(x[:300], np.asfortranarray(x[300:]), none)):
        with pytest.raises(ValueError, match='vectors: '): dec.nearest(q, bad, 9, 400, 400, live)


@both
def test_equal_vectors_follow_the_place_of_added_items(name):
    "Rows 6 and 7 belong after row 1 and before row 0; all eight vectors are the same"
    books = [np.eye(3, dtype=np.float32)] * 2
    trie = Trie.build(make_ids(np.array([[a, b] for a in range(3) for b in range(2)]), (3, 3)))
    live, x = LiveTrie(trie).add(np.array([[2, 2], [1, 2]]), [6, 7], [(2 << 32) | 1, 0]), np.ones((8, 3), np.float32)
    for k in (3, 8):
        assert decoder(name, trie, books).nearest(x[:1], x, k, 20, 20, live)[0].tolist() == [[7, 0, 1, 6, 2, 3, 4, 5][:k]]


@both
@pytest.mark.parametrize('precision', ['fp32', 'int8'])
def test_a_batch_is_its_queries(name, precision):
    "Whatever is multiplied at once"
    books, trie, q = world_of(400)
    dec, x = decoder(name, trie, books, precision=precision), np.random.default_rng(3).normal(size=(400, 6)).astype(np.float32)
    q = np.concatenate([q, -q])[:11]
    for call in (lambda q: dec.search(q, 3, 20), lambda q: dec.leaves(q, 9), lambda q: dec.nearest(q, x, 5, 3, 40, patience=8), lambda q: (dec.tables(q),)):
        for whole, *single in zip(call(q), *(call(q[i:i + 1]) for i in range(len(q)))): assert np.array_equal(whole, np.concatenate(single))


@both
def test_large_buckets_are_found_whole(name):
    "Many items an ID, more than 256 IDs, with and without twins in the side trie"
    g = np.random.default_rng(1)
    books = [g.normal(size=(20, 6)).astype(np.float32) for _ in range(2)]
    codes, q = g.integers(0, 20, (5000, 2)), g.normal(size=(5, 6)).astype(np.float32)
    trie = Trie.build(make_ids(codes, (20, 20)))
    assert len(trie) > 300 and len(trie.extra) > 4000
    dec, live = decoder(name, trie, books), LiveTrie(trie).add(codes[:900:3].astype(trie.codes.dtype), np.arange(5000, 5300))
    for lv, all_codes in ((None, codes), (live, np.concatenate([codes, codes[:900:3]]))):
        rows = dec.search(q, 12, 120, lv)[0]
        for r in rows:
            bucket = all_codes[r]
            ends = np.flatnonzero((bucket[1:] != bucket[:-1]).any(1)) + 1                 # IDs follow one another; each but the last is whole, in order of row
            assert len(set(r)) == 120 and (np.diff(r)[np.setdiff1d(np.arange(119), ends - 1)] > 0).all()
            for a, b in zip(np.r_[0, ends[:-1]], ends): assert r[a:b].tolist() == np.flatnonzero((all_codes == bucket[a]).all(1)).tolist()


@both
def test_filters_and_snapshots_may_alternate(name):
    "What was made for the last few live tries is there the next time, and answers stay right"
    books, trie, q = world_of(400)
    dec, odd = decoder(name, trie, books), np.arange(400) % 2 == 1
    live = LiveTrie(trie).add(np.uint8([[0, 0, 0], [1, 1, 1]]), [400, 401])
    tries = [LiveTrie(trie).where(odd), LiveTrie(trie).where(~odd), live, live.remove([400])]
    views, rows = [dec._view_of(t, 5) for t in tries], [dec.search(q, 5, 20, t)[0] for t in tries]
    for _ in range(2):
        for t, view, r in zip(tries, views, rows): assert dec._view_of(t, 5) is view and np.array_equal(dec.search(q, 5, 20, t)[0], r)
    for r, rest in zip(rows, (1, 0)): assert (r >= 0).sum() > 500 and (r[r >= 0] % 2 == rest).all()
    for i in range(20): dec.search(q, 5, 5, live.remove([i]))
    assert len(dec._lives) <= 8 and dec._view_of(live, 5) is not views[2]
    assert np.array_equal(dec.search(q, 5, 20, live)[0], rows[2])


def test_eight_bits_stay_close_where_they_are_chosen():
    g = np.random.default_rng(0)
    books = [g.normal(size=(2000, 512)).astype(np.float32) / 512 ** .5, g.normal(size=(200, 512)).astype(np.float32) / 60]
    trie = Trie.build(make_ids(np.c_[g.integers(0, 2000, 500), g.integers(0, 200, 500)], (2000, 200)))
    dec, q = LightDecoder(trie, books), g.normal(size=(9, 512)).astype(np.float32) / 512 ** .5
    assert dec.precision == 'int8' and LightDecoder(trie, [b[:, :64].copy() for b in books]).precision == 'fp32'
    assert np.abs(dec.tables(q) - q @ np.concatenate(books).T).max() < 3e-3 and np.abs(dec.tables(q) - q @ np.concatenate(books).T).std() < 6e-4


def test_bytes_are_those_of_the_arrays():
    books, trie, _ = world_of()
    starts = 4 * -(-(len(trie) + 512) // 256)                                         # where every 256th leaf's postings begin
    assert LightDecoder(trie, books).bytes() == 2 * (len(trie) + len(trie.code)) + starts
    assert LightDecoder(trie, books, norms='gram').bytes() == 2 * len(trie.code) + 4 * 24 ** 2 + starts


def test_the_penalty_is_fitted_on_what_is_asked_for():
    books, trie, q = world_of()
    dec = LightDecoder(trie, books)
    truth = dec.with_penalty(.25).search(q, 400, 10)[0]
    best, found = fit_penalty(dec, q, truth, 400, 10)
    assert best.penalty == .25 and found[.25] == 1 and found[1.] < 1 and dec.penalty == 1


def test_a_query_without_truth_is_left_out():
    books, trie, q = world_of()
    dec = LightDecoder(trie, books)
    truth = dec.with_penalty(.25).search(q, 400, 10)[0]
    truth[::2] = -1
    best, found = fit_penalty(dec, q, truth, 400, 10)
    assert best.penalty == .25 and found == fit_penalty(dec, q[1::2], truth[1::2], 400, 10)[1] and found[.25] == 1
    with pytest.raises(ValueError, match='truth: expected an item row'): fit_penalty(dec, q, np.full_like(truth, -1))


@both
def test_an_added_item_without_a_codeword_is_refused(name):
    g = np.random.default_rng(0)
    books = [g.normal(size=(5, 8)).astype(np.float32) for _ in range(3)]
    trie = Trie.build(make_ids(g.integers(0, 5, (300, 3)), (256,) * 3), 64)
    dec = decoder(name, trie, books)
    with pytest.raises(ValueError, match='side: expected a codeword for every code of added items, got 5 at level 1, and code 5'):
        dec.search(np.ones((1, 8)), 5, 5, LiveTrie(trie).add(np.uint8([[4, 5, 0]]), [300]))
    assert 300 in dec.search(np.ones((1, 8)), 400, 400, LiveTrie(trie).add(np.uint8([[4, 4, 0]]), [300]))[0]


@both
@pytest.mark.parametrize('precision', ['fp32', 'int8'])
def test_queries_of_any_length_are_answered_or_refused(name, precision):
    books, trie, q = world_of()
    dec = decoder(name, trie, books, precision=precision)
    for scale in (1e30, 1e37):
        with pytest.raises(ValueError, match='queries: expected vectors shorter than'): dec.search(q * np.float32(scale), 5, 5)
    for scale in (1e25, 1e10, 1e-20, 1e-38, 1e-44, 0):
        rows, scores = dec.search(q * np.float32(scale), 400, 400)
        assert (np.sort(rows, 1) == np.arange(400)).all() and np.isfinite(scores).all() and np.isfinite(dec.tables(q * np.float32(scale))).all()
    long = decoder(name, trie, books, True, precision=precision)
    assert (long.leaves(q * np.float32(1e25), 30)[0] == long.leaves(q * np.float32(2.**83), 30)[0]).mean() > .9
    with pytest.raises(ValueError, match='codebooks: expected codewords shorter'): LightDecoder(trie, [b * np.float32(1e20) for b in books])


@both
def test_a_beam_beyond_the_pool_is_the_pool(name):
    books, trie, q = world_of()
    dec = decoder(name, trie, books)
    live = LiveTrie(trie).add(np.uint8([[0, 0, 0], [1, 1, 1]]), [400, 401])
    for lv in (None, live):
        a, b = dec.search(q[:3], 2**62, 7, lv), dec.search(q[:3], 500, 7, lv)
        assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) and a[0].shape == (3, 7)
        leaves, scores = dec.leaves(q[:3], 5000, lv)
        assert leaves.shape == (3, 5000) and ((leaves >= 0).sum(1) == len(trie) + 2 * (lv is not None)).all() and (scores[leaves < 0] == -np.inf).all()
        assert dec.search(q[:3], 5000, 5000, lv)[0].shape == (3, 5000) and dec.nearest(q[:3], np.zeros((402, 6), np.float32), 500, 5, 5, lv)[0].shape == (3, 500)


@fast
@given(worlds(wide=True), st.sampled_from([0, 3, 64]), st.integers(1, 12), st.integers(1, 40), st.integers(0, 9999), st.sampled_from(['fp32', 'int8']), st.sampled_from(['stored', 'gram']))
def test_both_kernels_give_the_same_bits_with_changes(world, scan, beam, want, seed, precision, norms):
    books, ids, q = world
    trie, g = Trie.build(ids, scan), np.random.default_rng(seed)
    n, m = int(trie.rows.max()) + 1, int(g.integers(1, 60))
    more = np.stack([g.integers(0, min(K, len(books[l]) if l < len(books) else K), m) for l, K in enumerate(trie.sizes)], 1)
    live = LiveTrie(trie).add(more.astype(ids.tokens.dtype), np.arange(n, n + m))
    if seed % 2: live = live.remove(np.flatnonzero(g.random(n + m) < .3))
    a, b = (decoder(name, trie, books, precision=precision, norms=norms) for name in (KERNELS[0], KERNELS[-1]))
    for u, v in zip((*a.search(q, beam, want, live), *a.leaves(q, beam, live)), (*b.search(q, beam, want, live), *b.leaves(q, beam, live))): assert np.array_equal(u, v)


needs_compiler = pytest.mark.skipif(native._compiler() is None, reason='no compiler')


@needs_compiler
def test_a_damaged_build_is_made_anew_and_one_outlives_its_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    first = native.build(native.SOURCE, native._compiler())
    made = first.read_bytes()
    assert native.build(native.SOURCE, None) == first                                 # the compiler is gone
    for bad in (b'', made[:1000], b'no library' * 99):
        first.unlink()                                                                # a loaded file must not change in place
        first.write_bytes(bad)
        with pytest.raises(RuntimeError, match='no C compiler'): native.build(native.SOURCE, None)
        assert not list((tmp_path / 'grnb').iterdir())
        first = native.build(native.SOURCE, native._compiler())
        assert native._load(native.SOURCE).packs() in (0, 1)
    junk = tmp_path / 'grnb' / f"{first.stem.rsplit('-', 1)[0]}-{native._digest(b'junk')}.so"
    first.unlink()
    junk.write_bytes(b'junk')                                                         # whole, but no library
    assert native._load(native.SOURCE).packs() in (0, 1) and not junk.exists()


@pytest.mark.parametrize('script, says', [('printf "\\351\\n" >&2; exit 1', 'could not build'), ('exit 0', 'nothing was made'), ('exec sleep 60', 'timed out')])
def test_a_compiler_that_does_not_work_leaves_numba(tmp_path, script, says):
    cc = tmp_path / 'cc'
    cc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo x && exit 0\n{script}\n')
    cc.chmod(0o755)
    code = 'from grnb.decode import native; native.PATIENCE = 2; print(native.kernel(), native.why())'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'CC': str(cc), 'XDG_CACHE_HOME': str(tmp_path), 'GRNB_KERNEL': ''})
    assert out.stdout.startswith('numba ') and says in out.stdout, out.stderr
    assert not list((tmp_path / 'grnb').iterdir())


@needs_compiler
def test_a_user_without_a_home_leaves_nothing_behind(tmp_path):
    code = "import pathlib; pathlib.Path.home = lambda: (_ for _ in ()).throw(RuntimeError('no home')); from grnb.decode import native; print(native.kernel())"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'XDG_CACHE_HOME': '', 'TMPDIR': str(tmp_path), 'GRNB_KERNEL': ''})
    assert out.stdout.strip() == 'c' and not list(tmp_path.glob('grnb-*')), out.stderr


def test_the_environment_chooses_the_kernel(tmp_path):
    run = lambda **env: subprocess.run([sys.executable, '-c', 'from grnb.decode.native import kernel; print(kernel())'], capture_output=True, text=True, env={**os.environ, **env})
    assert run(GRNB_KERNEL='numba').stdout.strip() == 'numba'
    no = dict(PATH='', CC='', XDG_CACHE_HOME=str(tmp_path))
    assert run(**no).stdout.strip() == 'numba'                                        # no compiler: no complaint
    asked = run(GRNB_KERNEL='c', **no)
    assert asked.returncode and 'GRNB_KERNEL=c' in asked.stderr
    with using('cobol'), pytest.raises(ValueError, match='GRNB_KERNEL'): native.kernel()


def test_no_queries_and_bad_input():
    books = [np.eye(3, dtype=np.float32)] * 2
    trie = Trie.build(make_ids(np.array([[0, 1], [2, 2]]), (3, 3)))
    dec = LightDecoder(trie, books)
    assert dec.search(np.zeros((0, 3)), 5, 4)[0].shape == (0, 4) and dec.leaves(np.zeros((0, 3)), 5)[0].shape == (0, 5)
    other = LiveTrie(Trie.build(make_ids(np.array([[0, 1], [1, 2]]), (3, 3)))).remove([0])
    x = np.eye(3, dtype=np.float32)[:2]
    for call, says in [(lambda: dec.search(np.ones((1, 2))), 'queries: expected width 3'), (lambda: dec.search(np.ones((1, 3)), 0), 'beam: '),
                       (lambda: dec.search(np.ones((1, 3)), 1, 0), 'candidates: '), (lambda: dec.leaves(np.ones((1, 3)), 1.5), 'beam: '),
                       (lambda: LightDecoder(trie, books[:1] * 4), 'codebooks: '), (lambda: dec.search([[np.inf, 0, 0]]), 'queries: expected finite'),
                       (lambda: LightDecoder(trie, [books[0], books[1][:2]]), 'codebooks: expected a codeword for every code'),
                       (lambda: LightDecoder(trie, books, norms='none'), 'norms: '), (lambda: LightDecoder(trie, books, precision='int4'), 'precision: '),
                       (lambda: LightDecoder(trie, books, penalty=-1.), 'penalty: '), (lambda: dec.search(np.ones((1, 3)), live=other), 'live: '),
                       (lambda: dec.nearest(np.ones((1, 3)), x[:1]), 'vectors: '), (lambda: dec.nearest(np.ones((1, 3)), x.astype(float)), 'vectors: '),
                       (lambda: dec.nearest(np.ones((1, 3)), np.asfortranarray(np.eye(3, dtype=np.float32))), 'vectors: '),
                       (lambda: dec.with_side(Trie.build(make_ids(np.array([[0]]), (3,)))), 'side: ')]:
        with pytest.raises(ValueError, match=says): call()
