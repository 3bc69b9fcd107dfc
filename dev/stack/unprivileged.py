"""`unprivileged.py UID GID REACH PROGRAM ARGUMENT...`: run a program as another user. Needs root.

PostgreSQL refuses to run as root. With REACH 1, the program keeps CAP_DAC_OVERRIDE, which lets it
enter folders that are closed to its new user. A checkout in /root and temporary folders of mode
0700 then work as they are. Docker leaves this capability to root, too.

The script is run by its path in isolated mode, so it imports only the standard library.
"""

import ctypes
import os
import sys

_PR_SET_SECUREBITS = 28
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CAP_DAC_OVERRIDE = 1
_LINUX_CAPABILITY_VERSION_3 = 0x20080522


def _become(uid: int, gid: int) -> None:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)


def _keep_reach(libc: ctypes.CDLL) -> None:
    """Drop all capabilities but one, which survives exec. Raises OSError if that is forbidden."""
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    bit = 1 << _CAP_DAC_OVERRIDE
    # Effective, permitted and inheritable, then the same for the upper 32 capabilities.
    capabilities = (ctypes.c_uint32 * 6)(bit, bit, bit, 0, 0, 0)
    _check(libc.capset(ctypes.byref(header), ctypes.byref(capabilities)))
    _check(libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_OVERRIDE, 0, 0))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main() -> None:
    uid, gid, reach = (int(word) for word in sys.argv[1:4])
    if reach:
        libc = ctypes.CDLL(None, use_errno=True)
        # Keeps the capabilities after setuid. Also lets access(2) take them into account, which it
        # otherwise does only for root. PostgreSQL calls it for its own programs.
        _check(libc.prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0))
        _become(uid, gid)
        _keep_reach(libc)
    else:
        _become(uid, gid)
    os.execv(sys.argv[4], sys.argv[4:])  # noqa: S606 - runs the program of its arguments


if __name__ == "__main__":
    main()
