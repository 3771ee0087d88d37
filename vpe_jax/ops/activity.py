"""Forward analysis of a jaxpr: which variables are active, and which are known.

A variable is active if it depends differentiably on the parameters that train: `stop_gradient`,
roundings and integers end the dependence. It is known if it follows from known inputs alone, such
as a mask from the lengths of captions; known values are computed only on demand.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from vpe_jax.ops.attention import blockwise, cudnn

PRODUCTS = frozenset({'dot_general', 'conv_general_dilated'})
# Primitives whose derivative is zero.
_CONSTANT = frozenset({'stop_gradient', 'floor', 'ceil', 'round', 'sign'})
# Primitives that run one jaxpr, with its inputs and outputs in order.
_CALLS = frozenset(
  {'jit', 'closed_call', 'core_call', 'remat2', 'custom_jvp_call', 'custom_vjp_call'}
)


@dataclasses.dataclass(frozen=True)
class Value:
  """Activity and knowledge of a variable.

  Attributes:
    active: depends differentiably on parameters that train.
    known: function that computes the value; None if it depends on inputs that are only shapes.
  """

  active: bool = False
  known: Callable[[], Any] | None = None


class Scope:
  """A jaxpr with the values of its variables.

  Attributes:
    jaxpr: the program.
    inside: index of an equation -> scopes of the jaxprs within it: one for a call or a scan, one
      for each branch of a conditional, and two (condition and body) for a while loop.
  """

  def __init__(self, jaxpr: core.ClosedJaxpr | core.Jaxpr, inputs: Sequence[Value]) -> None:
    closed = isinstance(jaxpr, core.ClosedJaxpr)
    constants = [Value(known=functools.partial(_same, x)) for x in jaxpr.consts] if closed else []
    self.jaxpr = jaxpr.jaxpr if closed else jaxpr
    self.inside: dict[int, list[Scope]] = {}
    self._values = dict(zip(self.jaxpr.invars, inputs, strict=True))
    self._values |= zip(self.jaxpr.constvars, constants, strict=True)
    for index, equation in enumerate(self.jaxpr.eqns):
      self._values |= zip(equation.outvars, self._outputs(index, equation), strict=True)

  def value(self, atom: core.Var | core.Literal) -> Value:
    """The value of a variable or literal of this jaxpr."""
    if isinstance(atom, core.Literal):
      return Value(known=functools.partial(_same, atom.val))
    return self._values[atom]

  @property
  def outputs(self) -> list[Value]:
    """The values of the results."""
    return [self.value(atom) for atom in self.jaxpr.outvars]

  def _outputs(self, index: int, equation: core.JaxprEqn) -> list[Value]:
    inputs = [self.value(atom) for atom in equation.invars]
    name = equation.primitive.name
    if is_attention(equation):
      return _results(equation, inputs)
    if name in _CALLS:
      self.inside[index] = [Scope(_body(equation), inputs)]
      return self.inside[index][0].outputs
    if name == 'scan':
      self.inside[index] = [_scan(equation, inputs)]
      return _results(equation, inputs, [self.inside[index][0].outputs])
    if name == 'cond':
      self.inside[index] = [Scope(branch, inputs[1:]) for branch in equation.params['branches']]
      return _results(equation, inputs, [scope.outputs for scope in self.inside[index]])
    if name == 'while':  # has no reverse-mode gradient
      self.inside[index] = _while(equation, inputs)
      return _results(equation, inputs, [[Value()] * len(equation.outvars)])
    if any(contains(body, PRODUCTS) for body in core.jaxprs_in_params(equation.params)):
      raise ValueError(f"products inside primitive '{name}': add it to ops/activity.py")
    return _results(equation, inputs)


def contains(jaxpr: core.ClosedJaxpr | core.Jaxpr, primitives: Collection[str]) -> bool:
  """Whether a primitive with one of these names is in a jaxpr or in a jaxpr inside it."""
  return any(
    equation.primitive.name in primitives
    or any(contains(body, primitives) for body in core.jaxprs_in_params(equation.params))
    for equation in jaxpr.eqns
  )


def is_attention(equation: core.JaxprEqn) -> bool:
  """Whether an equation calls attention whose FLOPs can't be counted from the jaxpr inside.

  The inputs of the call begin with q, k and v; those of `blockwise.attend` continue with the
  visibility of queries and keys, and the bias.
  """
  if equation.primitive.name == 'custom_vjp_call':
    return equation.params['call_jaxpr'].jaxpr.debug_info.func_name == blockwise.CALL
  return equation.primitive.name == 'jit' and equation.params['name'] == cudnn.CALL


def _same(x: Any) -> Any:
  return x


def _body(equation: core.JaxprEqn) -> core.ClosedJaxpr | core.Jaxpr:
  """The jaxpr of a call."""
  parameters = equation.params
  return parameters['call_jaxpr' if 'call_jaxpr' in parameters else 'jaxpr']


def scan_parts(equation: core.JaxprEqn) -> tuple[int, int]:
  """Number of constants and of carries of a scan; the inputs after them are sliced by step.

  They are counted by ranks, because parameter names differ between versions of JAX: the body sees
  constants and carries whole, but slices without their leading axis.
  """
  body = _body(equation)
  whole = lambda outer, inner: sum(
    len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outer, inner, strict=True)
  )
  carries = whole(equation.outvars, body.jaxpr.outvars)
  return whole(equation.invars, body.jaxpr.invars) - carries, carries


def _scan(equation: core.JaxprEqn, inputs: Sequence[Value]) -> Scope:
  """The body of a scan; a carry that any step makes active counts as active in all steps."""
  constants, carries = scan_parts(equation)
  of_step = [Value(value.active) for value in inputs[constants:]]
  while True:
    scope = Scope(equation.params['jaxpr'], [*inputs[:constants], *of_step])
    pairs = zip(of_step[:carries], scope.outputs, strict=False)
    after = [Value(before.active or out.active) for before, out in pairs]
    if after == of_step[:carries]:
      return scope
    of_step = [*after, *of_step[carries:]]


def _while(equation: core.JaxprEqn, inputs: Sequence[Value]) -> list[Scope]:
  """Condition and body of a while loop."""
  parameters = equation.params
  first, second = parameters['cond_nconsts'], parameters['body_nconsts']
  carry = [Value()] * (len(inputs) - first - second)
  plain = [Value(known=value.known) for value in inputs]
  return [
    Scope(parameters['cond_jaxpr'], [*plain[:first], *carry]),
    Scope(parameters['body_jaxpr'], [*plain[first : first + second], *carry]),
  ]


def _results(
  equation: core.JaxprEqn,
  inputs: Sequence[Value],
  bodies: Sequence[Sequence[Value]] = (),
) -> list[Value]:
  """The results of an equation.

  A result is active if it is active in one of `bodies`; without bodies, if an input is active and
  the primitive has a derivative.
  """
  flows = any(value.active for value in inputs) and equation.primitive.name not in _CONSTANT
  active = [any(outs) for outs in zip(*([v.active for v in body] for body in bodies))]
  active = active if bodies else [flows] * len(equation.outvars)
  known = [None] * len(active)
  if all(value.known for value in inputs) and not equation.effects:
    compute = functools.cache(lambda: _evaluate(equation, inputs))
    known = [functools.partial(lambda v: compute()[v], v) for v in equation.outvars]
  is_float = [jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in equation.outvars]
  return [Value(a and f, k) for a, f, k in zip(active, is_float, known, strict=True)]


def _evaluate(equation: core.JaxprEqn, inputs: Sequence[Value]) -> dict[core.Var, Any]:
  """The results of an equation whose inputs are known."""
  values = {
    atom: value.known()
    for atom, value in zip(equation.invars, inputs, strict=True)
    if isinstance(atom, core.Var)
  }
  if equation.primitive.name == 'sharding_constraint':
    return dict(zip(equation.outvars, values.values(), strict=True))
  outputs = [v for v in equation.outvars if not isinstance(v, core.DropVar)]
  alone = core.ClosedJaxpr(core.Jaxpr((), list(values), outputs, [equation]), ())
  return dict(zip(outputs, core.jaxpr_as_fun(alone)(*values.values()), strict=True))
