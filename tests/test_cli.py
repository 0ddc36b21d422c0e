"""The command: what it does is what the face does, and what is wrong is one line."""
import inspect
import json
import os
import subprocess
import sys
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest

import grnb.cli as cli
from grnb import GenerativeRetriever, Recipe, load_task
from grnb.cli import main, read_array, read_lines
from grnb.core import save_arrays
from grnb.features.text import TextEncoder
from grnb.metrics import ranks, read_run, recall

rng = np.random.default_rng(0)
ITEMS, QUERIES = rng.normal(size=(50, 6)).astype(np.float32), rng.normal(size=(20, 6)).astype(np.float32)
RECIPE = Recipe(K=8, L=3)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with vectors, a fitted model and an indexed one"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('GRNB_DEBUG', raising=False)
    np.save('items.npy', ITEMS); np.save('queries.npy', QUERIES); np.save('positives.npy', rng.integers(0, 50, 20))
    g = GenerativeRetriever(RECIPE, device='cpu').fit(ITEMS)
    g.save('fitted'); g.index(ITEMS).save('model')
    return tmp_path


def run(words, capsys):
    "Exit code, stdout, stderr"
    capsys.readouterr()
    code = main(words.split() if isinstance(words, str) else words)
    return code, *capsys.readouterr()


def face(**how): return GenerativeRetriever(RECIPE, device='cpu').fit(ITEMS).index(ITEMS).search(QUERIES, **how)


# --- the road from files to lists

def test_fit_index_search_are_those_of_the_face(here, capsys):
    assert run('fit --items items.npy --set K=8 --set L=3 --device cpu --out m', capsys)[:2] == (0, 'fitted baseline on 50 items and 0 queries: m\n')
    assert not Path('m.checkpoint').exists() and not Path('m/pool.safetensors').exists()
    code, out, _ = run('index --model m --items items.npy --out n', capsys)
    assert code == 0 and out.startswith('indexed 50 items under ') and not Path('m/pool.safetensors').exists()
    want = face(k=4, beam=9, candidates=12)
    code, out, _ = run('search --model n --queries queries.npy --k 4 --beam 9 --candidates 12', capsys)
    assert code == 0 and [line.split('\t') for line in out.splitlines()] == [[str(q), str(j + 1), str(want.ids[q, j]), f'{want.scores[q, j]:.4f}'] for q in range(20) for j in range(4)]


@pytest.mark.parametrize('name', ['hits.run', 'hits.npz', 'hits.jsonl'])
@pytest.mark.parametrize('rerank', [True, False])
def test_files_hold_what_search_gives(here, capsys, name, rerank):
    want = face(k=5, rerank=rerank)
    assert run(f'search --model model --queries queries.npy --k 5 --out {name}' + ' --no-rerank' * (not rerank), capsys) == (0, '', '')
    if name.endswith('npz'): got = [np.load(name)[k] for k in ('ids', 'scores')]
    elif name.endswith('run'): got = read_run(name, n=20)
    else:
        lines = [json.loads(line) for line in Path(name).read_text().splitlines()]
        got = [np.array([x[k] for x in lines]) for k in ('ids', 'scores')]
        assert [x['query'] for x in lines] == list(range(20))
    assert (got[0] == want.ids).all() and np.allclose(got[1], want.scores, atol=1e-6)


@pytest.mark.parametrize('name', ['hits.run', 'hits.npz', 'hits.jsonl'])
def test_string_ids_and_short_lists(here, capsys, name):
    Path('ids.txt').write_text('ä\nb\nc\n', encoding='utf-8'); np.save('three.npy', ITEMS[:3])
    assert run('index --model fitted --items three.npy --ids ids.txt --out s', capsys)[0] == 0
    assert run(f'search --model s --queries queries.npy --out {name}', capsys) == (0, '', '')
    if name.endswith('npz'): assert set(np.load(name)['ids'][0]) == {'ä', 'b', 'c', ''}
    elif name.endswith('run'): assert {line.split()[2] for line in Path(name).read_text().splitlines()} == {'ä', 'b', 'c'} and len(Path(name).read_text().splitlines()) == 60
    else: assert set(json.loads(Path(name).read_text().splitlines()[0])['ids']) == {'ä', 'b', 'c'}


def test_integer_ids_and_safetensors(here, capsys):
    np.save('ids.npy', np.arange(50) * 3 + 1)
    save_arrays('pool.safetensors', dict(vectors=ITEMS, other=QUERIES)); save_arrays('one.safetensors', dict(q=QUERIES))
    assert run('index --model fitted --items pool.safetensors:vectors --ids ids.npy --out s', capsys)[0] == 0
    assert run('search --model s --queries one.safetensors --k 5 --out a.npz', capsys)[0] == 0
    assert (np.load('a.npz')['ids'] == face(k=5).ids * 3 + 1).all()
    code, _, err = run('index --model fitted --items pool.safetensors --out s', capsys)
    assert code == 2 and 'name one of its arrays' in err and 'other, vectors' in err


