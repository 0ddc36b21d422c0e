"""GRDR's files: sets of the released structure, small, go through every reader; damaged and hostile ones are refused with file, key and reason."""
import io
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grnb.cli import main
from grnb.data.candidates import Candidates, Found, candidate_rows, id_codes, id_string, read_candidates, read_id_vectors, write_candidates
from grnb.data.frames import MOST, FrameStore, pack_frames, read_frames
from grnb.data.grdr import GRDR_DATASETS, Captions, find_grdr, joined, read_captions, read_codes, read_companions, read_grdr, read_groups, read_vectors, split_key, video_id
from grnb.data.reported import REPORTED, REPORTED_BY, reported
from grnb.decode.candidates import as_candidates, expand_as, id_ranks, own_leaves, released_metrics, stage1_differences, stage1_metrics, truth_ranks
from grnb.features.tasks import grdr_task, in_setting, load_task
from grnb.ids.make import SemanticIDs
from grnb.metrics import bootstrap, recall
from grnb.tokenizer.released import GRDR_SIZES
from grnb.trie.layout import Trie
from grnb.trie.live import LiveTrie

fast = settings(max_examples=60, deadline=None)
TMP = Path(tempfile.gettempdir())


class Runs:
    "A pickled object that would run a command"
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.system, (f'touch {self.mark}',)


# --- a release, made in the structure of the public code

NAMES = dict(msrvtt='video{}.mp4', actnet='v_{}-xY_z.mp4', didemo='123@N0{}_98_ab.mp4', lsmdc='3086_UGLY_TRUTH/3086_UGLY_TRUTH_00.0{}.23.000-00.23.28.886.avi')
LISTS = ('actnet', 'didemo')


def annotations(name, ids, per=2):
    "Entries as in {ds}_ret_{split}.json: one a caption, or one a video with a list"
    texts = lambda i: [f' caption {k} of {i} é' if k else f'caption {k} of {i}' for k in range(per + i % 2)]
    if name in LISTS: return [dict(video=NAMES[name].format(i), caption=texts(i)) for i in ids]
    return [dict(video=NAMES[name].format(i), caption=t) for k in range(per + 1) for i in ids for t in texts(i)[k:k + 1]]     # captions of a video need not be neighbours


def theirs(entries, split, after=()):
    "Sample keys and texts, after the loop of the released VideoTextDataset, written out plainly"
    counts, out = Counter(), []
    for key in after: counts[key.rsplit('_', 1)[0]] += 1
    for e in entries:
        v = e['video'].replace('.mp4', '').replace('.avi', '').split('/')[-1]
        if isinstance(e['caption'], list) and split != 'train': out.append((f'{v}_0', ' '.join(c.strip() for c in e['caption']))); continue
        for c in e['caption'] if isinstance(e['caption'], list) else [e['caption']]:
            out.append((f'{v}_{counts[v]}', c.strip() if isinstance(e['caption'], list) else c))
            counts[v] += 1
    return out


def dump(path, obj, protocol=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(obj, protocol))
    return path


def vectors(keys, seed=0, width=512): return {k: np.random.default_rng([seed, i]).standard_normal(width).astype('f4') for i, k in enumerate(keys)}


def release(root, name='didemo', train=12, test=5, pseudo=True):
    "Captions, features, groups and codes of one data set"
    notes, features = root/f'data/{name}/video_retreival_caption', root/f'InternVideo2/{name}'
    notes.mkdir(parents=True)
    ids = dict(train=range(train), test=range(train, train + test))
    for split, some in ids.items():
        entries = annotations(name, some, 2 if split == 'train' or name in LISTS else 1)
        if split == 'test' and name not in LISTS: entries = [e for e in {e['video']: e for e in entries}.values()]
        (notes/f'{name}_ret_{split}.json').write_text(json.dumps(entries, indent=4))
        samples = theirs(entries, split)
        dump(features/f'video_embeddings_{split}.pkl', vectors(dict.fromkeys(k.rsplit('_', 1)[0] for k, _ in samples), split == 'test'))
        dump(features/f'text_embeddings_{split}.pkl', vectors([k for k, _ in samples], 2 + (split == 'test')))
        if split == 'train':
            more = annotations(name, some, 1) if pseudo else []
            if pseudo: (notes/f'{name}_ret_train_pesudo.json').write_text(json.dumps(more, indent=4)); dump(features/'text_embeddings_train_pesudo.pkl', vectors([k for k, _ in theirs(more, 'train')], 4))
            both = samples + theirs(more, 'train', [k for k, _ in samples])
            V, K, L = GRDR_SIZES[name]
            dump(root/f'cache/{name}/train_kmeans_k{V}{"_pseudo" * pseudo}.pkl', {k: i % V for i, (k, _) in enumerate(both)})
            best = root/f'output/GRDR/{name}/best_model/best_model.pt'
            best.parent.mkdir(parents=True)
            Path(f'{best}.code').write_text(json.dumps({k: [i % K, (i * 7) % K, 1] for i, (k, _) in enumerate(both)}))
            dump(Path(f'{best}.kmeans.{K}'), np.random.default_rng(0).standard_normal((K, 512)).astype('f4')); dump(Path(f'{best}.collection'), np.ones((len(both), 512), 'f4'))
            Path(f'{best}.kmeans_code.{K}').write_text(json.dumps([i % K for i in range(len(both))]))
    return root


@pytest.mark.parametrize('name', GRDR_DATASETS)
def test_a_whole_release_is_read(tmp_path, name):
    release(tmp_path, name)
    notes = tmp_path/f'data/{name}/video_retreival_caption'
    entries = [json.loads((notes/f'{name}_ret_{s}.json').read_text()) for s in ('train', 'train_pesudo', 'test')]
    a = theirs(entries[0], 'train')
    want = a + theirs(entries[1], 'train', [k for k, _ in a]) + theirs(entries[2], 'test')
    data = read_grdr(name, tmp_path, pseudo=True)
    assert list(zip(data.keys, data.texts)) == want
    assert [data.videos[r] for r in data.rows] == [k.rsplit('_', 1)[0] for k, _ in want]
    assert list(data.split) == ['train'] * 12 + ['test'] * 5 and data.x.dtype == data.text_x.dtype == np.float32
    raw = {**pickle.loads((tmp_path/f'InternVideo2/{name}/video_embeddings_train.pkl').read_bytes()), **pickle.loads((tmp_path/f'InternVideo2/{name}/video_embeddings_test.pkl').read_bytes())}
    assert np.array_equal(data.x, np.stack([raw[v] for v in data.videos]))
    texts = [pickle.loads((tmp_path/f'InternVideo2/{name}/text_embeddings_{s}.pkl').read_bytes()) for s in ('train', 'train_pesudo', 'test')]
    n = len(a)
    assert np.array_equal(data.text_x[:n], np.stack([texts[0][k] for k, _ in a])) and np.array_equal(data.text_x[-5:], np.stack([texts[2][k] for k, _ in want[-5:]]))
    own = Counter(k.rsplit('_', 1)[0] for k, _ in a)
    back = [(v, int(i) - own[v]) for v, i in (k.rsplit('_', 1) for k, _ in want[n:-5])]
    assert np.array_equal(data.text_x[n:-5], np.stack([texts[1][f'{v}_{i}'] for v, i in back]))
    V, K, L = GRDR_SIZES[name]
    train = want[:-5]
    assert read_groups(tmp_path/f'cache/{name}/train_kmeans_k{V}_pseudo.pkl', V).of([k for k, _ in train]).tolist() == [i % V for i in range(len(train))]
    c = read_companions(tmp_path/f'output/GRDR/{name}/best_model/best_model.pt', (K,) * L)
    assert c.codes.keys == [k for k, _ in train] and c.codes.values[3].tolist() == [3, 21 % K, 1] and c.centroids.shape == (K, 512) and len(c.clusters) == len(c.collection) == len(train)


