"""The child's side: this file is run as a script, with the standard library alone.

It takes every right from its own process before it runs the program; nothing can give them back. It works on Linux,
for any user, without root or a container.

1. Limits (setrlimit) on CPU time, address space, file size and open files.
2. All capabilities dropped, and no new ones by execve (no_new_privs).
3. Landlock: files can be read below the standard library and the system's shared libraries, and written in the
   working folder, and that is all; TCP, signals and abstract sockets are closed as far as the kernel's Landlock goes.
4. seccomp: of all system calls only those of `CALLS` are left. There is none among them to start a process, to open a
   socket, to send a signal, to change an owner, mode or limit, to trace, mount or load. Those are closed as well that
   only a newer Landlock watches, and those that fill a disk without a count: see `_restrict_calls`.

"ready" on the result pipe says that all this holds. The program passes if it runs to its end: then the token of the
request, which arrives on stdin, is written there. A program could find the token in this interpreter's memory, so a
pass proves it right only where it is not written to cheat.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import sysconfig
import types

READY = b"ready\n"
"""What the result pipe begins with once the process is locked down; without it nothing was run."""

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_FILTER = 38, 22, 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture

# Rights of Landlock on files, by bit.
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_NOT_IN_FOLDER = 1 << 0 | 1 << 6 | 1 << 9 | 1 << 11 | 1 << 15  # run, make devices or sockets, control devices

# Architecture: its number in audit.h, those of clone, fcntl and mmap, and those of the calls that are left whatever
# their arguments: files; memory and threads; time, waiting, handling signals, who am I.
CALLS = {
    "x86_64": (
        0xC000003E,
        (56, 72, 9),
        "0-6 8 16-22 32 33 73-75 77 79-85 87 89 95 137 138 217 257 258 262-264 267 269 292 293 316 332 436 437 439",
        "10-12 24 25 28 158 202 204 218 219 273 274 309 324 334 449",
        "7 13-15 23 34-39 60 63 96-100 102 104 107 108 110 111 115 118 120 121 124 127 128 131 186 201 228-233 270 271"
        " 281 290 291 318",
    ),
    "aarch64": (
        0xC00000B7,
        (220, 25, 222),
        "17 23 24 29 32 34 35 38 43 44 46 48-50 56 57 59 61-68 78-80 82 83 276 291 436 437 439",
        "96 98-100 123 124 128 168 214-216 226 233 283 293 449",
        "19-22 72 73 93 94 101-103 113-115 132 134-137 139 148 150 153 155 156 158 160 163 165 166 169 172-179 278",
    ),
}
_CLONE3, _CLONE_THREAD, _MAP_SHARED = 435, 0x10000, 0x01
_FCNTL_COMMANDS = "0-7 36-38 1030"  # duplicate, flags, locks; not F_SETOWN or F_SETSIG, which send signals to anybody

_libc = ctypes.CDLL(None, use_errno=True)


def lock_down(folder: str, limits: dict[str, int]) -> None:
    """Take every right from this process but to compute, and to write in `folder`."""
    _limit(limits)
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _drop_capabilities()
    _restrict_files(folder)
    _restrict_calls()


def _limit(limits: dict[str, int]) -> None:
    for what, value in limits.items():
        resource.setrlimit(getattr(resource, what), (value, value))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _drop_capabilities() -> None:
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3, this thread
    _check(_libc.capset(header, bytes(24)))


def _restrict_files(folder: str) -> None:
    abi = _check(_landlock_abi())
    rights = _RIGHTS_BY_ABI[max(known for known in _RIGHTS_BY_ABI if known <= abi)]
    # What the kernel handles, and allows only by rule: files; TCP bind and connect; abstract sockets and signals.
    attributes = struct.pack("=QQQ", rights, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _check(_libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0))
    readable = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), os.path.join(sys.base_prefix, "lib")}
    readable |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"}
    allowed = dict.fromkeys(readable, _READ_FILE | _READ_DIR)
    allowed |= {"/dev/null": 1 << 1 | _READ_FILE, "/dev/urandom": _READ_FILE, "/dev/zero": _READ_FILE}
    allowed[folder] = rights & ~_NOT_IN_FOLDER
    for path, granted in allowed.items():
        if os.path.exists(path):
            file = os.open(path, os.O_PATH | os.O_CLOEXEC)
            _check(_libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", granted & rights, file), 0))
            os.close(file)
    _check(_libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _landlock_abi() -> int:
    """The version of the kernel's Landlock; negative without one."""
    return int(_libc.syscall(_CREATE_RULESET, None, 0, 1))


def _restrict_calls() -> None:
    """A filter in classic BPF: load a word of the call, compare, jump, return what to do.

    Of the calls that look at their arguments, clone makes threads alone; fcntl has the commands that send no signals,
    which Landlock knows of since Linux 6.12 only; mmap shares nothing, so whatever gets into a file was written by a
    call that the kernel counts. Left out for the same reasons: truncate (Landlock: Linux 6.2) and fallocate.
    """
    load, equal, bit, give = 0x20, 0x15, 0x45, 0x06
    allow, refuse, absent, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # errno 1 EPERM, 38 ENOSYS
    architecture, (clone, fcntl, mmap), *groups = CALLS[platform.machine()]
    first, second, fourth = 16, 24, 40  # where arguments lie
    yes, no = (give, 0, 0, allow), (give, 0, 0, refuse)
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(equal, 0, 1, _CLONE3), (give, 0, 0, absent)]  # its flags cannot be read here; libc falls back to clone
    for call in _numbers(" ".join(groups)):
        program += [(equal, 0, 1, call), yes]
    commands = [line for command in _numbers(_FCNTL_COMMANDS) for line in ((equal, 0, 1, command), yes)]
    for call, lines in {
        clone: [(load, 0, 0, first), (bit, 0, 1, _CLONE_THREAD), yes, no],
        mmap: [(load, 0, 0, fourth), (bit, 1, 0, _MAP_SHARED), yes, no],
        fcntl: [(load, 0, 0, second), *commands, no],
    }.items():
        program += [(equal, 0, len(lines), call), *lines]
    program.append(no)
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    code = ctypes.create_string_buffer(packed, len(packed))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, header, 0, 0))


def _numbers(text: str) -> list[int]:
    """``"1 3-5"`` as 1, 3, 4, 5."""
    ends = [(first, last or first) for first, _, last in (part.partition("-") for part in text.split())]
    return [number for first, last in ends for number in range(int(first), int(last) + 1)]


def _check(returned: int) -> int:
    if returned < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return returned


def main() -> None:
    """Read the request from stdin, lock down, run the program, say on the result pipe how it went."""
    request = json.load(sys.stdin)
    result, token = request["result"], request["token"]
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    try:
        lock_down(os.getcwd(), request["limits"])
    except Exception as error:
        os.write(result, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    os.write(result, READY)
    # As a module, and not the main one: an answer may end in a demonstration that waits for input.
    module = sys.modules["program"] = types.ModuleType("program")
    try:
        exec(compile(request["source"], "<program>", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:  # SystemExit too: the program has not come to its end
        os.write(result, f"{type(error).__name__}: {error}"[:500].encode(errors="replace"))
        os._exit(1)
    os.write(result, token.encode())
    os._exit(0)


if __name__ == "__main__":
    main()
