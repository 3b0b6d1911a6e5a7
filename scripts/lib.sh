# Shared by the scripts beside it, which source it after `set -euo pipefail`. It moves to the repository's root.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
ROOT=$PWD
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() {
    printf '==> %s\n' "$*"
}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Print the comment at the head of a script, as its --help.
show_help() {
    sed -n '2,/^$/s/^#\( \|$\)//p' "$1"
}

# Print the first interpreter that runs, is one of ours to support, and can make a virtual environment. Version
# managers leave names on PATH that fail when called, so each one has to prove itself.
find_python() {
    local name path
    for name in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        while IFS= read -r path; do
            if "$path" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
                >/dev/null 2>&1; then
                printf '%s\n' "$path"
                return
            fi
        done < <(type -aP "$name")
    done
    fail "no Python 3.11, 3.12 or 3.13 with the venv module on PATH (set PYTHON to name one)"
}

# make_venv FOLDER: make it, or make it anew where its interpreter does not run (any more).
make_venv() {
    local python
    if "$1/bin/python" -c 'import pip' >/dev/null 2>&1; then
        return
    fi
    python=$(find_python)
    say "Making $1 with $("$python" --version) ($python)"
    "$python" -m venv --clear "$1"
}

# What pytest is told about processes: as many as there are CPUs, at most 4.
parallel_options() {
    local n_cpus
    n_cpus=$(env -u OMP_NUM_THREADS nproc) # nproc obeys that variable
    printf '%s\n' -n "$((n_cpus < 4 ? n_cpus : 4))" --dist worksteal
}

# fingerprint WORD...: what an environment was made from; another value means that it has to be brought up to date.
# An environment that looks into another one has that one's interpreter among its WORDs.
fingerprint() {
    { printf '%s\n' "$ROOT" "$@" && cat pyproject.toml setup.py constraints.txt native/*.c native/*/*.[ch] scripts/lib.sh scripts/setup; } | sha256sum
}

# is_current FOLDER WORD...: whether the environment was completed with this fingerprint and still runs.
is_current() {
    local folder=$1
    shift
    [[ -f $folder/stamp && $(<"$folder/stamp") == "$(fingerprint "$@")" ]] &&
        "$folder/bin/python" -c '' >/dev/null 2>&1
}

# mark_current FOLDER WORD...: the last step of making an environment.
mark_current() {
    local folder=$1
    shift
    fingerprint "$@" >"$folder/stamp"
}