@pytest.mark.parametrize('name', GRDR_DATASETS)
def test_tasks_of_the_release(tmp_path, name):
    release(tmp_path, name, train=20, test=6)
    task = load_task(name, path=tmp_path, dev=.25)
    assert Counter(task.item_split) == dict(train=15, dev=5, test=6) and (task.item_split[20:] == 'test').all() and (task.qrels.counts() == 1).all()
    one, full = in_setting(task, 'inductive'), in_setting(task, 'full')
    assert len(one.items) == 6 and len(full.items) == 26 and np.array_equal(one.queries, full.queries) and np.array_equal(one.items[one.positives], full.items[full.positives])
    assert set(full.query_split) == {'test'} and full.texts == one.texts
    assert load_task(name, path=tmp_path, setting='full', dev=.25).texts == full.texts
    other = load_task(name, seed=1, path=tmp_path, dev=.25)
    assert (other.item_split != task.item_split).any() and np.array_equal(other.items, task.items)
    assert np.array_equal(load_task(name, path=tmp_path, dev=.25).item_split, task.item_split)
    assert len(load_task(name, path=tmp_path, pseudo=True).queries) > len(task.queries)
    words = load_task(name, path=tmp_path, text='tfidf')
    assert words.texts == task.texts and np.isfinite(words.queries).all()


def test_roots_and_layouts(tmp_path, monkeypatch):
    release(tmp_path/'grdr')
    want = find_grdr('didemo', tmp_path/'grdr')
    assert find_grdr('didemo', tmp_path) == want
    monkeypatch.setenv('GRNB_DATA', str(tmp_path))
    assert find_grdr('didemo') == want
    (tmp_path/'grdr/dataset/features').mkdir(parents=True)
    (tmp_path/'grdr/InternVideo2').rename(tmp_path/'grdr/dataset/features/InternVideo2')
    assert find_grdr('didemo')[0] == tmp_path/'grdr/dataset/features/InternVideo2/didemo'
    with pytest.raises(FileNotFoundError, match='video_embeddings_test.pkl.*grnb data grdr --datasets lsmdc'): find_grdr('lsmdc')
    (want[1]/'didemo_ret_test.json').unlink()
    with pytest.raises(FileNotFoundError, match=r'didemo_ret_test.json.*github.com/JasonCodeMaker/GRDR'): find_grdr('didemo')
    monkeypatch.delenv('GRNB_DATA')
    with pytest.raises(FileNotFoundError, match='set GRNB_DATA'): find_grdr('didemo')


@pytest.mark.parametrize('options, says', [(dict(text='clip'), 'text: expected internvideo2 or tfidf'), (dict(dev=1), 'dev: expected a share'), (dict(setting='both'), 'setting: expected one of inductive, full'), (dict(size=5), 'size: didemo takes')])
def test_wrong_options_of_a_task(tmp_path, options, says):
    release(tmp_path)
    with pytest.raises(ValueError, match=says): load_task('didemo', path=tmp_path, **options)


def test_the_command_line_takes_a_release(tmp_path, capsys):
    release(tmp_path/'files', 'msrvtt', train=30, test=10)
    assert main(['data', '--task', 'msrvtt', '--path', str(tmp_path/'files'), '--option', 'setting=inductive', '--out', str(tmp_path/'w')]) == 0
    assert 'Task msrvtt: 10 items (512)' in capsys.readouterr().out and np.load(tmp_path/'w/items.npy').shape == (10, 512)
    assert main(['data', '--task', 'actnet', '--path', str(tmp_path/'files')]) == 2
    assert capsys.readouterr().err.count('\n') == 1


def test_a_task_without_test_items_has_no_setting():
    with pytest.raises(ValueError, match='no test items'): in_setting(load_task('events', 50, source='latent', views=1).part('train'), 'full')


def test_videos_and_captions_must_have_one_another(tmp_path):
    release(tmp_path, 'msrvtt')
    path = tmp_path/'InternVideo2/msrvtt/video_embeddings_train.pkl'
    d = pickle.loads(path.read_bytes())
    dump(path, {k: v for k, v in d.items() if k != 'video3'})
    with pytest.raises(ValueError, match=r"video_embeddings_train.pkl: no vector of 'video3' and 0 more"): read_grdr('msrvtt', tmp_path)
    data = read_grdr('msrvtt', tmp_path, strict=False)
    assert 'video3' not in data.videos and not any(k.startswith('video3_') for k in data.keys) and len(data.videos) == 16
    dump(path, d | vectors(['video99']))
    with pytest.raises(ValueError, match=r"'video99' and 0 more videos that have no caption"): read_grdr('msrvtt', tmp_path)
    assert 'video99' not in read_grdr('msrvtt', tmp_path, strict=False).videos
    dump(path, d)
    dump(tmp_path/'InternVideo2/msrvtt/text_embeddings_train.pkl', vectors(['video0_0']))
    with pytest.raises(ValueError, match=r"text_embeddings_train.pkl: no 'video1_0' and \d+ more"): read_grdr('msrvtt', tmp_path)
    assert read_grdr('msrvtt', tmp_path, texts=False).text_x is None


def test_a_test_video_in_training_is_refused(tmp_path):
    release(tmp_path, 'msrvtt')
    notes, path = tmp_path/'data/msrvtt/video_retreival_caption/msrvtt_ret_train.json', tmp_path/'InternVideo2/msrvtt/video_embeddings_train.pkl'
    notes.write_text(json.dumps(json.loads(notes.read_text()) + [dict(video='video14.mp4', caption='x')]))
    dump(path, pickle.loads(path.read_bytes()) | vectors(['video14']))
    with pytest.raises(ValueError, match="video 'video14' is a training video too"): read_grdr('msrvtt', tmp_path, texts=False)


def test_paragraphs_of_a_test(tmp_path):
    "One vector for the paragraph, or one a sentence."
    release(tmp_path, 'actnet', test=3)
    path = tmp_path/'InternVideo2/actnet/text_embeddings_test.pkl'
    first = read_grdr('actnet', tmp_path)
    assert np.array_equal(first.text_x[-3:], np.stack(list(pickle.loads(path.read_bytes()).values())))
    d = vectors([f'{v}_{k}' for v in first.videos[-3:] for k in range(3)], 9)
    dump(path, d)
    again = read_grdr('actnet', tmp_path)
    for q, v in zip((-3, -2, -1), first.videos[-3:]):
        n = 3 if int(v.split('-')[0][2:]) % 2 else 2
        assert np.allclose(again.text_x[q], np.mean([d[f'{v}_{k}'] for k in range(n)], 0), atol=1e-6)
    v = next(v for v in first.videos[-3:] if int(v.split('-')[0][2:]) % 2)
    dump(path, {k: x for k, x in d.items() if k != f'{v}_1'})
    with pytest.raises(ValueError, match=f"no '{v}_1'"): read_grdr('actnet', tmp_path)                # some of its sentences and not all


# --- captions

@fast
@given(st.lists(st.tuples(st.integers(0, 4), st.one_of(st.text(max_size=5), st.lists(st.text(max_size=5), min_size=1, max_size=3))), min_size=1, max_size=12), st.booleans())
def test_samples_are_those_of_the_released_loop(entries, after):
    entries = [dict(video=f'd/clip_{i}.00.mp4', caption=c) for i, c in entries]
    path = TMP/f'captions-{os.getpid()}.json'
    path.write_text(json.dumps(entries), encoding='utf-8')
    try:
        first = read_captions(path)
        assert list(zip(first.keys, first.texts)) == theirs(entries, 'train')
        again = read_captions(path, after=first)
        assert list(zip(again.keys, again.texts)) == theirs(entries, 'train', first.keys)
        assert len(set((first + again).keys)) == 2 * len(first.keys)
    finally: path.unlink()


