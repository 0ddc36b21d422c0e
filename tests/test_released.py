"""Released quantisers: files of the published structure with random weights give the codes of the published formulas, computed plainly."""
import inspect
import os
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch

from grnb.core import load_arrays, rng, save_arrays
from grnb.data.foreign import torch_names
from grnb.tokenizer.genius import GENIUS, Modal
from grnb.tokenizer.grdr import GRDR
from grnb.tokenizer.load import QUANTIZERS, load_quantizer
from grnb.tokenizer.released import GENIUS_DATASETS, load_genius, load_grdr, name_ids, read_clip_features


class Runs:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


def container(path, model, mark):
    "What GENIUS's training writes: the config is an object of a class that is not there when the file is read; one entry would run a command"
    there = types.ModuleType('omegaconf')
    there.DictConfig = type('DictConfig', (), dict(__module__='omegaconf'))
    config = there.DictConfig(); config.lr, config.self = 1e-4, config
    sys.modules['omegaconf'] = there
    try: torch.save(dict(model=model, optimizer=dict(state={0: dict(step=torch.tensor(1.), exp_avg=torch.ones(4, 4))}, param_groups=[dict(lr=1e-4, betas=(.9, .999))]),
                         scheduler=dict(last_epoch=20), config=config, epoch=20, scaler=dict(scale=65536.), hook=Runs(os.system, f'touch {mark}')), path)
    finally: del sys.modules['omegaconf']


# --- GRDR

def grdr_state(V, K, L, D, seed=0, t5=8):
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape, s=1.: torch.randn(*shape, generator=g) * s
    state = OrderedDict({'model.shared.weight': r(50, t5), 'model.encoder.embed_tokens.weight': r(50, t5), 'model.decoder.block.0.layer.0.SelfAttention.q.weight': r(t5, t5), 'model.lm_head.weight': r(50, t5)})
    for v in range(V):
        for side in ('encoder', 'decoder'): state.update({f'video_rqvae.{side}.mlps.{v}.mlp_layers.1.weight': r(D, D, s=D**-.5), f'video_rqvae.{side}.mlps.{v}.mlp_layers.1.bias': r(D, s=.1)})
    books = [r(K, D, s=.5) for _ in range(L)]
    for name in ('video_rqvae.rq.vq_layers.{}.embedding.weight', 'code_embedding.{}.weight', 'centroids.{}.codebook.weight'): state.update({name.format(l): b for l, b in enumerate(books)})
    return OrderedDict(state, start_token_embedding=r(1, t5), logit_scale=torch.tensor(4.605))


def grdr_formula(state, x, V, L):
    "Fact sheet 1.3 and 1.4 in plain numpy, double precision"
    out = []
    for v in range(V):
        r, codes = x.astype('f8') @ state[f'video_rqvae.encoder.mlps.{v}.mlp_layers.1.weight'].numpy().T.astype('f8') + state[f'video_rqvae.encoder.mlps.{v}.mlp_layers.1.bias'].numpy(), []
        for l in range(L):
            e = state[f'video_rqvae.rq.vq_layers.{l}.embedding.weight'].numpy().astype('f8')
            distance = 2 - 2 * (r / np.linalg.norm(r, axis=1, keepdims=True)) @ (e / np.linalg.norm(e, axis=1, keepdims=True)).T
            codes.append(distance.argmin(1)); r = r - e[codes[-1]]
        out.append(np.stack(codes, 1))
    return np.stack(out, 1)


