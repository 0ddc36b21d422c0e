"""Foreign files: plain values and tensors come out as they went in, nothing foreign is built or run, and damage is a ValueError."""
import builtins
import copyreg
import os
import pickle
import struct
import sys
import tracemalloc
import types
import zipfile
from collections import OrderedDict, defaultdict
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from grnb.data import foreign, unpickle
from grnb.data.foreign import Stub, Tensor, read_pickle, read_torch, torch_names
from grnb.tokenizer.encode import _place, batches

ONE_FILE = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def put(path, data):
    path.write_bytes(data)
    return path


def reader(tmp_path): return lambda data: read_pickle(put(tmp_path/'x.pkl', data))


# --- a class that does not exist at reading time, and programs that would act

@pytest.fixture
def gone():
    "make(name, **members): an object of a class in a module that is not there when the file is read"
    def pickled(save, *bases, state=None, **members):
        mod = types.ModuleType('omegaconf.dictconfig')
        cls = mod.DictConfig = type('DictConfig', bases or (object,), dict(__module__=mod.__name__, **members))
        sys.modules.update({'omegaconf': types.ModuleType('omegaconf'), mod.__name__: mod})
        obj = cls()
        if state: obj.__dict__.update(state)
        try: return save(obj)
        finally: del sys.modules['omegaconf'], sys.modules[mod.__name__]
    return pickled


class Runs:
    "A program in the file: calls f(*args) when read by the usual reader"
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


# --- plain pickles

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-2**200, 2**200) | st.floats(allow_nan=False) | st.text(max_size=300) | st.binary(max_size=300),
    lambda x: st.lists(x, max_size=5) | st.lists(x, max_size=5).map(tuple) | st.dictionaries(st.text(max_size=5) | st.integers(-2**63, 2**63), x, max_size=5), max_leaves=30)


@settings(max_examples=150, **ONE_FILE)
@given(plain, st.integers(2, 5))
def test_plain_values_come_back(tmp_path, x, protocol):
    assert reader(tmp_path)(pickle.dumps(x, protocol)) == x


arrays = hnp.arrays(st.sampled_from(['?', 'u1', 'i2', '<i4', '>i8', 'f2', '<f4', '>f4', 'f8', 'c8', 'U3', 'S4']), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))


@pytest.mark.parametrize('protocol', range(2, 6))
def test_zeros_come_back(tmp_path, protocol):
    "In protocol 2 an array is a text, then bytes, then an array: of zeros each of the three is as long as the file"
    path = tmp_path/'x.pkl'
    path.write_bytes(pickle.dumps({'a': np.zeros(10_000, np.int64)}, protocol))
    assert np.array_equal(read_pickle(path)['a'], np.zeros(10_000))


@settings(max_examples=150, **ONE_FILE)
@given(arrays, st.integers(2, 5), st.booleans())
def test_arrays_come_back(tmp_path, a, protocol, fortran):
    "Any order in memory and any byte order; shared arrays too."
    if fortran: a = np.asfortranarray(a)
    out = reader(tmp_path)(pickle.dumps({'a': a, 'again': [a]}, protocol))
    for b in (out['a'], out['again'][0]):
        assert type(b) is np.ndarray and b.dtype == a.dtype.newbyteorder('=') and b.shape == a.shape and np.array_equal(b, a, equal_nan=a.dtype.kind in 'fc')


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_numpy_scalars_and_a_sliced_array(tmp_path, protocol):
    out = reader(tmp_path)(pickle.dumps({'s': np.float32(2.5), 'i': np.int64(-3), 'a': np.arange(20.)[::3]}, protocol))
    assert out['s'] == 2.5 and type(out['s']) is np.float32 and out['i'] == -3 and np.array_equal(out['a'], np.arange(20.)[::3])


def test_features_and_caption_groups_of_grdr(tmp_path):
    "The files of the fact sheet, 8.1 and 8.4: {video: float32 (512,)} and {sample: group}."
    g = np.random.default_rng(0)
    videos = {f'video{i}': g.standard_normal(512).astype('f4') for i in range(20)}
    data = pickle.dumps(videos)
    assert 2048 < len(data)/20 < 2200
    out = reader(tmp_path)(data)
    assert list(out) == list(videos) and all(np.array_equal(out[k], videos[k]) and out[k].dtype == np.float32 for k in videos)
    groups = {f'video{i}_{j}': int(g.integers(4)) for i in range(20) for j in range(20)}
    assert reader(tmp_path)(pickle.dumps(groups)) == groups


