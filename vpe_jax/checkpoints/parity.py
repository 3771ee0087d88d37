"""Does an import give the numbers that the reference library gives? Both run on random inputs.

The reference libraries (torch with transformers or diffusers) are no dependencies of this one: they
are asked for here, and only here.
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

TOLERANCE = 2e-5  # of the largest absolute reference value, in float32
DEEP = {'kl_vae': 1e-4, 'wan_vae': 1e-4}  # decoders of more than 40 convolutions
_ROWS, _TOKENS = 2, 8

_Pairs = dict[str, tuple[Any, Any]]  # what is compared -> (ours, the reference's)


def compare(imported: Imported, folder: Path) -> dict[str, float]:
  """Largest differences, relative to the largest absolute reference value.

  Args:
    imported: the network.
    folder: where it was published to, with its config.json.

  Raises:
    UserError: the reference library is not installed, or the family has none.
  """
  if imported.family not in _REFERENCES:
    known = ', '.join(sorted(_REFERENCES))
    raise UserError(
      f'{imported.family} has no reference library that can be installed; --check knows {known}'
    )
  package, pairs_of = _REFERENCES[imported.family]
  with jax.default_matmul_precision('highest'):
    pairs = pairs_of(_library('torch'), _library(package), folder, imported)
  return {name: _error(ours, theirs) for name, (ours, theirs) in pairs.items()}


def verdict(family: str, errors: dict[str, float]) -> tuple[bool, str]:
  """Whether all differences are within bounds, and a line that says so."""
  limit = DEEP.get(family, TOLERANCE)
  said = ', '.join(f'{name} {error:.1e}' for name, error in errors.items())
  good = all(error < limit for error in errors.values())
  return good, f'parity with the reference {"holds" if good else "FAILS"} (limit {limit}): {said}'


def _library(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise UserError(
      f"--check compares with the reference library, and '{name}' is not installed: "
      f'pip install {name}'
    ) from error


def _error(ours: Any, theirs: Any) -> float:
  ours, theirs = np.asarray(ours, np.float64), theirs.detach().double().numpy()
  if ours.shape != theirs.shape:
    raise UserError(f'our output is {ours.shape}, the reference {theirs.shape}')
  return float(np.max(np.abs(ours - theirs)) / max(np.max(np.abs(theirs)), 1e-30))


def _pictures(torch: Any, side: int) -> tuple[np.ndarray, Any]:
  """Noise as [B, H, W, 3] for us and [B, 3, H, W] for the reference."""
  images = np.random.default_rng(0).standard_normal((_ROWS, side, side, 3)).astype(np.float32)
  return images, torch.tensor(images).permute(0, 3, 1, 2)


def _language_model(torch: Any, transformers: Any, folder: Path, imported: Imported) -> _Pairs:
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  ids = np.random.default_rng(0).integers(0, imported.sizes.vocabulary, (_ROWS, _TOKENS))
  run = jax.jit(Decoder(imported.sizes))
  ours = run(imported.params, jnp.asarray(ids, jnp.int32), jnp.full(_ROWS, _TOKENS))
  return {'logits': (ours, model(torch.tensor(ids)).logits)}


def _towers(torch: Any, transformers: Any, folder: Path, imported: Imported) -> _Pairs:
  """SigLIP and CLIP: every picture against every caption."""
  sizes = imported.sizes
  model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
  images, pixels = _pictures(torch, sizes.image_size)
  ids = np.random.default_rng(0).integers(0, sizes.vocabulary, (_ROWS, sizes.text_length))
  if getattr(sizes, 'end', None) is not None:
    ids[:, -1] = sizes.end  # CLIP reads a caption where it ends.
  tokens = jnp.asarray(ids, jnp.int32)
  if imported.family == 'siglip':
    length = jnp.full(_ROWS, sizes.text_length)
    ours = jax.jit(Siglip(sizes).apply)({'params': imported.params}, images, tokens, length)
  else:
    ours = jax.jit(Clip(sizes).apply)({'params': imported.params}, images, tokens)
  theirs = model(pixel_values=pixels, input_ids=torch.tensor(ids)).logits_per_image
  return {'logits': (ours, theirs)}


def _dinov2(torch: Any, transformers: Any, folder: Path, imported: Imported) -> _Pairs:
  model = transformers.Dinov2Model.from_pretrained(folder, dtype=torch.float32).eval()
  images, pixels = _pictures(torch, 2 * model.config.patch_size)
  run = jax.jit(lambda p, x: Dinov2(imported.sizes).apply({'params': p}, x, method='features'))
  theirs = model(pixel_values=pixels).last_hidden_state
  return {'features': (run(imported.params, images), theirs)}


def _autoencoder(name: str) -> Callable[..., _Pairs]:
  """diffusers' autoencoders; Wan's takes pictures as films of one frame."""

  def pairs(torch: Any, diffusers: Any, folder: Path, imported: Imported) -> _Pairs:
    kind = getattr(diffusers, name)
    model = kind.from_pretrained(folder, torch_dtype=torch.float32).eval()
    network, film = KlVae(imported.sizes), name == 'AutoencoderKLWan'
    images, pixels = _pictures(torch, 4 * imported.sizes.body.factor)
    variables = {'params': imported.params}
    mean = jax.jit(lambda v, x: network.apply(v, x, method='posterior').mean)(variables, images)
    with torch.no_grad():
      wanted = model.encode(pixels[:, :, None] if film else pixels).latent_dist.mean
      drawn = model.decode(wanted).sample
    if film:
      wanted, drawn = wanted[:, :, 0], drawn[:, :, 0]
    latents, drawn = (tensor.permute(0, 2, 3, 1) for tensor in (wanted, drawn))
    ours = jax.jit(lambda v, z: network.apply(v, z, method='decode'))(variables, latents.numpy())
    # Wan's decoder clips, as pictures are between -1 and 1.
    ours = jnp.clip(ours, -1.0, 1.0) if film else ours
    return {'latents': (mean, latents), 'pictures': (ours, drawn)}

  return pairs


def _siglip_vq(torch: Any, transformers: Any, folder: Path, imported: Imported) -> _Pairs:
  """Of GLM-Image's copy; no library holds X-Omni's and LLaDA2.0-Uni's."""
  if 'GLM' not in imported.plan.table.name:
    raise UserError(
      f"--check of siglip_vq compares with transformers' GLM-Image, and '{folder}' is laid out as "
      f'{imported.plan.table.name}: import it without --check'
    )
  kind = transformers.GlmImageForConditionalGeneration
  model = kind.from_pretrained(folder, dtype=torch.float32).eval().model
  grid, patch = 4, imported.sizes.patch
  images, pixels = _pictures(torch, grid * patch)
  pixels = einops.rearrange(pixels, 'B C (h p) (w q) -> (B h w) (C p q)', p=patch, q=patch)
  network, variables = SiglipVq(imported.sizes), {'params': imported.params}
  features = jax.jit(lambda v, x: network.apply(v, x, method='features'))(variables, images)
  project = jax.jit(lambda v, x: network.apply(v, x, method='project'))
  with torch.no_grad():
    found = model.visual(pixels, grid_thw=torch.tensor([[1, grid, grid]] * _ROWS))
    wanted = found.last_hidden_state.reshape(features.shape)
    projected = model.vqmodel.quant_conv(wanted.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
  ours = project(variables, wanted.numpy())
  return {'features': (features, wanted), 'projected': (ours, projected)}


# Family -> the package that holds its reference, and what runs both.
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
