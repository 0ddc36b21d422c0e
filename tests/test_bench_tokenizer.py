"""The tokenizer bench: every coder encodes with the codebooks it was given, codes are counted against one plain loop, verdicts follow from the numbers; encoding from disk."""
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from grnb.bench import SMOKE, disk, threads, tokenizer as bench, vectors
from grnb.bench.disk import bench_disk, rows_of, write_rows
from grnb.bench.tokenizer import BARS, LEVELS, OURS, PLAIN, RQ, VQ, bench_tokenizer, floor, plain_encode, sums, verdicts
from grnb.core import cores
from grnb.report import load_results, redraw

K, L = 16, 3


@pytest.fixture(scope='module')
def x(): return vectors('clustered', 900, seed=5)[0]


@pytest.fixture(scope='module')
def books(x):
    "Codebooks of rows and of differences between rows"
    g = np.random.default_rng(0)
    return [x[g.permutation(900)[:K]], *((x[g.permutation(900)[:K]] - x[g.permutation(900)[:K]]) / 2 for _ in range(L - 1))]


# --- the plain loop

@given(arrays(np.int64, (7, 4), elements=st.integers(-9, 9)), arrays(np.int64, (2, 5, 4), elements=st.integers(-9, 9)))
@settings(max_examples=60)
def test_plain_is_nearest_then_subtract(x, books):
    "Small integers are exact in fp32; of codewords equally near the first is taken"
    codes, r = plain_encode(x.astype(np.float32), list(books.astype(np.float32)), batch=3), x.copy()
    for l, C in enumerate(books):
        assert codes[:, l].tolist() == ((r[:, None] - C) ** 2).sum(-1).argmin(1).tolist()
        r = r - C[codes[:, l]]
    assert np.array_equal(sums(books, codes), x - r)


def test_floor():
    f = floor(512, 256, 4)
    assert f['product, operations'] == 2 * 512 * 1024 and f['look-ups and comparisons, operations'] == 256 * (3 + 2 + 1) * 2 + 1024
    assert f['vector read, bytes'] == 2048 and f['codes written, bytes'] == 4


# --- coders: what is timed encodes with the codebooks that are judged

def test_levels_coder_is_plain(x, books): assert np.array_equal(bench._levels_coder(books)(x), plain_encode(x, books))


@pytest.mark.parametrize('tables', [False, True])
def test_rq_coder_at_beam_1_is_plain(x, books, tables):
    assert (bench._rq_coder(books, 1, tables)(x) == plain_encode(x, books)).mean() > .999


@pytest.mark.parametrize('beam', [1, 5])
def test_rq_coder_is_the_quantizer_that_was_fitted(x, beam):
    "The same codes and the same error as the object that was trained, codes of five bits unpacked"
    rq = bench._quantizer(512, 32, L, beam)
    rq.cp.seed = 1234
    rq.train(x)
    made = bench._fit_rq(x, 32, L, 0, beam)
    codes = bench._rq_coder(made, beam, False)(x)
    assert codes.shape == (900, L) and codes.max() < 32
    assert np.allclose(sums(made, codes), rq.decode(rq.compute_codes(x)), atol=1e-5)


def test_beam_lowers_the_error(x, books):
    error = lambda beam, tables: ((x - sums(books, bench._rq_coder(books, beam, tables)(x))) ** 2).sum()
    assert error(5, False) < error(1, False) and np.isclose(error(5, True), error(5, False), rtol=1e-4)


def test_vq_coder_is_the_model_that_was_fitted(x):
    pytest.importorskip('vector_quantize_pytorch')
    made = bench._fit_vq(x, K, L, 0)
    assert [b.shape for b in made] == [(K, 512)] * L and all(np.array_equal(a, b) for a, b in zip(made, bench._fit_vq(x, K, L, 0)))
    codes = bench._vq_coder(made)(x)
    assert codes.shape == (900, L) and (codes == plain_encode(x, made)).mean() > .999
    model = bench._vq(512, K, L).eval()
    for layer, b in zip(model.layers, made): layer._codebook.embed.data.copy_(torch.from_numpy(b)[None]); layer._codebook.initted.data.fill_(True)
    with torch.no_grad(): assert np.allclose(sums(made, codes), model(torch.from_numpy(x))[0].numpy(), atol=1e-4)


