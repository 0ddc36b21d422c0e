"""data.fetch: the hub's real client against a small hub on this machine, which can break off, spoil files, or be gone."""
import hashlib
import json
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

from grnb.cli import main
from grnb.data import fetch
from grnb.data.fetch import GRDR_HUB, fetch_grdr, grdr_pattern

COMMIT = 'c' * 40
FILES = {'InternVideo2/didemo/video_embeddings_test.pkl': 300_000, 'InternVideo2/didemo/text_embeddings_test.pkl': 5_000, 'InternVideo2/didemo/README.md': 70, 'InternVideo2/lsmdc/video_embeddings_test.pkl': 900,
         'GRDR/didemo/best_model/best_model.pt': 40_000, 'GRDR/didemo/best_model/best_model.pt.code': 800, 'Xpool_features/didemo/a_1.npz': 700, 'Xpool/didemo_model_best.pth': 600, 'README.md': 10}
LARGE = ('.pkl', '.pt', '.npz', '.pth')


def content(path): return hashlib.sha256(path.encode()).digest() * (FILES[path] // 32 + 1)


def body(path): return content(path)[:FILES[path]]


class Hub(BaseHTTPRequestHandler):
    "As much of the hub as its client asks for"
    def __init__(self, state, *args): self.state = state; super().__init__(*args)
    def log_message(self, *args): pass

    def send(self, raw, **headers):
        self.send_response(headers.pop('status', 200))
        for k, v in {'Content-Length': len(raw), **headers}.items(): self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(raw)

    def entry(self, path):
        raw = body(path)
        out = dict(type='file', path=path, size=len(raw), oid=hashlib.sha1(b'blob %d\0' % len(raw) + raw).hexdigest())
        return out | (dict(lfs=dict(oid=hashlib.sha256(raw).hexdigest(), size=len(raw), pointerSize=130)) if path.endswith(LARGE) else {})

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if '/revision/' in path: return self.send(json.dumps(dict(id=GRDR_HUB, sha=COMMIT, siblings=[dict(rfilename=p) for p in FILES])).encode(), Content_Type='application/json')
        if '/tree/' in path:
            below = path.partition(f'/tree/{COMMIT}')[2].strip('/')
            some = [p for p in self.state.files if not below or p.startswith(below + '/')]
            if not some: return self.send(b'', status=404, X_Error_Code='EntryNotFound')
            return self.send(json.dumps([dict(type='directory', path='GRDR', oid='0' * 40, size=0)] + [self.entry(p) | self.state.listed.get(p, {}) for p in some]).encode(), Content_Type='application/json')
        name = path.partition(f'/resolve/{COMMIT}/')[2]
        if name not in FILES: return self.send(b'', status=404, X_Error_Code='EntryNotFound')
        e, raw = self.entry(name), self.state.spoil.get(name, body(name))
        etag, start = e.get('lfs', e)['oid'], 0
        if (r := self.headers.get('Range')) and self.command == 'GET': start = int(r.removeprefix('bytes=').split('-')[0])
        self.state.asked.append((self.command, name, start))
        headers = dict(ETag=f'"{etag}"', X_Repo_Commit=COMMIT, X_Linked_Size=e['size'], X_Linked_Etag=f'"{etag}"', Accept_Ranges='bytes')
        if self.command == 'GET' and name == self.state.breaks:
            self.state.breaks = None
            self.send_response(200)
            for k, v in (headers | dict(Content_Length=len(raw))).items(): self.send_header(k.replace('_', '-'), str(v))
            self.end_headers()
            self.wfile.write(raw[:len(raw) // 2]); self.wfile.flush()
            return self.connection.close()
        if start: headers['Content_Range'] = f'bytes {start}-{len(raw) - 1}/{len(raw)}'
        self.send(raw[start:], status=206 if start else 200, **headers)

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch):
    "A hub that answers the real client"
    import huggingface_hub.constants as constants
    state = SimpleNamespace(asked=[], breaks=None, spoil={}, listed={}, files=list(FILES))
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Hub, state))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}'
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'ENDPOINT', url)
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 4096)                # the client keeps whole chunks of a file that breaks off
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setenv('HF_HUB_DISABLE_PROGRESS_BARS', '1')
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, 'HfApi', partial(huggingface_hub.HfApi, endpoint=url))
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', partial(huggingface_hub.snapshot_download, endpoint=url))
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', partial(huggingface_hub.hf_hub_download, endpoint=url))
    yield state
    server.shutdown()
    server.server_close()


def there(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file() and '.cache' not in p.parts and p.name != 'fetched.json'}


