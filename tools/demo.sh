#!/usr/bin/env bash
# The whole pipeline on generated bitewings, with the commands that a user would type. Takes a few minutes on
# two CPU cores; all results go to the folder given as the only argument (default: demo).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-demo}
if [ -e "$out" ]; then
    echo "error: $out exists: remove it, or name another folder" >&2
    exit 2
fi

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

unset OPENAI_LOGDIR
source flags/demo.sh
export OPENAI_LOGDIR="$out/pretrained"

# 600 unlabelled radiographs; 8 labelled ones to train on, 8 to select the best epoch on, and 24 held-out ones
# from another seed
run python tools/prepare_data.py --action create-sample --output-dir "$out/data" \
    --image-size 64 --num-unlabelled 600 --num-samples 16 --train-images 8 --seed 0
run python tools/prepare_data.py --action create-sample --output-dir "$out/held_out" \
    --image-size 64 --num-unlabelled 0 --num-samples 25 --train-images 1 --seed 1

run python scripts/image_train.py --data_dir "$out/data/unlabelled" \
    $MODEL_FLAGS $DIFFUSION_FLAGS $TRAIN_FLAGS
checkpoint=$(ls "$out"/pretrained/ema_*.pt | tail -n 1)

split="$out/data/Split"
truth="$out/held_out/Split/VAL"
for kind in pretrained scratch; do
    flags="--lr 2e-3 --epochs 100 --batch_size 4 --val_interval 25"
    if [ "$kind" = scratch ]; then flags="$flags --random_init True"; fi
    run python scripts/finetune.py "$checkpoint" "$split/TRAIN/IMG" "$split/TRAIN/MASK" \
        "$split/VAL/IMG" "$split/VAL/MASK" $flags --weights_save "$out/$kind/segm.pth"
    run python scripts/predict.py "$out/$kind/segm.pth" "$truth/IMG" "$out/$kind/results"
    run python scripts/evaluate.py "$out/$kind/results/MASK" "$truth/MASK" \
        --categories flags/categories.json --output "$out/$kind/evaluation"
done

run python tools/demo_report.py "$out"
