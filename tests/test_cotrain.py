"""GRDR's model and training: losses by hand, who learns when, what is one tensor, resuming anywhere, two processes, and the face."""
import os
import re
import socket
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import grnb.recipes.cotrain as module
from grnb import GenerativeRetriever
from grnb.core import unit
from grnb.decode.beam import beam_search, exhaustive
from grnb.decode.expand import expand
from grnb.generator.frozen_t5 import freeze
from grnb.generator.strong import StrongForm, force
from grnb.ids.make import SemanticIDs, make_ids
from grnb.recipes import RECIPES, Recipe
from grnb.recipes.cotrain import PHASES, Batch, CoTraining, _Phase, codes_now, generate, phase_losses, train_together
from grnb.recipes.shared import FrozenShared, SharedGenerator, first_levels, load_shared, start_from_geometry, tokenizer_of, without_end
from grnb.trie.layout import Trie

g = np.random.default_rng(0)
N, D = 60, 8
ITEMS = unit(g.normal(size=(N, D)).astype(np.float32))
POSITIVES = np.repeat(np.arange(N), 3)
QUERIES = unit(ITEMS[POSITIVES] + .2 * g.normal(size=(3 * N, D)).astype(np.float32))
NET = dict(width=D, n_layers=1, n_heads=2, n_prefix=2, dropout=0.)
T5 = dict(vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_decoder_layers=2, num_heads=2, dropout_rate=0.)
WORDS = torch.randint(2, 30, (3 * N, 5), generator=torch.Generator().manual_seed(0)).numpy(), np.ones((3 * N, 5), np.int64)
SHORT = CoTraining(steps=(3, 2, 3, 2), batch=16)


def model(query=NET, **kw): return SharedGenerator(D, query, **dict(V=2, K=4, L=2) | kw)


def bits(m): return {k: v.detach().numpy().tobytes() for k, v in m.state_dict().items()}


def batch(m, old, n=12):
    "Captions, items, views, and the stored codes of those views"
    rows, view = torch.arange(n), torch.arange(n) % m.V
    return Batch(torch.from_numpy(ITEMS[:n]), torch.from_numpy(QUERIES[:n]), view, codes_now(m, torch.from_numpy(ITEMS[:n]), old)[rows, view])


def by_hand(m, b, phase, old, new, released=()):
    "All losses with plain numbers, row by row, in float64"
    w = {k: v.detach().double() for k, v in m.state_dict().items()}
    C, B, s = [w[f'tok.levels.stored.{l}.words'] for l in range(new)], len(b.x), float(w['log_scale'].exp().clamp(20, 100))
    cos, turn = lambda r, C: F.normalize(r, dim=0) @ F.normalize(C, dim=1).T, lambda r: r / r.norm()
    e, z, ce, code, recon, rq = [], [], [], [], [], []
    n = old + 1 if phase == 'pretrain' else new
    for i in range(B):
        x, own = b.x[i].double(), None
        back, levels = 0, []
        for v in range(m.V):
            r, total, codes, us, rs = w['tok.enc_w'][v] @ x + w['tok.enc_b'][v], 0, [], [], []
            for l in range(new):
                c = int(cos(r, C[l]).argmax())
                rs.append(r); codes.append(c); us.append(turn(r)); r = r - C[l][c]; total = total + C[l][c]
                levels.append(1.65 * ((C[l][c] - us[-1]) ** 2).mean())
            back = back + (w['tok.dec_w'][v] @ total + w['tok.dec_b'][v]) / m.V
            if v == b.view[i]: own = rs, codes, r
        (rs, codes, left), spelled = own, b.prev[i].tolist() + own[1][old:]
        h = m.hidden(b.q[i:i + 1], torch.tensor([[spelled[:n - 1]]], dtype=torch.int64))[0, 0].detach().double()
        e.append(h.sum(0)); z.append(left if 'residual' in released else rs[old])
        for l in range(old, n):
            logp = (s * cos(h[l], C[l])).log_softmax(0)
            ce.append(-.9 * logp[codes[l]] - .1 * logp.mean())
        for l in range(old): code.append(-(s * cos(h[l], C[l])).log_softmax(0)[b.prev[i, l]] - (s * cos(rs[l], C[l])).log_softmax(0)[b.prev[i, l]])
        recon.append(1 - turn(x) @ turn(back)); rq.append(sum(levels) / len(levels))
    logits = torch.stack(e) @ torch.stack(z).T
    cl = sum(-logits[i].log_softmax(0)[i] for i in range(B)) / B
    mean = lambda t: sum(t) / len(t) if t else None
    return dict(cl=cl, ce=mean(ce), code=mean(code), recon=mean(recon), rq=mean(rq))


