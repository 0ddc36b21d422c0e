"""X-Pool: the head against numbers of 64 bits, the folded form against the head, checkpoints, training, the released measurements."""
import os
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import CLIPConfig, CLIPModel

from grnb.core import load_arrays, save_arrays, torch_seed, unit
from grnb.rerank.frames import Folded, Source, best_rows, score_blocks, score_candidates, search_all
from grnb.rerank.pooling import XPoolHead, build_clip, load_xpool, similarity
from grnb.rerank.protocol import candidate_ranks, lists_by_text, per_query, released_ranks, rerank_ranks
from grnb.rerank.xpool import XPool, _groups, _loss, _Net, _steps, places, read_xpool
from grnb.train import train

fast = settings(max_examples=40, deadline=None)


def random_head(width, seed=0, strength=1.):
    "A head whose every weight counts"
    g = np.random.default_rng([seed, width])
    head = XPoolHead(width)
    with torch.no_grad():
        for p in head.parameters(): p += torch.from_numpy((strength * g.standard_normal(p.shape) * (0.5 if p.ndim < 2 else width**-0.5)).astype('f4'))
    return head.eval()


def written_out(head, t, f):
    "Similarity (Q, N) in float64, from the definition, pair by pair"
    w = {k: v.double().numpy() for k, v in head.state_dict().items()}
    norm = lambda x, n: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w[f'layer_norm{n}.weight'] + w[f'layer_norm{n}.bias']
    proj = lambda x, n: x @ w[f'{n}.weight'].T + w[f'{n}.bias']
    out = np.zeros((len(t), len(f)))
    for i, text in enumerate(t.astype(float)):
        for j, frames in enumerate(f.astype(float)):
            q, k, v = proj(norm(text, 1), 'cross_attn.q_proj'), proj(norm(frames, 1), 'cross_attn.k_proj'), proj(norm(frames, 1), 'cross_attn.v_proj')
            l = k @ q / np.sqrt(len(text))
            p = np.exp(l - l.max())
            a = norm(proj(p / p.sum() @ v, 'cross_attn.out_proj'), 2)
            o = norm(a + proj(a, 'linear_proj'), 3)
            out[i, j] = o @ text / np.linalg.norm(o) / np.linalg.norm(text)
    return out


@st.composite
def worlds(draw):
    "A head, queries, frames and candidate lists"
    g = np.random.default_rng(draw(st.integers(0, 2**20)))
    Q, N, F, D, C = draw(st.integers(1, 5)), draw(st.integers(1, 12)), draw(st.integers(1, 5)), draw(st.integers(2, 24)), draw(st.integers(1, 9))
    scale = draw(st.sampled_from([1e-2, 1., 30.]))
    t, f = (g.standard_normal(s).astype('f4') * scale for s in ((Q, D), (N, F, D)))
    rows = np.full((Q, C), -1)
    for r in rows:
        some = g.permutation(N)[:g.integers(0, min(C, N) + 1)]
        r[g.permutation(C)[:len(some)]] = some
    return random_head(D, draw(st.integers(0, 9))), t, f, rows


# --- the head

def test_head_has_the_published_size_and_starts_as_the_identity():
    head = XPoolHead()
    assert sum(p.numel() for p in head.parameters()) == 1_316_352 and head.dropout.p == 0.3
    for name, p in head.named_parameters():
        want = torch.eye(512) if p.ndim == 2 else torch.ones(512) if 'norm' in name and 'weight' in name else torch.zeros(512)
        assert torch.equal(p.detach(), want), name


def test_names_and_shapes_are_the_released_ones():
    want = {f'cross_attn.{n}_proj.{p}': (512, 512) if p == 'weight' else (512,) for n in 'q k v out'.split() for p in ('weight', 'bias')}
    want |= {'linear_proj.weight': (512, 512), 'linear_proj.bias': (512,)} | {f'layer_norm{n}.{p}': (512,) for n in (1, 2, 3) for p in ('weight', 'bias')}
    assert {k: tuple(v.shape) for k, v in XPoolHead().state_dict().items()} == want


@fast
@given(worlds())
def test_module_is_the_definition(world):
    head, t, f, _ = world
    with torch.inference_mode(): got = similarity(torch.from_numpy(t), head(torch.from_numpy(t), torch.from_numpy(f))).numpy()
    assert np.allclose(got, written_out(head, t, f), atol=3e-5)


def test_dropout_works_in_training_only_and_only_on_the_linear_branch():
    t, f = torch.randn(2, 8), torch.randn(3, 4, 8)
    head = XPoolHead(8, 0.9)
    with torch.no_grad(): head.linear_proj.weight.zero_()
    assert torch.equal(head.train()(t, f), head.eval()(t, f))          # nothing on that branch, nothing to drop
    head = XPoolHead(8, 0.9)
    assert not torch.allclose(head.train()(t, f), head.eval()(t, f))


@pytest.mark.parametrize('width, dropout', [(1, 0.3), (0, 0.3), (8, 1.), (8, -.1), (2.5, 0.)])
def test_head_refuses(width, dropout):
    with pytest.raises(ValueError): XPoolHead(width, dropout)


# --- the folded form

