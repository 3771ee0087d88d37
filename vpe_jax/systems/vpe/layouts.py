"""Token sequences of VPE: joint vocabulary and layouts (arXiv 2606.04457, App. D).

Span names: `bos`, `text`, `bot`, `codes`, `eot`, `boi`, `time` and `latents`; the source image of
an edit has `source_boi`, `source_time`, `source_latents` and `eoi`. Regions: `ar` (text and visual
prompt), `dit` (the image) and, in External+VPE, `prefix` (the visual prompt in the diffusion
expert's sequence).

In sequences, `s` are the codes of the visual prompt, `x` the tokens of the noisy image, `x_src`
those of the source image, and `time` is the time token; `|` separates regions. Arguments `text`,
`codes` and `latents` are numbers of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax.numpy as jnp

from vpe_jax.contracts import Array, Region
from vpe_jax.sequence import builder
from vpe_jax.sequence.spans import Layout, Span

# Conditions that may be dropped from the AR expert's sequences.
CONDITIONS = PROMPT, SOURCE = 'prompt', 'source'
# The condition that may be dropped from the diffusion expert's sequence in External+VPE.
VISUAL_PROMPT = 'visual_prompt'


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The joint vocabulary: text entries, then `codes` visual-prompt entries, then [bot] and [eot].

  With `codes` of 0 there is no visual prompt, and no entry for [bot] and [eot].

  `bos`, `boi` and `eoi` are ids of text entries; only sequences with a source image have `eoi`.
  """

  text: int
  codes: int
  bos: int
  boi: int
  eoi: int = 0

  @property
  def bot(self) -> int:
    """Id of the token that begins a visual prompt."""
    return self.text + self.codes

  @property
  def eot(self) -> int:
    """Id of the token that ends a visual prompt."""
    return self.text + self.codes + 1


def ar_sequence(vocabulary: Vocabulary, text: int, codes: int) -> Layout:
  """`[bos] text [bot] s [eot]`: all that the next-token loss needs; without codes `[bos] text`."""
  return Layout((_bos(vocabulary), *_prompt(vocabulary, text, codes, PROMPT)))


def text_to_image(vocabulary: Vocabulary, text: int, codes: int, latents: int) -> Layout:
  """`[bos] text [bot] s [eot] [boi] | time x`: Internal+VPE.

  The paper's tail `[eoi] [eos]` is left out: it carries no loss, and no other token sees it.
  Without codes the sequence is Show-o2's, `[bos] text [boi] | time x`.
  """
  image = _image(vocabulary, latents, 'ar')
  return Layout((*ar_sequence(vocabulary, text, codes).spans, *image))


def diffusion_sequence(vocabulary: Vocabulary, codes: int, latents: int) -> Layout:
  """`s [boi] | time x`: the diffusion expert of External+VPE; its AR expert has `ar_sequence`.

  The slots of the codes hold features that the AR expert computed for them. Positions count from 0,
  the visual prompt is causal, and the image sees the whole visual prompt:

          s1 s2 boi  t  x  y
      s1   1  0  0   0  0  0
      s2   1  1  0   0  0  0
      boi  1  1  1   0  0  0
      t    1  1  1   1  1  1
      x    1  1  1   1  1  1
      y    1  1  1   1  1  1

  If the visual prompt is dropped, the sequence is `[boi] | time x`, with positions from 0.
  """
  prompt = Span('codes', codes, 'prefix', condition=VISUAL_PROMPT)
  return Layout((prompt, *_image(vocabulary, latents, 'prefix')))


