"""Metrics against slow references, against ir_measures, and on bad input."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from grnb.data.task import qrels_of
from grnb.metrics import (Estimate, bootstrap, depth, mrr, median_rank, not_below, paired, ranks, read_qrels, read_run, recall, write_qrels,
                          write_run)

fast = settings(max_examples=60, deadline=None)


@st.composite
def searches(draw):
    "Matches and found lists of a small pool, with queries that match nothing and lists that end early"
    n, q, k, seed = draw(st.integers(1, 12)), draw(st.integers(1, 6)), draw(st.integers(1, 8)), draw(st.integers(0, 2**20))
    g = np.random.default_rng(seed)
    pairs = [(a, b) for a in range(q) for b in range(n) if g.random() < .2]
    qrels = qrels_of([a for a, _ in pairs], [b for _, b in pairs], q)
    found = np.full((q, k), -1)
    for row in found:
        some = g.permutation(n)[:g.integers(0, k + 1)]
        row[:len(some)] = some
    return found, qrels


@fast
@given(searches())
def test_ranks_are_those_of_a_walk(case):
    found, qrels = case
    want = []
    for q, row in enumerate(found):
        right = set(qrels.of(q).tolist())
        want.append(next((i for i, r in enumerate(row.tolist(), 1) if r in right), 0))
    assert ranks(found, qrels).tolist() == want


@fast
@given(searches(), st.integers(1, 8))
def test_against_ir_measures(case, k):
    ir = pytest.importorskip('ir_measures')
    found, qrels = case
    has = qrels.counts() > 0
    if not has.any(): return
    judged = {str(q): {str(i): 1 for i in qrels.of(q)} for q in np.flatnonzero(has)}
    run = {str(q): {str(i): float(-j) for j, i in enumerate(row) if i >= 0} for q, row in enumerate(found)}
    r = ranks(found, qrels)
    theirs = ir.calc_aggregate([ir.Success@k, ir.RR@k], judged, run)
    assert np.isclose(recall(r, k)[has].mean(), theirs[ir.Success@k])
    assert np.isclose(mrr(r, k)[has].mean(), theirs[ir.RR@k])


@fast
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 10))
def test_recall_grows_with_k_and_bounds_mrr(r, k):
    assert (recall(r, k) <= recall(r, k + 1)).all() and (mrr(r, k) <= recall(r, k)).all()
    assert median_rank(r) >= 1


def test_not_found_is_last():
    assert median_rank([1, 0, 0]) == np.inf and median_rank([1, 3, 0]) == 3 and depth([0, 2]).tolist() == [np.inf, 2]


@pytest.mark.parametrize('call, says', [
    (lambda q: ranks([1, 2], q), r'found: expected integers of shape \(Q, k\)'),
    (lambda q: ranks([[.5]], q), 'found: expected integers'),
    (lambda q: ranks([[0]], q), 'expected 2 queries'),
    (lambda q: ranks([[-2], [0]], q), 'found: expected item rows from 0'),
    (lambda q: recall([-1], 3), 'ranks: expected 0'),
    (lambda q: recall([1.], 3), 'ranks: expected integers'),
    (lambda q: recall([1], 0), 'k: expected at least 1'),
    (lambda q: median_rank(np.zeros(0, int)), 'ranks: expected at least one'),
    (lambda q: bootstrap([[np.nan]], [0]), 'values: expected numbers'),
    (lambda q: bootstrap([[np.inf]], [0]), 'values: expected finite'),
    (lambda q: bootstrap([[1., 2.]], [0]), r'groups: expected one item a query'),
    (lambda q: bootstrap([], []), 'values: expected shape'),
    (lambda q: bootstrap([1.], [0], statistic='mode'), 'statistic: expected mean or median'),
    (lambda q: paired(np.ones((2, 3)), np.ones((3, 3)), [0, 1, 2]), 'b: expected 2 seeds'),
])
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says): call(qrels_of([0], [1], 2))


def test_no_matches_and_no_results():
    assert ranks(np.zeros((3, 2), int), qrels_of([], [], 3)).tolist() == [0, 0, 0]
    assert ranks(np.zeros((3, 0), int), qrels_of([0], [1], 3)).tolist() == [0, 0, 0]


# --- intervals

def slow_bootstrap(x, groups, rounds, seed):
    "The textbook loop: draw items, gather all their queries, draw seeds"
    g, members = np.random.default_rng(seed), [np.flatnonzero(groups == i) for i in np.unique(groups)]
    means = []
    for _ in range(rounds):
        picked = np.concatenate([members[i] for i in g.integers(len(members), size=len(members))])
        means.append(x[g.integers(len(x), size=len(x))][:, picked].mean())
    return np.quantile(means, [.025, .975])


def test_interval_is_that_of_the_loop():
    g = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), g.integers(1, 6, 60))
    x = (g.random((3, len(groups))) < g.random(60)[groups]).astype(float) + np.array([[0], [.05], [.1]])
    e, slow = bootstrap(x, groups, rounds=4000), slow_bootstrap(x, groups, 4000, 1)
    assert np.isclose(e.value, x.mean()) and (e.n, e.seeds) == (len(groups), 3)
    assert np.allclose([e.low, e.high], slow, atol=.012)


@pytest.mark.parametrize('n', [4, 5, 31])
def test_median_is_numpys(n):
    x = np.random.default_rng(n).integers(0, 9, (2, n)).astype(float)
    e = bootstrap(x, np.arange(n), statistic='median', rounds=50)
    assert e.value == np.median(x, 1).mean() and e.low <= e.value <= e.high


def test_coverage_of_a_known_mean():
    "Of 200 samples, about 95 % of intervals hold the true mean 0.5"
    g, hold = np.random.default_rng(3), 0
    for i in range(200):
        p = np.repeat(g.random(80), 3)
        e = bootstrap((g.random(240) < p).astype(float), np.repeat(np.arange(80), 3), seed=i, rounds=400)
        hold += e.low <= .5 <= e.high
    assert .89 <= hold / 200 <= .99


def test_one_seed_and_repeated_seeds_are_deterministic():
    x, g = np.random.default_rng(0).random((3, 40)), np.arange(40) // 2
    assert bootstrap(x, g) == bootstrap(x, g) != bootstrap(x, g, seed=1)
    assert bootstrap(x[0], g).seeds == 1
    assert bootstrap(np.ones((2, 40)), g)[:3] == (1, 1, 1)


def test_chunks_do_not_show(monkeypatch):
    "Many queries are resampled in blocks; the estimate stays a sensible one"
    x = np.random.default_rng(0).random((2, 30_000))
    e = bootstrap(x, np.arange(30_000), rounds=300)
    assert abs((e.high - e.low) - 2 * 1.96 * x.std() / np.sqrt(30_000)) < .003


def test_group_names_do_not_matter():
    x = np.random.default_rng(0).random((2, 9))
    assert bootstrap(x, np.array(list('aabbccdde'))) == bootstrap(x, [0, 0, 1, 1, 2, 2, 3, 3, 4])


def test_paired_cancels_what_is_common():
    g = np.random.default_rng(0)
    hard = g.random(500)
    a, b = np.stack([hard + .01] * 2), np.stack([hard] * 2)
    d = paired(a, b, np.arange(500))
    assert np.allclose(d[:3], .01) and np.isclose(paired(a, b[:1], np.arange(500)).value, .01)


def test_not_below_needs_both_conditions():
    g, rows = np.random.default_rng(0), np.arange(2000)
    b = (g.random((3, 2000)) < .5).astype(float)
    assert not_below(b, b, rows)
    assert not not_below(b * (g.random(b.shape) < .97), b, rows)            # 3 % lost for certain
    small = b[:, :20].copy(); small[0, np.flatnonzero(small[0])[0]] = 0     # wide interval, but more than 1 % lost
    assert not not_below(small, b[:, :20], np.arange(20))
    tiny = b.copy(); tiny[0, np.flatnonzero(b[0])[0]] = 0                   # a loss well under 1 %
    assert not_below(tiny, b, rows)


def test_estimate_scales():
    assert Estimate(.5, .4, .6, 10, 3).times(100) == (50, 40, 60, 10, 3) and str(Estimate(.5, .4, .6, 10, 3)) == '0.500 [0.400, 0.600]'


# --- files

@fast
@given(searches())
def test_files_round_trip(tmp_path_factory, case):
    found, qrels = case
    d = tmp_path_factory.mktemp('trec')
    scores = np.where(found >= 0, np.linspace(1, 0, found.shape[1]), -np.inf).astype(np.float32)
    names = dict(queries=[f'q{i}' for i in range(len(found))], items=[f'video{i}' for i in range(20)])
    for kw in {}, names:
        write_run(d/'run', found, scores, **kw); write_qrels(d/'qrels', qrels, **kw)
        back, s = read_run(d/'run', n=len(found), **kw)
        pad = found.shape[1] - back.shape[1]
        assert (np.pad(back, ((0, 0), (0, pad)), constant_values=-1) == found).all()
        assert (np.pad(s, ((0, 0), (0, pad)), constant_values=-np.inf) == scores).all()
        again = read_qrels(d/'qrels', n=len(found), **kw)
        assert again.rows.tolist() == qrels.rows.tolist() and again.indptr.tolist() == qrels.indptr.tolist()


def test_run_reads_in_other_tools(tmp_path):
    ir = pytest.importorskip('ir_measures')
    g = np.random.default_rng(0)
    found = np.stack([g.permutation(30)[:10] for _ in range(20)])
    qrels = qrels_of(np.arange(20), g.integers(30, size=20), 20)
    write_run(tmp_path/'run', found, np.tile(np.linspace(1, .1, 10), (20, 1))); write_qrels(tmp_path/'qrels', qrels)
    theirs = ir.calc_aggregate([ir.RR@10], ir.read_trec_qrels(str(tmp_path/'qrels')), ir.read_trec_run(str(tmp_path/'run')))
    assert np.isclose(mrr(ranks(found, qrels), 10).mean(), theirs[ir.RR@10])


@pytest.mark.parametrize('text, says', [
    ('0 Q0 1 1 0.5 t\n0 Q0 1\n', "line 2: expected 'query Q0 item rank score tag'"),
    ('0 Q0 1 x 0.5 t\n', 'line 1: expected a number as rank'),
    ('0 Q0 1 1 nan t\n', 'line 1: expected a number as score'),
    ('0 Q0 1 1 .5 t\n0 Q0 1 2 .4 t\n', 'line 2: item 1 of query 0 comes twice'),
    ('0 Q0 1 1 .5 t\n0 Q0 2 1 .4 t\n', 'line 2: rank 1 of query 0 comes twice'),
    ('0 Q0 cat 1 .5 t\n', "line 1: unknown item 'cat'"),
    ('-1 Q0 0 1 .5 t\n', 'line 1: expected a query row from 0'),
    ('9 Q0 0 1 .5 t\n', 'expected 3 queries, got row 9'),
])
def test_a_wrong_run_line_is_named(tmp_path, text, says):
    (tmp_path/'run').write_text(text)
    with pytest.raises(ValueError, match=says): read_run(tmp_path/'run', n=3)


@pytest.mark.parametrize('text, says', [
    ('0 0 1\n', "line 1: expected 'query 0 item relevance'"),
    ('0 0 1 yes\n', 'line 1: expected a number as relevance'),
    ('0 0 1 1\n0 0 1 1\n', 'line 2: item 1 of query 0 comes twice'),
])
def test_a_wrong_qrels_line_is_named(tmp_path, text, says):
    (tmp_path/'qrels').write_text(text)
    with pytest.raises(ValueError, match=says): read_qrels(tmp_path/'qrels')


def test_relevance_zero_is_no_match(tmp_path):
    (tmp_path/'qrels').write_text('1 0 5 1\n1 0 6 0\n0 0 5 -1\n')
    q = read_qrels(tmp_path/'qrels')
    assert q.indptr.tolist() == [0, 0, 1] and q.rows.tolist() == [5]


@pytest.mark.parametrize('found, scores, kw, says', [
    ([[1]], [[1, 2]], {}, 'scores: expected the shape'),
    ([[1, 2]], [[.1, .2]], {}, 'scores: expected descending'),
    ([[1]], [[np.inf]], {}, 'scores: expected finite'),
    ([[1]], [[.5]], dict(tag='two words'), 'tag: expected names without white space'),
    ([[1]], [[.5]], dict(items=['a', '']), 'items: expected names without'),
])
def test_a_run_that_cannot_be_written(tmp_path, found, scores, kw, says):
    with pytest.raises(ValueError, match=says): write_run(tmp_path/'run', found, scores, **kw)
    assert not list(tmp_path.iterdir())