@fast
@given(worlds(), st.sampled_from([1, 40, 2**23]))
def test_folded_is_the_definition(world, block):
    head, t, f, rows = world
    scorer, want = Folded(head, block=block), written_out(head, t, f)
    ready = scorer.prepare(f)
    for frames in (f, ready):
        got = score_candidates(scorer, t, frames, rows)
        assert got.dtype == np.float32 and (got[rows < 0] == -np.inf).all()
        assert np.allclose(got[rows >= 0], np.take_along_axis(want, np.maximum(rows, 0), 1)[rows >= 0], atol=1e-4)
        blocks = list(score_blocks(scorer, t, frames))
        assert np.allclose(np.concatenate([s.numpy() for _, s in blocks], 1), want, atol=1e-4)
        assert [i for i, _ in blocks] == np.cumsum([0] + [s.shape[1] for _, s in blocks])[:-1].tolist()
        one = np.concatenate([score_candidates(scorer, t[i:i + 1], frames, rows[i:i + 1]) for i in range(len(t))])
        assert np.allclose(one[rows >= 0], got[rows >= 0], atol=1e-5)


def test_folded_at_full_size_is_as_near_as_the_module():
    "Both are held against 64 bits"
    g, head = np.random.default_rng(0), random_head(512, strength=0.5)
    t, f = g.standard_normal((2, 512)).astype('f4'), unit(g.standard_normal((3, 12, 512)).astype('f4'))
    want = written_out(head, t, f)
    with torch.inference_mode(): module = similarity(torch.from_numpy(t), head(torch.from_numpy(t), torch.from_numpy(f))).numpy()
    folded = score_candidates(Folded(head), t, f, np.tile(np.arange(3), (2, 1)))
    assert np.abs(module - want).max() < 1e-5 and np.abs(folded - want).max() < 1e-5


def test_half_precision_is_near_and_counts_its_bytes():
    g, head = np.random.default_rng(0), random_head(64, strength=0.3)
    t, f = g.standard_normal((4, 64)).astype('f4'), g.standard_normal((9, 6, 64)).astype('f4')
    scorer, rows = Folded(head), np.tile(np.arange(9), (4, 1))
    want = score_candidates(scorer, t, f, rows)
    for dtype, size, bound in (('float32', 4, 1e-6), ('float16', 2, 2e-3), ('bfloat16', 2, 2e-2)):
        ready = scorer.prepare(f, dtype)
        assert ready.bytes() == dict(frames=9 * 6 * 64 * size, tables=9 * (36 + 49 + 64) * 4)
        moved = np.abs(score_candidates(scorer, t, ready, rows) - want).max()
        assert moved <= bound and (dtype == 'float32' or moved > 0)


def test_degenerate_frames_score_as_defined():
    "Constant frames, zero frames and equal frames: norms without a deviation"
    head, g = random_head(8), np.random.default_rng(0)
    t, f = g.standard_normal((2, 8)).astype('f4'), np.zeros((3, 4, 8), 'f4')
    f[1] = 5; f[2] = g.standard_normal(8)
    got = score_candidates(Folded(head), t, f, np.tile(np.arange(3), (2, 1)))
    assert np.allclose(got, written_out(head, t, f), atol=1e-4)


def test_small_outputs_meet_the_norms_epsilon():
    "Where the attention hardly says anything, the epsilon of the second and third norm decides"
    g, f = np.random.default_rng(0), np.zeros((3, 4, 8), 'f4')
    t, f[1:] = g.standard_normal((2, 8)).astype('f4'), g.standard_normal((2, 4, 8))
    for part in ('cross_attn.out_proj', 'layer_norm2'):
        head = random_head(8)
        with torch.no_grad(): head.get_submodule(part).weight.mul_(3e-3), head.get_submodule(part).bias.mul_(3e-3)
        if part == 'layer_norm2': head.linear_proj.bias.data.zero_()
        assert np.allclose(score_candidates(Folded(head), t, f, np.tile(np.arange(3), (2, 1))), written_out(head, t, f), atol=1e-4), part
    assert score_candidates(Folded(XPoolHead(8)), t, f[:1], [[0], [0]]).tolist() == [[0], [0]]      # nothing at all has no direction: 0, as in the module


def test_scores_follow_the_permutation_of_frames_and_the_length_of_queries():
    head, g = random_head(16), np.random.default_rng(1)
    t, f, rows = g.standard_normal((3, 16)).astype('f4'), g.standard_normal((5, 4, 16)).astype('f4'), np.tile(np.arange(5), (3, 1))
    scorer = Folded(head)
    want = score_candidates(scorer, t, f, rows)
    assert np.allclose(score_candidates(scorer, t, f[:, ::-1], rows), want, atol=1e-5)
    assert np.allclose(score_candidates(scorer, t, np.repeat(f, 2, 1), rows), want, atol=1e-5)      # every frame twice: the same weights
    assert np.allclose(score_candidates(scorer, 2 * t, f, rows), want, atol=1e-4)                   # up to the norm's epsilon


@fast
@given(worlds(), st.integers(1, 15), st.sampled_from([1, 60, 2**23]))
def test_search_all_is_the_sorted_matrix(world, k, block):
    head, t, f, _ = world
    scorer = Folded(head, block=block)
    matrix = np.concatenate([s.numpy() for _, s in score_blocks(scorer, t, f)], 1)
    rows, scores = search_all(scorer, t, f, k)
    n = min(k, len(f))
    want = np.argsort(-matrix, 1, kind='stable')[:, :n]
    assert rows.shape == scores.shape == (len(t), k) and (rows[:, n:] == -1).all() and (scores[:, n:] == -np.inf).all()
    assert (rows[:, :n] == want).all() and (scores[:, :n] == np.take_along_axis(matrix, want, 1)).all()


