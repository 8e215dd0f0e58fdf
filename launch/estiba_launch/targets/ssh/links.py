"""Links that a job left on a remote host, resolved as in its container, so that they can be fetched.

A link to something in the model, or in the output, stays a link there. One to the job's other files becomes a copy of
them, as every link of a checkpoint does. Any other cannot be fetched, and is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from estiba_launch.request import contract
from estiba_launch.targets.docker_command import WORK, Mount, Quoted, host_mounts, quote, work_path

MODEL, OUTPUT = "/opt/ml/model", "/opt/ml/output/data"
SETTLE = r"""
settle() {  # settle keep|copy ROOT FOLDERS: the links below ROOT; the folders of the container are in one word
  # Links to files first: a folder that is copied afterwards holds none that mean something else elsewhere.
  for kind in file folder; do find "$2" -type l -exec sh -c '
    kind=$1 mode=$2 root=$3 folders=$4; shift 4
    for link; do
      target=$(readlink -- "$link"); real=$(readlink -e -- "$link"); kept=
      if [ -d "$link" ]; then [ $kind = folder ]; else [ $kind = file ]; fi || continue
      for folder in $folders; do case $real/ in "$folder"/*) kept=1;; esac; done
      case $mode$real/ in keep"$root"/*) ln -sfnr -- "$real" "$link"; continue;; esac
      if [ -z "$kept" ]; then echo "$link is a link to $target, which is not there"; continue; fi
      case $link in "$real"/*) echo "$link is a link to $target, a folder around it"; continue;; esac
      rm -- "$link" && cp -RP --preserve=timestamps -- "$real" "$link"
    done' sh $kind "$1" "$2" "$3" {} +; done
}
"""


def settle_script(request: Mapping[str, Any], work: str) -> str:
    """Shell for the remote host. Prints what cannot be fetched; running it again changes nothing."""
    return "\n".join([f'work="$HOME/{work}"', *_commands(request)])


def _commands(request: Mapping[str, Any]) -> Iterator[str]:
    checkpoints = contract.checkpoint_dir(request)
    for host in contract.hosts(request):
        root = Path(WORK, host.name)
        mounts = host_mounts(root)
        if checkpoints:
            mounts.append(Mount(source=Path(WORK, "checkpoints"), target=checkpoints))
        found = " ".join(work_path(path) for path in (root / "model", root / "output/data", Path(WORK, "checkpoints")))
        yield f'if [ -n "$(find {found} -type l -print -quit 2>/dev/null)" ]; then'
        for channel in contract.channels(request):
            target = f"/opt/ml/input/data/{channel.name}"
            mounts.append(Mount(source=Path(WORK, "data", channel.name), target=target, read_only=True))
        folders = " ".join(mount.target for mount in mounts)
        calls = [f"settle copy {checkpoints} '{folders}'"] if checkpoints else []
        calls += [f"settle keep {MODEL} '{folders}'", f"settle keep {OUTPUT} '{folders}'"]
        words: list[str] = ["docker", "run", "--rm", "--network", "none", "--user", "0", "--entrypoint", "sh"]
        for mount in mounts:
            volume = f"{work_path(mount.source)}:{mount.target}{':ro' if mount.read_only else ''}"
            words += ["--volume", Quoted(volume)]
        words += [request["AlgorithmSpecification"]["TrainingImage"], "-c", "\n".join([SETTLE, *calls])]
        yield f"  {' '.join(quote(word) for word in words)}\nfi"
