"""`make services`: bring the programs that stand in for real services into `.cache/services/`, once.

MongoDB's engine comes from npm at the version and checksum of `mongo/package-lock.json`. It needs glibc 2.38; an older
Debian gets the next one's C library unpacked beside it, from the mirror that its own package sources name. The servers
that speak as Google Cloud Storage and as S3 do, and the proxy, are built by Go, which checks them against its public database of sums.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

__all__ = ["CACHE", "GCS", "LIBC", "MONGO", "PROXY", "S3", "debian_mirror", "libc_is_old", "missing"]

CACHE = Path(__file__).parents[2] / ".cache" / "services"
MONGO = CACHE / "mongo-0.1.1"
LIBC = CACHE / "libc-trixie"
"""Debian 13's C library, for an engine that the system's own is too old for."""
GCS = CACHE / "fake-gcs-server-1.56.1"
S3 = CACHE / "versitygw-1.8.0"
PROXY = CACHE / "caddy-2.10.2"

HERE = Path(__file__).parent
NEEDED_GLIBC = (2, 38)
LIBC_PACKAGES = ("libc6", "libgcc-s1", "libstdc++6")
SOURCES = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
BUILT = {
    GCS.name: "github.com/fsouza/fake-gcs-server@v1.56.1",
    S3.name: "github.com/versity/versitygw/cmd/versitygw@v1.8.0",
    PROXY.name: "github.com/caddyserver/caddy/v2/cmd/caddy@v2.10.2",
}
DOCKER = "or, with Docker, `AQ_DATA_MONGO=docker AQ_DATA_GCS=docker AQ_DATA_S3=docker make test-services`"


def libc_is_old() -> bool:
    """Whether the engine cannot be loaded with the system's own C library."""
    if sys.platform != "linux":
        return False
    found = re.fullmatch(r"glibc (\d+)\.(\d+).*", os.confstr("CS_GNU_LIBC_VERSION") or "")
    return found is None or (int(found[1]), int(found[2])) < NEEDED_GLIBC


def missing(*services: str) -> list[str]:
    """What `make services` would have to fetch before these (mongo, gcs, s3, proxy; none named: all) can run here."""
    needed = {"mongo": [MONGO, LIBC] if libc_is_old() else [MONGO], "gcs": [GCS], "s3": [S3], "proxy": [PROXY]}
    return [path.name for service in services or needed for path in needed[service] if not path.exists()]


def _run(*command: str, why: str, **environment: str) -> None:
    merged = {**os.environ, **environment}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800, env=merged)
    except FileNotFoundError:
        raise SystemExit(f"make services: {command[0]} is not installed, {why}; install it, {DOCKER}") from None
    if done.returncode:
        output = (done.stdout + done.stderr).strip()[-2000:]
        raise SystemExit(f"make services: `{' '.join(command[:3])} …` failed, {why}:\n{output}\nTry again, {DOCKER}")


@contextmanager
def _complete_or_absent(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when everything is in it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    filling = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=CACHE))
    try:
        yield filling
        if not folder.exists():
            filling.chmod(0o755)
            filling.rename(folder)
    finally:
        shutil.rmtree(filling, ignore_errors=True)


def _fetch_mongo() -> None:
    with _complete_or_absent(MONGO) as folder:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / "mongo" / name, folder)
        why = "it fetches MongoDB's engine from npm"
        _run("npm", "ci", "--omit=peer", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), why=why)


def debian_mirror() -> str:
    """The address that this machine takes Debian's packages from."""
    for path in SOURCES:
        text = path.read_text() if path.suffix in (".list", ".sources") and path.is_file() else ""
        for found in re.finditer(r"^(?:URIs:|deb\s+(?:\[[^]]*\])?)\s*(\S+?/debian)/?(?:\s|$)", text, re.MULTILINE):
            return found[1]
    raise SystemExit(
        f"make services: this system's C library is older than {'.'.join(map(str, NEEDED_GLIBC))}, and no Debian mirror is "
        f"named under /etc/apt to take a newer one from; use Debian 13, Ubuntu 24.04 or later, {DOCKER}"
    )


def _fetch_libc() -> None:
    mirror, why = debian_mirror(), "it fetches Debian 13's C library, which MongoDB's engine needs"
    with _complete_or_absent(LIBC) as folder, tempfile.TemporaryDirectory() as scratch:
        apt = Path(scratch)
        for part in ("lists/partial", "cache/archives/partial", "packages"):
            (apt / part).mkdir(parents=True)
        (apt / "sources.list").write_text(f"deb [signed-by={KEYS}] {mirror} trixie main\n")
        (apt / "status").touch()
        settings = {
            "Dir::Etc::sourcelist": apt / "sources.list", "Dir::Etc::sourceparts": "-", "Dir::State::status": apt / "status",
            "Dir::State::lists": apt / "lists", "Dir::Cache": apt / "cache", "APT::Sandbox::User": "",
        }  # fmt: skip
        options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        _run("apt-get", "-q", "update", *options, why=why)
        _run("sh", "-c", 'cd "$0" && exec "$@"', str(apt / "packages"), "apt-get", "-q", "download", *LIBC_PACKAGES,
             *options, why=why)  # fmt: skip
        for package in sorted((apt / "packages").glob("*.deb")):
            _run("dpkg", "-x", str(package), str(folder), why=why)


def _build(name: str) -> None:
    with _complete_or_absent(CACHE / name) as folder:
        why = "it builds the servers that stand in for buckets, and the proxy, with Go (1.25 or later)"
        _run("go", "install", "-trimpath", BUILT[name], why=why, GOBIN=str(folder), CGO_ENABLED="0", GOFLAGS="")


def main() -> None:
    """Fetch what is missing, and say so."""
    if platform.machine() not in ("x86_64", "aarch64", "arm64"):
        raise SystemExit(f"make services: MongoDB's engine is not built for {platform.machine()}; {DOCKER[4:]}")
    fetchers = {MONGO.name: _fetch_mongo, LIBC.name: _fetch_libc}
    fetchers |= {name: partial(_build, name) for name in BUILT}
    for name in missing():
        print(f"make services: fetching {name} into {CACHE}", flush=True)
        fetchers[name]()
    print(f"make services: all there in {CACHE}; `make test-services` runs the tests")


if __name__ == "__main__":
    main()
