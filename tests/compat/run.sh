#!/usr/bin/env bash
# The tests of the losses and the trainers under several versions of TRL and transformers, as a table.
#
#   tests/compat/run.sh                                                 # from the oldest allowed to the newest
#   tests/compat/run.sh 'trl==1.16.0 transformers==5.19.0'              # rows of one's own
#   TESTS='tests/trainers/dpo -k resume' tests/compat/run.sh            # fewer tests
#
# build/compat/base holds constraints.txt. Each row adds a folder with the packages that pip changes for it, in front
# of the base on PYTHONPATH, so that torch is installed once; pytest's output is in a .log file beside the folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=build/compat
if ! cmp -s constraints.txt "$work/installed"; then
  rm -rf "$work" && mkdir -p "$work" && "${PYTHON:-python3}" -m venv "$work/base"
  "$work/base/bin/python" -m pip install -q -c constraints.txt -e '.[dev,eval,label]'
  cp constraints.txt "$work/installed"
fi
exec "$work/base/bin/python" tests/compat/matrix.py "$@"
