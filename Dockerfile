# The command line in a container.
#   docker build -t adapters-kit .                                                    for the CPU
#   docker build -t adapters-kit:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
#   docker run --rm -v "$PWD:/data" adapters-kit train recipe.yaml
#   docker run --rm --gpus all -v "$PWD:/data" adapters-kit:cuda train recipe.yaml
#   docker run --rm -p 7860:7860 -v "$PWD:/data" adapters-kit ui --host 0.0.0.0 --token SECRET
# torch's CUDA builds bring their own CUDA libraries: both images start from plain Python, the host has the driver.
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 HF_HOME=/data/.cache/huggingface
RUN pip install "torch>=2.11" --index-url "$TORCH_INDEX"

WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE MANIFEST.in ./
COPY adapters_kit adapters_kit
RUN pip install ".[quantize,gguf,plots,metrics,audio,ui]" && rm -rf build

# Run folders belong to whoever starts the container: docker run --user "$(id -u):$(id -g)". That user has no name and no
# home in here, which matplotlib and torch ask for.
ENV HOME=/tmp USER=adapters-kit
WORKDIR /data
ENTRYPOINT ["adapters-kit"]
CMD ["--help"]
