"""Tries with changes and filters: always what a trie built anew from the same items shows, at every width, ties included."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from grnb.decode.beam import beam_search
from grnb.decode.expand import expand
from grnb.decode.light import LightDecoder
from grnb.ids.make import SemanticIDs, make_ids
from grnb.trie.kept import NOTHING, any_kept, as_bits, as_bools, extended, is_kept, kept_of, some_of, span
from grnb.trie.layout import LEARNED_SCAN, Trie
from grnb.trie.live import LiveTrie, _places

torch.set_num_threads(1)


class Table:
    "Step scores from a hash of the whole prefix and the query: small whole numbers, so sums are exact and ties are common"
    device = 'cpu'

    def __init__(self, sizes, values, seed): self.sizes, self.values, self.seed = tuple(sizes), values, seed

    def score(self, state, level):                                             # (..., 1 + level) → (..., K)
        h = (state * torch.tensor([7919 * (i + 1) + 13 for i in range(level + 1)])).sum(-1) * 2654435761 + self.seed
        return (((h[..., None] + torch.arange(self.sizes[level]) * 40503) * 2246822519 >> 13) % self.values).float()

    def start(self, queries): return queries[:, None, :1].long()

    def step(self, state, level, beams):
        if level: state = torch.cat([state.gather(1, beams.parent[..., None].expand(-1, -1, state.shape[2])), beams.code[..., None]], -1)
        return self.score(state, level), state

    def total(self, query, code):
        "The score of one ID"
        prefix, total = [query], 0.
        for l, c in enumerate(code):
            total += float(self.score(torch.tensor(prefix), l)[c])
            prefix.append(c)
        return total


class World:
    "A live trie beside a dict of its items: row → set of IDs"
    def __init__(self, sizes, scan, n, views, seed):
        self.sizes, self.g, self.views, self.total = tuple(sizes), np.random.default_rng(seed), views, n
        self.items = self.fresh(range(n))
        self.live = LiveTrie(Trie.build(self.ids(), scan), n)

    def fresh(self, rows): return {r: {tuple(c) for c in self.g.integers(0, self.sizes, (self.views, len(self.sizes))).tolist()} for r in rows}

    def ids(self):
        p = sorted((r, c) for r, cs in self.items.items() for c in cs)
        return SemanticIDs(np.array([c for _, c in p], np.uint16).reshape(-1, len(self.sizes)), np.array([r for r, _ in p], np.int64), self.sizes)

    def add(self, m):
        new = self.fresh(range(self.total, self.total + m))
        p = [(r, c) for r, cs in new.items() for c in cs]
        self.live, self.total = self.live.add(np.array([c for _, c in p]), np.array([r for r, _ in p])), self.total + m
        self.items |= new

    def remove(self, share):
        gone = [r for r in self.items if self.g.random() < share]
        self.live = self.live.remove(gone)
        for r in gone: del self.items[r]

    def limit(self, share, rows=False):
        mask = self.g.random(self.total) < share
        self.live = self.live.where(np.flatnonzero(mask) if rows else mask)
        self.items = {r: c for r, c in self.items.items() if mask[r]}


CHANGE = st.one_of(st.tuples(st.just('add'), st.integers(1, 9)), st.tuples(st.just('remove'), st.sampled_from([.05, .5, 1.])),
                   st.tuples(st.just('limit'), st.sampled_from([.03, .4, .9]), st.booleans()))

@st.composite
def worlds(draw, changes=6):
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 6, 40, 300]), min_size=1, max_size=5))
    w = World(sizes, draw(st.sampled_from([0, 2, 64, LEARNED_SCAN])), draw(st.integers(1, 60)), draw(st.integers(1, 2)), draw(st.integers(0, 10**6)))
    return w, draw(st.lists(CHANGE, max_size=changes)), draw(st.sampled_from([2, 4, 10**6])), draw(st.integers(0, 999))


def found(table, trie, width, wanted):
    return expand(*beam_search(table, np.arange(3)[:, None], trie, width), trie, wanted)


def same(a, b): return all((x == y).all() for x, y in zip(a, b))


# --- equal to a trie built anew

@settings(max_examples=160)
@given(worlds())
def test_a_search_sees_what_a_trie_built_anew_shows(given):
    "Random tries, filters, additions and removals interleaved: at every width the same candidates, scores and order"
    w, changes, values, seed = given
    table = Table(w.sizes, values, seed)
    for change, *how in [('none',), *changes]:
        if change != 'none': getattr(w, change)(*how)
        for width, wanted in ((1, 3), (4, 100), (30, 7)):
            got = found(table, w.live, width, wanted)
            if not w.items: assert (got[0] == -1).all() and (got[1] == -np.inf).all()
            else: assert same(got, found(table, Trie.build(w.ids(), 0), width, wanted)), (change, width)


@settings(max_examples=60)
@given(worlds(4))
def test_as_wide_as_the_tries_is_brute_force(given):
    w, changes, values, seed = given
    for change, *how in changes: getattr(w, change)(*how)
    table, n = Table(w.sizes, values, seed), len(w.items)
    rows, scores = found(table, w.live, len(w.live), max(1, n))
    for q in range(3):
        best = {}                                                              # an item counts with the best of its IDs
        for r, ids in w.items.items(): best[r] = min((-table.total(q, c), c) for c in ids)
        want = sorted(best, key=lambda r: (*best[r], r))
        assert rows[q, :n].tolist() == want and scores[q, :n].tolist() == [-best[r][0] for r in want]


@settings(max_examples=60)
@given(worlds())
def test_merged_is_the_trie_built_anew(given):
    w, changes, *_ = given
    for change, *how in changes: getattr(w, change)(*how)
    if not w.items:
        with pytest.raises(ValueError): w.live.merged()
        return
    a, b = w.live.merged().arrays(), Trie.build(w.ids(), w.live.base.scan).arrays()
    for k in a: assert np.array_equal(a[k], b[k]), k


@pytest.mark.parametrize('scan', [0, LEARNED_SCAN])
def test_a_prefix_that_lost_its_items_and_got_new_ones_is_one_child(scan):
    "Entries are taken to be alive until they win: then the search is made again, and their twins in the side trie count"
    base = Trie.build(make_ids(np.array([[0, 0], [1, 1], [1, 2], *[[2, c] for c in range(3)]]), (4, 3)), scan)
    live = LiveTrie(base).remove([0, 1, 2]).add([[0, 0], [0, 1], [3, 0]], [6, 7, 8])
    for width in (1, 2, 4, 9):
        root = live.advance(live.root(1), torch.tensor([[[3., 2., 1., 3.]]]), 0, width)
        alive = root.scores > -torch.inf
        assert root.code[alive].tolist() == [0, 3, 2][:width]
    ids = live.advance(root, torch.zeros(1, root.scores.shape[1], 3), 1, 9)
    assert live.spell(ids.lo[ids.scores > -torch.inf].numpy()).tolist() == [[0, 0], [0, 1], [3, 0], [2, 0], [2, 1], [2, 2]]


def test_snapshots_do_not_change():
    w = World((4, 4, 4), 2, 50, 1, 0)
    table, seen = Table(w.sizes, 5, 1), []
    for change, *how in [('add', 5), ('remove', .2), ('limit', .8), ('add', 9), ('remove', .3), ('add', 1)]:
        seen.append((w.live, found(table, w.live, 10, 20)))
        getattr(w, change)(*how)
    for live, before in seen: assert same(found(table, live, 10, 20), before)


def test_an_id_in_both_tries_is_one_bucket():
    trie = Trie.build(SemanticIDs(np.uint8([[0, 1], [0, 1], [1, 0]]), np.arange(3), (2, 2)))
    live = LiveTrie(trie).add([[0, 1], [1, 1]], [3, 4])
    assert expand(np.array([[0]]), np.float32([[1]]), live, 5)[0].tolist() == [[0, 1, 3, -1, -1]]
    assert expand(np.array([[2]]), np.float32([[1]]), live, 5)[0].tolist() == [[0, 1, 3, -1, -1]]               # the twin's number means the same
    assert expand(np.array([[2, 3, 0]]), np.float32([[3, 2, 1]]), live, 5)[0].tolist() == [[0, 1, 3, 4, -1]]
    assert expand(np.array([[0]]), np.float32([[1]]), live.remove([0, 1]), 5)[0].tolist() == [[3, -1, -1, -1, -1]]
    keyed = LiveTrie(trie).add([[0, 1], [1, 1]], [3, 4], key=[(1 << 32) | 7, 5])                                # item 3 belongs between 0 and 1
    assert expand(np.array([[0]]), np.float32([[1]]), keyed, 5)[0].tolist() == [[0, 3, 1, -1, -1]]
    assert live.spell([0, 1, 2, 3]).tolist() == [[0, 1], [1, 0], [0, 1], [1, 1]]


# --- filters

@pytest.mark.parametrize('batch', [1, 7])
def test_beams_never_die_on_a_prefix_without_an_allowed_item(batch):
    "However bad their scores, k allowed items are found by a beam of k"
    g = np.random.default_rng(0)
    codes = g.integers(0, 16, (3000, 4))
    live, table = LiveTrie(Trie.build(SemanticIDs(codes.astype(np.uint8), np.arange(3000), (16,) * 4), 64)), Table((16,) * 4, 10**6, 3)
    for k in (1, 2, 10):
        few = np.sort(g.choice(3000, k, replace=False))
        rows, _ = expand(*beam_search(table, np.arange(batch)[:, None], live.where(few), k, batch_size=batch), live.where(few), k)
        assert (np.sort(rows, 1) == few).all()


def test_a_filter_follows_additions_and_removals():
    w = World((5, 5), 3, 40, 1, 2)
    half, table = w.live.where(np.arange(40) % 2 == 0), Table((5, 5), 7, 0)
    more = w.live.add([[1, 1], [2, 2]], [40, 41])
    old = half.follow(more)
    assert same(found(table, old, 9, 50), found(table, half, 9, 50)) and (found(table, old.remove([0]), 25, 50)[0] != 0).all()
    assert (np.sort(found(table, more.where([40, 3]), 25, 50)[0], 1)[:, -2:] == [3, 40]).all()


# --- the light decoder

def brute(books, w, q):
    "Items by additive score, best ID first"
    r = np.array(sorted(w.items))
    x = np.array([sum(books[l][c] for l, c in enumerate(next(iter(w.items[i])))) for i in r])
    return r, q @ x.T - .5 * (x ** 2).sum(1)

@settings(max_examples=80)
@given(st.integers(0, 10**6), st.lists(CHANGE, max_size=4), st.sampled_from([2, 64]))
def test_the_light_decoder_with_a_wide_beam_is_brute_force(seed, changes, scan):
    g = np.random.default_rng(seed)
    books = [g.normal(size=(k, 6)).astype(np.float32) * s for k, s in ((9, 1), (5, .5), (7, .3))]
    w = World((9, 5, 7), scan, 120, 1, seed)
    light, q = LightDecoder(w.live.base, books), g.normal(size=(3, 6)).astype(np.float32)
    for change, *how in changes:
        getattr(w, change)(*how)
        if not w.items: return
        rows, scores = light.search(q, 400, len(w.items), live=w.live)
        r, want = brute(books, w, q)
        for i in range(3):
            assert sorted(rows[i].tolist()) == r.tolist() and np.allclose(scores[i], -np.sort(-want[i]), atol=2e-3)
            assert np.allclose(scores[i], want[i][np.searchsorted(r, rows[i])], atol=2e-3)


# --- the parts

@settings(max_examples=150)
@given(st.integers(1, 9000), st.sampled_from([0, .0005, .02, .5, 1]), st.integers(0, 999))
def test_bits(n, share, seed):
    g = np.random.default_rng(seed)
    mask = g.random(n) < share
    words = as_bits(mask)
    some = some_of(words)
    assert (as_bools(words, n) == mask).all() and all(is_kept(words, i) == mask[i] for i in g.integers(0, n, 20))
    for lo, hi in [(0, n), *np.sort(g.integers(0, n + 1, (40, 2)), 1)]: assert any_kept(words, some, lo, hi) == mask[lo:hi].any() and any_kept(NOTHING, NOTHING, lo, hi) == (lo < hi)
    for value in (True, False):
        more = n + int(g.integers(0, 200))
        assert (as_bools(extended(words, n, more, value), more) == np.r_[mask, np.full(more - n, value)]).all()


@settings(max_examples=80)
@given(worlds(0), st.integers(0, 999))
def test_places(given, seed):
    w, *_ = given
    trie, codes = w.live.base, np.random.default_rng(seed).integers(0, w.sizes, (30, len(w.sizes)))
    place, there = np.empty(30, np.int64), np.empty(30, bool)
    _places(codes, trie.tail, trie.begin, trie.width, trie.code, trie.lo, trie.hi, trie.first, place, there)
    have = [tuple(c) for c in trie.codes.tolist()]
    assert place.tolist() == [sum(h < tuple(c) for h in have) for c in codes.tolist()] and there.tolist() == [tuple(c) in have for c in codes.tolist()]


@settings(max_examples=60)
@given(worlds(), st.floats(0, 1))
def test_leaves_are_marked_alike_one_by_one_and_at_once(given, share):
    w, changes, *_ = given
    for change, *how in changes: getattr(w, change)(*how)
    if w.live.kept is None: return
    for trie, kept in ((w.live.base, w.live.kept), (w.live.side, w.live.side_kept)):
        if kept is not None and trie is not None: assert all(np.array_equal(a, b) for a, b in zip(kept, kept_of(trie, w.live.rows)))


@settings(max_examples=60)
@given(worlds(), st.integers(0, 999))
def test_items_are_counted_as_they_come_and_go(given, seed):
    w, changes, *_ = given
    g = np.random.default_rng(seed)
    view = w.live.where(g.random(w.live.total) < .5)
    for change, *how in changes:
        before = w.live.total
        getattr(w, change)(*how)
        view = view.follow(w.live) if w.live.total > before else view.remove(np.flatnonzero(~as_bools(w.live.rows, before))) if len(w.live.rows) else view
        for live in (w.live, view): assert live.items == (as_bools(live.rows, live.total).sum() if len(live.rows) else live.total)


def test_many_items_of_one_id_leave_in_proportion():
    "Each leaf is looked at once, however many of its items go; whether first, last or a middle one stays"
    from time import perf_counter
    n = 50_000
    codes = np.zeros((n, 2), np.uint8)
    codes[-1] = 1
    live = LiveTrie(Trie.build(SemanticIDs(codes, np.arange(n), (2, 2))))
    live.remove([0])
    for stays in (0, n - 2, 777):
        start, gone = perf_counter(), np.delete(np.arange(n - 1), stays)
        one = live.remove(gone)
        assert perf_counter() - start < 1 and one.items == 2                        # one by one it is a billion postings
        assert as_bools(one.kept.words, 2).tolist() == [True, True] and as_bools(one.remove([stays]).kept.words, 2).tolist() == [False, True]
        assert span(live.base.extra, 0) == (0, n - 1) and span(live.base.extra, 1) == (n - 1, n)


def test_a_change_does_not_touch_the_whole_pool():
    "A side trie's decoder, the rows of an id, and a named filter take memory and time for what changed"
    import tracemalloc
    from grnb.pool import limited, make_pool, rows_of
    from grnb.recipes import Recipe, fit_recipe
    g = np.random.default_rng(0)
    x = g.normal(size=(200_000, 4)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    fitted = fit_recipe(Recipe(K=16, L=2), x[:500])
    pool = make_pool(fitted, np.arange(len(x)), x, fitted.quantizer.encode(x))
    live = pool.live.add([[1, 2]], [len(x)])
    few = pool.live.where(np.arange(1000))
    pool.filters['few'] = few
    rows_of(pool, np.array([5])), pool.decoder.with_side(live.side)
    for call in (lambda: rows_of(pool, np.array([5, -1, 199_999])), lambda: limited(pool, 'few'), lambda: pool.decoder.with_side(live.side)):
        tracemalloc.start()
        call()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 100_000
    assert rows_of(pool, np.array([5, -1, 199_999])).tolist() == [5, -1, 199_999] and limited(pool, 'few') == (few, 1000)


@pytest.mark.parametrize('call, says', [
    (lambda t: t.add([[0, 9]], [5]), 'codes'), (lambda t: t.add([[0, 0]], [1]), 'rows: expected numbers from 3 on'), (lambda t: t.add([[0, 0]], [3, 4]), 'rows: expected one for each'),
    (lambda t: t.add([], []), 'rows'), (lambda t: t.add([[0, 0]], [3.]), 'rows: expected whole numbers'), (lambda t: t.remove([3]), 'rows: expected 0 to 2'), (lambda t: t.remove([-1]), 'rows'),
    (lambda t: t.remove([.5]), 'rows'), (lambda t: t.where([True]), 'which: expected a mask of 3'), (lambda t: t.where([7]), 'which: expected rows 0 to 2'),
    (lambda t: t.remove([0, 1, 2]).merged(), 'at least one'),
    (lambda t: t.add([[0, 0]], [3], key=[]), 'key: expected one for each of the 1 rows added so far, got 0'), (lambda t: t.add([[0, 0]], [3], key=[1, 2]), 'key: expected one for each of the 1'),
    (lambda t: t.add([[0, 0]], [4], key=[1]), 'key: expected one for each of the 2'), (lambda t: t.add([[0, 0]], [3], key=[1]).add([[0, 0]], [4]), 'key: expected one for each of the 2 rows added so far, got 1'),
    (lambda t: t.add([[0, 0]], [3], key=[1]).add([[0, 0]], [4], key=[1]), 'key: expected one'), (lambda t: t.add([[0, 0]], [3]).add([[0, 0]], [4], key=[1]), 'key: expected one for each of the 2'),
    (lambda t: t.add([[0, 0]], [3], key=[.5]), 'key: expected whole numbers'), (lambda t: LiveTrie(t.base, 2), 'rows: expected at least 3'), (lambda t: LiveTrie(t.base, 3.), 'rows: expected a whole number'),
])
def test_bad_input(call, says):
    live = LiveTrie(Trie.build(SemanticIDs(np.uint8([[0, 1], [0, 1], [1, 0]]), np.arange(3), (2, 2))))
    with pytest.raises(ValueError, match=says): call(live)


def test_a_live_trie_starts_from_one_root():
    live = LiveTrie(Trie.build(make_ids(np.array([[0, 1], [2, 1]]), (3, 2)))).remove([0])
    root = live.root(1)
    two = type(root)(*(None if t is None else torch.cat([t, t], 1) for t in root))
    with pytest.raises(ValueError, match='beams: expected the one root a query at level 0, got 2'): live.advance(two, torch.zeros(1, 2, 3), 0, 4)
