# The programs in a container, for a CPU or a GPU.
#   docker build -t dptune .
#   docker build -t dptune --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .
#   docker run --rm -it --gpus all -v "$PWD/private:/data" dptune train --train_file /data/my.jsonl ...
# Data never goes into the image: .dockerignore lets in the program's own folders alone.
ARG BASE=python:3.12-slim
FROM ${BASE}

# PIP_FLAGS: for example the index of a smaller build of PyTorch for CPUs.
ARG PIP_FLAGS=""

RUN if ! command -v python3 > /dev/null; then \
        apt-get update && apt-get install -y --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi
RUN python3 -m venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1

WORKDIR /dptune
COPY requirements.txt .
RUN pip install --no-cache-dir ${PIP_FLAGS} -r requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps .

RUN useradd --create-home dptune && mkdir -p /data && chown dptune /data
USER dptune
WORKDIR /data
ENTRYPOINT ["dptune"]
CMD ["--help"]
