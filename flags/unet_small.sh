# The family of flags/unet.sh at 64x64, small enough to train on a CPU. For `source` in bash and zsh.

# width 32 on 4 levels, 1,2,3,4 wide (the default at 64 pixels), one residual block per level:
# 4.5 million parameters
MODEL_FLAGS="--image_size 64 --num_channels 32 --num_res_blocks 1"
# attention where it is cheap; 32 channels per head, since 96 is not a multiple of 64
MODEL_FLAGS="$MODEL_FLAGS --attention_resolutions 16,8 --num_head_channels 32"
MODEL_FLAGS="$MODEL_FLAGS --use_new_attention_order False --resblock_updown True"
MODEL_FLAGS="$MODEL_FLAGS --use_scale_shift_norm True --learn_sigma True"

# without flags/unet.sh's --rescale_learned_sigmas: the figures in docs/ were measured so
DIFFUSION_FLAGS="--diffusion_steps 4000 --noise_schedule cosine"

# a small network tolerates a higher learning rate; the EMA catches up within a few thousand steps
TRAIN_FLAGS="--lr 3e-4 --batch_size 8 --ema_rate 0.999 --log_interval 10 --save_interval 500"
TRAIN_FLAGS="$TRAIN_FLAGS --sample_interval 500 --keep_checkpoints 2"

# 20 steps of a second-order solver
SAMPLE_FLAGS="--num_samples 16 --batch_size 16 --sampler dpm++2m --steps 20 --eta 1"

# also a network with ImageNet weights, see flags/unet.sh
FINETUNE_FLAGS="--partner imagenet"

export OPENAI_LOGDIR="${OPENAI_LOGDIR:-runs/unet_small}"

# zsh does not split variables into words, so make them arrays
if [ -n "${ZSH_VERSION:-}" ]; then
    eval 'MODEL_FLAGS=(${=MODEL_FLAGS}) DIFFUSION_FLAGS=(${=DIFFUSION_FLAGS})'
    eval 'TRAIN_FLAGS=(${=TRAIN_FLAGS}) SAMPLE_FLAGS=(${=SAMPLE_FLAGS})'
    eval 'FINETUNE_FLAGS=(${=FINETUNE_FLAGS})'
fi
