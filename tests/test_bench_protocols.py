"""The papers' protocols: each system searches what it says, times are whole, claims follow from stored numbers."""
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from grnb.bench import Ratio, protocols as bench, systems as made
from grnb.bench.protocols import HARDER, KIND, PUBLISHED, STRICT, Protocols, bench_protocols, claims, growth
from grnb.bench.systems import System, cached
from grnb.core import read_json, write_json
from grnb.report import cell, claim, load_results, redraw

SIZES = (1000, 1200)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A small run that is killed before its last protocol, then resumed; (what was measured, folder, how often each protocol was measured, lines)"
    tmp, calls, lines = tmp_path_factory.mktemp('protocols'), [], []
    (tmp/'results').mkdir()
    write_json(tmp/'results'/'ledger.json', dict(values=[claim('x', says, 'test', None, where, reason='none') for says, where in (('kept', 'events, pool 100'), ('old', 'clustered, 1 to 2 items'))]))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(bench, 'CROWD', 12)
        m.setattr(bench, 'package_mark', lambda: 'the same code')
        for name in ('_grdr', '_genius', '_cart', '_recalls'):
            def counted(*args, name=name, was=getattr(bench, name)):
                calls.append(name)
                if name == '_cart' and calls.count(name) == 1: raise KeyboardInterrupt
                return was(*args)
            m.setattr(bench, name, counted)
        go = lambda: bench_protocols(SIZES, timed=4, rounds=1, folder=tmp/'results', work=tmp/'work', say=lines.append)
        with pytest.raises(KeyboardInterrupt): go()
        assert [p.name for p in (tmp/'results').iterdir()] == ['ledger.json'] and not lines
        return go(), tmp, calls, lines


# --- the run

def test_a_killed_run_resumes(run):
    _, tmp, calls, _ = run
    assert sorted(calls) == sorted(['_recalls', '_grdr', '_genius', '_cart', '_cart'])
    assert not [p for p in tmp.rglob('work/**/*.json')], 'measured pieces go once the run is complete'


def test_every_system_is_timed_in_every_pool(run):
    p = run[0]
    for name, (published, strict) in p.times.items():
        for n in SIZES:
            for side, systems in ((published, PUBLISHED[name]), (strict, HARDER)):
                want = set(systems) - ({made.APART} if n > made.FILES else set())
                assert {s for m, s in side if m == n} >= want, (name, n)
    assert all((t > 0).all() for sides in p.times.values() for side in sides for t in side.values())
    assert p.times['GRDR'][0][1000, made.COLD].shape == (4,) and p.times['CART'][0][1000, made.EXACT].shape == (1, 12)
    assert set(KIND) == set(STRICT) == set(PUBLISHED) == set(p.times)


def test_exact_systems_find_everything(run):
    recall = {k: v.mean() for k, v in run[0].recall.items()}
    for n in SIZES:
        assert recall[n, made.EXACT] == recall[n, made.FLAT] == 1
        assert recall[n, made.GRAPH] > .9 and recall[n, made.LIGHT + made.RERANKED] > .7
        for ours in (made.LEARNED, made.LIGHT): assert recall[n, ours + made.RERANKED] >= recall[n, ours + made.ALONE]


def test_disk_and_memory_find_the_same(run):
    "Reading from disk changes times alone; one file an item holds twelve noisy frames whose mean finds nearly the same"
    _, tmp, _, _ = run
    systems, path = made.systems(SIZES, 0, next((tmp/'work').iterdir()), 0)
    files = next((tmp/'work').iterdir())/'files'
    q = bench.vectors('clustered', 1, 0, 5)[1]
    for n in SIZES:
        found = {name: s.search(q) for (m, name), s in systems.items() if m == n}
        for a in (made.COLD, made.WARM, made.SORTED, made.FLAT): assert np.array_equal(found[a], found[made.EXACT]), a
        for ours in (made.LEARNED, made.LIGHT): assert bench.found_of(found[ours + made.READ], found[ours + made.RERANKED]).mean() > .99
        assert all(r.shape == (5, 10) and r.max() < n for r in found.values())
    apart = made._from_disk(np.load(path)[:1000], path, files)[made.APART]
    apart.before()
    assert np.mean([len(set(a) & set(b)) for a, b in zip(apart.search(q), systems[1000, made.EXACT].search(q))]) > 7


