"""Draws pictures from prompts with the weights of a run: the Python side of vpe_jax.sample."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from PIL import Image

from vpe_jax import __version__, rng, systems
from vpe_jax.checkpoints import weights as weights_io
from vpe_jax.config import SampleConfig, nearest
from vpe_jax.contracts import Drawing, Examples, Params, UserError
from vpe_jax.data import text
from vpe_jax.data.published_text import open_tokenizer
from vpe_jax.sampling import pictures
from vpe_jax.training import frozen as frozen_lib

_COLUMNS = 8  # pictures in a row of a sheet


@dataclasses.dataclass(frozen=True)
class Picture:
  """One drawn picture and how it came to be.

  Attributes:
    image: uint8 [R, R, 3].
    prompt: the caption it was drawn from.
    index: its place among the `n` pictures of its prompt.
    seed: the seed of the call.
    codes: int32 [P], the visual prompt it was rendered from.
    metadata: text chunks for a PNG: prompt, seed, index, settings, checkpoint, weights, version,
      generated.
  """

  image: np.ndarray
  prompt: str
  index: int
  seed: int
  codes: np.ndarray
  metadata: Mapping[str, str]

  def save(self, path: str, overwrite: bool = False) -> None:
    """Writes a PNG with the metadata in its text chunks."""
    pictures.save_png(self.image, path, self.metadata, overwrite)


class Generator:
  """A loaded model: `Generator.load('runs/t2i-tiny')('a red fox', n=4, seed=0)`.

  Pictures are always drawn in batches of `rows` (short ones are filled up, long ones cut), and a
  row's randomness is a function of seed, prompt and place among the prompt's `n` pictures. So a
  picture is the same alone, among others, and in another order.
  """

  def __init__(
    self,
    system: Any,
    params: Params,
    frozen: Params,
    tokenizer: text.Tokens,
    metadata: Mapping[str, str],
    rows: int = 4,
  ):
    """Wraps networks that are in memory already; most callers want `load`.

    Args:
      system: a vpe_jax.contracts.System that draws.
      params: its parameters, as checkpoints hold them.
      frozen: its frozen networks.
      tokenizer: turns prompts into ids.
      metadata: what pictures should say about the weights (keys `checkpoint` and `weights`).
      rows: pictures per batch. At least 4: matrix products of fewer rows round differently.
    """
    if rows < 4:
      raise UserError(f'rows is {rows}: a batch needs at least 4 rows to be reproducible')
    self.system = system
    self.rows = rows
    self.metadata = dict(metadata)
    self._tokenizer = tokenizer
    prepare = getattr(system, 'prepare', None)
    self._params = jax.device_put(prepare(params) if prepare else params)
    self._frozen = jax.device_put(frozen)
    self._draw = jax.jit(system.generate, static_argnums=4)

  @classmethod
  def load(cls, workdir: str, weights: str = 'ema', rows: int = 4) -> Generator:
    """Loads the newest checkpoint of a run, or shipped weights.

    Warns where the run has not come to its last stage: what that one trains is still random.

    Args:
      workdir: the folder of a run (local or gs://), `assets:tiny`, or a file of weights.
      weights: `ema` for the averaged parameters (raw ones where a run has no average yet), `raw`
        for those of the last step.
      rows: pictures per batch, at least 4.

    Raises:
      UserError: there is no such run, checkpoint or asset, its system doesn't draw, or its
        weights are damaged or not those of its config.
    """
    if weights not in ('ema', 'raw'):
      raise UserError(f"weights is '{weights}': choose 'ema' (averaged) or 'raw' (last step)")
    if workdir.startswith('assets:') or workdir.endswith('.safetensors'):
      params, stored = weights_io.load(workdir)
    else:
      params, stored = weights_io.load_run(workdir, weights)
    if 'config' not in stored:
      raise UserError(f'{workdir} holds weights without a config: name a run that trained them')
    held = stored.get('weights', 'ema')
    if weights == 'raw' and held != 'raw':
      raise UserError(f"{workdir} holds averaged weights only: use weights 'ema'")
    system = systems.build(_config(stored['config'], workdir))
    if not hasattr(system, 'generate'):
      raise UserError(f"{workdir} holds a '{system.config.system}', which doesn't draw pictures")
    if not set(system.draws_with) <= set(system.frozen_weights):
      raise UserError(f'{workdir} was trained on synthetic latents: nothing makes them pictures')
    stage = _stage(system, stored.get('stage', '-1'), workdir)
    if stage != system.stages[-1].name:
      logging.warning(
        "%s stopped in stage '%s' and its pictures are noise before '%s' has trained: the command "
        'that started it goes on',
        workdir,
        stage,
        system.stages[-1].name,
      )
    frozen = frozen_lib.for_drawing(system)
    frozen_lib.check_drawing(system, params, frozen)
    said = {'checkpoint': weights_io.fingerprint(params), 'weights': f'{workdir} ({held})'}
    return cls(system, params, frozen, open_tokenizer(system.config.data.tokenizer), said, rows)

  def settings(self, **overrides: Any) -> SampleConfig:
    """The run's own sampling settings, with some fields replaced; None keeps the run's own.

    Raises:
      UserError: a name that isn't a field of SampleConfig.
    """
    known = [field.name for field in dataclasses.fields(SampleConfig)]
    for name in overrides:
      if name not in known:
        raise UserError(f"unknown sampling setting '{name}'{nearest(name, known)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    return dataclasses.replace(self.system.config.sample, **given)

  def __call__(
    self,
    prompts: str | Sequence[str],
    n: int = 1,
    seed: int = 0,
    settings: SampleConfig | None = None,
    codes: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
  ) -> list[Picture]:
    """Draws `n` pictures for each prompt, prompt by prompt.

    Args:
      prompts: a caption or several.
      n: pictures per prompt.
      seed: changes every picture.
      settings: from `self.settings(...)`; None takes the run's own.
      codes: visual prompts to render instead of the model's own, int32 [P] for all pictures or
        [len(prompts) * n, P].
      progress: called with (pictures done, pictures in all) after each batch.

    Raises:
      UserError: no prompt, one that is blank, too long or no text, a setting out of range, or a
        picture that isn't finite.
    """
    prompts = text.tidied([prompts] if isinstance(prompts, str) else prompts)
    if not prompts or n < 1:
      raise UserError(f'nothing to draw: {len(prompts)} prompts with n={n} pictures each')
    settings = self.settings() if settings is None else settings
    plan = [(prompt, index) for prompt in prompts for index in range(n)]
    request = self._request(prompts, plan)
    if codes is not None:
      request = dataclasses.replace(request, codes=self._rows_of(codes, request, settings))
    drawn: list[Drawing] = []
    for start in range(0, len(plan), self.rows):
      # Short batches are filled with their first row, so that one compiled program serves all.
      rows = np.arange(start, start + self.rows)
      rows[rows >= len(plan)] = start
      batch = jax.tree.map(lambda leaf, rows=rows: jnp.asarray(leaf[rows]), request)
      drawing = self._draw(self._params, self._frozen, batch, rng.run_key(seed), settings)
      drawn.append(jax.device_get(drawing))
      if progress:
        progress(min(start + self.rows, len(plan)), len(plan))
    images = pictures.to_uint8(np.concatenate([d.image for d in drawn]))
    visual = np.concatenate([d.codes for d in drawn])
    said = self.describe(settings) | {'seed': str(seed)}
    return [
      Picture(image, *item, seed, code, said | {'prompt': item[0], 'index': str(item[1])})
      for image, code, item in zip(images, visual, plan)
    ]

  def _request(self, prompts: list[str], plan: list[tuple[str, int]]) -> Examples:
    """One row for each picture, as numpy leaves."""
    ids, lengths = self._tokenizer.encode_batch(prompts, self.system.config.data.text_length)
    copies = len(plan) // len(prompts)
    return Examples(
      example=np.asarray([_identity(*item) for item in plan], np.int32),
      text=np.repeat(ids, copies, axis=0),
      text_length=np.repeat(lengths, copies, axis=0),
    )

  def _rows_of(self, codes: np.ndarray, request: Examples, settings: SampleConfig) -> np.ndarray:
    """The given visual prompts, one for each row of the request."""
    codes, count = np.asarray(codes, np.int32), len(request.example)
    draw = lambda *arrays: self.system.generate(*arrays, settings)
    drawing = jax.eval_shape(draw, self._params, self._frozen, request, rng.run_key(0))
    wanted = (count, drawing.codes.shape[1])
    if codes.shape not in (wanted, wanted[1:]):
      raise UserError(f'codes have shape {codes.shape}: {wanted} or {wanted[1:]} is needed')
    least, most, last = codes.min(), codes.max(), self.system.codes - 1
    if least < 0 or most > last:
      raise UserError(f'codes go from {least} to {most}: the codebook has 0 to {last}')
    return np.broadcast_to(codes, wanted)

  def describe(self, settings: SampleConfig) -> dict[str, str]:
    """What pictures drawn with `settings` say about the weights, the settings and the version."""
    return self.metadata | {
      'settings': json.dumps(dataclasses.asdict(settings)),
      'version': f'vpe_jax {__version__}',
      'generated': 'true',
    }


def _config(said: str, workdir: str) -> dict[str, Any]:
  """The config in the metadata of weights."""
  try:
    found = json.loads(said)
  except (ValueError, RecursionError):
    found = None
  if not isinstance(found, dict):
    raise UserError(f'the config in {workdir} is damaged: get the weights again')
  return found


def _stage(system: Any, said: str, workdir: str) -> str:
  """The name of the stage that weights come from."""
  names = {str(index): stage.name for index, stage in enumerate(system.stages)}
  names['-1'] = system.stages[-1].name
  if said not in names:
    raise UserError(
      f"{workdir} is of stage '{said}', and its config has {len(system.stages)} stages: it is "
      'damaged, get the weights again'
    )
  return names[said]


def sheet(drawn: Sequence[Picture]) -> tuple[Image.Image, dict[str, str]]:
  """One picture of all, and its text chunks.

  It has a row for each prompt, or captioned columns where each prompt has one picture. A chunk in
  which the pictures differ lists their values, a line each.
  """
  said = {
    key: '\n'.join(dict.fromkeys(picture.metadata[key] for picture in drawn))
    for key in drawn[0].metadata
  }
  prompts = list(dict.fromkeys(picture.prompt for picture in drawn))
  if len(prompts) == len(drawn):
    cut = [drawn[start : start + _COLUMNS] for start in range(0, len(drawn), _COLUMNS)]
    rows = [[picture.image for picture in row] for row in cut]
    return pictures.grid(rows, [[picture.prompt for picture in row] for row in cut]), said
  rows, labels = [], []
  for prompt in prompts:
    images = [picture.image for picture in drawn if picture.prompt == prompt]
    starts = range(0, len(images), _COLUMNS)
    rows += [images[start : start + _COLUMNS] for start in starts]
    labels += [prompt] + [''] * (len(starts) - 1)
  return pictures.grid(rows, row_labels=labels), said


def _identity(prompt: str, index: int) -> int:
  """What keys a picture's randomness besides the seed: an int32 of its prompt and place."""
  return zlib.crc32(f'{prompt}\0{index}'.encode()) & 0x7FFFFFFF
