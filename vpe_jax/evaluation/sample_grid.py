"""Sample grids: images for fixed prompts, next to the ground truth.

A draft is what some systems sample before they render the image, such as a visual prompt. Rows:
images from the model's own drafts; images rendered from ground-truth drafts, if the system has
drafts; the ground truth; and for edits, the source images. The first two rows differ because the
renderer was trained on ground-truth drafts, but samples from those of the model. Half of the
prompts are held out. If the data source has no held-out split, all prompts are training data, and
the label of the ground truth says so.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vpe_jax import sharding
from vpe_jax.checkpoints import frozen as frozen_lib
from vpe_jax.config import SampleConfig
from vpe_jax.contracts import (
  Array,
  Batch,
  Edits,
  Generated,
  Params,
  Samples,
  ScoresImages,
  System,
  supports,
)
from vpe_jax.data.pipeline import Pipeline
from vpe_jax.data.records import BadRecord
from vpe_jax.evaluation import heldout, intervals
from vpe_jax.evaluation.evaluator import Lowered, Subject
from vpe_jax.evaluation.intervals import Figure
from vpe_jax.evaluation.report import (
  FROM_DRAFTS,
  GENERATED,
  GROUND_TRUTH,
  TRUE_DRAFTS,
  Report,
  Row,
  number,
)
from vpe_jax.sampling import images

SHOWN = 4  # images of each split in a grid
MIN_SCORED = 8  # images of each split for the metrics; rounded up to a multiple of the devices
_SCANNED = 8  # records scanned at most, per record used
OWN = 'own'  # in the names of metrics
TRAINED_ON, SOURCE = 'ground truth (trained on)', 'source image'


class _Programs(NamedTuple):
  """The jitted functions: sampling, metrics, and a copy of an array on every host."""

  generate: jax.stages.Wrapped
  compare: jax.stages.Wrapped
  replicate: jax.stages.Wrapped


@dataclasses.dataclass
class SampleGrid:
  """Samples the same prompts with the same seeds each time.

  See vpe_jax.evaluation.evaluator.Evaluator. Metrics are `sample/own/NAME` for images from the
  model's own drafts and `sample/true_drafts/NAME` for images from ground-truth drafts, over the
  training and held-out prompts together. Names:

    latent_distance: root mean square difference from the ground-truth latents.
    equal_codes: share of codes that equal the ground truth, for discrete latents.
    retrieval: share of images that score highest with their own prompt in the batch, if the system
      scores images.

  Without a decoder (synthetic data) there is no grid.
  """

  requires: ClassVar[tuple[type, ...]] = (Samples,)
  tasks: ClassVar[tuple[str, ...]] = ()
  folder: ClassVar[str] = 'samples'

  def __post_init__(self) -> None:
    self._truth: dict[tuple[System, str], tuple[Batch, list[str]]] = {}
    self._jitted: dict[System, _Programs] = {}

  def check(self) -> None:
    """See Evaluator; there are no options."""

  def programs(self, subject: Subject) -> list[Lowered]:
    """See Evaluator."""
    if frozen_lib.is_synthetic(subject.system):
      return []
    jitted, frozen, settings = self._compiled(subject), subject.frozen, subject.settings
    spec = subject.system.batch_spec(_count(subject.mesh))
    truth = sharding.abstract(spec.batch(cached=False), sharding.batch_sharding(subject.mesh))
    lowered = [frozen.lower_encode(truth, subject.key)]
    encoded = sharding.abstract(dict(spec.encoded), sharding.batch_sharding(subject.mesh))
    truth = dataclasses.replace(truth, encoded=encoded)
    for fixed in dict.fromkeys(((), tuple(subject.system.drafts))):
      request = _request(subject, truth, fixed)
      arguments = (subject.params, frozen.params, request, subject.key, settings)
      lowered.append(jitted.generate.lower(*arguments))
      generated = jitted.generate.eval_shape(*arguments)
      generated = sharding.abstract(generated, sharding.replicated(subject.mesh))
      lowered.append(jitted.compare.lower(frozen.params, generated, truth))
    return lowered

  def run(self, subject: Subject) -> Report:
    """Samples the grid and computes its metrics."""
    if frozen_lib.is_synthetic(subject.system):
      return Report({}, ('sample grid: none; a run on synthetic data has no decoder',))
    jitted = self._compiled(subject)
    data = subject.system.config.data
    held_out = (heldout.SPLIT,) if heldout.has_split(data) else ()
    labels = {OWN: GENERATED}
    if subject.system.drafts:
      labels[TRUE_DRAFTS] = FROM_DRAFTS
    inputs = {GROUND_TRUTH if held_out else TRAINED_ON: 'image'}
    if supports(subject.system, Edits):
      inputs[SOURCE] = 'source_image'
    rows: dict[str, list[np.ndarray]] = {name: [] for name in (*labels.values(), *inputs)}
    values: dict[str, list[np.ndarray]] = {}
    captions: list[str] = []
    for index, split in enumerate(('train', *held_out)):
      truth, prompts = self._load(subject, split)
      # Examples are keyed by their position in a split, so each split needs its own key.
      key = jax.random.fold_in(subject.key, index)
      for name, label in labels.items():
        fixed = subject.system.drafts if name == TRUE_DRAFTS else ()
        request = _request(subject, truth, fixed)
        arguments = (subject.params, subject.frozen.params, request, key, subject.settings)
        with jax.set_mesh(subject.mesh):  # The networks shard their activations over it.
          generated = jitted.generate(*arguments)
          metrics = jax.device_get(jitted.compare(subject.frozen.params, generated, truth))
        for metric, array in metrics.items():
          values.setdefault(f'sample/{name}/{metric}', []).append(np.asarray(array))
        pixels = jax.device_get(generated.image[:SHOWN])
        rows[label] += list(images.to_uint8(np.nan_to_num(pixels)))
      for label, name in inputs.items():
        rows[label] += list(jax.device_get(jitted.replicate(truth.inputs[name]))[:SHOWN])
      captions += prompts
    truth_row = next(iter(inputs))
    sheet = tuple(
      Row(label, np.stack(row), tuple(captions) if label == truth_row else ())
      for label, row in rows.items()
    )
    figures = {name: _figure(name, np.concatenate(arrays)) for name, arrays in values.items()}
    lines = tuple(f'  {name:32}{number(figure, places=4)}' for name, figure in figures.items())
    return Report(figures, lines, sheets={'': sheet})

  def _compiled(self, subject: Subject) -> _Programs:
    """The jitted functions, built once for a system; every process gets their results."""
    system, everywhere = subject.system, sharding.replicated(subject.mesh)
    if system not in self._jitted:

      def generate(
        params: Params, frozen: Params, request: Batch, key: Array, settings: SampleConfig
      ) -> Generated:
        return system.generate(system.prepare(params), frozen, request, key, settings)

      def compare(frozen: Params, generated: Generated, truth: Batch) -> dict[str, Array]:
        values = _distances(generated, truth)
        if supports(system, ScoresImages):
          scores = system.similarity(frozen, generated.image, truth.inputs)
          own = jnp.diagonal(scores)[:, None]
          values['retrieval'] = jnp.all(own >= scores, axis=1)
        return values

      options = sharding.compiler_options()
      self._jitted[system] = _Programs(
        jax.jit(generate, static_argnums=4, out_shardings=everywhere, compiler_options=options),
        jax.jit(compare, out_shardings=everywhere),
        jax.jit(lambda leaf: leaf, out_shardings=everywhere),
      )
    return self._jitted[system]

  def _load(self, subject: Subject, split: str) -> tuple[Batch, list[str]]:
    """Records of a split with their encoded entries, and the prompts of the grid."""
    key = subject.system, split
    if key not in self._truth:
      data = Pipeline.of(subject.system, split)
      count = _count(subject.mesh)
      positions = _positions(data, count)
      local = [positions[i] for i in sharding.host_positions(count, subject.mesh)]
      batch = data.examples([data.index_at(position) for position in local])
      batch = dataclasses.replace(batch, example=np.asarray(local, np.int32))
      placed = sharding.put_batch(batch, subject.mesh)
      prompts = [data.prompt(data.index_at(position)) for position in positions[:SHOWN]]
      with jax.set_mesh(subject.mesh):
        self._truth[key] = (subject.frozen.encode_batch(placed, subject.key), prompts)
    return self._truth[key]


def _request(subject: Subject, truth: Batch, fixed: tuple[str, ...]) -> Batch:
  """A request for the prompts of a batch, with some of its encoded entries fixed."""
  spec = subject.system.request_spec(1)
  encoded = {name: truth.encoded[name] for name in (*spec.encoded, *fixed)}
  return Batch(truth.example, {name: truth.inputs[name] for name in spec.inputs}, encoded)


def _distances(generated: Generated, truth: Batch) -> dict[str, Array]:
  """Squared distance of latents from the ground truth, or share of equal codes, of each image [B].

  Empty without latents.
  """
  if 'latents' not in generated.encoded:
    return {}
  sampled, expected = generated.encoded['latents'], truth.encoded['latents']
  axes = tuple(range(1, expected.ndim))
  if jnp.issubdtype(expected.dtype, jnp.integer):
    return {'equal_codes': jnp.mean(sampled == expected, axes)}
  return {'latent_distance': jnp.mean(jnp.square(sampled - expected), axes)}


def _figure(name: str, values: np.ndarray) -> Figure:
  """A metric of images, of whose values [N] `latent_distance` has squares."""
  if not name.endswith('latent_distance'):
    return intervals.share(values)
  squared = intervals.mean(values)
  return dataclasses.replace(squared, statistic=lambda x: np.sqrt(squared.statistic(x)))


def _count(mesh: jax.sharding.Mesh) -> int:
  """Scored images of each split."""
  return -(-MIN_SCORED // mesh.size) * mesh.size


def _positions(data: Pipeline, count: int) -> list[int]:
  """The first `count` stream positions with distinct prompts; if too few, also repeated ones.

  Captions rarely repeat, but class names do. Records that can't be read are left out.
  """
  previous, distinct, others = set(), [], []
  for position in range(_SCANNED * count):
    if len(distinct) == count:
      break
    index = data.index_at(position)
    try:
      prompt = data.prompt(index)
      data.examples([index])
    except BadRecord:
      continue
    (others if prompt in previous else distinct).append(position)
    previous.add(prompt)
  return (distinct + others)[:count]
