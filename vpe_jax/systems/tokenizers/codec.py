"""The codec system: trains the tokenizers that turn pictures into codes and latents.

Three stages that share nothing but the data. `visual_prompt` trains the quantiser of
codecs/visual_prompt.py on the features of a frozen SigLIP or another tower, `image` the autoencoder
of codecs/kl.py, and `image_codes` finds the codebook of codecs/image_codes.py for the latents of a
frozen autoencoder. A run holds the parameters of the stages that its config names.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vpe_jax import rng as randomness
from vpe_jax.codecs import image_codes, kl, pixels, towers, visual_prompt
from vpe_jax.config import Config, SampleConfig, check_sizes, nearest
from vpe_jax.contracts import (
  Array,
  Batch,
  BatchSpec,
  FrozenNetwork,
  LossTerm,
  Params,
  Stage,
  UserError,
)
from vpe_jax.contracts import System as SystemProtocol
from vpe_jax.data.preprocess import PromptAndImage, prompt_and_image
from vpe_jax.models import siglip
from vpe_jax.objectives import alignment, autoencoding
from vpe_jax.systems.tokenizers.siglip import ENCODER_AXES, captioned_images

STAGES = ('visual_prompt', 'image', 'image_codes')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The `model` section.

  Attributes:
    siglip_weights: where the frozen SigLIP comes from.
    encoder_weights: where a published tower comes from that takes its place
      (`visual_prompt.encoder`): a folder, an import, or a hub id; empty for its release.
    image_weights: where the frozen autoencoder comes from, for `image_codes`.
    weights_dtype: dtype of the loaded weights of frozen networks: float32 or bfloat16.
    visual_prompt: sizes of the quantiser.
    image: sizes of the autoencoder.
    image_codes: sizes of the quantiser of its latents.
    pooled: weight of the error in the picture's pooled vector, beside 1 for patch features.
    commitment: weight of the distance between features and codes.
    usage: weight of the entropies that keep all codes in use.
    codes_usage: the same, in stage `image_codes`.
    squared: weight of the squared error, beside 1 for the absolute one.
    divergence: weight of the latents' distance from a standard normal.
    crop: side of the squares, cut at random places, that the autoencoder trains on.
  """

  siglip_weights: str = 'assets:siglip'
  encoder_weights: str = ''
  image_weights: str = 'assets:image'
  weights_dtype: str = 'float32'
  visual_prompt: visual_prompt.VisualPromptConfig = visual_prompt.VisualPromptConfig()
  image: kl.KlConfig = kl.KlConfig()
  image_codes: image_codes.ImageCodesConfig = image_codes.ImageCodesConfig()
  pooled: float = 1.0
  commitment: float = 1.0
  usage: float = 0.3
  codes_usage: float = 0.03
  squared: float = 4.0
  divergence: float = 1e-3
  crop: int = 32

  def __post_init__(self) -> None:
    check_sizes(self, 'model.')


Sampling = SampleConfig  # no sampler, no settings


