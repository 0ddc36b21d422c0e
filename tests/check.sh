#!/usr/bin/env bash
# All that `make test` checks: nbdev_test runs every notebook and the stored outputs are still true, then pytest, which also
# exports and cleans a copy of the tree and compares bytes (tests/test_exports.py).  pytest has the last word.
set -euo pipefail
cd "$(dirname "$0")/.."
start=$SECONDS
python tests/run_notebooks.py --check --workers "${WORKERS:-2}"      # exits 3 on a stale output, 1 on a failure or a notebook that did not run
echo "notebooks: $((SECONDS - start)) s"
export OMP_NUM_THREADS=1                                              # two workers, one thread each: more threads would only spin
exec python -m pytest -q -n "${WORKERS:-2}" --durations=10 tests
