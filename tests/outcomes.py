"""Outcomes of calls, so that a test fails at its assertion and not in an error of the product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vpe_jax.contracts import UserError


def outcome(run: Callable[..., Any], *arguments: Any) -> Any:
  """The result of a call, or its error."""
  try:
    return run(*arguments)
  except Exception as error:
    return error


def result_of(run: Callable[..., Any], *arguments: Any) -> Any:
  """The result of a call; asserts that it raises no error."""
  result = outcome(run, *arguments)
  assert not isinstance(result, Exception), repr(result)
  return result


def refusal_of(run: Callable[..., Any], *arguments: Any) -> str:
  """The message of the UserError of a call; asserts that it is one line."""
  error = outcome(run, *arguments)
  assert isinstance(error, UserError), repr(error)
  assert '\n' not in str(error)
  return str(error)