def test_index_into_the_models_own_folder_replaces_the_pool(here, capsys):
    np.save('few.npy', ITEMS[:7])
    assert run('index --model model --items few.npy', capsys)[0] == 0
    assert GenerativeRetriever.load('model').stats()['items'] == 7


def test_many_queries_are_searched_in_blocks(here, capsys):
    g = GenerativeRetriever.load('model')
    many = np.tile(QUERIES, (3, 1))
    a, b = cli._search_all(g, many, block=7, k=3), g.search(many, k=3)
    assert (a.ids == b.ids).all() and np.allclose(a.scores, b.scores, atol=1e-6)
    assert cli._search_all(g, many[:0], k=3).ids.shape == (0, 3)


# --- tasks

TASK = '--task events --size 60 --option source=latent --option views=1'

def test_a_task_in_place_of_files(here, capsys):
    assert run(f'fit {TASK} --set K=8 --set L=3 --out m', capsys)[0] == 0
    assert run(f'index --model m {TASK}', capsys)[0] == 0
    code, out, _ = run(f'search --model m {TASK} --k 10 --out hits', capsys)
    task = load_task('events', 60, source='latent', views=1)
    known = task.part(('train', 'dev'))
    g = GenerativeRetriever(RECIPE).fit(known.items, known.queries, known.positives, dev=known.item_split == 'dev').index(task.items)
    asked = task.asked('test')
    r = ranks(g.search(task.queries[asked]).ids, task.qrels.select(asked))
    assert code == 0 and out.startswith(f'{len(asked)} queries: R@1 {recall(r, 1).mean():.3f}, R@5 {recall(r, 5).mean():.3f}, R@10 {recall(r, 10).mean():.3f}, MRR@10')
    assert sorted({int(line.split()[0]) for line in Path('hits').read_text().splitlines()}) == asked.tolist()       # queries keep their numbers
    assert run(f'index --model m {TASK} --split test', capsys)[0] == 0
    assert GenerativeRetriever.load('m')._index.ids.tolist() == task.pool('test').tolist()                          # and so do items


def test_only_a_pool_from_the_task_is_judged(here, capsys):
    "Ids of another pool may be numbers too, and mean other items"
    task = load_task('events', 60, source='latent', views=1)
    np.save('all.npy', task.items); np.save('ids.npy', np.arange(60)[::-1].copy())
    assert run(f'fit {TASK} --set K=8 --set L=3 --out m', capsys)[0] == 0
    for index in ('--items all.npy', '--task events --size 60 --option source=latent --option views=1 --ids ids.npy', '--task events --size 60 --task-seed 1 --option source=latent --option views=1'):
        assert run(f'index --model m {TASK}', capsys)[0] == 0 and run(f'search --model m {TASK}', capsys)[0] == 0
        assert run(f'index --model m {index}', capsys)[0] == 0                                                       # the mark goes with the pool
        code, out, err = run(f'search --model m {TASK} --out hits', capsys)
        assert (code, out) == (2, '') and 'not indexed from this task' in err and not Path('hits').exists()


def test_fitting_on_texts(here, capsys, monkeypatch):
    "From a task, and from lines of a file; such a model takes texts only"
    monkeypatch.setattr(TextEncoder, 'fit', partialmethod(TextEncoder.fit, steps=3))
    assert run(f'fit {TASK} --text --set K=8 --set L=2 --set dim=16 --out m', capsys)[0] == 0
    assert run(f'index --model m {TASK}', capsys)[0] == 0
    code, out, _ = run(f'search --model m {TASK}', capsys)
    assert code == 0 and 'R@10 ' in out
    texts = load_task('events', 60, source='latent', views=1).texts[:3]
    Path('asked.txt').write_text('\n'.join(texts), encoding='utf-8')
    assert run('search --model m --queries asked.txt --k 2', capsys)[1].count('\n') == 6
    code, _, err = run('search --model m --queries queries.npy', capsys)
    assert code == 2 and 'expected a list of str' in err


