"""The public attention call: picks an implementation, or runs the one that is named."""

from __future__ import annotations

import functools

import jax
from absl import logging

from vpe_jax.config import ATTENTIONS, did_you_mean
from vpe_jax.contracts import Array, UserError, Visibility
from vpe_jax.ops.attention import chunked, cudnn, pallas_gpu, pallas_tpu, reference

HINTS = ('', 'causal', 'padding')
SHORT = 16  # decoding: with fewer queries than this, `reference` is chosen on every platform
# Number of logits of one head (L x S) from which blockwise attention is chosen. On CPU: measured,
# forward and backward, see tests/benchmarks/attention.py. On TPU and GPU: a few blocks.
CROSSOVER = {'cpu': 768 * 768, 'tpu': 256 * 256, 'gpu': 256 * 256}
_WIDEST = {'pallas_tpu': pallas_tpu.WIDEST, 'pallas_gpu': pallas_gpu.WIDEST}
# Platform of each kernel; if several can run, the first one is chosen.
_HOME = {'cudnn': 'gpu', 'pallas_gpu': 'gpu', 'pallas_tpu': 'tpu'}


def attention(
  q: Array,
  k: Array,
  v: Array,
  query: Visibility,
  key: Visibility,
  implementation: str = '',
  bias: Array | None = None,
  hint: str = '',
) -> Array:
  """Mixed values [B, L, N, H] of grouped-query attention; see `reference.attention`.

  Args:
    q: queries [B, L, N, H].
    k: keys [B, S, K, H].
    v: values [B, S, K, H].
    query: visibility of the queries [B, L].
    key: visibility of the keys [B, S].
    implementation: a name of `config.ATTENTIONS`, which runs or raises; '' chooses by platform,
      shape and hint, and logs the choice once per shape.
    bias: added to the logits, broadcastable to [B, N, L, S]; only `reference` and `chunked` take
      one.
    hint: a property of the mask: `causal` (every token sees itself and all tokens stored before it,
      and none is absent), or `padding` (every query sees every present key, and absent keys are
      stored last). cuDNN runs only with a hint.

  Raises:
    UserError: the name is unknown, or the implementation doesn't support the call or the devices.
  """
  name = _choose(q, k, implementation, bias, hint)
  if name == 'cudnn':
    return cudnn.attention(q, k, v, query, key, hint)
  return _run(name, q, k, v, query, key, bias)[0]


def attention_and_lse(
  q: Array,
  k: Array,
  v: Array,
  query: Visibility,
  key: Visibility,
  implementation: str = '',
  bias: Array | None = None,
) -> tuple[Array, Array]:
  """The result of `attention`, and the log-sum-exp [B, L, N] float32; for arguments see there.

  Raises:
    UserError: see `attention`; or the implementation is `cudnn`, which returns no log-sum-exp.
  """
  if implementation == 'cudnn':
    raise UserError("attention 'cudnn' returns no log-sum-exp: name another implementation")
  return _run(_choose(q, k, implementation, bias, ''), q, k, v, query, key, bias)


def device() -> tuple[str, str]:
  """Platform (`cpu`, `tpu`, `gpu`) and kind of the devices that a traced call will run on.

  With a mesh from `jax.set_mesh`, they are its devices, which this host need not have (compilation
  ahead of time); without one, those of the default backend.
  """
  described = jax.sharding.get_abstract_mesh().abstract_device
  if described is None:
    described = jax.devices()[0]
  platform = described.platform
  return 'gpu' if platform in ('cuda', 'rocm') else platform, described.device_kind


def _run(
  name: str, q: Array, k: Array, v: Array, query: Visibility, key: Visibility, bias: Array | None
) -> tuple[Array, Array]:
  if name == 'pallas_tpu':
    return pallas_tpu.attention(q, k, v, query, key, device()[1])
  if name == 'pallas_gpu':
    return pallas_gpu.attention(q, k, v, query, key)
  dense = {'reference': reference.attention, 'chunked': chunked.attention}
  return dense[name](q, k, v, query, key, bias)


def _choose(q: Array, k: Array, implementation: str, bias: Array | None, hint: str) -> str:
  """The implementation of a call."""
  if hint not in HINTS:
    raise UserError(f"no attention hint '{hint}'{did_you_mean(hint, HINTS[1:])}")
  platform, kind = device()
  if implementation:
    reason = _refusal(implementation, q, platform, bias, hint)
    if reason:
      raise UserError(f"attention '{implementation}' {reason}")
    return implementation
  name = _automatic(q, k, platform, bias, hint)
  _log(name, q.shape, k.shape, str(q.dtype), hint, kind)
  return name


def _refusal(name: str, q: Array, platform: str, bias: Array | None, hint: str) -> str:
  """The reason why an implementation can't do a call, with the cure; '' if it can."""
  H = q.shape[-1]
  if name not in ATTENTIONS:
    return f'is no implementation{did_you_mean(name, ATTENTIONS)}'
  home = _HOME.get(name, platform)
  if platform != home:
    return f"runs on {home}, and the devices are {platform}: name 'chunked', or '' (automatic)"
  if name in _HOME and platform == 'gpu' and not _is_ampere(_compute_capability()):
    return "needs an NVIDIA GPU of the Ampere generation or later: name 'chunked'"
  if bias is not None and name in _HOME:
    return "takes no bias: name 'reference' or 'chunked'"
  if H > _WIDEST.get(name, H):
    return f"takes heads up to {_WIDEST[name]} wide, not {H}: name 'chunked'"
  if name == 'cudnn':
    return cudnn.refusal(q, hint)
  return ''


def _compute_capability() -> str:
  """That of this host's GPUs, such as '9.0'; '' without a GPU (compilation ahead of time)."""
  return str(getattr(jax.devices()[0], 'compute_capability', ''))


def _is_ampere(capability: str) -> bool:
  """Whether Triton and cuDNN can run attention: capability 8.0 or later, or unknown.

  The capability of an AMD GPU is a name, such as 'gfx942'.
  """
  major = capability.split('.')[0]
  return not capability or (major.isdigit() and int(major) >= 8)


def _automatic(q: Array, k: Array, platform: str, bias: Array | None, hint: str) -> str:
  """The implementation that suits platform, shape and hint."""
  L, S = q.shape[1], k.shape[1]
  crossover = CROSSOVER.get(platform, CROSSOVER['cpu'])
  if L < SHORT or L * S < crossover:
    return 'reference'
  kernels = (name for name in _HOME if not _refusal(name, q, platform, bias, hint))
  return next(kernels, 'chunked')


@functools.cache
def _log(name: str, q: tuple[int, ...], k: tuple[int, ...], dtype: str, hint: str, kind: str):
  """Logs the implementation that was chosen; the cache prevents a second line."""
  mask = f', {hint} mask' if hint else ''
  logging.info('attention: %s for q %s, k %s, %s%s on %s', name, q, k, dtype, mask, kind)
