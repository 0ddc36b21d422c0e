"""The trie against brute force over the set of IDs, at every table size, on both paths, and on damaged files."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from grnb.core import load_arrays, save_arrays
from grnb.ids.make import make_ids
from grnb.trie import Beams, Trie, _advance_tensor, best, kth_largest

fast = settings(max_examples=60, deadline=None)


@st.composite
def pools(draw):
    "IDs of a pool with duplicates and several IDs an item, the table's threshold, and a seed for scores"
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    g = np.random.default_rng(draw(st.integers(0, 2**20)))
    c = g.integers(0, sizes, (draw(st.integers(1, 40)), draw(st.integers(1, 2)), len(sizes)))
    return make_ids(c, sizes), draw(st.sampled_from([0, 1, 3, 64])), g


def steps_of(g, B, W, K):
    "Step scores of which many are equal"
    return torch.from_numpy(g.integers(-3, 4, (B, W, K)).astype(np.float32))


def slow_advance(ids, beams, steps, level, width):
    "Beams as lists of (score, parent, code, lo, hi), by looking at every ID"
    leaves, out = np.unique(ids.tokens, axis=0), []
    for b in range(len(steps)):
        kids = []
        for w in range(beams.scores.shape[1]):
            if beams.scores[b, w] == -np.inf: continue
            lo, hi = int(beams.lo[b, w]), int(beams.hi[b, w])
            for c in np.unique(leaves[lo:hi, level]):
                at = lo + np.flatnonzero(leaves[lo:hi, level] == c)
                kids.append((float(beams.scores[b, w] + steps[b, w, int(c)]), w, int(c), int(at[0]), int(at[-1]) + 1))
        out.append(sorted(kids, key=lambda k: (-k[0], k[3]))[:width])
    return out


def alive(beams):
    "Beams as lists, dead ones left out"
    rows = zip(*(t.tolist() for t in beams[:5]))
    return [[k for k in zip(*row) if k[0] != -np.inf] for row in rows]


@fast
@given(pools(), st.integers(1, 12))
def test_steps_are_those_of_brute_force_on_both_paths(pool, width):
    ids, scan, g = pool
    trie = Trie.build(ids, scan)
    beams = both = trie.root(2)
    for level in range(trie.levels):
        steps = steps_of(g, 2, beams.scores.shape[1], max(ids.sizes))
        want = slow_advance(ids, beams, steps, level, width)
        both = _advance_tensor(trie.tensors('cpu'), both, steps, level, width)
        beams = trie.advance(beams, steps, level, width)
        assert alive(beams) == want and alive(both) == want
        assert beams.scores.shape == (2, width)
        for b in (beams, both): assert (b.node[b.scores == -torch.inf] == -1).all()
    found = beams.lo[beams.scores > -torch.inf]
    assert (beams.hi[beams.scores > -torch.inf] == found + 1).all()                # after the last level, a leaf each


@fast
@given(pools())
def test_leaves_are_the_sorted_ids_and_postings_their_items(pool):
    ids, scan, _ = pool
    trie = Trie.build(ids, scan)
    assert trie.codes.tolist() == np.unique(ids.tokens, axis=0).tolist() and len(trie) == len(trie.codes)
    for u, code in enumerate(trie.codes.tolist()):
        assert trie.rows[trie.offsets[u]:trie.offsets[u + 1]].tolist() == ids.rows[(ids.tokens == code).all(1)].tolist()
    assert trie.offsets[-1] == len(trie.rows) == len(ids.rows)


@fast
@given(pools())
def test_the_order_of_postings_does_not_matter_between_ids(pool):
    ids, scan, g = pool
    order = np.sort(g.permutation(len(ids.rows))) if len(ids.rows) < 2 else np.argsort(ids.tokens[:, -1], kind='stable')
    a, b = Trie.build(ids, scan), Trie.build(ids._replace(tokens=ids.tokens[order], rows=ids.rows[order]), scan)
    for k, v in a.arrays().items(): assert v.tolist() == b.arrays()[k].tolist()


@settings(max_examples=20, deadline=None)
@given(pools())
def test_save_load_and_map(tmp_path_factory, pool):
    ids, scan, g = pool
    path = tmp_path_factory.mktemp('trie')/'t.safetensors'
    a = Trie.build(ids, scan)
    a.save(path)
    for mmap in (False, True):
        b = Trie.load(path, mmap)
        assert b.sizes == a.sizes and b.scan == a.scan and b.bytes() == a.bytes()
        steps = steps_of(g, 1, 1, max(ids.sizes))
        assert alive(a.advance(a.root(1), steps, 0, 9)) == alive(b.advance(b.root(1), steps, 0, 9))
    b.save(path)                                                                  # over the file it is mapped from
    assert Trie.load(path).codes.tolist() == a.codes.tolist()


def test_no_ids_and_bad_settings():
    with pytest.raises(ValueError, match='ids: expected at least one'): Trie.build(make_ids(np.zeros((0, 2), int), (2, 2)))
    with pytest.raises(ValueError, match='scan: expected at least 0'): Trie.build(make_ids(np.zeros((1, 2), int), (2, 2)), -1)


def test_damaged_files(tmp_path):
    path, g = tmp_path/'t.safetensors', np.random.default_rng(0)
    Trie.build(make_ids(g.integers(0, 4, (50, 3)), (4, 4, 4)), 3).save(path)
    whole, (arrays, meta) = path.read_bytes(), load_arrays(path)
    for cut in (0, 5, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match='t.safetensors'): Trie.load(path)
    wrong = [({k: v for k, v in arrays.items() if k != drop}, meta) for drop in arrays]
    wrong += [(dict(arrays, codes=arrays['codes'][:-1]), meta), (dict(arrays, rows=arrays['rows'][1:]), meta), (dict(arrays, first=arrays['first'][:-1]), meta)]
    wrong += [(arrays, dict(meta, kind='quantiser')), (arrays, dict(meta, version=2)), (arrays, dict(meta, sizes=[4, 4])), (arrays, {k: v for k, v in meta.items() if k != 'sizes'})]
    for a, m in wrong:
        save_arrays(path, a, m)
        with pytest.raises(ValueError, match='t.safetensors'): Trie.load(path)


@fast
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=60), st.data())
def test_selection_is_that_of_sorting(values, data):
    k = data.draw(st.integers(1, len(values)))
    v, lo = np.float32(values), np.random.default_rng(len(values)).permutation(len(values))
    assert kth_largest(v.copy(), k) == sorted(values, reverse=True)[k - 1]
    assert best(v, lo, k).tolist() == sorted(range(len(v)), key=lambda i: (-v[i], lo[i]))[:k]


def test_dead_beams_stay_dead():
    trie = Trie.build(make_ids(np.array([[0, 0], [1, 1]]), (2, 2)))
    dead = trie.root(1)
    dead = Beams(torch.full_like(dead.scores, -torch.inf), *dead[1:])
    for step in (trie.advance, lambda *a: _advance_tensor(trie.tensors('cpu'), *a)):
        assert (step(dead, torch.zeros(1, 1, 2), 0, 3).scores == -torch.inf).all()
