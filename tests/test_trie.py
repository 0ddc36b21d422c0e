"""The trie against brute force over the set of IDs: the sort, the layout, the step on both paths, and files that are damaged or lie."""
import copy
import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from grnb.core import load_arrays, save_arrays
from grnb.ids.make import SemanticIDs, make_ids
from grnb.trie.beams import Beams, results
from grnb.trie.build import sort_postings
from grnb.trie.check import _digest, _frozen, checksum, seal
from grnb.trie.layout import LEARNED_SCAN, Trie
from grnb.trie.select import best, kth_largest, passing, rank_key, ranked
from grnb.trie.step import _advance_tensor, _mask_tensor, advance, lower, run_end

fast = settings(max_examples=200, deadline=None)
SCANS = [0, 1, 3, 64, 4096, LEARNED_SCAN]


@st.composite
def pools(draw, most_levels=5, most=60):
    "IDs of a pool with duplicates and several IDs an item, the table's threshold, and a generator for scores"
    sizes = tuple(draw(st.lists(st.integers(1, 5) | st.sampled_from([40, 256, 257, 300]), min_size=1, max_size=most_levels)))
    g = np.random.default_rng(draw(st.integers(0, 2**20)))
    c = g.integers(0, np.minimum(sizes, draw(st.sampled_from([2, 5, 400]))), (draw(st.integers(1, most)), draw(st.integers(1, 2)), len(sizes)))
    return make_ids(c, sizes), draw(st.sampled_from(SCANS)), g


@st.composite
def wide_pools(draw):
    "IDs of 1 to 16 levels of up to 65,536 codes, crowded so that prefixes and whole IDs are shared"
    sizes = tuple(draw(st.lists(st.sampled_from([2, 7, 256, 257, 2048, 65536]), min_size=1, max_size=16)))
    g = np.random.default_rng(draw(st.integers(0, 2**20)))
    few = [g.integers(0, s, draw(st.integers(1, 4))) for s in sizes]
    n = draw(st.sampled_from([1, 5, 300]))
    codes = np.stack([f[g.integers(0, len(f), n)] for f in few], 1)
    return SemanticIDs(codes.astype(np.uint16), np.sort(g.integers(0, 2 * n, n)), sizes), draw(st.sampled_from(SCANS)), g


def steps_of(g, B, W, K):
    "Step scores of which many are equal"
    return torch.from_numpy(g.integers(-3, 4, (B, W, K)).astype(np.float32))


def slow_advance(leaves, beams, steps, level, width):
    "Beams as lists of (score, parent, code, lo, hi), by looking at every ID"
    out = []
    for b in range(len(steps)):
        kids = []
        for w in range(beams.scores.shape[1]):
            if beams.scores[b, w] == -np.inf: continue
            lo, hi = int(beams.lo[b, w]), int(beams.hi[b, w])
            for c in np.unique(leaves[lo:hi, level]):
                at = lo + np.flatnonzero(leaves[lo:hi, level] == c)
                v = float(beams.scores[b, w] + steps[b, w, int(c)])
                if v > -np.inf: kids.append((v, w, int(c), int(at[0]), int(at[-1]) + 1))
        out.append(sorted(kids, key=lambda k: (-k[0], k[3]))[:width])
    return out


def alive(beams):
    "Beams as lists, dead ones left out"
    rows = zip(*(t.tolist() for t in beams[:5]))
    return [[k for k in zip(*row) if k[0] != -np.inf] for row in rows]


def fits(trie, beams):
    "Does every live beam's node stand for its range, or for none?"
    live = beams.scores > -torch.inf
    node, lo, hi = (x[live].numpy() for x in (beams.node, beams.lo, beams.hi))
    has = node >= 0
    return (trie.lo[node[has]] == lo[has]).all() and (trie.hi[node[has]] == hi[has]).all() and (beams.node[~live] == -1).all()


# --- the sort

