"""The efficiency figures: what is missing is said, what is there is drawn, nothing but the store is read."""
import itertools

import numpy as np
import pytest

from grnb.bench import curves
from grnb.bench.curves import draw_decoder, draw_pool, draw_protocol, draw_recall, draw_storage, draw_trie, draw_trie_bytes, looks, overhead, panels, settings_of, stored
from grnb.report import cell, provenance, save_results

DRAW = {draw_protocol: 'protocols', draw_trie: 'trie', draw_trie_bytes: 'trie', draw_decoder: 'decoder', draw_pool: 'ann', draw_recall: 'ann', draw_storage: 'ann', overhead: 'decoder'}


def save(folder, name, cells, times=True): save_results(folder/'results', name, cells, provenance(), 'Made up.', times)


def shown(folder, name): return sorted(p.suffix for p in folder.glob(f'{name}.*'))


ALL = ['.md', '.pdf', '.png', '.svg']


# --- loaders

@pytest.mark.parametrize('draw', DRAW, ids=lambda f: f.__name__)
def test_what_is_missing_is_said_and_left_out(draw, tmp_path):
    said = []
    assert draw(tmp_path, say=said.append) is None
    assert said and all(l.startswith('figures/results/') and l.endswith(f'is missing: `grnb bench {DRAW[draw]}` measures it') for l in said) and not list(tmp_path.iterdir())


def test_a_damaged_result_is_an_error_not_a_gap(tmp_path):
    (tmp_path/'results').mkdir()
    (tmp_path/'results'/'trie.times.json').write_text('{"values": []}')
    with pytest.raises(ValueError, match='expected caption, values and provenance'): stored(tmp_path, 'trie', True)


@pytest.mark.parametrize('draw, kw, says', [(draw_protocol, dict(name='avg'), 'name: expected one of grdr, genius, cart'), (draw_pool, dict(what='recall'), 'what: expected latency or throughput')])
def test_unknown_figures(draw, kw, says, tmp_path):
    with pytest.raises(ValueError, match=says): draw(tmp_path, **kw)


# --- looks

def test_looks_tell_curves_apart_and_families_together():
    names = [f'{f} {i}' for f in ('light', 'genius', 'faiss HNSW', 'faiss IVF-PQ', 'faiss RQ', 'faiss IVF-RaBitQ', 'faiss IVF-Flat', 'exact', 'new') for i in range(7)]
    look = looks(names)
    assert len({(str(v['color']), v['marker'], str(v['linestyle'])) for v in look.values()}) == len(names)
    assert len({str(v['color']) for v in look.values()}) == 9
    for a, b in itertools.combinations(names, 2):
        assert (look[a]['color'] == look[b]['color']) == (a.rsplit(' ', 1)[0] == b.rsplit(' ', 1)[0])
    assert looks(['light a', 'x'])['light a']['color'] == look['light 0']['color']


def test_panels_draw_every_curve_and_band():
    points = [(10, 1., 2., 4.), (100, 2., 3., 8.)]
    fig = panels({'a': {'light': points, 'exact': [(10, 5.)]}, 'b': {'light': [(10, 1., (.5, 2.)), (1000, 1., None)]}}, 'x', 'y')
    a, b = fig.axes[:2]
    assert [l.get_label() for l in a.lines] == ['light', 'exact'] and len(a.collections) == 2 and len(b.collections) == 0
    assert np.array_equal(a.lines[0].get_xydata(), [[10, 1], [100, 2]])
    top = [c.get_paths()[0].vertices[:, 1].max() for c in a.collections]
    assert top == [3, 8] and [t.get_text() for t in fig.legends[0].get_texts()] == ['light', 'exact']
    assert a.get_title(loc='left') == 'a' and b.get_xlabel() == 'x'


# --- figures

def test_protocol(tmp_path):
    cells = [cell(row, n, n * 1e-3, 'd', panel=p, unit='ms', low=n * .9e-3, high=n * 1.1e-3, n=50) for p in ('as published', 'strict', 'strict, 95th percentile') for n in (1000, 10_000) for row in ('light', 'exact dense')]
    save(tmp_path, 'protocol_grdr', cells)
    fig = draw_protocol(tmp_path, 'grdr')
    assert [ax.get_title(loc='left') for ax in fig.axes] == ['GRDR, as published', 'GRDR, strict'] and shown(tmp_path, 'efficiency_grdr') == ALL
    before = (tmp_path/'efficiency_grdr.svg').read_bytes()
    draw_protocol(tmp_path, 'grdr')
    assert (tmp_path/'efficiency_grdr.svg').read_bytes() == before, 'the same numbers give the same bytes'


