"""Several runs at the same work: one does it, and the others read it."""

from __future__ import annotations

import errno
import threading
import time

import pytest

from ecos_pl import once
from ecos_pl.conversation import Conversation
from ecos_pl.once import in_turn
from tests.test_messages import coverage_query


def test_blocks_of_one_folder_follow_each_other(tmp_path):
    made, waited = [], []

    def work():
        with in_turn(tmp_path / "banks/one", "another run is at it"):
            if not made:
                time.sleep(0.1)  # the others come
                made.append(1)
            else:
                waited.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(waited)) == (1, 3)


def test_an_error_leaves_the_turn_to_others(tmp_path):
    with pytest.raises(ValueError, match="broken"), in_turn(tmp_path / "banks/one", ""):
        raise ValueError("broken")
    with in_turn(tmp_path / "banks/one", ""):
        pass


def test_a_disk_without_locks_does_the_work_all_the_same(tmp_path, monkeypatch, caplog):
    def refuse(path, note):
        raise OSError(errno.ENOLCK, "No locks available")
        yield

    from contextlib import contextmanager

    monkeypatch.setattr(once, "one_at_a_time", contextmanager(refuse))
    with in_turn(tmp_path / "banks/one", ""):
        done = True
    assert done
    assert "No locks available" in caplog.text


def test_a_client_is_asked_once_by_two_at_a_time(tmp_path):
    class Slow:
        bytes_sent = bytes_received = asked = 0

        def ask(self, query):
            self.asked += 1
            time.sleep(0.1)
            self.bytes_sent, self.bytes_received = len(query), 3
            return b"yes"

    client, answers, query = Slow(), [], coverage_query().to_bytes()

    def ask():
        answers.append(Conversation(tmp_path, "f" * 64, lambda _: client).ask(query))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [b"yes"] * 3
    assert client.asked == 1
