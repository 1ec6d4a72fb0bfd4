# Flags for 256x256 radiographs on one GPU. For `source` in bash and in zsh:
#
#     source flags/unet.sh
#     python scripts/image_train.py --data_dir RADIOGRAPHS $MODEL_FLAGS $DIFFUSION_FLAGS $TRAIN_FLAGS
#
# ADM:   "Diffusion Models Beat GANs on Image Synthesis", arXiv 2105.05233
# IDDPM: "Improved Denoising Diffusion Probabilistic Models", arXiv 2102.09672

# the size that ADM trains unguided networks at (table 5, LSUN), and 6 levels, 1,1,2,2,4,4 wide
MODEL_FLAGS="--image_size 256"
# half of ADM's 256 channels, to save memory; ADM table 1 starts its ablation at 128
MODEL_FLAGS="$MODEL_FLAGS --num_channels 128"
# two residual blocks per level: more depth is not worth its training time (ADM section 3, table 1)
MODEL_FLAGS="$MODEL_FLAGS --num_res_blocks 2"
# attention at 32, 16 and 8 pixels instead of 16 alone (ADM section 3, table 1)
MODEL_FLAGS="$MODEL_FLAGS --attention_resolutions 32,16,8"
# 64 channels per head (ADM section 3, table 2), in the order of the published 256x256 network
MODEL_FLAGS="$MODEL_FLAGS --num_head_channels 64 --use_new_attention_order False"
# BigGAN's residual blocks for resampling (ADM section 3, table 1)
MODEL_FLAGS="$MODEL_FLAGS --resblock_updown True"
# adaptive group normalisation (ADM section 3.1, table 3)
MODEL_FLAGS="$MODEL_FLAGS --use_scale_shift_norm True"
# learned variances (IDDPM section 3.1; kept by ADM, section 2.2)
MODEL_FLAGS="$MODEL_FLAGS --learn_sigma True"
# half precision (ADM appendix on hyperparameters); a CPU has none and says what it computes in
MODEL_FLAGS="$MODEL_FLAGS --use_fp16 True"

# 4000 steps (IDDPM section 3, table 1) on the cosine schedule (IDDPM section 3.2)
DIFFUSION_FLAGS="--diffusion_steps 4000 --noise_schedule cosine"
# 0.001 of the variational bound, a sum over all steps (IDDPM section 3.1, equation 16; L_hybrid of
# tables 1 and 2): with 4000 steps 4 times each step's term. ADM's 1000 steps need no factor
DIFFUSION_FLAGS="$DIFFUSION_FLAGS --rescale_learned_sigmas True"

# learning rate 1e-4 and averages of rate 0.9999 (ADM and IDDPM, appendices on hyperparameters);
# 4 images per step, one at a time, to save memory (ADM uses 256 per step, on many GPUs)
TRAIN_FLAGS="--lr 1e-4 --batch_size 4 --microbatch 1 --ema_rate 0.9999 --save_interval 10000"

# 250 of the steps suffice (IDDPM section 4; ADM's tables sample so)
SAMPLE_FLAGS="--num_samples 16 --batch_size 4 --timestep_respacing 250"

# two networks, this one and one with ImageNet weights, averaged by their certainty: the best masks from
# few labels (docs/label-efficiency.md). Needs the extra [imagenet]; without the flag, this one alone
FINETUNE_FLAGS="--partner imagenet"

# where checkpoints, logs and samples go, unless already set
export OPENAI_LOGDIR="${OPENAI_LOGDIR:-runs/unet}"

# zsh does not split variables into words, so make them arrays
if [ -n "${ZSH_VERSION:-}" ]; then
    eval 'MODEL_FLAGS=(${=MODEL_FLAGS}) DIFFUSION_FLAGS=(${=DIFFUSION_FLAGS})'
    eval 'TRAIN_FLAGS=(${=TRAIN_FLAGS}) SAMPLE_FLAGS=(${=SAMPLE_FLAGS})'
    eval 'FINETUNE_FLAGS=(${=FINETUNE_FLAGS})'
fi
