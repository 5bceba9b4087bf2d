#!/usr/bin/env bash
# Train CCNet and evaluate it.
#
#   ./run_local.sh [flags]                 a complete small run on generated street scenes, on any machine
#   ./run_local.sh YOUR_CS_PATH [flags]    the paper's recipe on Cityscapes, or another data set, at YOUR_CS_PATH
#   ./run_local.sh --check                 sets everything up, and checks the operators on this machine
#
# It uses all GPUs of the machine. Flags are those of train.py; evaluate.py gets those that it has too. Each value below
# can also be set by the environment variable of its name, e.g. BS=4 ./run_local.sh YOUR_CS_PATH. Run again after an
# interruption, it resumes; run again with more STEPS, it extends the run.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

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

CS_PATH=
if [[ $# -gt 0 && $1 != -* ]]; then
    [[ -d $1 ]] || fail "$1: expected the folder of a data set, there is no such folder"
    CS_PATH=$(CDPATH= cd -- "$1" && pwd)
    [[ ! -d $CS_PATH/leftImg8bit || -d $CS_PATH/leftImg8bit/val ]] || fail "$CS_PATH: expected leftImg8bit/val/ in it, to evaluate on after training"
    shift
fi
for argument in "$@"; do
    case $argument in
        --data-dir | --data-dir=*) fail "--data-dir: give the path as the first argument" ;;
    esac
done
cd "$(dirname "${BASH_SOURCE[0]}")"
source utils/environment.sh
DEVICE=$(last_value --device auto "$@")
set_up_environment requirements.txt
for argument in "$@"; do
    case $argument in
        -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' run_local.sh && exec python train.py --help ;;
        --check)
            python -m building.plan --device "$DEVICE" || exit
            exec python -m cc_attention
            ;;
    esac
done

if [[ -n $CS_PATH ]]; then
    SCENES=
    BACKBONE=${BACKBONE:-resnet101}
    INPUT_SIZE=${INPUT_SIZE:-769,769}
    BS=${BS:-8}
    STEPS=${STEPS:-60000}
    SAVE_EVERY=${SAVE_EVERY:-1000}
    SNAPSHOT_DIR=${SNAPSHOT_DIR:-snapshots}
    RESTORE_FROM=${RESTORE_FROM-dataset/resnet101-imagenet.pth}
    OHEM=${OHEM:-0}
    OHEM_KEEP=${OHEM_KEEP:-100000}
else
    SCENES=1
    CS_PATH=data/scenes
    BACKBONE=${BACKBONE:-resnet18}
    INPUT_SIZE=${INPUT_SIZE:-48,192}
    BS=${BS:-8}
    STEPS=${STEPS:-200}
    SAVE_EVERY=${SAVE_EVERY:-50}
    SNAPSHOT_DIR=${SNAPSHOT_DIR:-snapshots/scenes}
    RESTORE_FROM=${RESTORE_FROM-}
    OHEM=${OHEM:-1}
    OHEM_KEEP=${OHEM_KEEP:-2000}
fi
LR=${LR:-} # train.py's: the recipe's 1e-2, or the fine-tuning stage's
WD=${WD:-1e-4}
[[ $(last_value --head rcca "$@") != rcca ]] || RECURRENCE=${RECURRENCE:-2}
RECURRENCE=${RECURRENCE:-0}
OHEM_THRES=${OHEM_THRES:-0.7}

# A flag wins over the variable.
BACKBONE=$(last_value --backbone "$BACKBONE" "$@")
RESTORE_FROM=$(last_value --restore-from "$RESTORE_FROM" "$@")
RECURRENCE=$(last_value --recurrence "$RECURRENCE" "$@")
STEPS=$(last_value --num-steps "$STEPS" "$@")
SNAPSHOT_DIR=$(last_value --snapshot-dir "$SNAPSHOT_DIR" "$@")
if [[ $RESTORE_FROM == dataset/resnet101-imagenet.pth ]]; then
    if [[ $BACKBONE != resnet101 ]]; then
        RESTORE_FROM= # the weights are ResNet-101's: another backbone starts from scratch unless told what from
    elif [[ ! -e $RESTORE_FROM ]]; then
        fail "$RESTORE_FROM: expected the ImageNet weights; README.md says where they are; RESTORE_FROM=torchvision takes torchvision's, RESTORE_FROM= trains from scratch"
    fi
fi
TRAIN=(
    --data-dir "$CS_PATH" --backbone "$BACKBONE" --input-size "$INPUT_SIZE" --recurrence "$RECURRENCE" --gpu all
    --random-mirror --batch-size "$BS" --weight-decay "$WD" --ohem "$OHEM" --ohem-thres "$OHEM_THRES"
    --ohem-keep "$OHEM_KEEP" --save-pred-every "$SAVE_EVERY" --resume
)
[[ -z $LR ]] || TRAIN+=(--learning-rate "$LR")
[[ -z $RESTORE_FROM ]] || TRAIN+=(--restore-from "$RESTORE_FROM")
if [[ -n $SCENES ]]; then
    TRAIN+=(--initial-gamma 1) # from the paper's 0 the attention does not get going in a run of minutes
else
    TRAIN+=(--random-scale) # a crop of a scene could lose the cue that tells the class
fi
TRAIN+=("$@") # the last value of a flag counts
BOTH=$(python -m utils.commandline "${TRAIN[@]}")
mapfile -t EVALUATE <<<"$BOTH"

# SIGTERM to this script alone is passed on, so that training saves before it ends; Ctrl-C reaches it anyway.
train() {
    python train.py "${TRAIN[@]}" "$@" &
    local child=$! status=0
    trap 'kill -TERM "$child" 2>/dev/null || true' TERM
    trap : INT
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the child
        status=0
        wait "$child" || status=$?
    done
    trap - TERM INT
    return "$status"
}

if [[ -n $SCENES ]]; then
    python -m dataset.scenes --output "$CS_PATH"
    echo "== the same network without attention, to compare with"
    WITHOUT=$SNAPSHOT_DIR/without_attention
    train --head rcca --recurrence 0 --num-steps "$STEPS" --snapshot-dir "$WITHOUT"
    python evaluate.py "${EVALUATE[@]}" --head rcca --recurrence 0 --restore-from "$WITHOUT/CS_scenes_$STEPS.pth" \
        --output-dir "$WITHOUT/val"
    echo "== with attention"
    EVALUATE+=(--compare-with "$WITHOUT/val/result.json")
    if [[ $RECURRENCE -gt 0 ]]; then # of one vehicle, and of a building
        EVALUATE+=(--compare-recurrence 0 1 2 3 --attention-image hafen_000006_000019 --attention 36,172 --attention 14,130)
    fi
fi
train --num-steps "$STEPS" --snapshot-dir "$SNAPSHOT_DIR"
python evaluate.py "${EVALUATE[@]}" --restore-from "$SNAPSHOT_DIR/CS_scenes_$STEPS.pth"