def test_data_sums_up_and_writes_what_the_others_read(here, capsys):
    code, out, _ = run('data --size 60 --option source=latent --out w', capsys)
    task = load_task('events', 60, source='latent')
    assert code == 0 and out.strip() == str(task)
    assert (np.load('w/items.npy') == task.items).all() and read_lines('w/texts.txt') == task.texts
    assert run('fit --items w/items.npy --queries w/queries.npy --positives w/positives.npy --set K=8 --set L=2 --out m', capsys)[0] == 0
    assert run('data --size 60 --option source=latent --split test --out t', capsys)[0] == 0 and len(np.load('t/items.npy')) == len(task.pool('test'))
    assert run('data --size 60 --option source=latent --out w', capsys)[0] == 2                                      # nothing is overwritten


# --- what is wrong is one line

WRONG = [
    ('', 'COMMAND'), ('serch', 'invalid choice'), ('search', '--model'), ('search --model model', '--task or --queries'), ('search --model model --queries queries.npy --task events', '--task or --queries'),
    ('search --model nowhere --queries queries.npy', 'nowhere'), ('search --model fitted --queries queries.npy', 'run grnb index'), ('search --model model --queries nowhere.npy', 'nowhere.npy'),
    ('search --model model --queries queries.npy --k 0', 'k: expected at least 1'), ('search --model model --queries queries.npy --k x', '--k'), ('search --model model --queries queries.npy --beam -3', 'beam'),
    ('search --model model --queries queries.npy --candidates 0', 'candidates'), ('search --model model --queries wide.npy', 'expected width 6, got 7'), ('search --model model --queries nan.npy', 'NaN'),
    ('search --model model --queries zero.npy', 'row [3] is zero'), ('search --model model --queries texts.txt', 'got texts'), ('search --model model --queries object.npy', 'object.npy: not an array'),
    ('search --model model --queries short.npy', 'short.npy: not an array'), ('search --model model --queries empty.npy', 'empty.npy'), ('search --model model --queries picture.png', 'expected a .npy'),
    ('search --model model --queries queries.npy --device tpu', 'device'), ('search --model items.npy --queries queries.npy', 'items.npy'), ('search --model model --queries queries.npy --colour red', '--colour'),
    ('search --model model --queries queries.npy --out model', 'model'), ('search --model model --task events --size 60 --option source=latent', 'not indexed from this task'),
    ('fit --items items.npy', '--out'), ('fit --out m', '--task or --items'), ('fit --items items.npy --task events --out m', '--task or --items'), ('fit --items items.npy --recipe genus --out m', 'genius'),
    ('fit --items items.npy --set Q=4 --out m', '--set'), ('fit --items items.npy --set L --out m', '--set'), ('fit --items items.npy --set L=0 --out m', 'L: expected at least 1'),
    ('fit --items items.npy --set K=1.5 --out m', 'K'), ('fit --items items.npy --queries queries.npy --out m', 'positives'), ('fit --items items.npy --queries queries.npy --positives items.npy --out m', 'positives'),
    ('fit --items items.npy --seed -1 --out m', 'seed'), ('fit --items items.npy --dev 2 --out m', 'dev'), ('fit --items items.npy --out notes', 'holds other files'), ('fit --items items.npy --out texts.txt', 'expected a folder'),
    ('fit --items items.npy --checkpoint notes --out m', '--checkpoint'), ('fit --task event --out m', 'events'), ('fit --task events --size 5 --out m', 'size'), ('fit --task events --option colour=red --out m', '--option'),
    ('fit --task events --queries queries.npy --out m', 'brings its own'), ('fit --task events --size 60 --option source=latent --split tests --out m', 'split'), ('fit --items texts.txt --out m', 'items'),
    ('index --model fitted --items items.npy --ids few.txt --out m', 'ids: expected 50, got 2'), ('index --model fitted --items items.npy --ids twice.npy --out m', 'ids: expected each id once'),
    ('index --model fitted --items texts.txt --out m', '--items'), ('index --model fitted --items wide.npy --out m', 'expected width 6, got 7'), ('index --model fitted --items items.npy --out notes', 'holds other files'),
    ('data --task flickr8k --path nowhere', 'nowhere'), ('data --task flickr9k', 'flickr8k'), ('data --out notes', 'holds other files'), ('bench speed', 'latency, tokenizer, disk'), ('bench disk --data many', '--data: not a setting of disk'), ('bench --n 5', '--n: not a setting'), ('bench --data many ood', 'latency takes one'), ('bench --sizes x', '--sizes'),
    ('reproduce --task nothing', 'nothing'), ('reproduce --task flickr8k --full', '--full: only events'), ('fit --items gap.txt --out m', 'gap.txt, line 2'), ('fit --items latin.txt --out m', 'latin.txt'), ('search --mod model --queries queries.npy', '--model'),
]