@fast
@given(wide_pools(), st.booleans())
def test_build_is_a_lexicographic_sort(pool, shuffled):
    ids, scan, g = pool
    if shuffled:
        order = g.permutation(len(ids.rows))
        ids = ids._replace(tokens=ids.tokens[order], rows=ids.rows[order])
    t, order = Trie.build(ids, scan), np.lexsort((ids.rows, *ids.tokens.T[::-1]))
    leaves, of = np.unique(ids.tokens, axis=0, return_inverse=True)
    assert t.rows.tolist() == ids.rows[order].tolist() and t.codes.tolist() == leaves.tolist() and len(t) == len(leaves)
    assert np.repeat(np.arange(len(t)), np.diff(t.offsets)).tolist() == np.sort(of.ravel()).tolist()
    assert t.spell(np.arange(len(t))[::-1]).tolist() == leaves[::-1].tolist()
    assert [t.column(l).tolist() for l in range(t.levels)] == leaves.T.tolist()


@pytest.mark.parametrize('n, crowd', [(70_000, 1), (70_000, 4), (200_000, 16), (3_000, 256)])
def test_large_and_crowded_buckets(n, crowd):
    "Where most IDs share their leading bits, buckets outgrow the spare memory and are sorted one array at a time"
    g = np.random.default_rng(n)
    t = np.stack([g.integers(0, crowd, n), g.integers(0, 256, n), g.integers(0, 9, n), g.integers(0, 256, n)], 1).astype(np.uint8)
    s = sort_postings(t, np.arange(n), (256,) * 4)
    order = np.lexsort(t.T[::-1])
    assert (s.rows == order).all()
    differs = np.r_[0, [4 if (u := a != b).sum() == 0 else u.argmax() for a, b in zip(t[order][1:], t[order][:-1])]]
    assert (s.seen == np.bincount(differs, minlength=5)).all()


def test_sorting_on_several_cores_changes_nothing(monkeypatch):
    "Shares of very different size, empty ones, and IDs of few and of many bits"
    g = np.random.default_rng(0)
    for sizes, crowd in (((256,) * 4, 256), ((256,) * 4, 2), ((65536,) * 4, 65536), ((3,), 3)):
        t = np.stack([g.integers(0, min(s, crowd), 600_000) for s in sizes], 1).astype(np.uint16)
        alone, shared = (monkeypatch.setenv('OMP_NUM_THREADS', n) or sort_postings(t, np.arange(len(t)), sizes) for n in ('1', '4'))
        for a, b in zip(alone, shared): assert np.array_equal(a, b)


@pytest.mark.parametrize('crowd', [1, 256])
def test_building_takes_twice_the_index(crowd):
    "Beside the input; also where all IDs begin with one code"
    n, g = 400_000, np.random.default_rng(0)
    t = g.integers(0, 256, (n, 4), dtype=np.uint8)
    t[:, 0] = t[:, 0].astype(int) % crowd
    ids = SemanticIDs(t, np.arange(n), (256,) * 4)
    Trie.build(ids._replace(tokens=t[:1000], rows=ids.rows[:1000]), LEARNED_SCAN)
    tracemalloc.start()
    trie = Trie.build(ids, LEARNED_SCAN)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 2.05 * sum(trie.bytes().values())


# --- the layout

@fast
@given(pools())
def test_entries_are_the_children_of_open_prefixes(pool):
    ids, scan, _ = pool
    t = Trie.build(ids, scan)
    leaves = np.unique(ids.tokens, axis=0)
    assert (t.code[0], t.lo[0], t.hi[0]) == (0, 0, len(leaves))
    for d, (s, e) in enumerate(zip(t.blocks[:-1], t.blocks[1:])):
        for i in range(s, e):
            own = leaves[t.lo[i]:t.hi[i]]
            assert (own[:, :d] == own[0, :d]).all() and (d == 0 or t.code[i] == own[0, d - 1])
            kids = [(int(c), *(int(t.lo[i]) + np.flatnonzero(own[:, d] == c)[[0, -1]] + [0, 1]).tolist()) for c in np.unique(own[:, d])] if d < t.levels else []
            listed = [(int(t.code[k]), int(t.lo[k]), int(t.hi[k])) for k in range(t.first[i], t.first[i + 1])]
            assert listed == (kids if d < t.levels - 1 and (d < t.head or len(own) > scan) else [])
    assert t.first[-1] == len(t.code) == t.blocks[-1]
    assert t.head == t.levels - 1 if scan == 0 else (t.begin[:t.head] == -1).all() and (t.begin[t.head:] >= 0).all()


