"""The metrics by name, as `measure --metrics` takes them."""

from __future__ import annotations

from contextualstory_jax.evaluation.inception_features import FID_WEIGHTS
from contextualstory_jax.evaluation.measurement import Metric
from contextualstory_jax.evaluation.metrics.fid import fid
from contextualstory_jax.evaluation.metrics.kid import kid

METRICS = {
    "fid": Metric(fid, (FID_WEIGHTS,)),
    "kid": Metric(kid, (FID_WEIGHTS,), frozenset({"images"})),
}
