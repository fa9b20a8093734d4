#!/usr/bin/env bash
# Measures on a machine with a GPU, within eight minutes, and installs nothing.
#
#   scripts/bench_gpu.sh [--wheels=FOLDER] [--out=FILE.json] [flags of bench_gpu.py]
#
# Runs with the system's Python 3.11 or 3.12 (ASYNCAGENT_PYTHON names another) and its torch >= 2.11.
# What is missing there is looked for in FOLDER (default: wheels/): packages lying unpacked there, or
# wheels (*.whl), which are unpacked into a temporary folder.  To fill it on a machine with network:
#
#   pip download -d wheels --no-deps --only-binary=:all: optree tyro docstring_parser typeguard \
#     uvloop ale-py gymnasium Farama-Notifications cloudpickle
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
wheels=$root/wheels
flags=()
for flag in "$@"; do
  case $flag in
    --wheels=*) wheels=${flag#--wheels=} ;;
    *) flags+=("$flag") ;;
  esac
done

die() { printf 'bench_gpu: %s\n' "$*" >&2; exit 2; }

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; }

python=""
for name in ${ASYNCAGENT_PYTHON:-python3 python3.12 python3.11}; do
  if fits "$name"; then python=$name; break; fi
done
[[ -n $python ]] || die "no Python 3.11 or 3.12 on PATH; ASYNCAGENT_PYTHON may name one"

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if [[ -d $wheels ]]; then
  unpacked=$(mktemp -d)
  trap 'rm -rf "$unpacked"' EXIT
  for wheel in "$wheels"/*.whl; do
    [[ ! -e $wheel ]] || "$python" -m zipfile -e "$wheel" "$unpacked"
  done
  PYTHONPATH+=:$unpacked:$(readlink -f "$wheels")
fi
"$python" "$root/scripts/bench_gpu.py" "${flags[@]}"