@pytest.mark.parametrize('phase, old, new', [('pretrain', 0, 1), ('main', 0, 1), ('fit', 0, 1), ('pretrain', 1, 2), ('main', 1, 2), ('fit', 1, 2), ('main', 0, 2)])
def test_losses_are_those_written_out(phase, old, new):
    m = model().eval()
    m.tok.levels.start(m.tok.views(torch.from_numpy(ITEMS)).flatten(0, 1).detach(), 0)
    for released in ((), ('residual',)):
        have, b = phase_losses(m, batch(m, old), phase, old, new, CoTraining(released=released)), batch(m, old)
        want = by_hand(m, b, phase, old, new, released)
        assert set(have) == {k for k, v in PHASES[phase].items() if v and (k != 'code' or old)}
        for k, v in have.items(): assert abs(v.item() - want[k].item()) < 1e-4 * max(1, abs(want[k].item())), k


def test_weights_of_the_phases():
    m, b = model().eval(), None
    m.tok.levels.start(m.tok.views(torch.from_numpy(ITEMS)).flatten(0, 1).detach(), 0)
    b = batch(m, 1)
    for phase in PHASES:
        losses = phase_losses(m, b, phase, 1, 2, SHORT)
        value = module._loss(_Phase(m, phase, 1, 2, SHORT), (b, 12))
        assert abs(value.item() - sum(PHASES[phase][k] * v for k, v in losses.items()).item()) < 1e-4
    assert PHASES['main'] == dict(cl=.2, ce=.5, code=.8, recon=.1, rq=.3) and PHASES['pretrain'] == dict(cl=.5, ce=0, code=.5, recon=0, rq=0) and PHASES['fit'] == dict(cl=0, ce=1, code=1, recon=0, rq=0)


GROUPS = dict(heads=r'tok\.enc_', back=r'tok\.dec_', first=r'tok\.levels\.stored\.0\.words', second=r'tok\.levels\.stored\.1\.words', decoder='side', start='begin', scale='log_scale')

@pytest.mark.parametrize('phase, moves', [('pretrain', 'heads decoder start scale'), ('main', 'heads back second decoder start scale'), ('fit', 'decoder start scale')])
@pytest.mark.parametrize('released', [(), ('lr_group',)])
def test_what_learns_in_a_phase(phase, moves, released):
    "After one phase on the second level, these parts have changed and no others"
    m, settings = model(), CoTraining(steps=(0, 0, 0, 0), batch=16, released=released)
    with torch.no_grad(): m.log_scale.fill_(4.)                                                     # inside the clamp, where it has a gradient
    m.tok.levels.start(m.tok.views(torch.from_numpy(ITEMS)).flatten(0, 1).detach(), 0)
    data = torch.from_numpy(ITEMS), QUERIES, POSITIVES, np.arange(3 * N) % 2, codes_now(m, torch.from_numpy(ITEMS), 1)
    if phase == 'main': module._start_books(m, data[0], POSITIVES, data[3], 1, 2, 0)                # done again inside, to the same words
    before = bits(m)
    module._run_phase(m, phase, 1, 1, 2, 3, data, settings, None, seed=0, device='cpu', checkpoint=None, about=[])
    changed = {k for k, v in bits(m).items() if v != before[k]}
    parts = {name for name, p in GROUPS.items() if any(re.match(p, k) for k in changed)}
    assert parts == set(moves.split()) and all(any(re.match(GROUPS[n], k) for n in parts) for k in changed)


