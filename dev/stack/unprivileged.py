"""Runs a program as another user: `unprivileged.py UID GID REACH PROGRAM ARGUMENT...`, by root.

PostgreSQL refuses to be root. With REACH 1 the program keeps one of root's rights, to pass through
folders that its new user may not enter (CAP_DAC_OVERRIDE; Docker leaves it to root too): a checkout
below /root and a temporary folder of mode 0700 then serve as they are, with nothing copied.

The script is run by its path, isolated: it imports nothing but the standard library.
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
    """Drops all capabilities but one, which survives exec. Raises OSError where that may not be."""
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    bit = 1 << _CAP_DAC_OVERRIDE
    # Effective, permitted, inheritable; then the upper 32 capabilities: none.
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
        # Keeps capabilities over setuid, and lets access(2), which PostgreSQL asks about its own
        # programs, see them: it leaves them out for all but root otherwise.
        _check(libc.prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0))
        _become(uid, gid)
        _keep_reach(libc)
    else:
        _become(uid, gid)
    os.execv(sys.argv[4], sys.argv[4:])  # noqa: S606 - the program that it was told to run


if __name__ == "__main__":
    main()