@pytest.mark.parametrize('x, name', [
    (Runs(os.system, 'touch MARK'), 'system'), (Runs(eval, '1'), 'eval'), (OrderedDict(a=1), 'collections.OrderedDict'), (defaultdict(list), 'collections.defaultdict'),
    (Fraction(1, 2), 'fractions.Fraction'), (np.array([1, 'a', None], object), 'dtype'), (np.ma.array([1], mask=[True]), 'numpy.ma'), (torch.zeros(2), 'torch'),
    ({1, 2}, 'set'), (frozenset([1]), 'set'), (np.dtype('f4'), 'a value that is a name'), (np.ndarray, 'a value that is a name, not data: numpy.ndarray'), (1 + 2j, 'complex'),
    (np.zeros(2, [('a', 'f4')]), 'dtype'), (np.datetime64('2020'), 'dtype'), (range(3), 'range')])
@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_anything_else_is_refused_by_name(tmp_path, x, name, protocol, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=name): reader(tmp_path)(pickle.dumps({'a': [x]}, protocol))
    assert not (tmp_path/'MARK').exists()


def test_error_names_file_and_place(tmp_path):
    with pytest.raises(ValueError, match=r'x\.pkl: .*posix\.system.*byte \d+'): reader(tmp_path)(pickle.dumps(Runs(os.system, 'x')))
    with pytest.raises(ValueError, match='an empty file'): reader(tmp_path)(b'')
    with pytest.raises(ValueError, match='protocol 2 to 5'): reader(tmp_path)(pickle.dumps({'a': 1}, 0))
    with pytest.raises(ValueError, match='3 bytes after the end'): reader(tmp_path)(pickle.dumps({'a': 1}) + b'abc')
    with pytest.raises(FileNotFoundError): read_pickle(tmp_path/'none.pkl')


# --- bombs: small files that ask for much

def short(s): return b'\x8c' + bytes([len(s)]) + s.encode()


LAUGHS = b'\x80\x04)' + b''.join(b'q' + bytes([i]) + b'h' + bytes([i]) + b'\x86' for i in range(200))   # 2^200 leaves in 1,000 bytes
DEEP_TUPLE = b'\x80\x04)' + b'\x85'*200_000
NP_ARRAY = b'\x80\x04' + short('numpy._core.multiarray') + short('_reconstruct') + b'\x93' + short('numpy') + short('ndarray') + b'\x93'
NP_DTYPE = short('numpy') + short('dtype') + b'\x93' + short('f4') + b'\x89\x88\x87R'
BOMBS = dict(
    memo=b'\x80\x04Nr' + struct.pack('<I', 2**32 - 1) + b'cos\nsystem\n.',
    bytearray=b'\x80\x05\x96' + struct.pack('<Q', 2**40) + b'abc.',
    text=b'\x80\x04\x8d' + struct.pack('<Q', 2**62) + b'abc.',
    frame=b'\x80\x04\x95' + struct.pack('<Q', 2**63) + b'N',
    number=b'\x80\x02\x8b' + struct.pack('<i', 10_000_000) + b'\x7f'*10_000_000 + b'.',
    reconstruct=NP_ARRAY + b'\x8a\x06' + (10**12).to_bytes(6, 'little') + b'\x85C\x01b\x87R.',
    shape=NP_ARRAY + b'K\x00\x85C\x01b\x87R(K\x01\x8a\x06' + (10**12).to_bytes(6, 'little') + b'\x85' + NP_DTYPE + b'\x89C\x04abcdtb.',
    negative=NP_ARRAY + b'K\x00\x85C\x01b\x87R(K\x01J\xff\xff\xff\xff\x85' + NP_DTYPE + b'\x89C\x04abcdtb.',
    itemsize=b'\x80\x04' + short('numpy') + short('dtype') + b'\x93' + short('U999999999') + b'\x89\x88\x87R.',
    deep_key=b'\x80\x04}' + DEEP_TUPLE[2:] + b'Ns.',
    deep_list=b'\x80\x04' + b']'*100_000 + b'a'*99_999 + b'.',
    laughing_key=b'\x80\x04}' + LAUGHS[2:] + b'Ns.',
    laughing_state=b'\x80\x04' + NP_DTYPE + LAUGHS[2:] + b'b.',
    laughing_shape=NP_ARRAY + b'K\x00\x85C\x01b\x87R(K\x01' + LAUGHS[2:] + NP_DTYPE + b'\x89C\x04abcdtb.',
    loop=b'\x80\x04]q\x00h\x00a.',
    big_key=b'\x80\x04}\x8a\x10' + b'\x7f'*16 + b'Ns.',
    copies=b'\x80\x02c_codecs\nencode\nq\x00X' + struct.pack('<I', 100_000) + b'a'*100_000 + b'X\x06\x00\x00\x00latin1\x86q\x01R' + b'0h\x00h\x01R'*100_000 + b'.',
    long_names=b'\x80\x04X' + struct.pack('<I', 1_000_000) + b'a'*1_000_000 + b'q\x00' + b'h\x00h\x00\x930'*1000 + b'N.')


