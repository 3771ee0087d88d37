"""FLOPs of the matrix products in a function, by tracing it: nothing is compiled, nothing runs.

Model FLOPs are those of a forward and a backward pass in which nothing is recomputed. If a gradient
reaches the result of a product, the backward pass has one product of the same size for every
operand that needs a gradient. Attention counts all pairs of query and key, masked or not, whichever
implementation runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from vpe_jax.contracts import Array, Visibility, visible
from vpe_jax.ops.activity import Scope, Value, contains, is_attention, scan_parts

_EXAMPLES = 8  # examples of a batch in which visible pairs are counted


@dataclasses.dataclass(frozen=True)
class AttentionKernel:
  """An attention call in a Pallas kernel, whose FLOPs compiled programs don't show.

  Attributes:
    calls: how often it runs in one forward pass.
    trained: the part of `calls` that a gradient flows back through.
    shape: shape of the queries, [B, L, N, H].
    keys: number of keys S.
    visibility: order, since, reach and until of the queries, then of the keys.
  """

  calls: float
  trained: float
  shape: tuple[int, ...]
  keys: int
  visibility: tuple[Value, ...]

  def pairs(self) -> int:
    """Most visible pairs of an example, among the first 8; all L S if visibility is not known."""
    L = self.shape[1]
    if not all(value.known for value in self.visibility):
      return L * self.keys
    leaves = [np.asarray(value.known())[:_EXAMPLES] for value in self.visibility]
    query, key = Visibility(*leaves[:4]), Visibility(*leaves[4:])
    return max(int(_count(query[i : i + 1], key[i : i + 1])) for i in range(len(leaves[0])))

  def flops(self) -> float:
    """FLOPs of one call in the forward pass; only visible pairs count."""
    B, _, N, H = self.shape
    return 4.0 * B * N * H * self.pairs()


def _count(query: Visibility, key: Visibility) -> Array:
  return visible(query, key).sum()


@dataclasses.dataclass(frozen=True)
class Flops:
  """FLOPs of matrix products; a multiply-add is two.

  Attributes:
    forward: FLOPs of the forward pass.
    backward: FLOPs of the gradients.
    kernels: attention calls in Pallas kernels, which `forward` and `backward` include.
  """

  forward: float = 0.0
  backward: float = 0.0
  kernels: tuple[AttentionKernel, ...] = ()

  @property
  def total(self) -> float:
    """Forward and backward."""
    return self.forward + self.backward

  def __add__(self, other: Flops) -> Flops:
    kernels = self.kernels + other.kernels
    return Flops(self.forward + other.forward, self.backward + other.backward, kernels)

  def times(self, count: float) -> Flops:
    """FLOPs of `count` executions."""
    kernels = tuple(
      dataclasses.replace(kernel, calls=count * kernel.calls, trained=count * kernel.trained)
      for kernel in self.kernels
    )
    return Flops(count * self.forward, count * self.backward, kernels)


def matrix_flops(function: Callable[..., Any], *arguments: Any) -> float:
  """FLOPs of all dots and convolutions that the function's results depend on.

  A multiply-add is two. The body of a scan counts as often as it runs, that of a while loop once,
  and a conditional counts as its most expensive branch. Positions of a convolution's window outside
  the image don't count.

  Args:
    function: pure.
    *arguments: arrays or `jax.ShapeDtypeStruct`, as trees.
  """
  traced = jax.make_jaxpr(function)(*arguments)
  return _trace(traced, [Value()] * len(traced.jaxpr.invars)).forward


def training_flops(loss: Callable[..., Array], trainable: Any, *arguments: Any) -> Flops:
  """FLOPs of a loss and its gradient with respect to `trainable`, nothing recomputed.

  Products count as in `matrix_flops`.

  Args:
    loss: pure; its result is differentiated.
    trainable: first argument of `loss`, as arrays or `jax.ShapeDtypeStruct`.
    *arguments: further arguments. Where leaves are arrays, masks that depend on them alone are
      known (AttentionKernel.pairs).
  """
  traced = jax.make_jaxpr(loss)(trainable, *arguments)
  inputs = [Value(active=True)] * len(jax.tree.leaves(trainable))
  return _trace(traced, inputs + [_argument(leaf) for leaf in jax.tree.leaves(arguments)])


def _argument(leaf: Any) -> Value:
  return Value() if isinstance(leaf, jax.ShapeDtypeStruct) else Value(known=lambda: leaf)


def _trace(traced: core.ClosedJaxpr, inputs: Sequence[Value]) -> Flops:
  results = [True] * len(traced.jaxpr.outvars)
  return _FlopCounter(Scope(traced, inputs), results, results).flops


class _FlopCounter:
  """FLOPs of a scope, from its results backward.

  Attributes:
    flops: FLOPs of the equations that the results in use depend on.
    read: for each input, whether a result in use depends on it.
    reached: for each input, whether a gradient reaches it.
  """

  def __init__(self, scope: Scope, read: Sequence[bool], reached: Sequence[bool]) -> None:
    """Counts the FLOPs.

    Args:
      scope: the program.
      read: for each result, whether it is used.
      reached: for each result, whether a gradient comes back through it.
    """
    self._scope = scope
    chosen = lambda flags: {
      atom
      for atom, flag in zip(scope.jaxpr.outvars, flags, strict=True)
      if flag and _is_variable(atom)
    }
    self._read, self._reached = chosen(read), chosen(reached)
    self.flops = Flops()
    for index in reversed(range(len(scope.jaxpr.eqns))):
      self._equation(index)
    self.read = [v in self._read for v in scope.jaxpr.invars]
    self.reached = [v in self._reached for v in scope.jaxpr.invars]

  def _equation(self, index: int) -> None:
    equation = self._scope.jaxpr.eqns[index]
    used = [v in self._read for v in equation.outvars]
    if not any(used) and not equation.effects:
      return
    active = [self._scope.value(v).active for v in equation.outvars]
    pairs = zip(equation.outvars, active, strict=True)
    differentiated = [v in self._reached and is_active for v, is_active in pairs]
    inside = self._scope.inside.get(index)
    if inside is None:
      self.flops += self._product(equation, any(differentiated))
      read = [True] * len(equation.invars)
      reached = [any(differentiated)] * len(equation.invars)
    else:
      flops, read, reached = _inner(equation, inside, used, differentiated)
      self.flops += flops
    for atom, is_read, is_reached in zip(equation.invars, read, reached, strict=True):
      if _is_variable(atom) and is_read:
        self._read.add(atom)
      if _is_variable(atom) and is_reached and self._scope.value(atom).active:
        self._reached.add(atom)

  def _product(self, equation: core.JaxprEqn, differentiated: bool) -> Flops:
    """FLOPs of an equation without a jaxpr inside, or of attention."""
    values = [self._scope.value(atom) for atom in equation.invars]
    if is_attention(equation):
      return _attention(equation, values, differentiated)
    sizes = {'dot_general': _dot, 'conv_general_dilated': _convolution}
    if equation.primitive.name not in sizes:
      return Flops()
    forward = sizes[equation.primitive.name](equation)
    operands = sum(value.active for value in values) if differentiated else 0
    return Flops(forward, operands * forward)


_Counted = tuple[Flops, list[bool], list[bool]]


def _inner(
  equation: core.JaxprEqn, inside: Sequence[Scope], read: list[bool], reached: list[bool]
) -> _Counted:
  """FLOPs within an equation; which inputs its results depend on; which a gradient reaches."""
  name = equation.primitive.name
  if name == 'scan':
    return _scan(equation, inside[0], read, reached)
  if name == 'while':
    every = lambda s: [True] * len(s.jaxpr.outvars)
    counts = [_FlopCounter(s, every(s), _none(s.jaxpr.outvars)) for s in inside]
    flops = functools.reduce(Flops.__add__, (count.flops for count in counts))
    return flops, [True] * len(equation.invars), _none(equation.invars)
  counts = [_FlopCounter(scope, read, reached) for scope in inside]
  flops = max((count.flops for count in counts), key=lambda flops: flops.total)
  read = _either(*(count.read for count in counts))
  reached = _either(*(count.reached for count in counts))
  return (flops, [True, *read], [False, *reached]) if name == 'cond' else (flops, read, reached)


def _scan(equation: core.JaxprEqn, body: Scope, read: list[bool], reached: list[bool]) -> _Counted:
  """Counts a scan from the last step back, until a step needs the same carries as the next one."""
  first, carries = scan_parts(equation)
  flops, remaining = Flops(), equation.params['length']
  inputs = [_none(body.jaxpr.invars)] * 2
  carried = lambda flags, results: flags[first : first + carries] + results[carries:]
  while remaining:
    count = _FlopCounter(body, read, reached)
    inputs = [_either(inputs[0], count.read), _either(inputs[1], count.reached)]
    before = carried(count.read, read), carried(count.reached, reached)
    steps = remaining if before == (read, reached) else 1
    flops, remaining = flops + count.flops.times(steps), remaining - steps
    read, reached = before
  return flops, inputs[0], inputs[1]


def _either(*rows: Sequence[bool]) -> list[bool]:
  return [any(flags) for flags in zip(*rows, strict=True)]


def _none(items: Sequence[Any]) -> list[bool]:
  return [False] * len(items)


def _is_variable(atom: Any) -> bool:
  return isinstance(atom, core.Var)


def _attention(equation: core.JaxprEqn, values: Sequence[Value], differentiated: bool) -> Flops:
  """FLOPs of an attention call: logits from q and k, and mixed values from weights and v."""
  q, k = (atom.aval.shape for atom in equation.invars[:2])
  active = [value.active for value in values]
  weights = any(active[:2] + active[11:])  # 11: the bias, after q, k, v and two visibilities
  product = 2.0 * math.prod(q) * k[1]
  operands = sum(active[:3]) + weights if differentiated else 0
  kernels = ()
  if any(contains(body, {'pallas_call'}) for body in core.jaxprs_in_params(equation.params)):
    kernels = (AttentionKernel(1.0, float(operands > 0), q, k[1], tuple(values[3:11])),)
  return Flops(2.0 * product, operands * product, kernels)


def _dot(equation: core.JaxprEqn) -> float:
  (contracted, _), _ = equation.params['dimension_numbers']
  left = equation.invars[0].aval.shape
  out = math.prod(equation.outvars[0].aval.shape)
  return 2.0 * out * math.prod(left[axis] for axis in contracted)


def _convolution(equation: core.JaxprEqn) -> float:
  image, kernel = (v.aval.shape for v in equation.invars)
  out, p = equation.outvars[0].aval.shape, equation.params
  dims = p['dimension_numbers']
  total = 2.0 * out[dims.out_spec[0]] * out[dims.out_spec[1]] * kernel[dims.rhs_spec[1]]
  spatial = zip(dims.lhs_spec[2:], dims.rhs_spec[2:], dims.out_spec[2:], strict=True)
  for i, (x, k, y) in enumerate(spatial):
    dilation = p['lhs_dilation'][i], p['rhs_dilation'][i]
    pad, stride = p['padding'][i][0], p['window_strides'][i]
    total *= window_positions(image[x], kernel[k], out[y], stride, pad, dilation)
  return total


def window_positions(
  length: int, kernel: int, out: int, stride: int, pad: int, dilation: tuple[int, int]
) -> int:
  """Number of pairs (result, window position) that read an element of the input, along one axis.

  Args:
    length: length of the input.
    kernel: length of the window.
    out: number of results.
    stride: distance between the windows of neighbouring results.
    pad: zeros before the input; the number of zeros after it doesn't matter.
    dilation: of the input and of the window: 1 + the number of zeros between neighbours.
  """
  # Result o with window position k reads place o * stride + k * dilation[1] - pad. Elements are at
  # multiples of dilation[0]: every `period`-th result from `start` on reads one.
  common = math.gcd(stride, dilation[0])
  period, count = dilation[0] // common, 0
  inverse = pow(stride // common, -1, period)
  for k in range(kernel):
    shift = k * dilation[1] - pad
    if shift % common:
      continue
    first = max(0, -(shift // stride))  # the least o with o * stride + shift >= 0
    last = min(out - 1, ((length - 1) * dilation[0] - shift) // stride)
    start = first + (-(shift // common) * inverse - first) % period
    count += max(0, (last - start) // period + 1)
  return count
