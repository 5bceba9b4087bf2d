# Sourced by run_local.sh and run_tests.sh, in the checkout: sets up .venv and puts it on the PATH.
# Every step is skipped when it is done already, and done again when what it depends on has changed.

set_up_environment() { # requirement files...
    local python=${PYTHON:-python3}
    if [[ ! -x .venv/bin/python ]]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "error: expected Python 3.10 or newer, found $("$python" --version 2>&1) (PYTHON=$python)" >&2
            return 1
        }
        echo "creating .venv"
        "$python" -m venv .venv || {
            echo "error: $python -m venv failed; on Debian and Ubuntu, apt-get install python3-venv" >&2
            return 1
        }
    fi
    export PATH="$PWD/.venv/bin:$PATH"
    local file
    for file in "$@"; do
        _unless_done "installing $file" "$file" -- \
            python -m pip install --quiet --disable-pip-version-check --requirement "$file"
    done
    _unless_done "building the operators" setup.py pyproject.toml -- \
        python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
}

_unless_done() { # what, files it depends on..., --, command...
    local what=$1 files=() stamp
    shift
    while [[ $1 != -- ]]; do
        files+=("$1")
        shift
    done
    shift
    stamp=.venv/.done-$(cat "${files[@]}" | python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    [[ -e $stamp ]] && return
    echo "$what"
    "$@" || return
    touch "$stamp"
}
