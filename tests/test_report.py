"""The results store, tables, figures and the ledger."""
import json
import re

import numpy as np
import pytest
from hypothesis import given, strategies as st

from grnb import core
from grnb.metrics import Estimate
from grnb.report import (cell, claim, curves, draw_beams, draw_latency, latex, ledger, load_results, markdown, note, pivot, provenance, redraw, save_figure,
                         save_results, text, write_table)

E = Estimate(.6121, .6, .62, 5000, 3)


def some():
    return [cell('dense', 'R@10', E.times(100), 'flickr8k', panel='pool 1,000', unit='%'),
            cell('light | strong', 'R@10', E.times(100), 'flickr8k', panel='pool 1,000', unit='%'),
            cell('dense', 'R@10', 61.5, 'flickr8k', panel='pool 7,000', unit='%'),
            cell('dense', 'bytes', 2048, 'flickr8k', panel='pool 1,000')]


# --- cells

@given(st.floats(allow_nan=False))
def test_any_number_goes_through_json(x):
    c = cell('a', 'b', x, 'made up')
    back = json.loads(json.dumps(c, allow_nan=False))
    assert back == c and isinstance(text(back), str)
    if np.isfinite(x): assert np.isclose(back['value'], x, rtol=1e-5, atol=0)


@pytest.mark.parametrize('kw, says', [
    (dict(source='a friend'), 'source: expected this run or paper'),
    (dict(value=float('nan')), 'value: expected a number, got NaN'),
    (dict(value='many'), "value: expected a number, got 'many'"),
    (dict(value=None), 'value: expected a number, got None'),
    (dict(low='x'), 'low: expected a number'),
])
def test_bad_cells(kw, says):
    with pytest.raises(ValueError, match=says): cell(**{**dict(row='a', column='b', value=1, dataset='d'), **kw})


def test_numpy_values_are_plain_numbers():
    assert json.loads(json.dumps(cell('a', 'b', np.float32(.5), 'd')))['value'] == .5
    assert json.loads(json.dumps(claim('p', 'c', 't', Estimate(np.float64(.2), np.float64(.1), np.float64(.3), 10, 3))))['effect']['n'] == 10


# --- the store

def test_store_round_trip_and_bytes(tmp_path):
    "Keys are sorted, values stand apart, and the same input writes the same bytes."
    path = save_results(tmp_path, 'events', some(), provenance(seeds=[0, 1]), 'A caption.')
    first = path.read_bytes()
    r = load_results(tmp_path, 'events')
    assert r['values'] == some() and r['caption'] == 'A caption.' and r['provenance']['seeds'] == [0, 1]
    save_results(tmp_path, 'events', some(), provenance(seeds=[0, 1]), 'A caption.')
    assert path.read_bytes() == first
    assert list(r) == sorted(r) and all(list(c) == sorted(c) for c in r['values'])


def test_times_have_their_own_file(tmp_path):
    assert save_results(tmp_path, 'latency', some(), {}, times=True).name == 'latency.times.json'
    with pytest.raises(FileNotFoundError, match='latency.json is missing'): load_results(tmp_path, 'latency')


@pytest.mark.parametrize('body, says', [('{', 'not json'), ('[]', 'expected caption, values and provenance'),
                                        ('{"caption": "", "provenance": {}, "values": [{"row": "a"}]}', 'value 0 has no column')])
def test_damaged_results_name_the_file(tmp_path, body, says):
    (tmp_path/'x.json').write_text(body)
    with pytest.raises(ValueError, match=says) as e: load_results(tmp_path, 'x')
    assert 'x.json' in str(e.value)


def test_the_commit_is_the_packages_own(tmp_path, monkeypatch):
    want = provenance()
    monkeypatch.chdir(tmp_path)                                                              # no repository, or another
    assert provenance()['commit'] == want['commit'] and provenance()['dirty'] == want['dirty']


def test_provenance_says_where_and_how():
    p = provenance(seeds=range(3), config={'K': 256})
    assert {'commit', 'dirty', 'packages', 'device', 'processor', 'threads', 'seeds', 'config_hash'} <= set(p)
    assert p['config_hash'] == provenance(config={'K': 256})['config_hash'] != provenance(config={'K': 128})['config_hash']
    assert p['packages']['numpy'] == np.__version__ and not any('time' in k for k in p)
    json.dumps(p, allow_nan=False)


