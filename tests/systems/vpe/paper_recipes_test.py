"""The `paper` presets are the recipes of the paper (arXiv 2606.04457, sections 4, App. C, Table 9).

Where the paper is silent, the value is that of the code it builds on (Show-o2, LlamaGen, BAGEL).
"""

from __future__ import annotations

import pytest

from configs import c2i_continuous, c2i_discrete, edit, t2i, text_rendering
from vpe_jax import systems
from vpe_jax.config import flatten, to_dict

SHOW_O2_ADAMW = {
  'optim.name': 'adamw', 'optim.schedule': 'constant', 'optim.b1': 0.9, 'optim.b2': 0.999,
  'optim.eps': 1e-8, 'optim.weight_decay': 0.0, 'optim.clip': 1.0,
}  # fmt: skip
# Released Show-o2 1.5B; rotary bases, norm epsilons and activations change no shape.
SHOW_O2_BODY = {
  'width': 1536, 'mlp': 8960, 'layers': 28, 'heads': 12, 'kv_heads': 2, 'head_width': 128,
  'rope_theta': 1e6, 'eps': 1e-6, 'qkv_bias': True, 'rope_adjacent': False,
}  # fmt: skip
SHOW_O2_HEAD = {
  'width': 2048, 'mlp': 8192, 'layers': 10, 'heads': 32, 'kv_heads': 8, 'head_width': 64,
  'rope_theta': 5e5,
}  # fmt: skip
SHOW_O2 = {
  **{f'model.{expert}.{k}': v for expert in ('ar', 'dit') for k, v in SHOW_O2_BODY.items()},
  **{f'model.head.{k}': v for k, v in SHOW_O2_HEAD.items()},
  'model.head.rope_scaling.factor': 32.0, 'model.head.rope_scaling.low': 1.0,
  'model.head.rope_scaling.high': 4.0, 'model.head.rope_scaling.original': 8192,
  'model.dual_path.table': 27, 'model.dual_path.encoder.width': 1152,
  'model.dual_path.encoder.layers': 26, 'model.dual_path.encoder.heads': 16,
  'model.dual_path.encoder.mlp': 4304, 'model.dual_path.encoder.eps': 1e-6,
  'model.dual_path.encoder.activation': 'gelu_tanh', 'model.text_vocab': 151_669,
  'model.bos': 151_644, 'model.boi': 151_652, 'model.latent_size': 64, 'model.latent_channels': 16,
  'model.patch': 2, 'model.layout': 'raster', 'model.init_from': 'showlab/show-o2-1.5B-HQ',
  'model.flow.time_distribution': 'logit_normal', 'model.flow.shift_by': 'resolution',
  'data.image_size': 512, 'data.fit': 'pad',
}  # fmt: skip
SAMPLER = {'sample.steps': 49, 'sample.shift': 3.0}
PROMPT_TOKENS = {'model.codes': 16_384, 'model.visual_prompt.image_size': 384}
GROWTH = {'model.vp_schedule': 'sigmoid', 'model.ce_start': 0.03, 'model.ce_end': 0.1}
T2I = {
  **SHOW_O2_ADAMW, **SHOW_O2, **SAMPLER, **PROMPT_TOKENS, **GROWTH,
  'steps': (325_000, 406_000), 'batch_size': (480, 192), 'optim.lr': 1e-4, 'optim.warmup': 2000,
  'optim.ema': 0.9995, 'optim.accumulate': 1, 'data.text_length': 249, 'model.drop': 0.1,
  'model.inherit': 0.0, 'model.drop_text': 0.0, 'sample.guidance': 7.5, 'sample.plan_guidance': 1.0,
  'sample.min_p': 0.03, 'sample.temperature': 1.0,
}  # fmt: skip
# 32M plain images, and 6.35M of English text that is legible after padding.
LEGIBLE = {
  f'data.filters.{folder}.{field}': value
  for folder in ('text_atlas', 'anyword')
  for field, value in (('language', 'en'), ('least_text_height', 8))
} | {'data.language': '', 'data.least_text_height': 0}
MIXTURE = {**LEGIBLE, 'data.source': 'folders:blip3o,text_atlas,anyword'}
# 5 images x 24 GPUs x 2 microbatches; the 70,000 steps of the paper are microbatches.
EDIT = {
  **T2I, 'model.vp_schedule': 'constant', 'model.ce_start': 0.1, 'steps': (35_000,),
  'batch_size': (240,), 'optim.lr': 5e-5, 'model.eoi': 151_653,
  'model.drop_text': 0.05, 'sample.guidance': 2.5, 'sample.image_guidance': 1.0,
  'data.source': 'folders:nhr_edit*3,unic_edit,sharegpt_4o_image*5,pico_banana*4',
}  # fmt: skip
TEXT = {
  **T2I, 'steps': (100_000,), 'batch_size': (192,), 'optim.ema': 0.0, 'sample.guidance': 5.5,
  **LEGIBLE, 'data.source': 'folders:text_atlas,anyword',
}  # fmt: skip
WITHOUT_PROMPT = {'batch_size': (288,), 'data.text_length': 251}  # sequences of 1,280 tokens
# LlamaGen's optimizer and dropout; 100 epochs of 1,281,167 images at batch 128.
LLAMAGEN = {
  'steps': (1_000_911,), 'batch_size': (128,), 'optim.name': 'adamw', 'optim.lr': 1e-4,
  'optim.schedule': 'constant', 'optim.warmup': 0, 'optim.b1': 0.9, 'optim.b2': 0.95,
  'optim.weight_decay': 0.05, 'optim.clip': 1.0, 'optim.ema': 0.0, 'data.image_size': 512,
  'data.fit': 'pad', 'model.classes': 1000, 'model.body.width': 1280, 'model.body.mlp': 3584,
  'model.body.layers': 36, 'model.body.heads': 20, 'model.body.eps': 1e-5,
  'model.body.rope_theta': 1e4, 'model.token_dropout': 0.1, 'model.residual_dropout': 0.1,
  'model.mlp_dropout': 0.1, 'model.visual_prompt.image_size': 224, 'model.vp_schedule': 'sigmoid',
  'model.mask_start': 0.95, 'model.mask_end': 0.05, 'model.mask_by': 'token',
  'sample.guidance': 1.0, 'sample.plan_guidance': 1.0, 'sample.min_p': 0.0,
  'sample.temperature': 1.0, 'sample.top_k': 0, 'sample.top_p': 1.0,
}  # fmt: skip
# BAGEL's optimizer, from Qwen2.5-0.5B; one pack of 10,240 tokens on each of 8 devices.
TRANSFUSION = {
  'steps': (130_000,), 'batch_size': (216,), 'optim.name': 'adamw', 'optim.lr': 1e-4,
  'optim.schedule': 'constant', 'optim.warmup': 2000, 'optim.b1': 0.9, 'optim.b2': 0.95,
  'optim.eps': 1e-15, 'optim.weight_decay': 0.0, 'optim.clip': 1.0, 'optim.ema': 0.9999,
  'data.image_size': 256, 'data.fit': 'crop', 'model.classes': 1000, 'model.body.width': 896,
  'model.body.mlp': 4864, 'model.body.layers': 24, 'model.body.heads': 14,
  'model.body.kv_heads': 2, 'model.body.rope_theta': 1e6, 'model.body.eps': 1e-6,
  'model.visual_prompt.image_size': 176, 'model.patch': 2, 'model.drop': 0.0,
  'model.flow.time_distribution': 'logit_normal', 'model.flow.shift': 1.0,
  'model.flow.shift_by': 'constant', **GROWTH, **SAMPLER, 'sample.guidance': 1.0,
  'sample.min_p': 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
  'config, arg, recipe',
  [
    (t2i, 'paper', {**T2I, **MIXTURE}),
    (t2i, 'paper,arch=external', {**T2I, **MIXTURE}),
    (t2i, 'paper,arch=single', {**T2I, **MIXTURE}),
    (edit, 'paper,arch=internal', {**EDIT, 'model.drop': 0.05}),
    (edit, 'paper,arch=external', {**EDIT, 'model.drop': 0.0}),
    (text_rendering, 'paper,chips=24', TEXT),
    (text_rendering, 'paper,chips=24,vpe=false', {**TEXT, **WITHOUT_PROMPT}),
    (c2i_discrete, 'paper', LLAMAGEN),
    (c2i_discrete, 'paper,vpe=false', LLAMAGEN),
    (c2i_continuous, 'paper', TRANSFUSION),
    (c2i_continuous, 'paper,vpe=false', {**TRANSFUSION, 'batch_size': (8 * (10_240 // 257),)}),
    (
      c2i_continuous,
      'paper,fork=runs/shared',
      {**TRANSFUSION, 'steps': (136_000,), 'start_weights': 'state', 'optim.warmup': 0},
    ),
  ],
)
def test_paper_presets_are_the_recipes_of_the_paper(config, arg, recipe):
  built = flatten(to_dict(systems.build(config.get_config(arg).to_dict()).config))
  values = {name: tuple(v) if isinstance(v := built.get(name), list) else v for name in recipe}
  assert values == recipe


@pytest.mark.parametrize('arg', ['tiny', 'tiny,vpe=false', 'tiny,vpe=true,fork=runs/shared'])
def test_class_twins_sample_without_guidance_as_the_paper_does(arg):
  for preset in (arg, arg.replace('tiny', 'paper')):
    assert c2i_continuous.get_config(preset).sample.guidance == 1.0


@pytest.mark.parametrize(
  'config, arg, stages',
  [
    (t2i, 'paper', {'plan': (False, {'next_token'}), 'joint': (True, {'next_token', 'flow'})}),
    (t2i, 'paper,arch=external', {'plan': (False, {'next_token'}), 'render': (True, {'flow'})}),
    (edit, 'paper,arch=internal', {'edit': (True, {'next_token', 'flow'})}),
    (edit, 'paper,arch=external', {'edit': (True, {'next_token'})}),
  ],
)
def test_stages_have_the_averages_and_losses_of_table_9(config, arg, stages):
  system = systems.build(config.get_config(arg).to_dict())
  assert {stage.name: (stage.ema, set(stage.losses)) for stage in system.stages} == stages
