"""data and features.tasks: tasks that check themselves, the embedded world against its definition, readers of files."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grnb.data import events as ev
from grnb.data.flickr8k import VALUE, read_flickr8k, standardise
from grnb.data.render import FRAMES, PITCHES, RATE, SAMPLES, SIDE, SIZES, render, within
from grnb.data.task import Qrels, Task, qrels_of
from grnb.features.tasks import load_task, tfidf_vectors

fast = settings(max_examples=60, deadline=None)
pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 8)), max_size=40)


# --- qrels

@fast
@given(pairs)
def test_qrels_are_the_set_of_pairs(given_pairs):
    q = qrels_of([a for a, _ in given_pairs], [b for _, b in given_pairs], 7)
    assert [q.of(i).tolist() for i in range(7)] == [sorted({b for a, b in given_pairs if a == i}) for i in range(7)]
    assert q.counts().sum() == len(set(given_pairs)) == len(q.rows) == len(q.queries())


@fast
@given(pairs, st.lists(st.integers(0, 6), max_size=9), st.permutations(range(9)), st.integers(0, 9))
def test_qrels_select_and_restrict(given_pairs, queries, items, keep):
    q = qrels_of([a for a, _ in given_pairs], [b for _, b in given_pairs], 7)
    picked = q.select(np.array(queries, int))
    assert [picked.of(i).tolist() for i in range(len(queries))] == [q.of(a).tolist() for a in queries]
    kept = list(items[:keep])
    part = q.restrict(np.array(kept, int), 9)
    assert [part.of(i).tolist() for i in range(7)] == [sorted(kept.index(b) for b in q.of(i) if b in kept) for i in range(7)]


def test_qrels_select_takes_a_mask():
    q = qrels_of([0, 1, 2], [5, 6, 7], 3)
    assert q.select(np.array([True, False, True])).rows.tolist() == [5, 7]


# --- task

def toy(**fields):
    base = dict(name="toy", items=np.eye(5), queries=np.ones((3, 2)), texts=["a", "b", "c"], positives=[1, 2, 4],
                qrels=qrels_of([0, 0, 1, 2], [1, 4, 2, 4], 3), item_split=["train", "train", "train", "dev", "test"])
    return Task(**{**base, **fields})


@pytest.mark.parametrize("field, value, says", [
    ("items", np.zeros(5), "items: expected shape"),
    ("items", np.full((5, 2), np.nan), "items: expected finite"),
    ("queries", np.ones((3, 2, 2)), "queries: expected shape"),
    ("texts", ["a", "b"], "texts: expected 3 strings, got 2"),
    ("texts", "abc", "texts: expected 3 strings, got one string"),
    ("texts", ["a", "b", 3], "texts: expected strings, got int at 2"),
    ("positives", [1, 2, 5], "positives: expected rows from 0 to 4"),
    ("positives", [1, 2, -1], "positives: expected rows from 0 to 4"),
    ("positives", [1., 2., 4.], "positives: expected 3 whole numbers"),
    ("positives", [1, 2], "positives: expected 3 whole numbers"),
    ("positives", [1, 1, 4], "qrels: query 1 does not match its own item 1"),
    ("qrels", [1, 2], "qrels: expected Qrels"),
    ("qrels", Qrels(np.array([0, 1, 2]), np.array([1, 2])), "qrels.indptr: expected 4 whole numbers"),
    ("qrels", Qrels(np.array([0, 2, 1, 3]), np.array([1, 2, 4])), "qrels.indptr: expected an ascent"),
    ("qrels", Qrels(np.array([0, 1, 2, 4]), np.array([1, 2, 4])), "qrels.indptr: expected an ascent"),
    ("qrels", Qrels(np.array([0, 1, 2, 3]), np.array([1, 2, 9])), "qrels.rows: expected rows from 0 to 4"),
    ("qrels", Qrels(np.array([0, 2, 3, 4]), np.array([4, 1, 2, 4])), "qrels.rows: expected ascending"),
    ("item_split", ["train"] * 4, "item_split: expected 5 names"),
    ("item_split", ["train"] * 4 + ["validation"], "item_split: expected names of train, dev, test, empty, got 'validation'"),
    ("query_split", ["train", "dev", "test"], "query_split: query 1 is dev, but its item 2 is train"),
])
def test_task_names_the_field(field, value, says):
    with pytest.raises(ValueError, match="^.*" + says.replace("(", r"\(")): toy(**{field: value})


def test_task_without_queries():
    t = toy(queries=np.zeros((0, 2)), texts=[], positives=[], qrels=qrels_of([], [], 0))
    assert t.part("test").items.shape == (1, 5) and "0 queries" in repr(t)


@fast
@given(st.integers(0, 2**32 - 1))
def test_part_keeps_what_belongs_together(seed):
    draw = np.random.default_rng(seed)
    n, q = draw.integers(3, 20), draw.integers(1, 30)
    positives = draw.integers(0, n, q)
    extra = draw.integers(0, n, (2, q))
    t = Task("r", np.arange(n)[:, None] + 1., np.arange(q)[:, None] + 1., [f"q{i}" for i in range(q)], positives,
             qrels_of(np.tile(np.arange(q), 3), np.r_[positives, extra[0], extra[1]], q), draw.choice(["train", "dev", "test"], n))
    for splits in ("train", ("dev", "test")):
        p = t.part(splits)
        rows = t.pool(splits)
        assert (p.items[:, 0] == rows + 1).all() and set(p.item_split) <= set(np.atleast_1d(splits))
        for i, text in enumerate(p.texts):
            o = int(text[1:])
            assert p.queries[i, 0] == o + 1 and rows[p.positives[i]] == positives[o]
            assert rows[p.qrels.of(i)].tolist() == [r for r in t.qrels.of(o) if r in rows]
        assert len(p.texts) == np.isin(t.item_split[positives], splits).sum()


def test_sub_rejects():
    with pytest.raises(ValueError, match="asks for item 4"): toy().sub([0, 1], [2])
    with pytest.raises(ValueError, match="each row at most once"): toy().sub([1, 1], [0])
    with pytest.raises(ValueError, match="rows from 0 to 4"): toy().sub([1, 7], [0])
    with pytest.raises(ValueError, match="got 'val'"): toy().part("val")


def test_replace_keeps_the_checks():
    assert replace(toy(), name="other").name == "other"
    with pytest.raises(ValueError, match="positives"): replace(toy(), positives=[0, 0, 9])


# --- events

def test_small_worlds_are_the_start_of_large_ones():
    a, b = ev.make_scenes(130, 3), ev.make_scenes(1000, 3)
    e = a.starts[-1]
    assert (a.starts == b.starts[:131]).all() and (a.latent == b.latent[:e]).all() and (a.quarters == b.quarters[:e]).all()
    assert (ev.make_splits(130, 3) == ev.make_splits(1000, 3)[:130]).all()
    assert ev.make_captions(ev.words_of(a.latent), np.arange(e), seed=3).texts == ev.make_captions(ev.words_of(b.latent), np.arange(e), seed=3).texts
    assert not (a.latent[:100] == ev.make_scenes(130, 4).latent[:100]).any()


@fast
@given(st.integers(1, 300), st.integers(0, 1000))
def test_scenes_are_whole(size, seed):
    s = ev.make_scenes(size, seed)
    n = np.diff(s.starts)
    assert len(s) == size and n.min() >= 1 and n.max() <= 4
    assert (np.add.reduceat(s.quarters, s.starts[:-1]) == 4).all() and s.quarters.min() >= 1
    event, lasted = s.shown()
    assert (s.videos()[event] == np.arange(size)[:, None]).all() and (np.diff(event, axis=1) >= 0).all()
    assert ((lasted == 0) | (np.diff(event, axis=1, prepend=-1) == 0)).all() and (lasted < s.quarters[event]).all()
    assert (0 <= s.latent).all() and (s.latent < 1).all()
    part = s.take(size // 3, size)
    assert (part.latent == s.latent[s.starts[size // 3]:]).all() and len(part) == size - size // 3


def test_splits_are_exact():
    names, counts = np.unique(ev.make_splits(1000, 5), return_counts=True)
    assert dict(zip(names.tolist(), counts.tolist())) == {"dev": 100, "test": 100, "train": 800}


def test_words_cover_every_bin_and_sound_like_them():
    words = ev.words_of(ev.make_scenes(3000).latent)
    for i, (a, options) in enumerate(ev.WORDS.items()): assert np.unique(words[i]).tolist() == list(range(len(options)))
    for a, options in ev.SYNONYMS.items(): assert len(options) == len(ev.WORDS[a])
    assert len(ev.MOTIONS) == len(ev.WORDS["motion"])


def test_a_caption_says_what_it_mentions():
    scenes = ev.make_scenes(60, 9)
    words = ev.words_of(scenes.latent)
    c = ev.make_captions(words, np.arange(scenes.starts[-1]), each=6, seed=9)
    for text, e, mention in zip(c.texts, c.events, c.mentions):
        for i, a in enumerate(ev.ATTRIBUTES):
            group = [s for pair in ev.MOTIONS[words[i, e]] for s in pair] if a == "motion" else ev.SYNONYMS[a][words[i, e]]
            if mention[i]: assert any(s in text for s in group), (text, a)
        assert "{" not in text and "  " not in text and " a a" not in text and " a e" not in text and " a o" not in text
        assert mention.sum() >= 4


def test_paraphrases_differ_in_form_and_mentions():
    scenes = ev.make_scenes(50)
    c = ev.make_captions(ev.words_of(scenes.latent), np.arange(scenes.starts[-1]))
    texts, mentions = np.array(c.texts).reshape(-1, 4), c.mentions.reshape(-1, 4, len(ev.ATTRIBUTES))
    assert all(len(set(row)) == 4 for row in texts)
    assert np.mean([len({m.tobytes() for m in row}) for row in mentions]) > 3.3


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 500), st.integers(5, 80))
def test_match_is_the_definition(seed, size):
    scenes = ev.make_scenes(size, seed)
    words = ev.words_of(scenes.latent)
    c = ev.make_captions(words, ev.asked_events(scenes, 6), seed=seed)
    q, videos = ev.match(scenes, words, c), scenes.videos()
    for i, (e, m) in enumerate(zip(c.events, c.mentions)):
        assert q.of(i).tolist() == np.unique(videos[(words[m] == words[m][:, [e]]).all(0)]).tolist()
        assert videos[e] in q.of(i)


def test_more_videos_more_matches():
    means = [row["mean"] for row in ev.matches_by_size((100, 1000, 10_000), videos=50)]
    assert means == sorted(means) and means[0] >= 1


def test_a_million_scenes_stay_distinct():
    s = ev.make_scenes(1_000_000)
    assert len(np.unique(s.latent[:, :8].copy().view("V32"))) == len(s.latent)


def test_events_bad_input():
    with pytest.raises(ValueError, match="size: expected at least 1"): ev.make_scenes(0)
    with pytest.raises(ValueError, match="size: expected a whole number"): ev.make_scenes(2.5)
    with pytest.raises(ValueError, match="each: expected at most"): ev.make_captions(ev.words_of(ev.make_scenes(3).latent), [0], each=20)


# --- render

def test_render_is_deterministic_and_independent_of_chunks():
    s = ev.make_scenes(30, 2)
    frames, sound = render(s)
    assert frames.shape == (30, FRAMES, SIDE, SIDE, 3) and frames.dtype == np.uint8
    assert sound.shape == (30, FRAMES, SAMPLES) and sound.dtype == np.float32 and np.abs(sound).max() <= 1
    again = render(s.take(10, 20), chunk=3)
    assert (again[0] == frames[10:20]).all() and (again[1] == sound[10:20]).all()
    assert len({f.tobytes() for f in frames}) == 30


def one(**attributes):
    "A video of one event with the named words, each in the middle of its bin, the shape in the middle of the picture"
    u = np.full((1, ev.LATENT), 0.5, np.float32)
    for a, w in {**{a: o[0] for a, o in ev.WORDS.items()}, "motion": "rest", **attributes}.items():
        edges = np.r_[0, ev.EDGES[a], 1]
        k = ev.WORDS[a].index(w)
        u[0, ev.ATTRIBUTES.index(a)] = (edges[k] + edges[k + 1]) / 2
    return ev.Scenes(np.array([0, 1]), np.array([4], np.uint8), u)


def test_words_come_back_from_latent():
    s = one(colour="green", timbre="buzz")
    assert ev.WORDS["colour"][within(s.latent, "colour")[0][0]] == "green" and abs(within(s.latent, "colour")[1][0] - 0.5) < 1e-4


@pytest.mark.parametrize("colour, channel", [("red", 0), ("green", 1), ("blue", 2)])
def test_colour_is_seen(colour, channel):
    pixel = render(one(colour=colour, size="big", place="city"))[0][0, 0, 16, 16].astype(int)
    assert pixel.argmax() == channel and pixel.max() - np.median(pixel) > 80


def mass(frames):
    "Share of strongly red pixels in each frame, and their centre"
    red = (frames[..., 0].astype(int) - frames[..., 1] > 120) & (frames[..., 0].astype(int) - frames[..., 2] > 120)
    yx = np.array([np.argwhere(f).mean(0) if f.any() else [np.nan] * 2 for f in red])
    return red.mean((1, 2)), yx


def test_size_and_motion_are_seen():
    see = lambda **a: mass(render(one(colour="red", place="city", **a))[0][0])
    small, big = see(size="small")[0][0], see(size="big")[0][0]
    assert abs(small - np.pi * SIZES[0].mean()**2 / SIDE**2) < 0.02 and abs(big - np.pi * SIZES[1].mean()**2 / SIDE**2) < 0.04
    for motion, axis, sign in (("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)):
        step = [np.diff(see(size="small", motion=motion, speed=speed)[1][:3], axis=0).mean(0) for speed in ("slow", "fast")]
        assert sign * step[0][axis] > 0.5 and sign * step[1][axis] > 2 * sign * step[0][axis]
    assert np.allclose(see(motion="rest")[1], see(motion="rest")[1][0])
    pulse = see(motion="pulse")[0]
    assert (pulse[::2] > 1.5 * pulse[1::2]).all()
    assert (see(motion="blink")[0][1::2] < 0.01).all()


@pytest.mark.parametrize("pitch, row", [("low", 0), ("high", 1), ("middle", 2)])
def test_pitch_is_heard(pitch, row):
    sound = render(one(pitch=pitch))[1][0].reshape(-1)
    heard = np.abs(np.fft.rfft(sound)).argmax() * RATE / len(sound)
    assert abs(heard - PITCHES[row].mean()) < 5


def test_rhythm_is_heard():
    loud = lambda r: np.square(render(one(rhythm=r, pitch="high"))[1][0].reshape(-1, 16)).mean(1)
    assert loud("steady").min() > 0.5 * loud("steady").max() and loud("beating").min() < 0.05 * loud("beating").max()


# --- flickr8k's files

def write_tiny(folder, images=None, captions=None):
    draw = np.random.default_rng(0)
    (folder/"images.tsv").write_text(images or "image\tsplit\na.jpg\ttrain\nb.jpg\tdev\nc.jpg\ttest\nd.jpg\t\n")
    (folder/"captions.tsv").write_text(captions or "image_row\tcaption\n0\ta dog runs\n0\ta brown dog\n1\ttwo children run\n2\ta boat\n")
    np.save(folder/"image_views.npy", draw.integers(0, 255, (4, 5, 8), np.uint8))
    np.save(folder/"caption_minilm.npy", draw.standard_normal((4, 6)).astype(np.float16))
    return folder


def test_flickr8k_is_read(tmp_path, monkeypatch):
    folder = tmp_path/"flickr8k"
    folder.mkdir()
    write_tiny(folder)
    monkeypatch.setenv("GRNB_DATA", str(tmp_path))
    task = load_task("flickr8k")
    assert task.items.shape == (4, 5, 8) and task.queries.shape == (4, 6) and task.positives.tolist() == [0, 0, 1, 2]
    assert task.item_split.tolist() == ["train", "dev", "test", "empty"] and task.qrels.counts().tolist() == [1] * 4
    assert (load_task("flickr8k", path=folder).items == task.items).all()
    raw = np.sqrt(read_flickr8k(folder).views * VALUE)
    assert np.allclose(task.items, (raw - raw[:1].mean((0, 1))) / raw[:1].std((0, 1)), atol=1e-4)
    words = load_task("flickr8k", path=folder, text="tfidf")
    assert np.allclose(np.linalg.norm(words.queries, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("images, captions, says", [
    ("image\tsplit\na.jpg\ttrain\nb.jpg\tvalid\n", None, r"images.tsv, line 3: expected a split of .*'valid'"),
    ("image\tsplit\na.jpg\n", None, r"images.tsv, line 2: expected 2 fields, got 1"),
    ("name\tsplit\na.jpg\ttrain\n", None, r"images.tsv, line 1: expected the header"),
    (None, "image_row\tcaption\n0\tx\n9\ty\n", r"captions.tsv, line 3: expected an image row from 0 to 3, got '9'"),
    (None, "image_row\tcaption\n-1\tx\n", r"captions.tsv, line 2: expected an image row"),
    (None, "image_row\tcaption\n0\t \n", r"captions.tsv, line 2: expected a caption"),
    (None, "image_row\tcaption\n0\tx\ty\n", r"captions.tsv, line 2: expected 2 fields, got 3"),
    (None, "image_row\tcaption\n0\tx\n", r"caption_minilm.npy: expected 1 rows"),
    ("image\tsplit\na.jpg\ttrain\n", "image_row\tcaption\n0\tx\n", r"image_views.npy: expected 1 rows"),
])
def test_bad_lines_are_named(tmp_path, images, captions, says):
    with pytest.raises(ValueError, match=says): read_flickr8k(write_tiny(tmp_path, images, captions))


def test_bad_arrays_are_named(tmp_path):
    write_tiny(tmp_path)
    (tmp_path/"captions.tsv").write_bytes(b"image_row\tcaption\n0\t\xff\n")
    with pytest.raises(ValueError, match="line 2: not UTF-8"): read_flickr8k(tmp_path)
    write_tiny(tmp_path)
    np.save(tmp_path/"image_views.npy", np.array([{}] * 4, object), allow_pickle=True)
    with pytest.raises(ValueError, match="image_views.npy: not an array"): read_flickr8k(tmp_path)
    (tmp_path/"image_views.npy").unlink()
    with pytest.raises(FileNotFoundError, match="image_views.npy"): read_flickr8k(tmp_path)


def test_statistics_come_from_training_photos_only(tmp_path):
    views = np.random.default_rng(1).integers(0, 255, (6, 5, 4), np.uint8)
    train = np.array([True, True, True, False, False, False])
    other = views.copy()
    other[3:] = 7
    assert (standardise(views, train)[:3] == standardise(other, train)[:3]).all()
    flat = np.full((2, 1, 3), 9, np.uint8)
    assert np.isfinite(standardise(flat, np.array([True, False]))).all()
    with pytest.raises(ValueError, match="at least one training photo"): standardise(views, ~train & train)


def test_tfidf_is_fitted_on_training_texts_only():
    texts, train = ["a red dog", "a blue cat", "red cat runs", "zebra zebra"], np.array([True, True, True, False])
    a, b = tfidf_vectors(texts, train), tfidf_vectors(texts[:3] + ["red quagga"], train)
    assert np.allclose(a[:3], b[:3]) and np.isfinite(a).all()


# --- load_task

@pytest.mark.parametrize("name, options, error, says", [
    ("kinetics", {}, ValueError, "expected one of events, flickr8k, msrvtt, actnet, didemo, lsmdc, got 'kinetics'"),
    ("events", dict(size=9), ValueError, "size: expected at least 10, got 9"),
    ("events", dict(size=1_000_001), ValueError, "size: expected at most"),
    ("events", dict(seed=-1), ValueError, "seed: expected at least 0"),
    ("events", dict(seed=10**9), ValueError, "seed: expected below"),
    ("events", dict(source="video"), ValueError, "source: expected auto, pixels or latent"),
    ("events", dict(views=3), ValueError, "views: expected 1, 2 or 4"),
    ("events", dict(queries=0), ValueError, "queries: expected at least 1"),
    ("events", dict(path="x"), ValueError, "path: events takes"),
    ("events", dict(colour="red"), ValueError, "colour: events takes"),
    ("flickr8k", dict(size=5, path="x"), ValueError, "size: flickr8k takes"),
    ("flickr8k", dict(path="/nowhere"), FileNotFoundError, "set GRNB_DATA"),
    ("flickr8k", dict(path="/nowhere", text="bert"), ValueError, "text: expected minilm or tfidf"),
])
def test_load_task_names_what_is_wrong(name, options, error, says):
    with pytest.raises(error, match=says): load_task(name, **options)


def test_missing_data_says_what_to_set(monkeypatch):
    monkeypatch.delenv("GRNB_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="set GRNB_DATA to the folder that holds flickr8k/"): load_task("flickr8k")