@pytest.mark.parametrize('name', BOMBS)
def test_bombs_are_refused_in_little_memory(tmp_path, name):
    "Each asks the usual reader for gigabytes, for ever, or for a crash; here at most a few times the file's size is used."
    path = put(tmp_path/'x.pkl', BOMBS[name])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError): read_pickle(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000 + 130*len(BOMBS[name])
    finally: tracemalloc.stop()


def test_shared_values_stay_small_and_steps_are_bounded(tmp_path, monkeypatch):
    x = reader(tmp_path)(b'\x80\x04]' + b''.join(b'q' + bytes([i]) + b'](h' + bytes([i]) + b'h' + bytes([i]) + b'e' for i in range(60)) + b'.')
    for _ in range(60): assert len(x) == 2 and x[0] is x[1]; x = x[0]
    monkeypatch.setattr(unpickle, 'STEPS', 50)
    with pytest.raises(ValueError, match=r"more than 50 instructions \(GENIUS's union file is one: read the files of the single pools"): reader(tmp_path)(pickle.dumps(list(range(100))))
    monkeypatch.setattr(unpickle, 'STEPS', 10**6); monkeypatch.setattr(unpickle, 'MANY', 50)
    with pytest.raises(ValueError, match='more than 50 of them'): reader(tmp_path)(pickle.dumps([[i] for i in range(100)]))


# --- files of torch.save

def everything():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(4, 6, generator=g)
    out = {str(t): (torch.arange(12) % 2).to(t) for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.complex128)}
    return dict(out, w=w, turned=w.t(), part=w[1:3, ::2], row=w[2], scalar=torch.tensor(3.5), none=torch.zeros(0, 3), parameter=torch.nn.Parameter(w.clone()), again=w,
                bf=torch.randn(3, 5, generator=g).to(torch.bfloat16), half=torch.randn(7, generator=g).half(), size=torch.Size([3, 4]), nested=[(w, {'x': w[0]}), 'é', 2.5, None])


def test_every_tensor_is_what_torch_reads(tmp_path):
    "Against torch.load itself: dtypes, strides, offsets, aliases, empties, parameters."
    saved = everything()
    torch.save(saved, tmp_path/'x.pt')
    got = read_torch(tmp_path/'x.pt')
    assert list(got) == list(saved) and got['size'] == (3, 4) and got['nested'][1:] == ['é', 2.5, None]
    for k, t in torch.load(tmp_path/'x.pt', weights_only=False).items():
        if isinstance(t, torch.Tensor):
            want = (t.float() if t.dtype == torch.bfloat16 else t).detach().numpy()
            assert got[k].dtype == want.dtype and got[k].shape == want.shape and got[k].tobytes() == want.tobytes(), k
            assert not got[k].flags.writeable
    assert np.array_equal(got['nested'][0][1]['x'], saved['w'][0]) and np.shares_memory(got['w'], got['part'])
    names = torch_names(tmp_path/'x.pt')
    assert names['bf'] == ('bf16', (3, 5)) and names['nested/0/1/x'] == ('f4', (6,)) and names['turned'] == ('f4', (6, 4))


