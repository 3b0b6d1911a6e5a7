"""What finds leaks is seen to find one."""

from __future__ import annotations

import os
import threading

from .held import Held


def test_a_file_and_a_thread_that_are_left_behind_are_found() -> None:
    before = Held.now()
    assert not Held.now().beyond(before)
    duplicate, end = os.dup(0), threading.Event()
    thread = threading.Thread(target=end.wait, args=(60,))
    thread.start()
    try:
        beyond = Held.now().beyond(before)
    finally:
        end.set()
        thread.join()
        os.close(duplicate)
    assert beyond == [os.readlink("/proc/self/fd/0"), thread]
    assert not Held.now().beyond(before)
