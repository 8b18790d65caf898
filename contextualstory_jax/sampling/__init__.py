"""Generation of frames from sentences: the pipeline, its compiled programs, its outputs.

May import `conversion`, `checkpoints`, `models`, `diffusion`, `data`, `distributed` and what they
import. Start with `pipeline.py`, then `sample.py`. `shipped/` is the model that comes with the
package.
"""
