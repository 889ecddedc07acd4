"""The laboratory of `docker-compose.yml`: what its files say, and the same parts as processes where there is no Docker."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from aq_server.config import load_config
from services import fetch
from services.buckets import ACCESS_KEY, SECRET_KEY
from services.fetch import GCS, PROXY, S3

import aq_data

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if service.get("image") == "aq-data"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_it_brings_a_database_two_kinds_of_bucket_two_servers_and_a_proxy():
    """As the README says."""
    images = {name: service["image"].partition(":")[0] for name, service in SERVICES.items()}
    assert images["mongo"] == "mongo"
    assert images["gcs"] == "fsouza/fake-gcs-server"
    assert images["s3"] == "versity/versitygw"
    assert images["proxy"] == "caddy"
    assert [name for name in OURS if name != "token"] == ["aq-data-1", "aq-data-2"]


@pytest.mark.parametrize(("name", "built"), [("gcs", GCS), ("s3", S3), ("proxy", PROXY)])
def test_the_tests_run_with_the_versions_that_the_images_have(name, built):
    """Built from the same releases."""
    assert SERVICES[name]["image"].rpartition(":")[2].removeprefix("v") == built.name.rpartition("-")[2]


@pytest.mark.parametrize("name", [name for name in SERVICES if name not in OURS])
def test_images_of_others_are_of_a_named_version(name):
    """What ran yesterday runs tomorrow."""
    assert re.fullmatch(r"[a-z0-9/.-]+:v?\d+(\.\d+)*", SERVICES[name]["image"])


@pytest.mark.parametrize("name", SERVICES)
def test_only_the_proxy_is_reached_from_outside_and_only_by_this_computer(name):
    """A database without a password must not be on anybody's network."""
    assert SERVICES[name].get("ports", []) == (["127.0.0.1:5000:5000"] if name == "proxy" else [])


@pytest.mark.parametrize("name", OURS)
def test_our_servers_have_no_privileges_and_can_write_nowhere_but_in_their_data(name):
    """Whoever breaks into one finds little."""
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert [mount.partition(":")[0] for mount in service["tmpfs"]] == ["/data"]
    assert all(volume.endswith(":ro") for volume in service["volumes"])


def test_every_mounted_file_is_in_the_repository():
    """Docker would make an empty folder of one that is not."""
    mounted = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ())]
    files = [path for path in mounted if path.startswith("./")]
    assert files
    assert all((ROOT / path).is_file() for path in files)


def test_the_servers_configuration_is_understood():
    """Every key is one that there is."""
    server = load_config(ROOT / "config-samples/compose/server.toml", {}, {}).server
    assert server.mongo is not None


def test_the_image_runs_as_nobody_in_particular():
    """The last stage names a user, and nothing after it goes back to root."""
    users = re.findall(r"^USER (\S+)", DOCKERFILE.rsplit("\nFROM ", 1)[1], re.MULTILINE)
    assert users == ["aq-data"]
    assert "--uid 10001" in DOCKERFILE


def test_the_image_has_what_the_servers_of_the_compose_file_need():
    """Both kinds of bucket."""
    assert "'.[server,gcs,s3]'" in DOCKERFILE


def test_the_image_copies_what_there_is_and_what_the_build_context_has():
    """`.dockerignore` leaves out everything but the program."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    copied = [
        word
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for word in line.split()[:-1]
    ]  # fmt: skip
    assert copied
    assert all((ROOT / name).exists() for name in copied)
    assert all(any(fnmatch(name, pattern) for pattern in allowed) for name in copied)


@pytest.fixture
def configuration(tmp_path, mongo, mongo_database, gcs, s3):
    """`server.toml` as the servers of this computer need it: other addresses, and nothing else."""
    text = (ROOT / "config-samples/compose/server.toml").read_text()
    for there, here in {
        'mongo = "mongodb://mongo/?replicaSet=lab"': f'mongo = "{mongo}"\nmongo_database = "{mongo_database}"',
        'data = "/data"': f'data = "{tmp_path / "data"}"',
        "gs://aq-data": gcs.place().url,
        "http://gcs:4443": gcs.options.endpoint,
        "s3://aq-archive": s3.place().url,
        "http://s3:7070": s3.options.endpoint,
    }.items():
        assert there in text
        text = text.replace(there, here)
    path = tmp_path / "server.toml"
    path.write_text(text)
    return path


@pytest.fixture
def environment(tmp_path):
    """The variables that the compose file gives our servers, with this computer's values."""
    assert set(SERVICES["aq-data-1"]["environment"]) == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    kept = {**os.environ, "HOME": str(tmp_path), "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"}
    return kept | {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def _started(command: list[str], address: str, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process, once it answers at its address."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"{address}/healthz", timeout=5)
                break
            except httpx.TransportError:
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                assert time.monotonic() < until, f"{command[0]} does not answer at {address}"
                time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def _token(environment: dict[str, str], configuration: Path) -> str:
    """What the service `token` says, by the very command of the compose file."""
    [script] = SERVICES["token"]["command"]
    script = script.replace("/etc/aq-data/server.toml", str(configuration))
    command = [*SERVICES["token"]["entrypoint"], script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.services
def test_the_laboratory_serves_through_its_proxy_and_goes_on_when_one_server_is_killed(configuration, environment):
    """Database, both buckets, a token made once, two servers, and the proxy with the file that the compose file mounts."""
    assert not fetch.missing("proxy"), "the proxy is not there: run `make services`"
    told = _token(environment, configuration)
    secret = told.split()[0]
    assert _token(environment, configuration) == "", "a second start makes no second token"
    ports = [_free_port() for _ in range(3)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    serve = ["aq-data", *SERVICES["aq-data-1"]["command"][:1], "--config", str(configuration), "--port"]
    around = environment | {"AQ_DATA_PORT": str(ports[2]), "AQ_DATA_SERVERS": " ".join(f"127.0.0.1:{p}" for p in ports[:2])}
    caddy = [
        str(PROXY / "caddy"),
        "run",
        "--adapter",
        "caddyfile",
        "--config",
        str(ROOT / "config-samples/compose/Caddyfile"),
    ]
    with (
        _started([*serve, str(ports[0])], urls[0], environment) as one,
        _started([*serve, str(ports[1])], urls[1], environment),
        _started(caddy, urls[2], around),
        aq_data.connect(urls[2], token=secret) as client,
    ):
        trace = np.random.default_rng(1).random((300, 1000))
        file = client.save({"trace": trace}, name="T1", metadata={"chip": "C7"})
        old = client.save({"y": np.arange(5)}, name="T0", store="archive")
        assert file.path.startswith("gs://")
        assert old.path.startswith("s3://")
        with client.sweep("live", dims={"delay": None}, variables={"iq": ("float64", ("delay",))}) as sweep:
            for i in range(20):
                if i == 10:
                    one.send_signal(signal.SIGKILL)
                sweep.append(iq=np.full(1, i, "float64"), delay=np.array([float(i)]), dim="delay")
                sweep.flush()
        assert np.array_equal(client.get(sweep.id)["iq"][:], np.arange(20.0))
        for _ in range(4):
            assert np.array_equal(client.get(file.id)["trace"][3:5, ::7], trace[3:5, ::7])
            assert client.search({"chip": "C7"}).total == 1
