"The loop: resume after SIGKILL bit for bit, dev selection, decay groups, checks of settings, shared losses"
import math, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from grnb.core import load_arrays, rng, torch_seed
from grnb.train import epoch_batches, info_nce, query_target_mix, schedule, train

ROOT = Path(__file__).parents[1]


def net(seed=0):
    with torch_seed(seed, "net"): return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))

def batch(step):
    x = torch.from_numpy(rng(0, "data", step).standard_normal((16, 4)).astype(np.float32))
    return x, x.sum(1, keepdim=True)

def loss(model, xy): return F.mse_loss(model(xy[0]), xy[1])

def score(model):
    x, y = batch(10**6)
    return -F.mse_loss(model(x), y).item()

def bits(model): return {k: v.clone() for k, v in model.state_dict().items()}

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


SCRIPT = """
import sys, time; sys.path[:0] = [{tests!r}, {root!r}]
from test_train import *
torch.set_num_threads(1)
slow = lambda step: (time.sleep({pause}), batch(step))[1]
m = net()
r = train(m, slow, loss, steps=60, evaluate=score, eval_every=7, save_every=4, checkpoint={folder!r}, device="cpu")
torch.save(m.state_dict(), {out!r}); print(r)
"""

def child(folder, out, pause):
    code = SCRIPT.format(tests=str(ROOT/"tests"), root=str(ROOT), folder=str(folder), out=str(out), pause=pause)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_sigkill_then_resume_gives_the_same_bits(tmp_path):
    whole = child(tmp_path/"a", tmp_path/"a.pt", 0)
    broken = child(tmp_path/"b", tmp_path/"b.pt", 0.02)
    file = tmp_path/"b/train.safetensors"
    start = time.time()
    while not file.exists() and time.time() - start < 60: time.sleep(0.01)
    time.sleep(0.2)
    broken.send_signal(signal.SIGKILL)
    assert broken.wait() == -signal.SIGKILL
    assert 0 < load_arrays(file)[1]["step"] < 60
    broken = child(tmp_path/"b", tmp_path/"b.pt", 0)
    texts = [p.communicate(timeout=60)[0] for p in (whole, broken)]
    assert texts[0] == texts[1] and "TrainResult" in texts[0]
    assert same(torch.load(tmp_path/"a.pt"), torch.load(tmp_path/"b.pt"))


def alike(a, b):
    "Two results of `train` with the same scores, losses and last weights, bit for bit"
    return a._replace(last=None) == b._replace(last=None) and a.last.keys() == b.last.keys() and all(np.array_equal(a.last[k], b.last[k]) for k in b.last)



@pytest.mark.parametrize("stop", [1, 4, 7, 13])
@pytest.mark.parametrize("save_every", [1, 3])
def test_stop_at_any_step(tmp_path, stop, save_every):
    def broken(step):
        if step == stop: raise KeyboardInterrupt
        return batch(step)
    a, b, c = net(), net(), net()
    kw = dict(steps=14, evaluate=score, eval_every=5, device="cpu", lr=0.01)
    whole = train(a, batch, loss, **kw)
    with pytest.raises(KeyboardInterrupt): train(b, broken, loss, checkpoint=tmp_path, save_every=save_every, **kw)
    rest = train(c, batch, loss, checkpoint=tmp_path, save_every=save_every, **kw)
    assert alike(rest, whole) and same(bits(a), bits(c))
    again = net()                                                  # a finished run is read back, not run again
    assert alike(train(again, lambda step: 1 / 0, loss, checkpoint=tmp_path, save_every=save_every, **kw), whole) and same(bits(a), bits(again))


