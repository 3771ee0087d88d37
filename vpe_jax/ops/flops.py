"""FLOPs of the matrix products in a function, by tracing it: nothing is compiled, nothing runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


def matrix_flops(function: Callable[..., Any], *arguments: Any) -> float:
  """FLOPs of all dots and convolutions that the function's results depend on.

  A multiply-add is two. The body of a scan counts as often as it runs, that of a while loop once,
  and of a conditional the most expensive branch. Convolutions count as if they weren't padded.

  Args:
    function: pure.
    *arguments: arrays or `jax.ShapeDtypeStruct`, as trees.
  """
  traced = jax.make_jaxpr(function)(*arguments).jaxpr
  return _flops(traced, {v for v in traced.outvars if isinstance(v, core.Var)})


def _flops(jaxpr: core.Jaxpr, needed: set[core.Var]) -> float:
  """FLOPs of the equations that `needed` depends on."""
  total = 0.0
  for equation in reversed(jaxpr.eqns):
    if not needed.intersection(equation.outvars) and not equation.effects:
      continue
    needed = needed.union(v for v in equation.invars if isinstance(v, core.Var))
    total += _equation_flops(equation)
  return total


def _equation_flops(equation: core.JaxprEqn) -> float:
  name, parameters = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = parameters['dimension_numbers']
    left = equation.invars[0].aval.shape
    out = math.prod(equation.outvars[0].aval.shape)
    return 2.0 * out * math.prod(left[axis] for axis in contracted)
  if name == 'conv_general_dilated':
    kernel = equation.invars[1].aval.shape
    features = kernel[parameters['dimension_numbers'].rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / features
  inner = [_flops(jaxpr, set(jaxpr.outvars)) for jaxpr in _inside(parameters)]
  if name == 'cond':
    return max(inner)
  return sum(inner) * (parameters['length'] if name == 'scan' else 1)


def _inside(parameters: dict[str, Any]) -> Iterator[core.Jaxpr]:
  for value in parameters.values():
    for one in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(one, core.ClosedJaxpr):
        yield one.jaxpr
      elif isinstance(one, core.Jaxpr):
        yield one
