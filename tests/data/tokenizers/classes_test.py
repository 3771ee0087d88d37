"""Class names as tokens."""

from __future__ import annotations

import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.data.tokenizers import classes
from vpe_jax.data.tokenizers.published import open_tokenizer


def test_names_numbers_and_back():
  tokenizer = open_tokenizer('classes:cat, red fox,dog')
  assert tokenizer.names == ('cat', 'red fox', 'dog') and tokenizer.vocabulary == 3
  ids, lengths = tokenizer.encode_batch(['dog', ' red  fox', '0'], 1)
  np.testing.assert_array_equal(ids[:, 0], [2, 1, 0])
  assert (lengths == 1).all() and tokenizer.decode([2, 1]) == 'dog, red fox'


def test_a_number_of_classes_and_a_file_of_names(tmp_path):
  assert classes.of_names('1000').names[:2] == ('0', '1')
  assert classes.of_names('1000').encode('999') == [999]
  (tmp_path / 'names.txt').write_text('n01440764\n\nn01443537\n')
  tokenizer = classes.of_names(str(tmp_path / 'names.txt'))
  assert tokenizer.encode('n01443537') == [1]
  with pytest.raises(UserError, match='nowhere.txt: data.tokenizer='):
    classes.of_names('nowhere.txt')


@pytest.mark.parametrize('listed', ['', 'a,a', ',', '0'])
def test_class_names_must_be_unique(listed):
  with pytest.raises(UserError, match='class names'):
    classes.of_names(listed)


def test_a_number_of_thousands_of_digits_is_no_class():
  try:
    error = str(classes.of_names('cat,dog').encode('9' * 5_000))
  except ValueError as raised:
    error = str(raised)
  assert error.startswith("no class '999") and len(error) < 200


def test_unknown_classes_are_named():
  tokenizer = classes.of_names('cat,dog')
  with pytest.raises(UserError, match="no class 'cats'; did you mean 'cat'"):
    tokenizer.encode('cats')
  with pytest.raises(UserError, match="no class '2'.*cat, dog"):
    tokenizer.encode('2')