def test_the_newest_codebook_is_ten_times_as_fast():
    "One AdamW step moves every number by its learning rate; δ is read ten times"
    def moved(released):
        m, settings = model(), CoTraining(batch=16, lr=1e-4, released=released)
        module._start_books(m, torch.from_numpy(ITEMS), POSITIVES, np.arange(3 * N) % 2, 0, 1, 0)
        start, data = m.book(0).detach().clone(), (torch.from_numpy(ITEMS), QUERIES, POSITIVES, np.arange(3 * N) % 2, torch.zeros(N, 2, 0, dtype=torch.int64))
        module._run_phase(m, 'main', 0, 0, 1, 1, data, settings, None, seed=0, device='cpu', checkpoint=None, about=[])
        return (m.book(0) - start).abs().max().item()
    fast, slow = moved(()), moved(('lr_group',))
    assert fast == pytest.approx(1e-3, rel=.05) and slow == pytest.approx(1e-4, rel=.05)


def test_one_tensor_is_name_input_and_head():
    m = model()
    for l in range(2): assert m.inputs(l).data_ptr() == m.heads(l).data_ptr() == m.book(l).data_ptr() == m.tok.levels.stored[l].words.data_ptr()
    assert first_levels(m, 1).book(0).data_ptr() == m.book(0).data_ptr() and first_levels(m, 1).sizes == (4,) and m.sizes == (4, 4)
    apart = model(shared=False)
    assert len({t.data_ptr() for t in (apart.inputs(0), apart.heads(0), apart.book(0))}) == 3
    names = [n for n, _ in m.named_parameters()]
    assert len(names) == len(set(names)) and sum(p.numel() for p in apart.parameters()) == sum(p.numel() for p in m.parameters()) + 2 * 2 * 4 * D


@pytest.mark.parametrize('query, init', [(NET, 'released'), (NET, 'geometry'), (dict(config=T5), 'released'), (dict(config=T5), 'geometry')])
def test_search_is_the_models_own_scores(query, init):
    m = model(query, init=init, L=3).eval()
    with torch.no_grad():
        for p in m.parameters(): p += .05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    q = tuple(torch.from_numpy(t[:6]) for t in WORDS) if 'config' in query else torch.from_numpy(QUERIES[:6])
    codes = torch.from_numpy(g.integers(0, 4, (6, 3)))
    with torch.no_grad(): logits, steps = m(q, codes), force(m, q, codes)
    for a, b in zip(logits, steps): assert torch.allclose(a if init == 'geometry' else a.log_softmax(-1), b, atol=1e-4)
    trie = Trie.build(make_ids(tokenizer_of(m).encode(ITEMS), m.sizes))
    fast = freeze(m)
    with torch.no_grad():
        for a, b in zip(force(fast, q, codes), steps): assert torch.allclose(a, b, atol=5e-3)
    leaves, scores = beam_search(fast, q, trie, len(trie))
    assert type(fast) is FrozenShared and freeze(m, 'bf16').precision == 'bf16' and np.allclose(scores, np.take_along_axis(exhaustive(m, q, trie), leaves, 1), atol=5e-3)
    rows, _ = generate(m, q, trie, len(trie), N)
    assert all(sorted(r) == list(range(N)) for r in rows)                                             # every item once, however many IDs it has


def test_geometry_starts_as_residual_quantised_search():
    m = start_from_geometry(model(init='geometry', K=8, L=3), ITEMS, spread=0.).eval()
    module._start_books(m, torch.from_numpy(ITEMS), np.arange(N), np.zeros(N, np.int64), 0, 3, 0)
    trie = Trie.build(make_ids(tokenizer_of(m).encode(ITEMS), m.sizes))
    a, b = (beam_search(x, QUERIES[:30], trie, 7) for x in (m, StrongForm([m.book(l).detach().numpy() for l in range(3)])))
    assert (a[0] == b[0]).mean() > .99 and np.allclose(a[1], m.scale().item() * b[1], atol=1e-3)


def held(words=False):
    "Data of the first 48 items, and of the rest as dev"
    q = (lambda k: tuple(t[k] for t in WORDS)) if words else (lambda k: QUERIES[k])
    tr = POSITIVES < 48
    return (ITEMS[:48], q(tr), POSITIVES[tr]), dict(dev=(ITEMS[48:], q(~tr), POSITIVES[~tr] - 48), device='cpu') | (dict(captions=QUERIES[tr]) if words else {})


