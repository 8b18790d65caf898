"""The metrics by name, as `measure --metrics` takes them."""

from __future__ import annotations

from contextualstory_jax.evaluation.clip import clip_of
from contextualstory_jax.evaluation.inception_features import FID_WEIGHTS
from contextualstory_jax.evaluation.measurement import Metric
from contextualstory_jax.evaluation.metrics.classified import characters, require_classifier
from contextualstory_jax.evaluation.metrics.clip_scores import clip_scores, require_pairs
from contextualstory_jax.evaluation.metrics.fid import fid
from contextualstory_jax.evaluation.metrics.fsd import R2PLUS1D_WEIGHTS, fsd
from contextualstory_jax.evaluation.metrics.kid import kid, require_subsets
from contextualstory_jax.evaluation.metrics.r_precision import clip_r_precision, require_sentences

METRICS = {
    "fid": Metric(fid, (FID_WEIGHTS,)),
    "kid": Metric(kid, (FID_WEIGHTS,), frozenset({"images"}), check=require_subsets),
    "fsd": Metric(fsd, (R2PLUS1D_WEIGHTS,), frozenset({"images", "stories"})),
    "characters": Metric(
        characters, needs=frozenset({"stories", "characters"}), check=require_classifier
    ),
    "clip": Metric(
        clip_scores,
        needs=frozenset({"images", "pairs"}),
        model=clip_of,
        check=require_pairs,
    ),
    "clip-r-precision": Metric(
        clip_r_precision,
        needs=frozenset({"sentences"}),
        model=clip_of,
        check=require_sentences,
    ),
}
