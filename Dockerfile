# Two images from one recipe; docker/install.sh and docker/entrypoint.sh do the work.
#   docker build --target cpu -t octavo:cpu .
#   docker build --target cuda -t octavo:cuda .
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS build-cpu
ARG TORCH="--index-url https://download.pytorch.org/whl/cpu torch==2.13.0"
COPY . /src
RUN TORCH="${TORCH}" /src/docker/install.sh /opt/octavo

# On Linux torch's wheel from PyPI brings the CUDA libraries along; the host brings the driver.
FROM ${PYTHON_IMAGE} AS build-cuda
ARG TORCH="torch==2.13.0"
COPY . /src
RUN TORCH="${TORCH}" /src/docker/install.sh /opt/octavo

FROM ${PYTHON_IMAGE} AS runtime
RUN useradd --create-home --uid 1000 octavo && install -d -o octavo -g octavo /models /state
COPY docker/entrypoint.sh /usr/local/bin/octavo-entrypoint
ENV PATH=/opt/octavo/bin:$PATH \
    HF_HOME=/models \
    OCTAVO_STATE_FOLDER=/state \
    PYTHONUNBUFFERED=1
USER octavo
WORKDIR /home/octavo
VOLUME /models /state
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=120s --retries=3 \
    CMD ["octavo-entrypoint", "health"]
ENTRYPOINT ["octavo-entrypoint"]

FROM runtime AS cuda
COPY --from=build-cuda /opt/octavo /opt/octavo
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    OCTAVO_DEVICE=cuda

FROM runtime AS cpu
COPY --from=build-cpu /opt/octavo /opt/octavo