@pytest.mark.parametrize('dataset, V, K', [('msrvtt', 4, 128), ('didemo', 4, 96), ('lsmdc', 1, 200)])
def test_grdr_at_full_size(tmp_path, dataset, V, K):
    "512 numbers a video, as released: shapes, codes, decoding, our own file."
    state, x = grdr_state(V, K, 3, 512), rng(0, 'x').standard_normal((80, 512)).astype('f4')
    torch.save(state, tmp_path/'best_model.pt')
    q = load_grdr(tmp_path/'best_model.pt', dataset)
    assert isinstance(q, GRDR) and q.sizes == (K,)*3 and q.encode(x).shape == (80, V, 3) and q.encode(x).dtype == np.uint8
    codes = grdr_formula(state, x, V, 3)
    assert np.array_equal(q.encode(x), codes)
    zq = sum(state[f'video_rqvae.rq.vq_layers.{l}.embedding.weight'].numpy()[codes[..., l]] for l in range(3))
    back = np.mean([zq[:, v] @ state[f'video_rqvae.decoder.mlps.{v}.mlp_layers.1.weight'].numpy().T + state[f'video_rqvae.decoder.mlps.{v}.mlp_layers.1.bias'].numpy() for v in range(V)], 0)
    assert np.allclose(q.decode(q.encode(x)), back, atol=1e-4)
    q.save(tmp_path/'own.safetensors')
    assert np.array_equal(load_quantizer(tmp_path/'own.safetensors').encode(x), q.encode(x))
    wrong = 'actnet' if dataset != 'msrvtt' else 'didemo'
    with pytest.raises(ValueError, match='expected views, codes and levels'): load_grdr(tmp_path/'best_model.pt', wrong)


def test_grdr_reads_only_its_tokeniser(tmp_path):
    "The T5 is damaged and nobody notices, because nobody reads it; one bit in the tokeniser is noticed."
    state, path = grdr_state(2, 8, 3, 16), tmp_path/'best_model.pt'
    torch.save(state, path)
    whole, good = path.read_bytes(), load_grdr(path)
    def hurt(name):
        at = whole.index(state[name].numpy().tobytes())
        (tmp_path/'hurt.pt').write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        return load_grdr(tmp_path/'hurt.pt')
    x = rng(1, 'x').standard_normal((30, 16)).astype('f4')
    for k in state:
        if k.startswith('model.') or k == 'start_token_embedding': assert np.array_equal(hurt(k).encode(x), good.encode(x))
    for k in ('video_rqvae.encoder.mlps.1.mlp_layers.1.weight', 'video_rqvae.decoder.mlps.0.mlp_layers.1.bias', 'code_embedding.2.weight'):
        with pytest.raises(ValueError, match='checksum'): hurt(k)


def test_grdr_files_of_other_forms(tmp_path):
    "The tokeniser's own file, codebooks under one name only, half precision; a container."
    state, x = grdr_state(3, 8, 2, 16), rng(2, 'x').standard_normal((30, 16)).astype('f4')
    want = grdr_formula(state, x, 3, 2)
    def load(s): torch.save(s, tmp_path/'x.pt'); return load_grdr(tmp_path/'x.pt').encode(x)
    assert np.array_equal(load({k.removeprefix('video_rqvae.'): v for k, v in state.items() if k.startswith('video_rqvae.')}), want)
    assert np.array_equal(load({k: v for k, v in state.items() if not k.startswith(('code_embedding', 'video_rqvae.rq'))}), want)
    assert np.array_equal(load(dict(model=state, epoch=1)), want)
    low = {k: v.to(torch.bfloat16) for k, v in state.items()}
    assert np.array_equal(load(low), grdr_formula({k: v.float() for k, v in low.items()}, x, 3, 2))


