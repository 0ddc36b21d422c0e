"Feature stores: resume after SIGKILL, random access against numpy, refusals, Ray where it is installed"
import signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from grnb.features.store import FeatureStore, fill, fill_ray, read_rows

ROOT = Path(__file__).parents[1]

def squares(part): return np.array([[x, x * x] for x in part], np.float32)


@given(st.integers(1, 40), st.integers(1, 50), st.data())
def test_rows_are_those_of_the_whole(tmp_path_factory, n, chunk, data):
    store = fill(FeatureStore(tmp_path_factory.mktemp("s")), list(range(n)), squares, chunk=chunk)
    which = data.draw(st.lists(st.integers(0, n - 1), max_size=30))
    assert len(store) == n and store.missing() == []
    assert np.array_equal(read_rows(store), squares(range(n)))
    assert np.array_equal(read_rows(store, which), squares(range(n))[np.array(which, int)])


SCRIPT = """
import sys, time; sys.path.insert(0, {root!r})
import numpy as np
from grnb.features.store import *
def slow(part): time.sleep(0.05); return np.array([[x, x * x] for x in part], np.float32)
fill(FeatureStore({folder!r}), list(range(200)), slow, chunk=5, about="squares")
"""

def test_killed_half_way_goes_on(tmp_path):
    p = subprocess.Popen([sys.executable, "-c", SCRIPT.format(root=str(ROOT), folder=str(tmp_path))])
    start = time.time()
    while len(list(tmp_path.glob("shard-*"))) < 3 and time.time() - start < 60: time.sleep(0.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    store, seen = FeatureStore(tmp_path), []
    left = store.missing()
    assert 0 < len(left) < 40
    fill(store, list(range(200)), lambda part: seen.append(part[0] // 5) or squares(part), chunk=5, about="squares")
    assert seen == left and np.array_equal(read_rows(store), squares(range(200)))


def test_more_than_one_dimension_and_half_precision(tmp_path):
    x = np.random.default_rng(0).random((7, 3, 4))
    store = fill(FeatureStore(tmp_path), x, lambda p: p, chunk=2, dtype="float16")
    y = read_rows(store)
    assert y.shape == (7, 3, 4) and y.dtype == np.float32 and np.abs(y - x).max() < 1e-3


@pytest.mark.parametrize("bad, words", [(lambda p: np.zeros(len(p)), "rows of vectors"), (lambda p: np.zeros((len(p) + 1, 2)), "expected 2 rows"),
    (lambda p: np.full((len(p), 2), np.nan), "NaN"), (lambda p: np.full((len(p), 2), 1e6), "infinity")])
def test_bad_encoders_leave_nothing(tmp_path, bad, words):
    with pytest.raises(ValueError, match=words): fill(FeatureStore(tmp_path), [1, 2], bad, dtype="float16")
    assert not list(tmp_path.glob("*shard*"))


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="dtype"): fill(FeatureStore(tmp_path), [1], squares, dtype="int8")
    with pytest.raises(ValueError, match="len"): fill(FeatureStore(tmp_path), [], squares)
    with pytest.raises(ValueError, match="chunk"): fill(FeatureStore(tmp_path), [1], squares, chunk=0)
    with pytest.raises(ValueError, match="empty; call fill"): read_rows(FeatureStore(tmp_path))
    store = fill(FeatureStore(tmp_path), [1, 2, 3], squares, chunk=2, about="a")
    for kw in (dict(chunk=3, about="a"), dict(chunk=2, about="b"), dict(chunk=2, about="a", dtype="float16")):
        with pytest.raises(ValueError, match="holds"): fill(FeatureStore(tmp_path), [1, 2, 3], squares, **kw)
    store.shard(0).write_bytes(b"half a file")
    with pytest.raises(ValueError, match="shard-00000"): read_rows(store)


def test_shards_of_different_width(tmp_path):
    store = fill(FeatureStore(tmp_path), [1, 2], lambda p: np.ones((1, p[0])), chunk=1)
    with pytest.raises(ValueError, match="shard-00001.* has vectors of shape"): read_rows(store)


def test_ray(tmp_path):
    try: import ray
    except ImportError:
        with pytest.raises(ImportError, match=r"grnb\[scale\]"): fill_ray(FeatureStore(tmp_path), [1], lambda: None)
        return
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        make = lambda: lambda part: np.array([[x, x * x] for x in part], np.float32)
        store = fill_ray(FeatureStore(tmp_path), list(range(50)), make, chunk=4)
        assert np.array_equal(read_rows(store), squares(range(50)))
        store.shard(3).unlink()
        assert np.array_equal(read_rows(fill_ray(store, list(range(50)), make, chunk=4)), squares(range(50)))
    finally: ray.shutdown()
