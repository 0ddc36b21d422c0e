"""Items with several vectors and several IDs: however a pool was changed, it is the pool that a fresh index of its items would be."""
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from grnb.core import unit
from grnb.decode.beam import beam_search
from grnb.decode.expand import expand
from grnb.generator.strong import StrongForm
from grnb.pool import Vectors, _grown, _taken, add_items, allowed, limited, make_pool, merge_pool, pick, remove_items, rows_of
from grnb.recipes import Fitted, Recipe

D = 5


class World:
    "A pool beside a dict: id → vectors and codes"
    def __init__(self, sizes, views, ids, n, text, seed):
        self.g, self.sizes, self.views, self.text, self.next = np.random.default_rng(seed), sizes, views, text, 0
        self.fitted = Fitted(Recipe(K=sizes, L=len(sizes)), None, SimpleNamespace(codebooks=[self.g.normal(size=(K, D)).astype(np.float32) for K in sizes]), None, {})
        self.codes, self.items, self.kept = ids, {}, None
        self.pool = make_pool(self.fitted, *self.fresh(n))

    def fresh(self, n):
        "Items that come in any order of id, before, between and after those there are"
        ids = (self.g.permutation(50 * n)[:n] * 1000 + self.next).astype(np.int64)
        self.next += 1
        ids = np.array([f'n{i}' for i in ids], object) if self.text else ids
        x = unit(self.g.normal(size=(n, D) if self.views is None else (n, self.views, D)).astype(np.float32))
        codes = self.g.integers(0, self.sizes, (n, len(self.sizes)) if self.codes is None else (n, self.codes, len(self.sizes))).astype(np.uint8)
        self.items |= dict(zip(ids.tolist(), zip(x, codes)))
        return ids, x, codes

    def some(self, share): return [i for i in sorted(self.items) if self.g.random() < share]
    def at(self, ids): return rows_of(self.pool, np.array(ids, object if self.text else np.int64))
    def add(self, n): self.pool = add_items(self.pool, *self.fresh(n))
    def merge(self): self.pool = merge_pool(self.pool)

    def remove(self, share):
        gone = self.some(share)
        self.pool = remove_items(self.pool, self.at(gone))
        for i in gone: del self.items[i]

    def again(self, ids=None):
        "A fresh pool of the same items, or of some"
        ids = sorted(self.items) if ids is None else ids
        x, codes = zip(*[self.items[i] for i in ids])
        return make_pool(self.fitted, np.array(ids, object if self.text else np.int64), np.array(x), np.array(codes))


CHANGES = st.lists(st.one_of(st.tuples(st.just('add'), st.integers(1, 7)), st.tuples(st.just('remove'), st.sampled_from([.1, .6])), st.tuples(st.just('merge'))), max_size=7)
worlds = st.builds(World, st.sampled_from([(2, 2), (3, 1, 4), (30, 2, 7)]), st.sampled_from([None, 1, 3]), st.sampled_from([None, 1, 2, 5]), st.integers(1, 25), st.booleans(), st.integers(0, 10**6))


def learned(pool, live, width, wanted):
    "Ids and scores by the beams of a generator"
    q = np.random.default_rng(0).normal(size=(3, D)).astype(np.float32)
    rows, scores = expand(*beam_search(StrongForm(pool.fitted.quantizer.codebooks), q, live, width), live, wanted)
    return [pick(pool, 0, r[r >= 0]).tolist() for r in rows], [s[s > -np.inf] for s in scores]


