"""Compares an imported network with its reference implementation on random inputs.

The reference libraries (torch with transformers or diffusers) are not dependencies of vpe_jax; only
this module imports them, and only when a comparison is requested.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax.checkpoints.families import Imported
from vpe_jax.codecs.kl_vae import KlVae
from vpe_jax.codecs.siglip_vq import SiglipVq
from vpe_jax.contracts import UserError
from vpe_jax.models.clip import Clip
from vpe_jax.models.decoder import Decoder
from vpe_jax.models.dinov2 import Dinov2
from vpe_jax.models.siglip import Siglip

TOLERANCE = 2e-5  # in float32, relative to the largest absolute reference value
DEEP_TOLERANCE = {'kl_vae': 1e-4, 'wan_vae': 1e-4}  # decoders with more than 40 convolutions
_BATCH, _TOKENS = 2, 8  # sizes of the random inputs

_Pairs = dict[str, tuple[Any, Any]]  # name of an output -> (ours, the reference's)


def compare(imported: Imported, folder: Path) -> dict[str, float]:
  """Computes the largest error of each output, relative to its largest absolute reference value.

  Args:
    imported: the network.
    folder: folder of the published weights and their config.json.

  Returns:
    Name of an output -> relative error.

  Raises:
    UserError: the reference library is not installed, or the family has none.
  """
  if imported.family not in _REFERENCES:
    known = ', '.join(sorted(_REFERENCES))
    raise UserError(
      f'--check is not available for {imported.family}: it has no reference library that can be '
      f'installed; families with one: {known}'
    )
  package, make_pairs = _REFERENCES[imported.family]
  torch = _library('torch')
  with jax.default_matmul_precision('highest'), torch.no_grad():
    pairs = make_pairs(torch, _library(package), folder, imported)
  return {name: _error(name, ours, theirs) for name, (ours, theirs) in pairs.items()}


def verdict(family: str, errors: dict[str, float]) -> tuple[bool, str]:
  """Returns whether all errors are within the tolerance, and a line that reports it."""
  limit = DEEP_TOLERANCE.get(family, TOLERANCE)
  listed = ', '.join(f'{name} {error:.1e}' for name, error in errors.items())
  passed = all(error < limit for error in errors.values())
  result = 'passes' if passed else 'FAILS'
  return passed, f'parity with the reference {result} (limit {limit}): {listed}'


def _library(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise UserError(
      f"--check compares with the reference library, and '{name}' is not installed: "
      f'pip install {name}'
    ) from error


def _error(name: str, ours: Any, theirs: Any) -> float:
  ours, theirs = np.asarray(ours, np.float64), theirs.double().numpy()
  if ours.shape != theirs.shape:
    raise UserError(
      f'{name} has shape {ours.shape}, but {theirs.shape} in the reference: name the folder of the '
      'imported weights and their config.json'
    )
  return float(np.max(np.abs(ours - theirs)) / max(np.max(np.abs(theirs)), 1e-30))


def _random_images(torch: Any, side: int) -> tuple[np.ndarray, Any]:
  """Gaussian images: [B, H, W, 3] for us and [B, 3, H, W] for the reference."""
  images = np.random.default_rng(0).standard_normal((_BATCH, side, side, 3)).astype(np.float32)
  return images, torch.tensor(images).permute(0, 3, 1, 2)


def _language_model(torch: Any, transformers: Any, folder: Path, imported: Imported) -> _Pairs:
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  ids = np.random.default_rng(0).integers(0, imported.sizes.vocabulary, (_BATCH, _TOKENS))
  run = jax.jit(Decoder(imported.sizes))
  ours = run(imported.params, jnp.asarray(ids, jnp.int32), jnp.full(_BATCH, _TOKENS))
  return {'logits': (ours, model(torch.tensor(ids)).logits)}


def _towers(torch: Any, transformers: Any, folder: Path, imported: Imported) -> _Pairs:
  """SigLIP and CLIP: logits of every image-caption pair."""
  sizes = imported.sizes
  model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
  images, pixels = _random_images(torch, sizes.image_size)
  ids = np.random.default_rng(0).integers(0, sizes.vocabulary, (_BATCH, sizes.text_length))
  if imported.family == 'clip' and sizes.end is not None:
    ids[:, -1] = sizes.end  # CLIP pools the text features at the end token.
  tokens = jnp.asarray(ids, jnp.int32)
  if imported.family == 'siglip':
    length = jnp.full(_BATCH, sizes.text_length)
    ours = jax.jit(Siglip(sizes).apply)({'params': imported.params}, images, tokens, length)
  else:
    ours = jax.jit(Clip(sizes).apply)({'params': imported.params}, images, tokens)
  theirs = model(pixel_values=pixels, input_ids=torch.tensor(ids)).logits_per_image
  return {'logits': (ours, theirs)}


def _dinov2(torch: Any, transformers: Any, folder: Path, imported: Imported) -> _Pairs:
  model = transformers.Dinov2Model.from_pretrained(folder, dtype=torch.float32).eval()
  images, pixels = _random_images(torch, 2 * model.config.patch_size)
  run = jax.jit(lambda p, x: Dinov2(imported.sizes).apply({'params': p}, x, method='features'))
  theirs = model(pixel_values=pixels).last_hidden_state
  return {'features': (run(imported.params, images), theirs)}


def _autoencoder(name: str) -> Callable[..., _Pairs]:
  """Latents and images of a diffusers class; Wan's takes images as videos of one frame."""

  def pairs(torch: Any, diffusers: Any, folder: Path, imported: Imported) -> _Pairs:
    model_class = getattr(diffusers, name)
    model = model_class.from_pretrained(folder, torch_dtype=torch.float32).eval()
    network, is_video = KlVae(imported.sizes), name == 'AutoencoderKLWan'
    images, pixels = _random_images(torch, 4 * imported.sizes.body.factor)
    variables = {'params': imported.params}
    mean = jax.jit(lambda v, x: network.apply(v, x, method='posterior').mean)(variables, images)
    latents = model.encode(pixels[:, :, None] if is_video else pixels).latent_dist.mean
    decoded = model.decode(latents).sample
    if is_video:
      latents, decoded = latents[:, :, 0], decoded[:, :, 0]
    latents, decoded = (tensor.permute(0, 2, 3, 1) for tensor in (latents, decoded))
    ours = jax.jit(lambda v, z: network.apply(v, z, method='decode'))(variables, latents.numpy())
    # Wan's decoder clips images to [-1, 1].
    ours = jnp.clip(ours, -1.0, 1.0) if is_video else ours
    return {'latents': (mean, latents), 'images': (ours, decoded)}

  return pairs


