"""Shared by the blockwise implementations: gradient rule, names for remat, sharding over a mesh.

An implementation is a `Kernel`: a forward and a backward pass over `Operands`. Between the two,
only O(L) memory is kept: the backward pass recomputes each block's weights from the log-sum-exp.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from vpe_jax import sharding
from vpe_jax.contracts import Array, Visibility

# Names that a remat policy may save, so that the backward pass doesn't run attention again.
SAVED = ('attention', 'attention_lse')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
  """The inputs of one attention call.

  Attributes:
    q: queries [B, L, N, H], already multiplied by H ** -0.5.
    k: keys [B, S, K, H].
    v: values [B, S, K, H].
    query: visibility of the queries [B, L].
    key: visibility of the keys [B, S].
    bias: added to the logits, [B or 1, N or 1, L or 1, S or 1], or None.
  """

  q: Array
  k: Array
  v: Array
  query: Visibility
  key: Visibility
  bias: Array | None = None


Gradients = tuple[Array, Array, Array, Array | None]  # of q, k, v and bias


class Kernel(Protocol):
  """One implementation; hashable, as it is a static argument."""

  def forward(self, operands: Operands) -> tuple[Array, Array]:
    """Mixed values [B, L, N, H] in the dtype of q, and log-sum-exp [B, N, L] in float32."""
    ...

  def backward(self, operands: Operands, d_mixed: Array, lse: Array, delta: Array) -> Gradients:
    """Gradients of the operands.

    Args:
      operands: as in `forward`.
      d_mixed: gradient of the mixed values [B, L, N, H].
      lse: log-sum-exp [B, N, L]; 0 for queries that see no key.
      delta: [B, N, L], one number for each query: the gradient of a logit is its weight times
        (gradient of the weight - delta).
    """
    ...


def attend(kernel: Kernel, operands: Operands) -> tuple[Array, Array]:
  """Mixed values [B, L, N, H] and log-sum-exp [B, L, N] of unscaled queries, differentiable."""
  H = operands.q.shape[-1]
  scaled = dataclasses.replace(operands, q=operands.q * H**-0.5)
  mixed, lse = _attend(kernel, scaled)
  return mixed, lse.transpose(0, 2, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernel: Kernel, operands: Operands) -> tuple[Array, Array]:
  specs = _specs(operands)
  run = kernel.forward if specs is None else _mapped(kernel.forward, specs, (), specs.out)
  return run(operands)


def _forward_rule(kernel: Kernel, operands: Operands) -> tuple[Any, Any]:
  mixed, lse = _attend(kernel, operands)
  mixed, lse = (checkpoint_name(x, name) for x, name in zip((mixed, lse), SAVED))
  return (mixed, lse), (operands, mixed, lse)


def _backward_rule(kernel: Kernel, saved: Any, gradients: tuple[Array, Array]) -> tuple[Operands]:
  operands, mixed, lse = saved
  d_mixed, d_lse = gradients
  product = d_mixed.astype(jnp.float32) * mixed.astype(jnp.float32)
  delta = jnp.sum(product, -1).transpose(0, 2, 1) - d_lse
  # Queries that see no key have only weights of 0, so any finite number will do.
  seen = lse > -jnp.inf
  lse, delta = jnp.where(seen, lse, 0.0), jnp.where(seen, delta, 0.0)
  specs = _specs(operands)
  run = kernel.backward
  if specs is not None:
    run = _mapped(run, specs, (specs.wide, specs.row, specs.row), specs.gradients)
  q, k, v, bias = run(operands, d_mixed, lse, delta)
  return (Operands(q, k, v, None, None, bias),)


# The name by which ops/activity.py recognizes a call in a jaxpr.
CALL = _attend.__name__
_attend.defvjp(_forward_rule, _backward_rule)


@dataclasses.dataclass(frozen=True)
class _Specs:
  """Shardings of the arrays of a call."""

  batch: Any
  heads: Any

  @property
  def wide(self) -> P:
    return P(self.batch, None, self.heads, None)

  @property
  def row(self) -> P:
    return P(self.batch, self.heads, None)

  @property
  def operands(self) -> Operands:
    tokens = P(self.batch, None)
    side = Visibility(tokens, tokens, tokens, tokens)
    return Operands(self.wide, self.wide, self.wide, side, side)

  @property
  def out(self) -> tuple[P, P]:
    return self.wide, self.row

  @property
  def gradients(self) -> tuple[P, P, P, None]:
    return self.wide, self.wide, self.wide, None


def _specs(operands: Operands) -> _Specs | None:
  """Specs of batch and heads over the mesh axes that divide them; None: run without shard_map.

  A call with a bias has none, because the bias may broadcast over batch and heads. No Pallas kernel
  takes a bias, so XLA can shard the call.
  """
  if operands.bias is not None:
    return None
  spec = sharding.activation_spec(operands.k.shape, (sharding.BATCH, None, sharding.KV_HEADS, None))
  if spec is None:
    return None
  entries = [*spec, *(None,) * 4]
  return _Specs(entries[0], entries[2])


def _mapped(run: Callable[..., Any], specs: _Specs, more: tuple[P, ...], out: Any) -> Any:
  # Forward and backward have a shard_map each: the transpose of a single one would sum gradients
  # over mesh axes that shard nothing.
  return jax.shard_map(run, in_specs=(specs.operands, *more), out_specs=out, check_vma=False)