@fast
@given(pools())
def test_walking_in_numpy(pool):
    ids, scan, g = pool
    t, have = Trie.build(ids, scan), {tuple(c): i for i, c in enumerate(np.unique(ids.tokens, axis=0).tolist())}
    some = np.r_[ids.tokens[:5].astype(np.int64), g.integers(-1, np.array(ids.sizes) + 2, (20, t.levels))]
    assert t.find(some).tolist() == [have.get(tuple(c), -1) for c in some.tolist()]
    for c in some:
        for l in range(t.levels): assert t.children(c[:l]).tolist() == sorted({k[l] for k in have if list(k[:l]) == c[:l].tolist()})
    with pytest.raises(ValueError, match='codes: expected integers'): t.find(some[:, 1:])
    with pytest.raises(ValueError, match='prefix: expected fewer'): t.children(some[0])
    with pytest.raises(IndexError, match='leaves: expected 0 to'): t.spell([len(t)])


@fast
@given(pools())
def test_the_order_of_postings_does_not_matter(pool):
    ids, scan, g = pool
    order = g.permutation(len(ids.rows))
    a, b = Trie.build(ids, scan), Trie.build(ids._replace(tokens=ids.tokens[order], rows=ids.rows[order]), scan)
    for k, v in a.arrays().items(): assert v.tolist() == b.arrays()[k].tolist()


def test_bytes_are_those_promised():
    "First code ∝ 1/rank, the others uniform; item rows apart"
    g = np.random.default_rng(0)
    for n, most in ((10**5, 3.2), (10**4, 3.5), (1000, 4.3)):
        p = 1 / np.arange(1, 257)
        t = g.integers(0, 256, (n, 4), dtype=np.uint8)
        t[:, 0] = g.choice(256, n, p=p / p.sum())
        size = Trie.build(make_ids(t, (256,) * 4), LEARNED_SCAN).bytes()
        assert (size['ids'] + size['entries']) / n <= most
    mixed = Trie.build(SemanticIDs(g.integers(0, (2048,) + (256,) * 7, (50_000, 8)).astype(np.uint16), np.arange(50_000), (2048,) + (256,) * 7))
    assert mixed.head == 1 and mixed.bytes()['ids'] <= 7 * 50_000 + 8 * 64


def test_a_trie_cannot_be_written_to():
    t = Trie.build(make_ids(np.array([[0, 1], [1, 1]]), (2, 2)))
    for k, a in t.arrays().items():
        with pytest.raises(ValueError, match='read-only'): a[:1] = 0


def test_no_ids_and_bad_settings():
    one = make_ids(np.zeros((1, 2), int), (2, 2))
    with pytest.raises(ValueError, match='ids: expected at least one'): Trie.build(make_ids(np.zeros((0, 2), int), (2, 2)))
    with pytest.raises(ValueError, match='scan: expected at least 0'): Trie.build(one, -1)
    with pytest.raises(ValueError, match='expected tokens from 0 and below'): Trie.build(one._replace(tokens=np.uint8([[0, 2]])))
    with pytest.raises(ValueError, match='expected tokens from 0 and below'): Trie.build(SemanticIDs(np.uint16([[300] * 16]), np.array([0]), (256,) * 16))
    with pytest.raises(ValueError, match='expected tokens from 0 and below'): Trie.build(one._replace(tokens=np.array([[0, -1]])))
    for at in (0, 4):                                                              # IDs of more than 64 bits
        wide = np.array([[1, 2, 3, 4, 5], [1, 2, 3, 4, 7]])
        wide[0, at] = -5
        with pytest.raises(ValueError, match='expected tokens from 0 and below .*, got -5'): Trie.build(SemanticIDs(wide, np.arange(2), (65536,) * 5))
    with pytest.raises(ValueError, match='1 to 16 levels'): Trie.build(SemanticIDs(np.zeros((1, 17), np.uint8), np.array([0]), (2,) * 17))
    with pytest.raises(ValueError, match='1 to 65,536 codes'): Trie.build(one._replace(sizes=(2, 65537)))
    with pytest.raises(ValueError, match='expected whole tokens'): Trie.build(one._replace(rows=np.array([0, 1])))
    with pytest.raises(ValueError, match='item rows of at least 0'): Trie.build(one._replace(rows=np.array([-1])))


