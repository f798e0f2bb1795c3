#!/usr/bin/env bash
# Makes .venv for the GPU of this machine: torch built for the CUDA that its driver speaks, adapters_kit and bitsandbytes.
#   bash examples/gpu/setup.sh            # PYTHON=python3.12 chooses another Python; DRY=1 prints what it would do
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "$python is $("$python" -V 2>&1); adapters_kit needs Python 3.11 or newer: PYTHON=python3.12 bash $0" >&2
  exit 1
}
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  cuda=$(nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9]*\)\.\([0-9]*\).*/\1\2/p' | head -1)
  # The newest build of torch that the driver can run.
  index=cu126
  for known in cu128 cu130; do
    if [ "${cuda:-0}" -ge "${known#cu}" ]; then index=$known; fi
  done
  if [ "${cuda:-0}" -lt 126 ]; then
    echo "the driver speaks CUDA ${cuda:-?} (12.6 is written 126): torch needs 12.6 or newer. Update the driver first." >&2
    exit 1
  fi
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
else
  echo "no NVIDIA driver answers here: torch for the CPU is taken" >&2
  index=cpu
fi
do_it() { echo "+ $*"; [ "${DRY:-}" = 1 ] || "$@"; }
do_it "$python" -m venv .venv
do_it .venv/bin/pip install --quiet "torch>=2.11" --index-url "https://download.pytorch.org/whl/$index"
do_it .venv/bin/pip install --quiet -e ".[quantize,gguf,plots,metrics]"
do_it .venv/bin/adapters-kit doctor
