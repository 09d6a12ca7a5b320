# syntax=docker/dockerfile:1
# Two images of the server: `gpu` (the default target) and `cpu`.
#
#   docker build -t cmc-server:gpu .
#   docker build -t cmc-server:cpu --target cpu .
#   docker run --gpus all -p 8000:8000 -v cmc-cache:/cache cmc-server:gpu serve MODEL --delta NAME=PATH
#
# Both run as an unprivileged user and write only below /cache and /tmp, so the root file system may be read-only.

# The base images are named here and nowhere else. vLLM's tag is the version in pyproject.toml; a test compares them.
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS cpu
# vLLM's CPU build needs libnuma, and a C++ compiler unless it is started with --enforce-eager.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --home-dir /cache --create-home cmc
WORKDIR /opt/cmc-server
# What the installation reads, without the code: a change of the code leaves the large layer as it is.
COPY pyproject.toml README.md LICENSE ./
COPY deploy/install.sh deploy/requirements-cpu.txt deploy/
COPY cmc_server/__init__.py cmc_server/
RUN PIP_NO_CACHE_DIR=1 CMC_SERVER_ENGINE=cpu bash deploy/install.sh /opt/venv
COPY cmc_server cmc_server
ENV HOME=/cache PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=30m \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["cmc-server"]
CMD ["--help"]

FROM ${VLLM_IMAGE} AS gpu
RUN useradd --uid 10001 --home-dir /cache --create-home cmc
WORKDIR /opt/cmc-server
COPY pyproject.toml README.md LICENSE ./
COPY cmc_server/__init__.py cmc_server/
# vLLM and PyTorch are in the base image; pip adds what is not there.
RUN python3 -m pip install --no-cache-dir --editable '.[gpu,train]'
COPY cmc_server cmc_server
ENV HOME=/cache PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=30m \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["cmc-server"]
CMD ["--help"]
