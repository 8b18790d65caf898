"""Imported before JAX, lets programs be compiled for TPUs and GPUs that are not there."""

import os

# JAX shall not look for TPUs, nor keep what it compiles for none.
os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_ENABLE_COMPILATION_CACHE="false",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",  # any
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",  # a driver
)