def test_item_rows_beyond_32_bits():
    ids = SemanticIDs(np.uint8([[1], [0], [1]]), np.array([2**40, 5, 7]), (2,))
    assert Trie.build(ids).rows.tolist() == [5, 7, 2**40]


# --- the step

@fast
@given(pools(), st.integers(1, 12))
def test_steps_are_those_of_brute_force_on_both_paths(pool, width):
    ids, scan, g = pool
    trie, leaves = Trie.build(ids, scan), np.unique(ids.tokens, axis=0)
    beams = both = trie.root(2)
    for level in range(trie.levels):
        steps = steps_of(g, 2, beams.scores.shape[1], max(ids.sizes))
        if level: assert (trie.mask(beams, level) == slow_mask(leaves, beams, level, ids.sizes[level])).all()
        want = slow_advance(leaves, beams, steps, level, width)
        both = _advance_tensor(trie.tensors('cpu'), both, steps, level, width)
        beams = trie.advance(beams, steps, level, width)
        assert alive(beams) == want and all(torch.equal(x, y) for x, y in zip(beams[:6], both[:6]))
        assert beams.scores.shape == (2, width) and fits(trie, beams)
    found = beams.lo[beams.scores > -torch.inf]
    assert (beams.hi[beams.scores > -torch.inf] == found + 1).all()                # after the last level, a leaf each


def slow_mask(leaves, beams, level, size):
    "bool (B, W, size) by looking at every leaf"
    out = torch.zeros(*beams.scores.shape, size, dtype=torch.bool)
    for b, w in np.ndindex(*beams.scores.shape):
        if beams.scores[b, w] > -torch.inf: out[b, w, torch.from_numpy(leaves[beams.lo[b, w]:beams.hi[b, w], level].astype(np.int64))] = True
    return out


@pytest.mark.parametrize('scan', [0, 64, LEARNED_SCAN])
@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('sizes', [(256,) * 3, (300, 256, 40), (8, 65536)])
def test_large_pools_equal_a_masked_top_k(sizes, ties, scan):
    "Enough leaves that thresholds, searches by position and full buffers all come in; narrow and wide beams"
    g = np.random.default_rng(len(sizes) + ties)
    codes = np.minimum((g.random((30_000, len(sizes))) ** 2 * sizes).astype(int), np.array(sizes) - 1)
    trie = Trie.build(make_ids(codes, sizes), scan)
    for width in (1, 50, 700) if max(sizes) < 1000 else (1, 20):
        beams = both = trie.root(2)
        for level, K in enumerate(sizes):
            steps = torch.from_numpy(g.normal(size=(2, beams.scores.shape[1], K)).astype(np.float32))
            if ties: steps = steps.round() * 0 if level == 1 else steps.round()
            value = torch.where(trie.mask(beams, level), beams.scores[..., None] + steps, -torch.inf).flatten(1)
            after = trie.advance(beams, steps, level, width)
            both = _advance_tensor(trie.tensors('cpu'), both, steps, level, width)
            top = value.topk(min(width, value.shape[1])).values
            assert torch.equal(after.scores[:, :top.shape[1]], top) and (after.scores[:, top.shape[1]:] == -torch.inf).all()
            assert all(torch.equal(x, y) for x, y in zip(after[:6], both[:6])) and fits(trie, after)
            beams = after


@pytest.mark.parametrize('sizes, scan', [((2048, 256, 256), 64), ((2048, 256, 256), 0), ((16, 4, 4), 0), ((16, 4, 4), 3), ((300, 2, 3), LEARNED_SCAN), ((4, 16, 4), 0)])
def test_levels_of_unlike_sizes_on_both_paths(sizes, scan):
    "What does not exist, below closed prefixes and dead beams, has no code of another level"
    g = np.random.default_rng(0)
    trie = Trie.build(make_ids(g.integers(0, sizes, (3000, len(sizes))), sizes), scan)
    beams = trie.root(2)
    for level, K in enumerate(sizes):
        if level: beams = beams._replace(scores=beams.scores.index_fill(1, torch.tensor([1]), -torch.inf), node=beams.node.index_fill(1, torch.tensor([1]), -1))   # a dead beam among the others
        steps = steps_of(g, 2, beams.scores.shape[1], K)
        assert torch.equal(trie.mask(beams, level), _mask_tensor(trie.tensors('cpu'), beams, level))
        after, both = trie.advance(beams, steps, level, 40), _advance_tensor(trie.tensors('cpu'), beams, steps, level, 40)
        assert all(torch.equal(x, y) for x, y in zip(after[:6], both[:6])) and (after.scores[:, 0] > -torch.inf).all()
        beams = after


