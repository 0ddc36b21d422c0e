"""The race against faiss: exact answers, peers that are what their names say, settings chosen by one rule, verdicts from numbers, the whole in small."""
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from grnb.bench import Method, Ratio, parts_of, peers as peer_module, pools, races, threads, total, vectors
from grnb.bench import ann, real
from grnb.bench.ann import bench_ann
from grnb.bench.peers import GRAPHS, LISTED, SCANNED, Peers, index_bytes, lists_for, variants
from grnb.bench.pools import Codes, Pool, Setting, fastest, light_form, light_settings, made_pool, nearest, peer_settings
from grnb.bench.races import better_in_all, crossings, median, ours_at, rivals_at, verdict_faster, verdict_frontier, verdict_large
from grnb.core import import_faiss
from grnb.report import load_results
from grnb.tokenizer.whitened import WhitenedKMeans

N = 3000


@pytest.fixture(scope='module')
def pool(tmp_path_factory):
    "A small pool with its files"
    return made_pool('clustered', N, tmp_path_factory.mktemp('ann'), queries=40)


@pytest.fixture(scope='module')
def exact(pool): return pool.peers().exact()


# --- exact answers

@settings(deadline=None, max_examples=25)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 30), st.booleans())
def test_nearest_in_blocks(n, k, block, half):
    g = np.random.default_rng(n)
    x, q = g.normal(size=(n, 5)).astype(np.float16 if half else np.float32), g.normal(size=(7, 5)).astype(np.float32)
    rows, truth = nearest(q, x, k, block), np.argsort(-(q @ x.astype(np.float32).T), axis=1, kind='stable')[:, :k]
    assert np.array_equal(rows[:, :n], truth) and (rows[:, n:] == -1).all()


# --- pools

def test_pools_share_rows_queries_and_answers(tmp_path):
    "A smaller pool is the first rows of a larger; dev and test queries are different ones; a second pool reads the first's files"
    big = made_pool('ood', 1200, tmp_path, queries=30)
    small = made_pool('ood', 1000, tmp_path, of=1200, queries=30)
    x, q = vectors('ood', 1200, 0, 60)
    assert np.array_equal(big.x, x) and np.array_equal(small.x, x[:1000]) and np.array_equal(big.dev, q[:30]) and np.array_equal(big.test, q[30:])
    assert np.array_equal(small.truth, np.argsort(-(q[30:] @ x[:1000].T), axis=1)[:, :10])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    again = made_pool('ood', 1200, tmp_path, queries=30)
    assert np.array_equal(again.dev_truth, big.dev_truth) and before == {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}


def test_large_pools_are_half_precision_and_share_codebooks(tmp_path, monkeypatch):
    monkeypatch.setattr(pools, 'SINGLE', 1500); monkeypatch.setattr(pools, 'TRAIN', 1000)
    small, large = (made_pool('clustered', n, tmp_path, queries=20) for n in (1500, 2000))
    assert small.x.dtype == np.float32 and large.x.dtype == np.float16 and isinstance(large.x, np.memmap)
    books = small.codes(Codes(16))[1]
    codes, same = large.codes(Codes(16))
    assert all(np.array_equal(a, b) for a, b in zip(books, same)) and codes.shape == (2000, 8)
    assert np.mean(codes[:1500, 0] == small.codes(Codes(16))[0][:, 0]) > .97                                   # rounding moves few
    assert light_form(large, Codes(16)).bytes['vectors'] == 1024


def test_whitened_codes_are_a_form_of_their_own(tmp_path):
    "Files, codes and names differ; an older file without more than codes and codebooks is read"
    pool = made_pool('clustered', 1000, tmp_path, queries=20)
    file = lambda *of: (tmp_path/pools._codes_file(pool, Codes(*of)).name).exists()
    assert not file(16, 2.)
    codes, books = pool.codes(Codes(16, 2.))
    assert file(16, 2.) and not (file(16) or file(16, 1.) or file(16, 2., 9)) and (tmp_path/'codes-clustered-1000-16-w2.0.safetensors').exists()
    made = WhitenedKMeans((16,) + (256,) * 7, 8, 2.).fit(pool.train())
    assert np.array_equal(made.encode(pool.x), codes) and all(np.array_equal(a, b) for a, b in zip(made.codebooks, books))
    assert not np.array_equal(pool.codes(Codes(16))[0][:, 1:], codes[:, 1:])
    names = [f.name for f in races.each_form(pool, (Codes(16), Codes(16, 2.)), (0,), (64,))]
    assert ['whitened 2' in n for n in names] == [False, True]