def test_checkpoint_of_another_run_is_refused(tmp_path):
    train(net(), batch, loss, steps=4, checkpoint=tmp_path, device="cpu")
    for kw in (dict(steps=5), dict(steps=4, lr=0.1), dict(steps=4, seed=1), dict(steps=4, about="other data")):
        with pytest.raises(ValueError, match="checkpoint: .* other settings"): train(net(), batch, loss, checkpoint=tmp_path, device="cpu", **kw)
    with pytest.raises(ValueError, match="initial weights"): train(net(1), batch, loss, steps=4, checkpoint=tmp_path, device="cpu")
    file = tmp_path/"train.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="train.safetensors"): train(net(), batch, loss, steps=4, checkpoint=tmp_path, device="cpu")


def test_best_may_be_the_untouched_weights():
    m = net()
    start = bits(m)
    r = train(m, batch, loss, steps=10, evaluate=lambda model: -float((model[0].weight - start["0.weight"]).abs().sum()), eval_every=2, device="cpu")
    assert r.best_step == 0 and r.best_score == 0 and same(start, bits(m))
    assert [s for s, _ in r.history] == [0, 2, 4, 6, 8, 10]
    r = train(m, batch, loss, steps=10, evaluate=score, keep="last", device="cpu")
    assert r.best_step == 10 and not same(start, bits(m))


def test_a_tie_keeps_the_earlier_and_no_score_keeps_the_last():
    assert train(net(), batch, loss, steps=6, evaluate=lambda m: 1.0, eval_every=2, device="cpu").best_step == 0
    r = train(net(), batch, loss, steps=6, device="cpu")
    assert r.best_step == 6 and r.best_score is None and r.history == [] and [s for s, _ in r.losses] == list(range(1, 7))


def test_random_state_of_the_caller_is_untouched_and_dropout_follows_the_seed():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = net(), net(), net()
    train(a, batch, loss, steps=5, seed=0, device="cpu")
    torch.rand(3)
    train(b, batch, loss, steps=5, seed=0, device="cpu")
    train(c, batch, loss, steps=5, seed=1, device="cpu")
    torch.manual_seed(5)
    assert torch.equal(before, torch.get_rng_state())
    assert same(bits(a), bits(b)) and not same(bits(a), bits(c))


def test_zero_steps_scores_and_keeps():
    m = net()
    start = bits(m)
    r = train(m, batch, loss, steps=0, evaluate=score, device="cpu")
    assert r.best_step == 0 and len(r.history) == 1 and same(start, bits(m))


def test_frozen_parameters_and_buffers():
    m = net()
    m[0].requires_grad_(False)
    w = m[0].weight.clone()
    train(m, batch, loss, steps=3, device="cpu")
    assert torch.equal(w, m[0].weight) and int(m[2].num_batches_tracked) == 3
    with pytest.raises(ValueError, match="parameters to train"): train(m.requires_grad_(False), batch, loss, steps=3, device="cpu")


def test_vectors_do_not_decay():
    m = torch.nn.Linear(2, 2)
    torch.nn.init.ones_(m.weight), torch.nn.init.ones_(m.bias)
    train(m, lambda s: None, lambda model, _: 0 * model.weight.sum() + 0 * model.bias.sum(), steps=10, lr=0.1, weight_decay=0.5, device="cpu")
    assert torch.equal(m.bias, torch.ones(2)) and (m.weight < 1).all()


@pytest.mark.parametrize("kw, words", [(dict(steps=-1), "steps"), (dict(steps=2.5), "steps"), (dict(lr=0), "lr"), (dict(lr=math.nan), "lr"), (dict(warmup=2), "warmup"),
    (dict(weight_decay=-1), "weight_decay"), (dict(clip=0), "clip"), (dict(eval_every=0), "eval_every"), (dict(keep="first"), "keep"), (dict(save_every=0), "save_every"),
    (dict(precision="fp8"), "precision"), (dict(device="abacus"), "device")])
def test_bad_settings(kw, words):
    with pytest.raises(ValueError, match=words): train(net(), batch, loss, **{"steps": 2, "device": "cpu", **kw})