def test_a_batch_is_its_queries_one_by_one(monkeypatch):
    "Also where it is large enough to be shared among threads"
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    g = np.random.default_rng(0)
    trie = Trie.build(make_ids(g.integers(0, 256, (20_000, 3)), (256,) * 3), LEARNED_SCAN)
    first = torch.from_numpy(g.normal(size=(900, 1, 256)).astype(np.float32))
    then = torch.from_numpy(g.normal(size=(900, 50, 256)).astype(np.float32))
    beams = trie.advance(trie.root(900), first, 0, 50)
    after = trie.advance(beams, then, 1, 50)
    for b in range(0, 900, 97):
        one = trie.advance(Beams(*(x[b:b + 1] for x in beams[:6])), then[b:b + 1], 1, 50)
        assert all(torch.equal(x[b:b + 1], y) for x, y in zip(after[:6], one[:6]))


def test_scores_that_are_no_numbers():
    "NaN and −inf are never kept, +inf wins, −0 equals 0"
    trie = Trie.build(make_ids(np.arange(6)[:, None], (6,)))
    steps = torch.tensor([[[torch.nan, 0., -torch.inf, -0., torch.inf, -1.]]])
    for step in (trie.advance, lambda *a: _advance_tensor(trie.tensors('cpu'), *a)):
        got = step(trie.root(1), steps, 0, 6)
        assert got.code[0, :4].tolist() == [4, 1, 3, 5] and (got.scores[0, 4:] == -torch.inf).all() and (got.node == -1).all()
    with pytest.raises(ValueError, match='at least 6 codes, got'): trie.advance(trie.root(1), steps[..., 1:], 0, 2)


def walked(trie, steps, width=20):
    "Beams after all levels"
    beams = trie.root(len(steps[0]))
    for level, s in enumerate(steps): beams = trie.advance(beams, s[:, :beams.scores.shape[1]], level, width)
    return beams


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=['copy', 'pickle'])
def test_a_copy_outlives_what_it_was_copied_from(copied):
    "Addresses kept from steps before belong to the arrays of the original"
    g = np.random.default_rng(0)
    trie = Trie.build(make_ids(g.integers(0, 40, (5000, 3)), (40,) * 3), 64)
    steps = [torch.from_numpy(g.normal(size=(2, 20, 40)).astype(np.float32)) for _ in range(3)]
    want = walked(trie, steps)
    other = copied(trie)
    for k in ('tail', 'code', 'lo', 'hi', 'first'):                            # the original's arrays, still mapped, now say something else
        a = getattr(trie, k)
        a = a if a.base is None else a.base
        a.flags.writeable = True
        a[:] = 0
    assert all(torch.equal(x, y) for x, y in zip(walked(other, steps)[:6], want[:6]))


@pytest.mark.parametrize('inference', [False, True])
def test_results_are_given_to_one_taker(inference):
    "By many threads at once; in a mode they can be used in; and they stay what they were while more are made"
    def take(_):
        with torch.inference_mode(inference): return [results(2, 3, side=True) for _ in range(100)]
    with ThreadPoolExecutor(16) as pool: taken = [r for many in pool.map(take, range(16)) for r in many]
    for i, (beams, *_) in enumerate(taken):
        assert all(t.is_inference() == inference for t in beams)
        with torch.inference_mode(inference):
            for t in beams: t.fill_(i)
    assert all((t == i).all() for i, (beams, *_) in enumerate(taken) for t in beams)


