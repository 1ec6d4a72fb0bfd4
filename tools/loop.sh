#!/usr/bin/env bash
# The loop of docs/labelling.md on generated bitewings, with the commands that a user would type: select, draw,
# fine-tune, correct the predictions that teach most, fine-tune again. The known masks of the phantoms stand for
# the person who draws. Takes some minutes on two CPU cores; all results go to the folder given as the only
# argument (default: loop).
source "$(dirname "$0")/start.sh"
source flags/demo.sh
export OPENAI_LOGDIR="$out/pretrained"
films="$out/films"
train="$out/data/Split/TRAIN"
val="$out/data/Split/VAL"
classes="$out/data/Split/categories.json"

# 300 radiographs that nobody has labelled, and 40 to measure on; their true masks are put aside, for the person
run python tools/prepare_data.py --action create-sample --output-dir "$out/generated" \
    --image-size 64 --num-unlabelled 0 --num-samples 340 --train-images 300 --seed 0
mv "$out/generated/Split/TRAIN/IMG" "$films"
mv "$out/generated/Split/TRAIN/MASK" "$out/truth"
mv "$out/generated/Split/VAL" "$out/test"
rm -r "$out/generated"

# a short pretraining: the later flags take the place of those in flags/demo.sh
run python scripts/image_train.py --data_dir "$films" $MODEL_FLAGS $DIFFUSION_FLAGS $TRAIN_FLAGS \
    --lr_anneal_steps 150 --save_interval 150 --sample_interval 0
checkpoint=$(ls "$out"/pretrained/ema_*.pt | tail -n 1)

# What the person at the annotation tool does: $1/labelme gets the true outlines on the radiographs of $1/IMG.
draw() {
    rm -rf "$1/labelme"
    mkdir "$1/MASK"
    for image in "$1"/IMG/*; do
        cp "$out/truth/$(basename "$image")" "$1/MASK/"
    done
    run python tools/export_labels.py "$1/MASK" "$1/IMG" "$1" --format labelme \
        --categories flags/categories.json
}

# Fine-tune on TRAIN as it is now, into the folder $1, and measure on radiographs that are never labelled.
learn() {
    run python scripts/finetune.py "$checkpoint" "$train/IMG" "$train/MASK" "$val/IMG" "$val/MASK" \
        --categories "$classes" --steps 400 --weights_save "$1/segm.pth"
    run python scripts/predict.py "$1/segm.pth" "$out/test/IMG" "$1/test"
    run python scripts/evaluate.py "$1/test/MASK" "$out/test/MASK" --categories "$classes" \
        --output "$1/evaluation"
}

# the first labels: 6 radiographs that stand for the others, of which 2 go to TRAIN and 4 to VAL
run python tools/prepare_data.py --action select --checkpoint "$checkpoint" --image-dir "$films" \
    --k 6 --output-dir "$out/to_label"
draw "$out/to_label"
run python tools/import_labels.py "$out/to_label/labelme" "$out/labelled" \
    --images "$out/to_label/IMG" --categories flags/categories.json
run python tools/prepare_data.py --action organize --source-dir "$out/labelled" \
    --output-dir "$out/data" --train-images 2
cp "$out/labelled/categories.json" "$classes"
learn "$out/round_0"

# two rounds: predict the rest, correct 4 predictions, learn again
for round in 1 2; do
    before="$out/round_$((round - 1))" now="$out/round_$round"
    run python scripts/predict.py "$before/segm.pth" "$films" "$now/results" \
        --label_next 4 --labelled "$train" --export labelme
    draw "$now/results/LABEL_NEXT"
    run python tools/import_labels.py "$now/results/LABEL_NEXT/labelme" \
        --images "$now/results/LABEL_NEXT/IMG" --into "$train"
    learn "$now"
done

run python tools/loop_report.py "$out"