def test_both_sides_rerank_from_the_same_memory(tmp_path):
    pool = made_pool('clustered', 1000, tmp_path, queries=20)
    before = np.array(pool.x)
    flat = pool.exact()
    assert np.array_equal(pool.x, before) and not isinstance(pool.x, np.memmap) and pool.exact() is flat and np.shares_memory(pool.x, import_faiss().rev_swig_ptr(flat.get_xb(), before.size))


def test_codes_that_a_pool_is_tried_with(tmp_path, monkeypatch):
    "Whitened ones are among those of clustered, longer ones those of a large pool; built indexes only when asked so"
    class Fake:
        data = 'clustered'
        def __init__(self, n): self.n = n
        def __len__(self): return self.n
    assert ann._tried(Fake(1000)) == ann.SMALL and ann._tried(Fake(10 ** 6)) == ann.TRIED['clustered'] and ann._tried(Fake(10 ** 7)) == ann.LARGE
    assert any(of.power for of in ann.TRIED['clustered']) and ann.LARGE[0].levels > max(of.levels for of in ann.TRIED['clustered'])
    pool = made_pool('clustered', 1000, tmp_path, queries=20)
    (tmp_path/'clustered-1000-HNSW32.faiss').touch()
    assert ann._names(pool, dict(peers=races.PEERS, built=True)) == ['HNSW32'] and ann._names(pool, dict(peers=races.PEERS, built=False), races.SHORT) == [p for p in races.PEERS if p in races.SHORT]


# --- peers

@pytest.mark.parametrize('name', ['IVF-PQ8', 'IVF-RaBitQ', 'IVF-SQ8', 'IVF-Flat', 'IVF-PQ16x4 FastScan'])
def test_lists_found_once_are_the_lists_faiss_finds(name, pool):
    "Adding with the lists at hand gives the index that faiss builds by itself"
    faiss = import_faiss()
    with threads(1):
        p = Peers(pool.x, pool.train(), pool.place, 'lists', 32)
        index, coarse = p[name], p.coarse()
        plain = faiss.index_factory(512, f'IVF32,{LISTED[name]}', faiss.METRIC_INNER_PRODUCT)
        plain.quantizer, plain.own_fields, plain.quantizer_trains_alone = coarse, False, 2
        plain.train(pool.train()); plain.add(pool.x)
        index.nprobe = plain.nprobe = 8
        a, b = index.search(pool.test, 10)[1], plain.search(pool.test, 10)[1]
    assert index.ntotal == N and np.mean([len(set(i) & set(j)) / 10 for i, j in zip(a, b)]) > .99


def test_every_name_is_an_index_of_faiss():
    faiss = import_faiss()
    for name, said in {**{k: f'IVF16,{v}' for k, v in LISTED.items()}, **SCANNED, **GRAPHS}.items(): assert faiss.index_factory(512, said, faiss.METRIC_INNER_PRODUCT).d == 512, name
    assert set(races.PEERS) <= set(LISTED) | set(SCANNED) | set(GRAPHS) and set(races.SHORT) <= set(races.PEERS)
    assert [lists_for(n) for n in (1000, 10_000, 1_000_000)] == [128, 512, 4096]


def test_bytes_by_part(pool, exact):
    flat = index_bytes(exact, N, 512)
    assert flat['vectors'] == 2048 and flat['fixed'] == flat['rows'] == 0
    got = index_bytes(pool.peers()['IVF-PQ8'], N, 512)
    assert np.isclose(got['codes'], 8) and np.isclose(got['rows'], 8) and np.isclose(got['fixed'], (256 + 256) * 2048 / N) and got['vectors'] == 0
    assert np.isclose(index_bytes(pool.peers()['HNSW32'], N, 512)['vectors'], 2048)


def test_a_refine_by_rows_is_the_refine_of_faiss(pool, exact):
    "Our rerank of a memory map finds what faiss finds"
    index = pool.peers()['IVF-PQ8']
    for a, b in zip(variants('IVF-PQ8', index, exact, (8,), (200,)), variants('IVF-PQ8', index, pool.x.astype(np.float16), (8,), (200,))):
        a.prepare()
        assert a.name == b.name and np.mean(a.search(pool.test) == b.search(pool.test)) > .98
    assert (a.bytes['vectors'], b.bytes['vectors']) == (2048, 1024)


# --- choosing

def test_the_recall_of_a_setting_is_what_it_has(pool, exact):
    "One long list gives the recall of every number of candidates"
    form, goals = light_form(pool, Codes(64)), (.7, .9)
    found = light_settings(form, goals) + peer_settings(pool, 'IVF-PQ8', pool.peers()['IVF-PQ8'], exact, goals) + peer_settings(pool, 'HNSW32', pool.peers()['HNSW32'], exact, goals)
    assert {s.index for s in found} == {form.name, 'IVF-PQ8', 'HNSW32'}
    for s in found:
        s.method.prepare()
        assert np.isclose(pools.found_of(s.method.search(pool.dev), pool.dev_truth).mean(), s.recall, atol=.006), s.method.name
    assert all(max(s.recall for s in found if s.index == i) >= .9 for i in (form.name, 'IVF-PQ8', 'HNSW32'))


