r"""The published recipe on PororoSV: five sentences in, five images out.

    contextualstory-jax convert SD21 stable-diffusion-2-1-base
    contextualstory-jax train --config pororo_visualization \
        --config.data.root=DIR --workdir run

SD21 is a folder, or a Hub id, of Stable Diffusion 2.1-base, from which training starts; DIR holds
the dataset as it was published.

Source: the original's `configs/visualization/training_contextualstory_sv_pororo.yaml` and the
defaults of its `train.py`. Values not repeated here are the defaults of
`contextualstory_jax/config/model_config.py` and of `train_config.py` beside it:

- model: that of `UNetConfig`, 1.42 billion parameters, all trained; the VAE and the text
  encoder are frozen; DDIM betas linear 0.00085 to 0.012; noise `pyoco_mixed`, alpha 1.5;
- AdamW at a constant 5e-5, betas 0.9 and 0.999, epsilon 1e-8, decay 1e-2; gradient norm clipped
  to 0.5; EMA 0.9999; computed in bfloat16; min-SNR 5 (a default of `train.py`);
- text dropped with 0.1, a given first frame with 0.1; 40 000 steps, seed 42;
- sampling: 50 DDIM steps, guidance 7.5 on the text and none on the first frame.

Batch: 6 stories a device and 2 accumulation steps, that is 12 for each device. The number of
devices that the published models were trained on is not stated (`trainval.sh` takes all of a
machine's): 12 is one device's share; on 8 devices give `--config.batch_size=96` to do as the
original would.

Hardware: weights, EMA, Adam's moments and gradients take 28 GB in float32, activations come on top.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Build the config."""
    return ConfigDict(
        {
            "init_from": "stable-diffusion-2-1-base",  # pretrained_model_path
            "data": {"name": "pororo"},
            "batch_size": 12,  # stories, one device's: train_batch_size x accumulation
            "accumulation_steps": 2,
            "checkpoint_every": 4000,  # steps
            "sample_every": 4000,  # steps; validation_steps
        }
    )
