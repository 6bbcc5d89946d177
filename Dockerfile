# syntax=docker/dockerfile:1
ARG PYTHON_IMAGE=python:3.13-slim-trixie


# A stage of its own builds the wheel, so that a change in the source does not install the dependencies again.
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY requirements/build.txt requirements/
# The cache is a mount, so no layer contains it.
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/pip-cache \
    pip install --cache-dir /pip-cache --require-hashes --no-deps --only-binary=:all: -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY streamworker streamworker
RUN hatchling build --target wheel --directory /dist


# The environment has no pip, so that nothing can be installed into the final image.
# --no-deps with hashes installs exactly the lock file; `pip check` verifies that it is complete.
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


# There is no HEALTHCHECK: Kubernetes ignores it, and the chart's probes call the worker.
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

# A number and not a name, because runAsNonRoot can check only numbers.
USER 65532:65532
EXPOSE 9464
STOPSIGNAL SIGTERM

# With the exec form the worker is process 1, so that the signal that starts the drain reaches it and not a shell.
ENTRYPOINT ["streamworker"]
CMD ["run"]
