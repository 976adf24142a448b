"""Two hosts on one machine, to test what only happens between machines.

Each has its own network, processes, host name and sshd; they share the disk. A cable, `eth0` on
both, joins them, and nothing else: neither reaches the network outside. Linux, root and the
programs of `PROGRAMS` are needed; `missing()` says what is not there.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Each with Debian's package of it.
PROGRAMS = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "pdsh": "pdsh",
}
INTERFACE = "eth0"
# sshd is often in no user's PATH.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_NAMESPACES = ("--net", "--pid", "--mount", "--uts")


def missing() -> str | None:
    """The reason why this machine cannot be two hosts; None if it can."""
    if sys.platform != "linux":
        return "two hosts on one machine need Linux's namespaces"
    if os.geteuid() != 0:
        return "two hosts on one machine need root"
    packages = {PROGRAMS[name] for name in PROGRAMS if shutil.which(name, path=_PATH) is None}
    if packages:
        return f"two hosts on one machine need {' '.join(sorted(packages))}"
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "ip", "link", "add", "type", "veth"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode != 0:
        return f"no namespaces can be made here: {(tried.stderr or tried.stdout).strip()}"
    return None


@dataclass(frozen=True)
class Host:
    """One of the two.

    Attributes:
        name: output of `hostname` there.
        address: address of its end of the cable.
        pid: id of its first process; all other processes there end with it.
    """

    name: str
    address: str
    pid: int

    def command(self, command: Sequence[str]) -> list[str]:
        """The words that run a command there, in the caller's working folder."""
        folder = f"--wd={os.getcwd()}"
        return ["nsenter", f"--target={self.pid}", *_NAMESPACES, folder, "--", *command]

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
        """A command's end; options are subprocess.run's."""
        return subprocess.run(self.command(command), **{"check": False} | options)

    def unplug(self) -> None:
        """Take the cable out: what is sent stays unanswered, and no connection is closed."""
        self.run(["ip", "link", "set", INTERFACE, "down"], check=True)

    def plug(self) -> None:
        """Put the cable back."""
        self.run(["ip", "link", "set", INTERFACE, "up"], check=True)

    def switch_off(self) -> None:
        """End everything there at once, without closing a connection."""
        self.unplug()
        os.kill(self.pid, 9)


@dataclass(frozen=True)
class TwoHosts:
    """The two hosts, their hostfile, and the variables of a launcher on the first of them."""

    hosts: tuple[Host, Host]
    hostfile: Path
    environment: Mapping[str, str]

    def launcher_command(self, *arguments: str, port: int = 29500) -> list[str]:
        """Runs the deepspeed launcher on the first host with the hostfile; see Host.command."""
        return self.hosts[0].command(
            [
                *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile"),
                *(str(self.hostfile), "--launcher", "pdsh", "--no_ssh_check"),
                *("--master_addr", self.hosts[0].address, "--master_port", str(port)),
                *arguments,
            ]
        )


@contextmanager
def two_hosts(
    folder: Path, slots: int = 2, exports: Mapping[str, str] | None = None
) -> Iterator[TwoHosts]:
    """Two hosts, until the end of the `with` statement or of this process, however it ends.

    Args:
        folder: folder for keys, logs of sshd and the hostfile.
        slots: number of ranks on each host.
        exports: variables that every rank gets, beside DS_ACCELERATOR=cpu and one thread each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key, host_key = folder / "key", folder / "host_key"
    for path in (key, host_key):
        made = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "two hosts", "-f", str(path)]
        subprocess.run(made, check=True)
    addresses = ("10.77.0.1", "10.77.0.2")
    known = " ".join(host_key.with_suffix(".pub").read_text().split()[:2])
    known_hosts = folder / "known_hosts"
    known_hosts.write_text("".join(f"{address} {known}\n" for address in addresses))
    hostfile, ds_env = folder / "hostfile", folder / "deepspeed_env"
    hostfile.write_text("".join(f"{address} slots={slots}\n" for address in addresses))
    exported = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | dict(exports or {})
    ds_env.write_text("".join(f"{name}={value}\n" for name, value in exported.items()))
    machines = [_start_host(folder, index, address) for index, address in enumerate(addresses)]
    try:
        hosts = (_host(*machines[0], addresses[0]), _host(*machines[1], addresses[1]))
        ends = [f"netns {host.pid}".split() for host in hosts]
        cable = ["ip", "link", "add", INTERFACE, *ends[0], "type", "veth"]
        subprocess.run([*cable, "peer", "name", INTERFACE, *ends[1]], check=True)
        for host in hosts:
            host.run(["ip", "address", "add", f"{host.address}/24", "dev", INTERFACE], check=True)
            host.run(["ip", "link", "set", "lo", "up"], check=True)
            host.plug()
        options = (
            f"-i {key} -o UserKnownHostsFile={known_hosts} -o IdentitiesOnly=yes -o BatchMode=yes"
        )
        environment = os.environ | exported
        environment |= {
            "PATH": f"{Path(sys.executable).parent}:{_PATH}",
            "PDSH_SSH_ARGS_APPEND": options,
            "DS_ENV_FILE": str(ds_env),
        }
        for host in hosts:
            _wait_for_sshd(hosts[0], host.address, options)
        yield TwoHosts(hosts, hostfile, environment)
    finally:
        for machine, _ in machines:
            machine.stdin.close()  # its first process reads to the end, and then ends
            machine.wait(timeout=30)


def _start_host(folder: Path, index: int, address: str) -> tuple[subprocess.Popen, str]:
    """The process around a host's namespaces, and the host's name.

    Its first process waits for the end of a pipe that this process holds, so that nothing of the
    host can outlive it. sshd has not been started yet: the address is not there.
    """
    name = f"host{index}-{os.getpid()}"
    public = folder / "key.pub"
    sshd = " ".join(
        [
            f"{shutil.which('sshd', path=_PATH)} -D -f /dev/null -h {folder / 'host_key'}",
            f"-o ListenAddress={address} -o AuthorizedKeysFile={public} -o StrictModes=no",
            "-o PermitRootLogin=yes -o PasswordAuthentication=no -o UsePAM=no -o MaxStartups=100",
            f"-o PidFile=none -E {folder / f'sshd{index}.log'}",
        ]
    )
    # sshd wants an empty /run/sshd; this /run is seen by nobody else. A background process of a
    # shell has no standard input, hence the copy of it.
    program = f"""
        exec 3<&0
        hostname {name} && mount -t tmpfs none /run && mkdir /run/sshd && echo ready || exit 1
        (until ip address | grep -q {address}; do sleep 0.05; done; exec {sshd}) &
        cat <&3 > /dev/null
    """
    with (folder / f"host{index}.log").open("w") as log:
        words = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
        machine = subprocess.Popen(
            [*words, program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # Ctrl-C is for those who use the hosts
            env=os.environ | {"PATH": _PATH},
        )
    return machine, name


def _host(machine: subprocess.Popen, name: str, address: str) -> Host:
    assert machine.stdout is not None
    if machine.stdout.readline() != "ready\n":
        raise RuntimeError(f"{name} did not start: exit status {machine.wait()}")
    children = Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split()
    return Host(name, address, int(children[0]))


def _wait_for_sshd(host: Host, address: str, options: str) -> None:
    for _ in range(100):
        done = host.run(["ssh", *options.split(), address, "true"], capture_output=True, text=True)
        if done.returncode == 0:
            return
        time.sleep(0.1)
    raise RuntimeError(f"no answer of sshd at {address}: {done.stderr}")