BAD_CAPTIONS = [
    ('{}', 'expected a list of entries, got dict'), ('[]', 'got none'), ('[1]', 'entry 0: expected video and caption, got int'), ('[{"video": "a.mp4"}]', r"entry 0: expected video and caption, got 'video'"), ('[{"video": 3, "caption": "x"}]', 'entry 0, video: expected a name, got a int'),
    ('[{"video": "a.mp4", "caption": "x"}, {"video": ".mp4", "caption": "x"}]', r"entry 1, video: expected a video's name, got '.mp4'"), ('[{"video": "d/", "caption": "x"}]', "entry 0, video"), ('[{"video": "a", "caption": []}]', 'entry 0, caption: .* got an empty list'),
    ('[{"video": "a", "caption": ["x", null]}]', 'entry 0, caption: .* got NoneType in a list'), ('[{"video": "a", "caption": 1.5}]', 'caption: .* got float'), ('[{"video": "x/a.mp4", "caption": "x"}, {"video": "a.mp4", "caption": "x"}]', "'a.mp4' and 'x/a.mp4' would both be video 'a'"),
    ('[{"video": "a", "video": "b", "caption": "x"}]', "key 'video' comes twice"), ('[{"video": "a", "caption": NaN}]', 'NaN is no number'), ('[{"video": "a", "caption": "x"}', 'not json'), ('[' * 100_000, 'nested too deep|not json'), ('\xff', 'not json'), ('[{"video": "a", "caption": "\\ud800"}]', 'not json'), ('[1' + '0' * 5000 + ']', 'not json'),
]

@pytest.mark.parametrize('text, says', BAD_CAPTIONS, ids=[t[:30] for t, _ in BAD_CAPTIONS])
def test_bad_captions_are_named(tmp_path, text, says):
    path = tmp_path/'x_ret_train.json'
    path.write_bytes(text.encode('latin-1'))
    with pytest.raises(ValueError, match=says) as e: read_captions(path)
    assert str(e.value).startswith(str(path)) and len(str(e.value)) < 400


def test_the_leaking_file_is_refused(tmp_path):
    path = tmp_path/'msrvtt_ret_train_addition.json'
    path.write_text(json.dumps([dict(video='video9770.mp4', caption='x')]))
    with pytest.raises(ValueError, match='captions of test videos.*would leak.*addition=True'): read_captions(path)
    assert read_captions(path, addition=True) == Captions(['video9770_0'], ['video9770'], ['x'], [1])
    with pytest.raises(ValueError, match='split: expected train or test'): read_captions(path, 'val')
    path = tmp_path/'x_ret_test.json'
    path.write_text(json.dumps([dict(video='a.mp4', caption=['x']), dict(video='a.mp4', caption=['y'])]))
    with pytest.raises(ValueError, match="entry 1, video: 'a' comes twice"): read_captions(path, 'test')


@pytest.mark.parametrize('name, want', [('video9770.mp4', 'video9770'), ('d/1012_Unbreakable_00.56.36.981-00.56.38.167.avi', '1012_Unbreakable_00.56.36.981-00.56.38.167'), ('v_a.mp4.mp4', 'v_a.mp4'), ('x', 'x'), ('12@N01_3.mov', '12@N01_3.mov')])
def test_video_ids(name, want): assert video_id(name) == want


@fast
@given(st.text(min_size=1, max_size=8).filter(lambda s: s.strip()), st.integers(0, 999))
def test_keys_split(video, k): assert split_key(f'{video}_{k}') == (video, k)


@pytest.mark.parametrize('key', ['a', '_1', 'a_', 'a_01', 'a_-1', 'a_1.0', 'a_٣', 3, None])
def test_what_is_no_key(key):
    with pytest.raises(ValueError, match='expected a key VIDEO_NUMBER'): split_key(key)


# --- pickles

GOOD = dict(a_0=np.arange(4, dtype='f4'), a_1=np.ones(4, 'f4'), b_0=np.zeros(4, 'f4'))
BAD_VECTORS = [({}, 'an empty one'), ([1], 'expected a dict of keys, got list'), ({1: GOOD['a_0']}, 'keys that are texts, got 1'), ({' ': GOOD['a_0']}, 'keys that are texts'), (dict(a=np.zeros(5, 'f4')), r"key 'a': expected 4 floats, got float32 \(5,\)"),
               (dict(a=np.zeros((1, 4), 'f4')), r"got float32 \(1, 4\)"), (dict(a=np.zeros(4, 'i4')), 'got int32'), (dict(a=[0.] * 4), "got list"), (dict(a=np.array([0, 1, np.nan, 2], 'f4')), "key 'a': NaN or infinity"), (dict(a=np.full(4, 1e300)), "key 'a': NaN"), (dict(a=None), 'got NoneType'), (dict(a=np.float32(1)), 'got float32')]

@pytest.mark.parametrize('d, says', BAD_VECTORS, ids=range(len(BAD_VECTORS)))
def test_bad_vectors_are_named(tmp_path, d, says):
    with pytest.raises(ValueError, match=says) as e: read_vectors(dump(tmp_path/'v.pkl', d), 4)
    assert 'v.pkl' in str(e.value)


def test_vectors_of_every_float_and_protocol(tmp_path):
    for protocol, dtype in itertools.product((2, 3, 4, 5), ('f2', 'f4', 'f8', '>f4')):
        v = read_vectors(dump(tmp_path/'v.pkl', {k: x.astype(dtype) for k, x in GOOD.items()}, protocol), 4)
        assert v.keys == list(GOOD) and v.values.dtype == np.float32 and np.array_equal(v.values, np.stack(list(GOOD.values())))
    assert read_vectors(tmp_path/'v.pkl', None).values.shape == (3, 4)
    assert v.has(['b_0', 'c']).tolist() == [True, False]
    with pytest.raises(ValueError, match="v.pkl: no 'c' and 1 more"): v.of(['a_0', 'c', 'd'])
    with pytest.raises(ValueError, match='expected 512 floats'): read_vectors(tmp_path/'v.pkl')


def readers(path):
    "Every reader of pickles, by name"
    yield 'vectors', lambda: read_vectors(path, 4)
    yield 'groups', lambda: read_groups(path, 4)
    yield 'ids', lambda: read_id_vectors(path, (8, 8), 4)
    os.link(path, f'{path}.kmeans.8'); os.link(path, f'{path}.collection')
    yield 'companions', lambda: read_companions(path, (8, 8), 4)


@pytest.mark.parametrize('wrap', [lambda x: x, lambda x: {'a_0': x}, lambda x: {'a_0': np.ones(4, 'f4'), 'a_1': x}, lambda x: [x], lambda x: {'a_0': [{'b': x}]}])
def test_no_pickle_runs(tmp_path, wrap):
    mark = tmp_path/'ran'
    path = dump(tmp_path/'evil.pkl', wrap(Runs(mark)))
    for name, read in readers(path):
        with pytest.raises(ValueError, match='asks for .*system'): read()
        assert not mark.exists(), name
    pickle.loads(path.read_bytes())
    assert mark.exists()                                                      # the payload is a real one


@fast
@given(st.data())
def test_damaged_pickles_raise_or_read(data):
    raw = bytearray(pickle.dumps({k: v for k, v in GOOD.items()}, data.draw(st.sampled_from([2, 4, 5]))))
    for _ in range(data.draw(st.integers(1, 3))): raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = TMP/f'damaged-{os.getpid()}.pkl'
    path.write_bytes(bytes(raw[:data.draw(st.integers(1, len(raw)))]))
    try:
        for read in (lambda: read_vectors(path, 4), lambda: read_groups(path, 4)):
            try: assert np.isfinite(read().values).all()
            except ValueError as e: assert str(path) in str(e)
    finally: path.unlink()


