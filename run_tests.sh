#!/usr/bin/env bash
# Set up .venv and run the tests; flags go to pytest, e.g. ./run_tests.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source utils/environment.sh
set_up_environment requirements.txt tests/requirements.txt
python -m pytest "$@"