@pytest.mark.parametrize('words, says', WRONG, ids=[w for w, _ in WRONG])
def test_a_wrong_call_is_one_line_and_code_2(here, capsys, words, says):
    np.save('wide.npy', np.ones((3, 7))); np.save('nan.npy', np.full((3, 6), np.nan)); np.save('zero.npy', np.r_[ITEMS[:3], np.zeros((1, 6))])
    np.save('object.npy', np.array([{}], object)); Path('short.npy').write_bytes(Path('items.npy').read_bytes()[:-9]); Path('empty.npy').write_bytes(b'')
    Path('texts.txt').write_text('a\nb\n'); Path('few.txt').write_text('a\nb\n'); np.save('twice.npy', np.zeros(50, int)); Path('picture.png').write_bytes(b'x')
    Path('gap.txt').write_text('a\n\nb\n'); Path('latin.txt').write_bytes(b'\xe9\n'); Path('notes').mkdir(); Path('notes/mine').write_text('x')
    before = sorted((str(p), p.stat().st_size) for p in here.rglob('*'))
    code, out, err = run(words, capsys)
    assert code == 2 and out == '' and says in err and err.startswith('grnb') and err.count('\n') == 1 and err.endswith('\n'), err
    assert sorted((str(p), p.stat().st_size) for p in here.rglob('*')) == before                                     # nothing is written


def test_debug_shows_where_it_came_from(here, monkeypatch):
    monkeypatch.setenv('GRNB_DEBUG', '1')
    with pytest.raises(FileNotFoundError): main('search --model nowhere --queries queries.npy'.split())


def test_interrupting_and_a_reader_that_left(here, capsys, monkeypatch):
    def stop(error):
        def search(*_, **__): raise error
        monkeypatch.setattr(GenerativeRetriever, 'search', search)
        return run('search --model model --queries queries.npy', capsys)
    assert stop(KeyboardInterrupt()) == (130, '', 'grnb: interrupted\n')
    assert stop(ImportError('grnb needs faiss: pip install ...')) == (2, '', 'grnb: grnb needs faiss: pip install ...\n')
    assert stop(KeyError('ids: 3 is not there'))[2] == 'grnb: ids: 3 is not there\n'
    assert stop(ValueError('two\nlines'))[2] == 'grnb: two lines\n'
    with pytest.raises(ZeroDivisionError): stop(ZeroDivisionError())                                                 # a fault of ours is not hidden


def test_a_pipe_closed_early():
    "`grnb --help`, with a reader that is gone"
    r, w = os.pipe(); os.close(r)
    p = subprocess.run([sys.executable, '-c', 'from grnb.cli import main; import sys; sys.exit(main(["--help"]))'], cwd=ROOT, stdout=w, stderr=subprocess.PIPE, text=True)
    os.close(w)
    assert 'Traceback' not in p.stderr and p.returncode in (0, 1)


# --- checkpoints

def test_the_checkpoint_of_another_run_is_kept_until_told(here, capsys):
    fit = 'fit --items items.npy --set K=8 --set L=2 --device cpu --out m'
    Path('m.checkpoint').mkdir(); Path('m.checkpoint/fit.json').write_text('{"of": "another"}')
    code, _, err = run(fit, capsys)
    assert code == 2 and 'another run' in err.replace('a run with other data', 'another run') and '--restart' in err and Path('m.checkpoint/fit.json').exists()
    assert run(fit + ' --restart', capsys)[0] == 0 and not Path('m.checkpoint').exists()


@pytest.mark.parametrize('flags', ['', ' --restart'])
def test_a_checkpoint_of_temporaries_only_is_empty(here, capsys, flags):
    "What a kill before the very first rename leaves"
    Path('m.checkpoint').mkdir(); Path('m.checkpoint/.fit.json.k2x9').write_text('{')
    assert run('fit --items items.npy --set K=8 --set L=2 --out m' + flags, capsys)[0] == 0 and not Path('m.checkpoint').exists()