def test_ties_go_to_lower_rows_wherever_they_stand():
    scores, rows = np.float32([[.5, .7, .5, .7, 9]]), np.array([[8, 6, 2, 3, -1]])
    out, score = best_rows(scores, rows, 6)
    assert out.tolist() == [[3, 6, 2, 8, -1, -1]] and score[0, :4].tolist() == [np.float32(.7)] * 2 + [.5] * 2
    head, f = XPoolHead(4).eval(), np.ones((40, 2, 4), 'f4') * [1, -1, 1, -1]
    assert search_all(Folded(head, block=64), np.eye(4)[:1], f, 5)[0].tolist() == [[0, 1, 2, 3, 4]]     # equal videos, in several blocks


def test_frames_come_from_memory_disk_or_a_store(tmp_path):
    g, head = np.random.default_rng(0), random_head(8)
    t, f = g.standard_normal((3, 8)).astype('f4'), g.standard_normal((20, 3, 8)).astype('f4')
    rows = g.integers(-1, 20, (3, 6))
    class Store:
        shape, asked = f.shape, []
        def take(self, which):
            self.asked.append(np.asarray(which).tolist())
            return f[which]
    np.save(tmp_path/'f.npy', f)
    scorer, store = Folded(head), Store()
    want = score_candidates(scorer, t, f, rows)
    for source in (f.tolist(), f.astype('f8'), np.load(tmp_path/'f.npy', mmap_mode='r'), tmp_path/'f.npy', str(tmp_path/'f.npy'), store, Source(f, 8)):
        assert np.allclose(score_candidates(scorer, t, source, rows), want, atol=1e-6)
        assert np.allclose(scorer.prepare(source).frames, scorer.prepare(f).frames)
    assert set(store.asked[0]) == set(np.maximum(rows, 0).ravel())      # only candidates are read, each once
    assert len(store.asked[0]) == len(set(store.asked[0]))


def test_nothing_to_do_is_nothing():
    scorer, f = Folded(XPoolHead(4)), np.ones((3, 2, 4), 'f4')
    assert score_candidates(scorer, np.zeros((0, 4)), f, np.zeros((0, 5), int)).shape == (0, 5)
    assert score_candidates(scorer, np.ones((2, 4)), f, np.zeros((2, 0), int)).shape == (2, 0)
    assert (score_candidates(scorer, np.ones((2, 4)), f, np.full((2, 3), -1)) == -np.inf).all()
    rows, scores = search_all(scorer, np.ones((2, 4)), f[:0], 3)
    assert (rows == -1).all() and (scores == -np.inf).all()
    assert search_all(scorer, np.zeros((0, 4)), f, 3)[0].shape == (0, 3)


def bad_frames():
    f = np.ones((3, 2, 4), 'f4')
    nan = f.copy(); nan[1, 0, 0] = np.nan
    return [(f[0], 'expected shape'), (f[..., :3], r'expected shape \(N, F, 4\)'), (f[:, :0], 'expected shape'), (nan, 'NaN or infinity'), (f.astype(str), 'dtype'), ([[1], [1, 2]], 'different shapes'), (f * np.float64(1e300), 'NaN or infinity')]


@pytest.mark.parametrize('frames, said', bad_frames(), ids=lambda x: x if isinstance(x, str) else '')
def test_bad_frames_are_named(frames, said):
    with np.errstate(over='ignore'), pytest.raises(ValueError, match=f'frames: .*{said}'): score_candidates(Folded(XPoolHead(4)), np.ones((1, 4)), frames, np.ones((1, 1), int))


def test_bad_queries_candidates_and_settings_are_named(tmp_path):
    scorer, f, q, c = Folded(XPoolHead(4)), np.ones((3, 2, 4), 'f4'), np.ones((2, 4)), np.zeros((2, 2), int)
    for queries, rows, said in ((q[:, :3], c, 'queries: expected width 4'), (q * 0, c, 'queries: row 0 is zero'), (q * np.nan, c, 'queries: expected finite'), (q, c[:1], 'candidates: expected integers'),
                                (q, c + .5, 'candidates: expected integers'), (q, c + 3, 'candidates: expected −1 to 2'), (q, c - 2, 'candidates: expected −1 to 2')):
        with pytest.raises(ValueError, match=said): score_candidates(scorer, queries, f, rows)
    with pytest.raises(ValueError, match='dtype: expected one of float32'): scorer.prepare(f, 'int8')
    with pytest.raises(ValueError, match='k: expected at least 1'): search_all(scorer, q, f, 0)
    (tmp_path/'f.npy').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='no .npy file'): score_candidates(scorer, q, tmp_path/'f.npy', c)
    class Liar:
        shape = (3, 2, 4)
        def take(self, rows): return np.ones((len(rows), 2, 5))
    with pytest.raises(ValueError, match='frames: expected frames'): score_candidates(scorer, q, Liar(), c)


# --- checkpoints

def tiny_clip():
    return CLIPConfig(text_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50, max_position_embeddings=12, eos_token_id=49, projection_dim=16),
                      vision_config=dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4, projection_dim=16), projection_dim=16)


