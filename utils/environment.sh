# Sourced by run_local.sh and run_tests.sh, in the checkout: sets up .venv and puts it on the PATH.
# Every step is skipped when it is done already, and done again when what it depends on has changed.

set_up_environment() { # requirement files...; DEVICE=cpu makes do without the GPUs
    local python=${PYTHON:-python3} lock= status=0 REUSE TORCH
    [[ -w . ]] || {
        echo "error: $PWD: expected a folder that can be written to, for .venv and the built operators" >&2
        return 1
    }
    if command -v flock >/dev/null; then # of two runs at once in this checkout, the second waits
        exec {lock}<.
        flock --nonblock "$lock" || { echo "waiting for another run that sets up $PWD/.venv" && flock "$lock"; }
    fi
    _set_up "$@" || status=$?
    [[ -z $lock ]] || exec {lock}<&-
    return "$status"
}

_set_up() {
    # torch.txt says which PyTorch is wanted; a .venv from before it was written is taken as it is.
    if ! [[ -e .venv/torch.txt || -e .venv/.done-installing-requirements-txt ]] ||
        ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # none yet, or half of one
        _create_environment || return
    fi
    export PATH="$PWD/.venv/bin:$PATH"
    [[ -e .venv/torch.txt ]] || : >.venv/torch.txt
    local file
    for file in "$@"; do
        _unless_done "installing $file" "$file" -- \
            python -m pip install --quiet --disable-pip-version-check --requirement "$file" --constraint .venv/torch.txt || return
    done
    [[ -e cc_attention/_C.abi3.so ]] || rm -f .venv/.done-building-the-operators # built without a compiler, or removed since
    _unless_done "building the operators" setup.py pyproject.toml building/*.py $(find */csrc -type f | sort) -- \
        _build_operators
}

_create_environment() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: expected Python 3.10 or newer, found $("$python" --version 2>&1) (PYTHON=$python)" >&2
        return 1
    }
    local plan
    plan=$("$python" -m building.plan --shell --python "$python" --device "${DEVICE:-auto}") || return
    eval "$plan"
    echo "creating .venv"
    "$python" -m venv --clear .venv || {
        echo "error: $python -m venv failed; on Debian and Ubuntu, apt-get install python3-venv" >&2
        return 1
    }
    local packages
    packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return
    [[ -z $REUSE ]] || echo "$REUSE" >"$packages/reused.pth" # Python and pip find what is there after their own
    echo "$TORCH" >.venv/torch.txt
}

_build_operators() {
    local nvcc # as wheels, where there is a GPU and no nvcc of use
    nvcc=$(python -c "import setup; print(*setup.get_requires_for_build_editable())") || return
    [[ -z $nvcc ]] || python -m pip install --quiet --disable-pip-version-check "$nvcc" || return
    python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
}

_unless_done() { # what, files it depends on..., --, command...
    local what=$1 files=() content stamp
    shift
    while [[ $1 != -- ]]; do
        files+=("$1")
        shift
    done
    shift
    content=$(cat "${files[@]}")
    stamp=.venv/.done-${what//[^a-z]/-} # holds what the step depended on
    [[ -e $stamp && $(cat "$stamp") == "$content" ]] && return
    echo "$what"
    "$@" || return
    printf '%s\n' "$content" >"$stamp"
}
