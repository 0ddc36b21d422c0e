"""ids.diagnose: every number against its plain definition, and what it must refuse."""
import json
from collections import Counter
from math import log2

import numpy as np
import pytest
from hypothesis import given, strategies as st

from grnb.ids.diagnose import Diagnosis, diagnose, draw_diagnosis, draw_map, leading
from grnb.tokenizer.kmeans import ResidualKMeans


def entropy(counts): return -sum(c / sum(counts) * log2(c / sum(counts)) for c in counts)


def plain(codes, x, sizes):
    "Counts with dictionaries; codes (N, V, L), x (N, D)"
    N, V, L = codes.shape
    out = dict(entropy=[], collision=[], within=[])
    for l in range(1, L + 1):
        has = [{tuple(c[:l]) for c in item} for item in codes.tolist()]
        load = Counter(p for item in has for p in item)
        out['entropy'].append(entropy(list(load.values())))
        out['collision'].append(np.mean([all(load[p] > 1 for p in item) for item in has]))
        groups = {}
        for row, item in enumerate(codes.tolist()):
            for c in item: groups.setdefault(tuple(c[:l]), []).append(x[row])
        out['within'].append(sum(((np.array(g) - np.mean(g, 0)) ** 2).sum() for g in groups.values()) / (V * (x ** 2).sum()))
    out['spread'] = ((x - x.mean(0)) ** 2).sum() / (x ** 2).sum()
    full = [{tuple(c) for c in item} for item in codes.tolist()]
    load = Counter(p for item in full for p in item)
    levels = [Counter(codes[..., l].ravel().tolist()) for l in range(L)]
    return out | dict(ids=sum(map(len, full)), largest=max(load.values()), buckets=sorted(Counter(load.values()).items()),
                      used=[len(c) for c in levels], perplexity=[2 ** entropy(list(c.values())) for c in levels])


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 3), st.integers(1, 3))
def test_counts_equal_the_plain_ones(seed, N, L, V):
    g = np.random.default_rng(seed)
    codes, x = g.integers(0, 3, size=(N, V, L)), g.normal(size=(N, 4)).astype(np.float32)
    d, want = diagnose(codes, x, sizes=(3,) * L), plain(codes, x.astype(float), (3,) * L)
    for name, value in want.items(): assert np.allclose(getattr(d, name), value, atol=1e-5), name
    assert d.items == N and sum(s * n for s, n in d.buckets) == d.ids
    assert d.error is None and d.agreement is None and d.purity is None


@given(st.integers(0, 10**6), st.integers(2, 30))
def test_error_cosine_and_neighbours_equal_the_plain_ones(seed, N):
    g = np.random.default_rng(seed)
    x, y = g.normal(size=(N, 5)).astype(np.float32), g.normal(size=(N, 5)).astype(np.float32)
    d = diagnose(np.zeros((N, 1), int), x, sizes=(1,), decoded=y, neighbours=3)
    near = lambda i, z: set(sorted((j for j in range(N) if j != i), key=lambda j: ((x[i] - z[j]) ** 2).sum())[:3])
    assert np.isclose(d.error, ((x - y) ** 2).sum() / (x ** 2).sum(), rtol=1e-4)
    assert np.isclose(d.cosine, np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, y)]), atol=1e-5)
    assert np.isclose(d.overlap, np.mean([len(near(i, x) & near(i, y)) / min(3, N - 1) for i in range(N)]), atol=1e-6)
    assert d.sampled[:2] == (N, N)


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3))
def test_agreement_is_that_of_the_best_pair(seed, V, W):
    g = np.random.default_rng(seed)
    a, b = g.integers(0, 2, size=(9, V, 3)), g.integers(0, 2, size=(9, W, 3))
    count = lambda p, q: next((i for i in range(3) if p[i] != q[i]), 3)
    want = [max(count(p, q) for p in a[i].tolist() for q in b[i].tolist()) for i in range(9)]
    assert leading(a, b).tolist() == want
    d = diagnose(b, np.ones((9, 2), np.float32), sizes=(2, 2, 2), query_codes=a, positives=np.arange(9))
    assert np.allclose(d.agreement, [np.mean([w >= l for w in want]) for l in (1, 2, 3)])
    assert d.agreement[0] >= d.agreement[1] >= d.agreement[2] and d.chance[0] >= d.chance[2]


def clustered(n=600, D=16):
    g = np.random.default_rng(0)
    return (g.normal(size=(12, D))[g.integers(12, size=n)] + .3 * g.normal(size=(n, D))).astype(np.float32)


def test_a_quantiser_is_asked_for_what_is_not_given():
    x = clustered()
    q = ResidualKMeans(8, 3, seed=1).fit(x)
    a = diagnose(q, x, queries=x[::2], positives=np.arange(0, 600, 2))
    b = diagnose(q.encode(x), x, sizes=q.sizes, decoded=q.decode(q.encode(x)), query_codes=q.encode(x[::2]), positives=np.arange(0, 600, 2))
    assert a.agreement == (1, 1, 1) and a == Diagnosis(**{**b.to_dict(), 'by_level': a.by_level}) and b.by_level is None
    assert np.isclose(a.by_level[-1], a.error) and all(np.diff(a.by_level) < 0)
    assert a.bits == 9 and a.bytes == 3
    with pytest.raises(ValueError, match='queries: expected vectors of width'): diagnose(q, x, queries=np.ones((2, 5)), positives=[0, 1])
    with pytest.raises(ValueError, match='queries: expected vectors of width'): diagnose(q.encode(x), x, sizes=q.sizes, queries=x, positives=np.arange(600))
    assert diagnose(q, np.zeros_like(x)).by_level is None


