"""Shared fixtures. Importing the package here fails the whole run early if `nbdev_export` was forgotten."""
import os
import sys
from pathlib import Path

os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('HF_HUB_OFFLINE', '1')             # no test reaches for the network

import pytest
from hypothesis import settings

import grnb  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
settings.register_profile('grnb', deadline=None, derandomize=True)   # the same examples every time
settings.load_profile('grnb')


def torch_threads(): return sys.modules['torch'].get_num_threads() if 'torch' in sys.modules else None

@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    item.threads = torch_threads()
    return (yield)

@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    "A test gives torch's threads back: with another number of them, a later test's training ends with other bits"
    out = yield
    assert item.threads in (None, torch_threads()), f'{item.threads} threads before the test, {torch_threads()} after'
    return out


@pytest.fixture
def root():
    "Repository root"
    return ROOT
