# Sourced by demo, test and bench: make .venv and install what is missing into it.

# With such a variable, Python or pytest would use another tree's modules or other settings.
unset "${!PYTHON@}" "${!PYTEST_@}"

find_python() {
    local python
    for python in python3.14 python3.13 python3.12 python3.11 python3; do
        # pyenv has shims for versions that are not installed. Such a shim fails when it runs.
        if command -v "$python" >/dev/null &&
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "error: Python 3.11 or later is needed" >&2
    echo "hint: apt-get install python3 python3-venv (Debian 12, Ubuntu 24.04 or later)" >&2
    return 1
}

# setup_venv [GROUP]: install the project, and the dependency group if one is named. It does nothing
# when .venv is up to date.
setup_venv() {
    local group=${1:-} python stamp
    python=$(find_python) || exit 1
    stamp=.venv/.installed-${group:-run}
    if [ -e "$stamp" ] && [ "$stamp" -nt pyproject.toml ]; then
        return
    fi
    if [ ! -x .venv/bin/pip ]; then
        echo "making .venv with $("$python" --version)"
        if ! "$python" -m venv .venv; then
            echo "error: $python cannot make a virtual environment" >&2
            if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
                echo "installing the Debian package python3-venv" >&2
                apt-get update -qq && apt-get install -y -qq python3-venv && "$python" -m venv .venv
            else
                echo "hint: apt-get install python3-venv" >&2
                exit 1
            fi
        fi
    fi
    echo "installing into .venv"
    .venv/bin/pip --quiet --disable-pip-version-check install --upgrade "pip>=25.1"
    if [ -n "$group" ]; then
        .venv/bin/pip --quiet --disable-pip-version-check install --editable '.[check,report]' \
            --group "$group"
    else
        .venv/bin/pip --quiet --disable-pip-version-check install --editable '.[check,report]'
    fi
    touch "$stamp"
}