def test_files_of_others_in_a_checkpoint_stay(here, capsys, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(GenerativeRetriever, 'save', lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left on device', 'm')))
        assert run('fit --items items.npy --set K=8 --set L=2 --checkpoint c --out m', capsys)[0] == 2
    Path('c/notes').mkdir(); Path('c/notes/a.txt').write_text('mine'); Path('c/.hidden').write_text('mine')
    assert run('fit --items items.npy --set K=8 --set L=3 --checkpoint c --restart --out m', capsys)[0] == 0
    assert sorted(p.name for p in Path('c').rglob('*')) == ['.hidden', 'a.txt', 'notes']


def test_another_hidden_file_is_not_a_temporary(here, capsys):
    Path('c').mkdir(); Path('c/.fit.json.x').write_text(''); Path('c/.profile').write_text('mine')
    assert run('fit --items items.npy --set K=8 --checkpoint c --out m', capsys)[0] == 2 and len(list(Path('c').iterdir())) == 2


def test_a_failed_save_keeps_the_checkpoint(here, capsys, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(GenerativeRetriever, 'save', lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left on device', 'm')))
        code, _, err = run('fit --items items.npy --set K=8 --set L=2 --checkpoint c --out m', capsys)
    assert (code, err) == (2, 'grnb: m: No space left on device\n') and Path('c/quantizer.safetensors').exists()
    assert run('fit --items items.npy --set K=8 --set L=2 --checkpoint c --out m', capsys)[0] == 0 and not Path('c').exists()


# --- help, and what the other commands call

@pytest.mark.parametrize('name', cli._COMMANDS)
def test_help(name, capsys):
    code, out, err = run([name, '--help'], capsys)
    assert code == 0 and err == '' and out.startswith(f'usage: grnb {name}') and cli._COMMANDS[name][0].__doc__.split(';')[0] in ' '.join(out.split())
    assert all(line for line in out.split('\n') if line.startswith('  --'))
    assert all(options.get('help') for _, options in cli._COMMANDS[name][1])


def test_version_and_help_load_nothing_heavy(capsys):
    import grnb
    assert run('--version', capsys)[:2] == (0, f'grnb {grnb.__version__}\n')
    code = "from grnb.cli import main; main(['--help']); import sys; print([m for m in 'torch faiss numba transformers matplotlib sklearn scipy'.split() if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.endswith('[]\n')


def test_bench_report_and_reproduce_call_theirs(here, capsys, monkeypatch):
    import grnb.bench.disk, grnb.bench.latency, grnb.bench.tokenizer, grnb.report, grnb.reproduce
    calls = []
    for module, name in ((grnb.bench.latency, 'bench_latency'), (grnb.bench.tokenizer, 'bench_tokenizer'), (grnb.bench.disk, 'bench_disk'),
                         (grnb.reproduce, 'reproduce'), (grnb.report, 'redraw')):
        def record(*a, _of=inspect.signature(getattr(module, name)), _name=name, **k):
            _of.bind(*a, **k)
            calls.append((_name, k, a))
            return ['drawn: a table']
        monkeypatch.setattr(module, name, record)
    assert run('bench', capsys)[0] == 0 and calls[-1][1] == dict(seed=0, folder=Path('figures/results'), quick=False)
    assert run('bench latency --sizes 1000 2000 --data many --quick', capsys)[0] == 0 and calls[-1][1] == dict(sizes=[1000, 2000], data='many', seed=0, folder=None, quick=True)
    assert run('bench tokenizer disk --n 5000 --data many ood --seed 3', capsys)[0] == 0
    assert [c[0] for c in calls[-2:]] == ['bench_tokenizer', 'bench_disk'] and calls[-2][1] == dict(n=5000, kinds=('many', 'ood'), seed=3, folder=Path('figures/results'), quick=False)
    assert calls[-1][1] == dict(n=5000, seed=3, folder=Path('figures/results'), quick=False)
    assert run('report --figures f', capsys)[:2] == (0, 'drawn: a table\n') and calls[-1][2] == ('f',)
    assert run('reproduce --task events --full', capsys)[0] == 0
    assert [c[0] for c in calls[-2:]] == ['reproduce', 'redraw'] and calls[-2][1] == dict(task='events', full=True, folder=Path('figures/results'))


def test_report_says_what_is_missing(here, capsys):
    code, out, _ = run('report --figures figures', capsys)
    assert code == 0 and 'missing: ' in out and 'grnb reproduce' in out


# --- files

def test_damaged_arrays_are_value_errors(tmp_path):
    path, g = tmp_path/'a.npy', np.random.default_rng(0)
    np.save(path, np.ones((4, 3)))
    whole = path.read_bytes()
    for i in range(400):
        broken = bytearray(whole)
        for at in g.integers(0, 140, g.integers(1, 4)): broken[at] = g.integers(256)
        path.write_bytes(broken[:len(whole) - (i % 3 == 0) * int(g.integers(0, len(whole)))])
        try: read_array(path)
        except ValueError as e: assert 'a.npy' in str(e)


def test_large_arrays_are_mapped_and_empty_ones_read(tmp_path):
    np.save(tmp_path/'a.npy', np.ones((3000, 100))); np.save(tmp_path/'b.npy', np.ones((0, 5)))
    assert isinstance(read_array(tmp_path/'a.npy'), np.memmap) and read_array(tmp_path/'b.npy').shape == (0, 5)