def test_pseudo_vectors_are_shifted(tmp_path):
    a, b = (read_vectors(dump(tmp_path/n, vectors(k, i, 4)), 4) for i, (n, k) in enumerate((('t.pkl', ['v_1_0', 'v_1_2', 'w_0']), ('p.pkl', ['v_1_0', 'v_1_1', 'x_0']))))
    both = joined(a, b)
    assert both.keys == ['v_1_0', 'v_1_2', 'w_0', 'v_1_3', 'v_1_4', 'x_0'] and np.array_equal(both.of(['v_1_4']), b.of(['v_1_1']))
    with pytest.raises(ValueError, match="p.pkl: expected a key VIDEO_NUMBER, got 'v'"): joined(a, read_vectors(dump(tmp_path/'p.pkl', vectors(['v'], 0, 4)), 4))
    with pytest.raises(ValueError, match=r'expected vectors of shape \(4,\)'): joined(a, read_vectors(dump(tmp_path/'q.pkl', vectors(['v_0'], 0, 5)), 5))


@pytest.mark.parametrize('d, says', [({'a_0': 4}, "key 'a_0': expected a view from 0 to 3, got 4"), ({'a_0': -1}, 'got -1'), ({'a_0': True}, 'got bool'), ({'a_0': 1.}, 'got float'), ({'a': 1}, "expected a key VIDEO_NUMBER, got 'a'"), ({}, 'an empty one')])
def test_bad_groups_are_named(tmp_path, d, says):
    with pytest.raises(ValueError, match=says): read_groups(dump(tmp_path/'train_kmeans_k4.pkl', d), 4)


def test_groups_under_both_names(tmp_path):
    for n in ('train_kmeans_k4.pkl', 'train_kmeans_k4_pseudo.pkl', 'lsmdc_internvideo2_text_group_mapping_train_k4.pkl'):
        g = read_groups(dump(tmp_path/n, {'a_0': 3, 'a_1': 0}), 4)
        assert g.of(['a_1', 'a_0']).tolist() == [0, 3]
        with pytest.raises(ValueError, match=f'{n}: groups for 4 views, expected 1'): read_groups(tmp_path/n, 1)


@pytest.mark.parametrize('text, says', [('{"a_0": [1, 2]}', r"key 'a_0': expected 3 codes, each below 8 8 300, got \[1, 2\]"), ('{"a_0": [1, 8, 2]}', 'each below'), ('{"a_0": [1, -1, 2]}', 'each below'), ('{"a_0": [1, 1.0, 2]}', 'each below'), ('{"a_0": [1, true, 2]}', 'each below'), ('{"a_0": 1}', 'got 1'), ('[]', 'got list'), ('{}', 'an empty one'), ('{"a_0": [1, 2, 3], "a_0": [1, 2, 4]}', 'comes twice')])
def test_bad_codes_are_named(tmp_path, text, says):
    path = tmp_path/'best_model.pt.code'
    path.write_text(text)
    with pytest.raises(ValueError, match=says): read_codes(path, (8, 8, 300))


def test_codes_keep_their_width(tmp_path):
    path = tmp_path/'c'
    path.write_text('{"a_0": [1, 2, 299]}')
    assert read_codes(path, (8, 8, 300)).values.dtype == np.uint16 and read_codes(path, (8, 8, 300)).values.tolist() == [[1, 2, 299]]


def test_companions_must_agree(tmp_path):
    best, put = tmp_path/'best_model.pt', lambda end, obj: dump(tmp_path/f'best_model.pt.{end}', obj)
    with pytest.raises(FileNotFoundError, match='none of .code, .kmeans.8, .kmeans_code.8 and .collection'): read_companions(best, (8,), 4)
    put('collection', np.zeros((3, 4), 'f4'))
    assert read_companions(best, (8,), 4).codes is None
    (tmp_path/'best_model.pt.kmeans_code.8').write_text('[0, 7]')
    with pytest.raises(ValueError, match='expected as many samples in each file, got 2 in .*kmeans_code.8, 3 in .*collection'): read_companions(best, (8,), 4)
    for bad, says in (('[0, 8]', 'place 1: expected a cluster below 8, got 8'), ('{}', 'got dict'), ('[true]', 'place 0')):
        (tmp_path/'best_model.pt.kmeans_code.8').write_text(bad)
        with pytest.raises(ValueError, match=says): read_companions(best, (8,), 4)
    (tmp_path/'best_model.pt.kmeans_code.8').write_text('[0, 7, 1]')
    for bad, says in ((np.zeros((7, 4), 'f4'), r'kmeans.8: expected float32 \(8, 4\), got float32 \(7, 4\)'), (np.zeros((8, 4)), 'got float64'), ([1], 'got list'), (np.full((8, 4), np.nan, 'f4'), 'kmeans.8, row 0: NaN')):
        put('kmeans.8', bad)
        with pytest.raises(ValueError, match=says): read_companions(best, (8,), 4)


# --- candidate files

texts, names = st.text(max_size=6), st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=5)
numbers = st.floats(-1e9, 0).map(lambda x: float(np.float32(x)))
id_names = st.lists(st.integers(0, 255), min_size=3, max_size=3).map(id_string)


@st.composite
def files(draw):
    "A candidate file as the released code builds it"
    detailed, results = draw(st.booleans()), []
    for _ in range(draw(st.integers(0, 4))):
        videos = draw(st.lists(names, max_size=5, unique=True))
        r = dict(query_text=draw(texts.filter(lambda t: t.encode('utf-8', 'ignore').decode() == t)), ground_truth_video_id=draw(names))
        if detailed: r['ground_truth_sID'] = draw(st.lists(id_names, min_size=1, max_size=4))
        r |= dict(candidates=[[draw(id_names), v] for v in videos] if detailed else videos, scores=[draw(numbers) for _ in videos], num_candidates=len(videos))
        results.append(r)
    metrics = draw(st.dictionaries(st.sampled_from(['Recall@1', 'Recall@5', 'CanHit@20', 'seconds_per_query', 'total_queries', 'batch_size']), st.one_of(st.integers(0, 9999), st.floats(0, 1))))
    return {'metadata': dict(dataset='msrvtt', model_name=draw(st.sampled_from(['unknown', 'out/best_model.pt', None])), num_candidates=100, index_type='videorqvae', code_book_size=128, code_book_num=4, timestamp='01102322'), 'metrics': metrics, 'results': results}


@fast
@given(files())
def test_reading_and_writing_gives_the_same_bytes(d):
    a, b = (TMP/f'cand-{os.getpid()}-{n}.json' for n in 'ab')
    with open(a, 'w', encoding='utf-8') as f: json.dump(d, f, indent=2, ensure_ascii=False)
    try:
        c = read_candidates(a)
        write_candidates(b, c)
        assert b.read_bytes() == a.read_bytes() and read_candidates(b) == c
        assert [f.videos for f in c.found] == [[v[1] if isinstance(v, list) else v for v in r['candidates']] for r in d['results']]
    finally: a.unlink(); b.unlink(missing_ok=True)


HEAD = '''{
  "metadata": {
    "dataset": "didemo",
    "model_name": "unknown",
    "num_candidates": 100,
    "index_type": "videorqvae",
    "code_book_size": 96,
    "code_book_num": 4,
    "timestamp": "01281234"
  },
  "metrics": {
    "Recall@1": 0.14057826520438685,
    "seconds_per_query": 0.08739478210152563,
    "total_queries": 1003,
    "batch_size": 1,
    "avg_candidates_per_query": 79.67
  },
  "results": [
    {
      "query_text": "a man hits a piñata \\"twice\\"",
      "ground_truth_video_id": "26292851@N04_4253489686_265c3c8051",
      "candidates": [
        "70414856@N00_7785859118_305743d523",
        "3086_UGLY_TRUTH_00.23.23.000-00.23.28.886"
      ],
      "scores": [
        -1.2611106634140015,
        -1.4241892099380493
      ],
      "num_candidates": 2
    },
    {
      "query_text": "",
      "ground_truth_video_id": "v_-02DygXbn6w",
      "candidates": [],
      "scores": [],
      "num_candidates": 0
    }
  ]
}'''