def test_the_fastest_that_reaches_the_goal_is_chosen():
    import time
    slow = lambda ms: lambda q: time.sleep(ms / 1e3)
    made = [Setting(Method(name, slow(ms), {}), r, name[0]) for name, ms, r in (('a1', 1, .8), ('a2', 8, .95), ('a3', 40, .99), ('b1', 2, .85))]
    got = fastest(made, (.8, .9, .99, 1.), np.zeros((10, 2), np.float32))
    assert {k: s.method.name for k, s in got.items()} == {('a', .8): 'a1', ('b', .8): 'b1', ('a', .9): 'a2', ('a', .99): 'a3'}
    assert fastest([], (.8,), np.zeros((3, 2))) == {}


# --- verdicts

def method(ms, recall, codes, vectors=2048): return dict(single=[ms / 1e3] * 5, batch=[ms / 2e3], recall=recall, bytes=parts_of(1, codes=codes, vectors=vectors))


def a_race(**more):
    base = {'light a': method(.1, .99, 20), 'light b': method(.05, .93, 20), 'faiss x': method(.2, .995, 24), 'faiss y': method(.3, .94, 8)}
    return dict(methods=base | more, chosen=[['light', .99, 'light a'], ['light', .93, 'light b'], ['light', .9, 'light b'], ['light', .8, 'light b']])


def test_faster_than_all_of_that_recall():
    assert verdict_faster(a_race())[0]
    assert verdict_faster(a_race(**{'faiss z': method(.05, .987, 9)}))[0]                          # recall too low to be a rival
    assert verdict_faster(a_race(**{'faiss z': method(.05, .995, 30)}))[1][0].endswith('does not hold')
    assert not verdict_faster(a_race(**{'faiss z': method(.05, .988, 9)}))[0]                      # a hair below counts as a rival
    short = a_race()
    short['methods']['light a']['recall'] = .989
    assert ours_at(short, .99) is None and not verdict_faster(short)[0]


def test_vectors_for_reranking_are_counted_apart():
    "An index that keeps vectors as codes is not better in bytes; one that reads them for a rerank may be"
    assert total(method(1, 1, 8)) == 2056 and total(method(1, 1, 8), False) == 8
    r = a_race(**{'faiss flat': method(.01, 1., 2048, 0), 'faiss pq': method(.04, .95, 19)})
    assert better_in_all(r, 'light b') == ['faiss pq'] and not verdict_frontier(r)[0]
    assert verdict_frontier(a_race())[0] and not verdict_frontier(a_race(), (.995,))[0]


@given(st.lists(st.tuples(st.floats(.01, 1), st.floats(.5, 1), st.integers(4, 100)), max_size=6))
def test_the_frontier_by_hand(rivals):
    r = a_race(**{f'faiss {i}': method(*v) for i, v in enumerate(rivals)})
    worse = any(ms < .05 and recall >= .93 and codes < 20 for ms, recall, codes in rivals)
    assert verdict_frontier(r)[0] == (not worse)
    assert [median(r['methods'][n]) for n in rivals_at(r, .8)] == sorted(median(r['methods'][n]) for n in rivals_at(r, .8))


def test_the_large_pool():
    large = dict(methods={'light c': method(.15, .975, 16.5, 1024)}, chosen=[['light', .97, 'light c']])
    assert verdict_large(large, a_race(), Ratio(1.5, 1.4, 1.6))[0]
    assert not verdict_large(large, a_race(), Ratio(2.1, 2., 2.2))[0]
    large['methods']['light c']['bytes']['codes'] = 17.5
    assert not verdict_large(large, a_race(), Ratio(1.5, 1.4, 1.6))[0]
    assert not verdict_large(dict(methods={}, chosen=[]), a_race(), None)[0]


def test_crossings_where_we_never_cross():
    def race(ours, theirs, exact): return dict(methods={'light a': method(ours, .95, 8), 'faiss a': method(theirs, .95, 8), 'exact dense (faiss flat)': method(exact, 1, 2048)},
                                               chosen=[['light', .95, 'light a'], ['faiss A', .95, 'faiss a']])
    got = {i: at for i, at, _ in crossings({1000: race(.1, .05, .01), 100_000: race(.1, .05, 10)})}
    assert got['faiss A'] is None and np.isclose(got['exact dense (faiss flat)'], 1000 * 100 ** (1 / 3))


