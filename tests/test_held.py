"""What finds leaks is seen to find one."""

from __future__ import annotations

import os
import threading

from .held import Held


def test_a_file_and_a_thread_that_are_left_behind_are_found() -> None:
    before = Held.now()
    assert not Held.now().beyond(before)
    (reading, writing), end = os.pipe(), threading.Event()
    thread = threading.Thread(target=end.wait, args=(60,))
    thread.start()
    try:
        beyond = Held.now().beyond(before)
    finally:
        end.set()
        thread.join()
        name = os.readlink(f"/proc/self/fd/{reading}")  # a pipe's is its own, and that of both of its ends
        os.close(reading)
        os.close(writing)
    assert beyond == [name, name, thread]
    assert not Held.now().beyond(before)
