"""`make push`: what a registry holds afterwards is what SageMaker accepts, and a push can be repeated."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import registry

pytestmark = pytest.mark.docker
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
INDEX = {
    "schemaVersion": 2,
    "mediaType": INDEX_TYPE,
    "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": f"sha256:{0:064}", "size": 1}],
}


def run(*command: str | Path, host: str | None = None, **options: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | options | ({"DOCKER_HOST": host} if host else {})
    return subprocess.run(command, capture_output=True, text=True, env=environ)


def push(root: Path, *references: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, root / "scripts/push.py", *references)


@pytest.fixture
def tag() -> Iterator[Callable[[str], str]]:
    """tag(reference): a new image of a few bytes under that name."""
    made: list[str] = []

    def make(reference: str) -> str:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as archive:
            archive.addfile(tarfile.TarInfo(uuid.uuid4().hex))
        command = ["docker", "import", "-", reference]
        done = subprocess.run(command, input=content.getvalue(), check=True, capture_output=True)
        made.append(done.stdout.decode().strip())
        return reference

    yield make
    subprocess.run(["docker", "image", "rm", "--force", *made], capture_output=True)


def test_the_uris_and_digests_of_what_was_pushed_are_listed(root: Path, tag: Callable[[str], str]) -> None:
    with registry.serve() as server:
        references = [tag(f"{server.host}/estiba/{name}:1.2.3") for name in ("embed", "aura")]
        done = push(root, *references)
        digests = [registry.digest_of(server.manifests[f"estiba/{name}", "1.2.3"][1]) for name in ("embed", "aura")]
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{one}@{digest} pushed" for one, digest in zip(references, digests, strict=True)
    ]


def test_an_image_that_is_there_is_skipped_where_tags_are_immutable(root: Path, tag: Callable[[str], str]) -> None:
    with registry.serve(immutable=True) as server:
        reference = tag(f"{server.host}/estiba/embed:1.2.3")
        first, second = push(root, reference), push(root, reference)
        assert server.pushes == ["estiba/embed:1.2.3"]
    assert (first.returncode, second.returncode) == (0, 0), second.stderr
    assert second.stdout == first.stdout.replace(" pushed", " unchanged")


def test_a_tag_that_holds_another_image_fails_with_the_remedy_and_the_others_are_pushed(
    root: Path, tag: Callable[[str], str]
) -> None:
    with registry.serve(immutable=True) as server:
        taken, free = f"{server.host}/estiba/aura:1.2.3", f"{server.host}/estiba/embed:1.2.3"
        assert push(root, tag(taken)).returncode == 0
        done = push(root, tag(taken), tag(free))
        assert server.pushes == ["estiba/aura:1.2.3", "estiba/embed:1.2.3"]
    assert done.returncode == 1
    assert [line.rpartition("@")[0] for line in done.stdout.splitlines()] == [free]
    assert f"{taken}: " in done.stderr
    assert "raise the number in the file VERSION" in done.stderr
    assert "1 of 2 failed" in done.stderr


def test_a_registry_that_holds_an_index_after_a_push_is_refused(root: Path, tag: Callable[[str], str]) -> None:
    """The tag's content is read back; here the registry has an index under it whatever is pushed."""
    with registry.serve() as server:
        reference = tag(f"{server.host}/estiba/embed:1.2.3")
        server.replaces["estiba/embed", "1.2.3"] = (INDEX_TYPE, json.dumps(INDEX).encode())
        done = push(root, reference)
    assert done.returncode == 1
    assert "the registry holds an image index, which SageMaker refuses" in done.stderr


