"""Drops Orbax's logs of errors that it also raises, because the caller reports them in one line.

Orbax's threads log an error with its traceback before they raise it. If several arrays can't be
read, Orbax raises only the first error. When the tasks of the others are deleted, asyncio logs
their errors as never retrieved, and TensorStore reports those that it can't deliver because the
event loop is closed.
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
    is_runtime_error = isinstance(event.exc_value, RuntimeError) and event.object is None
    if not (is_runtime_error and str(event.exc_value) == 'Event loop is closed'):
      report(event)

  sys.unraisablehook = report_others


def _is_news(record: logging.LogRecord) -> bool:
  """Whether a log record reports something other than an error that Orbax raises."""
  if record.exc_info is None or record.exc_info is False:
    return True
  # Orbax awaits futures of TensorStore, whose tasks have no frame of Orbax.
  if record.name == 'asyncio' and '_wrap_awaitable' in record.getMessage():
    return False
  files = [frame.filename for frame in traceback.extract_tb(record.exc_info[2])]
  return not any(_PACKAGE in file for file in (record.pathname, *files))