def test_the_processor_tells_its_name_and_features(tmp_path, monkeypatch):
    "Read once and closed; a system without the file has a name all the same"
    info, files = tmp_path/'cpuinfo', []
    info.write_text('model name\t: Made Up 9 @ 3:1\nvmx flags\t: vnmi\nflags\t\t: fpu avx512_bf16_x amx_bf16\n')
    def opened(path, *args):
        assert path == '/proc/cpuinfo'
        files.append(open(info, *args))
        return files[-1]
    monkeypatch.setattr(core, 'open', opened, raising=False)
    assert core.cpu_name() == 'Made Up 9 @ 3:1' and core.cpu_flags() == 'fpu avx512_bf16_x amx_bf16' and core.fast_bf16() and not core.fast_bf16('mps')
    assert provenance()['processor'] == 'Made Up 9 @ 3:1' and all(f.closed for f in files)
    info.unlink()
    assert core.cpu_name() and core.cpu_flags() == '' and not core.fast_bf16()


# --- tables

def test_two_cells_in_one_place(tmp_path):
    with pytest.raises(ValueError, match='dense, pool 1,000, R@10 comes twice'): pivot(some() + some()[:1])


def test_markdown_is_rectangular_and_keeps_bars():
    lines = [l for l in markdown(some(), 'T').split('\n') if l.startswith('|')]
    assert len({len(re.findall(r'(?<!\\)\|', l)) for l in lines}) == 1 and len(lines) == 4
    assert 'light \\| strong' in lines[3] and '| – |' in lines[3] and '61.2 [60.0, 62.0]' in lines[2]


def test_columns_of_a_panel_stand_together():
    assert [k[2:] for k in pivot(some()).columns] == [('pool 1,000', 'R@10'), ('pool 1,000', 'bytes'), ('pool 7,000', 'R@10')]


def test_paper_and_measured_never_share_a_column():
    ours, theirs = cell('GENIUS', 'R@1', .3, 'flickr8k'), cell('GENIUS', 'R@1', .6, 'flickr30k', source='paper')
    t = pivot([ours, theirs])
    assert len(t.columns) == 2
    head = markdown([ours, theirs]).split('\n')[0]
    assert 'flickr30k, paper: R@1' in head and 'flickr8k, this run: R@1' in head
    assert 'Source: paper, this run.' in note([ours, theirs]) and 'Stored result' in note([ours, theirs]) and 'Stored' not in note([theirs])


def wide():
    "Two panels of nine columns, and a row that only one of them has"
    return [cell(row, f'R@{k}', k, 'made up', panel=panel, low=0, high=9, n=7) for panel in ('pool 1', 'pool 2') for row in ('dense', 'light')[:3 - int(panel[-1])] for k in range(9)]


def test_a_wide_table_is_one_table_a_panel():
    body = markdown(wide(), 'T')
    assert body.startswith('T\n\n**pool 1**\n\n| ') and body.count('**pool') == 2 and body.count('light') == 1 and body.count('Dataset:') == 1
    assert {l.count('|') for l in body.split('\n') if l.startswith('|')} == {11} and 'pool 2: R' not in body
    tex = latex(wide(), 'T', 'tab:x')
    assert tex.count(r'\begin{tabular}') == tex.count(r'\end{table}') == 2 and r'\caption{pool 2. T ' in tex and r'\label{tab:x-2}' in tex
    assert '**' not in markdown(wide()[:9], 'T') and r'\label{tab:x}' in latex(wide()[:9], 'T', 'tab:x')                 # one panel is one table
    assert 'flickr8k, pool 1' in markdown([*wide(), cell('a', 'R@1', 1, 'flickr8k', panel='pool 1')])


def test_latex_escapes_and_balances():
    body = latex([cell('a_b & 50 %', 'R@1 ≥ x', .5, 'd#1')], 'Cost $5', 'tab:x')
    assert r'a\_b \& 50 \%' in body and r'$\ge$' in body and r'Cost \$5' in body and r'd\#1' in body
    assert len(re.findall(r'\\begin', body)) == len(re.findall(r'\\end', body)) == 2
    rows = [l for l in latex(some()).split('\n') if l.endswith(r'\\')]
    assert {sum(int(m) - 1 for m in re.findall(r'multicolumn\{(\d)', l)) + l.replace(r'\&', '').count('&') for l in rows} == {3}


def test_write_table(tmp_path):
    assert write_table(tmp_path, 'x', some()).read_text() == markdown(some())
    assert (tmp_path/'x.tex').read_text() == latex(some(), label='tab:x')