@pytest.mark.parametrize('change, said', [
    (lambda s: s.pop('video_rqvae.encoder.mlps.1.mlp_layers.1.weight'), r'mlps.*numbered up to 2, but only 2 are there|encoder\.mlps\.1\.mlp_layers\.1\.weight'),
    (lambda s: s.pop('video_rqvae.decoder.mlps.2.mlp_layers.1.bias'), r'decoder\.mlps\.2\.mlp_layers\.1\.bias: expected an array of shape \(16\), found none'),
    (lambda s: s.update({'video_rqvae.rq.vq_layers.9998.embedding.weight': torch.zeros(8, 16)}), 'numbered up to 9998, but only 4'),
    (lambda s: s.update({'video_rqvae.rq.vq_layers.1.embedding.weight': torch.zeros(8, 15)}), 'differ|shape'),
    (lambda s: s.update({'centroids.1.codebook.weight': torch.zeros(8, 16)}), r'centroids\.1\.codebook\.weight and .* differ'),
    (lambda s: s.update({'video_rqvae.encoder.mlps.0.mlp_layers.1.weight': torch.full((16, 16), float('nan'))}), 'finite'),
    (lambda s: s.update({'video_rqvae.encoder.mlps.0.mlp_layers.1.bias': torch.zeros(16, 1)}), r'expected shape \(16\), got'),
    (lambda s: s.update({f'video_rqvae.decoder.mlps.3.mlp_layers.1.{p}': torch.zeros(16, 16) if p == 'weight' else torch.zeros(16) for p in ('weight', 'bias')}), r'decoder\.mlps\.3\.mlp_layers\.1\.weight: no such part in a tokeniser of 3 heads and 3 levels'),
    (lambda s: s.update({'video_rqvae.encoder.mlps.0.mlp_layers.4.weight': torch.zeros(16, 16)}), r'encoder\.mlps\.0\.mlp_layers\.4\.weight: no such part'),
    (lambda s: s.update({'code_embedding.3.weight': torch.zeros(8, 16)}), r'code_embedding\.3\.weight: no such part'),
    (lambda s: s.update({'centroids.3.codebook.weight': torch.zeros(8, 16)}), r'centroids\.3\.codebook\.weight: no such part'),
    (lambda s: [s.update({'centroids.1.codebook.weight': torch.zeros(8, 16)})] + [s.pop(k) for k in list(s) if '.rq.' in k], r'centroids\.1\.codebook\.weight and code_embedding\.1\.weight differ'),
    (lambda s: [s.pop(k) for k in list(s) if k.startswith('video')], 'expected tensors named video_rqvae. or rq.vq_layers.…, found model.shared.weight')])
def test_grdr_files_that_do_not_fit(tmp_path, change, said):
    state = grdr_state(3, 8, 3, 16)
    change(state); torch.save(state, tmp_path/'x.pt')
    with pytest.raises(ValueError, match=said) as e: load_grdr(tmp_path/'x.pt')
    assert str(e.value).startswith(str(tmp_path/'x.pt'))


def test_grdr_arguments(tmp_path):
    with pytest.raises(ValueError, match="dataset: expected one of msrvtt, actnet, didemo, lsmdc, got 'coco'"): load_grdr(tmp_path/'x.pt', 'coco')
    for x in ([1, 2], torch.zeros(3), {1: torch.zeros(2)}, 'x'):
        torch.save(x, tmp_path/'x.pt')
        with pytest.raises(ValueError, match='no state dict'): load_grdr(tmp_path/'x.pt')
    with pytest.raises(FileNotFoundError): load_grdr(tmp_path/'none.pt')


# --- GENIUS

def genius_state(D, P, H, K, L, seed=0, few=None):
    "The 52 tensors (L=9). `few`: only so many random columns a matrix, the rest zeros, which is quick to make at full size"
    g = torch.Generator().manual_seed(seed)
    def r(*shape, s=1.):
        out = torch.zeros(shape)
        out[..., :few] = torch.randn(*shape[:-1], min(few or shape[-1], shape[-1]), generator=g) * s
        return out
    state = OrderedDict()
    for name, o, i in (('text_projection_layer', P, D), ('image_projection_layer', P, D), ('combiner_layer', H, 2*P), ('output_layer', D, H), ('dynamic_scalar.0', H, 2*P), ('dynamic_scalar.3', 1, H)):
        state.update({f'encoder.{name}.weight': r(o, i, s=min(few or i, i)**-.5), f'encoder.{name}.bias': r(o, s=.1)})
    for l in range(L):
        k, size = f'residual_rq.layers.{l}._codebook.', 3 if l == 0 else K
        state.update({k + 'initted': torch.ones(1), k + 'cluster_size': torch.ones(1, size), k + 'embed_avg': torch.zeros(1, size, D), k + 'embed': r(1, size, D, s=D**-.5)})
    for part in ('initted', 'cluster_size', 'embed_avg', 'embed'): state[f'vq._codebook.{part}'] = state[f'residual_rq.layers.0._codebook.{part}']
    return state


