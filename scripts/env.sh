# Sourced by the scripts: a virtual environment in .venv (or $VDOT_VENV) with the package and the named extras.
#   use_env            core only          use_env dev train   with extras
# A stamp of what was installed makes the second call free.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VDOT_VENV:-$ROOT/.venv}"

use_env() {
  local extras stamp wanted
  extras="$(IFS=,; echo "$*")"
  stamp="$VENV/.vdot-installed"
  wanted="$(cat "$ROOT/setup.py" "$ROOT/requirements.txt" | cksum) [$extras]"
  if [ ! -x "$VENV/bin/python" ]; then
    echo "making a virtual environment in $VENV"
    "${PYTHON:-python3}" -m venv "$VENV" || { echo "error: python3 with venv is needed (on Debian: apt-get install python3-venv)" >&2; exit 2; }
    "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed; set PYTHON=/path/to/python3.x" >&2; exit 2; }
  fi
  if ! grep -qxF "$wanted" "$stamp" 2>/dev/null; then
    echo "installing vdot${extras:+ with $extras} (once; a few minutes)"
    # torch first and within our range: an unpinned one would bring gigabytes of CUDA to a machine without a GPU
    "$VENV/bin/python" -m pip install -q --disable-pip-version-check -c "$ROOT/requirements.txt" "torch>=2.6,<2.14" &&
      "$VENV/bin/python" -m pip install -q --disable-pip-version-check -c "$ROOT/requirements.txt" -e "$ROOT${extras:+[$extras]}" ||
      { echo "error: installation failed; its messages are above" >&2; exit 2; }
    echo "$wanted" >>"$stamp"
  fi
  export PATH="$VENV/bin:$PATH"
}

# recipe TASK CLIP PICTURE PROMPT [options]: a task of vace_preprocess.py with its three main inputs by place.
recipe() {
  local task="$1" prompt
  shift
  if [ $# -lt 3 ] || [ "$1" = "--help" ] || [ "$1" = "-h" ]; then
    sed -n '2,/^set -/s/^# \{0,1\}//p' "${BASH_SOURCE[1]}"
    [ $# -ge 1 ] && [[ "$1" = "--help" || "$1" = "-h" ]] && exit 0
    echo "error: give a clip, a picture and a prompt (\"\" to prepare only)" >&2
    exit 2
  fi
  local args=(--task "$task" --video "$1" --image "$2")
  prompt="$3"
  shift 3
  [ -n "$prompt" ] && args+=(--prompt "$prompt")
  use_env
  python "$ROOT/inference/vace_preprocess.py" "${args[@]}" "$@"
}
