#!/usr/bin/env bash
# Set up .venv and run the tests, in two processes of one thread each; flags go to pytest, e.g.
#
#   ./run_tests.sh -m "not slow"
#   ./run_tests.sh -n 0 tests/test_abn.py        in this process
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source utils/environment.sh
set_up_environment requirements.txt tests/requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest -n 2 --dist loadgroup "$@"
