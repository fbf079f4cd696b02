#!/usr/bin/env bash
# Checks, then measures the CUDA driver on a machine with one GPU; each part ends within ten minutes.
#
#   benchmarks/gpu_check.sh correct|kernels|table|guests [FOLDER OF WHEELS]
#
#   correct   the driver's tests on the GPU, with several workers where pytest-xdist is there: contract, kernels against
#             plain operations, graphs, faults; then those that need the GPU to themselves
#   kernels   every kernel by itself against its own floor, with a sweep of attention tilings
#   table     decode, prefill and the mixed workload of 0.6B and 8B; vLLM's result files in $PEERS give ratios
#   guests    decode and the mixed workload by the bare loop and by programs; needs pie installed with what it depends
#             on, or its wheels
#
# Wheels of what the machine's Python lacks are installed into a folder of their own. Results go to $OUT.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:?correct, kernels or table}
wheels=${2:-}
out=${OUT:-results}
[ -e pie_plugins ] || ln -s plugins pie_plugins # where a copy of the tree lost the link
site=${TMPDIR:-/tmp}/pie-gpu-site
mkdir -p "$out"
if [ -n "$wheels" ] && [ ! -d "$site" ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl || exit
fi
export PYTHONPATH=".:$site" PYTHONUNBUFFERED=1 FLASHINFER_DISABLE_JIT=1
python3 -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())'
case $part in
  correct)
    options="-q -p no:cacheprovider -p no:benchmark" # the last does not go with workers
    workers=$(python3 -c 'import xdist' 2>/dev/null && echo "-n 12 --dist worksteal")
    failed=0
    timeout 460 python3 -m pytest $options $workers -m "not alone" tests/plugins/drivers/cuda_native tests/gpu 2>&1 |
      tee "$out/tests.log" | tail -40 || failed=1
    timeout 120 python3 -m pytest $options -m alone tests/gpu 2>&1 | tee "$out/alone.log" | tail -30 || failed=1
    exit $failed
    ;;
  kernels)
    timeout 280 python3 -m benchmarks.gpu_kernels --models 0.6B --sweep --json "$out/kernels_0.6B.json" || true
    timeout 280 python3 -m benchmarks.gpu_kernels --models 8B --json "$out/kernels_8B.json" || true
    ;;
  table)
    for model in 0.6B 8B; do
      timeout 280 python3 -m benchmarks.gpu --models $model --mixed --json "$out/gpu_$model.json" \
        --vllm ${PEERS:-} || true
    done
    ;;
  guests)
    for model in 0.6B 8B; do
      timeout 280 python3 -m benchmarks.gpu --models $model --batches 1 32 256 --prefill --guests --mixed \
        --json "$out/guests_$model.json" --vllm ${PEERS:-} || true
    done
    ;;
  *) echo "benchmarks/gpu_check.sh: unknown part '$part'" >&2; exit 2 ;;
esac
