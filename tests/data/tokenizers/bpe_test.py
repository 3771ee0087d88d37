"""The small BPE, and reading of prompts."""

from __future__ import annotations

import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.data.embedded import splits
from vpe_jax.data.tokenizers import bpe


@pytest.fixture(scope='module')
def captions():
  return bpe.training_captions()


def test_training_again_gives_the_shipped_file(captions):
  fresh = bpe.train_bpe(captions).to_str(pretty=True) + '\n'
  shipped = bpe.SHIPPED.read_text(encoding='utf-8')
  assert shipped == fresh, 'run python -m vpe_jax.data.tokenizers.bpe'


def test_training_captions_have_no_unknown_tokens_and_are_short(captions):
  tokenizer = bpe.shipped()
  assert tokenizer.vocabulary == bpe.VOCABULARY
  for caption in captions:
    tokens = tokenizer.encode(caption)
    assert bpe.UNK not in tokens and len(tokens) <= 32, caption
    assert min(tokens) >= len(bpe.SPECIALS)


def test_training_captions_contain_no_held_out_concept(captions):
  assert not any(splits.mentions(c, splits.held_out_concepts()) for c in captions)


@pytest.mark.parametrize(
  'caption', ['a red fox', "two dogs, one cat's hat!", '[eos] is [pad] 12', 'zyzzyva & co.']
)
def test_decode_inverts_encode(caption):
  tokenizer = bpe.shipped()
  assert tokenizer.decode(tokenizer.encode(caption)) == caption


def test_case_accents_and_typography_are_normalized():
  tokenizer = bpe.shipped()
  assert tokenizer.encode('A Red CAFÉ') == tokenizer.encode('a red cafe')
  assert tokenizer.encode('a “dog’s” – hat') == tokenizer.encode('a "dog\'s" - hat')


@pytest.mark.parametrize(
  ('caption', 'spelled'),
  [
    ('the word "fox"', 'f o x'),
    ('“Red fox” and "owl" on white', 'r e d ▁ f o x o w l'),
    ('"at"', 'a t'),
    ('a 5" fox', ''),
    ('a fox ""', ''),
  ],
)
def test_quoted_text_is_spelled_letter_by_letter(caption, spelled):
  tokenizer = bpe.shipped()
  ids = tokenizer.encode(caption)
  pieces = ' '.join(tokenizer._bpe.id_to_token(i) for i in ids)
  quotes = pieces.split('"')[1::2] if pieces.count('"') > 1 else []
  assert ' '.join(quote.strip() for quote in quotes if quote.strip()) == spelled
  assert tokenizer.decode(ids) == caption.lower().replace('“', '"').replace('”', '"')
  unquoted = tokenizer.encode(caption.replace('"', '').replace('“', '').replace('”', ''))
  assert len(ids) > len(unquoted)


def test_text_never_encodes_to_special_tokens():
  assert min(bpe.shipped().encode('[eos][pad][unk]')) >= len(bpe.SPECIALS)


def test_encode_batch_pads():
  ids, lengths = bpe.shipped().encode_batch(['a dog', 'a big red circle'], 8)
  assert ids.dtype == lengths.dtype == np.int32 and ids.shape == (2, 8)
  for tokens, length in zip(ids, lengths, strict=True):
    assert (tokens[length:] == bpe.PAD).all() and (tokens[:length] != bpe.PAD).all()
  assert bpe.shipped().decode(ids[0]) == 'a dog'


def test_invalid_text_is_rejected():
  with pytest.raises(UserError, match='not valid text'):
    bpe.shipped().encode(b'a \xff'.decode('utf-8', 'surrogateescape'))


def test_the_warning_of_a_truncated_caption_shows_its_beginning(monkeypatch):
  messages = []
  monkeypatch.setattr(
    bpe.logging, 'log_first_n', lambda level, text, n, *values: messages.append(text % values)
  )
  bpe.shipped().encode_batch(['a dog ' * 1_000], 4, cut=True)
  assert "'a dog a dog" in messages[0] and len(messages[0]) < 250


def test_long_captions_are_rejected_or_truncated():
  with pytest.raises(UserError, match='5 tokens .* 4;'):
    bpe.shipped().encode_batch(['dog dog dog dog dog'], 4)
  ids, lengths = bpe.shipped().encode_batch(['dog dog dog dog dog', 'a dog'], 4, cut=True)
  assert lengths.tolist() == [4, 2]
  assert ids[0].tolist() == bpe.shipped().encode('dog dog dog dog')


def test_missing_and_foreign_files_are_named(tmp_path):
  with pytest.raises(UserError, match='no tokenizer at'):
    bpe.Tokenizer(tmp_path / 'bpe.json')
  foreign = bpe.tokenizers.Tokenizer(bpe.models.BPE())
  foreign.save(str(tmp_path / 'bpe.json'))
  with pytest.raises(UserError, match='bpe.json lacks the special tokens'):
    bpe.Tokenizer(tmp_path / 'bpe.json')


def test_prompt_files_have_one_prompt_per_line(tmp_path):
  path = tmp_path / 'prompts.txt'
  path.write_text('\ufeffa red fox\n\n  two dogs \n', encoding='utf-8')
  assert bpe.read_prompts(str(path), '--prompts') == ['a red fox', 'two dogs']
  path.write_text(' \n\n')
  with pytest.raises(UserError, match='--prompts is blank'):
    bpe.read_prompts(str(path), '--prompts')