class System(SystemProtocol):
  """Trains `params` = {visual_prompt, image, image_codes}, as far as named.

  See vpe_jax.contracts.System.
  """

  logical_axes = (
    (r'image/.*/kernel', ('kernel', 'kernel', 'conv_in', 'conv_out')),
    (r'image/.*/(bias|scale)', ('conv_out',)),
    (r'image/(shift|scale)', ('features',)),
    *ENCODER_AXES,
    (r'(visual_prompt|image_codes)/codebook', ('codes', 'features')),
    (r'(hidden|expand)/kernel', ('features', 'embed')),
    (r'(project|features)/kernel', ('embed', 'features')),
    (r'(bias|scale)', ('embed',)),
  )

  def __init__(self, config: Config):
    """Builds the networks of the config's stages.

    Raises:
      UserError: an unknown stage, or crops that don't fit.
    """
    for name in config.stages:
      if name not in STAGES:
        raise UserError(f"the codec system has no stage '{name}'{nearest(name, STAGES)}")
    if config.model.crop % kl.FACTOR or config.model.crop > config.data.image_size:
      raise UserError(
        f'model.crop {config.model.crop} must be a multiple of {kl.FACTOR} and at most '
        f'data.image_size {config.data.image_size}'
      )
    self.config = config
    self.stages = tuple(self._stage(name) for name in config.stages)
    self.frozen = self._frozen_networks()
    self.tokens_codec = visual_prompt.VisualPromptCodec(config.model.visual_prompt)
    self.latents_codec = kl.KlCodec(config.model.image)
    self.picture_codec = image_codes.ImageCodesCodec(
      config.model.image_codes, config.model.image, config.data.image_size
    )

  def _frozen_networks(self) -> dict[str, FrozenNetwork]:
    """The tower whose features are quantised, and the autoencoder whose latents are."""
    c, frozen = self.config.model, {}
    if 'visual_prompt' in self.config.stages:
      tower = c.visual_prompt
      weights = c.siglip_weights if tower.encoder == 'siglip' else c.encoder_weights
      frozen = {tower.encoder: towers.frozen(tower, weights, c.weights_dtype)}
    if 'image_codes' in self.config.stages:
      frozen['image'] = FrozenNetwork(c.image_weights, dtype=c.weights_dtype)
    return frozen

  def _stage(self, name: str) -> Stage:
    c = self.config.model
    losses = {
      'visual_prompt': {
        'features': 1.0,
        'commitment': c.commitment,
        'usage': c.usage,
        'perplexity': 0.0,
      },
      'image': {'absolute': 1.0, 'squared': c.squared, 'divergence': c.divergence, 'psnr': 0.0},
      'image_codes': {'distance': 1.0, 'codes_usage': c.codes_usage, 'codes_perplexity': 0.0},
    }[name]
    if name == 'visual_prompt' and c.visual_prompt.compares:
      # The pooling head reads the normed last output only, and a published tower other words.
      losses |= {'pooled': c.pooled, 'retrieval': 0.0}
    trains = r'image/(encoder|decoder)/' if name == 'image' else f'{name}/'
    return Stage(name, (trains,), losses, ema=True)

  def init(self, rng: Array) -> Params:
    """Fresh networks of the stages of this run."""
    c, params = self.config.model, {}
    if 'visual_prompt' in self.config.stages:
      tower = c.visual_prompt
      features = jnp.zeros((1, tower.patches, tower.body.width))
      key = randomness.stream(rng, 'visual_prompt')
      params['visual_prompt'] = self.tokens_codec.quantiser.init(key, features)['params']
    if 'image' in self.config.stages:
      side = c.crop
      noise = jnp.zeros((1, side // kl.FACTOR, side // kl.FACTOR, c.image.channels))
      key = randomness.stream(rng, 'image')
      image = jnp.zeros((1, side, side, 3))
      params['image'] = self.latents_codec.network.init(key, image, noise)['params']
    if 'image_codes' in self.config.stages:
      params['image_codes'] = self.picture_codec.init(randomness.stream(rng, 'image_codes'))
    return params

  @functools.cached_property
  def preprocess(self) -> PromptAndImage:
    """Caption tokens and images."""
    return prompt_and_image(self.config.data)

  def batch_spec(self, batch_size: int) -> BatchSpec:
    """Images, captions, and the features that quantisers train on, which are computed online."""
    spec = captioned_images(self.config, batch_size)
    c, encoded = self.config.model, {}
    if 'visual_prompt' in self.config.stages:
      shape = (batch_size, c.visual_prompt.patches, c.visual_prompt.body.width)
      encoded['features'] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if 'image_codes' in self.config.stages:
      shape = (batch_size, self.picture_codec.grid**2, self.picture_codec.width)
      encoded['squares'] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return dataclasses.replace(spec, encoded=encoded)

  def encode(self, frozen: Params, inputs: Mapping[str, Array], rng: Array) -> dict[str, Array]:
    """`features` [B, P, D] of the frozen tower; `squares` [B, P, W] of latents."""
    del rng
    encoded = {}
    if 'visual_prompt' in self.config.stages:
      encoded['features'] = self.tokens_codec.features(frozen, inputs['image'])
    if 'image_codes' in self.config.stages:
      encoded['squares'] = self.picture_codec.squares(frozen, inputs['image'])
    return encoded

  def counts(self, batch: Batch, rng: Array, step: Array, stage: Stage) -> dict[str, Array]:
    """One a picture; every loss is a mean over pictures."""
    return {name: jnp.float32(batch.example.shape[0]) for name in stage.losses}

  def losses(
    self, params: Params, frozen: Params, batch: Batch, rng: Array, step: Array, stage: Stage
  ) -> dict[str, LossTerm]:
    """The loss terms that `stage.losses` names, as sums over pictures."""
    parts = {
      'visual_prompt': lambda: self._prompt_losses(params, frozen, batch),
      'image': lambda: self._image_losses(params, batch, rng),
      'image_codes': lambda: self._codes_losses(params, frozen, batch),
    }
    sums = {}
    for own in self.stages:
      if not own.losses.keys().isdisjoint(stage.losses):
        sums |= parts[own.name]()
    pictures = batch.example.shape[0]
    weight = lambda loss: stage.weight(loss, step)
    return {loss: LossTerm(sums[loss], pictures, weight(loss)) for loss in stage.losses}

  def _prompt_losses(self, params: Params, frozen: Params, batch: Batch) -> dict[str, Array]:
    """Features and pooled vector rebuilt from codes, and the codebook's own terms.

    `usage` and `perplexity` are figures of a whole batch, counted once a picture so that they
    divide like the others.
    """
    c, pictures = self.config.model.visual_prompt, batch.example.shape[0]
    features = self.tokens_codec.features(frozen, batch.inputs['image'])
    features = jax.lax.stop_gradient(features)
    quantised, rebuilt = self.tokens_codec.quantiser.apply(
      {'params': params['visual_prompt']}, features
    )
    error = autoencoding.squared_error(rebuilt, features) / jnp.var(features)
    sure, spread = autoencoding.code_entropies(quantised.probabilities)
    used = autoencoding.perplexity(quantised.codes, c.codes)
    sums = {
      'features': jnp.sum(error),
      'commitment': jnp.sum(autoencoding.commitment(quantised.inputs, quantised.chosen)),
      'usage': pictures * (sure - spread),
      'perplexity': pictures * used,
    }
    if c.compares:
      sums |= self._pooled_losses(frozen, features, rebuilt, batch)
    return sums

  def _pooled_losses(
    self, frozen: Params, features: Array, rebuilt: Array, batch: Batch
  ) -> dict[str, Array]:
    """Pooled vectors of the rebuilt features, and the captions that they retrieve."""
    variables = {'params': frozen['siglip']}
    network: siglip.Siglip = self.tokens_codec.siglip
    seen = network.apply(variables, rebuilt, method='pool')
    meant = network.apply(variables, features, method='pool')
    caption = (batch.inputs['text'], batch.inputs['text_length'])
    text = network.apply(variables, *caption, method='embed_text')
    logits = network.apply(variables, seen, text, method='logits')
    hits = alignment.retrieval_hits(logits, alignment.same_caption(batch.inputs['text']))
    distance = 1.0 - jnp.sum(seen * meant, -1)
    return {'pooled': jnp.sum(distance), 'retrieval': jnp.sum(hits)}

  def _image_losses(self, params: Params, batch: Batch, rng: Array) -> dict[str, Array]:
    """Reconstruction from sampled latents, and their distance from a standard normal."""
    c = self.config.model
    images = pixels.random_crops(pixels.to_unit(batch.inputs['image']), c.crop, rng, batch.example)
    side = images.shape[1] // kl.FACTOR
    shape = (side, side, c.image.channels)
    noise = randomness.per_example(
      lambda key: jax.random.normal(key, shape), rng, 'posterior', batch.example
    )
    rebuilt, mean, log_variance = self.latents_codec.network.apply(
      {'params': params['image']}, pixels.to_signed(images), noise
    )
    rebuilt = 0.5 * (rebuilt + 1.0)
    values = {
      'absolute': autoencoding.absolute_error(rebuilt, images),
      'squared': autoencoding.squared_error(rebuilt, images),
      'divergence': autoencoding.gaussian_divergence(mean, log_variance),
      'psnr': autoencoding.psnr(rebuilt, images),
    }
    return {name: jnp.sum(value) for name, value in values.items()}

  def _codes_losses(self, params: Params, frozen: Params, batch: Batch) -> dict[str, Array]:
    """K-means: the distance of latents, whose variance is 1, from the nearest rows.

    A row that is nearest to nothing has no gradient of it; `codes_usage` draws it to the data.
    """
    codec, pictures = self.picture_codec, batch.example.shape[0]
    squares = jax.lax.stop_gradient(codec.squares(frozen, batch.inputs['image']))
    quantised = codec.quantise(params['image_codes']['codebook'], squares)
    sure, spread = autoencoding.code_entropies(quantised.probabilities)
    used = autoencoding.perplexity(quantised.codes, codec.codes)
    return {
      'distance': jnp.sum(autoencoding.squared_error(quantised.chosen, squares)),
      'codes_usage': pictures * (sure - spread),
      'codes_perplexity': pictures * used,
    }

  def normalised(self, image: Params, images: Array) -> Params:
    """The autoencoder with `shift` and `scale` set so that latents have mean 0 and variance 1.

    Args:
      image: the network `image`, rounded to the dtype in which it will be shipped.
      images: pictures [B, R, R, 3] to measure on.
    """
    signed = pixels.to_signed(pixels.to_unit(images))
    network = self.latents_codec.network
    mean, _ = jax.jit(lambda p, x: network.apply(p, x, method='moments'))({'params': image}, signed)
    shift, scale = jnp.mean(mean, (0, 1, 2)), jnp.std(mean, (0, 1, 2))
    return {**image, 'shift': shift, 'scale': scale}

  def flops(self, stage: Stage) -> float:
    """Forward and backward of what trains, forward of what is frozen."""
    c, size = self.config.model, self.config.data.image_size
    if stage.name == 'image_codes':
      return kl.encode_flops(c.image, size) + 3.0 * image_codes.flops(c.image_codes, c.image, size)
    if stage.name == 'image':
      side = c.crop
      return 3.0 * (kl.encode_flops(c.image, side) + kl.decode_flops(c.image, side))
    return towers.flops(c.visual_prompt) + 3.0 * visual_prompt.flops(c.visual_prompt)

  def tokens(self, stage: Stage) -> int:
    """Latents, squares of them, or patches, of one picture."""
    if stage.name == 'image':
      return (self.config.model.crop // kl.FACTOR) ** 2
    if stage.name == 'image_codes':
      return self.picture_codec.grid**2
    return self.config.model.visual_prompt.patches
