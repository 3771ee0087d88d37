"""A Hugging Face hub on this machine, which huggingface_hub's own client downloads from."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest


class Hub(http.server.ThreadingHTTPServer):
  """Serves one model, `owner/name`.

  Attributes:
    commits: commit -> file name -> content, oldest first; the last one is the newest revision.
    downloads: names of the files that were downloaded.
  """

  daemon_threads = True

  def __init__(self) -> None:
    super().__init__(('127.0.0.1', 0), _Handler)
    self.commits: dict[str, dict[str, bytes]] = {}
    self.downloads: list[str] = []

  def publish(self, files: dict[str, bytes]) -> str:
    """Adds a revision; returns its commit."""
    commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
    self.commits[commit] = files
    return commit

  def resolve(self, revision: str) -> str | None:
    """The commit of a revision."""
    commit = list(self.commits)[-1] if revision == 'main' else revision
    return commit if commit in self.commits else None


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  server: Hub

  def do_HEAD(self) -> None:
    """Answers with the headers of `do_GET`."""
    self._answer(body=False)

  def do_GET(self) -> None:
    """Answers the information of a revision, and its files."""
    self._answer(body=True)

  def log_message(self, *_) -> None:
    """Prints nothing."""

  def _answer(self, body: bool) -> None:
    path = self.path.split('?')[0].strip('/').split('/')
    if path[:4] == ['api', 'models', 'owner', 'name'] and path[4] in ('revision', 'tree'):
      commit = self.server.resolve(path[5])
      files = self.server.commits.get(commit or '', {})
      answer = {'id': 'owner/name', 'sha': commit}
      if path[4] == 'tree':
        answer = [
          {'type': 'file', 'path': name, 'size': len(data), 'oid': hashlib.sha1(data).hexdigest()}
          for name, data in files.items()
        ]
      content = json.dumps(answer).encode()
    elif path[:3] == ['owner', 'name', 'resolve']:
      commit, name = self.server.resolve(path[3]), '/'.join(path[4:])
      content = self.server.commits.get(commit or '', {}).get(name)
      if body:
        self.server.downloads.append(name)
    else:
      commit, content = None, None
    known = commit is not None and content is not None
    content = content if known else b''
    self.send_response(200 if known else 404)
    if known:
      self.send_header('X-Repo-Commit', commit)
      self.send_header('ETag', f'"{hashlib.sha1(content).hexdigest()}"')
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    if body:
      self.wfile.write(content)


@contextlib.contextmanager
def serving(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
  """Runs a hub, from which `huggingface_hub.snapshot_download` downloads to `cache`."""
  with Hub() as hub:
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{hub.server_address[1]}'
    download = huggingface_hub.snapshot_download
    redirected = functools.partial(download, endpoint=url, cache_dir=cache)
    patch.setattr(huggingface_hub, 'snapshot_download', redirected)
    yield hub
    hub.shutdown()
