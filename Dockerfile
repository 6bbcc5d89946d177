# syntax=docker/dockerfile:1
ARG PYTHON_IMAGE=python:3.13-slim-trixie


# The wheel is built apart from the environment, so that a change in the source installs no dependency anew.
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY requirements/build.txt requirements/
# The cache is a mount and in no layer.
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/pip-cache \
    pip install --cache-dir /pip-cache --require-hashes --no-deps --only-binary=:all: -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY streamworker streamworker
RUN hatchling build --target wheel --directory /dist


# Without pip in the environment nothing can be installed into the final image later.
# --no-deps with hashes: exactly the lock file and nothing that a dependency asks for beside it; `pip check` proves it whole.
FROM ${PYTHON_IMAGE} AS environment
WORKDIR /src
RUN python -m venv --without-pip /opt/venv
COPY requirements/runtime.txt requirements/
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/pip-cache \
    pip --python /opt/venv install --cache-dir /pip-cache --require-hashes --no-deps --only-binary=:all: -r requirements/runtime.txt
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip --python /opt/venv install --no-cache-dir --no-index --no-deps /dist/*.whl \
    && pip --python /opt/venv check


# No HEALTHCHECK: Kubernetes ignores it, and the probes of the chart ask the worker itself.
FROM ${PYTHON_IMAGE}
COPY --link --from=environment /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="streamworker" \
      org.opencontainers.image.description="Event-stream fan-out worker: prompt jobs from Kafka in, live deltas and one terminal usage event per job out" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# A number, not a name: runAsNonRoot can judge only numbers.
USER 65532:65532
EXPOSE 9464
STOPSIGNAL SIGTERM

# The exec form makes the worker process 1, so the signal that starts the drain reaches it and not a shell.
ENTRYPOINT ["streamworker"]
CMD ["run"]
