"""The benchmark of written words: matching, error rates and the report."""

import numpy as np
import pytest

from vpe_jax.config import DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data.embedded.words import Words
from vpe_jax.data.records import render
from vpe_jax.evaluation import ocr
from vpe_jax.evaluation.report import FROM_DRAFTS, RECONSTRUCTED, distinct_records

BENCHMARK = ocr.Ocr(captions=6, splits=('combination',), seed=1)


@pytest.mark.parametrize(
  'read, expected, counts',
  [
    ('hello fox', 'hello fox', (2, 2, 2)),
    ('FOX Hello', 'hello fox', (2, 2, 2)),  # in any order and case
    ('hallo', 'hello', (1, 1, 1)),  # 80 of 100
    ('hxllx', 'hello', (1, 1, 0)),
    ('hellofox', 'hello fox', (2, 1, 0)),
    ('fox fox', 'fox', (1, 2, 1)),  # each expected word matches once
    ('', 'fox', (1, 0, 0)),
  ],
)
def test_words_are_matched_as_in_textatlas(read, expected, counts):
  assert ocr.matches(read, expected) == counts


def test_words_are_pooled_and_character_errors_averaged():
  result = ocr.measure(['fox', 'a b', 'Hello'], ['fox', '', 'hello'])
  assert [x.sum() for x in (result.expected, result.read, result.matched)] == [2, 4, 2]
  value = {name: figure.value for name, figure in result.figures.items()}
  assert value['recall'] == 1 and value['precision'] == 0.5 and value['f1'] == pytest.approx(2 / 3)
  assert result.errors.tolist() == pytest.approx([0, 1, 0.2])
  assert value['error_rate'] == pytest.approx(0.4) and value['without_error'] == 1 / 3
  empty = {k: x.value for k, x in ocr.measure(['', ''], ['fox', 'dog']).figures.items()}
  assert empty['precision'] == empty['f1'] == 0 and empty['error_rate'] == 1


def test_small_images_are_enlarged_with_a_white_border():
  image = np.zeros((64, 64, 3), np.uint8)
  large = ocr.enlarged(image)
  assert large.shape == (320, 320, 3) and large[0, 0, 0] == 255 and not large[32:-32, 32:-32].any()
  assert ocr.enlarged(np.zeros((512, 512, 3), np.uint8)).shape == (576, 576, 3)


def test_missing_packages_are_named_before_sampling(monkeypatch):
  monkeypatch.setattr(ocr, '_PACKAGES', ('numpy', 'no_such_reader'))
  with pytest.raises(UserError, match='no_such_reader'):
    BENCHMARK.check()


def test_the_report_has_ground_truth_images_and_images_from_drafts(monkeypatch, fake_subject):
  records = distinct_records(Words(2 * 6, 'combination', 1), 6)
  texts = {}
  for record in records:
    written = ' '.join(word.text for word in record.truth.writing.words)
    texts[render(record, 16).tobytes()] = written
  read = lambda images: [texts.get(image.tobytes(), 'nothing') for image in images]
  monkeypatch.setattr(ocr, 'reader', lambda: read)
  gray = lambda prompts: np.full((len(prompts), 16, 16, 3), 128, np.uint8)
  subject = fake_subject(
    gray,
    task='words',
    from_drafts=lambda prompts, images: images,
    reconstruct=lambda images: np.concatenate([images[:3], gray(images[3:])]),
  )
  report = BENCHMARK.run(subject)
  results = report.protocol['results']['combination']
  recall = {name: row['recall'] for name, row in results['rows'].items()}
  value = {name: figure['value'] for name, figure in recall.items()}
  spoiled = value.pop(RECONSTRUCTED)
  assert value == {'ground truth': 1, 'generated': 0, FROM_DRAFTS: 1} and 0 < spoiled < 1
  low, high = recall[RECONSTRUCTED]['interval95']
  assert low < spoiled < high
  codec = results['differences'][f'ground truth minus {RECONSTRUCTED}']['recall']
  assert codec['value'] == pytest.approx(1 - spoiled)
  assert report.numbers['ocr/combination/recall'] == 0
  assert report.numbers['ocr/combination/true_drafts/recall'] == 1
  assert results['images'][0]['generated'] == 'nothing'
  assert results['images'][0]['ground truth'] == results['images'][0]['expected']
  assert len(report.lines) == 9
  true, _, generated, _ = report.sheets['combination']
  assert true.captions[0] == records[0].caption and generated.captions[0] == '"nothing"'


def test_prompts_are_like_those_of_the_runs_data(monkeypatch, fake_subject):
  monkeypatch.setattr(ocr, 'reader', lambda: lambda images: ['nothing'] * len(images))
  asked = []

  def gray(prompts):
    asked.extend(prompts)
    return np.full((len(prompts), 16, 16, 3), 128, np.uint8)

  data = DataConfig(source='words', most_words=1, fonts=('rounded',))
  BENCHMARK.run(fake_subject(gray, task='words', data=data))
  assert len(asked) == 6 and all(' rounded font' in prompt for prompt in asked)
  assert all(len(prompt.split('"')[1].split()) == 1 for prompt in asked)
