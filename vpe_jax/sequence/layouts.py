"""Layouts that several systems share. In the masks shown, rows are queries and columns keys."""

from __future__ import annotations

from vpe_jax.sequence.spans import Layout, Span


def causal_text(length: int, expert: str = 'text', predicts: bool = False) -> Layout:
  """One span `text` of causal tokens.

     a b c
  a  1 0 0
  b  1 1 0
  c  1 1 1
  """
  return Layout((Span('text', length, expert, predicts=predicts),))


def cross_attention(queries: int, keys: int) -> Layout:
  """Experts `keys` and `queries`, one span each: every query sees every key.

  With the same tokens on both sides this is bidirectional self-attention. Two queries (p, q), three
  keys:

         a b c
      p  1 1 1
      q  1 1 1
  """
  return Layout(
    (Span('keys', keys, 'keys', full=True), Span('queries', queries, 'queries', full=True))
  )


def teacher_forced_frames(
  frames: int,
  text: int,
  latents: int,
  text_expert: str = 'text',
  image_expert: str = 'image',
) -> Layout:
  """Interleaved frames of text, noisy latents and clean latents, all predicted in one pass.

  Noisy latents see the text of their own frame and the clean latents of earlier frames; clean
  latents see clean latents only, so that a cache of them serves later frames; text sees the text of
  its own frame only. Spans: `frame0/text`, `frame0/noisy`, `frame0/clean`, `frame1/text`, and so
  on. Two frames of one text token (a, b), a noisy latent (m, n) and a clean one (x, y), in logical
  order:

         a m x b n y
      a  1 0 0 0 0 0
      m  1 1 0 0 0 0
      x  0 0 1 0 0 0
      b  0 0 0 1 0 0
      n  0 0 1 1 1 0
      y  0 0 1 0 0 1
  """
  spans = []
  for frame in range(frames):
    own = {'frame': frame, 'seen_by': 'frame'}
    spans += [
      Span(f'frame{frame}/text', text, text_expert, sees='frame', **own),
      Span(f'frame{frame}/noisy', latents, image_expert, full=True, **own),
      # The clean copy outlives the frame, so it belongs to none.
      Span(f'frame{frame}/clean', latents, image_expert, full=True),
    ]
  return Layout(tuple(spans))


def position_queries(text: int, groups: int, queries: int, expert: str = 'decoder') -> Layout:
  """Text, then groups of latents that are predicted in parallel from position queries.

  The queries of a group see the text and all finished groups, but not each other, and no other
  token sees them; all share the next position. Once their latents are predicted, the group is
  stored as causal pairs of query and latent, at that position and the following ones. Spans:
  `text`, `group0/queries`, `group0/pairs`, `group1/queries`, and so on. One text token, one group
  of two queries (p, q) and their pairs (p x, q y):

         a p q p x q y
      a  1 0 0 0 0 0 0
      p  1 1 0 0 0 0 0
      q  1 0 1 0 0 0 0
      p  1 0 0 1 0 0 0
      x  1 0 0 1 1 0 0
      q  1 0 0 1 1 1 0
      y  1 0 0 1 1 1 1
  """
  spans = [Span('text', text, expert)]
  for group in range(groups):
    spans += [
      Span(f'group{group}/queries', queries, expert, seen_by='token', shared_position=True),
      Span(f'group{group}/pairs', 2 * queries, expert),
    ]
  return Layout(tuple(spans))
