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
  and of a conditional the most expensive branch. Of a convolution, places of the window outside the
  picture don't count.

  Args:
    function: pure.
    *arguments: arrays or `jax.ShapeDtypeStruct`, as trees.
  """
  traced = jax.make_jaxpr(function)(*arguments).jaxpr
  return _flops(traced, _results(traced))


def _flops(jaxpr: core.Jaxpr, needed: set[core.Var]) -> float:
  """FLOPs of the equations that `needed` depends on."""
  total = 0.0
  for equation in reversed(jaxpr.eqns):
    if not needed.intersection(equation.outvars) and not equation.effects:
      continue
    needed = needed.union(v for v in equation.invars if isinstance(v, core.Var))
    total += _equation_flops(equation)
  return total


def _results(jaxpr: core.Jaxpr) -> set[core.Var]:
  """The outputs of a program, without constants."""
  return {v for v in jaxpr.outvars if isinstance(v, core.Var)}


def _equation_flops(equation: core.JaxprEqn) -> float:
  name, parameters = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = parameters['dimension_numbers']
    left = equation.invars[0].aval.shape
    out = math.prod(equation.outvars[0].aval.shape)
    return 2.0 * out * math.prod(left[axis] for axis in contracted)
  if name == 'conv_general_dilated':
    return _convolution_flops(equation)
  inner = [_flops(jaxpr, _results(jaxpr)) for jaxpr in _inside(parameters)]
  if name == 'cond':
    return max(inner)
  return sum(inner) * (parameters['length'] if name == 'scan' else 1)


def _convolution_flops(equation: core.JaxprEqn) -> float:
  given, kernel = (v.aval.shape for v in equation.invars)
  out, p = equation.outvars[0].aval.shape, equation.params
  dims = p['dimension_numbers']
  total = 2.0 * out[dims.out_spec[0]] * out[dims.out_spec[1]] * kernel[dims.rhs_spec[1]]
  spatial = zip(dims.lhs_spec[2:], dims.rhs_spec[2:], dims.out_spec[2:], strict=True)
  for i, (x, k, y) in enumerate(spatial):
    dilation = p['lhs_dilation'][i], p['rhs_dilation'][i]
    pad, stride = p['padding'][i][0], p['window_strides'][i]
    total *= window_positions(given[x], kernel[k], out[y], stride, pad, dilation)
  return total


def window_positions(
  given: int, kernel: int, out: int, stride: int, pad: int, dilation: tuple[int, int]
) -> int:
  """Pairs of a result and a place of its window that meet an element of the input, along one axis.

  Args:
    given: length of the input.
    kernel: length of the window.
    out: number of results.
    stride: from a result's window to the next one's.
    pad: zeros before the input; how many follow it doesn't matter.
    dilation: of the input and of the window: 1 + the number of zeros between neighbours.
  """
  # Result o and window place k meet an element where o * stride + k * dilation[1] - pad is one of
  # its places, multiples of dilation[0]: of the results in reach, every `period`-th from `start`.
  common = math.gcd(stride, dilation[0])
  period, count = dilation[0] // common, 0
  inverse = pow(stride // common, -1, period)
  for k in range(kernel):
    shift = k * dilation[1] - pad
    if shift % common:
      continue
    first = max(0, -(shift // stride))  # the least o with o * stride + shift >= 0
    last = min(out - 1, ((given - 1) * dilation[0] - shift) // stride)
    start = first + (-(shift // common) * inverse - first) % period
    count += max(0, (last - start) // period + 1)
  return count


def _inside(parameters: dict[str, Any]) -> Iterator[core.Jaxpr]:
  for value in parameters.values():
    for one in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(one, core.ClosedJaxpr):
        yield one.jaxpr
      elif isinstance(one, core.Jaxpr):
        yield one