def test_the_published_layout_letter_by_letter(tmp_path):
    (tmp_path/'a.json').write_bytes(HEAD.encode())
    write_candidates(tmp_path/'b.json', read_candidates(tmp_path/'a.json'))
    assert (tmp_path/'b.json').read_bytes() == HEAD.encode()


def base(detailed=False):
    "Two queries as a dict"
    return json.loads(HEAD) if not detailed else json.loads(HEAD) | dict(results=[dict(query_text='x', ground_truth_sID=['[0, 1, 2]', '[0, 3, 4]'], ground_truth_video_id='a', candidates=[['[0, 1, 2]', 'a'], ['[0, 5, 6]', 'b']], scores=[-.1, -.2], num_candidates=2)])


def _set(*path, to=None):
    def change(d):
        for p in path[:-1]: d = d[p]
        if to is DROP: del d[path[-1]]
        else: d[path[-1]] = to
    return change

DROP = object()
BAD_FILES = [
    (False, _set('metrics', to=DROP), 'expected metadata, metrics and results'), (False, _set('more', to=1), 'expected metadata, metrics and results'), (False, _set('results', to={}), 'results: expected a list'), (False, _set('results', 1, to=5), 'query 1: expected a query, got a int'),
    (False, _set('metrics', 'Recall@1', to=[1]), "metrics, 'Recall@1': expected a text or a number"), (False, _set('metadata', to=[]), 'metadata: expected keys and values'), (False, _set('results', 0, 'scores', to=DROP), 'query 0: no scores'), (False, _set('results', 0, 'extra', to=1), "query 0: 'extra' is no field"),
    (False, _set('results', 0, 'query_text', to=None), 'query 0, query_text: expected a text'), (False, _set('results', 0, 'ground_truth_video_id', to=7), 'ground_truth_video_id: expected a text'), (False, _set('results', 0, 'candidates', 1, to=7), 'candidates: expected a list of video ids'), (False, _set('results', 0, 'candidates', 1, to=''), 'candidates'),
    (False, _set('results', 0, 'candidates', 1, to='70414856@N00_7785859118_305743d523'), "candidates: '70414856@N00_7785859118_305743d523' comes twice"), (False, _set('results', 0, 'scores', 1, to='x'), 'scores: expected finite numbers, got x'), (False, _set('results', 0, 'scores', 1, to=True), 'finite numbers'), (False, _set('results', 0, 'scores', to=[-1.]), 'scores: expected 2, one a candidate, got 1'),
    (False, _set('results', 0, 'num_candidates', to=3), 'num_candidates: expected 2'), (False, _set('results', 0, 'num_candidates', to=2.), 'num_candidates: expected 2'), (False, _set('results', 0, 'ground_truth_sID', to=['[0, 1]']), 'expected pairs of ID and video'),
    (True, _set('results', 0, 'ground_truth_sID', to=[]), 'ground_truth_sID: expected a list of IDs'), (True, _set('results', 0, 'ground_truth_sID', 0, to='[1, 2]'), r"ground_truth_sID: expected an ID like '\[0, 5, 17, 99\]', got '\[1, 2\]'"), (True, _set('results', 0, 'candidates', 1, 0, to='[0, 1, 2, 3]'), 'IDs of 2 and 3 codes'), (True, _set('results', 0, 'candidates', 1, to=['[0, 1, 2]']), 'pairs of ID and video'),
    (True, _set('results', 0, 'ground_truth_sID', to=DROP), 'candidates: expected a list of video ids'), (True, _set('results', 0, 'candidates', 0, 0, to='[0, 01, 2]'), 'expected an ID like'), (True, lambda d: d['results'].append(base()['results'][0]), 'some queries are in the detailed form'),
]

