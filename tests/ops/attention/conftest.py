"""The masks that the five systems need, drawn as 0/1, and the calls that tests make with them.

Every builder's docstring draws the mask of its default sizes: rows are queries, columns keys, both
as stored. `9` in a table stands for NEVER.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpe_jax.contracts import Visibility
from vpe_jax.data import sequence
from vpe_jax.data.sequence import NEVER
from vpe_jax.ops.attention import reference

Mask = tuple[Visibility, Visibility]  # of queries and of keys
_Tokens = list[tuple[int, int, int, int]]  # order, since, reach, until
ABSENT = (0, 0, 0, 0)


def _row(tokens: _Tokens) -> Mask:
  row = Visibility(*(jnp.asarray(x, jnp.int32)[None] for x in np.array(tokens).T))
  return row, row


def _causal(start: int, count: int, since: int = 0, until: int = NEVER) -> _Tokens:
  return [(start + n, since, start + n + 1, until) for n in range(count)]


def _full(start: int, count: int, since: int = 0, until: int = NEVER) -> _Tokens:
  return [(start + n, since, start + count, until) for n in range(count)]


def causal(length: int = 4) -> Mask:
  """Text.

  1 0 0 0
  1 1 0 0
  1 1 1 0
  1 1 1 1
  """
  return _row(_causal(0, length))


def prefix(seen: int = 2, rest: int = 2) -> Mask:
  """A bidirectional prefix, then text.

  1 1 0 0
  1 1 0 0
  1 1 1 0
  1 1 1 1
  """
  return _row(_full(0, seen) + _causal(seen, rest))


def transfusion(text: int = 2, image: int = 2, after: int = 1) -> Mask:
  """Text, a bidirectional picture, text (VUGEN, Show-o2).

  1 0 0 0 0
  1 1 0 0 0
  1 1 1 1 0
  1 1 1 1 0
  1 1 1 1 1
  """
  end = text + image
  return _row(_causal(0, text) + _full(text, image) + _causal(end, after))


def mixture(text: int = 1, codes: int = 1, image: int = 1, multiple: int = 1) -> Mask:
  """A row with its condition and one that dropped it, as `sequence.build` makes them (VPE).

  Stored: bos, text, bot, codes, eot, boi | time, picture. Row 0, then row 1:

  1 0 0 0 0 0 0 0
  1 1 0 0 0 0 0 0
  1 1 1 0 0 0 0 0
  1 1 1 1 0 0 0 0
  1 1 1 1 1 0 0 0
  1 1 1 1 1 1 0 0
  1 1 1 1 1 1 1 1
  1 1 1 1 1 1 1 1

  1 0 0 0 0 0 0 0
  0 0 0 0 0 0 0 0
  0 0 0 0 0 0 0 0
  0 0 0 0 0 0 0 0
  0 0 0 0 0 0 0 0
  1 0 0 0 0 1 0 0
  1 0 0 0 0 1 1 1
  1 0 0 0 0 1 1 1
  """
  spans = sequence.text_to_image(text, codes, image)
  zeros = lambda n: jnp.zeros((2, n), jnp.int32)
  regions = sequence.build(
    spans,
    sequence.Vocabulary(8, 8, 0, 1),
    zeros(text),
    jnp.array([text, text]),
    zeros(codes),
    jnp.array([True, False]),
    multiple,
  )
  parts = [region.visibility for region in regions.values()]
  row = jax.tree.map(lambda *x: jnp.concatenate(x, 1), *parts)
  return row, row


def packed(samples: Sequence[tuple[int, int]] = ((1, 2), (2, 1))) -> Mask:
  """Samples of (text, picture) in one row of one expert; order runs on.

  1 0 0 0 0 0
  1 1 1 0 0 0
  1 1 1 0 0 0
  0 0 0 1 0 0
  0 0 0 1 1 0
  0 0 0 1 1 1
  """
  tokens, start = [], 0
  for text, image in samples:
    tokens += _causal(start, text, start) + _full(start + text, image, start)
    start += text + image
  return _row(tokens)


def packed_two(samples: Sequence[tuple[int, int]] = ((1, 2), (2, 1)), pad: int = 1) -> Mask:
  """The same samples in a row of two experts, each region padded: text . text | pictures .

  1 0 0 0 0 0 0 0
  0 1 0 0 0 0 0 0
  0 1 1 0 0 0 0 0
  0 0 0 0 0 0 0 0
  1 0 0 0 1 1 0 0
  1 0 0 0 1 1 0 0
  0 1 1 0 0 0 1 0
  0 0 0 0 0 0 0 0
  """
  regions: tuple[_Tokens, _Tokens] = ([], [])
  start = 0
  for text, image in samples:
    regions[0].extend(_causal(start, text, start))
    regions[1].extend(_full(start + text, image, start))
    start += text + image
  return _row(regions[0] + [ABSENT] * pad + regions[1] + [ABSENT] * pad)


def editing(reference: int = 2, text: int = 2, image: int = 2) -> Mask:
  """A bidirectional reference picture, text, and the picture in another expert (VPE, App. D).

  1 1 0 0 0 0
  1 1 0 0 0 0
  1 1 1 0 0 0
  1 1 1 1 0 0
  1 1 1 1 1 1
  1 1 1 1 1 1
  """
  end = reference + text
  return _row(_full(0, reference) + _causal(reference, text) + _full(end, image))


def interleaved(frames: int = 2, text: int = 1, latents: int = 1) -> Mask:
  """Teacher forcing (MMCORE): each frame as text, noisy latents, clean latents.

  Noisy latents see their own text and the clean latents of earlier frames; clean latents see
  clean latents alone; text sees its own frame's text.

  1 0 0 0 0 0
  1 1 0 0 0 0
  0 0 1 0 0 0
  0 0 0 1 0 0
  0 0 1 1 1 0
  0 0 1 0 0 1
  """
  tokens, start = [], 0
  for _ in range(frames):
    end = start + text + latents
    tokens += _causal(start, text, start, end) + _full(start + text, latents, 0, end)
    tokens += _full(end, latents)
    start = end + latents
  return _row(tokens)


def position_queries(text: int = 1, groups: int = 2, mates: int = 2) -> Mask:
  """Groups of parallel queries that see what is finished and not each other, then the finished
  pairs of query and latent (VGT). Below: one token of text, two groups of two.

  1 0 0 0 0 0 0 0 0 0 0 0 0
  1 1 0 0 0 0 0 0 0 0 0 0 0
  1 0 1 0 0 0 0 0 0 0 0 0 0
  1 0 0 1 0 0 0 0 0 0 0 0 0
  1 0 0 1 1 0 0 0 0 0 0 0 0
  1 0 0 1 1 1 0 0 0 0 0 0 0
  1 0 0 1 1 1 1 0 0 0 0 0 0
  1 0 0 1 1 1 1 1 0 0 0 0 0
  1 0 0 1 1 1 1 0 1 0 0 0 0
  1 0 0 1 1 1 1 0 0 1 0 0 0
  1 0 0 1 1 1 1 0 0 1 1 0 0
  1 0 0 1 1 1 1 0 0 1 1 1 0
  1 0 0 1 1 1 1 0 0 1 1 1 1
  """
  tokens, start = _causal(0, text), text
  for _ in range(groups):
    tokens += [(start + n, 0, start + n + 1, start + n + 1) for n in range(mates)]
    tokens += _causal(start + mates, 2 * mates)
    start += 3 * mates
  return _row(tokens)


def sliding(length: int = 4, width: int = 2) -> Mask:
  """Text that sees `width` tokens back, itself among them (Gemma's local layers).

  1 0 0 0
  1 1 0 0
  0 1 1 0
  0 0 1 1
  """
  return _row([(n, max(0, n - width + 1), n + 1, NEVER) for n in range(length)])


def windows(count: int = 2, width: int = 2) -> Mask:
  """Bidirectional windows (Qwen2.5's image tower).

  1 1 0 0
  1 1 0 0
  0 0 1 1
  0 0 1 1
  """
  return _row([t for n in range(count) for t in _full(n * width, width, n * width)])


def scattered(length: int = 5) -> Mask:
  """Text with absent tokens in between, and a last token whose interval holds no key.

  1 0 0 0 0
  0 0 0 0 0
  1 0 1 0 0
  0 0 0 0 0
  0 0 0 0 0
  """
  tokens = _causal(0, length)
  tokens[1::2] = [ABSENT] * len(tokens[1::2])
  tokens[-1] = (length, length + 5, length + 9, 0)
  return _row(tokens)


def cached(known: int = 2, image: int = 2, free: int = 1) -> Mask:
  """A picture's queries against a cache: a prefix, the picture, and slots not yet written.

  1 1 1 1 0
  1 1 1 1 0
  """
  query, _ = _row(_full(known, image))
  _, key = _row(_causal(0, known) + _full(known, image) + _causal(known + image, free))
  return query, key


DRAWN: dict[str, Callable[..., Mask]] = {
  builder.__name__: builder
  for builder in (
    causal, prefix, transfusion, mixture, packed, packed_two, editing, interleaved,
    position_queries, sliding, windows, scattered, cached,
  )
}  # fmt: skip
# Sizes that fill several blocks; all but `cached` have at most LENGTH tokens.
LENGTH = 112
SIZED: dict[str, tuple] = {
  'causal': (112,),
  'prefix': (50, 62),
  'transfusion': (30, 60, 22),
  'mixture': (11, 40, 40, 16),
  'packed': (((10, 30), (5, 17), (30, 20)),),
  'packed_two': (((10, 26), (5, 17), (20, 20)), 7),
  'editing': (40, 20, 52),
  'interleaved': (3, 5, 16),
  'position_queries': (20, 3, 8),
  'sliding': (112, 20),
  'windows': (7, 16),
  'scattered': (101,),
  'cached': (60, 64, 20),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """Arrays of one call: q, k, v, the mask, and gradients of the output and the log-sum-exp."""

  inputs: tuple[jax.Array, jax.Array, jax.Array]
  mask: Mask
  gradients: tuple[jax.Array, jax.Array]


def case(mask: Mask, dtype: jnp.dtype = jnp.float32, heads: tuple[int, int, int] = (4, 2, 24)):
  """Random arrays for a mask, with `heads` = (N, K, H)."""
  query, key = mask
  (N, K, H), (B, L), S = heads, query.order.shape, key.order.shape[1]
  keys = jax.random.split(jax.random.key(0), 5)
  draw = lambda key, *shape: jax.random.normal(key, shape)
  q, k, v = draw(keys[0], B, L, N, H), draw(keys[1], B, S, K, H), draw(keys[2], B, S, K, H)
  inputs = tuple((2 * x).astype(dtype) for x in (q, k, v))
  given = (draw(keys[3], B, L, N, H).astype(dtype), draw(keys[4], B, L, N))
  return Case(inputs, mask, given)


def near_reference(run: Callable, mask: Mask, dtype: jnp.dtype) -> None:
  """Asserts that an implementation agrees with the definition, as far as a device's products do."""
  one = case(mask, dtype, heads=(4, 2, 72))
  ours, theirs = differentiated(run)(one), differentiated(reference.attention)(one)
  for a, b in zip(ours, theirs, strict=True):
    a, b = (np.where(np.isneginf(x), 0, np.asarray(x, np.float32)) for x in (a, b))
    scale = max(1.0, np.abs(b).max())
    np.testing.assert_allclose(a / scale, b / scale, atol=5e-2 if dtype == jnp.bfloat16 else 5e-3)


def differentiated(run: Callable) -> Callable:
  """`run(q, k, v, query, key)` -> output, log-sum-exp, and gradients of q, k and v."""

  def both(x: Case) -> tuple:
    out, pull = jax.vjp(lambda *inputs: run(*inputs, *x.mask), *x.inputs)
    return (*out, *pull(x.gradients))

  return jax.jit(both)


jax.tree_util.register_dataclass(Case)


@pytest.fixture(scope='session')
def masks() -> types.SimpleNamespace:
  """The builders above by name (`drawn`), their sizes for several blocks, and what uses them."""
  return types.SimpleNamespace(
    drawn=DRAWN,
    sized={name: DRAWN[name](*sizes) for name, sizes in SIZED.items()},
    length=LENGTH,
    case=case,
    differentiated=differentiated,
    near_reference=near_reference,
    **DRAWN,
  )