def test_views_with_a_code_each():
    x = clustered().reshape(150, 4, 16)
    q = ResidualKMeans(8, 2, seed=1).fit(x)
    d, flat = diagnose(q, x), diagnose(q, x.reshape(600, 16))
    assert np.isclose(d.error, flat.error) and np.allclose(d.within, flat.within) and d.items == 150 and d.bits > flat.bits


def test_modality():
    kind, x = np.repeat([0, 1], [30, 10]), np.ones((40, 2), np.float32)
    pure, mixed = diagnose(np.c_[kind, kind], x, sizes=(2, 2), modality=kind), diagnose(np.zeros((40, 1), int), x, sizes=(1,), modality=kind)
    assert (pure.purity, mixed.purity, mixed.commonest) == (1, .75, .75)
    masks = np.c_[kind == 0, kind == 1]
    assert diagnose(np.c_[1 - kind], x, sizes=(2,), modality=masks).purity == 1      # inverted is pure all the same


def test_samples_bound_the_work_and_are_drawn_by_seed(monkeypatch):
    import grnb.ids.diagnose as m
    monkeypatch.setattr(m, 'ROWS', 100); monkeypatch.setattr(m, 'PAIRS', 50)
    x = clustered()
    q = ResidualKMeans(8, 2).fit(x)
    ask = lambda seed: diagnose(q, x, queries=x, positives=np.arange(600), seed=seed)
    assert ask(0) == ask(0) and ask(0).error != ask(1).error and ask(0).sampled == (100, 50, 100) and ask(0).within == ask(1).within


def test_constant_duplicate_and_single_items():
    d = diagnose(np.zeros((5, 2), int), np.zeros((5, 3), np.float32), sizes=(2, 2), decoded=np.zeros((5, 3), np.float32))
    assert d.within is None and d.spread is None and d.error is None and d.cosine == 0 and d.largest == 5 and d.entropy == (0, 0) and d.perplexity == (1, 1)
    one = diagnose(np.zeros((1, 1), int), np.ones((1, 3)), sizes=(4,), decoded=np.ones((1, 3)), query_codes=np.zeros((1, 1), int), positives=[0])
    assert one.overlap is None and one.chance is None and one.agreement == (1,) and one.collision == (0,) and str(one)


def test_json_round_trip_and_text(tmp_path):
    x = clustered(200)
    q = ResidualKMeans(8, 3).fit(x)
    d = diagnose(q, x, queries=x, positives=np.arange(200), modality=np.arange(200) % 2)
    d.save(tmp_path/'d.json')
    assert Diagnosis.load(tmp_path/'d.json') == d and json.dumps(d.to_dict())
    for word in ('largest bucket', 'purity', '10 nearest'): assert word in str(d) and word in d._repr_html_()
    for text in ('[]', '{"diagnosis": {"items": 3}}', 'no json'):
        (tmp_path/'bad.json').write_text(text)
        with pytest.raises(ValueError, match='bad.json'): Diagnosis.load(tmp_path/'bad.json')


def test_one_page(monkeypatch):
    "All panels, with a map from a stand-in for UMAP, which takes too long to compile here"
    import sys, types
    stand_in = types.SimpleNamespace(UMAP=lambda **k: types.SimpleNamespace(fit_transform=lambda x: x[:, :2]))
    monkeypatch.setitem(sys.modules, 'umap', stand_in)
    x = clustered(200)
    q = ResidualKMeans(8, 2).fit(x)
    first = q.encode(x)[:, 0]
    for words in (None, q.codebooks[0]):
        m = draw_map(x, first, words, most=50)
        want = x[:, :2][first == m.names[0]].mean(0) if words is None else words[m.names[0], :2]
        assert len(m.points) == 50 and np.allclose(m.centres[0], want, atol=1e-5)
    fig = draw_diagnosis(diagnose(q, x), m, 'title')
    assert len(fig.axes) == 6 and len(fig.axes[5].collections) == 2
    with pytest.raises(ValueError, match='at least 4 items'): draw_map(x[:3], first[:3])


@pytest.mark.parametrize('change, says', [
    (dict(sizes=None), 'sizes: expected'),
    (dict(codes=np.full((6, 2), 9)), 'codes: expected values from 0'),
    (dict(codes=np.zeros((6, 2))), 'codes: expected integers'),
    (dict(x=np.ones((5, 3))), 'x: expected vectors of 6 items'),
    (dict(x=np.full((6, 3), np.nan)), 'x: expected finite'),
    (dict(x=np.array([['a']] * 6)), 'x: expected vectors'),
    (dict(codes=np.zeros((0, 2), int), x=np.zeros((0, 3))), 'x: expected at least one item'),
    (dict(decoded=np.ones((6, 2))), 'decoded: expected the shape'),
    (dict(decoded=np.full((6, 3), np.inf)), 'decoded: expected finite'),
    (dict(query_codes=np.zeros((2, 2), int)), 'positives: expected for each of 2 queries'),
    (dict(query_codes=np.zeros((2, 2), int), positives=[0, 6]), 'positives: expected for each'),
    (dict(query_codes=np.zeros((2, 3), int), positives=[0, 1]), 'codes: expected'),
    (dict(modality=[0, 1]), 'modality: expected labels or masks of 6'),
    (dict(neighbours=0), 'neighbours: expected at least 1'),
])
def test_bad_input(change, says):
    a = dict(codes=np.zeros((6, 2), int), x=np.ones((6, 3)), sizes=(2, 2)) | change
    with pytest.raises(ValueError, match=says): diagnose(a.pop('codes'), a.pop('x'), **a)
