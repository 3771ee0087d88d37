"""Rows that several families share: layers whose tensors carry the same names."""

from vpe_jax.checkpoints.table import Row


def linear(source: str, target: str, kernel: str = 'O I -> I O') -> tuple[Row, ...]:
  """A dense layer's kernel, without a bias."""
  return (Row(f'{source}.weight', f'{target}/kernel', kernel),)


def dense(source: str, target: str, kernel: str = 'O I -> I O', bias: str = '') -> tuple[Row, ...]:
  """A dense layer's kernel and bias."""
  return (*linear(source, target, kernel), Row(f'{source}.bias', f'{target}/bias', bias))


def patches(source: str, target: str) -> tuple[Row, ...]:
  """A convolution of stride equal to its size, as a dense layer over patches."""
  return dense(source, target, 'D C p q -> (p q C) D')


def rms_norm(source: str, target: str) -> tuple[Row, ...]:
  """A norm's scale."""
  return (Row(f'{source}.weight', f'{target}/scale'),)


def layer_norm(source: str, target: str) -> tuple[Row, ...]:
  """A norm's scale and bias."""
  return (*rms_norm(source, target), Row(f'{source}.bias', f'{target}/bias'))


def mlp(source: str, target: str) -> tuple[Row, ...]:
  """Two dense layers (`fc1`, `fc2`)."""
  return (*dense(f'{source}.fc1', f'{target}/up'), *dense(f'{source}.fc2', f'{target}/down'))
