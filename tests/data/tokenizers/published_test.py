"""Tokenizers saved by transformers: ids of Show-o2, and special tokens in prompts."""

from __future__ import annotations

import pytest
import tokenizers
import transformers

from configs import t2i
from tests.small_pipelines import small_pipeline
from vpe_jax import systems
from vpe_jax.contracts import UserError
from vpe_jax.data.tokenizers import bpe, published
from vpe_jax.training import encode

# Special tokens of Qwen2.5, which follow 151,643 ordinary tokens.
SPECIAL = (
  '<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>'
  ' <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>'
  ' <|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|>'
  ' <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>'
).split()
PLAIN = 151_643


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A saved byte-level BPE with the size and the special tokens of Qwen2.5."""
  return _save(tmp_path_factory.mktemp('tokenizer'), SPECIAL)


def _save(path, special):
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {letter: i for i, letter in enumerate(letters)}
  vocabulary |= {f'filler {i}': i for i in range(len(vocabulary), PLAIN)}
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  bpe.add_special_tokens(special)
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=bpe, eos_token='<|endoftext|>', additional_special_tokens=special[1:]
  ).save_pretrained(path)
  return path


@pytest.fixture(scope='module')
def tokenizer(folder):
  return published.open_tokenizer(f'showo2:{folder}')


def test_ids_equal_those_of_show_o2(tokenizer):
  names = ('<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>')
  assert [tokenizer.id_of(name) for name in names] == [151_644, 151_645, 151_652, 151_653]
  added = ('[PAD]', '<image>', '<|vid_start|>', '<|vid_end|>')
  assert [tokenizer.id_of(name) for name in added] == list(range(151_665, 151_669))
  assert tokenizer.vocabulary == 151_669 and tokenizer.pad == 151_665


def test_the_paper_preset_has_these_ids(tokenizer):
  model = t2i.get_config('paper').model
  assert model.text_vocab == tokenizer.vocabulary
  assert model.bos == tokenizer.id_of('<|im_start|>')
  assert model.boi == tokenizer.id_of('<|vision_start|>')


def test_each_family_has_its_own_special_tokens(folder):
  qwen = published.open_tokenizer(f'qwen2.5:{folder}')
  assert qwen.vocabulary == 151_665 and qwen.pad == qwen.id_of('<|endoftext|>') == 151_643
  with pytest.raises(UserError, match='has no token \\[PAD\\]'):
    qwen.id_of('[PAD]')
  with pytest.raises(UserError, match='has 151665 tokens and those of llama3 have 128256'):
    published.open_tokenizer(f'llama3:{folder}')
  with pytest.raises(UserError, match="no family of tokenizers is called 'qwen2'.*'qwen2.5'"):
    published.open_tokenizer(f'qwen2:{folder}')


def test_ids_of_special_tokens_are_checked(tmp_path):
  path = _save(tmp_path, [SPECIAL[0], SPECIAL[2], SPECIAL[1], *SPECIAL[3:]])
  with pytest.raises(UserError, match=r'<\|im_start\|> the id 151645 and qwen2.5 reads 151644'):
    published.open_tokenizer(f'qwen2.5:{path}')


def test_decode_inverts_encode(tokenizer):
  ids, lengths = tokenizer.encode_batch(['A red fox!', 'é'], 16)
  assert lengths.tolist() == [10, 2] and ids[1, 2:].tolist() == [tokenizer.pad] * 14
  assert tokenizer.decode(ids[0, :10]) == 'A red fox!'
  assert tokenizer.decode([151_644, *ids[0, :1]]) == 'A'


@pytest.mark.parametrize('name', ['<|im_start|>', '<|vision_start|>', '[PAD]', '<|vid_end|>'])
def test_special_tokens_in_prompts_are_ordinary_text(tokenizer, name):
  ids = tokenizer.encode(f'a {name} b')
  assert max(ids) < PLAIN and tokenizer.decode(ids) == f'a {name} b'


def test_mistakes_are_named_in_one_line(tokenizer, tmp_path):
  for name in (str(tmp_path), str(tmp_path / 'none'), 'nothing'):
    with pytest.raises(UserError, match='no tokenizer at') as error:
      published.open_tokenizer(f'qwen2.5:{name}')
    assert '\n' not in str(error.value)
  with pytest.raises(UserError, match='no token <nope>'):
    tokenizer.id_of('<nope>')
  with pytest.raises(UserError, match='not valid text'):
    tokenizer.encode(b'\xff'.decode('utf-8', 'surrogateescape'))


def test_pipelines_use_the_tokenizer_of_the_config(folder, tokenizer):
  config = t2i.get_config('debug')
  config.data.update(tokenizer=f'showo2:{folder}', encode='online', text_length=96)
  system = systems.build(config.to_dict())
  pipeline = small_pipeline(system.config.data)
  batch = pipeline.examples([3])
  words = batch.inputs['text'][0, : batch.inputs['text_length'][0]].tolist()
  assert words == tokenizer.encode(pipeline.record(3).caption)
  with pytest.raises(UserError, match=r'151669 tokens, but model\.text_vocab is 1024'):
    encode.open_training_data(system.config, system, None, None)


def test_the_shipped_tokenizer_is_the_default():
  assert published.open_tokenizer('assets:bpe') is bpe.shipped()


def test_special_ids_of_the_model_are_those_of_the_tokenizer(folder):
  config = t2i.get_config('debug')
  config.data.update(tokenizer=f'showo2:{folder}', encode='online', text_length=96)
  config.model.update(text_vocab=151_669, inherit=0.0, bos=151_644, boi=5)
  with pytest.raises(UserError, match=r'model\.boi is 5, .*<\|vision_start\|> 151652'):
    _ = systems.build(config.to_dict()).preprocess
  config.model.boi = 151_652
  assert systems.build(config.to_dict()).preprocess.tokenizer.vocabulary == 151_669


def test_a_revision_of_the_hub_is_opened(monkeypatch):
  opened = []

  def from_pretrained(name, **options):
    opened.append((name, options['revision']))
    raise OSError('offline')

  monkeypatch.setattr(transformers.AutoTokenizer, 'from_pretrained', from_pretrained)
  for name in ('owner/name@v1', 'owner/name'):
    with pytest.raises(UserError, match='offline'):
      published.open_tokenizer(f'qwen2.5:{name}')
  assert opened == [('owner/name', 'v1'), ('owner/name', 'main')]
