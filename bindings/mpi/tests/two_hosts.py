"""Ranks on two hosts, as far as one machine can be two: two network namespaces, each with a host name of its own, joined by
a veth pair, so
that ranks have nothing in common but TCP. Needs root, iproute2 and Open MPI; exit status 77 (skipped, with the reason) otherwise.

usage: two_hosts.py MPIRUN RANKS PROGRAM [ARGUMENT...]
"""

import ipaddress
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile

MPIRUN, RANKS, *PROGRAM = sys.argv[1:]
NAMES = [f"fsdp{os.getpid()}{side}" for side in "ab"]
# A link-local network: nobody routes it.
NETWORK = ipaddress.ip_network("169.254.77.0/29")
HOSTS = [str(host) for host in list(NETWORK.hosts())[:2]]


def skip(reason):
    print(f"skipped: {reason}")
    sys.exit(77)


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)


def make_hosts():
    ip("link", "add", NAMES[0], "type", "veth", "peer", "name", NAMES[1])
    for name, host in zip(NAMES, HOSTS, strict=True):
        ip("netns", "add", name)
        ip("link", "set", name, "netns", name)
        inside = ("-n", name)
        ip(*inside, "addr", "add", f"{host}/{NETWORK.prefixlen}", "dev", name)
        ip(*inside, "link", "set", "lo", "up")
        ip(*inside, "link", "set", name, "up")


def remove_hosts():
    for name in NAMES:
        ip("netns", "delete", name, check=False)
        ip("link", "delete", name, check=False)


def run():
    with tempfile.TemporaryDirectory() as folder:
        # What mpirun uses in place of ssh: HOST COMMAND..., run in the namespace of that host.
        agent = os.path.join(folder, "agent")
        with open(agent, "w") as file:
            file.write(f'''#!/bin/sh
host=$1
shift
case $host in
{HOSTS[0]}) name={NAMES[0]} ;;
{HOSTS[1]}) name={NAMES[1]} ;;
*) echo "agent: no host $host" >&2; exit 1 ;;
esac
exec ip netns exec $name unshare --uts sh -c "hostname $name; $*"
''')
        os.chmod(agent, stat.S_IRWXU)
        per_host = (int(RANKS) + 1) // 2
        command = ["ip", "netns", "exec", NAMES[0], "unshare", "--uts", "sh", "-c", f'hostname {NAMES[0]}; exec "$@"', "sh",
                   MPIRUN, "-n", RANKS, "--map-by", "node", "--host", ",".join(f"{host}:{per_host}" for host in HOSTS),
                   "--mca", "plm_rsh_agent", agent, "--mca", "btl", "self,tcp", "--mca", "btl_tcp_if_include", str(NETWORK),
                   "--mca", "oob_tcp_if_include", str(NETWORK), "--mca", "pml", "ob1", *PROGRAM]
        try:
            return subprocess.run(command, stdin=subprocess.DEVNULL, timeout=90).returncode
        except subprocess.TimeoutExpired:
            print("FAILED: the ranks did not end within 90 s")
            return 1


if os.geteuid() != 0:
    skip("only root can make network namespaces")
for tool in ("ip", "unshare", "hostname"):
    if shutil.which(tool) is None:
        skip(f"{tool} was not found")
version = subprocess.run([MPIRUN, "--version"], capture_output=True, text=True).stdout
if "Open MPI" not in version and "OpenRTE" not in version:
    skip(f"{MPIRUN} is not Open MPI's: its way to start ranks on other hosts is not known here")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # cleans up, too
status = 1
try:
    try:
        make_hosts()
    except subprocess.CalledProcessError as error:
        remove_hosts()
        skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    status = run()
finally:
    remove_hosts()
sys.exit(status)