def genius_formula(state, m, L):
    "Fact sheet 2.1 in plain numpy: combiner, unit vector, nearest codeword by distance, subtract"
    w = lambda name: state[f'encoder.{name}'].numpy()
    dense = lambda name, a: a @ w(f'{name}.weight').T.astype(a.dtype) + w(f'{name}.bias')
    relu, kind = lambda a: np.maximum(a, 0), 'f8' if w('combiner_layer.weight').size < 10**6 else 'f4'
    txt, img = (a.astype(kind) * mask[:, None] for a, mask in ((m.text, m.text_mask), (m.image, m.image_mask)))
    h = np.concatenate([relu(dense('text_projection_layer', txt)), relu(dense('image_projection_layer', img))], 1)
    gate = 1 / (1 + np.exp(-dense('dynamic_scalar.3', relu(dense('dynamic_scalar.0', h)))))
    y = (dense('output_layer', relu(dense('combiner_layer', h))) + gate * txt + (1 - gate) * img).astype('f8')
    r, codes = y / np.linalg.norm(y, axis=1, keepdims=True), []
    for l in range(L):
        e = state[f'residual_rq.layers.{l}._codebook.embed'][0].numpy().astype('f8')
        codes.append(((e * e).sum(1) - 2 * r @ e.T).argmin(1)); r = r - e[codes[-1]]
    return np.stack(codes, 1)


def modal_items(n, D, seed=0):
    g = rng(seed, 'items')
    masks = g.integers(1, 4, n)
    return Modal(*(g.standard_normal((n, D)).astype('f4') for _ in range(2)), masks & 1 > 0, masks & 2 > 0)


@pytest.mark.parametrize('prefix', ['', 'quantizer.'])
def test_genius_small(tmp_path, prefix):
    "Both files, with the config of a class that is not there and a command that never runs."
    state, items = genius_state(12, 20, 24, 16, 9), modal_items(200, 12)
    model = OrderedDict({prefix + k: v for k, v in state.items()})
    if prefix: model.update({'embed_projector.0.weight': torch.zeros(60, 12), 'id_generator.shared.weight': torch.zeros(50, 2), 'id_generator.encoder.final_layer_norm.weight': torch.zeros(2)})
    container(tmp_path/'x.pth', model, tmp_path/'ran')
    assert len(state) == 52
    q = load_genius(tmp_path/'x.pth')
    assert isinstance(q, GENIUS) and q.settings['modality'] == 'nearest' and q.sizes == (3,) + (16,)*8
    assert np.array_equal(q.encode(items), genius_formula(state, items, 9)) and not (tmp_path/'ran').exists() and 'omegaconf' not in sys.modules
    zq = sum(state[f'residual_rq.layers.{l}._codebook.embed'][0].numpy()[q.encode(items)[:, l]] for l in range(9))
    assert np.allclose(q.decode(q.encode(items)), zq / np.linalg.norm(zq, axis=1, keepdims=True), atol=1e-5)
    q.save(tmp_path/'own.safetensors')
    own = load_quantizer(tmp_path/'own.safetensors')
    assert np.array_equal(own.encode(items), q.encode(items)) and own.settings == q.settings
    single = [q.encode(Modal(*(a[i:i + 1] for a in items))) for i in range(20)]                       # the released code drops the batch axis of one
    assert np.array_equal(np.concatenate(single), q.encode(items)[:20])


def test_genius_at_full_size(tmp_path):
    "768 numbers, 2560 and 5120 units, 3 + 8 x 4096 codes: a file of about 440 MB, read and coded."
    state, items, path = genius_state(768, 2560, 5120, 4096, 9, few=6), modal_items(24, 768, 3), tmp_path/'rq_clip_large.pth'
    try:
        container(path, state, tmp_path/'ran')
        assert path.stat().st_size > 430e6
        names = torch_names(path)
        assert names['model/encoder.combiner_layer.weight'] == ('f4', (5120, 5120)) and names['model/residual_rq.layers.8._codebook.embed'] == ('f4', (1, 4096, 768))
        assert sum(int(np.prod(s)) for k, (_, s) in names.items() if k.startswith('model/encoder.')) == 60_314_369
        q = load_genius(path)
        assert q.sizes == (3,) + (4096,)*8
        codes = q.encode(items)
        assert codes.dtype == np.uint16 and codes.shape == (24, 9) and np.array_equal(codes, genius_formula(state, items, 9)) and len(np.unique(codes[:, 1])) > 5
    finally: path.unlink(missing_ok=True)


