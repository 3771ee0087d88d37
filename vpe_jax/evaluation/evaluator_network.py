"""The evaluator network: a SigLIP, used by no generator, that compares images with captions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax import systems
from vpe_jax.checkpoints import weights
from vpe_jax.codecs import pixels
from vpe_jax.contracts import Array, Params, UserError
from vpe_jax.data.tokenizers import bpe
from vpe_jax.models import siglip
from vpe_jax.sampling import batches

_BATCH = 64
_SHIFTS = (-1, 0, 1)  # steps in x and in y; the mean over shifts depends less on patch borders
_STEP = 1 / 20  # size of a step, as a fraction of the side of the image


class EvaluatorNetwork:
  """Embeds images and captions as unit vectors, whose dot product measures how well they match.

  The vector of an image is the normalized mean over nine slightly shifted views.
  """

  def __init__(self, system: Any, params: Params, tokenizer: bpe.Tokenizer, fingerprint: str):
    """Wraps a system and parameters in memory; most callers use `load`.

    Args:
      system: a vpe_jax.systems.tokenizers.siglip.System.
      params: parameters of the system.
      tokenizer: converts captions to token ids.
      fingerprint: fingerprint of the parameters, for the protocol of a report.
    """
    self.fingerprint = fingerprint
    self._config = system.config
    self._tokenizer = tokenizer
    self._params = jax.device_put(params)
    network, side = system.network, system.config.model.siglip.image_size

    def embed_images(params: Params, images: Array) -> Array:
      step = round(_STEP * images.shape[1])
      views = [pixels.translate(images, step * y, step * x) for y in _SHIFTS for x in _SHIFTS]
      resized = pixels.to_signed(pixels.view(jnp.concatenate(views), side))
      vectors = network.apply({'params': params}, resized, method='embed_images')
      return siglip.unit(jnp.mean(vectors.reshape(len(views), len(images), -1), 0))

    def embed_text(params: Params, ids: Array, length: Array) -> Array:
      return network.apply({'params': params}, ids, length, method='embed_text')

    self._embed_images = jax.jit(embed_images)
    self._embed_text = jax.jit(embed_text)

  @classmethod
  @functools.lru_cache(maxsize=1)  # Its programs are compiled once for all checkpoints of a run.
  def load(cls, source: str = 'assets:evaluator_network') -> EvaluatorNetwork:
    """Loads the shipped evaluator network, or another exported SigLIP.

    Raises:
      UserError: the file does not exist, or holds another system.
    """
    params, metadata = weights.load(source)
    system = systems.build(weights.config_of(metadata, source))
    if system.config.system != 'siglip':
      raise UserError(
        f"{source} holds a '{system.config.system}': the evaluator network must be a 'siglip'"
      )
    return cls(system, params, bpe.shipped(), weights.fingerprint(params))

  def images(self, images: np.ndarray) -> np.ndarray:
    """Unit vectors [N, D] of images [N, R, R, 3] uint8."""
    embed = lambda batch: self._embed_images(self._params, batch)
    return batches.in_batches(embed, images, _BATCH)

  def captions(self, captions: Sequence[str]) -> np.ndarray:
    """Unit vectors [N, D] of N captions.

    Raises:
      UserError: a caption exceeds the text length of the network.
    """
    length = self._config.data.text_length
    encoded = self._tokenizer.encode_batch(list(captions), length)
    embed = lambda batch: self._embed_text(self._params, *batch)
    return batches.in_batches(embed, encoded, _BATCH)
