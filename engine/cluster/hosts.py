"""The machines of a hostfile, and commands on them over ssh."""

import ipaddress
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from magnetar.data.errors import UserError
from magnetar.engine.cluster.arguments import require_plain_surroundings, sealed

# As DeepSpeed reads it, whose slots have any number of digits, and anything after them.
_LINE = re.compile(r"(\S+)\s+slots=([0-9]{1,4})(?!\S)")
MOST_SLOTS = 9999  # of a machine
# What ssh and pdsh take for a host, and for nothing else: -oProxyCommand=... would be a command to
# run here, exec:HOST another one, and node[1-4] four hosts where DeepSpeed counts one.
_NAME = re.compile(r"(\w[\w.-]*@)?\w[\w.-]*", re.ASCII)
_SLOTS = re.compile(r"[0-9]{1,4}(,[0-9]{1,4})*")
_SECONDS_TO_ANSWER = 5
_FOR_OTHER_MACHINES = ("--venv_script", "--enable_each_rank_log")  # paths that the launcher sends


@dataclass(frozen=True)
class LaunchOptions:
    """A run, and the machines that DeepSpeed's launcher starts it on.

    Attributes:
        config: the run's JSON; None: unknown.
        settings: `--set` arguments of the JSON.
        hostfile: path of the hostfile; None: only this machine.
        include: hosts and slots to use, in DeepSpeed's syntax.
        exclude: hosts to leave out, in DeepSpeed's syntax.
        num_nodes: number of machines, from the start of the hostfile; None: all.
        num_gpus: number of ranks on each machine; None: its slots, or this machine's GPUs.
        master_addr: address of the first machine; None: found.
        master_port: port of the rendezvous; None: a free one, another at each start.
        ssh_port: port of sshd; None: ssh's default.
        force_multi: whether a single machine of the hostfile is also reached over ssh.
        passed: further arguments for the launcher.
    """

    config: Path | None = None
    settings: tuple[str, ...] = ()
    hostfile: Path | None = None
    include: str = ""
    exclude: str = ""
    num_nodes: int | None = None
    num_gpus: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    ssh_port: int | None = None
    force_multi: bool = False
    passed: tuple[str, ...] = ()

    def slots(self, num_here: int = 0) -> dict[str, list[int]]:
        """Host -> its slots that take part; without a hostfile "localhost" has `num_here`.

        Raises:
            UserError: if the hostfile is wrong, no slot is left, or shells of other machines would
                change what they get.
        """
        if self.hostfile is None and num_here == 0:
            return {}
        hosts = {"localhost": num_here}
        if self.hostfile is None:
            require_known(hosts, self.include, self.exclude)
        else:
            hosts = read_hostfile(self.hostfile)
        slots = chosen_slots(hosts, self.include, self.exclude)
        if not slots and (self.include or self.exclude):
            raise UserError(
                f"--include {self.include!r} and --exclude {self.exclude!r} leave no slot of "
                f"{self.hostfile or 'this machine'}: name some of {', '.join(hosts)}"
            )
        if not slots:
            raise UserError(f"--hostfile {self.hostfile} has no slots: write slots=8, say")
        count = self.num_gpus
        chosen = list(slots.items())[: self.num_nodes]
        if self.is_remote(chosen):
            named = [word.partition("=") for word in self.passed]
            handed_on = {name: value for name, _, value in named if name in _FOR_OTHER_MACHINES}
            require_plain_surroundings({"--master_addr": self.master_addr, **handed_on})
        return {host: list(range(count)) if count else numbers for host, numbers in chosen}

    def is_remote(self, slots: Sized) -> bool:
        """Whether hosts are reached over ssh."""
        return self.hostfile is not None and (len(slots) > 1 or self.force_multi)

    def words(self, address: str, slots: Mapping[str, list[int]], is_remote: bool) -> list[str]:
        """The launcher's arguments up to the module.

        Args:
            address: rank 0's address.
            slots: host -> its slots that take part; none: those of the hostfile.
            is_remote: whether hosts are reached over ssh.
        """
        words = [*self.passed, "--master_port", str(self.master_port or free_port())]
        words += ["--ssh_port", str(self.ssh_port)] if self.ssh_port else []
        if self.hostfile is None:
            given = {"--num_gpus": self.num_gpus, "--include": self.include}
            given["--exclude"] = self.exclude
            return words + [str(word) for pair in given.items() if pair[1] for word in pair]
        words += ["--hostfile", str(self.hostfile)]
        named = "@".join(f"{host}:{','.join(map(str, there))}" for host, there in slots.items())
        words += ["--include", named] if slots else []
        # The hosts have just been asked; the launcher would ask the first one again.
        words += ["--no_ssh_check", "--master_addr", address]
        return words + (["--force_multi"] if is_remote else [])

    def training(self, settings: Sequence[str]) -> list[str]:
        """The launcher's arguments that name the program and its JSON."""
        words = ["--deepspeed_config", str(self.config or "JSON")]
        words += [part for text in settings for part in ("--set", text)]
        return ["--module", "magnetar.launchers.train", *sealed(words)]


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> its slots, in the file's order.

    Raises:
        UserError: if the file is missing or empty, or has a line that DeepSpeed would refuse or
            that would start something other than the run.
    """
    try:
        lines = [line.strip() for line in path.read_text().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text"
        raise UserError(f"--hostfile {path} cannot be read ({reason}): check the path") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None or match[1] in hosts:
            what = "is named twice" if match else "is not `host slots=N`"
            shown = line if len(line) < 80 else f"{line[:80]}..."
            raise UserError(
                f"--hostfile {path}, line {number}: {shown!r} {what}: mend the line; N is a "
                f"whole number up to {MOST_SLOTS}"
            )
        if _NAME.fullmatch(match[1]) is None:
            raise UserError(
                f"--hostfile {path}, line {number}: {match[1]!r} is not the name of one host: use "
                "letters, digits, dots and hyphens, with USER@ in front if need be; options of ssh "
                "and IPv6 addresses belong in ~/.ssh/config"
            )
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"--hostfile {path} names no host: add lines such as `node-1 slots=8`")
    return hosts


def chosen_slots(
    hosts: Mapping[str, int], include: str = "", exclude: str = ""
) -> dict[str, list[int]]:
    """Host -> its slots that take part, as DeepSpeed reads --include and --exclude.

    Hosts and slots that the hostfile has not are ignored: they may have been taken out of it since.
    `require_known` refuses them at the beginning.

    Raises:
        UserError: a part of the text is not `HOST` or `HOST:SLOT,SLOT`.
    """
    named = _named_slots(include, exclude)
    slots: dict[str, list[int]] = {}
    for host, count in hosts.items():
        chosen = named.get(host, ()) or range(count if host in named else 0)
        slots[host] = [slot for slot in range(count) if (slot in chosen) == bool(include)]
    return {host: left for host, left in slots.items() if left}


def require_known(hosts: Mapping[str, int], include: str, exclude: str) -> None:
    """Refuse --include or --exclude of hosts or slots that are not there.

    Raises:
        UserError: naming the option, the part and the hosts that there are.
    """
    option = "--include" if include else "--exclude"
    for host, slots in _named_slots(include, exclude).items():
        if host not in hosts:
            raise UserError(f"{option}: no host {host!r} is there: name some of {', '.join(hosts)}")
        for slot in slots:
            if slot >= hosts[host]:
                raise UserError(
                    f"{option} {host}:{slot}: {host} has slots={hosts[host]}, numbered from 0: "
                    "name one below that, or leave the slots out for all of them"
                )


def _named_slots(include: str, exclude: str) -> dict[str, list[int]]:
    """Host -> its slots in the text of --include or --exclude; none for all of its slots."""
    named: dict[str, list[int]] = {}
    option = "--include" if include else "--exclude"
    for part in (include or exclude).split("@") if include or exclude else ():
        host, colon, numbers = part.partition(":")
        if not _SLOTS.fullmatch(numbers if colon else "0") or not host:
            raise UserError(
                f"{option} {include or exclude!r}: {part!r} is not HOST or HOST:SLOT,SLOT, where a "
                "slot is a whole number: write node-1@node-2:0,2, say"
            )
        slots = [int(number) for number in numbers.split(",")] if colon else []
        if host in named and not (slots and named[host]):
            raise UserError(
                f"{option} {include or exclude!r} names {host!r} twice, once for all of its slots: "
                "name it once"
            )
        named[host] = [*named.get(host, ()), *slots]
    return named


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def path_of_programs() -> str:
    """PATH for the launcher: programs beside this Python, such as ninja, are found first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def shell_words(name: str, text: str) -> list[str]:
    """The words of a variable or an option that holds a part of a command line.

    Raises:
        UserError: a quote in it does not end.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{name}={text}: {error}: end the quote, or leave it out") from None


def ssh_command(host: str, words: Sequence[str], port: int | None = None) -> list[str]:
    """The ssh command that runs words on a host with pdsh's options, without a password prompt."""
    options = shell_words("PDSH_SSH_ARGS_APPEND", os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    options += ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SECONDS_TO_ANSWER}"]
    if port is not None:
        options += ["-p", str(port)]
    return ["ssh", *options, host, shlex.join(words)]


def on_hosts(
    hosts: Iterable[str], words: Sequence[str], port: int | None = None, seconds: float = 15.0
) -> dict[str, str | None]:
    """The output of a command on each host, run in parallel; None if it failed or took too long."""

    def run(host: str) -> str | None:
        command = ssh_command(host, words, port)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    hosts = list(hosts)
    with ThreadPoolExecutor(max_workers=max(1, min(64, len(hosts)))) as pool:
        return dict(zip(hosts, pool.map(run, hosts), strict=True))


def address_of(host: str, port: int | None = None) -> str:
    """The first address of a host, by which others reach it; DeepSpeed takes the same."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        words = (on_hosts([host], ["hostname", "-I"], port)[host] or "").split()
        return words[0] if words else host