def test_bare_products_are_products(x, books):
    C = np.concatenate(books)
    made = bench._products(books)
    assert {p for _, p, _ in made} == {'fp32', 'bf16'} and made[0][0] == 'numpy'
    for name, precision, product in made:
        with torch.inference_mode(): got = product(x[:100])
        got = got if isinstance(got, np.ndarray) else (got.to_dense() if got.is_mkldnn else got).float().numpy()
        assert np.allclose(got, x[:100] @ C.T, atol=1e-5 if precision == 'fp32' else .02), name


def test_found_is_nearest_by_distance(x, books):
    q = vectors('clustered', 10, 5, 30)[1]
    d = ((q[:, None].astype(np.float64) - x) ** 2).sum(-1)
    rows = bench._found(q, x)
    assert rows.shape == (30, 10) and np.allclose(np.take_along_axis(d, rows, 1), np.sort(d, 1)[:, :10], atol=1e-5)


def test_worse_is_judged_in_float64(x, books):
    "No row where codes agree; a wrong code is worse; the right code where the plain loop is wrong is not"
    plain = plain_encode(x, books)
    wrong = plain.copy()
    wrong[:5, 1] = (wrong[:5, 1] + 1) % K
    assert [bench._worse(x, books, a, b) for a, b in ((plain, plain), (wrong, plain), (plain, wrong))] == [0, 5, 0]


# --- measuring

def test_threads_hold_all_libraries(monkeypatch):
    import numba
    for said in (None, '7'):
        if said is None: monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
        else: monkeypatch.setenv('OMP_NUM_THREADS', said)
        before = numba.config.NUMBA_NUM_THREADS                  # asking numba itself would start its threads, and change torch's number
        with threads(1): assert (numba.get_num_threads(), cores(), torch.get_num_threads()) == (1, 1, 1)
        assert os.environ.get('OMP_NUM_THREADS') == said and numba.get_num_threads() == before


def test_slow_methods_are_timed_on_part_of_the_rows(monkeypatch):
    seen = {}
    coder = lambda name: bench.Coder(name, 'ours', lambda x: seen.setdefault(name, []).append(len(x)))
    out = bench._rounds([coder('fast'), coder('slow'), coder('slowest')], np.zeros((1000, 2)), [.01, 4., 1e6], 3, np.random.default_rng(0))
    assert seen == dict(fast=[1000] * 3, slow=[250] * 3, slowest=[100] * 3) and out.shape == (3, 3) and (out > 0).all()


# --- verdicts

def made_up(ours=1., other=3., tuned=2.8, bare=.9, differ=0, error=.5, fit=2.):
    m = lambda s, **more: dict(seconds=[s, s * 1.1, s * 1.2], **more)
    return dict(fit={OURS: fit, 'a': 3., 'b': 1.}, methods={
        OURS: m(ours, group='ours', differ=differ, error=error, fit=OURS), 'slow': m(other + 1, group='others', error=.5, fit='a'),
        'fast': m(other, group='others', error=.6, fit='b'), f'a, {bench.BLOCKS}': m(tuned, group='others', error=.7, fit='a'), 'numpy': m(bare * 2, group='fp32'), 'oneDNN': m(bare, group='fp32'), 'half': m(bare / 9, group='bf16')})


@pytest.mark.parametrize('kw, holds', [
    ({}, [1, 1, 1, 1, 1, 1]), (dict(other=2.4, tuned=2.6), [0, 0, 1, 1, 1, 1]), (dict(tuned=2.4), [1, 0, 1, 1, 1, 1]), (dict(bare=.7), [1, 1, 0, 1, 1, 1]), (dict(differ=1), [1, 1, 1, 0, 1, 1]),
    (dict(error=.51), [1, 1, 1, 1, 0, 1]), (dict(fit=3.1), [1, 1, 1, 1, 1, 0]),
])
def test_each_bar_can_fail(kw, holds):
    found = verdicts(made_up(**kw))
    assert [v[-1] for v in found] == holds and [v[3] for v in found] == [BARS['others'], *BARS.values()]
    rivals = [v[1] for v in found]
    assert rivals[0] == 'fast' and rivals[1] in ('fast', f'a, {bench.BLOCKS}') and rivals[2:] == ['oneDNN', PLAIN, 'slow', 'slow']
    r = found[0][2]
    assert np.isclose(r.value, kw.get('other', 3.)) and r.low <= r.value <= r.high