def test_trie_and_decoder(tmp_path):
    steps = [cell(row, n, v, 'd', panel=f'all steps, {how} caches, B=1', unit='ms', n=30) for how in ('warm', 'cold') for n in (10, 1000) for row, v in (('ours', 1), ('STATIC, torch', 4))]
    save(tmp_path, 'trie', steps + [cell('ours', n, 30, 'd', panel='build') for n in (10, 1000)])
    save(tmp_path, 'trie', [cell('ours', n, 2, 'd', panel='bytes an item, item rows apart') for n in (10, 1000)], times=False)
    save(tmp_path, 'decoder', [cell(row, n, v, 'd', panel=p, unit='times', low=v - .01, high=v + .01, n=9) for p, sizes in (('over no constraint, 2 layers, bf16, B=1', (10, 1000)), ('over no constraint, 6 layers, bf16, B=1', (1000,)), ('decode, B=1', (10, 1000))) for n in sizes for row, v in (('ours', 1.01), ('STATIC, torch', 1.08))])
    fig = draw_trie(tmp_path)
    assert [ax.get_title(loc='left') for ax in fig.axes] == ['warm caches, B=1', 'cold caches, B=1'] and [l.get_label() for l in fig.axes[0].lines] == ['ours', 'STATIC, torch']
    assert draw_trie_bytes(tmp_path) and len(overhead(tmp_path)) == 6 and {c['panel'] for c in overhead(tmp_path)} == {'2 layers, bf16, B=1', '6 layers, bf16, B=1'}
    fig = draw_decoder(tmp_path)
    assert [ax.get_title(loc='left') for ax in fig.axes] == ['2 layers, bf16, B=1'], 'a shape measured at one size is no curve'
    assert curves.BAR in [l.get_ydata()[0] for l in fig.axes[0].lines] and 'n = 9 rounds' in (tmp_path/'efficiency_decoder.md').read_text()
    assert shown(tmp_path, 'efficiency_trie') == shown(tmp_path, 'efficiency_trie_bytes') == shown(tmp_path, 'efficiency_decoder') == ALL


def race(rows):
    "Cells of a stored race: row → goal → (recall, ms, bytes by part)"
    out = []
    for row, goals in rows.items():
        for goal, (recall, ms, parts) in goals.items():
            put = lambda value, panel, unit='': out.append(cell(row, goal, value, 'clustered, 10 items', panel=panel, unit=unit, n=250))
            put(recall, curves.RECALL, '%'); put(ms, curves.MEDIAN, 'ms'); put(sum(v for k, v in parts.items() if k != 'vectors'), curves.BYTES)
            for k, v in parts.items(): put(v, f'{curves.BYTES}, {k}')
    return out


RACE = race({'light': {.8: (85., .1, dict(codes=8, rows=4, vectors=2048)), .9: (92., .2, dict(codes=8, rows=4, vectors=2048)), .85: (85., .1, dict(codes=8, rows=4, vectors=2048))},
             'faiss IVF-PQ64': {.8: (83., .3, dict(codes=64, rows=8, vectors=0))}, 'faiss HNSW32': {.9: (99., .5, dict(codes=2048, structure=272, vectors=0))}})


def test_settings_of_a_race():
    found = settings_of(RACE)
    assert [v[:3] for v in found['light']] == [(85., .1, 12.), (92., .2, 12.)], 'one setting chosen for two recalls counts once'
    assert found['faiss HNSW32'][0][3] == dict(codes=2048, structure=272, vectors=0)


def test_recall_at_fixed_bytes(tmp_path):
    save(tmp_path, 'ann_clustered', RACE)
    fig = draw_recall(tmp_path)
    assert [[l.get_label() for l in ax.lines] for ax in fig.axes] == [['light'], ['light', 'faiss IVF-PQ64'], ['light', 'faiss IVF-PQ64', 'faiss HNSW32']]
    assert [ax.get_title(loc='left') for ax in fig.axes] == ['at most 27 bytes an item', 'at most 110 bytes an item', 'any bytes'] and shown(tmp_path, 'efficiency_recall_clustered') == ALL


def test_storage_by_part(tmp_path):
    save(tmp_path, 'ann_clustered', RACE)
    fig = draw_storage(tmp_path)
    left, right = fig.axes
    assert {l.get_label(): (l.get_xdata()[0], l.get_ydata()[0]) for l in left.lines} == {'light': (12, 92), 'faiss IVF-PQ64': (72, 83), 'faiss HNSW32': (2320, 99)}
    assert max(b.get_x() + b.get_width() for b in right.patches) == curves.EDGE and shown(tmp_path, 'efficiency_storage_clustered') == ALL
    said = [t.get_text() for t in right.texts]
    assert '→ 2,320, recall 99.0 %' in said and '12 + 2,048 of vectors, recall 92.0 %' in said


def test_pools(tmp_path):
    panel = {'one query, median': 1, 'one query, 95th percentile': 2, 'one query, 99th percentile': 3, '100 at once': .5, 'throughput, 100 at once': 1e3}
    rows = ('light decoder, beam 50', 'genius generator, beam 50', 'light at recall 0.95', 'faiss HNSW32 at recall 0.95', 'exact dense (faiss flat)')
    save(tmp_path, 'ann_curves', [cell(row, n, v * (i + 1), 'd', panel=p, unit='ms', n=250 if 'one' in p else None) for p, v in panel.items() for n in (1000, 10_000) for i, row in enumerate(rows)])
    fig = draw_pool(tmp_path)
    assert [ax.get_title(loc='left') for ax in fig.axes] == ['one query, by beam', 'one query, at recall 0.95', '100 at once, by beam', '100 at once, at recall 0.95']
    assert [[l.get_label() for l in ax.lines] for ax in fig.axes[:2]] == [['light decoder, beam 50', 'genius generator, beam 50', 'exact dense (faiss flat)'], ['light', 'faiss HNSW32', 'exact dense (faiss flat)']]
    assert len(fig.axes[0].collections) == 6 and len(fig.axes[2].collections) == 0, 'two bands a curve of single queries'
    assert len(draw_pool(tmp_path, 'throughput').axes) == 2 and shown(tmp_path, 'efficiency_latency') == shown(tmp_path, 'efficiency_throughput') == ALL