def test_modules_optimizers_and_their_containers(tmp_path):
    m = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    o = torch.optim.AdamW(m.parameters()); m(torch.randn(4, 3)).sum().backward(); o.step()
    torch.save(dict(model=m.state_dict(), optimizer=o.state_dict(), epoch=3, scaler={}), tmp_path/'x.pt')
    got, want = read_torch(tmp_path/'x.pt'), m.state_dict()
    assert list(got['model']) == list(want) and all(np.array_equal(got['model'][k], want[k]) for k in want)
    assert got['optimizer']['param_groups'][0]['betas'] == (0.9, 0.999) and np.array_equal(got['optimizer']['state'][0]['exp_avg'], o.state_dict()['state'][0]['exp_avg'])


def test_dtypes_that_numpy_lacks_are_stubs(tmp_path):
    torch.save(dict(a=torch.zeros(3).to(torch.float8_e4m3fn), b=torch.ones(2)), tmp_path/'x.pt')
    got = read_torch(tmp_path/'x.pt')
    assert isinstance(got['a'], Stub) and np.array_equal(got['b'], [1, 1])


def test_foreign_objects_become_stubs_and_never_run(tmp_path, gone, monkeypatch):
    "Plain, list-like, dict-like and called classes; os.system, eval and a function of the file's choice."
    mark, path = tmp_path/'ran', tmp_path/'x.pt'
    def never(*a, **k): raise AssertionError('the file ran something')
    for kind, more in ((None, {}), (list, {}), (dict, {}), (None, dict(__getnewargs_ex__=lambda self: ((1,), {'a': 2}))), (None, dict(__reduce_ex__=lambda self, p: copyreg._reduce_ex(self, 1)))):
        for protocol in (2, 4):
            def save(obj):
                if kind is list: obj.append(obj)
                if kind is dict: obj['a'] = obj
                obj.parent = obj
                torch.save(dict(w=torch.ones(2), config=obj, deep=[{'c': obj}], run=Runs(os.system, f'touch {mark}'), ev=Runs(eval, f'open({str(mark)!r}, "w")'), lam=Runs(getattr, obj, 'x')), path, pickle_protocol=protocol)
            gone(save, *([kind] if kind else []), **more)
            with monkeypatch.context() as m:
                m.setattr(os, 'system', never); m.setattr(builtins, 'eval', never)
                got = read_torch(path)
            assert repr(got['config']) == f"Stub('{'functools.partial' if '__getnewargs_ex__' in more and protocol < 4 else 'omegaconf.dictconfig.DictConfig'}')" and isinstance(got['deep'][0]['c'], Stub)
            assert np.array_equal(got['w'], [1, 1]) and got['run'].name == 'posix.system' and isinstance(got['ev'], Stub) and isinstance(got['lam'], Stub)
            assert 'omegaconf' not in sys.modules and not mark.exists()
    os.system(f'touch {mark}'); assert mark.exists()                   # the payload would have left this


def test_tensors_as_keys_stay_unread(tmp_path):
    torch.save({torch.tensor(5): 0, torch.tensor(7): 1}, tmp_path/'x.pt')
    assert [type(k) for k in read_torch(tmp_path/'x.pt')] == [Tensor, Tensor] and sorted(int(k.read()) for k in read_torch(tmp_path/'x.pt')) == [5, 7]


# --- archives

def entries(path):
    with zipfile.ZipFile(path) as z: return {i.filename: z.read(i) for i in z.infolist()}


def archive(path, parts, **kw):
    with zipfile.ZipFile(path, 'w', **kw) as z:
        for k, v in parts.items(): z.writestr(k, v)
    return path


@pytest.fixture
def small(tmp_path):
    torch.save(dict(model=dict(a=torch.arange(6.), b=torch.ones(3, dtype=torch.int64)), other=dict(c=torch.arange(4.) + 9), epoch=1), tmp_path/'s.pt')
    return tmp_path/'s.pt'


def equal(a, b): return type(a) is type(b) and (np.array_equal(a, b) and a.dtype == b.dtype if isinstance(a, np.ndarray) else list(a) == list(b) and all(equal(a[k], b[k]) for k in a) if isinstance(a, dict) else a == b)


