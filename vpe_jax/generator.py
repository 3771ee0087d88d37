"""Draws pictures from prompts with the weights of a run: the Python side of vpe_jax.sample.

A picture is drawn in two programs: one writes its visual prompt, the other renders it. A plan that
was kept is rendered by that same second program, so it gives the same picture again.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import itertools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from vpe_jax import __version__, before, rng, sharding, systems
from vpe_jax.checkpoints import frozen as frozen_lib
from vpe_jax.checkpoints import weights as weights_io
from vpe_jax.config import SampleConfig, nearest
from vpe_jax.contracts import (
  Array,
  Batch,
  Params,
  PlansVisually,
  Samples,
  UserError,
  require,
  supports,
)
from vpe_jax.data.tokenizers import bpe
from vpe_jax.data.tokenizers.published import open_tokenizer
from vpe_jax.data.transforms import to_square
from vpe_jax.sampling import batches, pictures
from vpe_jax.sampling.batches import Progress
from vpe_jax.sampling.pictures import Picture
from vpe_jax.sampling.plans import RANKERS, Codebook, Plans, best
from vpe_jax.training.state import trains

_OWN = ('prompt', 'index', 'rank', 'score')  # what a picture says of itself alone


class Generator:
  """A loaded model: `Generator.load('runs/t2i-tiny')('a red fox', n=4, seed=0)`.

  `plan` and `render` are its two halves, `read` takes a plan from a picture, `score` and `best_of`
  choose among many: see vpe_jax.sampling.plans for what a user keeps.

  Pictures are always drawn in batches of `rows` (short ones are filled up, long ones cut), and a
  row's randomness is a function of seed, prompt and place among the prompt's `n` pictures. So a
  picture is the same alone, among others, and in another order.

  Attributes:
    system: what draws.
    rows: pictures per batch.
    metadata: what pictures say about the weights.
    has_plans: whether visual prompts are written apart from the picture, and so can be kept.
  """

  def __init__(
    self,
    system: Any,
    params: Params,
    frozen: Params,
    tokenizer: bpe.Tokens,
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
    self._before: before.Before | None = None
    self._params = jax.device_put(system.prepare(params, jax.default_backend()))
    self._frozen = jax.device_put(frozen)
    self._draw = jax.jit(system.generate, static_argnums=4)
    self.has_plans = supports(system, PlansVisually)
    if self.has_plans:
      self._plan = jax.jit(system.plan, static_argnums=3)
      self._likelihood = jax.jit(system.plan_likelihood)
      self._similarity = jax.jit(system.plan_similarity)
      self._encode = jax.jit(system.visual_prompt.encode)

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
    if weights_io.is_file(workdir):
      params, stored = weights_io.load(workdir)
    else:
      params, stored = weights_io.load_run(workdir, weights)
    config = weights_io.config_of(stored, workdir)
    held = stored.get('weights', 'ema')
    if weights == 'raw' and held != 'raw':
      raise UserError(f"{workdir} holds averaged weights only: use weights 'ema'")
    system = systems.build(config)
    require(system, Samples)
    if not set(system.samples_with) <= set(system.frozen):
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
    elif not system.stages[-1].samples and (untrained := _untrained(system, params)):
      logging.warning(
        "%s has no stage after '%s', and nothing has trained its %s: its pictures are noise. "
        'Another run, with a stage that does, can start from it (config.start)',
        workdir,
        stage,
        ', '.join(untrained),
      )
    frozen = frozen_lib.for_sampling(system)
    frozen_lib.check_sampling(system, params, frozen)
    said = {'checkpoint': weights_io.fingerprint(params), 'weights': f'{workdir} ({held})'}
    return cls(system, params, frozen, open_tokenizer(system.config.data.tokenizer), said, rows)

  def editing(self, images: np.ndarray) -> Generator:
    """A generator whose prompts say what to do with pictures.

    Args:
      images: uint8 [H, W, 3] for all that is drawn, or [N, H, W, 3], one for each picture of a call
        that draws N; made squares as in training.

    Raises:
      UserError: the model doesn't edit, or these are no pictures.
    """
    squares = before.squares(self.system, images)
    encode = jax.jit(self.system.encode_source)
    encoded = self._batched(lambda batch: encode(self._frozen, batch), squares)
    other = copy.copy(self)
    other._before = before.Before(encoded, weights_io.fingerprint(encoded))
    other.metadata = self.metadata | {'before': other._before.name}
    return other

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
    progress: Progress | None = None,
  ) -> list[Picture]:
    """Draws `n` pictures for each prompt, prompt by prompt.

    Args:
      prompts: a caption or several; one that comes again goes on with its next `n` pictures.
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
    items = _items(prompts, n)
    request = self._request(items)
    settings = self.settings() if settings is None else settings
    if codes is not None:
      request = _with_visual_prompt(request, self._rows_of(codes, request))
    return self._pictures(request, items, seed, settings, progress)

  def plan(
    self,
    prompts: str | Sequence[str],
    n: int = 1,
    seed: int = 0,
    settings: SampleConfig | None = None,
  ) -> Plans:
    """Writes `n` visual prompts for each prompt: those of the pictures that a call would draw.

    Raises:
      UserError: the model has no visual prompts; or see `__call__`.
    """
    self._require_plans()
    items, key = _items(prompts, n), rng.run_key(seed)
    settings = self.settings() if settings is None else settings
    write = lambda batch: self._plan(self._params, batch, key, settings)
    codes = self._batched(write, self._request(items))
    made = self.describe(settings) | {'by': 'drawn', 'seed': str(seed)}
    return self._plans(codes, items, made)

  def read(self, images: Sequence[np.ndarray], prompts: str | Sequence[str] = '') -> Plans:
    """Takes visual prompts from pictures, as the frozen encoder sees them in training.

    Args:
      images: uint8 [H, W, 3] each, of any shape: made squares as in training.
      prompts: what they show, one for all or one for each; a plan without is rendered once it is
        `told` one.

    Raises:
      UserError: the model has no visual prompts, or was trained on synthetic ones.
    """
    self._require_plans()
    data = self.system.config.data
    squares = np.stack([to_square(image, data.image_size, data.fit) for image in images])
    networks = {**self._frozen, **self._reading}
    codes = self._batched(lambda batch: self._encode(networks, batch), squares)
    made = self.metadata | {'by': 'read from a picture'}
    items = [('', index) for index in range(len(codes))]
    return self._plans(codes, items, made).told([prompts] if isinstance(prompts, str) else prompts)

  def render(
    self,
    plans: Plans,
    seed: int = 0,
    settings: SampleConfig | None = None,
    progress: Progress | None = None,
  ) -> list[Picture]:
    """Draws a picture of each plan, from the noise of its prompt and place.

    Raises:
      UserError: they are plans of another codebook or grid, or lack a prompt; or see `__call__`.
    """
    items, request = self._given(plans)
    settings = self.settings() if settings is None else settings
    drawn = self._pictures(request, items, seed, settings, progress)
    return [picture.saying(visual_prompt=plans.made.get('by', 'given')) for picture in drawn]

  def score(self, plans: Plans, by: str = 'likelihood') -> np.ndarray:
    """How good each plan is for its prompt: float32 [n], higher is better.

    Args:
      plans: with prompts, drawn here or not.
      by: `likelihood`, the mean log-probability of the codes given the prompt, at temperature 1 and
        without filters or guidance, in nats; or `similarity`, the cosine between SigLIP's text
        vector of the prompt and what its pooling head sees in the features that the codes stand
        for.

    Raises:
      UserError: another ranker, or one that this model hasn't; see `render`.
    """
    self.check_ranker(by)
    _, request = self._given(plans)
    if by == 'likelihood':
      return self._batched(lambda batch: self._likelihood(self._params, batch), request)
    return self._batched(lambda batch: self._similarity(self._reading, batch), request)

  def best_of(
    self,
    prompts: str | Sequence[str],
    plans: int = 16,
    render: int = 1,
    rank: str = 'likelihood',
    seed: int = 0,
    settings: SampleConfig | None = None,
    progress: Progress | None = None,
  ) -> list[Picture]:
    """Writes `plans` visual prompts for each prompt and draws the best `render` of them, in order.

    A picture is the one that `n=plans` would draw at the same place: its `index`.

    Raises:
      UserError: more are to be drawn than there are; plans that are all alike; see `plan`, `score`.
    """
    settings = self.settings() if settings is None else settings
    if not 1 <= render <= plans:
      raise UserError(
        f'cannot render the best {render} of {plans} plans: 1 to {plans} are possible'
      )
    if plans > 1 and settings.temperature == 0:
      raise UserError(f'temperature 0 writes {plans} equal plans: raise it, or draw one plan')
    self.check_ranker(rank)
    written = self.plan(prompts, plans, seed, settings)
    scores = self.score(written, rank).reshape(-1, plans)
    order = best(scores, render)
    rows = order + plans * np.arange(len(order))[:, None]
    drawn = self.render(written.take(rows.reshape(-1)), seed, settings, progress)
    said = {'plans': str(plans), 'ranked_by': rank}
    found = np.take_along_axis(scores, order, axis=1).reshape(-1)
    return [
      picture.saying(**said, rank=str(1 + place % render), score=f'{score:.6g}')
      for place, (picture, score) in enumerate(zip(drawn, found, strict=True))
    ]

  def plans_of(self, drawn: Sequence[Picture]) -> Plans:
    """The visual prompts of pictures that were drawn here: rendered again, they give the same."""
    self._require_plans()
    said = {key: value for key, value in drawn[0].metadata.items() if key not in _OWN}
    made = said | {'by': said.pop('visual_prompt', 'drawn')}
    items = [(picture.prompt, picture.index) for picture in drawn]
    return self._plans(np.stack([picture.codes for picture in drawn]), items, made)

  @functools.cached_property
  def codebook(self) -> Codebook:
    """What the codes of this model's visual prompts index.

    Raises:
      UserError: it has none, or its networks can't be read.
    """
    self._require_plans()
    network, leaf = self.system.visual_prompt.codebook.split('/')
    rows = np.asarray(self._reading[network][leaf], np.float32)
    return Codebook(len(rows), weights_io.fingerprint({'codebook': rows}))

  @property
  def rankers(self) -> tuple[str, ...]:
    """What `score` can go by."""
    self._require_plans()
    return self.system.plan_rankers

  def check_ranker(self, name: str) -> None:
    """Refuses what `score` can't go by; front doors ask before the work starts.

    Raises:
      UserError: says what it can go by.
    """
    if name not in RANKERS:
      raise UserError(f"no ranker of plans is called '{name}'{nearest(name, RANKERS)}")
    if name not in self.rankers:
      raise UserError(
        f'this model cannot rank plans by {name}: no text tower compares its prompts (a class, or '
        "a published tokenizer's words) with its plans; rank by likelihood"
      )

  def check_plans(self) -> None:
    """Refuses plans to keep or to give where there are none; front doors ask before the work.

    Raises:
      UserError: the model has no visual prompts, or what reads them isn't what it was trained with.
    """
    if (size := self.codebook.size) != self.system.codes:
      raise UserError(
        f'the codebook has {size} rows and the model draws {self.system.codes} codes: name the '
        'weights that it was trained with, in config.model.weights'
      )

  def _require_plans(self) -> None:
    if not self.has_plans:
      raise UserError(
        'this model writes no visual prompts apart from its pictures: there are none to keep, to '
        'give or to choose'
      )

  @functools.cached_property
  def _reading(self) -> Params:
    """The networks that visual prompts are read with: drawing does without them."""
    if all(name in self._frozen for name in self.system.visual_prompt.weights):
      return {name: self._frozen[name] for name in self.system.visual_prompt.weights}
    return jax.device_put(frozen_lib.for_visual_prompts(self.system))

  def _given(self, plans: Plans) -> tuple[list[tuple[str, int]], Batch]:
    """Prompt and place of each plan, and a request with it."""
    plans.check(self.codebook, self.system.visual_prompt.grid)
    items = list(zip(bpe.tidied(plans.prompts), plans.index))
    return items, _with_visual_prompt(self._request(items), plans.codes)

  def _plans(
    self, codes: np.ndarray, items: Sequence[tuple[str, int]], made: Mapping[str, str]
  ) -> Plans:
    prompts, index = zip(*items)
    return Plans(np.asarray(codes, np.int32), prompts, index, self.codebook, made)

  def _pictures(
    self,
    request: Batch,
    items: Sequence[tuple[str, int]],
    seed: int,
    settings: SampleConfig,
    progress: Progress | None,
  ) -> list[Picture]:
    """Draws a picture for each row of the request, of its plan where it has one."""
    key = rng.run_key(seed)

    def draw(batch: Batch) -> tuple[Array, Array]:
      if self.has_plans and 'visual_prompt' not in batch.encoded:
        batch = _with_visual_prompt(batch, self._plan(self._params, batch, key, settings))
      generated = self._draw(self._params, self._frozen, batch, key, settings)
      none = np.zeros((len(batch.example), 0), np.int32)
      return generated.image, generated.encoded.get('visual_prompt', none)

    images, visual = self._batched(draw, request, progress)
    said = self.describe(settings) | {'seed': str(seed)}
    return [
      Picture(image, *item, seed, code, said | {'prompt': item[0], 'index': str(item[1])})
      for image, code, item in zip(pictures.to_uint8(images), visual, items, strict=True)
    ]

  def _batched(
    self, run: Callable[[Any], Any], inputs: Any, progress: Progress | None = None
  ) -> Any:
    """What `run` does for each row of the inputs, `rows` at a time."""
    return batches.by_rows(run, inputs, self.rows, progress)

  def _request(self, items: Sequence[tuple[str, int]]) -> Batch:
    """One row for each picture, as numpy leaves."""
    prompts = list(dict.fromkeys(prompt for prompt, _ in items))
    ids, lengths = self._tokenizer.encode_batch(prompts, self.system.config.data.text_length)
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    rows = [row_of[prompt] for prompt, _ in items]
    example = np.asarray([_identity(*item) for item in items], np.int32)
    seen = before.for_rows(self.system, self._before, len(rows))
    return Batch(example, {'text': ids[rows], 'text_length': lengths[rows]}, seen)

  def _rows_of(self, codes: np.ndarray, request: Batch) -> np.ndarray:
    """The given visual prompts, one for each row of the request."""
    self._require_plans()
    codes, count = np.asarray(codes, np.int32), len(request.example)
    wanted = (count, *self.system.batch_spec(1).encoded['visual_prompt'].shape[1:])
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


