"""features.small: the shipped encoders, their latent map, and the tasks made with them."""
import numpy as np
import pytest
import torch

from grnb.core import save_arrays, unit
from grnb.data.events import make_captions, make_scenes, match, words_of
from grnb.data.render import SAMPLES, render
from grnb.features import small
from grnb.features.tasks import load_task
from grnb.metrics import ranks, recall
from grnb.train import train


@pytest.fixture(scope="module")
def encoder(): return small.load_small()


@pytest.fixture(scope="module")
def task(): return load_task("events", size=300, seed=1)


def r10(task):
    items = unit(task.items.mean(1)) if task.items.ndim == 3 else task.items
    return recall(ranks(np.argsort(-task.queries @ items.T, axis=1, kind="stable")[:, :10], task.qrels), 10).mean()


def test_weights_are_small():
    assert small.WEIGHTS.stat().st_size <= 2_000_000


def test_vocabulary_knows_every_caption(encoder):
    scenes = make_scenes(200, 4)
    texts = make_captions(words_of(scenes.latent), np.arange(scenes.starts[-1]), each=12).texts
    assert encoder.vocabulary == small.vocabulary()
    t = small.tokens(texts, encoder.vocabulary)
    assert (t != 1).all() and t.shape[1] < 32 and ((t == 0).sum(1) == t.shape[1] - np.array([len(x.split()) for x in texts])).all()


def test_tokens_of_odd_texts():
    t = small.tokens(["", "Red, RED!", "quagga red", "red " * 50], ["red"])
    assert t[0, 0] == 1 and t[1, :3].tolist() == [2, 2, 0] and t[2, :2].tolist() == [1, 2] and t.shape == (4, 32)


def test_encoding_does_not_depend_on_the_batch(encoder):
    frames, sound = render(make_scenes(9, 3))
    a, b = encoder.encode_videos(frames, sound), encoder.encode_videos(frames[4:6], sound[4:6], batch=3)
    assert a.shape == (9, 4, 128) and np.allclose(np.linalg.norm(a, axis=-1), 1, atol=1e-5) and np.allclose(a[4:6], b, atol=1e-4)
    texts = ["a red ball rises", "something blue is resting on the sand by day, and a steady hum is heard", "a red ball rises"]
    t = encoder.encode_texts(texts)
    assert (t[0] == t[2]).all() and np.allclose(t[1], encoder.encode_texts(texts[1:2])[0], atol=1e-5)
    assert encoder.encode_texts([]).shape == (0, 128) and encoder.encode_videos(frames[:0], sound[:0]).shape == (0, 4, 128)


def test_bad_video_is_named(encoder):
    frames, sound = render(make_scenes(2))
    with pytest.raises(ValueError, match="frames: expected shape"): encoder.encode_videos(frames[:, :4], sound)
    with pytest.raises(ValueError, match="sound: expected shape"): encoder.encode_videos(frames, sound[:, :, :SAMPLES // 2])


def test_words_and_pictures_meet(encoder, task):
    "Retrieval works on a world the encoders never saw; shuffled items bring it down to chance"
    assert r10(task) > 0.7
    shuffled = task.queries @ unit(np.roll(task.items, 7, 0).mean(1)).T
    assert recall(ranks(np.argsort(-shuffled, axis=1)[:, :10], task.qrels), 10).mean() < 0.15


def test_events_task_is_reproducible(task):
    again = load_task("events", size=300, seed=1)
    assert (again.items == task.items).all() and (again.queries == task.queries).all() and again.texts == task.texts
    assert not np.allclose(load_task("events", size=300, seed=2).items, task.items)


def test_growing_pools_are_asked_the_same(task):
    large = load_task("events", size=600, seed=1, queries=300)
    assert large.texts == task.texts and (large.positives == task.positives).all() and (large.item_split[:300] == task.item_split).all()
    assert np.allclose(large.items[:300], task.items, atol=1e-4)
    assert all(set(task.qrels.of(q)) <= set(large.qrels.of(q)) for q in range(len(task.texts)))
    few = load_task("events", size=300, seed=1, queries=20)
    assert few.texts == task.texts[:len(few.texts)] and few.positives.max() == 19


def test_views(task):
    for views in (1, 2):
        x = load_task("events", size=300, seed=1, views=views, queries=1).items
        assert x.shape == ((300, 128) if views == 1 else (300, 2, 128)) and np.allclose(np.linalg.norm(x, axis=-1), 1, atol=1e-5)
    assert np.allclose(load_task("events", size=300, seed=1, views=1, queries=1).items, unit(task.items.mean(1)), atol=1e-5)


def test_latent_stands_in_for_pixels(task):
    latent = load_task("events", size=300, seed=1, source="latent")
    assert latent.texts == task.texts and (latent.qrels.rows == task.qrels.rows).all()
    assert (latent.items * task.items).sum(-1).mean() > 0.9 and abs(r10(latent) - r10(task)) < 0.06
    assert (load_task("events", size=300, seed=1, source="latent").items == latent.items).all()


def test_latent_pools_nest(encoder):
    a, b = (small.latent_scenes(encoder, make_scenes(n, 3), 3, 1, chunk=c) for n, c in ((70, 70), (200, 64)))
    assert np.allclose(a, b[:70], atol=1e-5)


def test_auto_chooses_by_size(monkeypatch):
    from grnb.features import tasks
    monkeypatch.setattr(tasks, "PIXELS", 50)
    auto, latent = (load_task("events", size=60, source=s, queries=5).items for s in ("auto", "latent"))
    assert (auto == latent).all() and not np.allclose(load_task("events", size=50, queries=5).items, latent[:50], atol=1e-3)


def test_training_batches_are_functions_of_the_step():
    words = small.vocabulary()
    a, b, c = (small.training_batch(s, words, size=8) for s in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not torch.equal(a[0], c[0])
    assert a[4].gather(1, a[3][:, None]).all()                   # every caption matches the view it was written for


def test_a_short_training_learns():
    torch.manual_seed(0)
    model, words = small.SmallEncoder(small.vocabulary()), small.vocabulary()
    result = train(model, lambda step: small.training_batch(step, words, size=24), small.pair_loss, steps=24, lr=2e-3, eval_every=8, device="cpu")
    assert result.losses[-1][1] < result.losses[0][1] - 0.5


def test_save_and_load(encoder, tmp_path):
    f = tmp_path/"w.safetensors"
    small.save_small(encoder, f)
    assert f.read_bytes() == small.WEIGHTS.read_bytes()          # the shipped numbers are half precision already
    assert (small.load_small(f).encode_texts(["a red ball"]) == encoder.encode_texts(["a red ball"])).all()
    with pytest.raises(FileNotFoundError, match="no weights here"): small.load_small(tmp_path/"none")
    f.write_bytes(f.read_bytes()[:-2])
    with pytest.raises(ValueError, match="bytes, got"): small.load_small(f)
    save_arrays(f, {"x": np.zeros(2)}, {"kind": "other"})
    with pytest.raises(ValueError, match="weights of a small encoder"): small.load_small(f)
    save_arrays(f, {"net/x": np.zeros(2)}, {"kind": "grnb small encoder", "words": ["red"]})
    with pytest.raises(ValueError, match="do not fit"): small.load_small(f)