def checkpoint(path, change=None, width=16):
    "A file of the released structure with random weights; `change` works on the whole dict"
    with torch_seed(0, 'clip'): clip = CLIPModel(tiny_clip())
    head = random_head(width)
    state = OrderedDict({f'clip.{k}': v for k, v in clip.state_dict().items()})
    state['clip.text_model.embeddings.position_ids'], state['clip.vision_model.embeddings.position_ids'] = torch.arange(12)[None], torch.arange(5)[None]
    state.update({f'pool_frames.{k}': v for k, v in head.state_dict().items()})
    saved = dict(epoch=3, state_dict=state, optimizer=dict(state={0: dict(step=7, exp_avg=torch.zeros(4))}, param_groups=[dict(lr=1e-6, params=[0])]))
    if change: saved = change(saved) or saved
    torch.save(saved, path)
    return head, clip.eval()


def test_checkpoint_loads_strictly(tmp_path):
    head, clip = checkpoint(tmp_path/'m.pth')
    got = load_xpool(tmp_path/'m.pth')
    assert got.epoch == 3 and not got.head.training
    for (k, a), (_, b) in zip(head.state_dict().items(), got.head.state_dict().items()): assert torch.equal(a, b), k
    assert set(got.clip) == set(clip.state_dict())                      # kept apart, unread, no position_ids
    assert all(not isinstance(v, np.ndarray) for v in got.clip.values())
    whole = load_xpool(tmp_path/'m.pth', clip=tiny_clip()).clip
    ids, pixels = torch.tensor([[1, 5, 49, 3], [2, 2, 2, 49]]), torch.randn(2, 3, 8, 8)
    with torch.inference_mode(): assert torch.equal(whole(ids, pixels).logits_per_image, clip(ids, pixels).logits_per_image)
    assert torch.equal(build_clip(got.clip, tiny_clip()).logit_scale, clip.logit_scale)
    assert all(p.device.type == 'cpu' for p in whole.state_dict().values()) and all(b.device.type == 'cpu' for b in whole.buffers())


def test_full_size_clip_has_the_released_names_and_shapes():
    with torch.device('meta'): have = {k: tuple(v.shape) for k, v in CLIPModel(CLIPConfig()).state_dict().items()}
    want = {'logit_scale': (), 'text_model.embeddings.token_embedding.weight': (49408, 512), 'text_model.embeddings.position_embedding.weight': (77, 512),
            'vision_model.embeddings.class_embedding': (768,), 'vision_model.embeddings.patch_embedding.weight': (768, 3, 32, 32), 'vision_model.embeddings.position_embedding.weight': (50, 768),
            'visual_projection.weight': (512, 768), 'text_projection.weight': (512, 512)}
    for side, d, norms in (('text', 512, ['final_layer_norm']), ('vision', 768, ['pre_layrnorm', 'post_layernorm'])):
        for n in [f'{side}_model.{n}' for n in norms]: want |= {f'{n}.weight': (d,), f'{n}.bias': (d,)}
        for l in range(12):
            at = f'{side}_model.encoder.layers.{l}'
            for n in 'k v q out'.split(): want |= {f'{at}.self_attn.{n}_proj.weight': (d, d), f'{at}.self_attn.{n}_proj.bias': (d,)}
            for n in (1, 2): want |= {f'{at}.layer_norm{n}.weight': (d,), f'{at}.layer_norm{n}.bias': (d,)}
            want |= {f'{at}.mlp.fc1.weight': (4 * d, d), f'{at}.mlp.fc1.bias': (4 * d,), f'{at}.mlp.fc2.weight': (d, 4 * d), f'{at}.mlp.fc2.bias': (d,)}
    assert have == want
    config = CLIPConfig()
    assert {config.text_config.hidden_act, config.vision_config.hidden_act} == {'quick_gelu'} and (config.text_config.num_attention_heads, config.vision_config.num_attention_heads) == (8, 12)


def edit(**changes):
    def change(saved):
        for k, v in changes.items():
            name = k.replace('__', '.')
            saved['state_dict'].pop(name) if v is None else saved['state_dict'].update({name: v})
    return change


@pytest.mark.parametrize('change, said', [
    (edit(pool_frames__cross_attn__k_proj__bias=None), 'pool_frames.cross_attn.k_proj.bias: expected shape \\(16,\\), found none'),
    (edit(pool_frames__cross_attn__q_proj__weight=None), 'expected shape'),
    (edit(pool_frames__extra=torch.zeros(1)), 'pool_frames.extra: no such part'),
    (edit(video_model__x=torch.zeros(1)), 'video_model.x: no such part in X-Pool'),
    (edit(pool_frames__layer_norm1__weight=torch.zeros(15)), r'layer_norm1.weight: expected shape \(16,\), got \(15,\)'),
    (edit(pool_frames__cross_attn__q_proj__weight=torch.zeros(16, 8)), r'q_proj.weight: expected shape \(16, 16\), got \(16, 8\)'),
    (edit(pool_frames__layer_norm1__weight=torch.zeros(16, dtype=torch.int32)), 'expected a tensor of float numbers'),
    (edit(pool_frames__layer_norm1__weight='text'), 'expected a tensor of float numbers'),
    (edit(pool_frames__layer_norm1__bias=torch.full((16,), torch.inf)), 'NaN or infinity'),
    (lambda s: s.pop('state_dict') and None, 'expected a dict with state_dict'),
    (lambda s: [1, 2], 'expected a dict with state_dict'),
    (lambda s: dict(state_dict={}), 'found none'),
])
def test_malformed_checkpoints_are_named(tmp_path, change, said):
    checkpoint(tmp_path/'m.pth', change)
    with pytest.raises(ValueError, match=said): load_xpool(tmp_path/'m.pth')