# --- curves

def test_the_learned_generator_finds_items(pool):
    "Ten rows of the pool; a wider beam finds no less"
    made = races._learned(pool, (2, 50))
    found = [m.search(pool.test) for m in made.values()]
    assert list(made) == [2, 50] and all(r.shape == (40, 10) and r.max() < N for r in found) and (found[1] >= 0).all()
    recall = [pools.found_of(r, pool.truth).mean() for r in found]
    assert recall[0] <= recall[1] and recall[1] > .1


# --- real vectors

def test_the_share_that_two_stages_keep():
    hits = lambda *v: np.array(v, bool)
    runs = [dict(small=dict(two=hits(1, 1, 0, 1), exact=hits(1, 1, 1, 1), groups=np.arange(4)), large=dict(two=hits(1, 0, 1, 0), exact=hits(0, 0, 1, 0), groups=np.arange(4)))] * 2
    small, large = real.kept_share(runs, 'small'), real.kept_share(runs, 'large')
    assert small['share'] == .75 and np.isclose(small['margin'].value, 75 - 99) and large['share'] == 2 and large['margin'].value == 25
    assert not ann._kept(dict(kept=dict(small=small, large=large), sizes=dict(small=4, large=4), choices=[(1, 200)]))[0]


# --- the whole

@pytest.mark.parametrize('kw, says', [
    (dict(data='easy'), 'data: expected some of clustered, many, ood, flickr8k'), (dict(data=[]), 'data: expected some of'), (dict(n=10), 'n: expected at least 1000'),
    (dict(n=2_000_000), 'n: expected at most 1,000,000'), (dict(large=1000), 'large: expected more than n'), (dict(timed=1), 'timed: expected at least 2'), (dict(peers='IVF'), 'peers: expected built'),
])
def test_bad_bench(kw, says, tmp_path):
    with pytest.raises(ValueError, match=says): bench_ann(**kw, folder=None, work=tmp_path, say=None)
    assert not list(tmp_path.iterdir())


def test_a_killed_run_resumes_and_is_stored(tmp_path, monkeypatch):
    "A pool and a large one; measured pieces are not measured again, and leave when all is done"
    monkeypatch.setattr(ann, 'CURVE_BEAMS', (5,)); monkeypatch.setattr(ann, 'package_mark', lambda: '')
    monkeypatch.setattr(races, '_learned', lambda pool, beams: {b: Method(f'{races.LEARNED} {b}', lambda q: nearest(q, pool.x), parts_of(1, codes=4)) for b in beams})
    monkeypatch.setattr(ann, 'GOALS', (.95, .97, .99)); monkeypatch.setattr(races, 'light_settings', partial(light_settings, beams=(50, 400))); monkeypatch.setattr(ann, 'SMALL', (Codes(64),))
    monkeypatch.setattr(pools, 'SINGLE', 1000); monkeypatch.setattr(races, 'SINGLE', 1000); monkeypatch.setattr(races, 'ROOM', 1e6)
    monkeypatch.setattr(pools, 'MOST', 64); monkeypatch.setattr(pools, 'quiet', nullcontext)              # collecting garbage takes longer than these searches
    said, measured, measure = [], [], races.measure
    def counted(methods, pool, *args):
        measured.append(len(pool))
        if len(measured) == 2: raise KeyboardInterrupt
        return measure(methods, pool, *args)
    monkeypatch.setattr(races, 'measure', counted)
    run = lambda: bench_ann('clustered', 1000, 1100, ('IVF-PQ8', 'HNSW32'), 10, tmp_path/'results', tmp_path/'work', say=said.append)
    with pytest.raises(KeyboardInterrupt): run()
    assert not (tmp_path/'results').exists()
    found = run()
    assert measured == [1000] * 4 + [1100] * 3 and list(found['clustered']['races']) == [1000] and list(found[1100]['races']) == [1100]
    assert not list((tmp_path/'work').glob('race-*')) and any(l.startswith('clustered, 1,000 items') for l in said)
    chosen, curves = (load_results(tmp_path/'results', f'ann_{n}', times=True)['values'] for n in ('clustered', 'curves'))
    assert {c['unit'] for c in chosen} == {'ms', 'queries/s', 'bytes', '%'} and {'light', 'faiss IVF-PQ8', 'faiss HNSW32'} <= {c['row'] for c in chosen}
    assert {1000, 1100} == {c['column'] for c in curves} and {'light decoder, beam 5', 'genius generator, beam 5'} <= {c['row'] for c in curves}
    assert {c['value'] for c in load_results(tmp_path/'results', 'ann_verdicts', times=True)['values']} <= {0, 1}
    assert load_results(tmp_path/'results', 'ann_clustered_1100', times=True)