def got(state): return sorted({name for how, name, _ in state.asked if how == 'GET'})


def test_what_is_wanted_comes_and_nothing_else(hub, tmp_path):
    said = []
    fetch_grdr('didemo', tmp_path, ('features', 'checkpoints', 'frames'), say=said.append)
    want = {p: body(p) for p in FILES if p.split('/')[0] in ('InternVideo2', 'GRDR', 'Xpool_features') and '/didemo/' in p}
    assert there(tmp_path) == want and len(said) == 3 and '3 files, 305,070 bytes, 3 fetched' in said[0]
    note = json.loads((tmp_path/'fetched.json').read_text())
    assert note['commit'] == COMMIT and set(note['files']) == set(want)
    hub.asked.clear()
    fetch_grdr(['didemo'], tmp_path, ('features', 'checkpoints', 'frames'), say=said.append)
    assert hub.asked == [] and '0 fetched' in said[-1]


def test_files_that_lie_there_already_are_compared_and_kept(hub, tmp_path):
    for p in FILES:
        (tmp_path/p).parent.mkdir(parents=True, exist_ok=True); (tmp_path/p).write_bytes(body(p))
    wrong = tmp_path/'GRDR/didemo/best_model/best_model.pt'
    wrong.write_bytes(body('GRDR/didemo/best_model/best_model.pt')[::-1])                 # the size is right, the bytes are not
    fetch_grdr('didemo', tmp_path, ('features', 'checkpoints'), say=lambda s: None)
    assert got(hub) == ['GRDR/didemo/best_model/best_model.pt'] and wrong.read_bytes() == body('GRDR/didemo/best_model/best_model.pt')


def test_many_files_come_several_at_a_time(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, 'FEW', 1)
    hub.breaks = big = 'InternVideo2/didemo/video_embeddings_test.pkl'
    try: fetch_grdr('didemo', tmp_path, ('features', 'checkpoints'), say=lambda s: None)
    except ConnectionError: pass
    fetch_grdr('didemo', tmp_path, ('features', 'checkpoints'), say=lambda s: None)
    assert there(tmp_path) == {p: body(p) for p in FILES if p.split('/')[0] in ('InternVideo2', 'GRDR') and '/didemo/' in p}
    hub.spoil['InternVideo2/didemo/text_embeddings_test.pkl'] = b'y' * 5000
    for p in (big, 'InternVideo2/didemo/text_embeddings_test.pkl'): (tmp_path/p).unlink()
    with pytest.raises(ValueError, match='text_embeddings_test.pkl: downloaded twice'): fetch_grdr('didemo', tmp_path, 'features', say=lambda s: None)
    assert there(tmp_path)[big] == body(big)


def test_a_transfer_that_breaks_off_goes_on(hub, tmp_path):
    hub.breaks = big = 'InternVideo2/didemo/video_embeddings_test.pkl'
    try: fetch_grdr('didemo', tmp_path, 'features', say=lambda s: None)
    except ConnectionError as e: assert str(e).count('\n') == 0 and 'InternVideo2/didemo' in str(e)      # where the client does not try again by itself
    fetch_grdr('didemo', tmp_path, 'features', say=lambda s: None)
    starts = [s for how, name, s in hub.asked if how == 'GET' and name == big]
    assert len(starts) == 2 and starts[0] == 0 < starts[1] and there(tmp_path)[big] == body(big)


def test_a_spoilt_file_is_tried_twice_and_removed(hub, tmp_path):
    name = 'GRDR/didemo/best_model/best_model.pt'
    hub.spoil[name] = body(name)[::-1]
    with pytest.raises(ValueError, match=r'best_model\.pt: downloaded twice, and still not 40,000 bytes of sha256:[0-9a-f]{64}; removed'): fetch_grdr('didemo', tmp_path, 'checkpoints', say=lambda s: None)
    assert [n for how, n, _ in hub.asked if how == 'GET'].count(name) == 2 and name not in there(tmp_path)
    hub.spoil.clear()
    fetch_grdr('didemo', tmp_path, 'checkpoints', say=lambda s: None)
    assert there(tmp_path)[name] == body(name)


def test_small_files_are_compared_too(hub, tmp_path):
    hub.spoil['InternVideo2/didemo/README.md'] = b'x' * 70
    with pytest.raises(ValueError, match=r'README\.md: downloaded twice, and still not 70 bytes of git:'): fetch_grdr('didemo', tmp_path, 'features', say=lambda s: None)