@settings(max_examples=80, deadline=None)
@given(worlds, CHANGES, st.sampled_from([.2, .7]))
def test_a_changed_pool_is_a_fresh_one(w, changes, share):
    "At every width the same items, by the same scores; and its merge is the fresh pool, array by array"
    for change, *how in changes: getattr(w, change)(*how)
    if not w.items: return
    fresh, merged, some = w.again(), merge_pool(w.pool), w.some(share)
    for width, wanted in ((1, 2), (4, 30), (200, 100)):
        for (a, sa), (b, sb) in [(learned(w.pool, w.pool.live, width, wanted), learned(fresh, fresh.live, width, wanted))] + ([(learned(w.pool, limited(w.pool, some)[0], width, wanted), (learned(p := w.again(some), p.live, width, wanted)))] if some else []):
            assert a == b and all(np.allclose(x, y, atol=1e-5) for x, y in zip(sa, sb))
    assert merged.items == len(w.items) and (merged.ids == fresh.ids).all() and (merged.codes == fresh.codes).all() and (merged.vectors[np.arange(len(fresh.ids))] == fresh.vectors).all()
    assert len(merged.live) == len(fresh.live) and (merged.live.base.rows == fresh.live.base.rows).all() and (merged.live.base.codes == fresh.live.base.codes).all()


@settings(max_examples=60, deadline=None)
@given(worlds, CHANGES, st.sampled_from([0., .2, .7]))
def test_the_nearest_view_counts_and_each_item_once(w, changes, share):
    "The light decoder as wide as the pool against brute force over the dict, with a filter and without"
    for change, *how in changes: getattr(w, change)(*how)
    q = unit(w.g.normal(size=(3, D)).astype(np.float32))
    for ids in (sorted(w.items), w.some(share)):
        if not ids: continue
        live, n = limited(w.pool, ids)
        assert n == len(ids) and sorted(pick(w.pool, 0, allowed(w.pool, ids)).tolist()) == ids
        rows, scores = w.pool.decoder.nearest(q, w.pool.vectors, n, len(live), n, live)
        best = np.array([[(np.atleast_2d(w.items[i][0]) @ x).max() for i in ids] for x in q])
        for row, score, want in zip(rows, scores, best):
            found = pick(w.pool, 0, row).tolist()
            assert sorted(found) == ids and np.allclose(score, np.sort(want)[::-1], atol=1e-5) and np.allclose(score, [want[ids.index(i)] for i in found], atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([(), (3,), (2, 3)]), st.integers(0, 5), st.lists(st.tuples(st.integers(0, 70), st.booleans()), max_size=5), st.integers(0, 999))
def test_vectors_are_one_array(shape, n, steps, seed):
    "Two parts and slots, grown and taken, against concatenation and indexing; older snapshots stay"
    g, shape = np.random.default_rng(seed), (*shape, 2)
    want = g.normal(size=(n, *shape)).astype(np.float16)
    have, old = want, []
    for m, slots in steps:
        x = g.normal(size=(m, *shape)).astype(np.float16)
        have, want = _grown(have, x), np.concatenate([want, x])
        if slots and len(want):
            rows = g.integers(0, len(want), len(want))
            have, want = _taken(have, rows, most=0), want[rows]
        old.append((have, want))
    for have, want in old:
        assert have.shape == want.shape and have.ndim == want.ndim and have.dtype == want.dtype and len(have) == len(want)
        at = g.integers(0, len(want), (2, 3)) if len(want) else np.zeros((0, 2), int)
        assert (have[np.arange(len(want))] == want).all() and (have[at] == want[at]).all()
        if isinstance(have, Vectors): assert have.nbytes == sum(a.nbytes for a in have.parts())


def test_a_row_more_copies_no_rows():
    one = _grown(np.zeros((1000, 2, D), np.float32), np.ones((3, 2, D), np.float32))
    two = _grown(one, np.ones((1, 2, D), np.float32))
    assert isinstance(two, Vectors) and two.base is one.base and two.more is one.more and len(one) == 1003 and len(two) == 1004


@pytest.mark.parametrize('views, more, says', [(3, 2, 'expected 3 vectors an item as in the pool, got 2 vectors an item'), (None, 3, 'expected one vector an item as in the pool, got 3'), (2, None, 'expected 2 .* got one')])
def test_another_number_of_vectors_is_refused(views, more, says):
    w = World((2, 2), views, 2, 6, False, 0)
    w.views = more
    with pytest.raises(ValueError, match=f'items: {says}'): add_items(w.pool, *w.fresh(2))
