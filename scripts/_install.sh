# Source this file. `install_metarl ROOT` creates ROOT/.venv and installs metarl with its development tools into it.
# It does nothing when the last install succeeded and neither pyproject.toml nor constraints.txt has changed since.

install_metarl() {
    local root="$1"
    local venv="$root/.venv"
    local stamp="$venv/metarl-install-stamp"
    local python expected

    # A venv whose creation was interrupted has no working pip.
    if [[ -e "$venv" ]] && ! { _is_supported "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
        echo "metarl: $venv is incomplete, or its Python is not 3.11 to 3.13; creating it again" >&2
        rm -rf "$venv"
    fi
    if [[ ! -e "$venv" ]]; then
        python="$(_find_python)" || return 1
        if ! "$python" -m venv "$venv"; then
            rm -rf "$venv"
            echo "metarl: $python could not create a virtual environment; install its venv module" \
                "(on Debian and Ubuntu: apt install python3-venv) and run this again" >&2
            return 1
        fi
    fi

    expected="$(_fingerprint "$root")" || return 1
    if [[ -f "$stamp" && "$(<"$stamp")" == "$expected" ]]; then
        return 0
    fi
    echo "metarl: installing into $venv (takes some minutes the first time)" >&2
    rm -f "$stamp"
    # pip reads -e ".[dev]" relative to the working directory.
    if ! (cd "$root" && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -c constraints.txt -e ".[dev]"); then
        echo "metarl: the installation failed; fix the error shown above and run this again" >&2
        return 1
    fi
    # Written last and moved into place: a stamp means a complete install.
    printf '%s\n' "$expected" >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

# mujoco 3.3.0, which metaworld 3.1.1 requires, has no wheels for Python 3.14.
_is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1
}

_find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if _is_supported "$candidate"; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "metarl: no Python 3.11, 3.12 or 3.13 on PATH; install one (for example python3.11) and run this again" >&2
    return 1
}

# The fingerprint includes the root: an editable install breaks when the repository moves.
_fingerprint() {
    "$1/.venv/bin/python" - "$1" <<'PYTHON'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{root}\n{sys.version}\n".encode())
for name in ("pyproject.toml", "constraints.txt"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PYTHON
}