@pytest.mark.parametrize('query, settings', [(NET, {}), (NET, dict(joint=True)), (NET, dict(cotrain=False)), (NET, dict(assign='none', released=('scale_reset', 'lr_group', 'residual'))),
                                             (NET, dict(mix=2., own=.25, assign='random')), (dict(config=T5), {})])
def test_training_repeats_itself(query, settings):
    data, kw = held('config' in query)
    a, b = (train_together(model(query), *data, replace(SHORT, **settings), **kw) for _ in range(2))
    assert bits(a.model) == bits(b.model) and a.history == b.history and (a.views == b.views).all()
    phases = [(h['level'], h['phase']) for h in a.history]
    every = ('pretrain', 'main', 'fit')
    assert phases == ([(1, 'fit')] if 'cotrain' in settings else [(1, p) for p in every] if 'joint' in settings else [(l, p) for l in (0, 1) for p in every])
    assert all(len(h['drift']) == (1 if h['phase'] == 'pretrain' and 'joint' in settings else h['level'] + 1) for h in a.history) and all(h['drift'][-1] == 0 for h in a.history if h['phase'] == 'fit')


@cache
def whole():
    "A run that nothing stopped"
    data, kw = held()
    return train_together(model(), *data, SHORT, **kw)


@pytest.mark.parametrize('stop', ['level0-pretrain', 'level0-main', 'level0-fit', 'level1-pretrain', 'level1-main', 'level1-fit'])
def test_killed_in_any_phase_it_ends_the_same(stop, tmp_path, monkeypatch):
    (data, kw), _ = held(), whole()
    feed, train = module._feed, module.train
    def broken(*a):
        batch = feed(*a)
        def step(i):
            if a[-1] == stop and i == 1: raise KeyboardInterrupt
            return batch(i)
        return step
    monkeypatch.setattr(module, 'train', lambda *a, **k: train(*a, **k, save_every=1))
    monkeypatch.setattr(module, '_feed', broken)
    with pytest.raises(KeyboardInterrupt): train_together(model(), *data, SHORT, checkpoint=tmp_path, **kw)
    assert (tmp_path/stop/'train.safetensors').exists()
    monkeypatch.setattr(module, '_feed', feed)
    again = train_together(model(), *data, SHORT, checkpoint=tmp_path, **kw)
    assert bits(again.model) == bits(whole().model) and again.history == whole().history
    with pytest.raises(ValueError, match='checkpoint'): train_together(model(), *data, replace(SHORT, lr=2e-3), checkpoint=tmp_path, **kw)


def test_the_scale_goes_on_unless_reset():
    data, kw = held()
    for released, want in (((), False), (('scale_reset',), True)):
        m = model()
        with torch.no_grad(): m.log_scale.fill_(3.5)
        train_together(m, *data, replace(SHORT, steps=(0, 0, 0, 0), released=released), **kw)
        assert (m.log_scale.item() == pytest.approx(4.605)) == want


def test_a_checkpoint_remembers_what_chose_it(tmp_path):
    data, kw = held()
    cx, cq, cp = kw['dev']
    train_together(model(), *data, SHORT, checkpoint=tmp_path, **kw)
    for dev in (None, (cx, cq[::-1].copy(), cp)):
        with pytest.raises(ValueError, match='other settings'): train_together(model(), *data, SHORT, checkpoint=tmp_path, **(kw | dict(dev=dev)))


def test_a_tokenizer_alone_has_cosine_codes():
    data, kw = held()
    with pytest.raises(ValueError, match="cotrain: expected True with init='geometry'"): train_together(model(init='geometry'), *data, replace(SHORT, cotrain=False), **kw)