def test_genius_level_0_is_the_nearest_not_the_mask(tmp_path):
    "The released first level was learned without labels: the same images get whatever code their vectors are nearest to."
    state, items = genius_state(12, 20, 24, 16, 9), modal_items(200, 12)
    container(tmp_path/'x.pth', state, tmp_path/'ran')
    first = load_genius(tmp_path/'x.pth').encode(items)[:, 0]
    assert any(len(np.unique(first[(items.image_mask == a) & (items.text_mask == b)])) > 1 for a, b in ((True, False), (False, True), (True, True)))


def test_genius_reads_only_what_makes_codes(tmp_path):
    state, path = genius_state(12, 20, 24, 16, 3), tmp_path/'x.pth'
    g = torch.Generator().manual_seed(1)
    for k in state:
        if k.endswith(('embed_avg', 'cluster_size')): state[k] = torch.randn(state[k].shape, generator=g)
    container(path, state, tmp_path/'ran')
    whole, items = path.read_bytes(), modal_items(40, 12)
    codes = load_genius(path).encode(items)
    for k in ('residual_rq.layers.1._codebook.embed_avg', 'residual_rq.layers.2._codebook.cluster_size', 'residual_rq.layers.2._codebook.embed', 'encoder.output_layer.weight'):
        at = whole.index(state[k].numpy().tobytes())
        (tmp_path/'hurt.pth').write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        if k.endswith(('embed_avg', 'cluster_size')): assert np.array_equal(load_genius(tmp_path/'hurt.pth').encode(items), codes)
        else:
            with pytest.raises(ValueError, match='checksum'): load_genius(tmp_path/'hurt.pth')


@pytest.mark.parametrize('change, said', [
    (lambda s: s.pop('encoder.dynamic_scalar.3.bias'), r'encoder\.dynamic_scalar\.3\.bias: expected an array of shape \(1\), found none'),
    (lambda s: s.pop('encoder.text_projection_layer.weight'), r'text_projection_layer\.weight: expected an array of shape \(\*, \*\), found none'),
    (lambda s: s.update({'encoder.combiner_layer.weight': torch.zeros(24, 41)}), r'combiner_layer\.weight: expected shape \(\*, 40\), got \(24, 41\)'),
    (lambda s: s.pop('residual_rq.layers.1._codebook.embed'), 'numbered up to 2, but only 2 are there'),
    (lambda s: s.update({'residual_rq.layers.1._codebook.embed': torch.zeros(16, 12)}), r'expected shape \(1, \*, 12\), got \(16, 12\)'),
    (lambda s: s.update({'residual_rq.layers.9000._codebook.embed': torch.zeros(1, 16, 12)}), 'numbered up to 9000, but only 4'),
    (lambda s: s.update({'vq._codebook.embed': torch.zeros(1, 3, 12)}), r'vq\._codebook\.embed and residual_rq\.layers\.0\._codebook\.embed differ'),
    (lambda s: s.update({'residual_rq.layers.0._codebook.embed': torch.zeros(1, 4, 12), 'vq._codebook.embed': torch.zeros(1, 4, 12)}), r'expected shape \(1, 3, 12\)'),
    (lambda s: s.update({'encoder.text_projection_layer2.weight': torch.zeros(20, 20)}), r'encoder\.text_projection_layer2\.weight: no such part in a quantiser of 3 levels'),
    (lambda s: s.update({'residual_rq.project_in.weight': torch.zeros(12, 12)}), r'residual_rq\.project_in\.weight: no such part'),
    (lambda s: s.update({'residual_rq.layers.3._codebook.embed_avg': torch.zeros(1, 16, 12)}), r'layers\.3\._codebook\.embed_avg: no such part'),
    (lambda s: s.update({'residual_rq.layers.1.project_out.bias': torch.zeros(12)}), r'layers\.1\.project_out\.bias: no such part'),
    (lambda s: [s.pop(k) for k in list(s) if 'residual' in k], 'expected tensors named residual_rq. or quantizer.residual_rq.…')])