def test_results_carry_their_labels(run):
    _, tmp, _, lines = run
    for name in KIND:
        r = load_results(tmp/'results', f'protocol_{name.lower()}', times=True)
        assert KIND[name] in r['caption'] and STRICT[name] in r['caption']
        assert {'as published', 'strict'} <= {c['panel'] for c in r['values']}
        assert {c['unit'] for c in r['values'] if c['panel'] in ('as published', 'strict')} == {'ms' if name == 'GRDR' else 'queries/s'}
        assert {c['column'] for c in r['values']} == set(SIZES)
    singles = [c for c in load_results(tmp/'results', 'protocol_grdr', times=True)['values'] if c['panel'] in ('as published', 'strict')]
    assert all(c['low'] <= c['value'] <= c['high'] and c['n'] == 4 for c in singles)
    assert {c['row'] for c in load_results(tmp/'results', 'protocols')['values']} >= set(HARDER)
    assert any(l.startswith('GRDR, strict: light decoder') and 'is ahead of' in l for l in lines) and any('still cached' in l for l in lines)
    assert sum('at most 1.05: ' in l for l in lines) == 2
    assert all('drawn' in l or 'missing' in l for l in redraw(tmp))


def test_the_ledger_follows_from_the_store(run):
    _, tmp, _, _ = run
    rows = read_json(tmp/'results'/'ledger.json')['values']
    own = claims(load_results(tmp/'results', 'protocols_ratios', times=True)['values'])
    assert [r for r in rows if r['claim'] == 'kept'] and not [r for r in rows if r['claim'] == 'old']
    by = lambda r: r['claim']
    assert sorted(own, key=by) == sorted((r for r in rows if r['claim'] != 'kept'), key=by) and len(own) == 8
    assert all(r['dataset'] == 'clustered, 1,000 to 1,200 items' and r['verdict'] in ('reproduced', 'not reproduced') for r in own)


def test_quick_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    t, asked = np.full((1, 3), .1), []
    def run(sizes, timed, rounds, crowd, files, seed, work):
        asked.append((sizes, crowd, files))
        sides = lambda name: tuple({(n, s): t[0] if name == 'GRDR' else t for n in sizes for s in (*PUBLISHED[name], *HARDER)} for _ in range(2))
        return Protocols(sizes, {}, {name: sides(name) for name in KIND}, None)
    monkeypatch.setattr(bench, '_run', run)
    assert bench_protocols(quick=True, say=None).sizes == (1_000, 4_000)
    assert asked == [((1_000, 4_000), 20, 0)] and not list(tmp_path.iterdir())


@pytest.mark.parametrize('kw, says', [
    (dict(sizes=(10,)), 'sizes: expected at least 1000'), (dict(sizes=()), 'sizes: expected at least one'), (dict(sizes=(1e3,)), 'sizes: expected a whole number'),
    (dict(timed=1), 'timed: expected at least 2'), (dict(timed=101), 'timed: expected at most 100'), (dict(rounds=0), 'rounds: expected at least 1'),
])
def test_bad_input(kw, says, tmp_path):
    with pytest.raises(ValueError, match=says): bench_protocols(**kw, folder=None, work=tmp_path)
    assert not list(tmp_path.iterdir())


# --- verdicts

@settings(deadline=None, max_examples=50)
@given(st.floats(.5, 20), st.integers(2, 5), st.integers(3, 30))
def test_growth_is_the_power_of_the_pool(factor, S, Q):
    sizes = 10. ** np.arange(3, 3 + S)
    times = np.linspace(1, 2, Q) * factor ** np.arange(S)[:, None]
    r = growth(sizes, times)
    assert np.allclose(r, factor)


def test_growth_pairs_queries():
    "Queries that differ a hundredfold from each other widen nothing as long as each keeps its own pace"
    spread = np.logspace(0, 2, 40)
    r = growth((1e3, 1e5), np.stack([spread, spread * 1.21]))
    assert np.allclose(r, 1.1)
    with pytest.raises(ValueError, match='expected a row for each of at least two sizes'): growth((1e3, 1e5), spread[None])


@pytest.mark.parametrize('low, high, verdict', [(1., 1.04, 'reproduced'), (1., 1.06, 'not reproduced'), (1.06, 1.2, 'not reproduced'), (.9, .95, 'reproduced')])
def test_flat_means_the_whole_interval_is(low, high, verdict):
    c, = claims([cell('light decoder, beam 50, no vectors read', bench.GROWS, (low + high) / 2, 'made up, 1 to 2 items', low=low, high=high, n=50)])
    assert c['verdict'] == verdict and c['effect']['low'] <= c['effect']['value'] <= c['effect']['high'] and 'light decoder' in c['claim']


@pytest.mark.parametrize('low, high, verdict', [(2., 3., 'reproduced'), (.9, 1.5, 'not reproduced'), (.1, .2, 'not reproduced')])
@pytest.mark.parametrize('dense', [made.COLD, made.FLAT, made.GRAPH])
def test_sooner_means_the_whole_interval_is(dense, low, high, verdict):
    c, = claims([cell('genius generator', dense + bench.OVER, (low + high) / 2, 'made up', low=low, high=high, n=50)])
    assert c['verdict'] == verdict and c['paper'] == 'GRDR' and ('strict' in c['claim']) == (dense != made.COLD)