def test_verdicts_without_others():
    kind = made_up()
    kind['methods'] = {k: m for k, m in kind['methods'].items() if m['group'] != 'others'}
    assert [v[1] for v in verdicts(kind)] == ['oneDNN', PLAIN]


# --- the whole

@pytest.mark.parametrize('kw, says', [
    (dict(kinds=('easy',)), 'kinds: expected some of clustered'), (dict(kinds=()), 'kinds: expected some of'), (dict(K=100), 'K: expected a power of two'), (dict(n=500), 'n: expected at least 1024'),
    (dict(n=1e5), 'n: expected a whole number'), (dict(repeats=0), 'repeats: expected at least 1'), (dict(L=0), 'L: expected at least 1'), (dict(queries=0), 'queries: expected at least 1'),
])
def test_bad_settings(kw, says, tmp_path):
    with pytest.raises(ValueError, match=says): bench_tokenizer(**kw, folder=None, work=tmp_path)
    assert not list(tmp_path.iterdir())


def test_quick_runs_every_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = []
    found = bench_tokenizer(kinds='many', quick=True, say=lines.append)['many']
    m = found['methods']
    assert m[OURS]['differ'] == m[PLAIN]['differ'] == m[LEVELS]['differ'] == 0 and m[PLAIN]['error'] == m[OURS]['error']
    assert 0 < m[f'{OURS}, beam 5']['error'] <= m[OURS]['error'] + 1e-6 and m[f'{OURS}, bf16']['codes'] > .9
    assert {f'{RQ}, beam {b}{t}' for b in (1, 5) for t in ('', ', best blocks', ', look-up tables, best blocks')} < set(m) and all(0 <= v['recall'] <= 1 for v in m.values() if 'recall' in v)
    assert lines[0] == SMOKE and not list(tmp_path.iterdir()) and any(l.startswith('encoding time, ours over the fastest fp32 product') for l in lines)
    assert set(found['fit']) == {v['fit'] for v in m.values() if v['fit']} and all(len(v['seconds']) == 2 for v in m.values())


def few(make=None):
    "Only two fits, so that the tests of files are fast"
    def fits(K, L, seed, n, steps):
        def ours(x):
            if make: make(len(x))
            return bench._fit_levels(x, K, L, seed + 1)
        return {OURS: ours, LEVELS: lambda x: bench._fit_levels(x, K, L, seed)}
    return fits


def test_a_killed_run_keeps_its_fits_and_is_stored(tmp_path, monkeypatch):
    fitted, rounds, judged = [], bench._rounds, []
    monkeypatch.setattr(bench, '_fits', few(fitted.append))
    def killed(*args):
        judged.append(1)
        if len(judged) == 2: raise KeyboardInterrupt
        return rounds(*args)
    monkeypatch.setattr(bench, '_rounds', killed)
    run = lambda: bench_tokenizer(1300, ('clustered', 'ood'), 32, 2, 2, folder=tmp_path/'results', work=tmp_path/'work', queries=20, say=None)
    with pytest.raises(KeyboardInterrupt): run()
    assert not (tmp_path/'results').exists()
    found = run()
    assert fitted == [1300, 1300] and len(judged) == 3                                   # both fits and the first kind's times are kept
    facts, times = load_results(tmp_path/'results', 'tokenizer'), load_results(tmp_path/'results', 'tokenizer', times=True)
    at = {(c['row'], c['column'], c['dataset']): c['value'] for c in facts['values'] + times['values']}
    for kind in ('clustered', 'ood'):
        m = found[kind]['methods'][OURS]
        assert np.isclose(at[OURS, 'error', kind], m['error'], rtol=1e-4) and np.isclose(at[OURS, 'encode, thousand items/s', kind], 1e-3 / np.median(m['seconds']), rtol=1e-4)
        assert at[OURS, 'fit', kind] > 0 and at[PLAIN, 'codes that differ', kind] == 0
    assert not {c['unit'] for c in facts['values']} & {'s', 'ms'} and facts['provenance']['config']['threads'] == 1
    told = load_results(tmp_path/'results', 'tokenizer_verdicts', times=True)
    assert {c['column'] for c in told['values']} == {'value', 'bar', 'holds'} and 'bare product' in told['caption']
    assert any('tokenizer_verdicts' in line for line in redraw(tmp_path))


