"""Dense layers over ops.matmul: flax's own, with its weight gradient."""

from __future__ import annotations

import functools

import flax.linen as nn

from vpe_jax.ops.matmul import dot_general

Dense = functools.partial(nn.Dense, dot_general=dot_general)
DenseGeneral = functools.partial(nn.DenseGeneral, dot_general=dot_general)
