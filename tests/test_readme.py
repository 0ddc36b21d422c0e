"""What the README tells a reader to type exists and works; what it links to is there."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT/'README.md'
TEXT = README.read_text(encoding='utf-8') if README.exists() else ''
BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```', TEXT, re.M | re.S) + [('', m) for m in re.findall(r'\n\n((?: {4}\S.*\n)+)', TEXT)]
PYTHON = [body for kind, body in BLOCKS if kind == 'python']
SHELL = [line.split(' #')[0].strip().removeprefix('$ ') for kind, body in BLOCKS if kind in ('', 'sh', 'bash', 'console', 'shell') for line in body.split('\n')]
INLINE = re.findall(r'`((?:make|grnb) [^`]+)`', TEXT)
COMMANDS = sorted({line for line in [*SHELL, *INLINE] if re.match(r'(\w+=\S+ )*(make|grnb) ', line + ' ')})


def words(line):
    "A command's words without the variables set before it"
    return [w for i, w in enumerate(shlex.split(line)) if not re.fullmatch(r'[A-Z_]+=.*', w)]


def test_readme_says_how_to_start():
    assert README.exists(), 'README.md is missing'
    assert {'make reproduce', 'make test'} <= {' '.join(words(c)[:2]) for c in COMMANDS} and PYTHON


@pytest.mark.parametrize('line', [c for c in COMMANDS if words(c)[0] == 'make'])
def test_make_targets_exist(line):
    targets = set(re.findall(r'^([\w-]+):', (ROOT/'Makefile').read_text(), re.M))
    assert [w for w in words(line)[1:] if not w.startswith('-') and w not in targets] == []


@pytest.mark.parametrize('line', [c for c in COMMANDS if words(c)[0] == 'grnb'])
def test_commands_and_flags_exist(line):
    "The subcommand answers --help, and its help names every flag the README uses."
    args = words(line)[1:]
    call = f'import sys; sys.argv = ["grnb", {", ".join(map(repr, [*args[:1], "--help"]))}]\nfrom grnb.cli import main\nsys.exit(main())'
    r = subprocess.run([sys.executable, '-c', call], cwd=ROOT, capture_output=True, text=True, env=os.environ | {'COLUMNS': '200'})
    assert r.returncode == 0, r.stderr
    assert [a.split('=')[0] for a in args if a.startswith('--') and a.split('=')[0] not in r.stdout] == []


@pytest.mark.parametrize('body', PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(body, tmp_path):
    env = os.environ | {'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'agg'}
    r = subprocess.run([sys.executable, '-c', body], cwd=tmp_path, capture_output=True, text=True, timeout=300, env=env)
    assert r.returncode == 0, r.stderr


def test_links_lead_somewhere():
    links = [l.split('#')[0] for l in re.findall(r'\]\(([^)\s]+)\)', TEXT) if not re.match(r'\w+:|#', l)]
    assert [l for l in links if not (ROOT/l).exists()] == []


def test_every_notebook_is_listed():
    assert [p.name for p in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')) if p.name not in TEXT and p.stem not in TEXT] == []


def test_paths_in_the_text_exist():
    named = set(re.findall(r'`((?:nbs|tests|figures|grnb)/[\w./-]+)`', TEXT))
    assert [p for p in named if not (ROOT/p).exists()] == []