# --- figures

def points():
    return [cell(name, size, .1 * size**power, 'made up', panel=panel, unit='ms') for panel in ('one query', '100 at once')
            for size in (1000, 1_000_000) for name, power in (('exact', .5), ('light', .01))]


def test_figures_are_the_same_bytes(tmp_path):
    files = []
    for _ in range(2):
        save_figure(curves(points(), 'pool (items)', 'latency (ms a query)', logy=True), tmp_path, 'f', 'Caption.')
        files.append({p.name: p.read_bytes() for p in tmp_path.iterdir()})
    assert sorted(files[0]) == ['f.md', 'f.pdf', 'f.png', 'f.svg']
    assert [n for n in files[0] if files[0][n] != files[1][n]] == []


def test_curves_have_units_panels_and_level_lines():
    fig = curves([*points(), cell('dense', 'R@10', 50, 'made up', panel='one query')], 'pool (items)', 'latency (ms a query)', logy=True)
    a, b = fig.axes
    assert (a.get_title(), b.get_title()) == ('one query', '100 at once') and a.get_xlabel() == 'pool (items)' and a.get_xscale() == 'log'
    assert [l.get_linestyle() for l in a.lines] == ['--', '-', '-'] and len(b.lines) == 2 and fig.legends
    fig.canvas.draw()
    assert [t.get_text() for t in a.get_xticklabels()] == ['1 k', '1 M']


def beams(places=(50, 200, 1000)):
    return [cell(f'light, beam {x}', column, Estimate(v := 20 + x / 1000, v - 1, v + 1, 10, 3), 'made up', panel='pool 1', unit='%', series='light', x=x)
            for column in ('two-stage R@1', 'two-stage R@10') for x in places] + [cell('exact dense', 'two-stage R@10', 22, 'made up', panel='pool 1', unit='%')]


def test_beams_are_drawn_at_their_metric(tmp_path):
    save_results(tmp_path/'results', 'events', beams(), provenance())
    ax = draw_beams(tmp_path, 'events')[0].axes[0]
    assert ax.get_ylabel() == 'two-stage R@10 (%)' and [len(l.get_xdata()) for l in ax.lines] == [3, 2]
    assert any(l.endswith('events_beams.png') for l in redraw(tmp_path))
    with pytest.raises(ValueError, match="no cell of events in column 'R@7'"): draw_beams(tmp_path, 'events', 'R@7')


def test_one_beam_is_no_curve(tmp_path):
    save_results(tmp_path/'results', 'events', beams((50,)), provenance())
    assert not any('beams' in l for l in redraw(tmp_path))


# --- ledger and redraw

def test_verdicts():
    assert claim('p', 'c', 't', Estimate(.1, .01, .2, 10, 3))['verdict'] == 'reproduced'
    assert claim('p', 'c', 't', Estimate(.1, -.01, .2, 10, 3))['verdict'] == 'not reproduced'
    assert claim('p', 'c', 't', Estimate(.1, .01, .2, 10, 3), least=.05)['verdict'] == 'not reproduced'
    assert claim('p', 'c', 't', None, reason='no GPU')['verdict'] == 'not testable here'
    with pytest.raises(ValueError, match='reason: expected why'): claim('p', 'c', 't', None)
    assert '0.100 [0.0100, 0.200] on events, n = 10, seeds: 3' in ledger([claim('p', 'c|d', 't', Estimate(.1, .01, .2, 10, 3), 'events')])


def test_redraw_draws_what_is_there_and_names_what_is_not(tmp_path):
    lines = redraw(tmp_path)
    assert len(lines) == 3 and all(l.startswith('missing: ') for l in lines)
    save_results(tmp_path/'results', 'events', some(), provenance())
    save_results(tmp_path/'results', 'latency', points(), provenance(), 'Latency.', times=True)
    lines = redraw(tmp_path)
    assert [l.split(':')[0] for l in lines] == ['drawn'] * 3 + ['missing'] and 'grnb reproduce --task flickr8k' in lines[-1]
    made = {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    assert {'tables/events.md', 'tables/events.tex', 'tables/latency.times.md', 'latency.png', 'latency.md'} <= set(made)
    redraw(tmp_path)
    assert {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == made
    assert 'Latency.' in (tmp_path/'latency.md').read_text()


def test_drawing_a_missing_result_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match='latency.times.json is missing'): draw_latency(tmp_path)
