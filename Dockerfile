# Steepest on a CPU: docker build -t steepest . && docker run --rm -it steepest quickstart
# Runs are kept in a volume: docker run --rm -it -v "$PWD/checkpoints:/runs/checkpoints" steepest ppo --config my.yaml
# For CUDA cards name an index with CUDA builds: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
FROM python:3.12-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/steepest
COPY pyproject.toml README.md LICENSE ./
COPY steepest ./steepest
# versions are those of pyproject.toml
# hadolint ignore=DL3013
RUN pip install --extra-index-url "$TORCH_INDEX" "torch>=2.10,<2.14" \
  && pip install ".[tensorboard,gguf,modelscope]" \
  && useradd --create-home steepest \
  && install --directory --owner=steepest /runs

# hadolint ignore=DL3066
USER steepest
WORKDIR /runs
ENTRYPOINT ["steepest"]
CMD ["--help"]
