"""Decoding in processes gives the bits of decoding in threads, whatever happens to a process."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from mam2.engine.data import decode_process
from mam2.engine.data.decode_process import MOST_ENDS, PRELUDE, SUPPORTED, CannotStart, DecodingProcesses
from mam2.engine.data.decoding import DecodeError, decode_frames
from mam2.engine.data.outage import why_away
from mam2.engine.data.renderer import MOST_THREADS, Renderer
from tests.helpers.loaders import CONFIG, assert_same, damaged, open_loader, take

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="needs Linux")
PROCESSES = dataclasses.replace(CONFIG, workers="processes")
BROKEN_DECODER = PRELUDE.replace(
    "serve({memory}, {answers})",
    """\
import mam2.engine.data.decode_process as own
real = own.decode_frames
own.decode_frames = lambda path, *rest, **named: own.os._exit(9) if "/0.mp4" in path else real(path, *rest, **named)
serve({memory}, {answers})""",
)
"""The program of a process that the file 0.mp4 ends."""
KILLED = PRELUDE.replace(
    "serve({memory}, {answers})",
    """\
import os
import mam2.engine.data.decode_process as own
real = own.decode_frames
def kill():
    if os.path.getsize(MARKS) < KILLS:
        with open(MARKS, "a") as file:
            file.write("x")
        os.kill(os.getpid(), NUMBER)
def decode(*arguments, **named):
    kill()
    return real(*arguments, **named)
if LATE:
    own.decode_frames = decode
else:
    kill()
