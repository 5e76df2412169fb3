"""A real Slurm of two nodes with accounting, on this machine alone, for tests and benches.

munged, mariadbd, slurmdbd, slurmctld and two slurmd, each in the foreground as our child, with all
they write in one folder below /tmp and all they open on loopback. Nothing of an installed Slurm,
munge or MariaDB is used but its programs. Every process that belongs to it, a job's too, has
SLURM_CONF of that folder in its environment or is named by a pid file there; so `stop` ends exactly
those, and the next start does the same for a folder whose owner was killed.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch")
PACKAGES = ("slurm-wlm", "munge", "slurmdbd", "mariadb-server")
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PREFIX = "dc-slurm-"
NODES = ("n1", "n2")
CPUS = 6
GRACE_S = 30
KILL_S = 10
# until a job that is queued again may start; before KILL_S is over, slurmd would kill the new start
# of the job with the old one: it knows them by the job's number alone
AGAIN_S = KILL_S + 2
START_S = 60.0
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")

CONF = """
ClusterName=deepclust
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={again}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool/%n
SlurmdLogFile={folder}/%n.log
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=3,sched_interval=3
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait={kill}
InactiveLimit=0
SlurmdTimeout=10
SlurmctldTimeout=20
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={dbd}
AccountingStoragePass={folder}/munge/socket
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory=10000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} Gres=gpu:1
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""

# devices that are none: a job sees their numbers, and nothing else
GRES_CONF = """
NodeName=n1 Name=gpu File={folder}/gpu0
NodeName=n1 Name=gpu File={folder}/gpu1
NodeName=n2 Name=gpu File={folder}/gpu0
"""

DBD_CONF = """
AuthType=auth/munge
AuthInfo={folder}/munge/socket
DbdHost=localhost
DbdPort={dbd}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""

SQL = """
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
CREATE USER IF NOT EXISTS 'slurm'@'localhost' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'localhost';
"""


def why_not() -> str:
    """Why no Slurm can be started here; installs it where DEEPCLUST_TEST_INSTALL=1 allows that."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Slurm of our own needs Linux and root"
    if _missing() and os.environ.get("DEEPCLUST_TEST_INSTALL") == "1":
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (("update",), ("install", "-y", "--no-install-recommends", *PACKAGES)):
            subprocess.run(["apt-get", "-qq", *words], env=quiet, check=True, stdout=2)
    if _missing():
        return (
            f"no {', '.join(_missing())} here: apt-get install {' '.join(PACKAGES)}, or "
            "DEEPCLUST_TEST_INSTALL=1"
        )
    return ""


def _missing() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=SBIN) is None]


