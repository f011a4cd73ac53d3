"""What a process is watched by: put as `sitecustomize` on its path, it is imported before anything else.

The network is forbidden twice. The kernel ends the process at the first socket of the internet (seccomp), whoever makes
it: libraries in C have telemetry of their own. Python's own use ends it with status 97, and is noted. What is unpickled
and what is compiled are noted alone.
"""

import ctypes
import os
import struct
import sys

ENDED = 97
ARCHITECTURES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
"""Of Linux, with the number of the system call `socket`."""

NAMES = ("getaddrinfo", "gethostbyname", "gethostbyaddr", "getnameinfo")


def note(what):
    """Add a line to this process's log."""
    file = os.open(f"{os.environ['METARL_WATCH_LOG']}.{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(file, f"{what}\n".encode("utf-8", "backslashreplace"))
    os.close(file)


def watch(event, arguments):
    """See what Python is about to do."""
    kind, _, what = event.partition(".")
    if kind == "socket" and what in ("connect", "bind", "sendto", "sendmsg"):
        import socket

        if arguments[0].family != socket.AF_UNIX:
            note(f"network {event} {arguments[1:]!r}")
            os._exit(ENDED)
    elif kind == "socket" and what in NAMES:
        note(f"network {event} {arguments!r}")
        os._exit(ENDED)
    elif event == "pickle.find_class":
        note(f"pickle {arguments!r}")
    elif event == "compile" and os.environ["METARL_WATCH_CANARY"] in str(arguments[0]):
        note(f"compiled {arguments[0]!r}")


def forbid_sockets():
    """Have this process and all that it starts ended by SIGSYS at `socket(AF_INET, …)` and `socket(AF_INET6, …)`."""
    architecture, number = ARCHITECTURES[os.uname().machine]
    load, equal, end = 0x20, 0x15, 0x06  # operations of the Berkeley packet filter, on struct seccomp_data
    instructions = [
        *((load, 0, 0, 4), (equal, 0, 5, architecture)),
        *((load, 0, 0, 0), (equal, 0, 3, number)),
        *((load, 0, 0, 16), (equal, 2, 0, 2), (equal, 1, 0, 10)),
        *((end, 0, 0, 0x7FFF0000), (end, 0, 0, 0x80000000)),  # allow, kill the process
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in instructions))
    program = struct.pack("HP", len(instructions), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, seccomp, by_filter = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(seccomp, by_filter, program, 0, 0):
        note(f"unfiltered {os.strerror(ctypes.get_errno())}")


if __name__ == "sitecustomize":
    sys.addaudithook(watch)
    forbid_sockets()
    note(f"watching {sys.orig_argv!r}")