serve({memory}, {answers})""",
)
"""The program of a process that gets a signal at its start, or LATE: when it decodes; KILLS times in all."""


@pytest.fixture
def processes():
    found = DecodingProcesses(1)
    yield found
    found.close()
    assert not found.pids


def runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    """Waits until a process has ended; returns False if it runs for a minute."""
    end = time.monotonic() + 60
    while runs(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not runs(pid)


def test_batches_have_the_bits_of_threads_also_after_a_resume(videos, tmp_path):
    broken = damaged(videos, tmp_path, 0, 1)
    expected, found = [], []
    batches = take(broken, 6, PROCESSES, on_skip=found.append)
    for one, other in zip(take(broken, 6, on_skip=expected.append), batches, strict=True):
        assert_same(one, other)
    assert {entry.path: entry.reason for entry in found} == {entry.path: entry.reason for entry in expected}
    assert len(found) == 2
    for one, other in zip(take(broken, 2, PROCESSES, first_step=4), batches[4:], strict=True):
        assert_same(one, other)


def test_a_killed_process_is_replaced(videos):
    expected = take(videos, MOST_ENDS - 2)  # so that one clip cannot meet MOST_ENDS kills
    with open_loader(videos, PROCESSES) as clips:
        stream, killed = clips.stream(), set()
        for batch in expected:
            assert_same(next(stream), batch)
            for pid in clips._renderer._processes.pids:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        assert len(killed) > 2
        assert not clips.skipped
        left = clips._renderer._processes.pids
    assert all(map(ends, [*killed, *left]))


@pytest.mark.parametrize("place", ["while it starts", "while it decodes"])
@pytest.mark.parametrize(
    ("kills", "number"), [(4, signal.SIGKILL), (2, signal.SIGUSR2), (MOST_ENDS, signal.SIGKILL)], ids=str
)
def test_a_kill_does_not_blame_the_file(videos, processes, monkeypatch, tmp_path, place, kills, number):
    """The system kills a process for want of memory, again and again; the clip is decoded when that stops."""
    marks = tmp_path / "kills"
    marks.touch()
    program = KILLED.replace("MARKS", repr(str(marks))).replace("KILLS", str(kills)).replace("NUMBER", f"{number:d}")
    monkeypatch.setattr(decode_process, "PRELUDE", program.replace("LATE", str(place == "while it decodes")))
    monkeypatch.setattr(decode_process, "FIRST_PAUSE_S", 0)
    path = videos.videos[0].path
    if kills == MOST_ENDS:
        decoding = place == "while it decodes"  # else the file was not even opened
        with pytest.raises(DecodeError if decoding else CannotStart, match="SIGKILL"):
            processes.decode_frames(path, [0], empty=np.empty)
    else:
        assert np.array_equal(processes.decode_frames(path, [0], empty=np.empty), decode_frames(path, [0]))
    assert marks.stat().st_size == kills


def test_a_file_that_ends_its_process_is_left_out(videos, monkeypatch):
    monkeypatch.setattr(decode_process, "PRELUDE", BROKEN_DECODER)
    found = []
    batches = take(videos, 5, PROCESSES, on_skip=found.append)
    assert [entry.reason for entry in found] == ["decoding it ended 2 processes (exit status 9)"]
    assert found[0].path.endswith("/0.mp4")
    assert all(0 not in batch.index for batch in batches)


def test_without_processes_it_decodes_in_threads_and_says_so(videos, monkeypatch):
    monkeypatch.setattr(decode_process, "PRELUDE", "raise SystemExit(3)  # {path} {memory}")
    lines = []
    for one, other in zip(take(videos, 3), take(videos, 3, PROCESSES, info=lines.append), strict=True):
        assert_same(one, other)
    assert lines == ["data    decoding in threads: a process for it cannot start (exit status 3)"]


def test_a_process_that_cannot_start_is_tried_again_after_a_while(videos, processes, monkeypatch, tmp_path):
    """Each try takes a core for a second: not for each clip. Later there may be memory again."""
    path, marks = videos.videos[0].path, tmp_path / "starts"
    with monkeypatch.context() as patch:
        patch.setattr(decode_process, "PRELUDE", f"open({str(marks)!r}, 'a').write('x'); raise SystemExit(3)")
        for _ in range(3):
            with pytest.raises(CannotStart, match="exit status 3"):
                processes.decode_frames(path, [0], empty=np.empty)
    assert marks.read_text() == "x"
    monkeypatch.setattr(decode_process, "RETRY_S", 0)
    assert np.array_equal(processes.decode_frames(path, [0], empty=np.empty), decode_frames(path, [0]))


def test_a_process_that_never_starts_does_not_stop_the_run(videos, processes, monkeypatch):
    monkeypatch.setattr(decode_process, "PRELUDE", "import time; time.sleep(600)")
    monkeypatch.setattr(decode_process, "START_S", 0.1)
    with pytest.raises(CannotStart, match=r"does not start within 0\.1 s"):
        processes.decode_frames(videos.videos[0].path, [0], empty=np.empty)
    assert not processes.pids


@pytest.mark.parametrize("found", [None, b""])
def test_python_in_another_program_decodes_in_threads(videos, processes, monkeypatch, found):
    """There sys.executable is empty; started with -c, the program itself might do anything."""
    monkeypatch.setattr(decode_process.spawn, "get_executable", lambda: found)
    with pytest.raises(CannotStart, match=r"multiprocessing\.set_executable"):
        processes.decode_frames(videos.videos[0].path, [0], empty=np.empty)


def test_what_starts_with_python_may_print(videos, processes, monkeypatch, capfd):
    monkeypatch.setattr(decode_process, "PRELUDE", f"print('loaded', flush=True)\n{PRELUDE}")
    path = videos.videos[0].path
    assert np.array_equal(processes.decode_frames(path, [0], empty=np.empty), decode_frames(path, [0]))
    assert capfd.readouterr() == ("", "loaded\n")


def test_an_answer_that_was_not_read_is_not_taken_for_the_next(videos, processes, monkeypatch):
    path = videos.videos[0].path
    processes.decode_frames(path, [0], empty=np.empty)
    with monkeypatch.context() as patch:
        patch.setattr(decode_process.pickle, "load", lambda _: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            processes.decode_frames(path, [0], empty=np.empty)
    assert np.array_equal(processes.decode_frames(path, [1, 2], empty=np.empty), decode_frames(path, [1, 2]))


@pytest.mark.parametrize("closed", [True, False])
def test_a_loader_leaves_no_process_and_no_descriptor(videos, closed):
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))
    clips = open_loader(videos, PROCESSES)
    next(clips.stream())
    pids = clips._renderer._processes.pids
    assert pids
    if closed:
        clips.close()
    workers = list(clips._renderer._pool._threads)
    del clips
    gc.collect()
    for worker in workers:
        worker.join(60)
    gc.collect()
    assert all(map(ends, pids))
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_results_and_errors_are_those_of_a_call(videos, processes, tmp_path):
    for video in videos.videos:  # sizes, codecs, and frames past the end
        frames = processes.decode_frames(video.path, [0, 3, 90], empty=np.empty, least_size=(8, 8), timeout_s=9.0)
        assert np.array_equal(frames, decode_frames(video.path, [0, 3, 90], least_size=(8, 8)))
    assert len(processes.pids) == 1
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 9)
    for path in ("noise.mp4", "absent/clip.mp4"):
        errors = []
        for decode in (decode_frames, processes.decode_frames):
            with pytest.raises(DecodeError) as caught:
                decode(str(tmp_path / path), [0], empty=np.empty)
            errors.append((str(caught.value), why_away(str(tmp_path / path), caught.value)))
        assert errors[0] == errors[1]
    assert errors[0][1] == f"folder {tmp_path / 'absent'} is missing or empty"  # for which a run waits
    with pytest.raises(TypeError):  # an error of the program is not an unusable file
        processes.decode_frames(videos.videos[0].path, [0], empty=np.empty, absent=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_stays_behind(videos, number):
    program = f"""\
import signal
import numpy as np
from mam2.engine.data.decode_process import DecodingProcesses
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
    own = DecodingProcesses(1)
    own.decode_frames({videos.videos[0].path!r}, [0], empty=np.empty)
    print(own.pids[0], flush=True)
    import time
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True) as parent:
        pid = int(parent.stdout.readline())
        if number == signal.SIGINT:
            os.killpg(parent.pid, number)  # as a terminal does
        else:
            parent.kill()
        assert parent.wait() != 0
    assert ends(pid)


def test_signals_for_all_processes_of_a_job_do_not_end_decoding(videos, processes):
    path = videos.videos[0].path
    processes.decode_frames(path, [0], empty=np.empty)
    before = processes.pids
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(before[0], number)
        processes.decode_frames(path, [0], empty=np.empty)
    assert processes.pids == before


def test_many_threads_become_processes():
    def decodes_in_processes(**values) -> bool:
        renderer = Renderer(dataclasses.replace(CONFIG, **values), samples=1, device=torch.device("cpu"), info=print)
        renderer.close()
        return renderer._processes is not None

    assert [decodes_in_processes(threads=count) for count in (1, MOST_THREADS, MOST_THREADS + 1)] == [0, 0, 1]
    assert [decodes_in_processes(threads=9, workers=workers) for workers in ("threads", "processes")] == [0, 1]
    assert decodes_in_processes(threads=1, workers="processes")
