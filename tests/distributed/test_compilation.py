"""Where compiled programs are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from contextualstory_jax.distributed.compilation import TRAINING_SECONDS, GenerationLog, compiling

ROOT = Path(__file__).parents[2]
SHOW = """
import jax
{before}
from contextualstory_jax.distributed.compilation import use_compilation_cache
use_compilation_cache()
print(jax.config.jax_compilation_cache_dir)
print(jax.config.jax_persistent_cache_min_compile_time_secs)
"""
IN_CONFIG = "jax.config.update('jax_compilation_cache_dir', '/mine')"


@pytest.mark.parametrize(
    ("before", "variables", "expected"),
    [
        ("", {"XDG_CACHE_HOME": "/cache"}, ["/cache/contextualstory_jax/xla", "0.5"]),
        ("", {"JAX_COMPILATION_CACHE_DIR": "/mine"}, ["/mine", "1.0"]),
        (IN_CONFIG, {}, ["/mine", "1.0"]),
    ],
    ids=["default", "environment", "jax.config"],
)
def test_a_cache_that_the_user_set_up_is_left_alone(before, variables, expected):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}

    shown = subprocess.run(
        [sys.executable, "-c", SHOW.format(before=before)],
        cwd=ROOT,
        env=kept | variables,
        capture_output=True,
        text=True,
        check=True,
    )

    assert shown.stdout.splitlines() == expected


@pytest.mark.parametrize(
    ("tensors", "time"), [(1, "10 s"), (428, "40 s"), (899, "90 s"), (1537, "3 min")]
)
def test_the_time_that_compiling_takes_is_estimated(tensors, time):
    line = compiling("training step", tensors, TRAINING_SECONDS)

    assert line == f"compiling the training step (about {time}, cached for the next time)"


def test_a_pipeline_logs_its_model_once_and_each_program_once(caplog):
    log = GenerationLog("3 parameters", tensors=1000)

    with caplog.at_level("INFO"):
        for program in ("a", "a", "b"):
            log.before(program)

    compiling_line = "compiling the generation program (about 30 s, cached for the next time)"
    model_line, *others = caplog.messages
    assert model_line.startswith("generating on ")
    assert model_line.endswith(" with 3 parameters")
    assert others == [compiling_line] * 2