def test_only_the_prefix_is_read(small):
    "The bytes of what is skipped may be wrong: nobody looks. The bytes of what is read may not."
    whole = small.read_bytes()
    at = whole.index((np.arange(4, dtype='f4') + 9).tobytes())
    put(small, whole[:at] + b'\xff' + whole[at + 1:])
    got = read_torch(small, 'a')
    assert np.array_equal(got['model']['a'], np.arange(6)) and isinstance(got['model']['b'], Tensor) and isinstance(got['other']['c'], Tensor) and got['epoch'] == 1
    assert isinstance(read_torch(small, ('a', 'b'))['model']['b'], np.ndarray) and set(torch_names(small)) == {'model/a', 'model/b', 'other/c'}
    assert isinstance(read_torch(small, 'model')['model']['a'], np.ndarray)                          # a key stands for all below it
    with pytest.raises(ValueError, match='checksum'): read_torch(small)
    with pytest.raises(ValueError, match='checksum'): got['other']['c'].read()
    assert not np.array_equal(read_torch(small, check=False)['other']['c'], np.arange(4) + 9)


def test_wide_archives(small, monkeypatch):
    "Sizes of eight bytes in the directory, as files above 4 GiB have them."
    want, parts = read_torch(small), entries(small)
    monkeypatch.setattr(zipfile, 'ZIP64_LIMIT', 8)
    wide = archive(small.with_name('wide.pt'), parts)
    assert b'PK\6\7' in wide.read_bytes() and equal(read_torch(wide), want)


@pytest.mark.parametrize('change, said', [
    (lambda p: p.update({'s/byteorder': b'big'}), 'byte order little'), (lambda p: p.update({'s/byteorder': b''}), 'byte order little'),
    (lambda p: p.pop('s/data.pkl'), 'one data.pkl'), (lambda p: p.update({'t/data.pkl': b'N.'}), 'one data.pkl, got 2'), (lambda p: p.update({'s/constants.pkl': b'N.'}), 'TorchScript'),
    (lambda p: p.pop('s/data/0'), "no entry 's/data/0'"), (lambda p: p.update({'s/data/0': b'1234'}), 'claims 6 numbers'), (lambda p: p.update({'s/data/0': b''}), 'claims 6 numbers'),
    (lambda p: p.update({'s/data/0': p['s/data/0']*2}), 'claims 6 numbers'), (lambda p: p.update({'s/data.pkl': b''}), 'cut off'), (lambda p: p.update({'s/data.pkl': p['s/data.pkl'][:-5]}), 's.pt: ')])
def test_wrong_contents_are_named(small, change, said):
    parts = entries(small); change(parts); archive(small, parts)
    with pytest.raises(ValueError, match=said): read_torch(small)


def test_missing_byteorder_is_little(small):
    want, parts = read_torch(small), entries(small)
    parts.pop('s/byteorder')
    assert equal(read_torch(archive(small.with_name('old.pt'), parts)), want)


def test_no_torch_file(tmp_path, small):
    parts = entries(small)
    for data, said in ((b'', 'not a file of torch.save'), (b'hello', 'not a file'), (b'PK\5\6', 'cut off'), (b'PK\5\6' + b'\xff'*18, 'does not fit|cut off')):
        with pytest.raises(ValueError, match=said): read_torch(put(tmp_path/'x', data))
    with pytest.raises(ValueError, match='compressed'): read_torch(archive(tmp_path/'x', parts, compression=zipfile.ZIP_DEFLATED))
    torch.save(dict(a=torch.ones(2)), tmp_path/'x', _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match='torch before 1.6'): read_torch(tmp_path/'x')
    with pytest.warns(UserWarning): 
        with zipfile.ZipFile(tmp_path/'x', 'w') as z: z.writestr('s/data.pkl', b'N.'); z.writestr('s/data.pkl', b'N.')
    with pytest.raises(ValueError, match='twice'): read_torch(tmp_path/'x')
    with pytest.raises(FileNotFoundError): read_torch(tmp_path/'none')


def test_entries_that_overlap(small):
    "One storage listed under many names would be paid for once and copied often."
    whole = bytearray(small.read_bytes())
    start = struct.unpack('<L', whole[-6:-2])[0]
    at = whole.index(b's/data/2', start) - 46
    whole[at + 20:at + 28] = struct.pack('<2L', start, start)
    with pytest.raises(ValueError, match='overlap'): read_torch(put(small, bytes(whole)))


