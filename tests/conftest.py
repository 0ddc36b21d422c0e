"""Shared fixtures. Importing the package here fails the whole run early if `nbdev_export` was forgotten."""
import os
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


@pytest.fixture
def root():
    "Repository root"
    return ROOT
