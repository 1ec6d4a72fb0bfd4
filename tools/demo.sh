#!/usr/bin/env bash
# The whole pipeline on generated bitewings, with the commands that a user would type. Takes 5 minutes on
# two CPU cores with AVX-512; all results go to the folder given as the only argument (default: demo).
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

# 400 steps on two labelled radiographs, those that the comparison below draws
train="$out/data/Split/TRAIN"
truth="$out/held_out/Split/VAL"
run python scripts/finetune.py "$checkpoint" "$train/IMG" "$train/MASK" --categories flags/categories.json \
    --train_names train_0004,train_0005 --steps 400 --weights_save "$out/pretrained/segm.pth"

# 1 to 4 labelled radiographs: each network alone, both together (`partner`), and random weights; the ImageNet network
# at its best rate for these
imagenet="baseline_train.py --network smp --encoder tu-tf_efficientnet_lite0 --encoder_weights imagenet --lr 3e-2"
run python scripts/label_efficiency.py "$train/IMG" "$train/MASK" "$truth/IMG" "$truth/MASK" \
    --checkpoint "$checkpoint" --categories flags/categories.json --k 1,2,4 --seeds 0 --steps 400 \
    --method "imagenet: $imagenet" --methods partner,recipe,imagenet,scratch --keep_models --output "$out/comparison"

# the three networks of two labelled radiographs
mkdir "$out/imagenet" "$out/scratch"
for kind in imagenet scratch; do
    cp "$out/comparison/runs/${kind}_k2_seed0/segm.pth" "$out/$kind"
done
for kind in pretrained imagenet scratch; do
    run python scripts/predict.py "$out/$kind/segm.pth" "$truth/IMG" "$out/$kind/results"
    run python scripts/evaluate.py "$out/$kind/results/MASK" "$truth/MASK" \
        --categories flags/categories.json --output "$out/$kind/evaluation"
done

run python tools/demo_report.py "$out"
