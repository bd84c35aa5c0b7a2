"""A SLURM cluster of virtual nodes on this machine: real munged, slurmctld and slurmd, as root, without systemd.

    Cluster(folder).start() -> submit, states, scontrol ... -> stop()

Everything lies in one folder; daemons are found again by the pid files in it, and by nothing else.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

CONFIG = """
ClusterName=coconut
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
# A requeued job may not start on its old node until its old credential has expired: 120 s by default.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
# Nodes may claim more processors than this machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2,kill_invalid_depend
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=30
MinJobAge=3600
SlurmdTimeout=30
NodeName=n[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} RealMemory={memory_mb} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=30 PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=30 PriorityTier=10 PreemptMode=OFF State=UP
"""  # noqa: E501 - slurm.conf knows no folded lines here


class Cluster:
    """A private cluster.

    Args:
        folder: an empty folder for its state; short, as it holds a socket.
        nodes: virtual nodes, called n1, n2 ...
        cpus: processors that each of them claims to have.
    """

    def __init__(self, folder: Path, nodes: int = 3, cpus: int = 2) -> None:
        self.folder, self.nodes = folder, [f"n{number}" for number in range(1, nodes + 1)]
        self.config = folder / "slurm.conf"
        self.cpus = cpus
        self.environment = {**os.environ, "SLURM_CONF": str(self.config)}
        self.environment["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_", "COCONUT_"))]:
            if name != "SLURM_CONF":
                del self.environment[name]

    # -- life --

    def start(self, timeout_s: float = 60) -> None:
        for name in ("state", "spool", "log", "run", "munge"):
            (self.folder / name).mkdir(mode=0o755)
        for node in self.nodes:
            (self.folder / "spool" / node).mkdir()
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        port = free_ports(len(self.nodes) + 1)
        memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // len(self.nodes)
        values = dict(host=socket.gethostname().split(".")[0], port=port, folder=self.folder, cpus=self.cpus)
        values |= dict(nodes=len(self.nodes), first=port + 1, last=port + len(self.nodes), memory_mb=memory_mb)
        self.config.write_text(CONFIG.format(**values))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        # The nodes' names resolve inside jobs only: each slurmd gets a file of its own in place of /etc/hosts.
        names = "".join(f"127.0.0.1 {node}\n" for node in self.nodes)
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + names)
        munge = self.folder / "munge"
        self._daemon(
            "munged", "--force", f"--key-file={key}", f"--socket={munge / 'socket'}", f"--seed-file={munge / 'seed'}",
            f"--pid-file={self.folder / 'run' / 'munged.pid'}", f"--log-file={self.folder / 'log' / 'munged.log'}",
        )  # fmt: skip
        self._daemon("slurmctld", "-i", "-f", str(self.config))
        for node in self.nodes:
            self.start_node(node)
        wait_until(lambda: self.idle_nodes() == self.nodes, "all nodes idle", timeout_s, self.logs)

    def start_node(self, node: str) -> None:
        command = 'mount --bind "$1/hosts" /etc/hosts && exec slurmd -f "$1/slurm.conf" -N "$2"'
        self._daemon("unshare", "-m", "bash", "-c", command, "_", str(self.folder), node)

    def stop(self) -> None:
        """End all jobs, then the daemons."""
        jobs = self.run("squeue", "-h", "-o", "%A", check=False).split()
        if jobs:
            self.run("scancel", "--full", "--signal=KILL", *sorted(set(jobs)), check=False)
            self.run("scancel", *sorted(set(jobs)), check=False)
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and self.run("squeue", "-h", check=False):
                time.sleep(0.2)
        for pattern, name in (("slurmd.*.pid", "slurmd"), ("slurmctld.pid", "slurmctld"), ("munged.pid", "munged")):
            pids = [self._pid(file.name, name) for file in (self.folder / "run").glob(pattern)]
            stop_processes([pid for pid in pids if pid is not None])

    def _daemon(self, *command: str) -> None:
        log = self.folder / "log" / "daemons.txt"
        with log.open("a") as file:
            done = subprocess.run(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False
            )
        assert done.returncode == 0, f"{command[0]} does not start:\n{log.read_text()}"

    def _pid(self, file: str, name: str) -> int | None:
        """The daemon's process; None where it is gone, even if another process has its number now."""
        try:
            pid = int((self.folder / "run" / file).read_text())
            return pid if Path(f"/proc/{pid}/comm").read_text().strip() == name else None
        except (OSError, ValueError):
            return None

    # -- talking to it --

    def run(self, *command: str, cwd: Path | None = None, check: bool = True, **environment: str) -> str:
        done = subprocess.run(
            command,
            env=self.environment | environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: str, cwd: Path, **environment: str) -> str:
        """The job number of `sbatch words`."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, **environment)

    def idle_nodes(self) -> list[str]:
        return sorted(set(self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False).split()))

    def states(self, job: str) -> dict[int, str]:
        """State of each element."""
        answer = self.run("squeue", "-h", "-t", "all", "-r", "-j", job, "-o", "%K|%T", check=False)
        return {int(number): state for number, state in (line.split("|") for line in answer.splitlines())}

    def wait(self, job: str, timeout_s: float) -> dict[int, str]:
        """Wait until no element is pending, running or completing; their states."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
        states: dict[int, str] = {}

        def is_over() -> bool:
            nonlocal states
            states = self.states(job)
            return bool(states) and set(states.values()) <= over

        wait_until(is_over, f"the end of job {job}", timeout_s, lambda: f"{states}\n{self.logs()}")
        return states

    def logs(self) -> str:
        return "\n".join(f"== {path}\n{path.read_text()[-1500:]}" for path in sorted((self.folder / "log").iterdir()))


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody uses."""
    for first in range(17000 + os.getpid() % 1000, 19900, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise AssertionError("no free ports between 17000 and 20000")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float, details: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s\n{details()}"
        time.sleep(0.3)


def stop_processes(pids: Iterable[int]) -> None:
    """TERM, then KILL for those that stay."""
    left = list(pids)
    for number, patience_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        for pid in left:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + patience_s
        while left and time.monotonic() < deadline:
            left = [pid for pid in left if Path(f"/proc/{pid}").exists()]
            time.sleep(0.05)
