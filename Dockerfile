# The server as an image: no compiler, no root, one folder to write in. `docker build -t aq-data .`
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/aq-data
# What changes seldom comes first: the pinned dependencies are a layer of their own.
COPY pyproject.toml constraints.txt README.md ./
RUN mkdir -p aq_data server/aq_server \
    && touch aq_data/__init__.py server/aq_server/__init__.py \
    && /opt/aq-data/bin/pip install --no-cache-dir --constraint constraints.txt '.[server,gcs,s3]' \
    && /opt/aq-data/bin/pip uninstall --yes aq-data
COPY aq_data aq_data
COPY server server
RUN /opt/aq-data/bin/pip install --no-cache-dir --no-deps --constraint constraints.txt .

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="aq-data" org.opencontainers.image.description="The data server of a measurement lab"
RUN useradd --system --uid 10001 --home-dir /data --shell /usr/sbin/nologin aq-data \
    && install --directory --owner=aq-data --mode=0750 /data
COPY --from=build /opt/aq-data /opt/aq-data
ENV PATH=/opt/aq-data/bin:$PATH PYTHONUNBUFFERED=1 AQ_DATA_SERVER__DATA=/data AQ_DATA_SERVER__HOST=0.0.0.0
USER aq-data
WORKDIR /data
VOLUME /data
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:5000/healthz', timeout=2)"]
# A stop is a SIGTERM: what was accepted is finished, for up to a minute (`docker stop --time 60`).
ENTRYPOINT ["aq-data"]
CMD ["serve"]
