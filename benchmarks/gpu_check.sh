#!/usr/bin/env bash
# Checks, then measures the CUDA driver on a machine with one GPU; each part ends within ten minutes.
#
#   benchmarks/gpu_check.sh correct|kernels|table|guests [FOLDER OF WHEELS]
#
#   correct   the driver's tests on the GPU: contract, kernels against plain operations, graphs, faults
#   kernels   every kernel by itself against its own floor, with a sweep of attention tilings
#   table     decode, prefill and the mixed workload of 0.6B and 8B; vLLM's result files in $PEERS give ratios
#   guests    decode by the bare loop and by programs; needs pie installed with what it depends on, or its wheels
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
    tests=tests/plugins/drivers/cuda_native
    timeout 420 python3 -m pytest -q -p no:cacheprovider --timeout 120 "$tests"/test_*_kernels.py "$tests"/test_driver.py \
      "$tests"/test_*_attention.py "$tests"/test_{products,prompt_graphs,attention_work}.py tests/gpu 2>&1 |
      tee "$out/tests.log" | tail -40
    timeout 150 python3 -m pytest -q -p no:cacheprovider --timeout 60 "$tests"/test_contract.py -k Replayed 2>&1 |
      tee "$out/contract.log" | tail -30
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
      timeout 280 python3 -m benchmarks.gpu --models $model --batches 1 32 256 --prefill --guests \
        --json "$out/guests_$model.json" --vllm ${PEERS:-} || true
    done
    ;;
  *) echo "benchmarks/gpu_check.sh: unknown part '$part'" >&2; exit 2 ;;
esac
