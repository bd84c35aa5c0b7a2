#!/usr/bin/env bash
# Makes .venv, installs the project into it, and compiles what DeepSpeed needs on this machine. Asks nothing; quick when
# nothing has changed since the last time.
#
#   bash launch/setup.sh           what training needs
#   bash launch/setup.sh app       what launch/demo_app.py needs as well
#   bash launch/setup.sh dev       all of that, and the tools of the tests
#
# launch/demo.sh and launch/test.sh source it and call `setup [dev]`, which also activates the environment.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv

section() { printf '\n==== %s ====\n' "$*"; }
say() { printf '%s\n' "$*"; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# apt_install PACKAGE...: installs system packages where that is possible without asking; otherwise says what is missing.
apt_install() {
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    say "missing on this machine: $* (install them as root: apt-get install $*)"
    return 1
  fi
  say "installing system packages: $*"
  export DEBIAN_FRONTEND=noninteractive
  local log
  log=$(mktemp)
  if apt-get install -y -qq --no-install-recommends "$@" >"$log" 2>&1 ||
    { apt-get update -qq >>"$log" 2>&1 && apt-get install -y -qq --no-install-recommends "$@" >>"$log" 2>&1; }; then
    rm -f "$log"
    return 0
  fi
  say "apt-get cannot install $*: $(tail -n 1 "$log")"
  rm -f "$log"
  return 1
}

usable_python() { # a Python that is new enough and can make environments
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null && usable_python "$name"; then
      command -v "$name"
      return 0
    fi
  done
  return 1
}

make_venv() {
  if [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    return 0
  fi
  rm -rf "$VENV" # made by a Python that is gone, or too old
  if command -v uv >/dev/null; then
    # --seed: with a pip, or a user's `pip install tensorboard` would go elsewhere.
    uv venv --quiet --seed --python '>=3.11' "$VENV" && return 0
    say "uv could not make the environment; trying python3 -m venv"
  fi
  local python
  if ! python=$(find_python); then
    apt_install python3 python3-venv || true
    python=$(find_python) || fail "no Python >= 3.11 with venv is here: install one, or uv (https://docs.astral.sh/uv), and run this again"
  fi
  "$python" -m venv "$VENV"
}

install_project() { # install_project [dev]
  local what="$ROOT${1:+[$1]}"
  if command -v uv >/dev/null; then
    # --compile-bytecode, as pip does: where PYTHONDONTWRITEBYTECODE is set every start would compile torch anew.
    uv pip install --quiet --compile-bytecode --python "$VENV/bin/python" -e "$what" && return 0
    say "uv could not install the project; trying pip"
  fi
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip --upgrade >/dev/null
  local pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
  "${pip[@]}" --upgrade pip || true # an old one builds packages in ways that are going away
  PYTHONWARNINGS=ignore "${pip[@]}" -e "$what"
}

# What DeepSpeed's collectives on CPUs need to be compiled: a C++ compiler and Python's headers.
install_compiler() {
  local missing=() include
  command -v g++ >/dev/null || missing+=(g++)
  include=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  [ -f "$include/Python.h" ] || missing+=(python3-dev)
  [ ${#missing[@]} = 0 ] || apt_install "${missing[@]}" || say "without them training on CPUs cannot start"
}

build_native() {
  # What a killed build left would be waited for for ever, by torch versions that lock with a file.
  rm -f "$TORCH_EXTENSIONS_DIR"/*/lock
  "$VENV/bin/python" - <<'PY'
import torch

from coconut.utils.distributed import prepare_native_builds

prepare_native_builds()

if not torch.cuda.is_available():  # GPUs use NCCL and need no build
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()
PY
}

fingerprint() { # changes when what is to be installed does
  { cat "$ROOT/pyproject.toml" && "$VENV/bin/python" -VV && echo "$ROOT"; } | sha256sum | cut -d' ' -f1
}

setup() { # setup [dev]
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$ROOT/.cache/torch_extensions}
  local extra=${1:-} stamp now
  section "Setting up${extra:+ ($extra)}"
  make_venv
  now=$(fingerprint)
  stamp=$VENV/.installed${extra:+-$extra}
  if [ "$now" = "$(cat "$stamp" 2>/dev/null)" ] || [ "$now" = "$(cat "$VENV/.installed-dev" 2>/dev/null)" ]; then
    say "installed already: $VENV"
  else
    say "installing into $VENV; the first time this fetches some 5 GB"
    install_project "$extra"
    echo "$now" >"$stamp"
  fi
  if [ "$now" != "$(cat "$TORCH_EXTENSIONS_DIR/.built" 2>/dev/null)" ]; then
    install_compiler
    say "compiling DeepSpeed's CPU collectives, once; up to a minute"
    mkdir -p "$TORCH_EXTENSIONS_DIR"
    (
      flock 9 # one build at a time
      build_native
    ) >"$TORCH_EXTENSIONS_DIR/build.log" 2>&1 9>"$TORCH_EXTENSIONS_DIR/.building" || {
      tail -n 20 "$TORCH_EXTENSIONS_DIR/build.log" >&2
      fail "the build failed; all of it is in $TORCH_EXTENSIONS_DIR/build.log"
    }
    echo "$now" >"$TORCH_EXTENSIONS_DIR/.built"
  fi
  export VIRTUAL_ENV=$VENV PATH="$VENV/bin:$PATH"
  unset PYTHONHOME
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  case ${1:-} in
    '' | app | dev) setup "${1:-}" ;;
    *) fail "usage: bash launch/setup.sh [app|dev]" ;;
  esac
fi