@pytest.mark.parametrize('detailed, change, says', BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_candidate_files_are_named(tmp_path, detailed, change, says):
    d = base(detailed)
    path = tmp_path/'c.json'
    path.write_text(json.dumps(d)); read_candidates(path)                     # it was good before
    change(d)
    path.write_text(json.dumps(d))
    with pytest.raises(ValueError, match=says) as e: read_candidates(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize('score', [float('inf'), float('nan')])
def test_infinite_scores_are_refused_both_ways(tmp_path, score):
    c = Candidates({}, {}, [Found('x', 'a', ['a'], [score])])
    with pytest.raises(ValueError, match='query 0, scores: expected finite'): write_candidates(tmp_path/'c.json', c)
    assert list(tmp_path.iterdir()) == []
    (tmp_path/'c.json').write_text(HEAD.replace('-1.2611106634140015', '-1e999'))
    with pytest.raises(ValueError, match='scores: expected finite numbers, got -inf'): read_candidates(tmp_path/'c.json')


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path/'c.json'
    path.write_text(HEAD)
    good = read_candidates(path)
    with pytest.raises(UnicodeEncodeError): write_candidates(path, good._replace(found=[good.found[0]._replace(text='\ud800')]))
    assert path.read_text() == HEAD and [p.name for p in tmp_path.iterdir()] == ['c.json']


@fast
@given(st.data())
def test_damaged_candidate_files_raise_or_read(data):
    raw = bytearray(HEAD.encode())
    for _ in range(data.draw(st.integers(1, 4))): raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = TMP/f'damaged-{os.getpid()}.json'
    path.write_bytes(bytes(raw))
    try: assert len(read_candidates(path).found) <= 2
    except ValueError as e: assert str(path) in str(e)
    finally: path.unlink()


def test_ids_as_text():
    assert id_string(np.uint8([5, 0, 255])) == '[0, 5, 0, 255]' and id_codes('[0, 5, 0, 255]') == (5, 0, 255)
    for bad in ('[0]', '[0,1]', '[0, -1]', '[0, 1] ', '[1, 2]', '[0, 12345678]', 5, None, '[0, 1\n]'):
        with pytest.raises(ValueError, match='expected an ID like'): id_codes(bad)


def test_vectors_of_ids(tmp_path):
    v, codes = read_id_vectors(dump(tmp_path/'s.pkl', {'[0, 1, 2]': np.ones(4, 'f4'), '[0, 7, 3]': np.zeros(4, 'f4')}), (8, 4), 4)
    assert codes.tolist() == [[1, 2], [7, 3]] and v.of(['[0, 7, 3]']).tolist() == [[0, 0, 0, 0]]
    for bad in ('[0, 8, 2]', '[0, 1]', 'x'):
        with pytest.raises(ValueError, match='s.pkl'): read_id_vectors(dump(tmp_path/'s.pkl', {bad: np.ones(4, 'f4')}), (8, 4), 4)


# --- frames

def save(folder, video, F=4, D=8, seed=0, compressed=True, **more):
    folder.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng([seed, int.from_bytes(video.encode()[-4:], 'big')]).standard_normal((F, D)).astype('f4')
    (np.savez_compressed if compressed else np.savez)(folder/f'{video}.npz', **{k: v for k, v in (dict(frame_embeds=x, frame_indices=list(range(F)), video_id=video) | more).items() if v is not None})
    return x


def test_frames_are_packed_as_they_are(tmp_path):
    ids = ['video9', 'v_-x', '1012_U_00.56.36.981-00.56.38.167', '12@N01_3']
    want = np.stack([save(tmp_path/'in', v, compressed=i % 2) for i, v in enumerate(ids)])
    s = pack_frames(tmp_path/'in', tmp_path/'out', ids, chunk=3)
    assert s.ids == ids and s.shape == (4, 4, 8) and np.array_equal(s.take([2, 0, 2]), want[[2, 0, 2]]) and isinstance(s.x, np.memmap) and s.bytes_per_item == 128
    assert s.rows_of(['12@N01_3', 'video9']).tolist() == [3, 0] and s.take(np.zeros(0, int)).shape == (0, 4, 8) and len(s) == 4
    assert FrameStore(tmp_path/'out').ids == ids
    half = pack_frames(tmp_path/'in', tmp_path/'half', ids, dtype='float16')
    assert half.take([1]).dtype == np.float32 and half.bytes_per_item == 64 and np.allclose(half.take([1]), want[1], atol=2e-3)
    assert pack_frames(tmp_path/'in', tmp_path/'named').ids == sorted(ids)


def test_clip4clip_vectors_too(tmp_path):
    for i in range(3): save(tmp_path/'in', f'v{i}', frame_embeds=None, video_embed=np.full(8, i, 'f4'))
    s = pack_frames(tmp_path/'in', tmp_path/'out', kind='video_embed')
    assert s.shape == (3, 8) and s.take([2]).tolist() == [[2.] * 8]
    with pytest.raises(ValueError, match=r'frame_embeds: expected floats of shape \(F, D\), got nothing'): read_frames(tmp_path/'in/v0.npz')


BAD_FRAMES = [(dict(frame_embeds=np.zeros(8, 'f4')), r'expected floats of shape \(F, D\), got float32 \(8,\)'), (dict(frame_embeds=np.zeros((4, 8), 'i4')), 'got int32'), (dict(frame_embeds=np.zeros((0, 8), 'f4')), r'got float32 \(0, 8\)'), (dict(frame_embeds=np.full((4, 8), np.nan, 'f4')), 'NaN or infinity'), (dict(frame_embeds=np.full((4, 8), 1e300)), 'NaN or infinity'),
              (dict(frame_embeds=np.array([None], object)), 'expected numbers or text, got object'), (dict(video_id='other'), "video_id: expected 'v' as in the file's name, got 'other'"), (dict(video_id=None), 'got nothing'), (dict(video_id=['v']), 'video_id'), (dict(frame_indices=[0]), r'frame_indices: expected 4 whole numbers'), (dict(frame_indices=[.5] * 4), 'frame_indices'),
              (dict(frame_embeds=np.zeros((1, 1, 1, 2, 2), 'f4')), 'expected numbers or text')]

@pytest.mark.parametrize('more, says', BAD_FRAMES, ids=range(len(BAD_FRAMES)))
def test_bad_frames_are_named(tmp_path, more, says):
    save(tmp_path, 'v', **more)
    with pytest.raises(ValueError, match=says) as e: read_frames(tmp_path/'v.npz')
    assert 'v.npz' in str(e.value)


def npy(x):
    f = io.BytesIO()
    np.save(f, x)
    return f.getvalue()


def test_hostile_archives_are_refused(tmp_path):
    path = tmp_path/'v.npz'
    def archive(*entries, method=zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, 'w', method) as z:
            for name, raw in entries: z.writestr(name, raw)
    def refused(says):
        with pytest.raises(ValueError, match=says) as e: read_frames(path)
        assert str(path) in str(e.value)
    good, name = npy(np.zeros((4, 8), 'f4')), ('video_id.npy', npy(np.array('v')))
    archive(('frame_embeds.npy', good), name); assert read_frames(path).shape == (4, 8)
    archive(('frame_embeds.npy', bytes(MOST + 1))); refused('claims 67,108,865 bytes')
    archive(('frame_embeds.npy', good), name, method=zipfile.ZIP_LZMA); refused('packed in a way that is not read')
    archive(('frame_embeds.npy', good[:-1]), name); refused('does not fit 127 bytes')
    archive(('frame_embeds.npy', good + b'x'), name); refused('does not fit 129 bytes')
    archive(('frame_embeds.npy', good.replace(b'(4, 8)', b'(4, 9)')), name); refused('does not fit')
    archive(('frame_embeds.npy', good.replace(b'(4, 8)', b'(-4, -8)'[:6])), name); refused('frame_embeds')
    archive(('frame_embeds.npy', b'\x93NUMPY\x01\x00\x76\x00' + b'(' * 118), name); refused('not an array')
    archive(('frame_embeds.npy', b'\x93NUMPY\x03\x00\x76\x00\x00\x00' + b' ' * 118), name); refused('not an array')
    archive(*[(f'{i}.npy', b'') for i in range(65)]); refused('65 entries')
    with pytest.warns(UserWarning): archive(('frame_embeds.npy', good), ('frame_embeds.npy', good))
    refused('one of them twice')
    archive(('frame_embeds.npy', good), name)
    raw = bytearray(path.read_bytes())
    at = raw.index(b'PK\1\2')
    raw[at + 24:at + 28] = (10).to_bytes(4, 'little')                         # the directory claims fewer bytes than there are
    path.write_bytes(raw); refused('v.npz')
    path.write_bytes(b''); refused('not an npz file')


@fast
@given(st.data())
def test_damaged_archives_raise_or_read(data):
    f = io.BytesIO()
    np.savez_compressed(f, frame_embeds=np.ones((2, 3), 'f4'), frame_indices=[0, 1], video_id=f'npz-{os.getpid()}')
    raw = bytearray(f.getvalue())
    for _ in range(data.draw(st.integers(1, 3))): raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = TMP/f'npz-{os.getpid()}.npz'
    path.write_bytes(bytes(raw[:data.draw(st.integers(len(raw) // 2, len(raw)))]))
    try: assert np.isfinite(read_frames(path)).all()
    except ValueError as e: assert str(path) in str(e)
    finally: path.unlink()


def test_packing_killed_goes_on(tmp_path):
    "The process is killed without warning in the middle; the next run ends with the bytes of an undisturbed one."
    for i in range(40): save(tmp_path/'in', f'v{i:02}')
    whole = pack_frames(tmp_path/'in', tmp_path/'whole', chunk=4)
    code = f'''
import os, signal
import grnb.data.frames as frames
read, n = frames.read_frames, 0
def slow(*a):
    global n
    n += 1
    if n == 24: os.kill(os.getpid(), signal.SIGKILL)
    return read(*a)
frames.read_frames = slow
frames.pack_frames({str(tmp_path/'in')!r}, {str(tmp_path/'out')!r}, chunk=4)
'''
    r = subprocess.run([sys.executable, '-c', code], env=os.environ | {'PYTHONPATH': str(Path(__file__).resolve().parents[1])}, capture_output=True)
    assert r.returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match='20 of 40 videos are packed'): FrameStore(tmp_path/'out')
    for p in (tmp_path/'in').glob('v0*.npz'): p.unlink() if p.name != 'v00.npz' else None       # what is packed is not read again
    assert np.array_equal(pack_frames(tmp_path/'in', tmp_path/'out', whole.ids, chunk=4).x, whole.x)
    assert (tmp_path/'out/frames.npy').read_bytes() == (tmp_path/'whole/frames.npy').read_bytes()


def test_stores_that_do_not_fit_are_named(tmp_path):
    for i in range(3): save(tmp_path/'in', f'v{i}')
    out = tmp_path/'out'
    pack_frames(tmp_path/'in', out)
    with pytest.raises(ValueError, match='holds other videos'): pack_frames(tmp_path/'in', out, ['v2'])
    with pytest.raises(ValueError, match='holds other dtype, float32, expected float16'): pack_frames(tmp_path/'in', out, dtype='float16')
    with pytest.raises(ValueError, match='ids: expected videos, each once'): pack_frames(tmp_path/'in', tmp_path/'o', ['v1', 'v1'])
    with pytest.raises(ValueError, match='ids: expected names of files'): pack_frames(tmp_path/'in', tmp_path/'o', ['../v1'])
    with pytest.raises(FileNotFoundError): pack_frames(tmp_path/'in', tmp_path/'o', ['v1', 'v9'])
    with pytest.raises(ValueError, match='choose an empty or new folder'): pack_frames(tmp_path/'in', tmp_path/'in')
    save(tmp_path/'in', 'v3', frame_embeds=np.full((4, 8), 1e5, 'f4'))
    with pytest.raises(ValueError, match='v3.npz, frame_embeds: numbers too large for float16'): pack_frames(tmp_path/'in', tmp_path/'o2', dtype='float16')
    with pytest.raises(FileNotFoundError, match='no frames.json'): FrameStore(tmp_path)
    raw = (out/'frames.npy').read_bytes()
    (out/'frames.npy').write_bytes(raw[:-4])
    with pytest.raises(ValueError, match='frames.npy: not an array, or cut off'): FrameStore(out)
    np.save(out/'frames.npy', np.zeros((3, 4, 9), 'f4'))
    with pytest.raises(ValueError, match=r'expected float32 \(3, 4, 8\) as in frames.json'): FrameStore(out)
    for bad in ('[]', '{"ids": ["a"]}', '{"ids": [1], "shape": [2, 2], "dtype": "float32", "kind": "frame_embeds"}'):
        (out/'frames.json').write_text(bad)
        with pytest.raises(ValueError, match='not what pack_frames writes'): FrameStore(out)
    with pytest.raises(ValueError, match='rows: expected whole numbers from 0 to 3'): pack_frames(tmp_path/'in', tmp_path/'o3').take([-1])


# --- from IDs to candidates

@st.composite
def searches(draw):
    "A trie of a few postings and beams over it"
    codes = np.array(draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=14)), np.uint8)
    rows = np.array(draw(st.lists(st.integers(0, 7), min_size=len(codes), max_size=len(codes))))
    pairs = {(tuple(c), r) for c, r in zip(codes.tolist(), rows.tolist())}
    codes, rows = np.array([c for c, _ in sorted(pairs)], np.uint8), np.array([r for _, r in sorted(pairs)])
    trie = Trie.build(SemanticIDs(codes, rows, (4, 4)))
    W = draw(st.integers(1, 6))
    leaves = np.array([draw(st.permutations(range(len(trie))))[:W] for _ in range(3)])
    leaves = np.pad(leaves, ((0, 0), (0, W - leaves.shape[1])), constant_values=-1)
    scores = np.sort(np.array(draw(st.lists(st.lists(st.integers(-30, 0), min_size=W, max_size=W), min_size=3, max_size=3)), np.float32) / 7, 1)[:, ::-1]
    return trie, leaves, scores


def plainly(trie, leaves, scores, how, candidates, per_id):
    "Lists of (item, score) for each query, from the definition"
    out = []
    for beam, s in zip(leaves, scores):
        got = defaultdict(list)
        for leaf, x in zip(beam, s):
            if leaf >= 0:
                for row in sorted(trie.rows[trie.offsets[leaf]:trie.offsets[leaf + 1]].tolist())[:per_id]: got[row].append(float(x))
        pairs = [(i, x[0]) for i, x in got.items()] if how == 'first' else sorted(((i, float(np.log(np.sum(np.exp(x))))) for i, x in got.items()), key=lambda p: (-round(p[1], 9), p[0]))
        out.append(pairs[:candidates])
    return out


@fast
@given(searches(), st.sampled_from(['first', 'summed']), st.sampled_from([None, 1, 3]), st.sampled_from([None, 1, 2]))
def test_ways_to_expand_are_their_definitions(search, how, candidates, per_id):
    trie, leaves, scores = search
    rows, s = expand_as(leaves, scores, trie, how, candidates, per_id)
    want = plainly(trie, leaves, scores, how, candidates, per_id)
    for q, pairs in enumerate(want):
        n = len(pairs)
        assert (rows[q, n:] == -1).all() and (s[q, n:] == -np.inf).all() and np.allclose(s[q, :n], [x for _, x in pairs], atol=1e-5)
        if how == 'first': assert rows[q, :n].tolist() == [i for i, _ in pairs]
        elif candidates is None: assert sorted(rows[q, :n].tolist()) == sorted(i for i, _ in pairs)
    assert rows.shape[1] == (candidates or max(len(p) for p in want))


def test_expansion_of_a_changed_trie():
    trie = Trie.build(SemanticIDs(np.uint8([[0, 0], [0, 0], [1, 1]]), np.array([0, 1, 2]), (2, 2)))
    live = LiveTrie(trie).remove([1]).add([[0, 0], [1, 1]], [3, 3])
    leaves, scores = np.array([[1, 0]]), np.log(np.float32([[.6, .3]]))
    rows, s = expand_as(leaves, scores, live)
    assert rows.tolist() == [[2, 3, 0]] and np.allclose(np.exp(s), [[.6, .6, .3]])
    rows, s = expand_as(leaves, scores, live, 'summed')
    assert rows.tolist() == [[3, 2, 0]] and np.allclose(np.exp(s), [[.9, .6, .3]])


def test_large_buckets_come_whole():
    trie = Trie.build(SemanticIDs(np.zeros((70, 2), np.uint8), np.arange(70), (2, 2)))
    assert expand_as(np.array([[0]]), np.zeros((1, 1), 'f4'), trie)[0].tolist() == [list(range(70))]
    assert expand_as(np.array([[0]]), np.zeros((1, 1), 'f4'), trie, per_id=5)[0].tolist() == [list(range(5))]
    for bad, says in (((np.array([[1]]), np.zeros((1, 1))), 'leaves'), ((np.array([0]), np.zeros(1)), 'expected integers'), ((np.array([[0.]]), np.zeros((1, 1))), 'expected integers')):
        with pytest.raises(ValueError, match=says): expand_as(*bad, trie)
    assert expand_as(np.zeros((0, 3), int), np.zeros((0, 3)), trie)[0].shape == (0, 0)


def counted_theirs(predictions, labels, counts, seconds, N):
    "The metrics block, after compute_detailed_metrics of the released code, written out plainly"
    m = {}
    for k in [1, 5, 10, N]: m[f'Recall@{k}'] = sum(any(l in p[:k] for l in ls) for p, ls in zip(predictions, labels)) / len(labels)
    m |= dict(seconds_per_query=seconds / len(labels), total_queries=len(labels), batch_size=1)
    for k in [1, 5, 10, N]: m[f'correct_retrievals_at_{k}'] = sum(any(l in p[:k] for l in ls) for p, ls in zip(predictions, labels))
    return m | dict(correct_retrievals=m[f'correct_retrievals_at_{N}'], avg_candidates_per_query=round(sum(counts) / len(counts), 2))


@fast
@given(st.data(), st.sampled_from([3, 5, 10, 20]))
def test_metrics_on_ids_are_the_released_ones(data, N):
    n = data.draw(st.integers(1, 6))
    ids = st.integers(0, 9)
    found = [data.draw(st.lists(ids, min_size=N, max_size=N)) for _ in range(n)]
    labels = [data.draw(st.lists(ids, min_size=1, max_size=4)) for _ in range(n)]
    counts = [data.draw(st.integers(0, 300)) for _ in range(n)]
    predictions = [list(dict.fromkeys(f)) for f in found]
    m = released_metrics(id_ranks(found, labels), counts, N, 2.5)
    want = counted_theirs(predictions, labels, counts, 2.5, N)
    assert m == want and list(m) == list(want)
    assert (id_ranks([[str(i) for i in f] for f in found], [[str(i) for i in l] for l in labels]) == id_ranks(np.array(found), np.array([l + [-1] * (4 - len(l)) for l in labels]))).all()


def test_ranks_on_ids_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match='truth: expected 1 queries'): id_ranks([[1]], [[1], [2]])
    with pytest.raises(ValueError, match='counts: expected 1 queries'): released_metrics(np.array([1]), [1, 2], 5)
    with pytest.raises(ValueError, match='at least one'): released_metrics(np.zeros(0, int), [], 5)
    assert id_ranks(np.array([[-1, -1]]), np.array([[-1, -1]])).tolist() == [0]


def test_figures_of_a_candidate_file():
    c = Candidates(dict(num_candidates=3), dict(), [Found('a', 'x', ['y', 'x'], [-.1, -.2], ['[0, 1, 1]', '[0, 2, 2]'], ['[0, 2, 2]', '[0, 3, 3]']), Found('b', 'z', ['y'], [-.1], ['[0, 1, 1]'], ['[0, 5, 5]']), Found('c', 'y', ['y'], [-.1], ['[0, 1, 1]'], ['[0, 1, 1]'])])
    m = stage1_metrics(c, ks=(1, 2))
    assert m == {'queries': 3, 'video R@1': 1/3, 'video R@2': 2/3, 'video R@all': 2/3, 'candidates': 4/3, 'candidates, median': 1., 'candidates, most': 2, 'ID R@1, at most': 1/3, 'ID R@2, at most': 2/3, 'differs': {}}
    assert truth_ranks(c).tolist() == [2, 0, 1]
    stated = {'Recall@3': 2/3, 'correct_retrievals': 2, 'total_queries': 3, 'avg_candidates_per_query': 1.33, 'Recall@1': .9}
    assert stage1_differences(c._replace(metrics=stated)) == {}
    assert stage1_differences(c._replace(metrics=stated | {'Recall@3': .5, 'correct_retrievals': 'two'})) == {'Recall@3': (.5, 2/3), 'correct_retrievals': ('two', 2)}
    with pytest.raises(ValueError, match='at least one query'): stage1_metrics(Candidates({}, {}, []))


# --- a file set from one end to the other

def checkpoints(root, name, V=2, K=16, L=3, D=512):
    "A tokeniser and a reranker under the names of the released files, with random weights and frames' mean"
    import torch
    from grnb.rerank.pooling import XPoolHead
    g = torch.Generator().manual_seed(0)
    r = lambda *shape, s=1.: torch.randn(*shape, generator=g) * s
    state = {'model.shared.weight': r(9, D), 'start_token_embedding': r(1, D), 'logit_scale': torch.tensor(4.605)}
    for v, side in itertools.product(range(V), ('encoder', 'decoder')): state |= {f'video_rqvae.{side}.mlps.{v}.mlp_layers.1.weight': r(D, D, s=D**-.5), f'video_rqvae.{side}.mlps.{v}.mlp_layers.1.bias': r(D, s=.1)}
    for l in range(L): state |= dict.fromkeys((f'video_rqvae.rq.vq_layers.{l}.embedding.weight', f'code_embedding.{l}.weight', f'centroids.{l}.codebook.weight'), r(K, D, s=.05))
    best, x = root/f'GRDR/{name}/best_model/best_model.pt', root/'Xpool/msrvtt9k_model_best.pth'
    for path in (best, x): path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, best)
    head = {f'pool_frames.{k}': v for k, v in XPoolHead(D).state_dict().items()}
    torch.save(dict(epoch=5, state_dict=head | {'clip.logit_scale': torch.tensor(4.6), 'clip.text_model.embeddings.position_ids': torch.arange(77)[None]}, optimizer=dict(state={}, param_groups=[])), x)
    return best, x


def test_a_file_set_from_reading_to_the_table(tmp_path):
    "Captions, features and tokeniser → IDs and a search → a candidate file → its figures → frame features → X-Pool on the file's lists → a table beside the paper's."
    from grnb.report import cell, pivot
    from grnb.rerank.protocol import rerank_ranks
    from grnb.rerank.xpool import read_xpool
    from grnb.tokenizer.released import load_grdr
    release(tmp_path, 'msrvtt', train=60, test=30)
    best, x = checkpoints(tmp_path, 'msrvtt')
    task, names = load_task('msrvtt', path=tmp_path, setting='full'), read_grdr('msrvtt', tmp_path).videos
    draw, tokenizer = np.random.default_rng(0), load_grdr(best)
    codes = tokenizer.encode(task.items)                                      # (N, V, L)
    ids = np.concatenate([codes[:, v] for v in range(2)])
    trie = Trie.build(SemanticIDs(ids, np.tile(np.arange(len(codes)), 2), tokenizer.sizes))
    own = own_leaves(trie, task.positives)
    leaves = np.stack([draw.permutation(len(trie))[:10] for _ in own])        # a first stage that guesses, and for two queries of three knows one of the IDs
    for q in range(len(own)):
        if q % 3 and own[q, 0] not in leaves[q]: leaves[q, q % 10] = own[q, 0]
    scores = np.sort(draw.standard_normal(leaves.shape).astype('f4'), 1)[:, ::-1] - 4
    rows, row_scores = expand_as(leaves, scores, trie)
    meta = dict(dataset='msrvtt', model_name='unknown', num_candidates=10, index_type='videorqvae', code_book_size=16, code_book_num=2, timestamp='01010000')
    path = tmp_path/'candidates/msrvtt_c16l3_10_candidates_t2.json'
    write_candidates(path, as_candidates(task.texts, [names[p] for p in task.positives], names, rows, row_scores, meta, released_metrics(id_ranks(leaves, own), (rows >= 0).sum(1), 10)))
    c = read_candidates(path)
    first = stage1_metrics(c)
    assert first['differs'] == {} and .5 < first['video R@all'] < 1 and first['video R@1'] < first['video R@all'] and c.metrics['Recall@10'] == first['video R@all']
    at, _, truth = candidate_rows(c, names)
    assert np.array_equal(at, rows) and np.array_equal(truth, task.positives)
    for i, v in enumerate(names):
        f = draw.standard_normal((12, 512)).astype('f4')
        save(tmp_path/'Xpool_features/msrvtt', v, 12, 512, frame_embeds=f / np.linalg.norm(f, axis=1, keepdims=True))
    store = pack_frames(tmp_path/'Xpool_features/msrvtt', tmp_path/'packed', names)
    queries = store.take(task.positives).mean(1)                              # the text that a video's own frames would have
    ranks = rerank_ranks(read_xpool(x), queries, store, at, truth)
    theirs = rerank_ranks(read_xpool(x), queries, store, at, truth, task.texts, released=True)
    assert ((ranks == 1) == (truth_ranks(c) > 0)).all() and (theirs[ranks > 0] == ranks[ranks > 0]).all() and (theirs > 0).all()
    cells = [cell('two stages', f'R@{k}', bootstrap(recall(ranks, k), truth).times(100), 'made up', unit='%') for k in (1, 5, 10)]
    cells += [cell('two stages', k, v, 'msrvtt', source='paper', unit='%') for k, v in reported('two-stage', 'msrvtt', 'full', 'readme').items() if k != 'latency']
    table = pivot(cells)
    assert [c[:2] for c in table.columns] == [('made up', 'this run')] * 3 + [('msrvtt', 'paper')] * 3 and cells[0]['value'] == pytest.approx(100 * first['video R@all'], abs=1e-3)


# --- reported numbers

def test_reported_numbers_have_sources_and_fit_one_another():
    assert {r.source for r in REPORTED} <= set(REPORTED_BY) and len({r[:4] + r[6:] for r in REPORTED}) == len(REPORTED)
    for r in REPORTED:
        assert r.value > 0 and (r.unit != '%' or r.value <= 100)
    for (d, s) in {(r.dataset, r.setting) for r in REPORTED if r.what == 'two-stage'}:
        for source in {r.source for r in REPORTED if (r.what, r.dataset, r.setting) == ('two-stage', d, s)}:
            m = reported('two-stage', d, s, source)
            assert m['R@1'] < m['R@5'] < m['R@10']
    assert reported('claim', '', 'full') == {'full-corpus speed over dense, up to': 300.} and reported('two-stage', 'lsmdc', 'inductive', 'readme')['latency'] == 144
    with pytest.raises(KeyError, match='nothing is reported'): reported('two-stage', 'lsmdc', 'inductive', 'later')
