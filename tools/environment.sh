# Sourced by tools/quickstart and tools/test: makes .venv once, keeps it current.
#
#   ready_environment ""        the base list of setup.cfg
#   ready_environment test      with the extra of that name
#
# Leaves the working directory at the repository's root and sets $python. A
# stamp per extra, written last, makes a second call cost milliseconds and an
# interrupted one start over. Set PYTHON to choose the interpreter.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="$PWD/.venv/bin/python"

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
  exit 1
}

find_python() {  # prints an interpreter that can make the environment
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 \
    python3.11 python3.14; do
    # Run it: a version manager's shim may exist for a version that does not.
    if "$candidate" -c 'import sys, venv, ensurepip
sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  local found=""
  for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" --version >/dev/null 2>&1; then
      found+="; $candidate is $("$candidate" --version 2>&1)"
    fi
  done
  fail "needs Python 3.11 or newer with its venv module (on Debian and\
 Ubuntu, python3-venv)${found:-; there is no python3}. Install one, or name\
 one: PYTHON=/path/to/python3.11 $0"
}

stamp_of() {  # changes with the requirements, and with the folder's place
  { pwd -P; printf '%s\n' "$1"; cat setup.cfg pyproject.toml; } | cksum
}

make_venv() {
  if [ -e .venv/pyvenv.cfg ] && [ ! -e .venv/.rlm ]; then
    "$python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' \
      2>/dev/null || fail ".venv was not made by this script and lacks\
 Python >= 3.11 or pip. Move it away and run this again."
    return
  fi
  if [ ! -e .venv/.rlm-incomplete ] && "$python" -c 'import pip' 2>/dev/null
  then
    return
  fi
  local base
  base=$(find_python)
  mkdir -p .venv
  : >.venv/.rlm  # ours, so that a half-made one may be made again
  printf 'Making .venv with %s\n' "$("$base" --version)"
  "$base" -m venv --clear .venv
  : >.venv/.rlm
}

ready_environment() {
  local extra="$1" stamp
  local file=".venv/.rlm-${extra:-base}"
  stamp=$(stamp_of "$extra")
  if [ -x "$python" ] && [ "$(cat "$file" 2>/dev/null)" = "$stamp" ]; then
    return
  fi
  # Two commands started at once: the second waits and then finds the stamp.
  if command -v flock >/dev/null; then
    exec 9<setup.cfg
    flock 9
    if [ "$(cat "$file" 2>/dev/null)" = "$stamp" ]; then
      exec 9<&-
      return
    fi
  fi
  make_venv
  rm -f "$file"
  : >.venv/.rlm-incomplete  # stays if we are killed: then begin from nothing
  printf 'Installing rlm%s into .venv (base list: about 0.8 GB, once)\n' \
    "${extra:+[$extra]}"
  # Without bytecode of what is never imported: a sixth less on disk. The
  # import below writes it for the part that is used, and shows that it works.
  "$python" -m pip install --no-compile --editable ".${extra:+[$extra]}"
  env -u PYTHONDONTWRITEBYTECODE JAX_PLATFORMS=cpu "$python" -c '
import chex, flax.linen, grain, jax, jinja2, matplotlib.pyplot, ml_collections
import optax, orbax.checkpoint, rich.live, safetensors.numpy, tensorboardX
import tokenizers
import rlm
assert jax.jit(lambda x: x + 1)(1.0) == 2.0'
  printf '%s\n' "$stamp" >"$file"
  rm .venv/.rlm-incomplete
  if command -v flock >/dev/null; then
    exec 9<&-
  fi
}