def test_an_image_that_is_not_built_is_named(root: Path) -> None:
    done = push(root, "127.0.0.1:9/estiba/nadie:1.2.3")
    assert done.returncode == 1
    assert "127.0.0.1:9/estiba/nadie:1.2.3: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_real_registry_says_the_same(root: Path, tag: Callable[[str], str], tmp_path: Path) -> None:
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("Debian's docker-registry is not installed here")
    configuration = tmp_path / "config.yml"
    configuration.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {tmp_path / 'data'}}}}}\nhttp: {{addr: 127.0.0.1:0}}\n"
    )
    process = subprocess.Popen([program, "serve", configuration], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        address = next(match[1] for line in process.stderr if (match := re.search(r"listening on ([\d.:]+)", line)))
        reference = tag(f"{address}/estiba/embed:1.2.3")
        first, second = push(root, reference), push(root, reference)
    finally:
        process.kill()
        process.wait()
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert second.stdout == first.stdout.replace(" pushed", " unchanged")
    assert "@sha256:" in first.stdout


# --- an engine with the containerd image store, the default of Docker 29 ------------------------------------------


class Engine:
    """A second engine, with images in containerd, in a network of its own, since `--bridge=none` removes docker0."""

    def __init__(self, place: Path, dockerd: str) -> None:
        self.host = f"unix://{place}/docker.sock"
        (place / "daemon.json").write_text(json.dumps({"features": {"containerd-snapshotter": True}}))
        command = [
            dockerd, f"--config-file={place}/daemon.json", f"--data-root={place}/data", f"--exec-root={place}/exec",
            f"--pidfile={place}/pid", f"--host={self.host}", "--bridge=none", "--iptables=false", "--ip6tables=false",
        ]  # fmt: skip
        with open(place / "log", "w") as log:
            self.process = subprocess.Popen(
                ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command],
                stdout=log,
                stderr=log,
            )

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        return run("nsenter", f"--net=/proc/{self.process.pid}/ns/net", *command, host=self.host)

    def serve_registry(self, root: Path) -> tuple[subprocess.Popen[str], str]:
        """A registry in the engine's network, and its address."""
        process = subprocess.Popen(
            ["nsenter", f"--net=/proc/{self.process.pid}/ns/net", sys.executable, root / "tests/registry.py"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        return process, process.stdout.readline().strip()


@pytest.fixture(scope="module")
def containerd_engine() -> Iterator[Engine]:
    dockerd = shutil.which("dockerd")
    if dockerd is None or os.geteuid() != 0:
        pytest.skip("a second engine needs dockerd and root")
    with tempfile.TemporaryDirectory(prefix="estiba-engine-") as folder:
        engine = Engine(Path(folder), dockerd)
        try:
            while run("docker", "info", host=engine.host).returncode:
                if engine.process.poll() is not None:
                    pytest.skip(f"a second engine does not start here: {Path(folder, 'log').read_text()[-500:]}")
            yield engine
        finally:
            engine.process.terminate()
            engine.process.wait(60)


@pytest.mark.parametrize("attested", [False, True])
def test_the_bake_file_makes_a_manifest_where_the_engine_would_make_an_index(
    attested: bool, root: Path, tmp_path: Path, containerd_engine: Engine
) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    server, host = containerd_engine.serve_registry(root)
    try:
        reference = f"{host}/estiba/embed:1.2.3"
        settings = [f"base.context={tmp_path}", f"base.tags={reference}"]
        settings += ["base.attest=type=provenance"] if attested else []
        bake: list[str | Path] = ["docker", "buildx", "bake", "--file", root / "docker-bake.hcl"]
        built = containerd_engine.run(*bake, *(f"--set={one}" for one in settings), "base")
        assert built.returncode == 0, built.stderr
        done, again = (containerd_engine.run(sys.executable, root / "scripts/push.py", reference) for _ in range(2))
        manifest = json.loads(
            containerd_engine.run("docker", "buildx", "imagetools", "inspect", "--raw", reference).stdout
        )
    finally:
        server.kill()
        server.wait()
    if attested:
        assert "manifests" in manifest
        assert done.returncode == 1
        assert "SageMaker refuses" in done.stderr
    else:
        assert "config" in manifest and "manifests" not in manifest
        assert done.returncode == 0, done.stderr
        assert again.stdout == done.stdout.replace(" pushed", " unchanged")


# --- the base of a build -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "variable"), [("public", "PUBLIC_REPOSITORY"), ("dlc", "HUGGINGFACE_REPOSITORY")])
def test_a_base_that_cannot_be_pulled_is_named_before_any_wheel_is_fetched(
    base: str, variable: str, root: Path
) -> None:
    done = run("bash", root / "scripts/build.sh", "embed", BASE=base, **{variable: "127.0.0.1:9/nadie"})
    assert done.returncode == 1
    assert f"BASE={base} needs " in done.stderr and "127.0.0.1:9/nadie:" in done.stderr
    assert "BASE=local" in done.stderr
    assert "wheelhouse:" not in done.stderr


def test_a_base_for_another_architecture_is_refused_at_once(root: Path, tmp_path: Path) -> None:
    (tmp_path / "uname").write_text("#!/bin/sh\necho aarch64\n")
    (tmp_path / "uname").chmod(0o755)
    done = run("bash", root / "scripts/build.sh", "embed", BASE="public", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "this is aarch64" in done.stderr and "BASE=local" in done.stderr