def test_beams_that_do_not_fit():
    "Other types and strides are converted, other shapes refused: the compiled step reads by address"
    g = np.random.default_rng(0)
    trie = Trie.build(make_ids(g.integers(0, 9, (500, 3)), (9,) * 3), 5)
    beams = trie.advance(trie.root(3), torch.from_numpy(g.normal(size=(3, 1, 9)).astype(np.float32)), 0, 6)
    steps = torch.from_numpy(g.normal(size=(3, 6, 9)).astype(np.float32))
    want = trie.advance(beams, steps, 1, 6)
    strided = Beams(*(x.T.contiguous().T for x in beams[:6]))
    typed = Beams(beams.scores.double(), *(x.int() for x in beams[1:6]))
    for odd, s in ((strided, steps.transpose(0, 1).contiguous().transpose(0, 1)), (typed, steps.double())):
        assert all(torch.equal(x, y) for x, y in zip(trie.advance(odd, s, 1, 6)[:6], want[:6]))
    for k in ('lo', 'hi', 'node'):
        with pytest.raises(ValueError, match='beams: expected shape'): trie.advance(beams._replace(**{k: beams.lo[:, :5]}), steps, 1, 6)
    with pytest.raises(ValueError, match='steps: expected scores of'): trie.advance(beams, steps[:, :5], 1, 6)


def test_no_queries_and_no_width():
    trie = Trie.build(make_ids(np.array([[0, 1], [2, 1]]), (3, 2)))
    root = trie.root(0)
    assert root.scores.shape[0] == 0 and trie.advance(root, torch.zeros(0, 1, 3), 0, 4).scores.shape == (0, 4)
    with pytest.raises(ValueError, match='at most 2.32 scores a query'): trie.advance(trie.root(1), torch.zeros(1, 1, 1).expand(1, 1, 2 ** 32 + 1), 0, 4)


def test_threads_that_plan_at_once():
    "The first steps of a new trie from many threads"
    for _ in range(50):
        trie = Trie.build(make_ids(np.array([[0, 1], [2, 1]]), (3, 2)))
        root = trie.root(1)
        with ThreadPoolExecutor(8) as pool: got = list(pool.map(lambda _: trie.advance(root, torch.zeros(1, 1, 3), 0, 2).code.tolist(), range(16)))
        assert got == [[[0, 2]]] * 16


def test_dead_beams_stay_dead():
    trie = Trie.build(make_ids(np.array([[0, 0], [1, 1]]), (2, 2)))
    dead = trie.root(1)
    dead = Beams(torch.full_like(dead.scores, -torch.inf), *dead[1:])
    for step in (trie.advance, lambda *a: _advance_tensor(trie.tensors('cpu'), *a)):
        assert (step(dead, torch.zeros(1, 1, 2), 0, 3).scores == -torch.inf).all()
    assert not trie.mask(dead, 0).any()


@fast
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=60), st.data())
def test_selection_is_that_of_sorting(values, data):
    k = data.draw(st.integers(1, len(values)))
    v, lo = np.float32(values), np.random.default_rng(len(values)).permutation(len(values))
    assert kth_largest(v.copy(), k) == sorted(values, reverse=True)[k - 1]
    want = sorted(range(len(v)), key=lambda i: (-v[i], lo[i]))[:k]
    assert best(v, lo, k).tolist() == want
    key, slot = np.array([rank_key(x, l) for x, l in zip(v, lo)], np.uint64), np.arange(len(v))
    assert ranked(key, slot, len(v), k) == k and slot[:k].tolist() == want
    hits = np.empty(len(v), np.int64)
    assert hits[:passing(v, np.float32(.5), np.float32(k - 3), hits)].tolist() == np.flatnonzero(v + .5 >= k - 3).tolist()


@fast
@given(st.integers(1, 300), st.integers(0, 2**20), st.sampled_from([1, 3, 256]))
def test_searching_a_column(n, seed, crowd):
    g = np.random.default_rng(seed)
    column = _frozen(np.sort(g.integers(0, crowd, n)).astype(np.uint8))
    a, b = sorted(g.integers(0, n + 1, 2).tolist())
    for c in range(0, 256, 5): assert lower(column, a, b, c, 256) == a + np.searchsorted(column[a:b], c)
    if a < b: assert run_end(column, a, b) == a + np.searchsorted(column[a:b], column[a], 'right')


# --- files