def test_not_finite():
    with pytest.raises(FloatingPointError, match="loss: inf at step 3"):
        train(net(), batch, lambda m, b: loss(m, b) * (math.inf if b[0][0, 0] == batch(3)[0][0, 0] else 1), steps=5, device="cpu")
    with pytest.raises(FloatingPointError, match="dev score is NaN after step 0"): train(net(), batch, loss, steps=5, evaluate=lambda m: math.nan, device="cpu")


def test_clipping():
    with torch_seed(0): m = torch.nn.Linear(1, 1, bias=False)
    w = m.weight.item()
    train(m, batch, lambda model, b: 1000 * model.weight.sum(), steps=1, warmup=0, lr=0.5, weight_decay=0, clip=1e-30, device="cpu")
    assert abs(m.weight.item() - w) < 1e-6                         # clipped so small that AdamW's eps holds it still


def test_bfloat16_runs_and_resumes(tmp_path):
    a, b = net(), net()
    kw = dict(steps=6, precision="bf16", device="cpu")
    train(a, batch, loss, **kw)
    def broken(step):
        if step == 4: raise KeyboardInterrupt
        return batch(step)
    with pytest.raises(KeyboardInterrupt): train(net(), broken, loss, checkpoint=tmp_path, save_every=2, **kw)
    train(b, batch, loss, checkpoint=tmp_path, save_every=2, **kw)
    assert same(bits(a), bits(b)) and a[0].weight.dtype == torch.float32


@given(st.integers(1, 400), st.floats(0, 1))
def test_schedule_stays_in_range_and_ends_low(steps, warmup):
    x = [schedule(s, steps, warmup) for s in range(steps)]
    assert all(0 <= v <= 1 for v in x)
    if warmup <= 0.5 and steps > 20: assert x[-1] < 0.05 and max(x) > 0.9


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 3))
def test_every_epoch_visits_each_row_once(n, size, seed):
    b, per = epoch_batches(n, size, seed), max(1, n // min(size, n))
    rows = [b(s) for s in range(2 * per)]
    for epoch in (rows[:per], rows[per:]):
        flat = np.concatenate(epoch)
        assert len(set(flat)) == len(flat) == per * min(size, n) and flat.min() >= 0 and flat.max() < n
    assert np.array_equal(epoch_batches(n, size, seed)(per), rows[per])                      # no history needed


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 4), st.integers(0, 99))
def test_info_nce_by_hand(B, kinds, seed):
    g = torch.Generator().manual_seed(seed)
    q, t = (F.normalize(torch.randn(B, 5, generator=g), dim=-1) for _ in "qt")
    groups = torch.randint(kinds, (B,), generator=g)
    want = 0.
    for a, b in ((q, t), (t, q)):
        for i in range(B):
            rivals = [j for j in range(B) if j == i or groups[j] != groups[i]]
            s = torch.stack([7 * (a[i] @ b[j]) for j in rivals])
            want += (torch.logsumexp(s, 0) - 7 * (a[i] @ b[i])) / (2 * B)
    assert torch.isclose(info_nce(q, t, 7., groups), want, atol=1e-5)


def test_mix_lies_between():
    q, t = F.normalize(torch.randn(64, 6), dim=-1), F.normalize(torch.randn(64, 6), dim=-1)
    m = query_target_mix(q, t, 2., rng(0, "mix"))
    assert torch.allclose(m.norm(dim=-1), torch.ones(64), atol=1e-6)
    assert ((m * q).sum(1) >= (q * t).sum(1) - 1e-6).all() and ((m * t).sum(1) >= (q * t).sum(1) - 1e-6).all()
    assert torch.equal(m, query_target_mix(q, t, 2., rng(0, "mix")))
    with pytest.raises(ValueError, match="alpha"): query_target_mix(q, t, 0, rng(0))
    with pytest.raises(ValueError, match="targets"): query_target_mix(q, t[:3], 2., rng(0))