def test_genius_files_that_do_not_fit(tmp_path, change, said):
    state = genius_state(12, 20, 24, 16, 3)
    change(state); container(tmp_path/'x.pth', state, tmp_path/'ran')
    with pytest.raises(ValueError, match=said) as e: load_genius(tmp_path/'x.pth')
    assert str(e.value).startswith(str(tmp_path/'x.pth'))


def test_genius_against_the_library_that_made_the_released_file(tmp_path):
    "The state dict of vector-quantize-pytorch's own modules, arranged as in GENIUS's code; its forward pass gives the codes."
    vq = pytest.importorskip('vector_quantize_pytorch')
    torch.manual_seed(0)
    class Quantizer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vq = vq.VectorQuantize(dim=12, codebook_size=3, decay=.9, kmeans_init=True)
            self.residual_rq = vq.ResidualVQ(dim=12, num_quantizers=9, codebook_size=16, decay=.9, kmeans_init=True, threshold_ema_dead_code=2)
            self.residual_rq.layers[0] = self.vq
    model, items = Quantizer(), modal_items(100, 12)
    z = torch.nn.functional.normalize(torch.randn(500, 12), dim=1)
    model.train(); model.residual_rq(z); model.eval()                             # k-means start
    state = OrderedDict({k: v for k, v in genius_state(12, 20, 24, 16, 9).items() if k.startswith('encoder.')}, **model.state_dict())
    assert {k for k in state if k.endswith('.embed')} == {'vq._codebook.embed', *(f'residual_rq.layers.{l}._codebook.embed' for l in range(9))}
    container(tmp_path/'x.pth', state, tmp_path/'ran')
    q = load_genius(tmp_path/'x.pth')
    with torch.no_grad(): codes = model.residual_rq(torch.from_numpy(q.embed(items)))[1]
    assert np.array_equal(q.encode(items), codes)


# --- CLIP features

def features(n=30, D=12, **more):
    m = modal_items(n, D)
    return dict(dict(img=torch.tensor(m.image).half(), text=torch.tensor(m.text).half(), img_mask=torch.tensor(m.image_mask).long(), text_mask=torch.tensor(m.text_mask).long(), id_to_index={90_000_000 + 3*i: n - 1 - i for i in range(n)}), **more)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_clip_features(tmp_path, dtype):
    d = features()
    d.update(img=d['img'].to(dtype), text=d['text'].to(dtype)); torch.save(d, tmp_path/'f.pt')
    f = read_clip_features(tmp_path/'f.pt')
    assert np.array_equal(f.image, d['img']) and f.image.dtype == d['img'].numpy().dtype and np.array_equal(f.text, d['text']) and not f.image.flags.owndata
    assert f.image_mask.dtype == bool and np.array_equal(f.image_mask, d['img_mask']) and np.array_equal(f.text_mask, d['text_mask'])
    assert all(f.ids[row] == i for i, row in d['id_to_index'].items()) and f.id_to_index == d['id_to_index']
    state = genius_state(12, 20, 24, 16, 9)
    container(tmp_path/'x.pth', state, tmp_path/'ran')
    want = genius_formula(state, Modal(*(a.astype('f4') for a in f[:2]), *f[2:4]), 9)
    assert isinstance(f.image, np.memmap) and isinstance(f.text, np.memmap)                           # encoded row block by row block
    assert np.array_equal(load_genius(tmp_path/'x.pth').encode(f.items), want)


