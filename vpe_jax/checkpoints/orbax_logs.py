"""Orbax's logs of errors that it also raises: dropped, because the caller reports them in one line.

Its threads log an error with a traceback before the caller gets it. If several arrays can't be
read, asyncio logs all errors but the first as never retrieved, when their tasks are deleted, and
TensorStore reports that it can't deliver the others.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback

_PACKAGE = os.sep + 'orbax' + os.sep


@functools.cache
def drop_reported_errors() -> None:
  """Drops these logs in this process; call it before Orbax is used."""
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(_is_news)
  report = sys.unraisablehook

  def report_others(event: sys.UnraisableHookArgs) -> None:
    undelivered = isinstance(event.exc_value, RuntimeError) and event.object is None
    if not (undelivered and str(event.exc_value) == 'Event loop is closed'):
      report(event)

  sys.unraisablehook = report_others


def _is_news(record: logging.LogRecord) -> bool:
  """Whether a log says something that no exception says."""
  if record.exc_info is None or record.exc_info is False:
    return True
  # Orbax awaits futures of TensorStore, whose tasks have no frame of Orbax.
  if record.name == 'asyncio' and '_wrap_awaitable' in record.getMessage():
    return False
  files = [frame.filename for frame in traceback.extract_tb(record.exc_info[2])]
  return not any(_PACKAGE in file for file in (record.pathname, *files))
