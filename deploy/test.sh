#!/usr/bin/env bash
# Installs with the test tools, then checks everything: linter, formatting, types, tests.
#
#   bash deploy/test.sh [pytest arguments]
#
# CMC_SERVER_VENV   the virtual environment (.venv in the repository), and what deploy/install.sh reads
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${CMC_SERVER_VENV:-.venv}
bash deploy/install.sh --dev "$venv"
PATH=$(cd "$venv" && pwd)/bin:$PATH
export PATH

step() {
    printf '\n== %s\n' "$*" >&2
    "$@"
}
# The tests would make the demo models themselves; here the progress is seen.
step python -m cmc_server.demo.models smollm2 gemma3
step ruff check .
step ruff format --check .
step mypy
step pytest "$@"
