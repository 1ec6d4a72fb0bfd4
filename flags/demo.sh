# The family of flags/unet.sh at 64x64, small enough to pretrain within minutes on two CPU cores.
# `make demo` uses it. For `source` in bash and zsh.

# width 16: 1.3 million parameters
MODEL_FLAGS="--image_size 64 --num_channels 16 --num_res_blocks 1 --channel_mult 1,2,4,4"
MODEL_FLAGS="$MODEL_FLAGS --attention_resolutions 8 --num_head_channels 16"
MODEL_FLAGS="$MODEL_FLAGS --use_new_attention_order False --resblock_updown True"
MODEL_FLAGS="$MODEL_FLAGS --use_scale_shift_norm True --learn_sigma True"

# without flags/unet.sh's --rescale_learned_sigmas: the figures in docs/ were measured so
DIFFUSION_FLAGS="--diffusion_steps 4000 --noise_schedule cosine"

# a high learning rate that falls to 0, for a training that is short
TRAIN_FLAGS="--lr 1e-3 --lr_anneal_steps 600 --batch_size 8 --ema_rate 0.995"
TRAIN_FLAGS="$TRAIN_FLAGS --log_interval 20 --save_interval 600 --sample_interval 600"

SAMPLE_FLAGS="--num_samples 16 --batch_size 16 --sampler dpm++2m --steps 20 --eta 1"

export OPENAI_LOGDIR="${OPENAI_LOGDIR:-runs/demo}"

# zsh does not split variables into words, so make them arrays
if [ -n "${ZSH_VERSION:-}" ]; then
    eval 'MODEL_FLAGS=(${=MODEL_FLAGS}) DIFFUSION_FLAGS=(${=DIFFUSION_FLAGS})'
    eval 'TRAIN_FLAGS=(${=TRAIN_FLAGS}) SAMPLE_FLAGS=(${=SAMPLE_FLAGS})'
fi