def _with_visual_prompt(request: Batch, codes: Array) -> Batch:
  return dataclasses.replace(request, encoded={**request.encoded, 'visual_prompt': codes})


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


def _untrained(system: Any, params: Params) -> list[str]:
  """The groups of parameters that no stage of a run trains, and that no other run gave it."""
  paths = sharding.by_path(params)
  trained = {p.split('/')[0] for p in paths for stage in system.stages if trains(stage, p)}
  groups = dict.fromkeys(path.split('/')[0] for path in paths)
  return [g for g in groups if g not in trained and not system.config.is_started(f'{g}/')]


def _items(prompts: str | Sequence[str], n: int) -> list[tuple[str, int]]:
  """Prompt and place of each picture, prompt by prompt."""
  prompts = bpe.tidied([prompts] if isinstance(prompts, str) else prompts)
  if not prompts or n < 1:
    raise UserError(f'nothing to draw: {len(prompts)} prompts with n={n} pictures each')
  places = collections.defaultdict(itertools.count)
  return [(prompt, next(places[prompt])) for prompt in prompts for _ in range(n)]


def _identity(prompt: str, index: int) -> int:
  """What keys a picture's randomness besides the seed: an int32 of its prompt and place."""
  return zlib.crc32(f'{prompt}\0{index}'.encode()) & 0x7FFFFFFF