def test_a_file_of_an_earlier_commit_is_replaced(hub, tmp_path):
    fetch_grdr('lsmdc', tmp_path, 'features', say=lambda s: None)
    note = json.loads((tmp_path/'fetched.json').read_text())
    old = tmp_path/'InternVideo2/lsmdc/video_embeddings_test.pkl'
    old.write_bytes(b'o' * 900)
    note['files']['InternVideo2/lsmdc/video_embeddings_test.pkl'] = 'sha256:' + hashlib.sha256(b'o' * 900).hexdigest()
    (tmp_path/'fetched.json').write_text(json.dumps(note))
    fetch_grdr('lsmdc', tmp_path, 'features', say=lambda s: None)
    assert old.read_bytes() == body('InternVideo2/lsmdc/video_embeddings_test.pkl')


def test_a_list_that_leads_out_of_the_folder_is_refused(hub, tmp_path):
    hub.listed['InternVideo2/didemo/README.md'] = dict(path='InternVideo2/didemo/../../../../evil')
    with pytest.raises(ValueError, match='leads out of its folder'): fetch_grdr('didemo', tmp_path/'in', 'features')
    assert not (tmp_path/'in').exists()


def test_what_the_hub_does_not_have_is_named(hub, tmp_path):
    hub.files = [f for f in FILES if 'lsmdc' not in f]
    with pytest.raises(ValueError, match=r'has no InternVideo2/lsmdc/\* at commit cccccccccccc'): fetch_grdr('lsmdc', tmp_path, 'features')


def test_a_damaged_note_is_named(hub, tmp_path):
    (tmp_path/'fetched.json').write_text('{"files": [1]}')
    with pytest.raises(ValueError, match='fetched.json: not what fetch_grdr writes'): fetch_grdr('lsmdc', tmp_path, 'features')


def test_the_disk_s_errors_are_its_own(tmp_path):
    def full(): raise OSError(28, 'No space left on device')
    with pytest.raises(OSError, match='No space left') as e: fetch._asked(full, ['p'], tmp_path)
    assert not isinstance(e.value, ConnectionError)
    def reset(): raise ConnectionResetError(104, 'reset')
    with pytest.raises(ConnectionError, match=r'no answer from the hub \(ConnectionResetError'): fetch._asked(reset, ['p'], tmp_path)


@pytest.mark.parametrize('args, says', [
    (('panda', 'out'), 'datasets: expected some of msrvtt, actnet, didemo, lsmdc'), (('didemo', 'out', 'videos'), 'parts: expected some of features'), (([], 'out'), 'at least one of each'), (('didemo', ''), 'out: expected a folder')])
def test_wrong_calls_ask_nobody(args, says, monkeypatch):
    monkeypatch.setattr(fetch, '_asked', None)
    with pytest.raises(ValueError, match=says): fetch_grdr(*args)


def test_rerankers_have_the_names_of_the_release():
    assert [grdr_pattern('rerankers', d) for d in fetch.GRDR_DATASETS] == [f'Xpool/{n}_model_best.pth' for n in ('msrvtt9k', 'actnet', 'didemo', 'lsmdc')]


# --- the command

def test_the_command_fetches(hub, tmp_path, capsys):
    assert main(['data', 'grdr', '--datasets', 'didemo', '--parts', 'features', 'rerankers', '--out', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert 'Xpool/didemo_model_best.pth: 1 files' in out and 'data/ of https://github.com/JasonCodeMaker/GRDR' in out and len(there(tmp_path)) == 4


@pytest.mark.parametrize('words, says', [('data grdr', '--out'), ('data grdr --out o --datasets panda', 'datasets'), ('data grdr --out o --task events', '--task'), ('data --datasets didemo', 'grnb data grdr'), ('data grdx', 'grdx'), ('data grdr --out o --parts x', 'parts')])
def test_wrong_words_are_one_line(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    err = capsys.readouterr().err
    assert says in err and err.count('\n') == 1 and list(tmp_path.iterdir()) == []


def test_without_a_network_one_line_says_what_to_do(tmp_path):
    code = "import sys; from grnb.cli import main; sys.exit(main(['data', 'grdr', '--datasets', 'didemo', '--out', 'released']))"
    env = {'HF_ENDPOINT': 'http://127.0.0.1:9', 'PYTHONPATH': str(Path(__file__).resolve().parents[1]), 'PATH': '', 'HOME': str(tmp_path)}
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and r.stdout == ''
    assert 'no answer from the hub' in r.stderr and 'https://huggingface.co/datasets/JasonCoderMaker/GRDR-TVR into released' in r.stderr and 'InternVideo2/didemo/*' in r.stderr
    assert not (tmp_path/'released').exists()
