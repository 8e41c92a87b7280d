"""Two network namespaces with names of their own, as two hosts on one machine; and stand-ins for the commands that
start something on a host (ssh, pdsh, srun), which enter them. Needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ENTER = """
import subprocess, sys
def enter(host, words):
    inside = ["unshare", "-u", "sh", "-c", 'hostname "$0"; exec "$@"', host, *words]
    return subprocess.Popen(["ip", "netns", "exec", host, *inside])
"""
STAND_INS = {
    "ssh": """
        words = sys.argv[1:]
        while words[0].startswith("-"):
            words = words[2:] if words[0] == "-o" else words[1:]
        sys.exit(enter(words[0], ["sh", "-c", " ".join(words[1:])]).wait())
    """,
    "pdsh": """
        at = sys.argv.index("-w")
        command = " ".join(sys.argv[at + 2 :])
        hosts = sys.argv[at + 1].split(",")
        all_ = [enter(h, ["sh", "-c", command.replace("%n", str(i))]) for i, h in enumerate(hosts)]
        sys.exit(max(p.wait() for p in all_))
    """,
    "srun": """
        words = [w for w in sys.argv[1:]]
        while words[0].startswith("-"):
            words = words[1:]
        all_ = [enter(h, words) for h in HOSTS]
        sys.exit(max(p.wait() for p in all_))
    """,
    "scontrol": """
        if sys.argv[1:3] == ["show", "hostnames"]:
            print("\\n".join(HOSTS))
        else:
            open(FOLDER + "/requeued", "a").write(" ".join(sys.argv[1:]) + "\\n")
    """,
}


@dataclass
class Hosts:
    """The two, and the folder of stand-ins that goes first on the PATH."""

    names: list[str]
    folder: Path

    def run(self, host: str, words: list[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Start something on one of them."""
        inside = ["unshare", "-u", "sh", "-c", 'hostname "$0"; exec "$@"', host, *words]
        with open(log, "wb") as said:
            return subprocess.Popen(["ip", "netns", "exec", host, *inside], env=env, stdout=said, stderr=said)

    def env(self, env: dict[str, str]) -> dict[str, str]:
        return {**env, "PATH": f"{self.folder}{os.pathsep}{env['PATH']}"}


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """OSError or CalledProcessError where the machine does not allow it."""
    tag = f"pp{os.getpid() % 10000}"
    names, wires = [f"{tag}-a", f"{tag}-b"], [f"{tag}va", f"{tag}vb"]
    etc = [Path("/etc/netns") / name for name in names]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", wires[0], "type", "veth", "peer", "name", wires[1])
        for i, (name, wire) in enumerate(zip(names, wires, strict=True)):
            _ip("link", "set", wire, "netns", name)
            _ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", wire)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", wire, "up")
            etc[i].mkdir(parents=True)
            lines = ["127.0.0.1 localhost", *(f"10.77.0.{k + 1} {n}" for k, n in enumerate(names))]
            (etc[i] / "hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for command, body in STAND_INS.items():
            head = f"#!/usr/bin/env python3\nHOSTS = {names}\nFOLDER = {str(folder)!r}\n"
            path = folder / command
            path.write_text(head + ENTER + textwrap.dedent(body), encoding="utf-8")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        yield Hosts(names, folder)
    finally:
        for name, there in zip(names, etc, strict=True):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(there, ignore_errors=True)