def test_selection_on_the_test_set_must_be_asked_for():
    data, kw = held()
    with pytest.raises(ValueError, match='test: expected with released'): train_together(model(), *data, SHORT, test=kw['dev'])
    with pytest.raises(ValueError, match='test: expected with released'): train_together(model(), *data, replace(SHORT, released=('test_selection',)))
    a, b = train_together(model(), *data, replace(SHORT, released=('test_selection',)), test=kw['dev'], device='cpu'), whole()
    assert [h['score'] for h in a.history] == [h['score'] for h in b.history]                        # the same set by another name: the name is what must be said
    assert all(h['score'] is None and h['best_step'] == h['steps'] for h in train_together(model(), *data, SHORT, device='cpu').history)


WORKER = """
import os, sys
sys.path.insert(0, {tests!r})
from test_cotrain import *
torch.set_num_threads(1)

def run(name):
    data, kw = held()
    done = train_together(model(), *data, replace(SHORT, batch=15), **kw)
    told, losses = repr([(h['phase'], h['best_step'], h['score']) for h in done.history]), [loss for h in done.history for loss in h['losses']]
    np.savez(sys.argv[1] + f'/{{name}}.npz', history=told, losses=losses, **{{k: v.detach().numpy() for k, v in done.model.state_dict().items()}})

run('one')
child = os.fork()
os.environ |= dict(RANK=(rank := '0' if child else '1'), LOCAL_RANK=rank, WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', ACCELERATE_USE_CPU='true')
run(rank)
assert module._world() == (int(rank), 2)
if child: sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0)
"""

def test_two_processes_do_what_one_does(tmp_path):
    "A batch of odd size, in two parts"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    root = Path(__file__).resolve().parents[1]
    script = tmp_path/'worker.py'
    script.write_text(WORKER.format(tests=str(root/'tests')))
    env = os.environ | dict(PYTHONPATH=str(root), OMP_NUM_THREADS='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], cwd=root, env=env, stderr=subprocess.PIPE, timeout=240)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    one, left, right = (dict(np.load(tmp_path/f'{name}.npz')) for name in ('one', '0', '1'))
    assert left.pop('history') == right.pop('history') == one.pop('history') and len(one) > 9
    for k, v in one.items(): assert (left[k] == right[k]).all() and (np.allclose(v, left[k], rtol=1e-4) if k == 'losses' else np.allclose(v, left[k], atol=2e-4)), k


def released_file(path, m):
    "A model under the names of the released code"
    own = m.state_dict()
    state = OrderedDict({f'model.{k[8:]}': v for k, v in own.items() if k.startswith('side.t5.')})
    state['model.lm_head.weight'] = state['model.shared.weight']
    for side, part in (('encoder', 'enc'), ('decoder', 'dec')):
        for v in range(m.V):
            for name, what in (('weight', 'w'), ('bias', 'b')): state[f'video_rqvae.{side}.mlps.{v}.mlp_layers.1.{name}'] = own[f'tok.{part}_{what}'][v].clone()
    for l in range(len(m.sizes)):
        for name in ('video_rqvae.rq.vq_layers.{}.embedding.weight', 'code_embedding.{}.weight', 'centroids.{}.codebook.weight'): state[name.format(l)] = m.book(l).detach()
    state |= dict(start_token_embedding=m.begin.detach()[None], logit_scale=m.log_scale.detach())
    torch.save(state, path)
    return state


@pytest.mark.parametrize('feed', ['relu', 'gated-gelu'])
def test_the_released_checkpoint_is_the_whole_model(tmp_path, feed):
    m = model(dict(config=T5 | dict(feed_forward_proj=feed)), unit=False).eval()
    with torch.no_grad():
        for p in m.parameters(): p += .1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    state = released_file(tmp_path/'best_model.pt', m)
    again, q, codes = load_shared(tmp_path/'best_model.pt'), tuple(torch.from_numpy(t[:6]) for t in WORDS), torch.from_numpy(g.integers(0, 4, (6, 2)))
    with torch.no_grad(): assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(again(q, codes), m(q, codes)))
    assert (tokenizer_of(again).encode(ITEMS) == tokenizer_of(m).encode(ITEMS)).all()
    for name, new, why in [('model.encoder.block.0.layer.0.SelfAttention.k.weight', None, 'SelfAttention.k.weight: expected .8, 8., got none'), ('model.shared.weight', None, 'no whole T5'),
                           ('start_token_embedding', torch.zeros(1, 7), 'start_token_embedding: expected 8'), ('logit_scale', None, 'logit_scale: expected 1 numbers, found none'),
                           ('model.decoder.block.1.layer.2.extra', torch.zeros(2), 'extra: expected no such tensor'), ('model.decoder.final_layer_norm.weight', torch.full((8,), torch.nan), 'expected finite'),
                           ('model.decoder.block.9999.layer.0.SelfAttention.q.weight', torch.zeros(1), 'decoder: expected blocks 0, 1'),
                           ('video_rqvae.encoder.mlps.0.mlp_layers.1.bias', None, 'mlps.0.mlp_layers.1.bias')]:
        broken = OrderedDict(state)
        if new is None: del broken[name]
        else: broken[name] = new
        torch.save(broken, tmp_path/'broken.pt')
        with pytest.raises(ValueError, match=why): load_shared(tmp_path/'broken.pt')
    with pytest.raises(ValueError, match='of msrvtt'): load_shared(tmp_path/'best_model.pt', 'msrvtt')


