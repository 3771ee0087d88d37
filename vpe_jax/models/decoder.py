"""A causal language model (Qwen2, Llama 3): token table, decoder layers, norm, output.

Parameter tree: `embed`, `layers` (stacked), `norm` and, where the output is not tied to the token
table, `head/kernel`. `Decoder` holds no arrays: every method is a pure function of the parameters.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from vpe_jax.config import check_sizes
from vpe_jax.contracts import Array, Params
from vpe_jax.models import kernel_layout, mot
from vpe_jax.models.taps import Tapped, Taps
from vpe_jax.models.transformer import TransformerConfig
from vpe_jax.ops.matmul import matmul_transposed
from vpe_jax.sequence.builder import build
from vpe_jax.sequence.layouts import causal_text


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Sizes of a language model.

  Attributes:
    vocabulary: entries V of the token table.
    body: the layers.
    tied: whether the output layer is the token table.
    context: longest text of the training, in tokens; written on export, not read by the network.
  """

  vocabulary: int
  body: TransformerConfig
  tied: bool
  context: int

  def __post_init__(self) -> None:
    check_sizes(self)


@dataclasses.dataclass(frozen=True)
class Decoder(mot.OneExpert):
  """The network of one configuration, computing in `dtype`."""

  config: DecoderConfig

  def init(self, rng: Array) -> Params:
    """Fresh parameters, float32."""
    c = self.config
    first, second, third = jax.random.split(rng, 3)
    params = {
      'embed': 0.02 * jax.random.normal(first, (c.vocabulary, c.body.width)),
      'layers': mot.init_layers(self.layer, second),
      'norm': {'scale': jnp.ones((c.body.width,))},
    }
    if not c.tied:
      kernel = 0.02 * jax.random.normal(third, (c.body.width, c.vocabulary))
      params['head'] = {'kernel': kernel}
    return params

  def embed(self, params: Params, ids: Array) -> Array:
    """Token embeddings [B, L, D] of ids [B, L]."""
    return jnp.take(params['embed'], ids, axis=0).astype(self.dtype)

  def hidden(self, params: Params, ids: Array, length: Array) -> Array:
    """Final-norm hidden states [B, L, D] of ids [B, L]; tokens from `length` [B] on are padding."""
    return self.hidden_tapped(params, ids, length, Taps())[0]

  def hidden_tapped(
    self, params: Params, ids: Array, length: Array, taps: Taps
  ) -> tuple[Array, Tapped]:
    """The output of `hidden`, and the inner states that `taps` selects."""
    text = build(causal_text(ids.shape[1]), {'text': ids}, {'text': length})['text']
    stream = mot.Stream(self.embed(params, text.ids), text.positions, text.visibility)
    hidden, _, tapped = self.states_tapped(params, stream, taps)
    return hidden, tapped

  def logits(self, params: Params, hidden: Array) -> Array:
    """Logits [B, L, V] float32 from final-norm hidden states [B, L, D]."""
    if self.config.tied:
      table = params['embed'].astype(hidden.dtype)
      return matmul_transposed(hidden, table).astype(jnp.float32)
    return kernel_layout.columns(params['head'], hidden).astype(jnp.float32)

  def __call__(self, params: Params, ids: Array, length: Array) -> Array:
    """Logits [B, L, V] float32 of ids [B, L]; tokens from `length` [B] on are padding."""
    return self.logits(params, self.hidden(params, ids, length))