@pytest.mark.parametrize('change, said', [(edit(clip__logit_scale=None), 'clip.logit_scale: expected shape'), (edit(clip__text_model__more=torch.zeros(2)), 'clip.text_model.more: no such part'),
                                          (edit(clip__text_projection__weight=torch.zeros(16, 17)), r'clip.text_projection.weight: expected shape \(16, 16\)')])
def test_malformed_clip_parts_are_named_where_clip_is_asked_for(tmp_path, change, said):
    checkpoint(tmp_path/'m.pth', change)
    assert load_xpool(tmp_path/'m.pth').head.width == 16
    with pytest.raises(ValueError, match=said): load_xpool(tmp_path/'m.pth', clip=tiny_clip())


def test_wide_claims_cost_nothing(tmp_path):
    "A matrix that claims to be huge is refused before a head of its width is built"
    checkpoint(tmp_path/'m.pth', edit(pool_frames__cross_attn__q_proj__weight=torch.zeros(2**15, 1)))
    with pytest.raises(ValueError, match='expected a square matrix'): load_xpool(tmp_path/'m.pth')


class Payload:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)


def test_nothing_in_a_checkpoint_runs(tmp_path):
    trap = str(tmp_path/'trap')
    checkpoint(tmp_path/'m.pth', lambda s: s.update(config=Payload(trap)))
    assert load_xpool(tmp_path/'m.pth').head.width == 16
    checkpoint(tmp_path/'m.pth', edit(pool_frames__layer_norm1__bias=Payload(trap)))
    with pytest.raises(ValueError, match='expected a tensor of float numbers'): load_xpool(tmp_path/'m.pth')
    assert not os.path.exists(trap)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path/'m.pth'
    head, _ = checkpoint(path)
    whole = path.read_bytes()
    at = whole.index(head.linear_proj.weight.detach().numpy().tobytes())
    for data in (b'', whole[:200], whole[:len(whole) // 2], whole[:at] + b'\xff' + whole[at + 1:], b'PK\3\4' + bytes(100)):
        path.write_bytes(data)
        with pytest.raises(ValueError): load_xpool(path)


# --- training

def world(n, seed, F=4, D=12, each=2):
    "Videos of which one frame is described: frames (N, F, D), queries (N·each, D), positives"
    g = np.random.default_rng([7, seed])
    f = g.standard_normal((n, F, D)).astype('f4')
    p = np.repeat(np.arange(n), each)
    said = f[p, g.integers(0, F, len(p))]
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((D, D)))[0]        # queries live in a turned space, so there is something to learn
    return f, (said @ (0.6 * np.eye(D) + 0.4 * turn) + 0.2 * g.standard_normal(said.shape)).astype('f4'), p


def weights(x): return {k: v.detach().clone() for k, v in x.head.state_dict().items()}
def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)


def test_training_learns_keeps_the_best_and_repeats():
    data, dev = world(150, 0), world(60, 1)
    fit = lambda **o: XPool(12, scale=10.).fit(*data, dev=dev, epochs=6, lr=3e-3, batch_size=32, **o)
    a, b, other = fit(), fit(), fit(seed=1)
    assert same(weights(a), weights(b)) and a.scale == b.scale and not same(weights(a), weights(other))
    scores = dict(a.result.history)
    assert a.result.best_score == max(scores.values()) == scores[a.result.best_step] > scores[0] + 0.05
    r = places(a.scorer, dev[1], Source(dev[0], 12), dev[2])
    assert np.mean([(r <= k).mean() for k in (1, 5, 10)]) == pytest.approx(a.result.best_score)


def test_places_counts_ties_against_the_query():
    f = np.stack([np.eye(4, dtype='f4')[:2]] * 3)
    assert places(Folded(XPoolHead(4)), np.eye(4)[:2], f, np.array([0, 2])).tolist() == [3, 3]


def test_everything_decays_and_clip_has_its_own_rate():
    net = _Net(XPoolHead(4), 100., CLIPModel(tiny_clip()))
    own, clip = _groups(3e-5, 1e-6, 0.2)(net)
    assert {id(p) for g in (own, clip) for p in g['params']} == {id(p) for p in net.parameters()}
    assert own['weight_decay'] == clip['weight_decay'] == 0.2 and own['eps'] == clip['eps'] == 1e-6 and own['betas'] == (0.9, 0.999)
    assert own['scale'] == 1 and clip['scale'] == pytest.approx(1 / 30) and net.clip.logit_scale in set(clip['params']) and len(own['params']) == 16
    own, clip = _groups(3e-5, 1e-6, 0.2)(_Net(XPoolHead(4), 50.))
    assert len(own['params']) == 17 and clip['params'] == []            # without a CLIP the temperature learns with the head


def test_temperature_is_put_back_before_a_step():
    for value, want in ((6., np.log(100)), (2., 2.)):
        net = _Net(XPoolHead(4), 100.)
        net.logit_scale.data.fill_(value)
        loss = _loss(net, (torch.eye(4), torch.eye(4)[:, None].repeat(1, 2, 1), torch.arange(4)))
        loss.backward()
        assert net.logit_scale.item() == pytest.approx(want) and net.logit_scale.grad is not None
    assert 0 < XPool(12, scale=100.).fit(*world(40, 0), epochs=5, lr=0.05).scale <= 100


