# docker build --target cpu .    the default: ONNX Runtime and FAISS on the CPU, in an image without a shell
# docker build --target gpu .    with CUDA 12
# Both serve the starter bundle unless ISTHMUS_BUNDLE says otherwise. Neither holds torch: it is needed once, to export
# the starter, and stays in the stage that does. PIP_EXTRA_INDEX_URL, a build argument, may name an index with a torch
# for CPUs only, which is a much smaller download.

FROM python:3.11-slim-bookworm AS builder
WORKDIR /src
RUN python3 -m venv /opt/isthmus
ENV PATH=/opt/isthmus/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
# The dependencies first: the layer is built again only when they change, not when the code does.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service/__init__.py service/__init__.py
COPY isthmus_client/pyproject.toml isthmus_client/README.md isthmus_client/LICENSE isthmus_client/__init__.py isthmus_client/
RUN pip install --no-cache-dir -c constraints.txt ./isthmus_client '.[cpu,heif,milvus,otel]'
COPY isthmus_client isthmus_client
COPY service service
RUN pip install --no-cache-dir --no-deps --force-reinstall ./isthmus_client .

# What the server needs of all that, under the same paths.
FROM builder AS rootfs
COPY deploy/docker/rootfs.py deploy/docker/rootfs.py
RUN python3 deploy/docker/rootfs.py /system /opt/isthmus

FROM builder AS starter
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir -c constraints.txt '.[train,demo]'
COPY training training
COPY starter starter
COPY examples examples
RUN python -m examples.photos media \
    && python -m examples.sounds media \
    && python -m training export training/recipes/starter.yaml \
        --projectors starter/projectors.safetensors --samples media --out /opt/starter

FROM nvidia/cuda:12.9.1-cudnn-runtime-ubuntu24.04 AS cuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*

FROM cuda AS gpu-builder
WORKDIR /src
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/isthmus
ENV PATH=/opt/isthmus/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service/__init__.py service/__init__.py
COPY isthmus_client/pyproject.toml isthmus_client/README.md isthmus_client/LICENSE isthmus_client/__init__.py isthmus_client/
RUN pip install --no-cache-dir -c constraints.txt ./isthmus_client '.[gpu,heif,milvus,otel]'
COPY isthmus_client isthmus_client
COPY service service
RUN pip install --no-cache-dir --no-deps --force-reinstall ./isthmus_client .

FROM cuda AS gpu
RUN useradd --system --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin isthmus \
    && install -d -o isthmus -g isthmus /data
COPY --from=gpu-builder /opt/isthmus /opt/isthmus
COPY --from=starter /opt/starter /opt/starter
ENV PATH=/opt/isthmus/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    ISTHMUS_HOST=0.0.0.0 ISTHMUS_PORT=8000 ISTHMUS_BUNDLE=/opt/starter ISTHMUS_STORE=/data ISTHMUS_DEVICE=cuda
# Of the code; and of the starter's weights, as the server says it (a test compares the two).
LABEL org.opencontainers.image.licenses="Apache-2.0" \
      isthmus.weights="weights: non-commercial, because of Flickr8k (non-commercial research), Corel5k (research alone), IKEA products (non-commercial research), ESC-50 (CC-BY-NC-3.0), isthmus-starter-audio (CC-BY-NC-3.0); not known of recordings of ambience (not stated)"
USER 10001:10001
WORKDIR /opt/isthmus
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=8s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"ISTHMUS_PORT\"]}/readyz', timeout=7)"]
CMD ["python", "-m", "service", "serve"]

FROM scratch AS cpu
COPY --from=rootfs /system /
COPY --from=starter /opt/starter /opt/starter
ENV PATH=/opt/isthmus/bin PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    ISTHMUS_HOST=0.0.0.0 ISTHMUS_PORT=8000 ISTHMUS_BUNDLE=/opt/starter ISTHMUS_STORE=/data ISTHMUS_DEVICE=cpu
# Of the code; and of the starter's weights, as the server says it (a test compares the two).
LABEL org.opencontainers.image.licenses="Apache-2.0" \
      isthmus.weights="weights: non-commercial, because of Flickr8k (non-commercial research), Corel5k (research alone), IKEA products (non-commercial research), ESC-50 (CC-BY-NC-3.0), isthmus-starter-audio (CC-BY-NC-3.0); not known of recordings of ambience (not stated)"
USER 10001:10001
WORKDIR /opt/isthmus
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=8s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"ISTHMUS_PORT\"]}/readyz', timeout=7)"]
CMD ["python", "-m", "service", "serve"]
