"""Views of images: geometry, ranges, and randomness by example."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vpe_jax import rng
from vpe_jax.codecs import pixels
from vpe_jax.data import transforms


def _images(count=3, side=64):
  """Smooth colours with a sharp dark square on white."""
  y, x = np.mgrid[:side, :side] / side
  images = np.full((count, side, side, 3), 255, np.uint8)
  for i in range(count):
    images[i, 8 + i : 30, 20:50] = np.stack([x, y, x * y], -1)[8 + i : 30, 20:50] * 200
  return images


def test_uint8_and_float_images_are_equivalent():
  images = _images()
  np.testing.assert_allclose(
    pixels.to_unit(jnp.asarray(images)), pixels.to_unit(jnp.asarray(images / 255.0)), atol=1e-6
  )
  signed = pixels.to_signed(pixels.to_unit(jnp.asarray(images)))
  assert signed.max() == 1.0 and signed.min() >= -1.0


def test_view_resizes_as_pillow_does():
  images = _images()
  got = np.asarray(pixels.view(jnp.asarray(images), 48)) * 255
  for image, resized in zip(images, got):
    expected = np.asarray(Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC))
    # Pillow rounds its filter weights, and the output of both passes to integers.
    assert np.abs(resized - expected).max() < 2.0
    assert np.abs(resized - expected).mean() < 0.5


def test_padded_view_has_the_geometry_of_the_data():
  for height, width in ((64, 64), (64, 41), (30, 64), (48, 48)):
    image = _images(1)[0, :height, :width]
    got = np.asarray(pixels.padded_view(jnp.asarray(image[None]), 48))[0] * 255
    expected = transforms.pad_to_square(image, 48)
    assert got.shape == expected.shape
    np.testing.assert_array_equal((expected == 255).all(-1)[:, 0], (got > 254.99).all(-1)[:, 0])
    # Pillow rounds its filter weights, and the output of both passes to integers.
    assert np.abs(got - expected).max() < 2.0


def test_view_of_the_same_size_is_the_image():
  images = jnp.asarray(_images())
  np.testing.assert_array_equal(pixels.view(images, 64), pixels.to_unit(images))


def test_no_jitter_is_the_plain_view():
  images, key = jnp.asarray(_images()), rng.run_key(0)
  still = pixels.Jitter(shift=0.0, zoom=0.0)
  got = pixels.jittered_view(images, 48, still, key, jnp.arange(3))
  np.testing.assert_allclose(got, pixels.view(images, 48), atol=1e-5)


def test_jitter_moves_on_white_and_depends_on_the_example():
  images, key = jnp.asarray(_images()), rng.run_key(0)
  jitter = pixels.Jitter(shift=0.2, zoom=0.2)
  view = jax.jit(lambda i, e: pixels.jittered_view(i, 48, jitter, key, e))
  first = view(images, jnp.array([5, 6, 7]))
  assert float(jnp.abs(first - pixels.view(images, 48)).max()) > 0.2
  np.testing.assert_allclose(first[:, [0, -1]], 1.0, atol=5e-3)
  again = view(images[::-1], jnp.array([7, 6, 5]))
  np.testing.assert_allclose(first, again[::-1], atol=1e-6)


def test_a_shift_moves_by_its_share_of_the_side():
  """Over many samples, the largest shift of the mass centre is close to shift * size."""
  image = np.full((1, 64, 64, 3), 255, np.uint8)
  image[0, 28:36, 28:36] = 0
  count = 256
  images = jnp.repeat(jnp.asarray(image), count, 0)
  jitter = pixels.Jitter(shift=0.1, zoom=0.0)
  views = pixels.jittered_view(images, 48, jitter, rng.run_key(3), jnp.arange(count))
  dark = 1.0 - np.asarray(views).mean(-1)
  positions = np.arange(48) + 0.5
  shifts = (dark.sum(1) * positions).sum(-1) / dark.sum((1, 2)) - 24.0
  assert 0.9 * 4.8 < np.abs(shifts).max() < 1.02 * 4.8
  assert abs(shifts.mean()) < 0.6


def test_crops_are_squares_of_the_image_at_positions_of_the_example():
  images = jnp.arange(2 * 16 * 16 * 3, dtype=jnp.float32).reshape(2, 16, 16, 3)
  crops = pixels.random_crops(images, 8, rng.run_key(0), jnp.array([3, 4]))
  again = pixels.random_crops(images[::-1], 8, rng.run_key(0), jnp.array([4, 3]))
  np.testing.assert_array_equal(crops, again[::-1])
  for image, crop in zip(images, crops):
    windows = np.lib.stride_tricks.sliding_window_view(image, (8, 8, 3)).reshape(-1, 8, 8, 3)
    assert (windows == crop).all((1, 2, 3)).sum() == 1
  whole = pixels.random_crops(images, 16, rng.run_key(0), jnp.array([3, 4]))
  np.testing.assert_array_equal(whole, images)


def test_channels_are_permuted_and_never_keep_their_order():
  images = jnp.broadcast_to(jnp.array([0.1, 0.5, 0.9]), (64, 2, 2, 3))
  example = jnp.arange(64)
  permuted = np.asarray(pixels.permute_channels(images, rng.run_key(0), example))
  assert (permuted == permuted[:, :1, :1]).all()
  colours = {tuple(round(c, 1) for c in colour) for colour in permuted[:, 0, 0].tolist()}
  assert len(colours) == 5 and (0.1, 0.5, 0.9) not in colours
  assert all(sorted(colour) == [0.1, 0.5, 0.9] for colour in colours)
  alone = pixels.permute_channels(images[:3], rng.run_key(0), example[5:8])
  np.testing.assert_array_equal(alone, permuted[5:8])


def test_translation_by_whole_pixels_repeats_the_border():
  images = jnp.arange(2 * 5 * 5 * 1).reshape(2, 5, 5, 1)
  moved = pixels.translate(images, 2, -1)
  np.testing.assert_array_equal(moved[:, 2:, :4], images[:, :3, 1:])
  np.testing.assert_array_equal(moved[:, 0], moved[:, 2])
  np.testing.assert_array_equal(moved[:, :, 4], moved[:, :, 3])
  np.testing.assert_array_equal(pixels.translate(images, 0, 0), images)