def test_a_code_that_ends_loses_ids():
    ids = SemanticIDs(np.uint8([[0, 1, 2], [1, 0, 0], [0, 0, 1], [2, 2, 2]]), np.array([0, 0, 1, 2]), (3, 3, 3))
    left = without_end(ids)
    assert left.tokens.tolist() == [[0, 0, 1], [2, 2, 2]] and left.rows.tolist() == [1, 2] and left.sizes == ids.sizes
    assert len(without_end(ids, end=7).tokens) == 4


def test_saved_is_loaded():
    for query, kw in ((NET, dict(init='geometry')), (NET, dict(shared=False)), (dict(config=T5), {})):
        m = model(query, **kw)
        again = SharedGenerator.from_arrays(*m.arrays())
        assert bits(again) == bits(m) and again.settings == m.settings
    arrays, settings = m.arrays()
    with pytest.raises(ValueError, match='do not fit'): SharedGenerator.from_arrays({k: v for k, v in arrays.items() if k != 'begin'}, settings)


RECIPE = replace(RECIPES['grdr'], K=4, L=2, d_model=8, views=2, n_prefix=2, cotrain=replace(RECIPES['grdr'].cotrain, steps=(3, 2, 3, 2), batch=16))

@pytest.mark.parametrize('items', ['one vector', 'three views'])
@pytest.mark.parametrize('init', ['geometry', 'random'])
def test_the_face(tmp_path, items, init):
    x = ITEMS if items == 'one vector' else unit(ITEMS[:, None] + .3 * g.normal(size=(N, 3, D)).astype(np.float32))
    gr = GenerativeRetriever(replace(RECIPE, init=init), device='cpu').fit(x, QUERIES, POSITIVES, checkpoint=tmp_path/'c').index(x)
    assert type(gr._index.decoder) is FrozenShared
    hits = gr.search(QUERIES, k=N, beam=200, candidates=N)
    assert all(sorted(h) == list(range(N)) for h in hits.ids.tolist())                                 # several IDs an item, each item once
    best = (QUERIES @ x.reshape(-1, D).T).reshape(len(QUERIES), N, -1).max(2)
    assert np.allclose(hits.scores, -np.sort(-best, 1), atol=1e-5)                                     # and its best view counts
    gr.save(tmp_path/'m')
    again = GenerativeRetriever.load(tmp_path/'m', device='cpu')
    for rerank in (True, False): assert (again.search(QUERIES, k=5, rerank=rerank).ids == gr.search(QUERIES, k=5, rerank=rerank).ids).all()
    same = GenerativeRetriever(replace(RECIPE, init=init), device='cpu').fit(x, QUERIES, POSITIVES, checkpoint=tmp_path/'c')
    assert bits(same._fitted.generator) == bits(gr._fitted.generator) and same._fitted.facts == gr._fitted.facts
    found, live = gr.search(QUERIES, k=N, beam=200, rerank=False), gr._index.live                      # by the score of an item's best ID, as the module has it
    (rows, scores), at = expand(*beam_search(gr._fitted.generator, QUERIES, live, 200), live, N), np.arange(len(QUERIES))[:, None]
    own = np.empty_like(scores)
    own[at, rows] = scores
    assert np.allclose(found.scores, scores, atol=5e-3) and np.allclose(found.scores, own[at, found.ids], atol=5e-3)
    half = GenerativeRetriever.from_fitted(gr._fitted, 0, 'cpu').index(x[::2], np.arange(0, N, 2)).add(x[1::2], np.arange(1, N, 2))
    same = half.search(QUERIES, k=N, beam=200, rerank=False)
    assert (same.ids == found.ids).all() and (same.scores == found.scores).all()                       # added later, with all their IDs
    for name in ('half', 'all'): (half if name == 'half' else gr).save(tmp_path/name)
    assert all(p.read_bytes() == (tmp_path/'all'/p.name).read_bytes() for p in (tmp_path/'half').iterdir())
    assert gr.remove([3]).search(QUERIES, k=N, beam=200, candidates=N).ids.max(initial=0) < N and 3 not in gr.search(QUERIES, k=N, beam=200).ids
    assert gr.stats()['parameters'] < sum(p.numel() for p in gr._fitted.generator.parameters()) * 1.1