@pytest.mark.parametrize('change, said', [
    (dict(img=torch.zeros(30, 11)), 'text: expected float16 or float32'), (dict(text=torch.zeros(29, 12)), 'text: expected'), (dict(img=torch.zeros(30)), 'img: expected float16 or float32'),
    (dict(img=torch.zeros(30, 12).double()), 'img: expected float16 or float32 .* got float64'), (dict(img=[1, 2]), 'img: expected'), (dict(img_mask=torch.ones(29)), r'img_mask: expected 30 values, each 0 or 1, got float32 \(29,\)'),
    (dict(text_mask=torch.full((30,), 2)), 'text_mask: expected 30 values, each 0 or 1'), (dict(text_mask=torch.full((30,), float('nan'))), 'text_mask: expected'), (dict(text_mask=None), 'text_mask: expected'),
    (dict(img_mask=[[1], [1, 0]] * 15), 'img_mask: expected 30 values, each 0 or 1, got lists of different lengths'),
    (dict(id_to_index={i: 0 for i in range(30)}), 'one id for each of 30 rows, got 30 ids, 29 rows without'), (dict(id_to_index={i: i for i in range(29)}), 'got 29 ids, 1 rows'), (dict(id_to_index={i: i + 1 for i in range(30)}), 'ids to rows below 30'),
    (dict(id_to_index={str(i): i for i in range(30)}), 'both whole numbers'), (dict(id_to_index={i - 1: i for i in range(30)}), 'both whole numbers'), (dict(id_to_index={i: torch.tensor(i) for i in range(30)}), 'both whole numbers'),
    (dict(id_to_index=[1]), 'expected a dict'), (dict(id_to_index={torch.tensor(i): i for i in range(30)}), 'tensors as keys, so no id can be looked up')])
def test_clip_features_that_do_not_fit(tmp_path, change, said):
    torch.save(features(**change), tmp_path/'f.pt')
    with pytest.raises(ValueError, match=said) as e: read_clip_features(tmp_path/'f.pt')
    assert str(e.value).startswith(str(tmp_path/'f.pt'))


def test_clip_features_of_another_kind(tmp_path):
    for x in ({'img': torch.zeros(2, 2)}, [1], torch.zeros(2)):
        torch.save(x, tmp_path/'f.pt')
        with pytest.raises(ValueError, match='expected a dict with img, text'): read_clip_features(tmp_path/'f.pt')


def test_hashed_ids():
    assert name_ids(np.array([0, 10_000_001, 109_999_999])) == ['0:0', '1:1', '10:9999999'] and name_ids([4_500_007], 'query') == ['9:7'] and GENIUS_DATASETS[9] == 'MSCOCO' and name_ids(np.empty(0, int)) == []
    for ids, kind in (([-1], 'item'), ([110_000_000], 'item'), ([5_500_000], 'query'), ([1.5], 'item'), ([[1]], 'item'), ([1], 'user')):
        with pytest.raises(ValueError, match='ids: expected|kind: expected'): name_ids(ids, kind)


# --- the registry

def test_every_quantiser_has_its_own_name():
    assert all(k == q.kind and k for k, q in QUANTIZERS.items()) and set(QUANTIZERS) == {'residual_kmeans', 'rqvae', 'pq', 'hierarchical', 'grdr', 'genius', 'avg', 'cart', 'whitened_kmeans'}
    assert all(hasattr(q, m) for q in QUANTIZERS.values() for m in ('fit', 'encode', 'decode', 'save', 'from_arrays'))


@pytest.mark.parametrize('kind', QUANTIZERS)
def test_every_kind_comes_back_from_its_file_and_misses_nothing_silently(tmp_path, kind):
    "Codes and settings survive; a file without one array or one setting is refused, never filled with a default."
    x, cls = rng(0, 'all').standard_normal((120, 8)).astype('f4'), QUANTIZERS[kind]
    q = cls(**{k: v for k, v in dict(K=8, steps=4, seed=0).items() if k in inspect.signature(cls.__init__).parameters}).fit(x)
    q.save(tmp_path/'q')
    again = load_quantizer(tmp_path/'q')
    assert type(again) is cls and again.sizes == q.sizes and np.array_equal(again.encode(x), q.encode(x))
    arrays, meta = load_arrays(tmp_path/'q')
    arrays = {k: v.copy() for k, v in arrays.items()}
    for part, whole in ((0, arrays), (1, meta)):
        for name in whole:
            parts = [dict(arrays), dict(meta)]
            del parts[part][name]
            save_arrays(tmp_path/'less', *parts)
            with pytest.raises(ValueError, match='less: '): load_quantizer(tmp_path/'less')
