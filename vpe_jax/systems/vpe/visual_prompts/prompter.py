"""Writes, reads, ranks and renders visual prompts with a loaded generator."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from vpe_jax.checkpoints import weights
from vpe_jax.config import SampleConfig, did_you_mean
from vpe_jax.contracts import Batch, PlansVisually, UserError, require
from vpe_jax.data.tokenizers import bpe
from vpe_jax.generator import Generator, Item, items_of
from vpe_jax.sampling.batches import Progress
from vpe_jax.sampling.images import GeneratedImage
from vpe_jax.systems.vpe.visual_prompts.files import Codebook, VisualPrompts, best

ENTRY = 'visual_prompt'  # name of the encoded entry
RANKERS = ('likelihood', 'similarity')
_OWN_METADATA = ('prompt', 'index', 'rank', 'score')  # differ between images of a call


class VisualPrompter:
  """The visual prompts of a generator: `VisualPrompter(generator).best_of('a red fox')`.

  Attributes:
    generator: the loaded model.
    system: the generator's system, which supports PlansVisually.
  """

  def __init__(self, generator: Generator):
    """Wraps a generator.

    Raises:
      UserError: the generator's model writes no visual prompts.
    """
    self.generator = generator
    self.system = require(generator.system, PlansVisually)
    self._likelihood = jax.jit(self.system.plan_likelihood)
    self._similarity = jax.jit(self.system.plan_similarity)

  def write(
    self,
    prompts: str | Sequence[str],
    n: int = 1,
    seed: int = 0,
    settings: SampleConfig | None = None,
    progress: Progress | None = None,
  ) -> VisualPrompts:
    """Writes `n` visual prompts for each prompt: those that `generator(prompts, n, ...)` renders.

    Raises:
      UserError: see Generator.__call__.
    """
    items, settings = items_of(prompts, n), settings or self.generator.settings()
    codes = self.generator.draft(items, seed, settings, progress)[ENTRY]
    provenance = self.generator.describe(settings) | {'by': 'sampled', 'seed': str(seed)}
    return self._wrap(codes, items, provenance)

  def read(self, images: Sequence[np.ndarray], prompts: str | Sequence[str] = '') -> VisualPrompts:
    """Reads the visual prompts of images, as the frozen encoder does in training.

    Args:
      images: uint8 [H, W, 3] each, of any shape: made square as in training.
      prompts: captions of the images, one for all or one for each. Without a caption, a visual
        prompt can't be rendered until `with_prompts` adds one.

    Raises:
      UserError: the model was trained on synthetic codes.
    """
    codes = self.generator.read_drafts(images)[ENTRY]
    provenance = self.generator.metadata | {'by': 'read from an image'}
    items = [Item('', index) for index in range(len(codes))]
    prompts = [prompts] if isinstance(prompts, str) else prompts
    return self._wrap(codes, items, provenance).with_prompts(prompts)

  def render(
    self,
    visual_prompts: VisualPrompts,
    seed: int = 0,
    settings: SampleConfig | None = None,
    progress: Progress | None = None,
  ) -> list[GeneratedImage]:
    """Renders each visual prompt, from the noise that seed, text prompt and index determine.

    Raises:
      UserError: codebook or grid are not the model's, or a text prompt is missing; or see
        Generator.__call__.
    """
    items, request = self._request(visual_prompts)
    images = self.generator.render(request, items, seed, settings, progress)
    origin = visual_prompts.provenance.get('by', 'the caller')
    return [image.with_metadata(visual_prompt=origin) for image in images]

  def score(self, visual_prompts: VisualPrompts, by: str = 'likelihood') -> np.ndarray:
    """Scores each visual prompt for its prompt: float32 [n], higher is better.

    Args:
      visual_prompts: visual prompts of any origin, each with a text prompt.
      by: `likelihood`, the mean log-probability of the codes given the prompt, at temperature 1 and
        without filters or guidance, in nats; or `similarity`, the cosine of two vectors of SigLIP:
        of the prompt by its text tower, and of the features that the codes decode to by its
        pooling head.

    Raises:
      UserError: an unknown ranker, or one that this model does not have; or see `render`.
    """
    self.check_ranker(by)
    _, request = self._request(visual_prompts)
    if by == 'likelihood':
      run = lambda batch: self._likelihood(self.generator.params, batch)
    else:
      run = lambda batch: self._similarity(self.generator.draft_networks, batch)
    return self.generator.batched(run, request)

  def best_of(
    self,
    prompts: str | Sequence[str],
    count: int = 16,
    render: int = 1,
    rank: str = 'likelihood',
    seed: int = 0,
    settings: SampleConfig | None = None,
    progress: Progress | None = None,
  ) -> list[GeneratedImage]:
    """Writes `count` visual prompts for each prompt; renders the `render` best, best first.

    Each image equals the one that `generator(prompts, n=count, ...)` generates at its index.

    Raises:
      UserError: `render` is not in 1 .. `count`, or temperature 0 would make all visual prompts
        equal; or see `write` and `score`.
    """
    settings = settings or self.generator.settings()
    if not 1 <= render <= count:
      raise UserError(
        f'cannot render the best {render} of {count} visual prompts: 1 to {count} are possible'
      )
    if count > 1 and settings.temperature == 0:
      raise UserError(f'temperature 0 writes {count} equal visual prompts: raise it, or write one')
    self.check_ranker(rank)
    visual_prompts = self.write(prompts, count, seed, settings, progress)
    scores = self.score(visual_prompts, rank).reshape(-1, count)
    order = best(scores, render)
    positions = order + count * np.arange(len(order))[:, None]
    images = self.render(visual_prompts.take(positions.reshape(-1)), seed, settings, progress)
    metadata = {'plans': str(count), 'ranked_by': rank}
    best_scores = np.take_along_axis(scores, order, axis=1).reshape(-1)
    return [
      image.with_metadata(**metadata, rank=str(1 + place % render), score=f'{score:.6g}')
      for place, (image, score) in enumerate(zip(images, best_scores, strict=True))
    ]

  def of(self, images: Sequence[GeneratedImage]) -> VisualPrompts:
    """The visual prompts of generated images.

    Rendered again with the same seed and settings, they give the same images.
    """
    shared = {k: v for k, v in images[0].metadata.items() if k not in _OWN_METADATA}
    provenance = shared | {'by': shared.pop('visual_prompt', 'sampled')}
    items = [Item(image.prompt, image.index) for image in images]
    return self._wrap(np.stack([image.encoded[ENTRY] for image in images]), items, provenance)

  @functools.cached_property
  def codebook(self) -> Codebook:
    """The codebook of this model's visual prompts.

    Raises:
      UserError: the networks that read visual prompts can't be loaded.
    """
    network, leaf = self.system.visual_prompt.codebook.split('/')
    entries = np.asarray(self.generator.draft_networks[network][leaf], np.float32)
    return Codebook(len(entries), weights.fingerprint({'codebook': entries}))

  def check_ranker(self, name: str) -> None:
    """Checks that this model has a ranker.

    Raises:
      UserError: the ranker is unknown, or this model does not have it.
    """
    if name not in RANKERS:
      known = did_you_mean(name, RANKERS)
      raise UserError(f"no ranker of visual prompts is called '{name}'{known}")
    if name not in self.system.plan_rankers:
      raise UserError(
        f'this model cannot rank visual prompts by {name}: it has no SigLIP that compares them '
        'with its prompts; rank by likelihood'
      )

  def check_codebook(self) -> None:
    """Checks that the codebook has the size that the model was trained with.

    Raises:
      UserError: it has another size, or the networks that read visual prompts can't be loaded.
    """
    if (size := self.codebook.size) != self.system.codes:
      raise UserError(
        f'the codebook has {size} entries, but the model writes {self.system.codes} codes: set '
        'config.model.visual_prompt to the weights that the model was trained with'
      )

  def _request(self, visual_prompts: VisualPrompts) -> tuple[list[Item], Batch]:
    """The items of visual prompts, and a request with them."""
    visual_prompts.check(self.codebook, self.system.visual_prompt.grid)
    prompts = bpe.tidied(visual_prompts.prompts)
    items = [Item(*pair) for pair in zip(prompts, visual_prompts.index)]
    return items, self.generator.request(items, **{ENTRY: visual_prompts.codes})

  def _wrap(
    self, codes: np.ndarray, items: Sequence[Item], provenance: Mapping[str, str]
  ) -> VisualPrompts:
    prompts, index = zip(*items)
    return VisualPrompts(np.asarray(codes, np.int32), prompts, index, self.codebook, provenance)
