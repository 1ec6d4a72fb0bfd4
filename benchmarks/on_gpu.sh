#!/usr/bin/env bash
# All that a CUDA card is needed for, in one command and within nine minutes: the tests that need one, losses in
# float16 and bfloat16 against float32, memory and speed of flags/unet.sh, the longest kernels.
#
#     benchmarks/on_gpu.sh [--toy] [FOLDER]
#
# Without a card, or with --toy, what can run runs with a tiny network. Needs no network and installs nothing.
# FOLDER (default: on_gpu_results) gets summary.txt, results.json, losses.png, logs/STEP.log and json/STEP.json.
# Each step has its own time limit, and none stops the others; the exit code is 1 if one failed.
# PYTHON names the interpreter, LIMIT_S the seconds for all steps; GUIDED_DIFFUSION_DEVICE=cpu leaves the card alone.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$(command -v python3 || command -v python)}
total=${LIMIT_S:-530}
toy=
if [ "${1:-}" = --toy ]; then
    toy=yes
    shift
fi
out=${1:-on_gpu_results}
case $out in
-*)
    echo "error: $out: usage: benchmarks/on_gpu.sh [--toy] [FOLDER]" >&2
    exit 2
    ;;
esac
if [ -e "$out/steps.tsv" ]; then
    echo "error: $out holds the results of an earlier run: remove it, or name another folder" >&2
    exit 2
fi
mkdir -p "$out/logs" "$out/json" || exit 2
out=$(cd "$out" && pwd)
cd "$root" || exit 2
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset OPENAI_LOGDIR

timeout 90 "$python" benchmarks/environment.py --json "$out/json/environment.json" 2>&1 | tee "$out/logs/environment.log"
[ "${PIPESTATUS[0]}" = 0 ] || exit 2
: >"$out/steps.tsv"

# a value of environment.json
found() {
    "$python" -c 'import json, sys; print(json.load(open(sys.argv[1])).get(sys.argv[2], ""))' \
        "$out/json/environment.json" "$1"
}

record() { # NAME STATUS SECONDS REASON
    printf '%s\t%s\t%s\t%s\n' "$@" >>"$out/steps.tsv"
    printf '%-18s %s %4s s  %s\n' "$@"
}

child=
trap 'if [ -n "$child" ]; then kill "$child" 2>/dev/null; fi; exit 130' INT TERM

step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 began=$SECONDS code reason='' status=passed
    shift 2
    if ((limit > total - SECONDS)); then limit=$((total - SECONDS)); fi
    if ((limit < 5)); then
        record "$name" skipped 0 "no time left of $total s"
        return
    fi
    timeout -k 5 "$limit" "$@" >"$out/logs/$name.log" 2>&1 </dev/null &
    child=$!
    wait "$child"
    code=$?
    child=
    if [ "$code" != 0 ]; then
        status=FAILED
        reason="exit code $code"
        if [ "$code" = 124 ] || [ "$code" = 137 ]; then reason="stopped after $limit s"; fi
    fi
    record "$name" "$status" "$((SECONDS - began))" "$reason"
}

skip() { # NAME REASON
    record "$1" skipped 0 "$2"
}

device=$(found device)
memory=$(found memory_gb)
if [ "$device" = cpu ] && [ -z "$toy" ]; then
    echo "no CUDA card: a tiny network on the CPU"
    toy=yes
fi

if [ -n "$toy" ]; then
    MODEL_FLAGS="--image_size 16 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --attention_resolutions 8"
    MODEL_FLAGS="$MODEL_FLAGS --num_head_channels 16 --resblock_updown True --learn_sigma True --use_fp16 True"
    DIFFUSION_FLAGS="--diffusion_steps 4000 --noise_schedule cosine --rescale_learned_sigmas True"
    TRAIN_FLAGS="--lr 1e-3 --batch_size 4 --microbatch 1"
    size=16 images=8 steps=8 batch=2 rounds=1 samplers=ddim:2
else
    source flags/unet.sh
    size=256 images=24 steps=300 batch=1 rounds=5 samplers=ddim:10,dpm++2m:10,heun:5
    # images that are computed at once: as many as the memory is sure to hold
    if [ "${memory%.*}" -ge 70 ]; then batch=8; elif [ "${memory%.*}" -ge 38 ]; then batch=4; fi
    # a step of several images at once is the same step, but shorter
    if [ "$batch" != 1 ]; then TRAIN_FLAGS="$TRAIN_FLAGS --microbatch -1"; fi
fi
unset OPENAI_LOGDIR
MODEL_FLAGS="$MODEL_FLAGS --in_channels 1 --device $device"
precisions=fp32
if [ "$device" = cuda ]; then precisions=fp32,fp16,bf16; fi
bench() { # NAME SECONDS SCRIPT FLAGS...
    local name=$1 limit=$2 script=$3
    shift 3
    step "$name" "$limit" "$python" "benchmarks/$script" --json "$out/json/$name.json" "$@"
}

missing=$(found missing_for_tests)
if [ "$missing" = "[]" ]; then
    step tests 200 "$python" -m pytest -p no:cacheprovider -rs --tb short --durations 5 tests/test_cuda.py \
        tests/test_precision.py::TestOnGpu tests/test_logger.py::TestGpu \
        tests/segmentation/inference/test_predict.py::test_cuda_agrees_with_the_cpu
else
    skip tests "not installed: $missing"
fi

step radiographs 60 "$python" tools/prepare_data.py --action create-sample --output-dir "$out/radiographs" \
    --image-size "$size" --num-unlabelled "$images" --num-samples 2 --train-images 1 --seed 0
bench losses 160 precision_losses.py --data_dir "$out/radiographs/unlabelled" --steps "$steps" --seconds 100 \
    --picture "$out/losses.png" $MODEL_FLAGS $DIFFUSION_FLAGS $TRAIN_FLAGS

for precision in fp32 fp16 bf16; do
    if [ "$device" = cpu ] && [ "$precision" = fp16 ]; then
        skip memory_fp16 "needs a CUDA card"
    else
        bench "memory_$precision" 45 step_memory.py --precision "$precision" --batch_size 4 --microbatch 1 \
            --limit_gb 8 $MODEL_FLAGS
    fi
done

bench train_step 90 train_step.py --precision "$precisions" --batch_size "$batch" --rounds "$rounds" --peer none \
    $MODEL_FLAGS
bench inference 60 inference.py --precision "$precisions" --batch_sizes "1,$batch" --sizes "$size" \
    --rounds "$rounds" --peer none $MODEL_FLAGS
bench sampling 60 sampling.py --precision "$precisions" --batch_size "$batch" --samplers "$samplers" --rounds 1 \
    $MODEL_FLAGS
bench kernels 80 train_step.py --precision "$precisions" --batch_size "$batch" --rounds 1 --peer none --profile 10 \
    $MODEL_FLAGS
if [ "$device" = cpu ]; then
    skip compiled "needs a CUDA card"
elif [ -z "$(found compiler)" ] || [ "$(found triton)" != True ]; then
    skip compiled "torch's compiler needs triton and a C compiler"
else # the benchmarks' own network, which compiles sooner, as a CUDA graph
    bench compiled 120 sampling.py --compile True --precision bf16 --samplers ddim:10 --rounds 3 --device cuda
fi

rm -rf "$out/radiographs"
echo
"$python" benchmarks/on_gpu_summary.py "$out"
code=$?
if [ "$device" = cpu ]; then
    echo "Not run, for want of a CUDA card: float16, NCCL, CUDA graphs, torch.compile, the card's memory and kernels."
fi
exit "$code"
