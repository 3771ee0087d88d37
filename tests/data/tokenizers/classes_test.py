"""Class names as tokens."""

from __future__ import annotations

import numpy as np
import pytest

from vpe_jax.contracts import UserError
from vpe_jax.data.tokenizers import classes
from vpe_jax.data.tokenizers.published import open_tokenizer


def test_names_numbers_and_back():
  found = open_tokenizer('classes:cat, red fox,dog')
  assert found.names == ('cat', 'red fox', 'dog') and found.vocabulary == 3
  ids, lengths = found.encode_batch(['dog', ' red  fox', '0'], 1)
  np.testing.assert_array_equal(ids[:, 0], [2, 1, 0])
  assert (lengths == 1).all() and found.decode([2, 1]) == 'dog, red fox'


def test_a_number_of_classes_and_a_file_of_names(tmp_path):
  assert classes.of_names('1000').names[:2] == ('0', '1')
  assert classes.of_names('1000').encode('999') == [999]
  (tmp_path / 'names.txt').write_text('n01440764\n\nn01443537\n')
  found = classes.of_names(str(tmp_path / 'names.txt'))
  assert found.encode('n01443537') == [1]
  with pytest.raises(UserError, match='no file .*nowhere.txt: data.tokenizer=classes:FILE needs'):
    classes.of_names('nowhere.txt')


@pytest.mark.parametrize('listed', ['', 'a,a', ',', '0'])
def test_classes_need_different_names(listed):
  with pytest.raises(UserError, match='classes need different names, at least one'):
    classes.of_names(listed)


def test_an_unknown_class_names_the_nearest():
  found = classes.of_names('cat,dog')
  with pytest.raises(UserError, match="no class 'cats'; did you mean 'cat'"):
    found.encode('cats')
  with pytest.raises(UserError, match="no class '2'; known: cat, dog"):
    found.encode('2')
