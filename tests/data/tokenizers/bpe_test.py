"""The tokenizer."""

from __future__ import annotations

import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.data.embedded import splits
from vpe_jax.data.tokenizers import bpe


@pytest.fixture(scope='module')
def captions():
  return bpe.training_captions()


def test_shipped_file_equals_a_fresh_training(captions):
  fresh = bpe.train_bpe(captions).to_str(pretty=True) + '\n'
  shipped = bpe.SHIPPED.read_text(encoding='utf-8')
  assert shipped == fresh, 'run python -m vpe_jax.data.tokenizers.bpe'


def test_training_captions_are_known_and_short(captions):
  tokenizer = bpe.shipped()
  assert tokenizer.vocabulary == bpe.VOCABULARY
  for caption in captions:
    tokens = tokenizer.encode(caption)
    assert bpe.UNK not in tokens and len(tokens) <= 32, caption
    assert min(tokens) >= len(bpe.SPECIALS)


def test_nothing_held_out_is_read(captions):
  assert not any(splits.mentions(c, splits.held_out_concepts()) for c in captions)


@pytest.mark.parametrize(
  'caption', ['a red fox', "two dogs, one cat's hat!", '[eos] is [pad] 12', 'zyzzyva & co.']
)
def test_decode_gives_the_text_back(caption):
  tokenizer = bpe.shipped()
  assert tokenizer.decode(tokenizer.encode(caption)) == caption


def test_letters_case_and_accents():
  tokenizer = bpe.shipped()
  assert tokenizer.encode('A Red CAFÉ') == tokenizer.encode('a red cafe')
  assert tokenizer.encode('a “dog’s” – hat') == tokenizer.encode('a "dog\'s" - hat')


def test_special_tokens_cannot_be_typed():
  assert min(bpe.shipped().encode('[eos][pad][unk]')) >= len(bpe.SPECIALS)


def test_encode_batch_pads():
  ids, lengths = bpe.shipped().encode_batch(['a dog', 'a big red circle'], 8)
  assert ids.dtype == lengths.dtype == np.int32 and ids.shape == (2, 8)
  for row, length in zip(ids, lengths, strict=True):
    assert (row[length:] == bpe.PAD).all() and (row[:length] != bpe.PAD).all()
  assert bpe.shipped().decode(ids[0]) == 'a dog'


def test_long_prompt_names_tokens_and_limit():
  with pytest.raises(UserError, match=r'prompt has 5 tokens and the limit is 4'):
    bpe.shipped().encode_batch(['dog dog dog dog dog'], 4)


def test_what_is_no_text_is_named():
  with pytest.raises(UserError, match='not valid text'):
    bpe.shipped().encode(b'a \xff'.decode('utf-8', 'surrogateescape'))


def test_long_captions_can_be_cut():
  ids, lengths = bpe.shipped().encode_batch(['dog dog dog dog dog', 'a dog'], 4, cut=True)
  assert lengths.tolist() == [4, 2]
  assert ids[0].tolist() == bpe.shipped().encode('dog dog dog dog')


def test_missing_or_foreign_file(tmp_path):
  with pytest.raises(UserError, match='no tokenizer at'):
    bpe.Tokenizer(tmp_path / 'bpe.json')
  foreign = bpe.tokenizers.Tokenizer(bpe.models.BPE())
  foreign.save(str(tmp_path / 'bpe.json'))
  with pytest.raises(UserError, match='lacks the special tokens'):
    bpe.Tokenizer(tmp_path / 'bpe.json')


def test_a_file_has_a_prompt_a_line(tmp_path):
  path = tmp_path / 'prompts.txt'
  path.write_text('\ufeffa red fox\n\n  two dogs \n', encoding='utf-8')
  assert bpe.read_prompts(str(path), '--prompts') == ['a red fox', 'two dogs']
  path.write_text(' \n\n')
  with pytest.raises(UserError, match='--prompts is blank'):
    bpe.read_prompts(str(path), '--prompts')
