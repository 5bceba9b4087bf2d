#!/usr/bin/env bash
# Train CCNet and evaluate it.
#
#   ./run_local.sh [flags]                 a complete small run on generated street scenes, on any machine
#   ./run_local.sh YOUR_CS_PATH [flags]    the paper's recipe on Cityscapes at YOUR_CS_PATH
#
# Flags go to train.py, and those that both know to evaluate.py. Each value below can be set by the environment
# variable of its name as well, e.g. BS=4 ./run_local.sh YOUR_CS_PATH. Run again after an interruption, it goes on.
set -euo pipefail

CS_PATH=
if [[ $# -gt 0 && $1 != -* ]]; then
    [[ -d $1 ]] || { echo "error: $1: expected a folder with leftImg8bit/ and gtFine/, there is no such folder" >&2; exit 2; }
    CS_PATH=$(cd "$1" && pwd)
    shift
fi
cd "$(dirname "${BASH_SOURCE[0]}")"
source utils/environment.sh
set_up_environment requirements.txt

if [[ -n $CS_PATH ]]; then
    BACKBONE=${BACKBONE:-resnet101}
    INPUT_SIZE=${INPUT_SIZE:-769,769}
    BS=${BS:-8}
    STEPS=${STEPS:-60000}
    SAVE_EVERY=${SAVE_EVERY:-1000}
    SNAPSHOT_DIR=${SNAPSHOT_DIR:-snapshots}
    AUGMENTATION=(--random-mirror --random-scale)
    ATTENTION=()
    UNTRAINED=
    DEFAULT_RESTORE_FROM=dataset/resnet101-imagenet.pth
else
    CS_PATH=data/scenes
    python -m dataset.scenes --output "$CS_PATH"
    UNTRAINED=1
    BACKBONE=${BACKBONE:-resnet18}
    INPUT_SIZE=${INPUT_SIZE:-96,192}
    BS=${BS:-8}
    STEPS=${STEPS:-300}
    SAVE_EVERY=${SAVE_EVERY:-50}
    SNAPSHOT_DIR=${SNAPSHOT_DIR:-snapshots/scenes}
    AUGMENTATION=(--random-mirror) # whole scenes: a crop could lose the sign that tells the vehicle's class
    ATTENTION=(--attention 78,160 --attention 35,150) # on the first image: its vehicle, and a building
    DEFAULT_RESTORE_FROM=
fi
LR=${LR:-1e-2}
WD=${WD:-1e-4}
RECURRENCE=${RECURRENCE:-2}
RESTORE_FROM=${RESTORE_FROM-$DEFAULT_RESTORE_FROM}
OHEM=${OHEM:-0}
OHEM_THRES=${OHEM_THRES:-0.7}
OHEM_KEEP=${OHEM_KEEP:-100000}

last_value() { # flag, default, arguments...: the last value given for the flag
    local flag=$1 value=$2
    shift 2
    while [[ $# -gt 0 ]]; do
        case $1 in
            "$flag"=*) value=${1#*=} ;;
            "$flag") value=${2-} ;;
        esac
        shift
    done
    echo "$value"
}

BACKBONE=$(last_value --backbone "$BACKBONE" "$@")
RESTORE_FROM=$(last_value --restore-from "$RESTORE_FROM" "$@")
STEPS=$(last_value --num-steps "$STEPS" "$@")
SNAPSHOT_DIR=$(last_value --snapshot-dir "$SNAPSHOT_DIR" "$@")
# The ImageNet weights are ResNet-101's: another backbone starts from scratch unless told what from.
if [[ $RESTORE_FROM == dataset/resnet101-imagenet.pth && $BACKBONE != resnet101 ]]; then
    RESTORE_FROM=
elif [[ $RESTORE_FROM == dataset/resnet101-imagenet.pth && ! -e $RESTORE_FROM ]]; then
    echo "error: $RESTORE_FROM: expected the ImageNet weights; README.md says where they are, RESTORE_FROM= trains from scratch" >&2
    exit 2
fi
BOTH=(--data-dir "$CS_PATH" --backbone "$BACKBONE")
for pair in --input-size="$INPUT_SIZE" --recurrence="$RECURRENCE" --num-classes= --ignore-label= --device= --gpu= --num-workers=; do
    value=$(last_value "${pair%%=*}" "${pair#*=}" "$@")
    [[ -z $value ]] || BOTH+=("${pair%%=*}" "$value")
done
TRAIN=(
    "${AUGMENTATION[@]}" --batch-size "$BS" --learning-rate "$LR" --weight-decay "$WD" --ohem "$OHEM"
    --ohem-thres "$OHEM_THRES" --ohem-keep "$OHEM_KEEP" --save-pred-every "$SAVE_EVERY"
    ${RESTORE_FROM:+--restore-from "$RESTORE_FROM"}
)

if [[ -n $UNTRAINED ]]; then
    echo "== the network before training"
    python train.py "${BOTH[@]}" "${TRAIN[@]}" "$@" --num-steps 0 --snapshot-dir "$SNAPSHOT_DIR/untrained" --resume
    python evaluate.py "${BOTH[@]}" --restore-from "$SNAPSHOT_DIR/untrained/CS_scenes_0.pth"
    echo "== training"
fi
python train.py "${BOTH[@]}" "${TRAIN[@]}" "$@" --num-steps "$STEPS" --snapshot-dir "$SNAPSHOT_DIR" --resume
python evaluate.py "${BOTH[@]}" --restore-from "$SNAPSHOT_DIR/CS_scenes_$STEPS.pth" \
    --output-dir "$SNAPSHOT_DIR/outputs" "${ATTENTION[@]}"