def test_the_face_reads_texts():
    texts = [f'{("red", "blue", "green")[p % 3]} thing {p % 7}' for p in range(N)]
    gr = GenerativeRetriever(replace(RECIPE, dim=8, tower_epochs=1), device='cpu').fit(ITEMS, texts, np.arange(N)).index(ITEMS)
    assert gr.search(['a red thing', 'number 3'], k=4).ids.shape == (2, 4)


@pytest.mark.parametrize('make, why', [
    (lambda: CoTraining(steps=(1, 2)), 'steps: expected four'), (lambda: CoTraining(assign='best'), 'assign: expected one of'), (lambda: CoTraining(released=('eos',)), "released: .* got 'eos'"),
    (lambda: CoTraining(lr=0), 'lr: expected'), (lambda: CoTraining(own=1.), 'own: expected'), (lambda: CoTraining(temperature=0.), 'temperature'), (lambda: CoTraining(batch=0), 'batch'),
    (lambda: SharedGenerator(8, {}), 'query: expected a dict'), (lambda: model(init='lucky'), 'init: expected'), (lambda: model(shared=False, init='geometry'), 'shared: geometry needs'),
    (lambda: SharedGenerator(16, dict(config=T5)), "dim: expected the T5's width 8"), (lambda: model(V=0), 'V: expected'),
    (lambda: train_together(model(), ITEMS[:, :5], QUERIES, POSITIVES), 'items: expected width 8'), (lambda: train_together(model(), ITEMS, QUERIES, POSITIVES[1:]), 'positives: expected'),
    (lambda: train_together(model(), ITEMS, QUERIES, POSITIVES + 1), 'positives: expected numbers from 0 and below 60'), (lambda: train_together(model(), ITEMS, WORDS, POSITIVES), 'queries: expected an array'),
    (lambda: train_together(model(dict(config=T5)), ITEMS, QUERIES, POSITIVES), 'queries: expected a pair'), (lambda: train_together(model(dict(config=T5)), ITEMS, WORDS, POSITIVES), 'captions: expected vectors'),
    (lambda: train_together(model(NET | dict(width=5)), ITEMS, QUERIES[:, :5], POSITIVES, CoTraining(mix=2.)), 'mix, own: expected 0'), (lambda: train_together(model(), ITEMS * np.nan, QUERIES, POSITIVES), 'items'),
    (lambda: Recipe(generator='shared'), 'cotrain: expected a CoTraining'), (lambda: Recipe(cotrain=CoTraining()), 'cotrain: expected a CoTraining'), (lambda: replace(RECIPE, K=(4, 4)), 'K, whiten'),
    (lambda: GenerativeRetriever(RECIPE).fit(ITEMS), 'queries: expected queries'), (lambda: start_from_geometry(model(), ITEMS), "generator: expected init='geometry'")])
def test_bad_input_is_named(make, why):
    with pytest.raises(ValueError, match=why): make()
