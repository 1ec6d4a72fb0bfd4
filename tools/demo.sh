#!/usr/bin/env bash
# The whole pipeline on generated bitewings, with the commands that a user would type. Takes 15 minutes on
# two CPU cores without AVX-512; all results go to the folder given as the only argument (default: demo).
source "$(dirname "$0")/start.sh"
source flags/demo.sh
export OPENAI_LOGDIR="$out/pretrained"

# 600 unlabelled radiographs, 8 labelled ones, and 24 held-out ones from another seed
run python tools/prepare_data.py --action create-sample --output-dir "$out/data" \
    --image-size 64 --num-unlabelled 600 --num-samples 9 --train-images 8 --seed 0
run python tools/prepare_data.py --action create-sample --output-dir "$out/held_out" \
    --image-size 64 --num-unlabelled 0 --num-samples 25 --train-images 1 --seed 1

run python scripts/image_train.py --data_dir "$out/data/unlabelled" \
    $MODEL_FLAGS $DIFFUSION_FLAGS $TRAIN_FLAGS
checkpoint=$(ls "$out"/pretrained/ema_*.pt | tail -n 1)

# 400 steps each; two labelled radiographs: the pretrained network, and the same one from random weights
train="$out/data/Split/TRAIN"
truth="$out/held_out/Split/VAL"
for kind in pretrained scratch; do
    flags="--train_names train_0000,train_0001 --steps 400"
    if [ "$kind" = scratch ]; then flags="$flags --random_init True"; fi
    run python scripts/finetune.py "$checkpoint" "$train/IMG" "$train/MASK" $flags \
        --categories flags/categories.json --weights_save "$out/$kind/segm.pth"
    run python scripts/predict.py "$out/$kind/segm.pth" "$truth/IMG" "$out/$kind/results"
    run python scripts/evaluate.py "$out/$kind/results/MASK" "$truth/MASK" \
        --categories flags/categories.json --output "$out/$kind/evaluation"
done

# 1 to 8 labelled radiographs, against a network with ImageNet weights and random weights
run python scripts/label_efficiency.py "$train/IMG" "$train/MASK" "$truth/IMG" "$truth/MASK" \
    --checkpoint "$checkpoint" --categories flags/categories.json --k 1,2,4,8 --seeds 0 --steps 400 \
    --methods recipe,imagenet,scratch --output "$out/comparison"

run python tools/demo_report.py "$out"