def edit(vocabulary: Vocabulary, text: int, codes: int, latents: int) -> Layout:
  """`[bos] [boi] time x_src [eoi] text [bot] s [eot] [boi] | time x`: edits of Internal+VPE.

  The source image is stored with the tokens of the AR expert. Text and visual prompt are one
  condition, the source image is another: without the first the sequence is
  `[bos] [boi] time x_src [eoi] [boi] | time x`, without the second that of `text_to_image`, without
  both `[bos] [boi] | time x`. With one text token, one code and two latents in each image (r q,
  x y):

          bos boi  t  r  q eoi  a bot  s eot boi  t  x  y
      bos   1   0  0  0  0   0  0   0  0   0   0  0  0  0
      boi   1   1  0  0  0   0  0   0  0   0   0  0  0  0
      t     1   1  1  1  1   0  0   0  0   0   0  0  0  0
      r     1   1  1  1  1   0  0   0  0   0   0  0  0  0
      q     1   1  1  1  1   0  0   0  0   0   0  0  0  0
      eoi   1   1  1  1  1   1  0   0  0   0   0  0  0  0
      a     1   1  1  1  1   1  1   0  0   0   0  0  0  0
      bot   1   1  1  1  1   1  1   1  0   0   0  0  0  0
      s     1   1  1  1  1   1  1   1  1   0   0  0  0  0
      eot   1   1  1  1  1   1  1   1  1   1   0  0  0  0
      boi   1   1  1  1  1   1  1   1  1   1   1  0  0  0
      t     1   1  1  1  1   1  1   1  1   1   1  1  1  1
      x     1   1  1  1  1   1  1   1  1   1   1  1  1  1
      y     1   1  1  1  1   1  1   1  1   1   1  1  1  1
  """
  prompt = _prompt(vocabulary, text, codes, PROMPT)
  source, image = _source(vocabulary, latents), _image(vocabulary, latents, 'ar')
  return Layout((_bos(vocabulary), *source, *prompt, *image))


def edit_ar_sequence(vocabulary: Vocabulary, text: int, codes: int, latents: int) -> Layout:
  """`[bos] [boi] time x_src [eoi] text [bot] s [eot]`: edits of External+VPE's AR expert.

  Text and source image are two conditions. The visual prompt, which is all that the diffusion
  expert sees, is never dropped.
  """
  prompt = _prompt(vocabulary, text, codes, '')
  return Layout((_bos(vocabulary), *_source(vocabulary, latents), *prompt))


def build(
  layout: Layout,
  vocabulary: Vocabulary,
  text: Array | None,
  text_length: Array | None,
  codes: Array,
  keep: Array | Mapping[str, Array],
  multiple: int = 1,
) -> dict[str, Region]:
  """The token sequences of a batch of captions and visual prompts.

  Args:
    layout: one of this file.
    vocabulary: of text and codes.
    text: caption ids [B, T]; not read where the layout has no text.
    text_length: number of real tokens of the caption [B]; not read where the layout has no text.
    codes: visual prompt [B, P]; not read where the layout has no codes.
    keep: bool [B] by condition, or one for all; False drops the condition.
    multiple: regions are padded with absent tokens to a multiple of this.

  Returns:
    The region of each expert.

  Raises:
    ValueError: `text` or `codes` are not as long as their span.
  """
  contents, lengths = {}, {}
  if 'text' in layout:
    contents['text'], lengths['text'] = text, text_length
  if 'codes' in layout:
    contents['codes'] = codes.astype(jnp.int32) + vocabulary.text
  return builder.build(layout, contents, lengths, keep, multiple)


def _bos(vocabulary: Vocabulary) -> Span:
  return Span('bos', 1, 'ar', id=vocabulary.bos)


def _prompt(
  vocabulary: Vocabulary, text: int, codes: int, visual_prompt_condition: str
) -> tuple[Span, ...]:
  """`text [bot] s [eot]`, or `text` without codes."""
  caption = Span('text', text, 'ar', condition=PROMPT)
  if not codes:
    return (caption,)
  token = functools.partial(Span, expert='ar', condition=visual_prompt_condition)
  return (
    caption,
    token('bot', 1, predicts=True, id=vocabulary.bot),
    token('codes', codes, predicts=True),
    token('eot', 1, id=vocabulary.eot),
  )


def _source(vocabulary: Vocabulary, latents: int) -> tuple[Span, ...]:
  """`[boi] time x_src [eoi]`."""
  token = functools.partial(Span, expert='ar', condition=SOURCE)
  return (
    token('source_boi', 1, id=vocabulary.boi),
    token('source_time', 1, full=True),
    token('source_latents', latents, full=True),
    token('eoi', 1, id=vocabulary.eoi),
  )


def _image(vocabulary: Vocabulary, latents: int, prefix_expert: str) -> tuple[Span, ...]:
  """`[boi] | time x`."""
  return (
    Span('boi', 1, prefix_expert, id=vocabulary.boi),
    Span('time', 1, 'dit', full=True),
    Span('latents', latents, 'dit', full=True),
  )