def test_captions_of_one_video_are_no_negatives_and_the_loss_is_symmetric():
    "Against the formula, with a matrix of similarities made by the head"
    g, net = torch.Generator().manual_seed(0), _Net(random_head(6), 5.)
    t, f = torch.randn(3, 6, generator=g), torch.randn(3, 2, 6, generator=g)
    s = 5 * similarity(t, net.pool_frames(t, f)).detach().double().numpy()
    ce = lambda m, keep: -np.mean([m[i, i] - np.log(np.exp(m[i][keep[i]]).sum()) for i in range(3)])
    everything, apart = np.ones((3, 3), bool), np.array([[1, 0, 1], [0, 1, 1], [1, 1, 1]], bool)
    for rows, keep in (([0, 1, 2], everything), ([4, 4, 2], apart)):
        assert _loss(net, (t, f, torch.tensor(rows))).item() == pytest.approx((ce(s, keep) + ce(s.T, keep)) / 2, abs=1e-4)


def test_steps_are_epochs_of_whole_batches():
    steps = lambda n, epochs, select: tuple(_steps(n, epochs, 32, 1e-3, 0, 0, select).values())     # in all, between evaluations
    assert steps(100, 5, 'dev') == (15, 1) and steps(3200, 5, 'dev') == (500, 50)
    assert steps(3200, 5, 'released') == (500, 10) and steps(5, 1, 'released') == (1, 1)


def test_released_selection_is_a_window_of_five():
    data, dev = world(100, 0), world(30, 1)
    seen = []
    import grnb.rerank.xpool as module
    true = module.places
    def spy(*a):
        seen.append((true(*a) <= 1).mean())
        return true(*a)
    module.places = spy
    try: x = XPool(12, scale=10.).fit(*data, dev=dev, select='released', epochs=4, lr=3e-3, batch_size=20)
    finally: module.places = true
    window = [np.mean(seen[max(0, i - 4):i + 1]) for i in range(len(seen))]
    assert np.allclose([s for _, s in x.result.history], window, atol=1e-6) and len(seen) == x.result.steps + 1
    assert x.result.best_step == x.result.history[int(np.argmax(np.float32(window)))][0]


@pytest.mark.parametrize('select', ['dev', 'released'])
def test_a_killed_run_ends_as_one_that_was_not(tmp_path, select):
    options = dict(epochs=1, lr=1e-3, batch_size=8, select=select)
    data, dev = world(400, 0), world(30, 1)
    whole = XPool(12, scale=10.).fit(*data, dev=dev, **options)
    broken = (data[0].copy(), *data[1:])
    class Breaks:
        shape, left = data[0].shape, 62
        def take(self, rows):
            self.left -= 1
            if not self.left: raise KeyboardInterrupt
            return broken[0][rows]
    with pytest.raises(KeyboardInterrupt): XPool(12, scale=10.).fit(Breaks(), *data[1:], dev=dev, checkpoint=tmp_path, **options)
    again = XPool(12, scale=10.).fit(*data, dev=dev, checkpoint=tmp_path, **options)
    assert same(weights(again), weights(whole)) and again.result.history == whole.result.history and again.scale == whole.scale
    with pytest.raises(ValueError, match='other settings'): XPool(12, scale=10.).fit(*data, dev=dev, checkpoint=tmp_path, **(options | dict(weight_decay=0.1)))
    with pytest.raises(ValueError, match='other settings'): XPool(12, scale=10.).fit(*data, dev=world(30, 2), checkpoint=tmp_path, **options)     # weights chosen on another set


def test_ranks_of_scores_that_are_no_numbers():
    f, q, p = world(30, 1)
    head = XPool(12).head
    with torch.no_grad(): next(head.parameters())[0] = torch.nan
    with pytest.raises(FloatingPointError, match='scores: NaN'): places(Folded(head, 'cpu'), torch.from_numpy(np.float32(q)), Source(f, 12), p)


