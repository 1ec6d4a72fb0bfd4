#!/usr/bin/env bash
# Every command of docs/first-week.md as it stands there, on generated bitewings, with a small network and short
# trainings (tools/bitewings.json). Takes some seven minutes of processor time; all files go to the folder given
# as the only argument (default: bitewings).
source "$(dirname "$0")/start.sh"

# 160 films without labels, and 40 labelled ones
python tools/prepare_data.py --action create-sample --output-dir "$out/made" \
    --image-size 64 --num-unlabelled 160 --num-samples 40 --train-images 39 --seed 0

# two films a patient: p001_left, p001_right, p002_left, ...
name_films() {
    local number=$1 film side
    for film in "$2"/*.png; do
        side=$((number % 2 == 0 ? 0 : 1))
        sides=(left right)
        mv "$film" "$3/$(printf 'p%03d_%s.png' $((number / 2)) "${sides[side]}")"
        number=$((number + 1))
    done
}
mkdir -p "$out/films" "$out/made/IMG" "$out/made/MASK"
for kind in IMG MASK; do
    mv "$out/made/Split/VAL/$kind"/*.png "$out/made/Split/TRAIN/$kind"
    name_films 2 "$out/made/Split/TRAIN/$kind" "$out/made/$kind"
done
name_films 42 "$out/made/unlabelled" "$out/films"

# the labels as LabelMe's files, beside copies of their films
python tools/export_labels.py "$out/made/MASK" "$out/made/IMG" "$out/made/exported" --format labelme \
    --categories flags/categories.json
mv "$out/made/exported/labelme" "$out/annotated"

for folder in scripts tools flags; do
    ln -s "$PWD/$folder" "$out/$folder"
done
python tools/documentation/run_page.py docs/first-week.md "$out" --toy tools/bitewings.json
