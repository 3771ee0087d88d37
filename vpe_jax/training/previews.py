"""RUN/samples/step_*.png: what a run draws for fixed captions, beside what it should have drawn.

Three rows: pictures from the model's own visual prompt, pictures rendered from the ground truth's
visual prompt, and the ground truth; of edits, the pictures before in a fourth. The distance between
the first two rows is the gap between inference and training: in training the renderer always stands
on a true visual prompt. A system without visual prompts has no second row. Half of the pictures are
held out; of data without a held-out split all are trained on, and the last row says so.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vpe_jax import rng, sharding
from vpe_jax.checkpoints.frozen import Frozen
from vpe_jax.config import Config, SampleConfig
from vpe_jax.contracts import (
  Array,
  Batch,
  Edits,
  Generated,
  Params,
  PlansVisually,
  Samples,
  ScoresImages,
  System,
  supports,
)
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.sampling import pictures
from vpe_jax.training import heldout
from vpe_jax.training.state import State, weights

SHOWN = 4  # pictures of each split in a grid
COUNT = 8  # pictures of each split that the metrics are taken over
_SCANNED = 8  # records looked at for each that is taken
OWN, TRUE = 'own visual prompt', 'true visual prompt'
DRAWN, TRUTH, TRAINED, BEFORE = 'drawn', 'ground truth', 'ground truth (trained on)', 'before'


class Previews:
  """Draws the same captions with the same seeds each time."""

  def __init__(
    self,
    config: Config,
    system: System,
    frozen: Frozen,
    mesh: jax.sharding.Mesh,
    folder: epath.Path,
  ):
    """Draws nothing yet.

    Args:
      config: the run.
      system: what draws; one without `generate` never does.
      frozen: its encoders and decoders.
      mesh: of the run.
      folder: where grids go.
    """
    self._config = config
    self._system = system
    self._frozen = frozen
    self._mesh = mesh
    self._folder = folder
    held_out = (heldout.SPLIT,) if heldout.has_split(config.data.source) else ()
    self._splits = ('train', *held_out)
    self._truth: dict[str, tuple[Batch, list[str]]] = {}
    everywhere = sharding.replicated(mesh)  # every process reads the results
    spread = {'out_shardings': everywhere, 'compiler_options': sharding.compiler_options()}
    self._draw = jax.jit(self._generate, static_argnums=4, **spread)
    self._compare = jax.jit(self._measure, out_shardings=everywhere)

  @property
  def possible(self) -> bool:
    """Whether the system draws pictures, and has the networks for it."""
    return supports(self._system, Samples) and bool(self._system.frozen)

  def draw(self, state: State, key: Array, step: int) -> dict[str, float]:
    """Writes one grid.

    Returns:
      For the metrics, for pictures from the model's own visual prompt (`sample/own/...`) and
      from the true one (`sample/truth_plan/...`): `latent_distance`, the root mean square
      difference from the true latents, or `equal_codes`, the share of a discrete picture's codes
      that are the true ones; and `retrieval`, the share of pictures whose own caption fits best
      among the batch's, where the system can tell. Nothing if it doesn't draw.
    """
    if not self.possible:
      return {}
    params, frozen, found = weights(state), self._frozen.params, {}
    plans = supports(self._system, PlansVisually)
    labels = {'own': OWN, 'truth_plan': TRUE} if plans else {'own': DRAWN}
    true_row = TRUTH if len(self._splits) > 1 else TRAINED
    ends = (true_row, BEFORE) if supports(self._system, Edits) else (true_row,)
    rows: list[list[np.ndarray]] = [[] for _ in (*labels, *ends)]
    captions: list[str] = []
    for place, split in enumerate(self._splits):
      truth, words = self._load(split)
      # Places in a split number its examples: one class at one place is drawn twice, and differs.
      own_key = jax.random.fold_in(key, place)
      wanted = {'own': self._request(truth)}
      if 'truth_plan' in labels:
        wanted['truth_plan'] = self._request(truth, 'visual_prompt')
      for row, name in enumerate(labels):
        drawing = self._draw(params, frozen, wanted[name], own_key, self._config.sample)
        measured = jax.device_get(self._compare(frozen, drawing, truth))
        for measure, value in measured.items():
          found.setdefault(f'sample/{name}/{measure}', []).append(float(value))
        image = jax.device_get(drawing.image[:SHOWN])
        rows[row] += list(pictures.to_uint8(np.nan_to_num(image)))
      for row, leaf in zip(rows[len(labels) :], ('image', 'source_image')):
        row += list(self._fetch(truth.inputs[leaf])[:SHOWN])
      captions += words
    if jax.process_index() == 0:
      blank = [''] * len(captions)
      said = [*[blank] * len(labels), captions, blank][: len(rows)]
      sheet = pictures.grid(rows, said, (*labels.values(), *ends))
      pictures.save_png(sheet, self._folder / f'step_{step:07d}.png', overwrite=True)
    return {name: sum(values) / len(values) for name, values in found.items()}

  def _generate(
    self, params: Params, frozen: Params, request: Batch, key: Array, settings: SampleConfig
  ) -> Generated:
    return self._system.generate(self._system.prepare(params), frozen, request, key, settings)

  def _request(self, truth: Batch, *fixed: str) -> Batch:
    """A request for the prompts of a batch, with some of its encoded entries fixed."""
    spec = self._system.request_spec(1)
    encoded = {name: truth.encoded[name] for name in (*spec.encoded, *fixed)}
    return Batch(truth.example, {name: truth.inputs[name] for name in spec.inputs}, encoded)

  def _measure(self, frozen: Params, drawing: Generated, truth: Batch) -> dict[str, Array]:
    ours, theirs = drawing.encoded['latents'], truth.encoded['latents']
    if jnp.issubdtype(theirs.dtype, jnp.integer):
      measured = {'equal_codes': jnp.mean(ours == theirs)}
    else:
      difference = ours - theirs
      measured = {'latent_distance': jnp.sqrt(jnp.mean(jnp.square(difference)))}
    if supports(self._system, ScoresImages):
      fits = self._system.similarity(frozen, drawing.image, truth.inputs)
      own = jnp.diagonal(fits)[:, None]
      measured['retrieval'] = jnp.mean(jnp.all(own >= fits, axis=1).astype(jnp.float32))
    return measured

  def _load(self, split: str) -> tuple[Batch, list[str]]:
    """Records of a split with their true codes and latents, and the captions that are shown."""
    if split not in self._truth:
      data = Pipeline.of(self._system, split)
      count = -(-COUNT // self._mesh.size) * self._mesh.size
      places = _places(data, count)
      mine = places[sharding.host_rows(count, self._mesh)]
      batch = data.examples([data.index_at(place) for place in mine])
      batch = dataclasses.replace(batch, example=np.asarray(mine, np.int32))
      placed = sharding.put_batch(batch, self._mesh)
      captions = [data.prompt(data.index_at(place)) for place in places[:SHOWN]]
      key = jax.device_put(rng.run_key(self._config.seed), sharding.replicated(self._mesh))
      self._truth[split] = (self._frozen.encoded(placed, key), captions)
    return self._truth[split]

  def _fetch(self, leaf: Array) -> np.ndarray:
    """A whole array on every host."""
    whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(self._mesh))
    return jax.device_get(whole(leaf))


def _places(data: Pipeline, count: int) -> list[int]:
  """The first places of the stream that say something new, then the first of the others.

  Captions rarely come again; of classes most pictures may be of one.
  """
  said, new, others = set(), [], []
  for place in range(_SCANNED * count):
    if len(new) == count:
      break
    words = data.prompt(data.index_at(place))
    (others if words in said else new).append(place)
    said.add(words)
  return (new + others)[:count]
