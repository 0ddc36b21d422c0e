"""The bench: synthetic vectors, methods that search what the face searches, bytes that are really kept, ratios, resuming."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from grnb import GenerativeRetriever
from grnb.bench import (KINDS, PARTS, SMOKE, TOP, Method, Ratio, crossover, found_of, in_batches, latency as bench, one_by_one, paired_ratio, parts_of, peers, piece, ratio, read_codes,
                        stored, stored_codes, tell, threads, total, vectors, verdict_cells, verdict_line, write_array, write_vectors)
from grnb.bench.latency import bench_latency, rivals
from grnb.core import import_faiss, rng
from grnb.generator.prefix import PrefixGenerator
from grnb.recipes import Recipe
from grnb.report import draw_latency, load_results, redraw

N = 1500
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def pool():
    "Items and queries of a small pool"
    return vectors('clustered', N, seed=3, queries=40)


@pytest.fixture(scope='module')
def methods(pool, tmp_path_factory):
    "All methods over it, by name, and the codebooks"
    work = tmp_path_factory.mktemp('work')
    with threads(1): made, _ = bench._methods(pool[0], 3, work, ('HNSW32', 'IVF-PQ8', 'PQ32x4 FastScan'))
    return {m.name: m for m in made}, bench._codes(None, None, 256, 3, work)[1]


# --- synthetic vectors

@pytest.mark.parametrize('kind', KINDS)
def test_vectors_are_unit_seeded_and_a_prefix_of_larger_sets(kind):
    x, q = vectors(kind, 9000, seed=1, queries=30)
    assert x.shape == (9000, 512) and q.shape == (30, 512) and x.dtype == q.dtype == np.float32
    assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5) and np.allclose(np.linalg.norm(q, axis=1), 1, atol=1e-5)
    small = vectors(kind, 100, seed=1, queries=7)
    assert np.array_equal(small[0], x[:100]) and np.array_equal(small[1], q[:7])
    assert not np.array_equal(vectors(kind, 100, seed=2)[0], x[:100])


def test_sets_differ_as_described():
    "Fewer centres bring neighbours nearer; queries of ood lie apart from their items, and on one side"
    near, side = {}, {}
    for kind in KINDS:
        x, q = vectors(kind, 4000, queries=100)
        near[kind], side[kind] = (q @ x.T).max(1).mean(), np.linalg.norm(q.mean(0))
        centre = (KINDS[kind] * rng(0, kind, 'items', 'centre').random(4000) ** 1.5).astype(int)
        assert np.isclose(np.mean(centre < KINDS[kind] / 2), .5 ** (2 / 3), atol=.03)                # u < ½^(2/3)
    assert near['clustered'] > near['many'] + .1
    assert side['ood'] > side['many'] + .1


@pytest.mark.parametrize('args, says', [
    (('easy', 10), 'kind: expected one of clustered, many, ood'), (('many', 0), 'n: expected at least 1'), (('many', 10, 0, 0), 'queries: expected at least 1'),
])
def test_bad_vectors(args, says):
    with pytest.raises(ValueError, match=says): vectors(*args)


@pytest.mark.parametrize('kind', KINDS)
def test_a_file_holds_the_same_vectors_whatever_the_parts(kind, tmp_path, monkeypatch):
    "Drawn a part at a time, the rows are those drawn at once"
    import grnb.bench
    monkeypatch.setattr(grnb.bench._draw, '__defaults__', (0., 8192, 8192))
    write_vectors(tmp_path/'x.npy', kind, 9000, 1, np.float32)
    assert np.array_equal(np.load(tmp_path/'x.npy'), vectors(kind, 9000, 1)[0])
    write_vectors(tmp_path/'y.npy', kind, 300, 1)
    assert np.array_equal(np.load(tmp_path/'y.npy'), vectors(kind, 300, 1)[0].astype(np.float16)) and sorted(p.name for p in tmp_path.iterdir()) == ['x.npy', 'y.npy']
    with pytest.raises(ValueError, match='kind: expected one of'): write_vectors(tmp_path/'z.npy', 'easy', 3)


# --- methods

def face(x, recipe, books, **parts):
    "A retriever over these codebooks: rows scaled to unit length once more would shift what k-means finds"
    gr = GenerativeRetriever(recipe, seed=3, device='cpu').fit(x, dev=0.)
    gr._fitted.quantizer.codebooks = books
    for name, part in parts.items(): setattr(gr._fitted, name, part)
    return gr.index(x)


def same(a, b): return np.mean([len(set(i) & set(j)) for i, j in zip(a, b)]) / 10 > .99


def test_light_is_the_faces_baseline(pool, methods):
    x, q = pool
    gr = face(x, 'baseline', methods[1])
    for name, kw in (('light decoder, beam 200', dict(beam=200)), ('light decoder, beam 50', dict(beam=50)),
                     ('light decoder, beam 200, 200 reranked', dict(beam=200, candidates=200)), ('light decoder, beam 50, no rerank', dict(beam=50, rerank=False))):
        assert same(methods[0][name].search(q), gr.search(q, **kw).ids), name


def test_learned_is_the_faces_generator_untrained(pool, methods):
    x, q = pool
    books = methods[1][:4]
    gr = face(x, Recipe(generator='prefix', L=4, steps=0), books, generator=PrefixGenerator(512, codebooks=books, seed=3))
    assert same(methods[0][bench.LEARNED].search(q), gr.search(q, beam=50).ids)


def test_all_give_ten_rows_of_the_pool(pool, methods):
    for name, m in methods[0].items():
        m.prepare()
        rows = m.search(pool[1])
        if name == bench.FREE: assert rows is None
        else: assert rows.shape == (40, 10) and rows.min() >= 0 and rows.max() < N, name


def test_exact_and_refine(pool, methods):
    "Exact is exact; a refine of more candidates finds no less"
    x, q = pool
    truth = np.argsort(-q @ x.T, axis=1)[:, :10]
    recall = lambda name: (methods[0][name].prepare(), np.mean([len(set(a) & set(b)) for a, b in zip(methods[0][name].search(q), truth)]) / 10)[1]
    assert recall(bench.EXACT) == 1
    for base in ('faiss IVF-PQ8, nprobe 64', 'faiss PQ32x4 FastScan'):
        found = [recall(f'{base}{tail}') for tail in ('', *(f' + refine {c}' for c in bench.GRID['refined']))]
        assert all(a <= b + 1e-9 for a, b in zip(found, found[1:]))


def test_bytes_are_those_kept(pool, methods):
    x, byte = pool[0], {k: {p: v * N for p, v in m.bytes.items()} for k, m in methods[0].items()}
    assert all(set(b) == set(PARTS) and min(b.values()) >= 0 for b in byte.values())
    assert byte[bench.EXACT]['vectors'] == x.nbytes and byte[bench.EXACT]['codes'] == 0
    assert byte['light decoder, beam 200']['vectors'] == x.nbytes and byte['light decoder, beam 200, no rerank']['vectors'] == 0
    assert byte['light decoder, beam 200']['fixed'] >= 8 * 256 * 512 * 4 and byte['light decoder, beam 200']['codes'] <= N * 8 + 8 * 64    # columns begin at multiples of 64
    pq = byte['faiss IVF-PQ8, nprobe 16']
    assert np.isclose(pq['codes'], N * 8) and np.isclose(pq['rows'], N * 8) and np.isclose(pq['fixed'], 128 * 512 * 4 + 256 * 512 * 4)
    assert np.isclose(byte['faiss IVF-PQ8, nprobe 16 + refine 50']['vectors'], x.nbytes)
    hnsw = byte['faiss HNSW32, ef 16']
    assert np.isclose(hnsw['vectors'], x.nbytes) and hnsw['structure'] > N * 64 * 4


# --- measuring

def test_threads_are_given_back():
    import torch
    faiss = import_faiss()
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    with pytest.raises(RuntimeError), threads(1):
        assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (1, 1)
        raise RuntimeError
    assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == before


@pytest.mark.parametrize('first', ['', 'import faiss'])
def test_a_fresh_process_gets_its_threads_back(first):
    "The first time too, when numba's threads, of which there are more, are started"
    code = f"""if True:
        import torch
        {first}
        from grnb.bench import threads
        from grnb.core import import_faiss
        now = lambda: (torch.get_num_threads(), import_faiss().omp_get_max_threads(), [l for l in torch.__config__.parallel_info().split('\\n') if 'max_threads' in l])
        before = now()
        for n in (1, 2, 1):
            with threads(n): assert now()[:2] == (n, n), (n, now())
            assert now() == before, (before, now())
        assert before[:2] == (1, 1)"""
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'NUMBA_NUM_THREADS': '2'}
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr


def test_ratio_of_known_work():
    a = np.ones((200, 200), np.float32)
    work = lambda n: lambda q: [a @ a for _ in range(n)]
    r = paired_ratio(work(8), work(2), np.zeros((60, 4)))
    assert r.low <= r.value <= r.high and 2 < r.value < 8


def test_ratio_of_pairs():
    "The median of the pairs; its interval narrows to it where all agree, and contains it"
    assert ratio(np.full(9, 3.)) == (3., 3., 3.)
    r = np.random.default_rng(0).lognormal(1, .2, 200)
    found = ratio(r)
    assert found.value == np.median(r) and found.low < np.e < found.high and found == ratio(r) != ratio(r, 1)


def test_pieces_are_made_once(tmp_path):
    "A stored piece whatever the code; a measured one only for its mark"
    made = []
    def make(): made.append(1); return dict(n=len(made))
    for mark in 'aab': found = piece(tmp_path/'piece.json', mark, make)
    assert found == dict(n=2) and len(made) == 2
    write, read = lambda text, path: path.write_text(text), lambda path: path.read_text()
    assert [stored(tmp_path/'text', lambda: t, write, read) for t in 'xy'] == ['x', 'x']
    with pytest.raises(RuntimeError): stored(tmp_path/'other', lambda: 'z', lambda *_: (_ for _ in ()).throw(RuntimeError), read)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['piece.json', 'text']


def test_codes_and_arrays_are_stored_whole(tmp_path):
    "Codes with their codebooks, made once; an array under the very name it was given"
    codes, made = np.arange(24, dtype=np.uint8).reshape(2, 12), []
    quantizer = SimpleNamespace(codebooks=[np.full((2, 3), l, np.float32) for l in range(12)])
    def make(): made.append(1); return quantizer, codes
    for got in (*(stored_codes(tmp_path/'codes.safetensors', make) for _ in range(2)), read_codes(tmp_path/'codes.safetensors')):
        assert np.array_equal(got[0], codes) and got[0].dtype == np.uint8 and [b[0, 0] for b in got[1]] == [*range(12)]
    write_array(codes, tmp_path/'a.tmp')
    assert made == [1] and np.array_equal(np.load(tmp_path/'a.tmp'), codes) and sorted(p.name for p in tmp_path.iterdir()) == ['a.tmp', 'codes.safetensors']


def test_every_query_is_timed_once_and_rows_are_kept():
    calls = []
    def search(q):
        calls.append(q.copy())
        return np.repeat(q[:, :1].astype(int), 10, 1)
    made = [Method('a', search, {}), Method('b', lambda q: None, {})]
    q = np.arange(230, dtype=np.float32)[:, None]
    seconds = one_by_one(made, q[:50], 4, np.random.default_rng(0))
    assert seconds.shape == (2, 50) and (seconds > 0).all() and set(np.concatenate(calls)[:, 0]) == set(range(50))
    batch, rows = in_batches(made, q, np.random.default_rng(0))
    assert batch.shape == (2, 3) and rows[0, :, 0].tolist() == list(range(230)) and (rows[1] == -1).all()


# --- verdicts

@given(st.lists(st.tuples(st.floats(.01, 10), st.floats(.01, 10)), min_size=1, max_size=5))
def test_crossover(pairs):
    sizes = [10 ** (3 + i) for i in range(len(pairs))]
    ours, theirs = zip(*pairs)
    at = crossover(sizes, ours, theirs)
    gap = np.log(ours) - np.log(theirs)
    if gap[-1] >= 0: assert at is None
    else:
        assert sizes[0] * (1 - 1e-9) <= at <= sizes[-1] * (1 + 1e-9)
        assert all(g < 0 for n, g in zip(sizes, gap) if n > at * (1 + 1e-9))
        assert np.interp(np.log(at), np.log(sizes), gap) < 1e-6


def test_rivals_need_recall_and_bytes():
    m = {'light': dict(recall=.9, bytes=dict(codes=8, vectors=4)), 'faiss a': dict(recall=.896, bytes=dict(codes=12)), 'faiss b': dict(recall=.894, bytes=dict(codes=1)),
         'faiss c': dict(recall=1., bytes=dict(codes=13)), 'exact': dict(recall=1., bytes=dict(codes=12)), 'light two': dict(recall=1., bytes=dict(codes=1))}
    assert rivals(m, 'light') == ['faiss a', 'exact'] and rivals(m, 'light', bytes=False) == ['faiss a', 'faiss c', 'exact'] and total(m['light']) == 12


def test_a_verdict_in_cells_and_in_words():
    r, at = Ratio(1.2345, 1.2, 1.26), lambda cells: {c['column']: (c['value'], c['low'], c['high'], c['unit']) for c in cells}
    assert at(verdict_cells('q', r, 1.2, False, 'data', 'times')) == dict(value=(1.2345, 1.2, 1.26, 'times'), bar=(1.2, None, None, 'times'), holds=(0, None, None, ''))
    assert at(verdict_cells('q', 3, None, None, 'data')) == dict(value=(3, None, None, ''))
    assert verdict_line('q', r, 1.2, False, 'times', 3) == 'q: 1.234 [1.200, 1.260] times, bar 1.2: does not hold'
    assert verdict_line('q', 3, 20e6, True) == 'q: 3, bar 2e+07: holds' and verdict_line('q', 3, None, None) == 'q: 3'


def test_a_quick_run_says_what_its_verdicts_are_worth():
    said = []
    tell(iter(['q: 1']), said.append); tell(iter(['q: 2']), said.append, quick=True); tell((1 / 0 for _ in range(1)), None, quick=True)
    assert said == ['q: 1', SMOKE, 'q: 2']


# --- the whole

@pytest.mark.parametrize('kw, says', [
    (dict(data='easy'), 'data: expected events'), (dict(sizes=(10,)), 'sizes: expected at least 1000'), (dict(sizes=()), 'sizes: expected at least one'),
    (dict(queries=5, timed=6), 'timed: expected at most 5'), (dict(timed=1), 'timed: expected at least 2'), (dict(sizes=(1e3,)), 'sizes: expected a whole number'),
])
def test_bad_bench(kw, says, tmp_path):
    with pytest.raises(ValueError, match=says): bench_latency(**kw, folder=None, work=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_killed_run_resumes_and_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, 'PEERS', ('HNSW32', 'PQ32x4 FastScan'))
    built, build, measured, measure = [], peers.build, [], bench._measure
    def counted(name, *args):
        built.append(name)
        if len(built) == 4: raise KeyboardInterrupt                                 # in the second pool
        return build(name, *args)
    def once(x, *args, **kwargs): measured.append(len(x)); return measure(x, *args, **kwargs)
    monkeypatch.setattr(peers, 'build', counted); monkeypatch.setattr(bench, '_measure', once)
    run = lambda: bench_latency((1000, 1200), queries=20, timed=4, folder=tmp_path/'results', work=tmp_path/'work', say=lines.append)
    lines = []
    with pytest.raises(KeyboardInterrupt): run()
    assert not (tmp_path/'results').exists()
    found = run()
    assert built == ['HNSW32', 'PQ32x4 FastScan'] * 2 + ['PQ32x4 FastScan'] and measured == [1000, 1200, 1200]
    assert sorted(found.pools) == [1000, 1200] and found.flat[:2] == (1000, 1200) and not list(tmp_path.rglob('measured.json'))
    assert any(re.match(r'constraint, 1,200 items: \d', l) for l in lines) and any(l.startswith('light decoder, beam 200 (') for l in lines)
    check_results(tmp_path)


def check_results(folder):
    "Recall and bytes apart from times; every method in both; the figure and the tables can be drawn"
    facts, times = load_results(folder/'results', 'latency'), load_results(folder/'results', 'latency_all', times=True)
    assert {c['row'] for c in facts['values']} == {c['row'] for c in times['values']} - {bench.FREE}
    assert 'ms' not in {c['unit'] for c in facts['values']} and {c['unit'] for c in times['values']} == {'ms'}
    recall = {(c['row'], c['column']): c['value'] for c in facts['values'] if c['unit'] == '%'}
    assert recall[bench.EXACT, 1000] == 100 and recall['light decoder, beam 200', 1000] > 90
    drawn = load_results(folder/'results', 'latency', times=True)['values']
    assert {c['row'] for c in drawn} <= set(bench.DRAWN) and {c['panel'] for c in drawn} == {'one query', '100 at once'}
    assert all(isinstance(c['column'], int) for c in drawn)
    assert draw_latency(folder)[1].exists() and redraw(folder)
    assert 'ratio' in {c['column'] for c in json.loads((folder/'results'/'latency_ratios.times.json').read_text())['values']}


def test_the_mark_of_the_package_sees_all_that_runs(tmp_path, monkeypatch):
    "Python, C and weights; what was measured with another kernel is not mixed with this one"
    from grnb import core
    monkeypatch.setattr(core, '__file__', str(tmp_path/'core.py'))
    (tmp_path/'decode').mkdir()
    marks = [core.package_mark()]
    for name in ('core.py', 'decode/light.c', 'decode/small.safetensors', 'notes.txt'):
        (tmp_path/name).write_text('new')
        marks.append(core.package_mark())
    assert len(set(marks[:4])) == 4 and marks[4] == marks[3]