def test_fits_of_other_code_or_settings_are_made_again(tmp_path, x):
    made = []
    def make(x): made.append(1); return [x[:4], x[4:8]]
    for mark in 'aab': books, took = bench._fitted(tmp_path/'fit.safetensors', mark, x, make)
    assert len(made) == 2 and took > 0 and np.array_equal(books[1], x[4:8])


def test_absent_libraries_are_left_out_and_named(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, 'find_spec', lambda name: None)
    assert not {VQ, LEVELS, f'{RQ}, beam 1'} & set(bench._fits(32, 2, 0, 900, 5))
    monkeypatch.setattr(bench, '_fits', lambda *a: {OURS: lambda x: [x[:8], x[8:16]]})
    lines = []
    found = bench_tokenizer(900, 'ood', 8, 2, 2, folder=tmp_path/'results', work=tmp_path/'work', queries=5, say=lines.append)
    assert len(verdicts(found['ood'])) == 2 and sum('is not installed' in l for l in lines) == 2 and (tmp_path/'results'/'tokenizer.json').exists()


# --- from disk

def test_file_holds_its_blocks(tmp_path, monkeypatch, x):
    monkeypatch.setattr(disk, 'BLOCK', 400)
    write_rows(tmp_path/'x.npy', 1000, x[:300], 2)
    got = np.load(tmp_path/'x.npy', mmap_mode='r')
    assert got.shape == (1000, 512) and got.dtype == np.float32 and np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    assert np.array_equal(got[800:], rows_of(x[:300], 2, 200, 2)) and not np.array_equal(got[:300], got[300:600]) and not np.array_equal(got[:400], rows_of(x[:300], 0, 400, 3))
    assert (got[:300] * x[:300]).sum(1).min() > .8 and (got[400:500] * x[100:200]).sum(1).min() > .8


def test_no_room_on_disk(tmp_path, x):
    with pytest.raises(ValueError, match='n: 1,000,000,000,000 rows need 2048000.0 GB'): write_rows(tmp_path/'x.npy', 10 ** 12, x)
    assert not list(tmp_path.iterdir())


def test_disk_is_measured_and_cleared(tmp_path):
    found = bench_disk(3000, 8, 2, folder=tmp_path/'results', work=tmp_path/'work', say=None)
    assert found['codes'] == 3000 and found['wrong'] == 0 and not list((tmp_path/'work').iterdir())
    assert 50e6 < found['peak'] < disk.LIMIT and found['RssFile'] > 0 and found['sampled'] <= 1.1 * found['peak']
    at = {c['column']: c['value'] for c in load_results(tmp_path/'results', 'tokenizer_disk', times=True)['values']}
    assert at['limit'] == 2 and at['holds'] == 1 and np.isclose(at['peak resident memory'], found['peak'] / 2 ** 30, rtol=1e-4)


def test_a_failing_process_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match='ended with code 1'): disk._child(tmp_path/'none.npy', tmp_path/'none', tmp_path/'codes.npy', 1)


def test_peak_counts_mapped_pages(tmp_path, x, monkeypatch):
    "A process that keeps a mapped file's pages is seen to"
    np.save(tmp_path/'x.npy', np.ones((60_000, 512), np.float32))
    child = "import json, sys, numpy as np\nx = np.load(sys.argv[1], mmap_mode='r'); x.sum()\nprint(json.dumps(dict(peak=next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) * 1024)))"
    monkeypatch.setattr(disk, 'CHILD', child)
    assert disk._child(tmp_path/'x.npy', '', '', 1)['peak'] > 60_000 * 2048


@pytest.mark.parametrize('kw, says', [(dict(n=0), 'n: expected at least 1'), (dict(n_threads=0), 'n_threads: expected at least 1'), (dict(work=__file__), 'work: expected a folder')])
def test_bad_disk(kw, says, tmp_path):
    with pytest.raises(ValueError, match=says): bench_disk(**{'work': tmp_path} | kw, folder=None)


def test_resident_of_nobody_is_empty(): assert disk.resident(2 ** 30) == {} and disk.resident(os.getpid())['RssAnon'] > 0
