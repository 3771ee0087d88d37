"""The codec system: trains the tokenizers that convert images to codes and latents.

It has three independent stages. `feature_vq` trains the quantizer of codecs/feature_vq.py on the
features of a frozen SigLIP or another tower, `image` trains the autoencoder of codecs/kl.py, and
`image_codes` trains the codebook of codecs/image_codes.py on the latents of a frozen autoencoder. A
run has parameters only for the stages in its config.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vpe_jax import rng as randomness
from vpe_jax.codecs import feature_vq, image_codes, kl, pixels, towers
from vpe_jax.config import Config, SampleConfig, check_nonnegative, check_sizes, did_you_mean
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

MOMENTS_BATCH = 32  # images encoded at once to measure the moments of latents
STAGES = ('feature_vq', 'image', 'image_codes')
VIEW = 'tower_image'  # the image, resized to the input size of a published tower


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The `model` section.

  Attributes:
    siglip_weights: source of the weights of the frozen SigLIP.
    encoder_weights: source of the weights of a published tower (`feature_vq.encoder`) that replaces
      SigLIP: a folder, an import, or a hub id; empty: the default in codecs/towers.py.
    image_weights: source of the weights of the frozen autoencoder in stage `image_codes`.
    weights_dtype: dtype of the loaded weights of frozen networks: float32 or bfloat16.
    feature_vq: sizes of the quantizer of features.
    image: sizes of the autoencoder.
    image_codes: sizes of the quantizer of latents.
    pooled: weight of the error of the pooled vector; the error of patch features has weight 1.
    commitment: weight of the distance between projected features and codebook entries.
    usage: weight of the entropy loss that keeps all codes in use, in stage `feature_vq`.
    codes_usage: weight of the same loss in stage `image_codes`.
    squared: weight of the squared error of pixels; the absolute error has weight 1.
    divergence: weight of the KL divergence of the latents from a standard normal.
    crop: side of the random crops that the autoencoder trains on, in pixels.
  """

  siglip_weights: str = 'assets:siglip'
  encoder_weights: str = ''
  image_weights: str = 'assets:image'
  weights_dtype: str = 'float32'
  feature_vq: feature_vq.FeatureVqConfig = feature_vq.FeatureVqConfig()
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
    errors = ('pooled', 'commitment', 'usage', 'codes_usage', 'squared', 'divergence')
    check_nonnegative(self, 'model.', *errors)


Sampling = SampleConfig  # the system does not sample