def test_clip_is_tuned_with_the_head_and_saved(tmp_path):
    with torch_seed(0, 'clip'): clip = CLIPModel(tiny_clip())
    g = np.random.default_rng(0)
    pixels, ids = g.standard_normal((6, 2, 3, 8, 8)).astype('f4'), g.integers(1, 49, (12, 5))
    ids[:, -1] = 49
    was = {k: v.clone() for k, v in clip.state_dict().items()}
    x = XPool(16).fit(pixels, ids, np.arange(12) // 2, epochs=3, batch_size=4, clip=clip, clip_lr=1e-4)
    assert any(not torch.equal(v, was[k]) for k, v in clip.state_dict().items() if 'vision' in k) and any(not torch.equal(v, was[k]) for k, v in clip.state_dict().items() if 'text' in k)
    x.save(tmp_path/'x.safetensors')
    again = read_xpool(tmp_path/'x.safetensors')
    assert same(weights(again), weights(x)) and all(torch.equal(v, again.clip.state_dict()[k]) for k, v in clip.state_dict().items())
    for bad, said in ((dict(queries=ids + 20), 'below 50'), (dict(queries=np.zeros((12, 13), int)), 'T up to 12'), (dict(frames=pixels[..., :4]), 'float pixels'), (dict(frames=pixels * np.nan), 'NaN')):
        with pytest.raises(ValueError, match=said): XPool(16).fit(bad.get('frames', pixels), bad.get('queries', ids), np.arange(12) // 2, clip=clip, epochs=1)


def test_bad_training_input_is_named():
    f, q, p = world(10, 0)
    for change, said in ((dict(epochs=0), 'epochs: expected above 0'), (dict(lr=0.), 'lr: expected above 0'), (dict(weight_decay=-1), 'weight_decay'), (dict(select='test'), 'select: expected dev or released'),
                         (dict(select='released'), 'needs the set'), (dict(batch_size=0), 'batch_size'), (dict(dev=(f[..., :5], q, p)), 'dev frames: expected shape'), (dict(dev=(f, q, p + 9)), 'dev positives')):
        with pytest.raises(ValueError, match=said): XPool(12).fit(f, q, p, **change)
    for args, said in (((f, q, p[:-1]), 'positives: expected one item row'), ((f, q, p + 1), 'positives: expected rows from 0 to 9'), ((f, q[:, :5], p), 'queries: expected width 12'), ((f, 0 * q, p), 'queries: row 0 is zero'), ((f[:, 0], q, p), 'frames: expected shape')):
        with pytest.raises(ValueError, match=said): XPool(12).fit(*args)
    for o in (dict(scale=0), dict(scale=101), dict(dropout=1), dict(width=0), dict(device='abacus')):
        with pytest.raises(ValueError): XPool(**o)


def test_train_takes_groups():
    "Rates and decay of the caller's groups; a checkpoint of other groups is refused"
    make = lambda: torch.nn.Sequential(OrderedDict(a=torch.nn.Linear(2, 2), b=torch.nn.Linear(2, 2)))
    def groups(scale): return lambda m: [dict(params=list(m.a.parameters()), weight_decay=0.), dict(params=list(m.b.parameters()), weight_decay=0.5, scale=scale)]
    def run(g, **o):
        with torch_seed(0, 'groups'): m = make()
        with torch_seed(0, 'groups'): was = make().state_dict()
        train(m, lambda s: torch.ones(1, 2), lambda m, x: 0 * m(x).sum() + 1, steps=10, lr=0.1, device='cpu', groups=g, **o)
        return was, m.state_dict()
    was, now = run(groups(0.))
    assert all(torch.equal(was[k], now[k]) for k in was)                 # no gradient, no decay for a; no rate for b
    was, now = run(groups(1.))
    assert torch.equal(was['a.weight'], now['a.weight']) and (now['b.weight'].abs() < was['b.weight'].abs()).all() and (now['b.bias'].abs() < was['b.bias'].abs()).all()


def test_groups_belong_to_a_checkpoint(tmp_path):
    go = lambda scale: train(torch.nn.Linear(2, 1), lambda s: torch.ones(1, 2), lambda m, x: m(x).square().sum(), steps=2, device='cpu', checkpoint=tmp_path, groups=lambda m: [dict(params=list(m.parameters()), scale=scale)])
    with torch_seed(0, 'x'): go(1.)
    with torch_seed(0, 'x'), pytest.raises(ValueError, match='other settings'): go(0.5)


# --- saving

def test_saved_and_read(tmp_path):
    x = XPool(12, dropout=0.1, scale=7.).fit(*world(20, 0), epochs=2)
    x.save(tmp_path/'x.safetensors')
    y = read_xpool(tmp_path/'x.safetensors')
    assert same(weights(x), weights(y)) and (y.scale, y.head.dropout.p, y.width, y.clip) == (x.scale, 0.1, 12, None)
    checkpoint(tmp_path/'m.pth')
    z = read_xpool(tmp_path/'m.pth')
    assert z.width == 16 and z.clip is None and read_xpool(tmp_path/'m.pth', clip=tiny_clip()).clip is not None
    arrays, facts = load_arrays(tmp_path/'x.safetensors')
    for a, f, said in (({k: v for k, v in arrays.items() if 'linear' not in k}, facts, 'pool_frames'), (arrays | {'pool_frames.more': np.zeros(2, 'f4')}, facts, 'pool_frames'),
                       (arrays | {'pool_frames.linear_proj.bias': np.zeros(3, 'f4')}, facts, 'pool_frames'), (arrays | {'pool_frames.linear_proj.bias': np.full(12, np.nan, 'f4')}, facts, 'NaN'),
                       (arrays, {}, 'expected an X-Pool'), (arrays, {k: v for k, v in facts.items() if k != 'scale'}, 'expected an X-Pool'), (arrays, facts | dict(width=8), 'pool_frames')):
        save_arrays(tmp_path/'bad.safetensors', a, f)
        with pytest.raises(ValueError, match=said): read_xpool(tmp_path/'bad.safetensors')


def test_a_pool_made_ready_ends_with_the_next_fit():
    f, q, p = world(10, 0)
    x, rows = XPool(12), np.tile(np.arange(10), (20, 1))
    ready = x.prepare(f, 'float16')
    assert np.allclose(x.score(q, ready, rows), x.score(q, f, rows), atol=3e-3)
    x.fit(f, q, p, epochs=1)
    with pytest.raises(ValueError, match='another head'): x.score(q, ready, rows)
    ready = x.prepare(f)
    found, scores = x.rerank(q, ready, rows, 3)
    everything = x.search(q, ready, 3)
    assert (found == everything[0]).mean() > 0.95 and np.allclose(scores, everything[1], atol=1e-5) and (np.diff(scores, axis=1) <= 0).all()


# --- the released measurements

@st.composite
def judged(draw):
    "Similarities with ties, lists that end early, texts that repeat"
    g = np.random.default_rng(draw(st.integers(0, 2**20)))
    Q, N, C = draw(st.integers(1, 6)), draw(st.integers(1, 14)), draw(st.integers(1, 8))
    texts = [f't{i}' for i in g.integers(0, draw(st.integers(1, 8)), Q)]
    by = {t: g.integers(0, 4, N) / 4 for t in texts}
    rows = np.full((Q, C), -1)
    for r in rows:
        some = g.permutation(N)[:g.integers(0, min(C, N) + 1)]
        r[g.permutation(C)[:len(some)]] = some
    return texts, np.float32([by[t] for t in texts]), rows, g.integers(0, N, Q)


def scored(matrix, rows): return np.where(rows < 0, -np.inf, np.take_along_axis(matrix, np.maximum(rows, 0), 1))


@fast
@given(judged())
def test_ranks_against_the_full_matrix(case):
    texts, matrix, rows, p = case
    Q, N = matrix.shape
    right, released = [], []
    last = dict(zip(texts, range(Q)))
    for q in range(Q):
        mine = sorted((-matrix[q, r], r) for r in rows[q] if r >= 0)
        right.append(next((i + 1 for i, (_, r) in enumerate(mine) if r == p[q]), 0))
        line = np.full(N, -np.inf)
        for r in rows[last[texts[q]]]:
            if r >= 0: line[r] = matrix[q, r]
        released.append(np.argsort(np.argsort(-line, kind='stable'))[p[q]] + 1)
    lists = lists_by_text(texts, rows)
    assert candidate_ranks(scored(matrix, rows), rows, p, N).tolist() == right
    assert released_ranks(scored(matrix, lists), lists, p, N).tolist() == released


def test_rerank_ranks_both_ways():
    f, q, _ = world(9, 0, each=1)
    q[2] = q[0]
    rows, p, x = np.array([[0, 3], [4, -1], [5, 6]] + [[1, 2]] * 6), np.array([0, 2, 5, 1, 1, 1, 1, 1, 1]), XPool(12)
    texts = ['same', 'b', 'same', *'defghi']
    right, released = rerank_ranks(x, q, f, rows, p), rerank_ranks(x, q, x.prepare(f), rows, p, texts, released=True)
    assert right[1] == 0 and released[1] == 1 + 1 + 2                  # one candidate, then rows 0 and 1, which are none
    assert right[0] > 0 and released[0] == 3                           # the other's list: two candidates, then row 0
    assert (right[2:] == released[2:]).all() and (right[2:] > 0).all()
    with pytest.raises(ValueError, match='texts'): rerank_ranks(x, q, f, rows, p, released=True)
    with pytest.raises(ValueError, match='texts: expected 9'): rerank_ranks(x, q, f, rows, p, texts[:3], released=True)


def test_bad_ranks_are_named():
    s, c, p = np.zeros((2, 2)), np.zeros((2, 2), int), np.zeros(2, int)
    for args, said in (((s[:1], c, p, 3), 'scores: expected'), ((s, c + 3, p, 3), 'candidates: expected −1 to 2'), ((s, c, p + 3, 3), 'positives'), ((s * np.nan, c, p, 3), 'NaN'), ((s, c * .5, p, 3), 'integers'), ((s, c, p, 0), 'n: expected')):
        for f in (candidate_ranks, released_ranks):
            with pytest.raises(ValueError, match=said): f(*args)


def test_per_query_from_disk_is_the_same_and_its_clocks_add_up(tmp_path):
    f, q, _ = world(7, 0, each=1)
    for i, x in enumerate(f): np.savez_compressed(tmp_path/f'v{i}.npz', frame_embeds=x, frame_indices=np.arange(len(x)), video_id=f'v{i}')
    rows = np.random.default_rng(0).integers(0, 7, (7, 5))
    lists, head = [[f'v{i}' for i in r] for r in rows], random_head(12)
    lists[3] = []
    fast_ = score_candidates(Folded(head), q, f, rows)
    for chunk in (2, 1000):
        got = per_query(head, q, lists, tmp_path, chunk=chunk)
        assert [len(s) for s in got.scores] == [5, 5, 5, 0, 5, 5, 5]
        for i, s in enumerate(got.scores): assert np.allclose(s, fast_[i][:len(s)], atol=1e-4)
        steps = [got.seconds[k] for k in ('query_encode', 'video_load', 'frame_pooling', 'similarity')]
        assert min(steps) > 0 and got.seconds['total'] >= sum(steps)
    words = per_query(head, list('abcdefg'), lists, tmp_path, encode=lambda w: q['abcdefg'.index(w)])
    assert np.allclose(words.scores[0], got.scores[0], atol=1e-6)
    odd, path = [dict(frame_embeds=f[3].astype(object)), dict(other=f[3]), dict(frame_embeds=f[3][0]), dict(frame_embeds=f[3][:, :5]), dict(frame_embeds=f[3].astype(int))], tmp_path/'v3.npz'
    for arrays in odd:
        np.savez_compressed(path, **arrays)
        with pytest.raises(ValueError, match='v3.npz'): per_query(head, q, [['v3']] * 7, tmp_path)
    whole = (tmp_path/'v2.npz').read_bytes()
    np.save(tmp_path/'v2.npy', f[2])
    for name in ('../v2', '/etc/v2', 'a/v2'):
        with pytest.raises(ValueError, match='names of files in the folder'): per_query(head, q, [[name]] * 7, tmp_path)
    for data in ((tmp_path/'v2.npy').read_bytes(), b'', b'nothing', whole[:len(whole) // 2], whole[:150] + b'1234' + whole[154:]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match='v3.npz'): per_query(head, q, [['v3']] * 7, tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError): per_query(head, q, [['v3']] * 7, tmp_path)
    with pytest.raises(ValueError, match='candidates: expected 7 lists'): per_query(head, q, lists[:2], tmp_path)