def _siglip_vq(torch: Any, transformers: Any, folder: Path, imported: Imported) -> _Pairs:
  """GLM-Image's copy of SigLIP-VQ; no library implements X-Omni's or LLaDA2.0-Uni's."""
  if 'GLM' not in imported.tensor_map.table.name:
    raise UserError(
      f"--check of siglip_vq compares with transformers' GLM-Image, but the layout of '{folder}' "
      f'is {imported.tensor_map.table.name}: import it without --check'
    )
  model_class = transformers.GlmImageForConditionalGeneration
  model = model_class.from_pretrained(folder, dtype=torch.float32).eval().model
  grid, patch = 4, imported.sizes.patch
  images, pixels = _random_images(torch, grid * patch)
  pixels = einops.rearrange(pixels, 'B C (h p) (w q) -> (B h w) (C p q)', p=patch, q=patch)
  network, variables = SiglipVq(imported.sizes), {'params': imported.params}
  features = jax.jit(lambda v, x: network.apply(v, x, method='features'))(variables, images)
  project = jax.jit(lambda v, x: network.apply(v, x, method='project'))
  outputs = model.visual(pixels, grid_thw=torch.tensor([[1, grid, grid]] * _BATCH))
  expected = outputs.last_hidden_state.reshape(features.shape)
  projected = model.vqmodel.quant_conv(expected.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
  ours = project(variables, expected.numpy())
  return {'features': (features, expected), 'projected': (ours, projected)}


# Family -> (package of its reference, function that runs both networks).
_REFERENCES: dict[str, tuple[str, Callable[..., _Pairs]]] = {
  'qwen2': ('transformers', _language_model),
  'llama': ('transformers', _language_model),
  'siglip': ('transformers', _towers),
  'clip': ('transformers', _towers),
  'dinov2': ('transformers', _dinov2),
  'siglip_vq': ('transformers', _siglip_vq),
  'kl_vae': ('diffusers', _autoencoder('AutoencoderKL')),
  'wan_vae': ('diffusers', _autoencoder('AutoencoderKLWan')),
}