class SlurmHere:
    """The daemons, the folder they live in, and the commands that speak to them."""

    def __init__(self) -> None:
        """Start all, after what a killed owner has left. Raises when a daemon does not come up."""
        sweep()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
        self.conf = self.folder / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": SBIN}
        self.ports = dict(zip(("sql", "dbd", "ctld", *NODES), _free_ports(5), strict=True))
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        _note(self.folder, "owner", os.getpid())
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        self.folder.chmod(0o755)
        self._write()
        self._accounting()
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self._until(lambda: self.call("sinfo", "-h", "-o", "%t %D").strip() == "idle 2", "nodes")

    def _write(self) -> None:
        facts = {
            **self.ports, "folder": self.folder, "host": platform.node(), "cpus": CPUS,
            "grace": GRACE_S, "kill": KILL_S, "again": AGAIN_S,
        }  # fmt: skip
        for name in ("munge", "state", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        self.conf.write_text(CONF.format(**facts))
        (self.folder / "gres.conf").write_text(GRES_CONF.format(**facts))
        for name in ("gpu0", "gpu1"):
            (self.folder / name).touch()
        dbd = self.folder / "slurmdbd.conf"
        dbd.touch(mode=0o600)
        dbd.write_text(DBD_CONF.format(**facts))
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        (self.folder / "init.sql").write_text(SQL.replace("\n\n", "\n"))

    def _accounting(self) -> None:
        munge, data = self.folder / "munge", self.folder / "sql"
        files = [f"--{n}-file={munge / n}" for n in ("key", "seed", "log", "pid")]
        self._daemon("munged", "munged", "-F", *files, f"--socket={munge / 'socket'}")
        sql = ["--no-defaults", "--user=root", f"--datadir={data}"]
        self.call("mariadb-install-db", *sql, "--skip-test-db", "--skip-log-bin")
        self._daemon(
            "mariadbd", "mariadbd", *sql, f"--port={self.ports['sql']}",
            "--bind-address=127.0.0.1", f"--socket={self.folder}/sql.sock",
            f"--init-file={self.folder}/init.sql", "--innodb-buffer-pool-size=32M",
            "--innodb-log-file-size=8M", "--performance-schema=OFF",
        )  # fmt: skip
        self._until(lambda: _answers(self.ports["sql"]), "mariadbd")
        self._daemon("slurmdbd", "slurmdbd", "-D")
        self._until(lambda: _answers(self.ports["dbd"]), "slurmdbd")
        self.call("sacctmgr", "-i", "add", "cluster", "deepclust")

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, also again after `kill_node`."""
        self._daemon(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str, tree: bool) -> None:
        """Kill a node's slurmd, and with `tree` all that runs there, as a power cut would."""
        family = [self.daemons[node].pid]
        if tree:
            family += [p for p in self.processes() if _variable(p, "SLURMD_NODENAME") == node]
            family += [p for p in self.processes() if f"[{node}]" in _title(p)]
        for pid in family:
            _kill(pid)
        self.daemons[node].wait()

    def call(self, *words: object) -> str:
        """What a Slurm command prints. Raises with its words when it fails."""
        done = subprocess.run(
            [str(word) for word in words], env=self.environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{words}: {done.stderr.strip()}\n{done.stdout.strip()}")
        return done.stdout

    def state(self, job: str) -> str:
        """What accounting says of a job: the first word of its state."""
        states = self.call("sacct", "-X", "-n", "-P", "-j", job, "-o", "State").split()
        return states[0] if states else ""

    def now(self, job: str) -> str:
        """The state of a job by squeue, which accounting follows with a delay; then by that."""
        done = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%T"], env=self.environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        return done.stdout.strip() or self.state(job)

    def wait(self, job: str, *states: str, patience: float = 120.0) -> str:
        """Wait for a job to be in one of the states (default: any last one); which it is."""
        wanted = states or OVER
        self._until(lambda: self.state(job) in wanted, f"job {job} in {wanted}", patience)
        return self.state(job)

    def processes(self, job: str | None = None) -> list[int]:
        """The processes with this Slurm, or with that job of it, in their environment."""
        name, value = ("SLURM_JOB_ID", job) if job else ("SLURM_CONF", str(self.conf))
        found = _with_variable(name, value)
        return [pid for pid in found if _variable(pid, "SLURM_CONF") == str(self.conf)]

    def stop(self) -> None:
        """End the daemons and whatever a job has left, and delete the folder."""
        if self.daemons.get("slurmctld") and self.daemons["slurmctld"].poll() is None:
            subprocess.run(["scancel", "-u", "root"], env=self.environment, check=False)
        clear(self.folder)
        for daemon in self.daemons.values():
            daemon.wait()

    def _daemon(self, name: str, *command: str) -> None:
        program = shutil.which(command[0], path=SBIN)
        assert program is not None
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                [program, *command[1:]], env=self.environment, stdin=subprocess.DEVNULL,
                stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        _note(self.folder, name, self.daemons[name].pid)

    def _until(self, ready: Callable[[], bool], what: str, patience: float = START_S) -> None:
        deadline = time.monotonic() + patience
        while not ready():
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"waiting for {what}: dead are {dead}; logs: {self._tails()}")
            time.sleep(0.2)

    def _tails(self) -> str:
        files = [f for p in ("*.out", "*.log") for f in sorted(self.folder.glob(p))]
        return "\n".join(f"== {f.name}\n{f.read_text(errors='replace')[-600:]}" for f in files)


@contextmanager
def running() -> Iterator[SlurmHere]:
    """A Slurm while the block lasts; commands that this process starts find it by SLURM_CONF.

    Raises `RuntimeError` where none can be started.
    """
    if reason := why_not():
        raise RuntimeError(reason)
    here = SlurmHere()
    before = {name: os.environ.get(name) for name in ("SLURM_CONF", "PATH")}
    os.environ.update({name: here.environment[name] for name in before})
    try:
        yield here
    finally:
        here.stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def sweep() -> None:
    """Clear the folders whose owners were killed."""
    for folder in Path("/tmp").glob(f"{PREFIX}*"):
        if not _pids(folder, "owner"):
            clear(folder)


def clear(folder: Path) -> None:
    """Kill what a folder's pid files and configuration name, jobs first, and delete it."""
    slurm = _with_variable("SLURM_CONF", str(folder / "slurm.conf"))
    jobs = [pid for pid in slurm if _variable(pid, "SLURM_JOB_ID")]
    daemons = [p for p in _pids(folder, "*.pid") if p not in _pids(folder, "owner")]
    for pid in {*jobs, *slurm, *daemons} - {os.getpid()}:
        _kill(pid)
    shutil.rmtree(folder, ignore_errors=True)


def _note(folder: Path, name: str, pid: int) -> None:
    """A pid file of our own; the start time tells whether the process is still that one."""
    (folder / f"{name}.ours.pid").write_text(f"{pid} {_began(pid)}")


def _pids(folder: Path, name: str) -> list[int]:
    """The living processes that our pid files of that name mean."""
    found = []
    for file in folder.glob(f"{name.removesuffix('.pid')}.ours.pid"):
        pid, _, began = file.read_text().partition(" ")
        if pid and began and _began(int(pid)) == began:
            found.append(int(pid))
    return found


def _began(pid: int) -> str:
    """When a process started, in clock ticks since boot; "" when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _with_variable(name: str, value: str) -> list[int]:
    mine = os.getpid()
    every = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [pid for pid in every if pid != mine and _variable(pid, name) == value]


def _variable(pid: int, name: str) -> str | None:
    """A variable of the environment that a process was started with."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return None
    pairs = dict(entry.partition("=")[::2] for entry in text.split("\0"))
    return pairs.get(name)


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [int(server.getsockname()[1]) for server in servers]
    finally:
        for server in servers:
            server.close()