@settings(max_examples=20, deadline=None)
@given(pools())
def test_save_load_and_map(tmp_path_factory, pool):
    ids, scan, g = pool
    path = tmp_path_factory.mktemp('trie')/'t.safetensors'
    a = Trie.build(ids, scan)
    a.save(path)
    for mmap, verify in ((False, True), (True, True), (True, False)):
        b = Trie.load(path, mmap, verify)
        assert b.sizes == a.sizes and b.scan == a.scan and b.head == a.head and b.bytes() == a.bytes()
        for k, v in a.arrays().items(): assert v.dtype == b.arrays()[k].dtype and v.tolist() == b.arrays()[k].tolist()
        steps = steps_of(g, 1, 1, max(ids.sizes))
        assert alive(a.advance(a.root(1), steps, 0, 9)) == alive(b.advance(b.root(1), steps, 0, 9))
    b.save(path)                                                                  # over the file it is mapped from
    assert Trie.load(path).codes.tolist() == a.codes.tolist()


@pytest.fixture
def saved(tmp_path):
    "A trie of 50 IDs with entries beyond its head, its file, arrays and facts"
    g = np.random.default_rng(0)
    trie = Trie.build(SemanticIDs(g.integers(0, (4, 300, 5), (400, 3)).astype(np.uint16), np.arange(400), (4, 300, 5)), 30)
    trie.save(tmp_path/'t.safetensors')
    assert trie.head == 1 and len(trie.blocks) == 4 and len(trie.extra)
    return trie, tmp_path/'t.safetensors', *load_arrays(tmp_path/'t.safetensors')


def test_every_changed_byte_is_found(saved):
    _, path, *_ = saved
    whole, g = path.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], 'little')
    for at in [*range(header), *g.integers(header, len(whole), 200)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << g.integers(8))]) + whole[at + 1:])
        with pytest.raises(ValueError, match='t.safetensors'):
            if whole[at:at + 1] == b' ': raise ValueError('t.safetensors')        # blanks at the header's end mean nothing
            Trie.load(path)
    for cut in (0, 5, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match='t.safetensors'): Trie.load(path)


def lies(t):
    "Arrays that were never a trie's, each written with right checksums"
    put = lambda k, i, v: {k: np.r_[a[:i], a.dtype.type(v), a[i + 1:]] for a in [t.arrays()[k]]}
    U, E, (s, e) = len(t), len(t.code), t.blocks[1:3]
    yield from (put('lo', 0, 1), put('lo', 2, U), put('hi', 3, U + 1), put('hi', E - 1, U), put('lo', s, 1), put('hi', e, 0))
    yield from (put('first', 0, 0), put('first', 0, 2), put('first', E, E - 1), put('first', 1, 2**31), put('first', 3, 2), put('first', s + 1, int(t.first[s])))
    yield from (put('code', s, 4), put('code', s + 1, 0), put('code', E - 1, 299), put('code', E - 1, 60000), put('code', e, int(t.code[e]) + 1))
    yield from (put('extra', 0, U), put('extra', len(t.extra) - 1, 0), put('rows', 5, 400))
    at, last = int(t.begin[1]), int(t.begin[2])
    twin = 1 + np.flatnonzero((t.codes[1:, :2] == t.codes[:-1, :2]).all(1))[0]         # two leaves that differ in their last code alone
    yield from (put('tail', at + 1, 255), put('tail', at, 255), put('tail', last, 5), put('tail', last + twin, t.codes[twin - 1, 2]), put('tail', last + twin - 1, 4))


def test_lies_are_refused(saved):
    t, path, arrays, facts = saved
    plain = {k: facts[k] for k in ('kind', 'version', 'sizes', 'scan', 'head', 'items')}
    refused = 0
    for lie in lies(t):
        if 'tail' in lie: lie = dict(tail=lie['tail'].view(np.uint64))
        false = dict(arrays, **lie)
        if all(np.array_equal(false[k], arrays[k]) for k in arrays): continue
        save_arrays(path, false, seal(plain, false))
        with pytest.raises(ValueError, match='t.safetensors'): Trie.load(path)
        refused += 1
    assert refused > 20