def tensor_file(path, storage=('storage', ('g', 'torch FloatStorage'), '0', 'cpu', 4), offset=0, shape=(2, 2), strides=(2, 1), data=np.arange(4, dtype='f4').tobytes()):
    "A file with one hand-written tensor"
    def code(x):
        if type(x) is tuple and x[:1] == ('g',): return b'c' + x[1].replace(' ', '\n').encode() + b'\n'
        if type(x) is tuple: return b'(' + b''.join(map(code, x)) + b't'
        return pickle.dumps(x, 2)[2:-1]
    return archive(path, {'s/data.pkl': b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(' + code(storage) + b'Q' + code(offset) + code(shape) + code(strides) + b'\x89NtR.', 's/data/0': data})


def test_claims_of_a_tensor_are_checked(tmp_path):
    f, ok = tmp_path/'x', ('storage', ('g', 'torch FloatStorage'), '0', 'cpu', 4)
    assert np.array_equal(read_torch(tensor_file(f)), [[0, 1], [2, 3]]) and np.array_equal(read_torch(tensor_file(f, offset=1, shape=(2,), strides=(2,))), [1, 3])
    for kw, said in ((dict(offset=1), 'reaches element 4'), (dict(strides=(3, 1)), 'reaches element 4'), (dict(shape=(10**6, 10**6), strides=(0, 0)), 'repeats elements'), (dict(shape=(2**40,), strides=(1,)), 'reaches'),
                     (dict(shape=(3, 2), strides=(1, 1)), 'repeats'), (dict(strides=(-1, 1)), 'whole numbers'), (dict(offset=-1), 'whole numbers'), (dict(shape=(2,)), 'without storage or shape'), (dict(shape=(2**70, 0), strides=(1, 1)), 'whole numbers'),
                     (dict(shape=(2., 2)), 'whole numbers'), (dict(shape=[2, 2]), 'without'), (dict(storage=ok[:4] + (5,)), 'claims 5 numbers'), (dict(storage=ok[:4] + (2**60,)), 'claims'), (dict(storage=ok[:4] + (-1,)), 'unknown kind'),
                     (dict(storage=('storage', ('g', 'torch DoubleStorage'), '0', 'cpu', 4)), 'claims 4 numbers of f8'), (dict(storage=ok[:2] + ('../../0', 'cpu', 4)), 'no entry'), (dict(storage=('module',) + ok[1:]), 'persistent id'),
                     (dict(storage=ok[:2] + ((1,), 'cpu', 4)), 'persistent id'), (dict(shape=(0, 2**62, 2**62), strides=(1, 1, 1)), 'x: ')):
        with pytest.raises(ValueError, match=said): read_torch(tensor_file(f, **kw))


def test_strides_that_are_never_stepped_may_be_anything(tmp_path):
    assert read_torch(tensor_file(tmp_path/'x', shape=(1,), strides=(2**62,))).tolist() == [0]
    assert read_torch(tensor_file(tmp_path/'x', shape=(2, 1, 2), strides=(2, 2**63 - 1, 1))).tolist() == [[[0, 1]], [[2, 3]]]
    with pytest.raises(ValueError, match='reaches element'): read_torch(tensor_file(tmp_path/'x', shape=(2,), strides=(2**62,)))


def test_plain_tensors_stay_memory_maps(tmp_path):
    "So that what reads maps block by block reads them so; turned ones come out right, too. None can be written"
    x = torch.arange(24, dtype=torch.float16).reshape(6, 4)
    torch.save(dict(whole=x, part=x[2:5], turned=x.T, column=x[:, 1], bf=x.bfloat16()), tmp_path/'x')
    got = read_torch(tmp_path/'x')
    assert isinstance(got['whole'], np.memmap) and isinstance(got['part'], np.memmap) and not got['part'].flags.owndata
    blocks = list(batches(got['part'], 4, batch=2))
    assert _place(got['part']) is not None and [i for i, _ in blocks] == [0, 2] and np.array_equal(np.concatenate([b for _, b in blocks]), x[2:5].float())
    for k, want in dict(whole=x, part=x[2:5], turned=x.T, column=x[:, 1], bf=x).items():
        assert np.array_equal(got[k], want) and not got[k].flags.writeable
    with pytest.raises(ValueError, match='read-only'): got['bf'][:] = 0


def test_names_of_lists_in_one_another_many_times_over(tmp_path, monkeypatch):
    "Forty lists, each holding the one before twice: a small file with a trillion places"
    x = []
    for _ in range(40): x = [x, x]
    monkeypatch.setattr(foreign, 'MANY', 5000)
    with pytest.raises(ValueError, match='x: more than 5,000 places'): torch_names(archive(tmp_path/'x', {'s/data.pkl': pickle.dumps(x, 2)}))
    torch.save([torch.zeros(2)] * 4000, tmp_path/'y')
    assert len(torch_names(tmp_path/'y')) == 4000


def test_many_views_of_one_bfloat16_storage_are_widened_once(tmp_path):
    x = torch.randn(500_000).to(torch.bfloat16)
    torch.save([x[i:] for i in range(300)], tmp_path/'x')
    tracemalloc.start()
    got = read_torch(tmp_path/'x')
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 12e6 and np.array_equal(got[7], x[7:].float())


# --- damage

def test_flipped_bytes_of_a_file_is_harmless(small):
    "Either a ValueError or exactly the file's values: checksums leave nothing between."
    whole, want, bad, refused = small.read_bytes(), read_torch(small), small.with_name('bad.pt'), 0
    for i in (*range(0, len(whole), 4), *range(len(whole) - 200, len(whole))):
        put(bad, whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:])
        try: assert equal(read_torch(bad), want), i
        except ValueError as e: assert str(e).startswith(str(bad)), (i, e); refused += 1
    assert refused > len(whole)/12


def test_every_cut_is_a_valueerror(small):
    whole = small.read_bytes()
    for n in (*range(0, len(whole), 7), *range(len(whole) - 50, len(whole))):
        with pytest.raises(ValueError): read_torch(put(small, whole[:n]))


edits = st.lists(st.tuples(st.integers(0, 10**6), st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from([bytes([c]) for c in unpickle._OPS])), st.booleans()), min_size=1, max_size=6)


def edited(data, changes):
    data = bytearray(data)
    for at, new, insert in changes: at %= len(data); data[at:at if insert else at + len(new)] = new
    return bytes(data)


@settings(max_examples=400, **ONE_FILE)
@given(edits)
def test_edited_programs_with_good_checksums(tmp_path, gone_bytes, changes):
    "A hostile file has right checksums: any program is a value or a ValueError, and runs nothing."
    parts = dict(gone_bytes, **{'s/data.pkl': edited(gone_bytes['s/data.pkl'], changes)})
    try: repr(type(read_torch(archive(tmp_path/'x', parts))))
    except ValueError as e: assert str(e).startswith(str(tmp_path/'x'))
    assert not (tmp_path/'ran').exists()


@pytest.fixture
def gone_bytes(tmp_path, gone):
    gone(lambda obj: torch.save(dict(model=OrderedDict(a=torch.arange(6.).reshape(2, 3), b=torch.ones(2, dtype=torch.bfloat16)), config=obj, run=Runs(os.system, f'touch {tmp_path/"ran"}'), n=np.arange(3), epoch=2), tmp_path/'s.pt'), state={'lr': 1})
    return entries(tmp_path/'s.pt')


@settings(max_examples=400, **ONE_FILE)
@given(edits, st.integers(2, 5))
def test_edited_pickles(tmp_path, changes, protocol):
    data = pickle.dumps({'video0': np.arange(4, dtype='f4'), 'g': [1, (2, 3.5), None, 'é', 2**70], 'f': np.ones((2, 2), '>f8', 'F'), 's': np.float32(1)}, protocol)
    try: reader(tmp_path)(edited(data, changes))
    except ValueError as e: assert str(e).startswith(str(tmp_path/'x.pkl'))


@settings(max_examples=300, **ONE_FILE)
@given(st.lists(st.sampled_from([bytes([c]) for c in unpickle._OPS] + [b'K\x01', b'h\x00', b'q\x00', b'cos\nsystem\n', b'ccollections\nOrderedDict\n', b'cnumpy\ndtype\n', b'cnumpy.core.multiarray\nscalar\n', short('f4'), short('storage'), b'C\x04abcd']), max_size=40))
def test_random_programs(tmp_path, ops):
    "Any order of instructions, in both readers."
    program = b'\x80\x04' + b''.join(ops) + b'.'
    for read, path in ((read_pickle, put(tmp_path/'x.pkl', program)), (read_torch, archive(tmp_path/'x', {'s/data.pkl': program}))):
        try: read(path)
        except ValueError as e: assert str(e).startswith(str(path))
