# The package, its tools and CPU or CUDA torch, for `docker build -t bitewings .`
#
#     docker run --rm bitewings                                               docs/first-week.md at toy size
#     docker run --rm bitewings bash tools/demo.sh demo                       the demo
#     docker run --rm -it --gpus all --ipc=host -v "$PWD:/data" bitewings bash
FROM python:3.11-slim

# gcc builds the kernels for processors with AVX-512, libgomp is their OpenMP
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libgomp1 \
    && rm -rf /var/lib/apt/lists/*

# where torch comes from, an address of pytorch.org's selector; empty: pip's own, with CUDA on x86
ARG TORCH_INDEX=
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision

WORKDIR /guided-diffusion
COPY . .
RUN pip install --no-cache-dir --editable '.[annotations,imagenet,dicom]'

# a user without rights on the system, who may write here
RUN useradd --create-home --uid 1000 user && chown user .
USER 1000

CMD ["bash", "tools/bitewings.sh", "bitewings"]