class System(SystemProtocol):
  """Trains the quantizers and the autoencoder; see vpe_jax.contracts.System."""

  logical_axes = (
    (r'image/.*/kernel', ('kernel', 'kernel', 'conv_in', 'conv_out')),
    (r'image/.*/(bias|scale)', ('conv_out',)),
    (r'image/(shift|scale)', ('features',)),
    *ENCODER_AXES,
    (r'(feature_vq|image_codes)/codebook', ('codes', 'features')),
    (r'(hidden|expand)/kernel', ('features', 'embed')),
    (r'(project|features)/kernel', ('embed', 'features')),
    (r'(bias|scale)', ('embed',)),
  )

  def __init__(self, config: Config):
    """Builds the networks of the config's stages.

    Raises:
      UserError: a stage is unknown, or `model.crop` or `data.image_size` is invalid.
    """
    for name in config.stages:
      if name not in STAGES:
        raise UserError(f"the codec system has no stage '{name}'{did_you_mean(name, STAGES)}")
    crop, side = config.model.crop, config.data.image_size
    if 'image' in config.stages and (crop % kl.FACTOR or crop > side):
      raise UserError(
        f'model.crop {crop} must be a multiple of {kl.FACTOR} and at most data.image_size {side}'
      )
    for name, unit in {'image': 1, 'image_codes': config.model.image_codes.patch}.items():
      if name in config.stages:
        image_codes.check_side(side, kl.FACTOR * unit)
    self.config = config
    self.stages = tuple(self._stage(name) for name in config.stages)
    self.frozen = self._frozen_networks()
    self.feature_codec = feature_vq.FeatureVqCodec(config.model.feature_vq)
    self.latent_codec = kl.KlCodec(config.model.image)
    self.image_codec = image_codes.ImageCodesCodec(
      config.model.image_codes, config.model.image, config.data.image_size
    )

  def _frozen_networks(self) -> dict[str, FrozenNetwork]:
    """The encoders whose features or latents are quantized."""
    c, frozen = self.config.model, {}
    if 'feature_vq' in self.config.stages:
      tower = c.feature_vq
      weights = c.siglip_weights if tower.encoder == 'siglip' else c.encoder_weights
      frozen = {tower.encoder: towers.frozen(tower, weights, c.weights_dtype)}
    if 'image_codes' in self.config.stages:
      frozen['image'] = FrozenNetwork(c.image_weights, dtype=c.weights_dtype)
    return frozen

  def _stage(self, name: str) -> Stage:
    c = self.config.model
    losses = {
      'feature_vq': {
        'features': 1.0,
        'commitment': c.commitment,
        'usage': c.usage,
        'perplexity': 0.0,
      },
      'image': {'absolute': 1.0, 'squared': c.squared, 'divergence': c.divergence, 'psnr': 0.0},
      'image_codes': {'distance': 1.0, 'codes_usage': c.codes_usage, 'codes_perplexity': 0.0},
    }[name]
    if name == 'feature_vq' and c.feature_vq.has_text_tower:
      # The pooling head takes only the normalized last output, and the text towers of published
      # encoders use other token ids.
      losses |= {'pooled': c.pooled, 'retrieval': 0.0}
    trains = r'image/(encoder|decoder)/' if name == 'image' else f'{name}/'
    return Stage(name, (trains,), losses, ema=True)

  def init(self, rng: Array) -> Params:
    """Random initial parameters of the run's stages."""
    c, params = self.config.model, {}
    if 'feature_vq' in self.config.stages:
      tower = c.feature_vq
      features = jnp.zeros((1, tower.patches, tower.body.width))
      key = randomness.stream(rng, 'visual_prompt')  # the shipped weights were initialized with it
      params['feature_vq'] = self.feature_codec.quantizer.init(key, features)['params']
    if 'image' in self.config.stages:
      side = c.crop
      noise = jnp.zeros((1, side // kl.FACTOR, side // kl.FACTOR, c.image.channels))
      key = randomness.stream(rng, 'image')
      image = jnp.zeros((1, side, side, 3))
      params['image'] = self.latent_codec.network.init(key, image, noise)['params']
    if 'image_codes' in self.config.stages:
      params['image_codes'] = self.image_codec.init(randomness.stream(rng, 'image_codes'))
    return params

  def frozen_shapes(self) -> Params:
    """Parameters of the networks in `frozen` as shapes."""
    known = self.feature_codec.abstract_params() | self.latent_codec.abstract_params()
    return {name: known[name] for name in self.frozen}

  @functools.cached_property
  def preprocess(self) -> PromptAndImage:
    """Caption tokens and images."""
    tower, table = self.config.model.feature_vq, ()
    if 'feature_vq' in self.config.stages and tower.has_text_tower:
      table = ('model.feature_vq.siglip.vocabulary', tower.siglip.vocabulary)
    return prompt_and_image(self.config.data, *table, views=self._views)

  @property
  def _views(self) -> dict[str, int]:
    """Images that the pipeline resizes for a published tower: input name -> side in pixels."""
    side = self.feature_codec.view_side if 'feature_vq' in self.config.stages else 0
    return {VIEW: side} if side not in (0, self.config.data.image_size) else {}

  def batch_spec(self, batch_size: int) -> BatchSpec:
    """Images and captions; features and latents to quantize, which are computed online."""
    spec = captioned_images(self.config, batch_size)
    c, encoded = self.config.model, {}
    if 'feature_vq' in self.config.stages:
      shape = (batch_size, c.feature_vq.patches, c.feature_vq.body.width)
      encoded['features'] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if 'image_codes' in self.config.stages:
      shape = (batch_size, self.image_codec.grid**2, self.image_codec.width)
      encoded['latent_patches'] = jax.ShapeDtypeStruct(shape, jnp.float32)
    view = lambda side: jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.uint8)
    views = {name: view(side) for name, side in self._views.items()}
    return dataclasses.replace(spec, inputs={**spec.inputs, **views}, encoded=encoded)

  def encode(self, frozen: Params, inputs: Mapping[str, Array], keys: Array) -> dict[str, Array]:
    """`features` [B, P, D] of the tower; `latent_patches` [B, P, W], W numbers in each patch."""
    del keys
    encoded = {}
    if 'feature_vq' in self.config.stages:
      encoded['features'] = self._features(frozen, inputs)
    if 'image_codes' in self.config.stages:
      encoded['latent_patches'] = self.image_codec.latent_patches(frozen, inputs['image'])
    return encoded

  def _features(self, frozen: Params, inputs: Mapping[str, Array]) -> Array:
    """Patch features [B, P, D]; a published tower reads the view that the pipeline resized."""
    return self.feature_codec.features(frozen, inputs[VIEW if self._views else 'image'])

  def counts(self, batch: Batch, rng: Array, step: Array, stage: Stage) -> dict[str, Array]:
    """The batch size: every loss is a mean over images."""
    return {name: jnp.float32(batch.example.shape[0]) for name in stage.losses}

  def losses(
    self, params: Params, frozen: Params, batch: Batch, rng: Array, step: Array, stage: Stage
  ) -> dict[str, LossTerm]:
    """The loss terms in `stage.losses`, as sums over images."""
    losses = {
      'feature_vq': lambda: self._feature_losses(params, frozen, batch),
      'image': lambda: self._image_losses(params, batch, rng),
      'image_codes': lambda: self._codes_losses(params, frozen, batch),
    }
    sums = {}
    for own in self.stages:
      if not own.losses.keys().isdisjoint(stage.losses):
        sums |= losses[own.name]()
    count = batch.example.shape[0]
    weight = lambda loss: stage.weight(loss, step)
    return {loss: LossTerm(sums[loss], count, weight(loss)) for loss in stage.losses}

  def _feature_losses(self, params: Params, frozen: Params, batch: Batch) -> dict[str, Array]:
    """Errors of the features reconstructed from codes, and losses of the codebook.

    `usage` and `perplexity` are properties of a whole batch. They are multiplied by the batch size
    because every term is divided by it.
    """
    c, count = self.config.model.feature_vq, batch.example.shape[0]
    features = jax.lax.stop_gradient(self._features(frozen, batch.inputs))
    quantized, reconstruction = self.feature_codec.quantizer.apply(
      {'params': params['feature_vq']}, features
    )
    error = autoencoding.squared_error(reconstruction, features) / jnp.var(features)
    token_entropy, mean_entropy = autoencoding.code_entropies(quantized.probabilities)
    sums = {
      'features': jnp.sum(error),
      'commitment': jnp.sum(autoencoding.commitment(quantized.projected, quantized.entries)),
      'usage': count * (token_entropy - mean_entropy),
      'perplexity': count * autoencoding.perplexity(quantized.codes, c.codes),
    }
    if c.has_text_tower:
      sums |= self._pooled_losses(frozen, features, reconstruction, batch)
    return sums

  def _pooled_losses(
    self, frozen: Params, features: Array, reconstruction: Array, batch: Batch
  ) -> dict[str, Array]:
    """Cosine distance of pooled vectors of reconstructed and true features; caption retrieval."""
    variables = {'params': frozen['siglip']}
    network: siglip.Siglip = self.feature_codec.siglip
    pooled = network.apply(variables, reconstruction, method='pool')
    target = network.apply(variables, features, method='pool')
    caption = (batch.inputs['text'], batch.inputs['text_length'])
    text = self.feature_codec.embed_text(frozen, *caption)
    logits = network.apply(variables, pooled, text, method='logits')
    hits = alignment.retrieval_hits(logits, alignment.same_caption(batch.inputs['text']))
    distance = 1.0 - jnp.sum(pooled * target, -1)
    return {'pooled': jnp.sum(distance), 'retrieval': jnp.sum(hits)}

  def _image_losses(self, params: Params, batch: Batch, rng: Array) -> dict[str, Array]:
    """Errors of images decoded from sampled latents, and divergence from a standard normal."""
    c = self.config.model
    images = pixels.random_crops(pixels.to_unit(batch.inputs['image']), c.crop, rng, batch.example)
    side = images.shape[1] // kl.FACTOR
    shape = (side, side, c.image.channels)
    noise = randomness.per_example(
      lambda key: jax.random.normal(key, shape), rng, 'posterior', batch.example
    )
    reconstruction, mean, log_variance = self.latent_codec.network.apply(
      {'params': params['image']}, pixels.to_signed(images), noise
    )
    reconstruction = 0.5 * (reconstruction + 1.0)
    values = {
      'absolute': autoencoding.absolute_error(reconstruction, images),
      'squared': autoencoding.squared_error(reconstruction, images),
      'divergence': autoencoding.gaussian_divergence(mean, log_variance),
      'psnr': autoencoding.psnr(reconstruction, images),
    }
    return {name: jnp.sum(value) for name, value in values.items()}

  def _codes_losses(self, params: Params, frozen: Params, batch: Batch) -> dict[str, Array]:
    """K-means: the squared distance of normalized latent patches from the nearest entries.

    An entry that is nearest to no patch gets no gradient from the distance; `codes_usage` moves it
    towards the data.
    """
    codec, count = self.image_codec, batch.example.shape[0]
    patches = jax.lax.stop_gradient(codec.latent_patches(frozen, batch.inputs['image']))
    quantized = codec.quantize(params['image_codes']['codebook'], patches)
    token_entropy, mean_entropy = autoencoding.code_entropies(quantized.probabilities)
    return {
      'distance': jnp.sum(autoencoding.squared_error(quantized.entries, patches)),
      'codes_usage': count * (token_entropy - mean_entropy),
      'codes_perplexity': count * autoencoding.perplexity(quantized.codes, codec.codes),
    }

  def normalize_latents(self, image: Params, images: Array) -> Params:
    """Sets `shift` and `scale` of the autoencoder so that latents have mean 0 and variance 1.

    Args:
      image: parameters of the network `image`, rounded to the dtype in which they are exported.
      images: [B, R, R, 3], from which the moments are computed. Pixels at the bottom and the right
        that don't fill a latent are left out.
    """
    network, side = self.latent_codec.network, images.shape[1] // kl.FACTOR * kl.FACTOR

    def encode(params: Params, one: Array) -> Array:
      signed = pixels.to_signed(pixels.to_unit(one[None]))
      return network.apply({'params': params}, signed, method='moments')[0][0]

    # In batches: the activations of all images would not fit in memory.
    encode_all = jax.jit(
      lambda params, x: jax.lax.map(functools.partial(encode, params), x, batch_size=MOMENTS_BATCH)
    )
    mean = encode_all(image, images[:, :side, :side])
    shift, scale = jnp.mean(mean, (0, 1, 2)), jnp.std(mean, (0, 1, 2))
    return {**image, 'shift': shift, 'scale': scale}

  def tokens(self, stage: Stage) -> int:
    """Latents of one crop, latent patches of one image, or image patches, by stage."""
    if stage.name == 'image':
      return (self.config.model.crop // kl.FACTOR) ** 2
    if stage.name == 'image_codes':
      return self.image_codec.grid**2
    return self.config.model.feature_vq.patches


def build(config: Config) -> System:
  """The system of a config."""
  return System(config)