@pytest.mark.parametrize('code', [0, 200])
def test_entries_below_the_last_prefix_are_refused(tmp_path, code):
    "An entry for every leaf, one level deeper than there are prefixes: a step would take a leaf's code for a child"
    codes = np.unique(np.random.default_rng(0).integers(0, 4, (30, 2)), axis=0).astype(np.uint8)
    t = Trie.build(SemanticIDs(codes, np.arange(len(codes)), (4, 4)), scan=0)
    a, E, U = t.arrays(), len(t.code), len(t)
    leaf = np.arange(U, dtype=np.uint32)
    first = np.r_[1, E + t.lo[1:], np.full(U + 1, E + U)].astype(np.uint32)
    deep = np.concatenate([np.arange(h - l) + code for l, h in zip(t.lo[1:].astype(int), t.hi[1:].astype(int))])
    false = dict(a, tail=t.tail.view(np.uint64), code=np.r_[a['code'], deep.astype(np.uint8)], lo=np.r_[a['lo'], leaf], hi=np.r_[a['hi'], leaf + 1], first=first)
    save_arrays(tmp_path/'t', false, seal(dict(kind='trie', version=2, sizes=[4, 4], scan=0, head=t.head, items=U), false))
    with pytest.raises(ValueError, match='t: not a trie: entries reach too deep'): Trie.load(tmp_path/'t')


@pytest.mark.parametrize('what', [1, None, [], ['uint8'], ['uint64', [1]], 'abc', [1, 2, 3], {}])
def test_forged_facts_of_arrays_are_refused(saved, what):
    t, path, arrays, facts = saved
    rest = {k: v for k, v in facts.items() if k != 'check'}
    for value in ({k: what for k in arrays}, {**facts['arrays'], 'tail': what}, what):
        false = dict(rest, arrays=value)
        save_arrays(path, arrays, dict(false, check=_digest(false)))
        with pytest.raises(ValueError, match='t.safetensors'): Trie.load(path)


def test_wrong_facts_and_shapes(saved):
    t, path, arrays, facts = saved
    plain = {k: facts[k] for k in ('kind', 'version', 'sizes', 'scan', 'head', 'items')}
    wrong = [({k: v for k, v in arrays.items() if k != drop}, plain) for drop in arrays]
    wrong += [(dict(arrays, **{k: arrays[k][:-1]}), plain) for k in arrays] + [(dict(arrays, rows=arrays['rows'].astype(np.float32)), plain), (dict(arrays, lo=arrays['lo'][None]), plain)]
    wrong += [(arrays, dict(plain, **{k: v})) for k, v in (('kind', 'quantiser'), ('version', 3), ('sizes', [4, 300]), ('sizes', 'abc'), ('sizes', [4, 300, 0]), ('sizes', [4, 3, 5]),
                                                           ('sizes', [4, 300, 5, 5]), ('head', 0), ('head', 2), ('head', 3), ('head', -1), ('scan', 'x'), ('items', 7), ('sizes', [[4], 3, 5]))]
    wrong += [(arrays, {k: v for k, v in plain.items() if k != drop}) for drop in plain]
    for a, m in wrong:
        save_arrays(path, a, seal(m, a))
        with pytest.raises(ValueError, match='t.safetensors'): Trie.load(path)
    save_arrays(path, arrays, dict(seal(plain, arrays), scan=31))
    with pytest.raises(ValueError, match='facts in the header'): Trie.load(path)
    save_arrays(path, arrays, [1])
    with pytest.raises(ValueError, match='expected a trie, got'): Trie.load(path)


def test_the_version_before_is_refused_by_name(tmp_path):
    save_arrays(tmp_path/'old', dict(codes=np.zeros((1, 2), np.uint8)), dict(kind='trie', version=1, sizes=[2, 2], scan=64))
    with pytest.raises(ValueError, match='old: expected a trie of version 2, got 1: build it again'): Trie.load(tmp_path/'old')


@fast
@given(st.binary(max_size=300), st.data())
def test_a_checksum_sees_every_change(raw, data):
    "Of length, of one bit, of order"
    seen = checksum(raw)
    assert seen == checksum(np.frombuffer(raw, np.uint8)) and len(seen) == 16
    assert checksum(raw + b'\0') != seen
    if raw:
        i = data.draw(st.integers(0, len(raw) - 1))
        assert checksum(raw[:i] + bytes([raw[i] ^ (1 << data.draw(st.integers(0, 7)))]) + raw[i + 1:]) != seen
        if raw[::-1] != raw: assert checksum(raw[::-1]) != seen
    words = np.frombuffer(raw[:len(raw) // 8 * 8], np.uint64).copy()
    if len(words) > 1:                                                            # two top bits far apart do not cancel
        j = data.draw(st.integers(1, len(words) - 1))
        words[[0, j]] ^= np.uint64(1 << 63)
        assert checksum(words) != checksum(raw[:words.nbytes])