def test_other_ratios_claim_nothing():
    assert claims([cell('x', made.EXACT + bench.OVER, 2, 'made up', low=1, high=3, n=9)]) == []


def made_up(**at):
    "Protocols of made-up times: system → a function of the pool's size, in seconds"
    times = {(n, s): np.full(6, f(n)) for s, f in at.items() for n in (1000, 100_000)}
    return Protocols((1000, 100_000), {}, dict(GRDR=(times, times)), 0.)


def test_crossings_are_said_also_where_there_are_none(monkeypatch):
    monkeypatch.setattr(bench, 'PUBLISHED', dict(GRDR=(made.LIGHT, 'exact slow', 'exact never', 'exact always')))
    monkeypatch.setattr(bench, 'HARDER', ())
    p = made_up(**{made.LIGHT: lambda n: 1e-3, 'exact slow': lambda n: 1e-7 * n, 'exact never': lambda n: 1e-4, 'exact always': lambda n: 1e-2})
    line, = bench._crossings(p)
    assert 'exact slow from 10,000 items on' in line and 'exact never nowhere' in line and 'exact always in all pools measured' in line


def test_throughput():
    p = Protocols((5,), {}, dict(GENIUS=({(5, 'a'): np.array([.1, .3])}, {(5, 'a'): np.array([[.5, 1.], [.5, 2.], [.5, 4.]])})), None)
    assert p.of('GENIUS', 0, 5, 'a') == 5 and p.of('GENIUS', 1, 5, 'a') == 1                      # 2 in 0.4 s; 2 in 2 s, median of rounds


# --- measuring

def test_pages_are_dropped_before_every_query_and_never_warmed():
    seen = []
    systems = {'cold': System(lambda q: seen.append(('cold', float(q[0, 0]))), lambda: seen.append(('drop', None))), 'warm': System(lambda q: seen.append(('warm', float(q[0, 0]))))}
    t = bench._one_by_one(systems, np.arange(7.)[:, None], np.random.default_rng(0), block=4)
    assert set(t) == {'cold', 'warm'} and all((v > 0).all() and v.shape == (7,) for v in t.values())
    cold = [s for s in seen if s[0] != 'warm']
    assert cold[::2] == [('drop', None)] * 7 and sorted(x for _, x in cold[1::2]) == list(range(7))
    assert len([s for s in seen if s[0] == 'warm']) == 7 + 2 * 2                                    # two more a block


def test_crowd_is_served_at_once():
    "All clients are within the search together, each with its own query"
    inside, got = threading.Barrier(8, timeout=10), []
    def search(q):
        inside.wait()
        got.append(float(q[0, 0]))
        time.sleep(.01)
    took = bench._crowd(System(search), np.arange(8.)[:, None])
    assert sorted(got) == list(range(8)) and took.shape == (8,) and (took >= .01).all()


def test_a_failing_client_is_heard():
    def search(q):
        if q[0, 0] == 3: raise OSError('gone')
    with pytest.raises(OSError, match='gone'): bench._crowd(System(search), np.arange(5.)[:, None])


def test_together_counts_waiting():
    slow = lambda q: time.sleep(.002 * len(q))
    whole, each = (bench._together(System(slow, one=one), np.zeros((5, 1))) for one in (False, True))
    assert len(set(whole)) == 1 and (np.diff(each) > 0).all() and min(whole[0], each[-1]) >= .01


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 5))
def test_top(seed, n, B):
    s = np.random.default_rng(seed).random((B, n))
    assert np.array_equal(made._top(s), np.argsort(-s, axis=1)[:, :10])


def test_cached_tells_what_is_in_memory(tmp_path):
    path = tmp_path/'x.npy'
    np.save(path, np.zeros(100_000, np.float32))
    np.load(path)
    share = cached(path)
    assert share is None or share == 1
    bench._forget(path)
    assert share is None or 0 <= cached(path) <= 1


def test_ratio_cells_need_no_second_pool():
    t = np.full(3, .1)
    names = (made.LEARNED, made.LIGHT)
    times = {(1000, s): t for s in (*PUBLISHED['GRDR'], *HARDER)}
    rows = bench._ratios(Protocols((1000,), {}, dict(GRDR=(times, times)), None), 0)
    assert {r[1] for r in rows} == {d + bench.OVER for d in (made.COLD, made.WARM, made.EXACT, made.FLAT, made.GRAPH)}
    assert all(r[0].startswith(names) and np.allclose(r[2], Ratio(1, 1, 1)) for r in rows)
